"""Where one line of a secret comes from or goes: a file that nobody else reads, or a program."""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import signal
import stat
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Final

from secimg_watch import kernel
from secimg_watch.errors import (
    ConfigError,
    InsecureKeyError,
    KeyMissingError,
    KeyUnavailableError,
    SecimgError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

INIT_HINT: Final = "secimg-watch key init"

_LINE_LIMIT: Final = 4096  # bytes; a key has 85, and there are at most eight
_OTHERS: Final = 0o007
_GROUP: Final = 0o070
_ACL: Final = "system.posix_acl_access"


def read_private(path: Path, *, acl: bool) -> str:
    """Read the only line of a file that nobody else can read.

    With ``acl``, group bits count as the mask of an access control list where there is one:
    systemd hands credentials to a service's user that way, on file systems that have lists.
    """
    try:
        fd = os.open(path, kernel.PICTURE)
        try:
            fault = _fault(fd, acl=acl)
            line = b"" if fault else os.read(fd, _LINE_LIMIT)
        finally:
            os.close(fd)
    except OSError as error:
        raise _unreadable(path, error) from error
    if fault:
        raise InsecureKeyError(f"refused {path}: {fault}", hint="it must be yours, with mode 0400")
    return without_line_end(line)


def _fault(fd: int, *, acl: bool) -> str:
    """Say why a file does not keep a secret; nothing if it does."""
    status = os.fstat(fd)
    fault = ""
    if sys.platform == "win32":
        fault = "on Windows a file's mode does not tell who can read it"
    elif not stat.S_ISREG(status.st_mode):
        fault = "it is not a regular file"
    elif status.st_uid not in {0, os.geteuid()}:
        fault = "it belongs to another user"
    elif status.st_mode & _OTHERS or (status.st_mode & _GROUP and not (acl and _has_list(fd))):
        fault = "others may use it"
    return fault


def _unreadable(path: Path, error: OSError) -> SecimgError:
    if error.errno == errno.ENOENT:
        return KeyMissingError(f"{path} does not exist", hint=INIT_HINT)
    if error.errno == errno.ELOOP:
        return InsecureKeyError(f"refused {path}: it is a symbolic link")
    if error.errno in {errno.EACCES, errno.EPERM, errno.ENOTDIR}:
        return ConfigError(f"cannot read {path}: {error.strerror}")
    return KeyUnavailableError(f"cannot read {path}: {error.strerror}")


def _has_list(fd: int) -> bool:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            return bool(os.getxattr(fd, _ACL))
    return False


def without_line_end(line: bytes) -> str:
    """Return a line as text, without what ends it."""
    return line.removesuffix(b"\n").removesuffix(b"\r").decode("ascii", "replace")


def write_private(path: Path, line: str, *, like: Path) -> None:
    """Make a file with one line that only its owner can read, and sync it.

    Where there is a file ``like``, it gets its owner and mode: what an administrator replaces
    stays the service's.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400)
    with open(fd, "wb") as stream:
        with contextlib.suppress(FileNotFoundError):
            kernel.give_like(fd, os.stat(like))
        stream.write(f"{line}\n".encode("ascii"))
        stream.flush()
        os.fsync(fd)


def first_line(
    argv: Sequence[str], environ: Mapping[str, str], timeout: float
) -> tuple[int | None, bytes]:
    """Run a program; give its status, None where it was killed for taking too long."""
    deadline = time.monotonic() + timeout
    process = subprocess.Popen(  # noqa: S603 - the administrator's own command, without a shell
        argv,
        env=environ,
        bufsize=0,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        if process.stdout is not None:
            with process.stdout as stream:
                lines.put(stream.readline(_LINE_LIMIT))
                # Drained, so that a program with more to say does not wait for a reader.
                while stream.read(_LINE_LIMIT):
                    pass

    threading.Thread(target=read, name="key-command", daemon=True).start()
    try:
        status = process.wait(timeout)
    except subprocess.TimeoutExpired:
        _kill(process)
        return None, b""
    try:
        return status, lines.get(timeout=max(0.0, deadline - time.monotonic()))
    except queue.Empty:
        # A child left in the background holds the pipe open without writing to it.
        return None, b""


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the program with all that it started, as any of them may hold the pipe open."""
    if sys.platform == "win32":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
