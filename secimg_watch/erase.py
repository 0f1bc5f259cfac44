"""The only place where a user's file is deleted, and it takes a `Committed` to do it."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from secimg_watch import kernel
from secimg_watch.errors import ChangedInHandError
from secimg_watch.hold import refuse_if_changed
from secimg_watch.records import Claimed, Committed, Erased, Identity
from secimg_watch.roots import remove_directories

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from secimg_watch.records import Job
    from secimg_watch.roots import Root

# For good, as far as this file is concerned: rights, a read-only file system, or a ``move:``
# target on another one, or with something else where a sub-folder should be.
_REFUSED: Final = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.EXDEV, errno.ENOTDIR, errno.ELOOP}
)


@dataclass(frozen=True, slots=True)
class Erasure:
    """A committed object and what the policy wants done with its plaintext."""

    committed: Committed
    root: Root
    keep: bool
    move_to: Path | None


def erase(batch: Sequence[Erasure]) -> list[Erased | Exception]:
    """Unlink the very inodes that were verified, then make that durable; outcomes in order.

    A claimed file lies in a directory that nobody else can write. One in place is compared a
    last time; what is unlinked is a name, and the kernel offers no unlink of an inode, so
    between comparison and unlink another process of the folder's owner could still swap it.

    A ``ChangedInHandError`` among the outcomes says that a name led to another file, or that
    the file was written to; an ``OSError`` that the system failed. Where it refuses the unlink
    for good, the outcome is an ``Erased`` that says so.
    """
    outcomes: list[Erased | Exception] = []
    touched: dict[tuple[int, int], int] = {}  # device, inode -> descriptor of a directory
    for erasure in batch:
        try:
            _take_away(erasure)
            erased_ns = time.time_ns()
            fd = _directory(erasure)
            status = os.fstat(fd)
            touched[status.st_dev, status.st_ino] = fd
            outcomes.append(Erased(erasure.committed, erased_ns))
        except OSError as error:
            refused = error.errno in _REFUSED
            refusal = Erased(erasure.committed, time.time_ns(), error.strerror or "refused")
            outcomes.append(refusal if refused else error)
        except ChangedInHandError as error:
            outcomes.append(error)
    for fd in touched.values():
        # After a power cut an unlink that was not durable leaves the plaintext in the staging
        # directory, where recovery finds it: a failure here endangers nothing.
        with contextlib.suppress(OSError):
            kernel.sync_directory(fd)
    return outcomes


def _take_away(erasure: Erasure) -> None:
    claimed = erasure.committed.verified.staged.claimed
    if erasure.keep:
        return
    _refuse_if_swapped(claimed)
    if erasure.move_to is None:
        os.unlink(claimed.name, dir_fd=claimed.parent)
    else:
        _move_away(claimed, erasure.move_to)
    if not claimed.in_place and erasure.root.staging is not None:
        job = claimed.inspected.held.job
        folders = os.path.dirname(f"{job.object_id}/{job.relpath}")
        remove_directories(erasure.root.staging.fd, folders)


def _directory(erasure: Erasure) -> int:
    # The directory that held a claimed file is gone as well, and it can only have gone empty:
    # one sync of the staging directory does for both.
    claimed = erasure.committed.verified.staged.claimed
    staging = erasure.root.staging
    return claimed.parent if claimed.in_place or staging is None else staging.fd


def _move_away(claimed: Claimed, target: Path) -> None:
    """Move the plaintext into ``target``; never overwrites there."""
    job = claimed.inspected.held.job
    folder, _, name = job.relpath.rpartition("/")
    fd = _open_folder(target, folder)
    try:
        taken = _other_name(job)
        for candidate in (name, taken):
            try:
                kernel.rename_noreplace(
                    claimed.name, candidate, source_dir=claimed.parent, target_dir=fd
                )
            except FileExistsError:
                if candidate == taken:
                    raise
            else:
                break
        kernel.sync_directory(fd)
    finally:
        os.close(fd)


def _open_folder(target: Path, folder: str) -> int:
    """Open a sub-folder of the target, and make what is missing of it; the caller closes it.

    Never through a link: others may write there, to collect what is moved.
    """
    if not target.is_dir():
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        kernel.sync_above(target)
    here = os.open(os.path.realpath(target), kernel.DIRECTORY)
    for name in folder.split("/") if folder else ():
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=here)
                kernel.sync_directory(here)
            below = os.open(name, kernel.DIRECTORY, dir_fd=here)
        finally:
            os.close(here)
        here = below
    return here


def undo_half_move(job: Job, claimed: os.stat_result, target: Path) -> None:
    """Take away the second name that a process made in ``target`` before it died.

    Where a file system cannot rename without overwriting, `_move_away` links and unlinks. The
    name in the staging directory, which ``claimed`` is the status of, stays, so that the whole way
    is gone once more.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        top = os.open(os.path.realpath(target), kernel.DIRECTORY)
        try:
            fd, name = kernel.open_parent(top, job.relpath)
        finally:
            os.close(top)
        try:
            for candidate in (name, _other_name(job)):
                with contextlib.suppress(FileNotFoundError):
                    second = os.stat(candidate, dir_fd=fd, follow_symlinks=False)
                    if (second.st_dev, second.st_ino) == (claimed.st_dev, claimed.st_ino):
                        os.unlink(candidate, dir_fd=fd)
        finally:
            os.close(fd)


def _other_name(job: Job) -> str:
    return job.object_id + os.path.splitext(job.relpath)[1]


def _refuse_if_swapped(claimed: Claimed) -> None:
    refuse_if_changed(claimed.inspected.held, claimed.identity)
    named = os.stat(claimed.name, dir_fd=claimed.parent, follow_symlinks=False)
    if Identity.of(named) != claimed.identity:
        raise ChangedInHandError("the name leads to another file now; nothing was deleted")
