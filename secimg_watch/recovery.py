"""At start, and whenever a folder comes back: the queue is made to agree with the disk.

Nothing is sealed here, and nothing deleted but a second name that an earlier process made. Every
file in a staging directory gets its job back under the object id that its directory is named
after; the pipeline then does what is still to do, which for a committed object is to verify it
anew and finish the deletion. Doing all this twice, or being killed in the middle of it, changes
nothing.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from typing import TYPE_CHECKING, Final

from secimg_watch import kernel
from secimg_watch.erase import undo_half_move
from secimg_watch.jobs import State
from secimg_watch.records import FolderKey, Identity, Job, ObjectId, Proof
from secimg_watch.roots import QUARANTINE_NAME, only_file, remove_empty
from secimg_watch.vault import is_object_id

if TYPE_CHECKING:
    from pathlib import Path

    from secimg_watch.jobs import Jobs
    from secimg_watch.roots import Root

log = logging.getLogger(__name__)

# Planted by somebody: no reason to leave the whole folder alone.
_NOT_OURS: Final = frozenset({errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENOENT, errno.ELOOP})


def recover_folder(folder: FolderKey, root: Root, jobs: Jobs, move_to: Path | None = None) -> int:
    """Queue every claimed file of a folder, list every quarantined one; how many were claimed.

    ``move_to``: where plaintexts go by the policy, if they do.
    """
    found = 0
    if root.staging is not None:
        # What an earlier process deleted may come back in clear, where it died before that was
        # durable.
        with contextlib.suppress(OSError):
            kernel.sync_directory(root.staging.fd)
    for name in root.entries():
        if is_object_id(name) and _adopt(folder, root, jobs, name, State.QUEUED, move_to):
            found += 1
    for name in root.entries(QUARANTINE_NAME):
        if is_object_id(name):
            _adopt(folder, root, jobs, f"{QUARANTINE_NAME}/{name}", State.QUARANTINED)
    return found


def _adopt(
    folder: FolderKey,
    root: Root,
    jobs: Jobs,
    path: str,
    state: State,
    move_to: Path | None = None,
) -> bool:
    try:
        found = _look_into(root, path)
    except OSError as error:
        if error.errno not in _NOT_OURS:
            raise
        # Finished in this very moment; or none of ours, and never followed.
        if error.errno != errno.ENOENT:
            log.warning("folder %s: claim %s is none: %s", folder, path, error.strerror)
        return False
    if found is None:
        return False
    relpath, status = found
    job = Job(
        object_id=ObjectId(path.rsplit("/", 1)[-1]),
        folder=folder,
        relpath=relpath,
        identity=Identity.of(status),
        proof=Proof.RECOVERED,
        attempts=0,
        first_seen_ns=time.time_ns(),
    )
    if status.st_nlink > 1 and move_to is not None:
        undo_half_move(job, status, move_to)
    jobs.adopt(job, state, "" if state is State.QUEUED else "found in quarantine")
    return True


def _look_into(root: Root, path: str) -> tuple[str, os.stat_result] | None:
    assert root.staging is not None  # noqa: S101 - there are entries, so there is a directory
    above, name = kernel.open_parent(root.staging.fd, path)
    try:
        directory = os.open(name, kernel.DIRECTORY, dir_fd=above)
        try:
            found = only_file(directory)
        finally:
            os.close(directory)
        if found is None:
            # The process died between making the directories and the rename, or between the
            # unlink and removing them.
            remove_empty(above, name)
            return None
    finally:
        os.close(above)
    parent, relpath = found
    try:
        name = os.path.basename(relpath)
        return relpath, os.stat(name, dir_fd=parent, follow_symlinks=False)
    finally:
        os.close(parent)
