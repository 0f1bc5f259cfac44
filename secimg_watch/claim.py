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
from secimg_watch.hold import is_unchanged, refuse_if_changed
from secimg_watch.records import Claimed, Held, Identity, Inspected, Job, ObjectId
from secimg_watch.roots import LONGEST_CLAIM, QUARANTINE_NAME, Directory, Root, remove_directories

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
        ChangedInHandError: the name was swapped, or the file written to, in the meantime. What
            was moved by mistake is back under its name. If that is taken, a file stays in the
            staging directory under this job's id, and anything else gets that for a name.
        OSError: the system failed the move.
    """
    held = inspected.held
    if held.claimed:
        refuse_if_changed(held, held.identity)
        return Claimed(inspected, held.parent, held.name, held.identity, in_place=False)
    moved = _move(held, root, hands) if move and root.staging is not None else None
    if moved is None:
        refuse_if_changed(held, held.identity)
        return Claimed(inspected, held.parent, held.name, held.identity, in_place=True)
    parent, identity = moved
    refuse_if_changed(held, identity)
    return Claimed(inspected, parent, held.name, identity, in_place=False)


def _move(held: Held, root: Root, hands: ExitStack) -> tuple[int, Identity] | None:
    """Move a file into the staging directory; ``None`` where it cannot be moved.

    Gives a descriptor of the directory where it lies now, which ``hands`` closes.

    Raises:
        ChangedInHandError: the name led to something else, or the staging directory is gone.
        OSError: the system failed the move.
    """
    assert root.staging is not None  # noqa: S101 - asked by everybody who calls this
    folders = os.path.dirname(f"{held.job.object_id}/{held.job.relpath}")
    try:
        parent = _make_directories(root.staging, folders, held.name)
        hands.callback(os.close, parent)
        os.rename(held.name, held.name, src_dir_fd=held.parent, dst_dir_fd=parent)
    except OSError as error:
        remove_directories(root.staging.fd, folders)
        if isinstance(error, FileNotFoundError) and is_unchanged(held.job, root):
            raise ChangedInHandError("the staging directory was removed") from error
        if error.errno not in _CANNOT_MOVE:
            raise
        return None
    status = os.stat(held.name, dir_fd=parent, follow_symlinks=False)
    moved = Identity.of(status)
    if not moved.same_content(held.identity):
        _give_back(held, root, parent, status.st_mode)
        remove_directories(root.staging.fd, folders)
        raise ChangedInHandError("the file was replaced under its name")
    return parent, moved


def _make_directories(staging: Directory, folders: str, name: str) -> int:
    if len(os.fsencode(f"{folders}/{name}")) > LONGEST_CLAIM:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    parent = os.dup(staging.fd)
    for folder in folders.split("/"):
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder, 0o700, dir_fd=parent)
            child = os.open(folder, kernel.DIRECTORY, dir_fd=parent)
        finally:
            os.close(parent)
        parent = child
    return parent


def _give_back(held: Held, root: Root, parent: int, mode: int) -> None:
    with contextlib.suppress(OSError):
        kernel.rename_noreplace(held.name, held.name, source_dir=parent, target_dir=held.parent)
        return
    if stat.S_ISREG(mode):
        return
    # A directory that somebody else may have open must not stay among the claims. Nobody knows
    # the object's id yet, so nothing is there that this could replace.
    for directory in (held.parent, root.fd):
        with contextlib.suppress(OSError):
            os.rename(held.name, held.job.object_id, src_dir_fd=parent, dst_dir_fd=directory)
            return


def set_aside(job: Job, held: Held | None, root: Root) -> bool:
    """Move a job's file into quarantine; false where it can only stay where it is.

    Raises:
        OSError: the system failed the move.
    """
    if root.staging is None:
        return False
    staging = root.staging.fd
    if not root.has_staged(job.object_id) and (held is None or not _is_moved(held, root)):
        return False
    with contextlib.suppress(FileExistsError):
        os.mkdir(QUARANTINE_NAME, 0o700, dir_fd=staging)
    quarantine = os.open(QUARANTINE_NAME, kernel.DIRECTORY, dir_fd=staging)
    try:
        # Not synced. Wherever a power cut leaves it, the file is whole, and dealt with again; but
        # synced inside a directory whose own name was not, it could be gone with that.
        os.rename(job.object_id, job.object_id, src_dir_fd=staging, dst_dir_fd=quarantine)
    finally:
        os.close(quarantine)
    return True


def _is_moved(held: Held, root: Root) -> bool:
    with contextlib.ExitStack() as hands, contextlib.suppress(ChangedInHandError):
        return _move(held, root, hands) is not None
    return False


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
    # Not synced: a power cut that takes it back has the picture renamed once more.
    os.rename(object_id, new_id, src_dir_fd=staging, dst_dir_fd=staging)


def take_back(object_id: ObjectId, staging: Directory) -> bool:
    """Move a quarantined file back among the claimed ones; false where it is not there."""
    try:
        quarantine = os.open(QUARANTINE_NAME, kernel.DIRECTORY, dir_fd=staging.fd)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        os.rename(object_id, object_id, src_dir_fd=quarantine, dst_dir_fd=staging.fd)
    except FileNotFoundError:
        return False
    finally:
        os.close(quarantine)
    kernel.sync_directory(staging.fd)
    return True
