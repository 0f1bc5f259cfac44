"""Walking a watched folder. Events are hints; what a scan finds is what is there."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from secimg_watch import kernel
from secimg_watch.records import Identity
from secimg_watch.selection import Passed, Selection, passes_over_kind

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Found:
    """One name in a watched folder; ``passed`` says why it is passed over, if it is."""

    relpath: str
    identity: Identity
    passed: Passed | None


_NOWHERE = Identity(0, 0, 0, 0, 0)


def scan(root: int, selection: Selection, below: str = "") -> Iterator[Found]:
    """Every file under the directory descriptor ``root``, or under its sub-folder ``below``.

    Directories are opened one by one, without following links, and closed before the next; what
    vanishes while walking is left out.

    Raises:
        OSError: ``root`` or ``below`` itself cannot be opened, or the disk does not answer.
    """
    pending = [below]
    while pending:
        relative = pending.pop()
        try:
            directory = _open(root, relative)
        except OSError as error:
            if relative == below:
                raise
            if not is_gone(error):
                yield _refused(relative, error)
            continue
        try:
            yield from _list(directory, relative, selection, pending)
        finally:
            os.close(directory)


def folders(root: int, below: str = "") -> Iterator[str]:
    """Every directory under ``root``, or under its sub-folder ``below``, as a relative path.

    Opened as for `scan`, without following links; what cannot be opened is left out.
    """
    pending = [below]
    while pending:
        relative = pending.pop()
        with contextlib.suppress(OSError):
            directory = _open(root, relative)
            try:
                with os.scandir(directory) as entries:
                    names = [e.name for e in entries if e.is_dir(follow_symlinks=False)]
            finally:
                os.close(directory)
            found = [f"{relative}/{name}" if relative else name for name in names]
            yield from found
            pending += found


def look(root: int, relpath: str, selection: Selection) -> Found | None:
    """One path as a scan would find it; ``None`` where there is nothing, or a directory.

    Raises:
        OSError: the disk does not answer.
    """
    try:
        parent, name = kernel.open_parent(root, relpath)
        try:
            status = os.stat(name, dir_fd=parent, follow_symlinks=False)
        finally:
            os.close(parent)
    except OSError as error:
        return None if is_gone(error) else _refused(relpath, error)
    return None if stat.S_ISDIR(status.st_mode) else _found(relpath, status, selection)


def _open(root: int, relative: str) -> int:
    if not relative:
        return os.open(".", kernel.DIRECTORY, dir_fd=root)
    parent, name = kernel.open_parent(root, relative)
    try:
        return os.open(name, kernel.DIRECTORY, dir_fd=parent)
    finally:
        os.close(parent)


def _list(
    directory: int, relative: str, selection: Selection, pending: list[str]
) -> Iterator[Found]:
    with os.scandir(directory) as entries:
        for entry in entries:
            relpath = f"{relative}/{entry.name}" if relative else entry.name
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError as error:
                if not is_gone(error):
                    yield _refused(relpath, error)
                continue
            if not stat.S_ISDIR(status.st_mode):
                yield _found(relpath, status, selection)
            elif selection.enters(relpath):
                pending.append(relpath)


def is_gone(error: OSError) -> bool:
    """Whether a path leads nowhere any more; a disk that does not answer says nothing of it."""
    return error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}


def _refused(relpath: str, error: OSError) -> Found:
    if error.errno not in {errno.EACCES, errno.EPERM}:
        raise error
    return Found(relpath, _NOWHERE, Passed.UNREADABLE)


def _found(relpath: str, status: os.stat_result, selection: Selection) -> Found:
    passed = selection.passes_over(relpath) or passes_over_kind(status.st_mode, status.st_nlink)
    return Found(relpath, Identity.of(status), passed)
