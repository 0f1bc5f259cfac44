"""The only place where a user's file is deleted, and it takes a `Committed` to do it."""

from __future__ import annotations

import errno
import os
import time
from typing import TYPE_CHECKING

from secimg_watch import kernel
from secimg_watch.claim import remove_directories
from secimg_watch.errors import ChangedInHandError
from secimg_watch.hold import refuse_if_changed
from secimg_watch.records import Claimed, Committed, Erased, Identity

if TYPE_CHECKING:
    from pathlib import Path

    from secimg_watch.roots import Root


def erase(committed: Committed, root: Root) -> Erased:
    """Unlink the very inode that was verified, and make that durable.

    A claimed file lies in a directory that nobody else can write. One in place is compared a
    last time; what is unlinked is a name, and the kernel offers no unlink of an inode, so
    between comparison and unlink another process of the folder's owner could still swap it.

    Raises:
        ChangedInHandError: the name leads to another file, or the file was written to.
        OSError: the system refuses the unlink.
    """
    claimed = committed.verified.staged.claimed
    _refuse_if_swapped(claimed)
    os.unlink(claimed.name, dir_fd=claimed.parent)
    _settle_directory(claimed, root)
    return Erased(committed, time.time_ns())


def move_away(committed: Committed, root: Root, target: Path) -> Erased:
    """Move the plaintext into ``target`` instead of deleting it; never overwrites there.

    Raises:
        ChangedInHandError: as for `erase`.
        OSError: the move failed, e.g. ``target`` is on another file system.
    """
    claimed = committed.verified.staged.claimed
    job = claimed.inspected.held.job
    _refuse_if_swapped(claimed)
    directory = target / os.path.dirname(job.relpath)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    name = os.path.basename(job.relpath)
    fd = os.open(directory, kernel.DIRECTORY)
    try:
        for candidate in (name, f"{job.object_id}-{name}"[:255]):
            try:
                kernel.rename_noreplace(
                    claimed.name, candidate, source_dir=claimed.parent, target_dir=fd
                )
                break
            except FileExistsError:
                continue
        else:
            raise FileExistsError(errno.EEXIST, "both names are taken", str(directory))
        kernel.sync_directory(fd)
    finally:
        os.close(fd)
    _settle_directory(claimed, root)
    return Erased(committed, time.time_ns())


def keep(committed: Committed) -> Erased:
    """Leave the plaintext where it is, because the policy says so."""
    return Erased(committed, time.time_ns())


def _refuse_if_swapped(claimed: Claimed) -> None:
    refuse_if_changed(claimed.inspected.held, claimed.identity)
    named = os.stat(claimed.name, dir_fd=claimed.parent, follow_symlinks=False)
    if Identity.of(named) != claimed.identity:
        raise ChangedInHandError("the name leads to another file now; nothing was deleted")


def _settle_directory(claimed: Claimed, root: Root) -> None:
    if claimed.in_place or root.staging is None:
        kernel.sync_directory(claimed.parent)
        return
    object_id = claimed.inspected.held.job.object_id
    remove_directories(root.staging.fd, object_id, claimed.name)
    # One sync does for the unlink as well: the directory that held the file is gone, and it
    # can only have gone empty.
    kernel.sync_directory(root.staging.fd)
