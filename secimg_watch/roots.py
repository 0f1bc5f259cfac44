"""A watched folder's root and its staging directory, held open.

A path is resolved once. From then on the two directories are known by their descriptors, so
that whoever renames, replaces or mounts over them changes nothing for the work in hand.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING

from secimg_watch import kernel
from secimg_watch.errors import FolderGoneError, NotAllowedError
from secimg_watch.selection import STAGING_NAME

if TYPE_CHECKING:
    from pathlib import Path

    from secimg_watch.records import ObjectId

QUARANTINE_NAME = "quarantine"
"""Inside the staging directory: what was given up on, one directory an object id."""

# For good, as far as this folder is concerned, or until its disk has space again.
_NO_STAGING = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
    | {errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT}
)


class Directory:
    """An open directory. The descriptor closes when nobody refers to it any more.

    Not closed by hand: a worker may still use it when the folder has moved on to a new root,
    and a number that was closed too early could already mean another directory.
    """

    def __init__(self, fd: int) -> None:
        """Take over an open descriptor."""
        self.fd = fd
        status = os.fstat(fd)
        self.node = (status.st_dev, status.st_ino)

    def __del__(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)


class Root:
    """The open root of a watched folder, and its staging directory where one can be had."""

    def __init__(self, path: Path, staging: Path | None) -> None:
        """Open both; the staging directory is made if it is missing.

        Args:
            path: the folder.
            staging: another staging directory than the default one in the folder's root.

        Raises:
            FolderGoneError: the folder is not there, or is no directory, or its staging directory
                does not answer.
            NotAllowedError: the staging directory belongs to somebody else.
        """
        self.path = path
        try:
            self.directory = Directory(os.open(os.path.realpath(path), kernel.DIRECTORY))
        except OSError as error:
            raise FolderGoneError(f"the folder cannot be opened: {error.strerror}") from error
        self.why_no_staging = ""
        self.staging_path = staging or path / STAGING_NAME
        self.staging = self._open_staging()

    @property
    def fd(self) -> int:
        """Descriptor of the root."""
        return self.directory.fd

    def is_current(self) -> bool:
        """Whether the path still leads to the directory that is held open."""
        try:
            status = os.stat(self.path)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self.directory.node

    def _open_staging(self) -> Directory | None:
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.staging_path, 0o700)
            staging = Directory(os.open(self.staging_path, kernel.DIRECTORY))
        except OSError as error:
            if error.errno not in _NO_STAGING:
                # What was claimed before lies there, and would not be found.
                reason = f"the staging directory does not answer: {error.strerror}"
                raise FolderGoneError(reason) from error
            self.why_no_staging = f"no staging directory: {error.strerror}"
            return None
        _refuse_if_not_ours(staging, self.staging_path)
        if staging.node[0] != self.directory.node[0]:
            self.why_no_staging = "the staging directory lies on another file system"
            return None
        return staging

    def staged(self, object_id: ObjectId) -> tuple[int, str] | None:
        """Where a claimed file lies: a descriptor of its directory, and its path there.

        The caller closes the descriptor. ``None`` where nothing is claimed under that id.
        """
        if self.staging is None:
            return None
        try:
            parent = os.open(object_id, kernel.DIRECTORY, dir_fd=self.staging.fd)
        except (FileNotFoundError, NotADirectoryError):
            return None
        relpath = only_file(parent)
        if relpath is None:
            os.close(parent)
            return None
        return parent, relpath

    def has_staged(self, object_id: ObjectId) -> bool:
        """Whether a file is claimed under that id."""
        found = self.staged(object_id)
        if found is None:
            return False
        os.close(found[0])
        return True

    def entries(self, below: str = ".") -> list[str]:
        """The names in the staging directory, or in one of its sub-directories."""
        if self.staging is None:
            return []
        try:
            fd = os.open(below, kernel.DIRECTORY, dir_fd=self.staging.fd)
        except FileNotFoundError:
            return []
        try:
            return os.listdir(fd)
        finally:
            os.close(fd)


def only_file(directory: int) -> str | None:
    """The relative path of the one file below a claim's directory, or ``None``."""
    relative = ""
    while True:
        fd = os.open(relative or ".", kernel.DIRECTORY, dir_fd=directory)
        try:
            names = os.listdir(fd)
            if len(names) != 1:
                return None
            mode = os.stat(names[0], dir_fd=fd, follow_symlinks=False).st_mode
        finally:
            os.close(fd)
        relative = f"{relative}/{names[0]}" if relative else names[0]
        if not stat.S_ISDIR(mode):
            return relative


def remove_empty(staging: int, path: str) -> None:
    """Remove a claim's directories where they hold no file."""
    chain = [path]
    while True:
        fd = os.open(chain[-1], kernel.DIRECTORY, dir_fd=staging)
        try:
            names = os.listdir(fd)
        finally:
            os.close(fd)
        if len(names) != 1:
            break
        chain.append(f"{chain[-1]}/{names[0]}")
    for directory in reversed(chain):
        try:
            os.rmdir(directory, dir_fd=staging)
        except OSError:
            return


def _refuse_if_not_ours(staging: Directory, path: Path) -> None:
    status = os.fstat(staging.fd)
    if hasattr(os, "geteuid") and status.st_uid != os.geteuid():
        raise NotAllowedError(
            f"the staging directory {path} belongs to another user",
            hint="remove it, or name another one with 'staging'",
        )
    if stat.S_IMODE(status.st_mode) & 0o077:
        kernel.make_private(staging.fd)
