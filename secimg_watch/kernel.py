"""Calls of the operating system that the standard library lacks, or has on some systems only.

The one place that knows which system this is. On systems without a facility each function
answers what is true there: no lease can be had, a cache cannot be dropped.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import shutil
import signal
import stat
import sys
import time
from enum import Enum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

if sys.platform != "win32":
    import fcntl
    import resource

_RENAME_NOREPLACE: Final = 1
_PR_SET_DUMPABLE: Final = 4
_M_ARENA_MAX: Final = -8
_COPIED: Final = 1 << 30  # bytes for one call of copy_file_range, which may do less
_BUFFER: Final = 1 << 16
_LOCK_STEP: Final = 0.005  # seconds between two tries
# Not the same file system, not this kind of file, not this kernel, or a filter of system calls.
_CANNOT_COPY: Final = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}
)

# Directories are opened only to be walked and synced, never followed through a link.
DIRECTORY: Final[int] = (
    getattr(os, "O_DIRECTORY", 0)
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | os.O_RDONLY
)
# O_NONBLOCK: opening a FIFO that was swapped in must not wait for its writer.
PICTURE: Final[int] = (
    getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_BINARY", 0)
    | os.O_RDONLY
)

NETWORK_FILE_SYSTEMS: Final = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "vboxsf", "virtiofs"}
)
"""File systems that other machines write to: no events, no leases worth the name."""


class Lease(Enum):
    """The kernel's answer to the question whether anybody has a file open for writing."""

    GRANTED = "granted"
    WRITER = "writer"
    UNAVAILABLE = "unavailable"


def take_read_lease(fd: int) -> Lease:
    """Ask for a read lease on a descriptor that is open read-only (fcntl(2), F_SETLEASE).

    A granted lease proves that no descriptor and no shared mapping can write the file. A later
    open for writing breaks it: the opener waits, and `lease_intact` turns false.
    """
    answer = Lease.UNAVAILABLE
    if sys.platform == "linux":
        try:
            # The default signal of a lease break would end the process; SIGURG is ignored by
            # default, and the break is found by asking.
            fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            answer = Lease.GRANTED
        except OSError as error:
            if error.errno == errno.EAGAIN:
                answer = Lease.WRITER
    return answer


def lease_intact(fd: int) -> bool:
    """Whether the read lease still holds: false as soon as somebody opens for writing."""
    intact = False
    if sys.platform == "linux":
        intact = fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_RDLCK
    return intact


def read_at(fd: int, buffer: memoryview, offset: int) -> int:
    """Fill ``buffer`` from a position of the file; how many bytes there were.

    Where the system has such a call, the descriptor's own offset is neither used nor moved: a
    child process may share it.
    """
    if sys.platform != "win32":
        count = 0
        while count < len(buffer) and (more := os.preadv(fd, [buffer[count:]], offset + count)):
            count += more
    else:
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, len(buffer))
        count = len(data)
        buffer[:count] = data
    return count


def write_all(fd: int, data: bytes) -> None:
    """Write all of ``data``."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def write_at(fd: int, data: bytes, offset: int) -> None:
    """Write all of ``data`` at a position of the file, in one call where it is short."""
    os.lseek(fd, offset, os.SEEK_SET)
    write_all(fd, data)


def wake_pipe() -> tuple[int, int]:
    """Open a pipe, to be read and to be written, of which neither end ever blocks."""
    ends = os.pipe()
    if sys.platform != "win32":
        for end in ends:
            os.set_blocking(end, False)
    return ends


def copy_from(source: int, start: int, target: int) -> None:
    """Append a file's bytes from ``start`` on to another one, within the kernel where it can.

    The source's own offset is neither used nor moved.
    """
    if sys.platform == "linux":
        try:
            while count := os.copy_file_range(source, target, _COPIED, offset_src=start):
                start += count
        except OSError as error:
            if error.errno not in _CANNOT_COPY:
                raise
    buffer = memoryview(bytearray(_BUFFER))
    # What is left: all of it where the kernel cannot copy, and nothing where it did.
    while count := read_at(source, buffer, start):
        start += count
        rest = buffer[:count]
        while rest:
            rest = rest[os.write(target, rest) :]


def give_like(fd: int, status: os.stat_result) -> None:
    """Give an open file the owner and mode that another one has, as far as that is allowed.

    So that what an administrator replaces can still be read by whom it belongs to.
    """
    give_owner(fd, status)
    if sys.platform != "win32":
        os.fchmod(fd, stat.S_IMODE(status.st_mode))


def give_owner(fd: int, status: os.stat_result) -> None:
    """Give an open file the owner that another one has, as far as that is allowed."""
    if sys.platform != "win32":
        now = os.fstat(fd)
        if (now.st_uid, now.st_gid) != (status.st_uid, status.st_gid):
            with contextlib.suppress(PermissionError):
                os.fchown(fd, status.st_uid, status.st_gid)


def make_private(fd: int) -> None:
    """Take all rights to an open directory from everybody but its owner."""
    if sys.platform != "win32":
        os.fchmod(fd, 0o700)


def rename_noreplace(source: str, target: str, *, source_dir: int, target_dir: int) -> None:
    """Rename without ever overwriting. Names are relative to the two directory descriptors.

    Raises:
        FileExistsError: the target's name is taken.
        OSError: as rename(2).
    """
    if sys.platform == "linux" and _renameat2(source, target, source_dir, target_dir):
        return
    # A file system without RENAME_NOREPLACE: link(2) refuses a taken name just the same.
    os.link(source, target, src_dir_fd=source_dir, dst_dir_fd=target_dir, follow_symlinks=False)
    os.unlink(source, dir_fd=source_dir)


def nameless_file(directory: int, mode: int) -> int | None:
    """Open a new file for writing that has no name yet, and goes with its descriptor.

    ``None`` where there are none: another system, another file system, or no ``/proc``.
    """
    if sys.platform == "linux" and os.access("/proc/self/fd", os.X_OK):
        flags = os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC
        try:
            return os.open(".", flags, mode, dir_fd=directory)
        except OSError as error:
            if error.errno not in {errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL}:
                raise
    return None


def give_name(fd: int, name: str, *, target_dir: int) -> None:
    """Give a `nameless_file` its name, without ever overwriting.

    Raises:
        FileExistsError: the name is taken.
        OSError: as link(2).
    """
    os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=target_dir)  # followed: open(2), O_TMPFILE


def _renameat2(source: str, target: str, source_dir: int, target_dir: int) -> bool:
    function = getattr(_libc(), "renameat2", None)
    if function is None:
        return False
    failed = function(
        source_dir,
        os.fsencode(source),
        target_dir,
        os.fsencode(target),
        ctypes.c_uint(_RENAME_NOREPLACE),
    )
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in {errno.EINVAL, errno.ENOSYS}:
        return False
    raise OSError(code, os.strerror(code), target)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def drop_cache(fd: int) -> None:
    """Ask the kernel to forget a synced file's pages, so that the next read meets the device."""
    if sys.platform == "linux":
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def sync_directory(fd: int) -> None:
    """Make the names in a directory durable. Where directories cannot be synced, do nothing."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.EBADF}:
            raise


def sync_path(directory: Path) -> None:
    """`sync_directory` for a path."""
    fd = os.open(directory, DIRECTORY & ~getattr(os, "O_NOFOLLOW", 0))
    try:
        sync_directory(fd)
    finally:
        os.close(fd)


def sync_above(path: Path) -> None:
    """Make a directory's own name durable, and those of the directories above it.

    As far as its file system goes, and as far as they may be read: a sync of a directory need not
    say where that directory is found.
    """
    device = os.stat(path).st_dev
    for directory in path.resolve().parents:
        with contextlib.suppress(PermissionError):
            if os.stat(directory).st_dev != device:
                return
            sync_path(directory)


def open_parent(root: int, relpath: str) -> tuple[int, str]:
    """Open the directory that holds ``relpath`` below ``root``; gives a descriptor and the name.

    Every component is opened without following links, so a sub-folder that was swapped for a
    link leads nowhere. The caller closes the descriptor.

    Raises:
        OSError: a component is missing, is a link, or cannot be opened.
    """
    *folders, name = relpath.split("/")
    parent = os.dup(root)
    for folder in folders:
        try:
            child = os.open(folder, DIRECTORY, dir_fd=parent)
        finally:
            os.close(parent)
        parent = child
    return parent, name


def lock_exclusively(path: Path) -> int | None:
    """Create and lock a file for this process; ``None`` where another process holds the lock.

    The lock goes with the process, however it ends. The caller keeps the descriptor open.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
    if sys.platform != "win32":
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
    return fd


@contextlib.contextmanager
def locked(fd: int, patience: float) -> Iterator[None]:
    """Hold the lock of an open file, waiting up to ``patience`` seconds for it.

    Raises:
        TimeoutError: another process held it all the time.
    """
    if sys.platform != "win32":
        deadline = time.monotonic() + patience
        while not _take_lock(fd):
            if time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, "another process holds its lock")
            time.sleep(_LOCK_STEP)
    try:
        yield
    finally:
        if sys.platform != "win32":
            fcntl.flock(fd, fcntl.LOCK_UN)


def _take_lock(fd: int) -> bool:
    taken = True
    if sys.platform != "win32":
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken = False
    return taken


def lock_directory(fd: int) -> bool:
    """Lock an open directory; false where another descriptor of it holds the lock.

    Where directories cannot be locked, as on some network file systems, the answer is true.
    """
    if sys.platform != "win32":
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True
    return True


def unlock_directory(fd: int) -> None:
    """Give back the lock of `lock_directory`, if there is one."""
    if sys.platform != "win32":
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)


def free_space(path: Path) -> tuple[int, int]:
    """Bytes free for this user, and bytes in all, on the file system that holds ``path``."""
    usage = shutil.disk_usage(path)
    return usage.free, usage.total


def file_system_type(path: Path) -> str:
    """The type of the file system that ``path`` lies on, e.g. ``"ext4"``; "" where not known."""
    if sys.platform == "linux":
        device = os.stat(path).st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        try:
            with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
                lines = mounts.readlines()
        except OSError:
            return ""
        for line in lines:
            before, _, after = line.partition(" - ")
            if before.split()[2] == wanted:
                return after.split()[0]
    return ""


def is_remote(file_system: str) -> bool:
    """Whether files on such a file system can be written without this kernel's knowledge."""
    return file_system in NETWORK_FILE_SYSTEMS or file_system.startswith("fuse")


def watch_limit() -> int | None:
    """How many inotify watches a user may hold in all; ``None`` where that cannot be read."""
    try:
        with open("/proc/sys/fs/inotify/max_user_watches", encoding="ascii") as limit:
            return int(limit.read())
    except (OSError, ValueError):
        return None


def share_one_heap() -> None:
    """Have all threads allocate from one heap; to be called before there are any.

    glibc gives each its own, up to eight for each processor, and what was once large in one stays
    with it: the service grew by a third in an hour. Its threads run one at a time where they
    allocate, so that there is next to nothing to win by more.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # musl has one heap, and no such call
            _libc().mallopt(_M_ARENA_MAX, 1)


def protect_memory() -> None:
    """Keep this process's memory, and the key in it, out of core dumps and from debuggers."""
    if sys.platform != "win32":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        _libc().prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
