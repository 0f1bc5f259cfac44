"""The only place where a user's file is deleted, and it takes a `Committed` to do it."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from secimg_watch import kernel
from secimg_watch.claim import remove_directories
from secimg_watch.errors import ChangedInHandError
from secimg_watch.hold import refuse_if_changed
from secimg_watch.records import Claimed, Committed, Erased, Identity

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from secimg_watch.records import Job
    from secimg_watch.roots import Root

# For good, as far as this file is concerned: rights, a read-only file system, or a ``move:``
# target on another one.
_REFUSED: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.EXDEV})


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
        object_id = claimed.inspected.held.job.object_id
        remove_directories(erasure.root.staging.fd, object_id, claimed.name)


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
    directory = target / folder
    if not directory.is_dir():
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        kernel.sync_above(directory)
    fd = os.open(directory, kernel.DIRECTORY)
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


def undo_half_move(job: Job, staging: int, target: Path) -> None:
    """Take away the second name that a process made in ``target`` before it died.

    Where a file system cannot rename without overwriting, `_move_away` links and unlinks. The
    name in the staging directory stays, so that the whole way is gone once more.
    """
    status = os.stat(f"{job.object_id}/{job.relpath}", dir_fd=staging, follow_symlinks=False)
    folder, _, name = job.relpath.rpartition("/")
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        fd = os.open(target / folder, kernel.DIRECTORY)
        try:
            for candidate in (name, _other_name(job)):
                with contextlib.suppress(FileNotFoundError):
                    second = os.stat(candidate, dir_fd=fd, follow_symlinks=False)
                    if (second.st_dev, second.st_ino) == (status.st_dev, status.st_ino):
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
