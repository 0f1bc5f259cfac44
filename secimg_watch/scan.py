"""Walking a watched folder. Events are hints; what a scan finds is what is there."""

from __future__ import annotations

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
    vanishes or cannot be opened while walking is left out.

    Raises:
        OSError: ``root`` or ``below`` itself cannot be opened.
    """
    pending = [below]
    while pending:
        relative = pending.pop()
        try:
            directory = _open(root, relative)
        except OSError as error:
            if relative == below:
                raise
            if error.errno not in {errno.ENOENT, errno.ENOTDIR}:
                yield Found(relative, _NOWHERE, Passed.UNREADABLE)
            continue
        try:
            yield from _list(directory, relative, selection, pending)
        finally:
            os.close(directory)


def look(root: int, relpath: str, selection: Selection) -> Found | None:
    """One path as a scan would find it; ``None`` where there is nothing, or a directory."""
    try:
        parent, name = kernel.open_parent(root, relpath)
    except OSError:
        return None
    try:
        status = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except OSError:
        return None
    finally:
        os.close(parent)
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
            except OSError:
                continue
            if not stat.S_ISDIR(status.st_mode):
                yield _found(relpath, status, selection)
            elif selection.enters(relpath):
                pending.append(relpath)


def _found(relpath: str, status: os.stat_result, selection: Selection) -> Found:
    passed = selection.passes_over(relpath) or passes_over_kind(status.st_mode, status.st_nlink)
    return Found(relpath, Identity.of(status), passed)
