"""Moving a picture to where nobody can swap its name, and giving it back.

A claim is one rename on one file system: it needs no space, keeps the inode and its lease, and
either happened or did not. The directory is named after the object's id, so that plaintext and
vault file find each other with no database at hand; below it the picture keeps its sub-folder
and its name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING

from secimg_watch import kernel
from secimg_watch.errors import ChangedInHandError
from secimg_watch.hold import refuse_if_changed
from secimg_watch.records import Claimed, Held, Identity, Inspected, Job, ObjectId
from secimg_watch.roots import QUARANTINE_NAME, Directory, Root

if TYPE_CHECKING:
    from contextlib import ExitStack

# The folder's own rights, another file system below it, a full disk (the claim's directory needs
# a block) or a path too long for the staging directory: the picture is sealed where it lies.
_CANNOT_MOVE = frozenset(
    {errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG}
    | {errno.ENOSPC, errno.EDQUOT}
)


def claim(inspected: Inspected, root: Root, hands: ExitStack, *, move: bool) -> Claimed:
    """Move an inspected file into the staging directory, or mark it as staying in place.

    Args:
        inspected: the file, held open.
        root: its folder.
        hands: closes what is opened here.
        move: false where the policy keeps the plaintext; then nothing is moved.

    Raises:
        ChangedInHandError: the name was swapped, or the file written to, in the meantime. A file
            that was moved by mistake is back under its name, or, if that is taken, stays in
            the staging directory under this job's id.
        OSError: the system failed the move.
    """
    held = inspected.held
    if held.claimed:
        refuse_if_changed(held, held.identity)
        return Claimed(inspected, held.parent, held.name, held.identity, in_place=False)
    if not move or root.staging is None or not _move(held, root.staging):
        refuse_if_changed(held, held.identity)
        return Claimed(inspected, held.parent, held.name, held.identity, in_place=True)
    parent = os.open(held.job.object_id, kernel.DIRECTORY, dir_fd=root.staging.fd)
    hands.callback(os.close, parent)
    relpath = held.job.relpath
    moved = Identity.of(os.stat(relpath, dir_fd=parent, follow_symlinks=False))
    if not moved.same_content(held.identity):
        _give_back(held, relpath, parent)
        remove_directories(root.staging.fd, held.job.object_id, relpath)
        raise ChangedInHandError("the file was replaced under its name")
    refuse_if_changed(held, moved)
    return Claimed(inspected, parent, relpath, moved, in_place=False)


def _move(held: Held, staging: Directory) -> bool:
    target = held.job.object_id
    try:
        _make_directories(staging.fd, target, held.job.relpath)
        os.rename(
            held.name,
            f"{target}/{held.job.relpath}",
            src_dir_fd=held.parent,
            dst_dir_fd=staging.fd,
        )
    except OSError as error:
        remove_directories(staging.fd, target, held.job.relpath)
        if error.errno not in _CANNOT_MOVE:
            raise
        return False
    return True


def _move_held(held: Held, staging: Directory) -> bool:
    """`_move`, unless the name leads to another file by now: that one is given back."""
    if not _move(held, staging):
        return False
    object_id, relpath = held.job.object_id, held.job.relpath
    parent = os.open(object_id, kernel.DIRECTORY, dir_fd=staging.fd)
    try:
        moved = Identity.of(os.stat(relpath, dir_fd=parent, follow_symlinks=False))
        if moved.same_content(held.identity):
            return True
        _give_back(held, relpath, parent)
    finally:
        os.close(parent)
    remove_directories(staging.fd, object_id, relpath)
    return False


def _make_directories(staging: int, object_id: str, relpath: str) -> None:
    # The staging directory is ours alone (0700), so nothing below it can be a planted link.
    path = object_id
    for folder in ("", *relpath.split("/")[:-1]):
        path = f"{path}/{folder}" if folder else path
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700, dir_fd=staging)


def _give_back(held: Held, relpath: str, parent: int) -> None:
    with contextlib.suppress(OSError):
        kernel.rename_noreplace(relpath, held.name, source_dir=parent, target_dir=held.parent)


def remove_directories(staging: int, object_id: str, relpath: str) -> None:
    """Remove the directories of a claim from the deepest up, as far as they are empty."""
    path = f"{object_id}/{relpath}"
    while "/" in path:
        path = path.rsplit("/", 1)[0]
        # A claim that failed half-way made some of them only.
        with contextlib.suppress(OSError):
            os.rmdir(path, dir_fd=staging)


def set_aside(job: Job, held: Held | None, root: Root) -> bool:
    """Move a job's file into quarantine; false where it can only stay where it is.

    Raises:
        OSError: the system failed the move.
    """
    if root.staging is None:
        return False
    staging = root.staging.fd
    if not root.has_staged(job.object_id) and (held is None or not _move_held(held, root.staging)):
        return False
    with contextlib.suppress(FileExistsError):
        os.mkdir(QUARANTINE_NAME, 0o700, dir_fd=staging)
    object_id = job.object_id
    os.rename(object_id, f"{QUARANTINE_NAME}/{object_id}", src_dir_fd=staging, dst_dir_fd=staging)
    kernel.sync_directory(staging)
    return True


def remove_marker(root: Root, relpath: str) -> None:
    """Remove a producer's marker file, if it is a regular file; a failure does no harm."""
    with contextlib.suppress(OSError):
        parent, name = kernel.open_parent(root.fd, relpath)
        try:
            if stat.S_ISREG(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                os.unlink(name, dir_fd=parent)
        finally:
            os.close(parent)


def rename_claim(root: Root, object_id: ObjectId, new_id: ObjectId) -> None:
    """Put a claimed file under another object id; descriptors of it stay good.

    Raises:
        OSError: the system failed the rename.
    """
    assert root.staging is not None  # noqa: S101 - it was claimed, so there is a directory
    staging = root.staging.fd
    os.rename(object_id, new_id, src_dir_fd=staging, dst_dir_fd=staging)
    kernel.sync_directory(staging)


def take_back(object_id: ObjectId, staging: Directory) -> bool:
    """Move a quarantined file back among the claimed ones; false where it is not there."""
    try:
        os.rename(
            f"{QUARANTINE_NAME}/{object_id}",
            object_id,
            src_dir_fd=staging.fd,
            dst_dir_fd=staging.fd,
        )
    except FileNotFoundError:
        return False
    kernel.sync_directory(staging.fd)
    return True
