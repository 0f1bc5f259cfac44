"""Writing restored pictures below one directory, whatever names and modes they come with.

Folder and name of an object were chosen by whoever sent the picture. They are walked one
component at a time with directory descriptors and never through a symbolic link, so that no
name leads out of the directory, also while somebody else renames things in it. A file appears
under its name only when it is whole and synced, and never in place of anything. Until then it has
no name at all where the file system can do that, so that a run that is killed leaves nothing in
clear behind; elsewhere it has a temporary one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from typing import TYPE_CHECKING, Self

from secimg_watch import kernel
from secimg_watch.errors import CannotCreateError, DiskFullError, SecimgError, StorageError
from secimg_watch.names import checked_component, display

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_NEW_FILE = (
    os.O_WRONLY
    | os.O_CREAT
    | os.O_EXCL
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)
_OWNER_ONLY = 0o600
_PERMISSIONS = 0o777  # without set-user-id, set-group-id and sticky
_TIME_RANGE = 2**63  # nanoseconds either side of 1970: what a kernel's ktime_t holds

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


class Destination:
    """A directory that restored files go below. Close it, or use it as a context manager."""

    def __init__(self, directory: Path) -> None:
        """Open the directory, or create it with mode 0700; its parent must be there.

        Raises:
            CannotCreateError: it cannot be created or opened, is a symbolic link or no
                directory, or the system has no directory descriptors (Windows).
        """
        if not {os.open, os.mkdir, os.unlink} <= os.supports_dir_fd:
            raise CannotCreateError("this system lacks the calls that a safe restore needs")
        with _explained(display(str(directory))):
            with contextlib.suppress(FileExistsError):
                os.mkdir(directory, 0o700)
                kernel.sync_above(directory)
            self._fd = os.open(directory, kernel.DIRECTORY)
        try:
            with _explained(display(str(directory))):
                self._allowed = _allowed_by_umask(self._fd)
        except SecimgError:
            self.close()
            raise

    def __enter__(self) -> Self:
        """Give itself."""
        return self

    def __exit__(self, *_exception: object) -> None:
        """Close the directory."""
        self.close()

    def close(self) -> None:
        """Close the directory. Files that are still open stay usable."""
        os.close(self._fd)

    def place(self, folder: bytes, name: bytes) -> RestoredFile:
        """Start a new file, in the sub-folder ``folder`` (components joined by ``/``, or empty).

        Sub-folders that are missing are made, with mode 0700.

        Raises:
            CannotCreateError: a component is hostile, a sub-folder is a symbolic link or no
                directory, the name is taken, or the place cannot be written.
            DiskFullError: there is no space for the new entry.
        """
        shown = display(os.fsdecode(os.path.join(folder, name)))
        try:
            folders = [checked_component(each) for each in folder.split(b"/")] if folder else []
            target = checked_component(name)
        except ValueError as error:
            raise CannotCreateError(f"refused to create '{shown}': {error}") from error
        with _explained(shown), contextlib.ExitStack() as opened:
            parent = _walk(self._fd, folders)
            opened.callback(os.close, parent)
            _refuse_taken(parent, target)
            file = RestoredFile(parent, target, shown, self._allowed)
            opened.pop_all()
        return file


class RestoredFile:
    """A file on its way: written without its name, then published or discarded.

    As a context manager it discards what was not committed.
    """

    def __init__(self, parent: int, target: str, shown: str, allowed: int) -> None:
        """Open the new file; `Destination.place` does. ``parent`` is owned from here on."""
        self._parent = parent
        self._target = target
        self._shown = shown
        self._allowed = allowed
        self._temporary = ""
        fd = kernel.nameless_file(parent, _OWNER_ONLY)
        if fd is None:
            # Watchers, ours among them, take a name that ends in .part for unfinished.
            self._temporary = f".{secrets.token_hex(16)}.part"
            fd = os.open(self._temporary, _NEW_FILE, _OWNER_ONLY, dir_fd=parent)
        self._fd = fd

    def __enter__(self) -> Self:
        """Give itself."""
        return self

    def __exit__(self, *_exception: object) -> None:
        """Discard the file unless it was committed."""
        self.discard()

    def write(self, view: memoryview | bytes) -> None:
        """Append bytes.

        Raises:
            DiskFullError: the file system is full.
            StorageError: the operating system failed the write.
        """
        rest = memoryview(view).cast("B")
        with _explained(self._shown):
            while rest:
                rest = rest[os.write(self._fd, rest) :]

    def commit(self, *, mode: int, mtime_ns: int) -> None:
        """Publish the file under its name, durably.

        Of ``mode`` the permission bits count, less the process's umask, and the owner can
        always read and write. ``mtime_ns``, in nanoseconds since 1970, is clamped to 64 bits;
        the file system may clamp it further.

        Raises:
            CannotCreateError: the name was taken meanwhile; what has it is untouched.
            DiskFullError: the file system is full.
            StorageError: the operating system failed a call.
        """
        moment = min(max(mtime_ns, -_TIME_RANGE), _TIME_RANGE - 1)
        try:
            with _explained(self._shown):
                # FAT has no modes to change; its files keep what the mount gives them.
                with contextlib.suppress(PermissionError):
                    os.chmod(self._fd, (mode & _PERMISSIONS & self._allowed) | _OWNER_ONLY)
                os.utime(self._fd, ns=(moment, moment))
                os.fsync(self._fd)
                if self._temporary:
                    _publish(self._temporary, self._target, self._parent)
                else:
                    kernel.give_name(self._fd, self._target, target_dir=self._parent)
                kernel.sync_directory(self._parent)
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove the unfinished file. After a commit, or a second time, it does nothing."""
        if self._fd < 0:
            return
        # Already gone where it was published, and beyond help where the disk fails.
        if self._temporary:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary, dir_fd=self._parent)
        os.close(self._fd)
        os.close(self._parent)
        # A late call must not meet a descriptor that somebody else was given meanwhile.
        self._fd = self._parent = -1


def _walk(top: int, folders: list[str]) -> int:
    """Open the sub-folder, making what is missing. The caller closes the descriptor."""
    here = os.dup(top)
    for folder in folders:
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder, 0o700, dir_fd=here)
                kernel.sync_directory(here)
            below = os.open(folder, kernel.DIRECTORY, dir_fd=here)
        finally:
            os.close(here)
        here = below
    return here


def _refuse_taken(parent: int, target: str) -> None:
    """Tell early, before anything is decrypted. It is the publishing that never overwrites."""
    with contextlib.suppress(FileNotFoundError):
        os.stat(target, dir_fd=parent, follow_symlinks=False)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))


def _publish(temporary: str, target: str, parent: int) -> None:
    try:
        kernel.rename_noreplace(temporary, target, source_dir=parent, target_dir=parent)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _publish_over_placeholder(temporary, target, parent)


def _publish_over_placeholder(temporary: str, target: str, parent: int) -> None:
    """Publish where the file system knows neither RENAME_NOREPLACE nor hard links."""
    # O_EXCL takes the name or fails, so what the rename replaces is our own empty file.
    os.close(os.open(target, _NEW_FILE, _OWNER_ONLY, dir_fd=parent))
    try:
        os.rename(temporary, target, src_dir_fd=parent, dst_dir_fd=parent)
    except OSError:
        os.unlink(target, dir_fd=parent)
        raise


def _allowed_by_umask(directory: int) -> int:
    """Permission bits that a new file may have here, read from a short-lived empty one.

    Asking with umask(2) would set it, for every thread of the process.
    """
    probe = f".{secrets.token_hex(16)}.part"
    fd = os.open(probe, _NEW_FILE, _PERMISSIONS, dir_fd=directory)
    try:
        return os.fstat(fd).st_mode & _PERMISSIONS
    finally:
        os.close(fd)
        os.unlink(probe, dir_fd=directory)


@contextlib.contextmanager
def _explained(shown: str) -> Iterator[None]:
    """Turn what the operating system refuses into the package's errors."""
    try:
        yield
    except FileExistsError as error:
        raise CannotCreateError(f"'{shown}' exists already") from error
    except OSError as error:
        raise _translated(error, shown) from error


def _translated(error: OSError, shown: str) -> SecimgError:
    if error.errno in _NO_SPACE:
        return DiskFullError(f"no space left for '{shown}'", hint="free some space")
    if error.errno in {errno.ELOOP, errno.ENOTDIR}:
        return CannotCreateError(f"cannot create '{shown}': a link or a file is where a folder is")
    if error.errno == errno.EIO:
        return StorageError(f"cannot write '{shown}': {error.strerror}")
    return CannotCreateError(f"cannot create '{shown}': {error.strerror}")
