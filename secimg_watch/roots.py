"""A watched folder's root and its staging directory, held open.

A path is resolved once. From then on the two directories are known by their descriptors, so
that whoever renames, replaces or mounts over them changes nothing for the work in hand.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING, Final

from secimg_watch import kernel
from secimg_watch.errors import AlreadyRunningError, FolderGoneError, NotAllowedError
from secimg_watch.selection import STAGING_NAME

if TYPE_CHECKING:
    from pathlib import Path

    from secimg_watch.records import ObjectId

QUARANTINE_NAME = "quarantine"
"""Inside the staging directory: what was given up on, one directory an object id."""

LONGEST_CLAIM: Final = 4095
"""Bytes in a claim's path below the staging directory, so that a person can name it: PATH_MAX of
Linux's ``limits.h``, without the NUL."""

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
            NotAllowedError: the staging directory that the policy names belongs to somebody else.
        """
        self.path = path
        try:
            self.directory = Directory(os.open(os.path.realpath(path), kernel.DIRECTORY))
        except OSError as error:
            raise FolderGoneError(f"the folder cannot be opened: {error.strerror}") from error
        self.is_mount_point = os.path.ismount(os.path.realpath(path))
        self.why_no_staging = ""
        self.staging_path = staging or path / STAGING_NAME
        self.staging = self._open_staging(named=staging is not None)
        self._is_barred = self.staging is None and os.path.lexists(self.staging_path)

    @property
    def fd(self) -> int:
        """Descriptor of the root."""
        return self.directory.fd

    @property
    def device(self) -> int:
        """The file system that the root lies on."""
        return self.directory.node[0]

    def is_current(self) -> bool:
        """Whether both paths still lead to the directories that are held open.

        Whoever may write to the folder can take an empty staging directory down or move it away.
        What lies in its place instead may be gone again.
        """
        if not _leads_to(self.path, self.directory):
            return False
        if self.staging is None:
            return not self._is_barred or os.path.lexists(self.staging_path)
        return _leads_to(self.staging_path, self.staging)

    def lock(self) -> None:
        """Be the one service that works here.

        The staging directory is locked, which nobody else can open: anybody who may read the
        folder itself could lock that, and keep it from being served.

        Raises:
            AlreadyRunningError: another service does.
        """
        if self.staging is not None and not kernel.lock_directory(self.staging.fd):
            raise AlreadyRunningError("another secimg-watch works on this folder")

    def unlock(self) -> None:
        """Let another service work here; descriptors stay good."""
        if self.staging is not None:
            kernel.unlock_directory(self.staging.fd)

    def _open_staging(self, *, named: bool) -> Directory | None:
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
        if not _is_ours(staging):
            # In the folder anybody may have made it, and must not keep pictures in clear with it.
            self.why_no_staging = "the staging directory belongs to another user"
            if not named:
                return None
            raise NotAllowedError(
                f"the staging directory {self.staging_path} belongs to another user",
                hint="remove it, or name another one with 'staging'",
            )
        _close_to_others(staging)
        if staging.node[0] != self.directory.node[0]:
            self.why_no_staging = "the staging directory lies on another file system"
            return None
        return staging

    def staged(self, object_id: ObjectId) -> tuple[int, str] | None:
        """Where a claimed file lies: a descriptor of the directory it lies in, and its name.

        The caller closes the descriptor. ``None`` where nothing is claimed under that id.

        Raises:
            OSError: it cannot be looked into.
        """
        if self.staging is None:
            return None
        try:
            directory = os.open(object_id, kernel.DIRECTORY, dir_fd=self.staging.fd)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            found = only_file(directory)
        finally:
            os.close(directory)
        return None if found is None else (found[0], os.path.basename(found[1]))

    def has_staged(self, object_id: ObjectId) -> bool:
        """Whether a file is claimed under that id, or something that cannot be looked into."""
        try:
            found = self.staged(object_id)
        except FileNotFoundError:
            return False
        except OSError:
            return True
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
        except (FileNotFoundError, NotADirectoryError):
            return []  # a link in its place is not followed
        try:
            return os.listdir(fd)
        finally:
            os.close(fd)


def only_file(directory: int) -> tuple[int, str] | None:
    """The one file below a claim's directory: a descriptor of where it lies, and its path.

    Walked by descriptors and never through a link. What a claim moved may have become somebody's
    directory in that moment, and whoever has it open can still change what is in it: a path that
    was looked at before leads elsewhere then.

    The caller closes the descriptor. ``None`` where there is not just one file.
    """
    parent, relative = os.dup(directory), ""
    try:
        while True:
            names = os.listdir(parent)
            if len(names) != 1:
                return None
            relative = os.path.join(relative, names[0])
            if len(os.fsencode(relative)) > LONGEST_CLAIM:
                return None
            mode = os.stat(names[0], dir_fd=parent, follow_symlinks=False).st_mode
            if not stat.S_ISDIR(mode):
                return os.dup(parent), relative
            child = os.open(names[0], kernel.DIRECTORY, dir_fd=parent)
            os.close(parent)
            parent = child
    finally:
        os.close(parent)


def remove_empty(parent: int, name: str) -> None:
    """Remove a claim's directories where they hold no file."""
    path, directory = name, os.dup(parent)
    try:
        names = [name]
        while names:
            child = os.open(names[0], kernel.DIRECTORY, dir_fd=directory)
            os.close(directory)
            directory = child
            names = os.listdir(directory)
            if len(names) > 1 or len(path) > LONGEST_CLAIM:
                return
            path = "/".join([path, *names])
    except OSError:
        return
    finally:
        os.close(directory)
    remove_directories(parent, path)


def remove_directories(top: int, path: str) -> None:
    """Remove ``path`` and the directories above it, up to ``top``, as far as they are empty."""
    while path:
        # A claim that failed half-way made some of them only.
        with contextlib.suppress(OSError):
            parent, name = kernel.open_parent(top, path)
            try:
                os.rmdir(name, dir_fd=parent)
            finally:
                os.close(parent)
        path = path.rpartition("/")[0]


def _leads_to(path: Path, directory: Directory) -> bool:
    try:
        status = os.stat(path)
    except OSError:
        return False
    return (status.st_dev, status.st_ino) == directory.node


def _is_ours(directory: Directory) -> bool:
    return not hasattr(os, "geteuid") or os.fstat(directory.fd).st_uid == os.geteuid()


def _close_to_others(directory: Directory) -> None:
    if stat.S_IMODE(os.fstat(directory.fd).st_mode) & 0o077:
        kernel.make_private(directory.fd)
