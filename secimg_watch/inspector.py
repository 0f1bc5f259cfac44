"""Has pictures inspected in a confined child process, and judges what comes back.

A decoder that meets a hostile picture may crash, hang, eat memory or be taken over. All it
can reach is a copy-on-write image of a process that never held a key, the picture itself and
one socket. What it answers is checked here, value by value, and whatever is wrong with the
answer, the picture is still named by its signature and goes on its way.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Self

from secimg_watch.errors import StorageError
from secimg_watch.records import Inspection, Label
from secimg_watch.signatures import HEAD, sniff
from secimg_watch.wire import MAX_PREVIEW, MESSAGE, Request

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

if sys.platform != "win32":
    import fcntl

_START: Final = 30.0  # seconds until a new child has loaded every decoder; 0.1 on a quiet machine
_GRACE: Final = 2.0  # seconds beyond a worker's own, in which its end must have shown
_LONGEST_PAUSE: Final = 30.0  # seconds between attempts to start a child that keeps dying
_FIRST_PAUSE: Final = 0.1
_REPLY: Final = 4 + MESSAGE + MAX_PREVIEW

_LENGTH: Final = 4
_LARGEST_SIDE: Final = (1 << 31) - 1
_ANSWERS: Final = frozenset({Label.IMAGE, Label.UNDECODABLE, Label.NOT_IMAGE})
_FORMAT: Final = re.compile(r"[A-Z0-9]{0,16}")
# Whatever took a decoder over must not put a picture's contents where reasons are shown.
_DETAILS: Final = frozenset(
    {
        "",
        "no decoder for this format",
        "no preview can be made of it",
        "more pixels than allowed",
        "more pixels inside than allowed",
        "needs more memory than allowed",
        "broken header",
        "truncated file",
        *(
            f"does not decode ({name})"
            for name, value in vars(builtins).items()
            if isinstance(value, type) and issubclass(value, Exception)
        ),
    }
)
_JPEG: Final = b"\xff\xd8\xff"
_CHUNK: Final = 1 << 16
_MOST_FAILURES: Final = 16  # counted; the longest pause is reached long before

_OUT_OF_TIME: Final = "ran out of time"
_NONSENSE: Final = "the decoder's answer makes no sense"

# The child must be this very copy of the package, installed or not; -I keeps every other way
# of getting onto its path shut. Installed packages come first, as they do here.
_PACKAGE_HOME: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_PYTHON: Final = (sys.executable, "-I", "-c")
_BOOT: Final = "import sys; sys.path.append(sys.argv[1]); from secimg_watch import inspector_child;"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one picture may cost.

    Attributes:
        seconds: Time for one picture, on the clock and, rounded up, of the processor.
        pixels: Pictures with more are not decoded. The default is Pillow's own.
        memory: Address space of a worker in bytes, of which the interpreter and the decoders'
            libraries take about 45 MiB.
        file_size: Of files with more bytes only the header is looked at.
    """

    seconds: float = 20.0
    pixels: int = 89_478_485
    memory: int = 1 << 30
    file_size: int = 512 << 20


class _FailedError(Exception):
    """A picture was not inspected; the message is a clause for people."""


class _ChildDiedError(_FailedError):
    """The child is gone, and with it every worker."""


class Inspector:
    """Inspects pictures in a child process that holds no key. Safe to share between threads.

    ``confinement`` names what is in force in the child, e.g. ``("rlimits", "landlock-abi7",
    "seccomp")``. It is empty before the start, and always on other systems than Linux, where
    a new, unconfined process decodes each picture.
    """

    def __init__(self, limits: Limits) -> None:
        """Keep the limits; nothing is started yet."""
        self.limits = limits
        self.confinement: tuple[str, ...] = ()
        self._lock = threading.Lock()
        self._open = False
        self._child: _Child | None = None
        self._failures = 0
        self._not_before = 0.0

    def start(self) -> None:
        """Start the child, if it is not running. It is a new interpreter that inherits no memory.

        ``inspect`` tries again where this failed, so that the error need not be the end of
        the caller: pictures are sealed and labelled all the same.

        Raises:
            StorageError: The child does not start.
        """
        with self._lock:
            self._open = True
            self._not_before = 0.0
            self._ensure_child()

    def close(self) -> None:
        """End the child and every inspection under way. More calls are harmless."""
        with self._lock:
            self._open = False
            child, self._child = self._child, None
        if child:
            child.stop()

    def __enter__(self) -> Self:
        """Start the child."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the child."""
        self.close()

    def inspect(self, fd: int, *, size: int, preview: int, decode: bool) -> Inspection:
        """Say what the file behind ``fd`` is. Takes at most ``limits.seconds`` and a little.

        Args:
            fd: Open for reading only. It is shared with the child; its offset ends where it was.
            size: The file's length in bytes.
            preview: Longest side of the preview in pixels, 0 for none.
            decode: Whether to decode the picture even without a preview.

        Returns:
            The child's finding, or ``UNINSPECTED`` with the reason and the format by its
            signature. Nothing a picture does makes this raise.

        Raises:
            ValueError: ``fd`` can be written to, which a decoder must not be able to.
        """
        _require_read_only(fd)
        too_large = size > self.limits.file_size
        request = Request(
            size=size,
            preview=0 if too_large else preview,
            decode=decode and not too_large,
            max_pixels=self.limits.pixels,
            memory=self.limits.memory,
            seconds=self.limits.seconds,
        )
        try:
            found = parse_reply(self._ask(fd, request), preview=request.preview)
        except _FailedError as failure:
            return Inspection(Label.UNINSPECTED, _signature(fd), detail=str(failure))
        if too_large and not found.detail:
            return replace(found, detail="file too large to decode")
        return found

    def name_only(self, fd: int) -> Inspection:
        """Name a file's format by its first bytes, without a decoder looking at it."""
        name = _signature(fd)
        return Inspection(Label.UNINSPECTED, name, detail="not asked for by the policy")

    def _ask(self, fd: int, request: Request) -> bytes:
        ask = self._ask_child if sys.platform == "linux" else _ask_new_process
        return ask(fd, request)

    def _ask_child(self, fd: int, request: Request) -> bytes:
        """Ask the child, and once more where it died: it is no picture that can end it."""
        for _ in range(2):
            child = self._running_child()
            try:
                reply = child.ask(fd, request)
            except _ChildDiedError:
                self._discard(child)
            else:
                with self._lock:
                    self._failures = 0
                return reply
        raise _FailedError("the inspector keeps ending")

    def _running_child(self) -> _Child:
        with self._lock:
            if not self._open:
                raise _FailedError("the inspector is closed")
            try:
                child = self._ensure_child()
            except StorageError as error:
                raise _FailedError("the inspector does not start") from error
        if child is None:
            raise _FailedError("the inspector keeps ending")
        return child

    def _ensure_child(self) -> _Child | None:
        """Start a child where there is none; None while it is too early to try again."""
        if self._child is None and sys.platform == "linux":
            if time.monotonic() < self._not_before:
                return None
            try:
                self._child = _Child()
            except StorageError:
                self._count_failure()
                raise
            self.confinement = self._child.confinement
        return self._child

    def _discard(self, child: _Child) -> None:
        """Bury a dead child; its successor may start at once, and the next after a pause."""
        with self._lock:
            if self._child is not child:
                return
            self._child = None
            self._count_failure()
        child.stop()

    def _count_failure(self) -> None:
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**self._failures) if self._failures else 0.0
        self._failures = min(self._failures + 1, _MOST_FAILURES)
        self._not_before = time.monotonic() + pause


class _Child:
    """The zygote, seen from its parent. Owns the process and the control socket."""

    def __init__(self) -> None:
        """Start it and wait until it is confined.

        Raises:
            StorageError: It does not start, or says no hello.
        """
        self._lock = threading.Lock()  # a socket closed in mid-send could be somebody else's
        self._control, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._process = _spawn(theirs.fileno())
            except OSError as error:
                self._control.close()
                raise StorageError(
                    f"the picture inspector does not start: {error.strerror}"
                ) from error
        self.confinement = self._hello()

    def _hello(self) -> tuple[str, ...]:
        self._control.settimeout(_START)
        try:
            hello = self._control.recv(MESSAGE)
            # From here on: a child that leaves a socket full of requests has failed.
            self._control.settimeout(0)
            return tuple(json.loads(hello))
        except (OSError, ValueError) as error:
            self._process.kill()
            self.stop()
            raise StorageError("the picture inspector ended while it started") from error

    def ask(self, fd: int, request: Request) -> bytes:
        """Have one picture inspected and give the worker's whole reply.

        Raises:
            _ChildDiedError: The child is gone; another may answer.
            _FailedError: The worker gave no reply, or too long a one.
        """
        start = time.monotonic()
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                self._send(request.to_json(), [fd, theirs.fileno()])
            try:
                reply = _receive(ours, start + request.seconds + _GRACE)
            except TimeoutError as error:
                # It should have ended the worker: it is stopped, or worse. Others may try anew.
                self._process.kill()
                raise _FailedError(_OUT_OF_TIME) from error
        if reply:
            return reply
        if self._has_died():
            raise _ChildDiedError("the inspector ended")
        late = time.monotonic() - start >= request.seconds
        raise _FailedError(_OUT_OF_TIME if late else "the decoder crashed")

    def _send(self, message: bytes, fds: list[int]) -> None:
        if sys.platform == "linux":
            try:
                with self._lock:
                    socket.send_fds(self._control, [message], fds)
            except OSError as error:
                raise _ChildDiedError("the inspector ended") from error

    def _has_died(self) -> bool:
        """Whether the other end of the control socket is closed; nothing is ever sent on it."""
        try:
            with self._lock:
                return self._control.recv(1) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def stop(self) -> None:
        """Close the control socket, upon which the child ends itself and its workers."""
        with self._lock:
            self._control.close()
        try:
            self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _spawn(control: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603 - this interpreter and fixed words
        [*_PYTHON, _BOOT + "inspector_child.main(int(sys.argv[2]))", _PACKAGE_HOME, str(control)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[control],
        cwd="/",  # it would keep a file system busy that is to be unmounted
        env={},
        start_new_session=True,
    )


def _receive(reply: socket.socket, deadline: float) -> bytes:
    """Read to the end, but no more than the longest reply there can be.

    Raises:
        TimeoutError: The end did not come in time.
        _FailedError: The reply is too long.
    """
    data = bytearray()
    while len(data) <= _REPLY:
        # 0 would switch the time limit off.
        reply.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            chunk = reply.recv(_CHUNK)
        except ConnectionResetError:  # the worker, or a request nobody took, ended early
            return b""
        if not chunk:
            return bytes(data)
        data += chunk
    raise _FailedError(_NONSENSE)


def _ask_new_process(fd: int, request: Request) -> bytes:
    """Have one picture inspected by a process of its own, where there is no zygote."""
    message = request.to_json().decode()
    # Windows finds its own libraries by this variable.
    environment = {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}
    try:
        with _rewound(fd):
            done = subprocess.run(  # noqa: S603 - this interpreter and numbers
                [
                    *_PYTHON,
                    _BOOT + "inspector_child.inspect_one(sys.argv[2])",
                    _PACKAGE_HOME,
                    message,
                ],
                stdin=fd,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                timeout=request.seconds + _GRACE,
                check=False,
            )
    except subprocess.TimeoutExpired as error:
        raise _FailedError(_OUT_OF_TIME) from error
    except OSError as error:
        raise _FailedError("the inspector does not start") from error
    if not done.stdout:
        raise _FailedError("the decoder crashed")
    return done.stdout


def parse_reply(data: bytes, *, preview: int) -> Inspection:
    """Turn a worker's reply into a finding, and believe nothing of it.

    Args:
        data: The whole reply (see `inspector_child`).
        preview: What was asked for; with 0 there must be none.

    Raises:
        _FailedError: Anything about it is not as it must be.
    """
    try:
        (length,) = struct.unpack_from(">I", data)
        head = json.loads(data[_LENGTH : _LENGTH + min(length, MESSAGE)])
        return _checked(head, data[_LENGTH + length :], preview)
    except (ValueError, TypeError, KeyError, RecursionError, struct.error) as error:
        raise _FailedError(_NONSENSE) from error


def _checked(head: dict[str, object], picture: bytes, preview: int) -> Inspection:
    label = Label(str(head["label"]))
    if label not in _ANSWERS:
        raise ValueError(_NONSENSE)
    if len(picture) > (MAX_PREVIEW if preview else 0):
        raise ValueError(_NONSENSE)
    if picture and not picture.startswith(_JPEG):
        raise ValueError(_NONSENSE)
    return Inspection(
        label,
        _text(head["format"], _FORMAT),
        _side(head["width"]),
        _side(head["height"]),
        picture,
        _detail(head["detail"]),
    )


def _text(value: object, pattern: re.Pattern[str]) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(_NONSENSE)
    return value


def _detail(value: object) -> str:
    if value not in _DETAILS:
        raise ValueError(_NONSENSE)
    return str(value)


def _side(value: object) -> int:
    # A bool is an int, too, but no number of pixels.
    if type(value) is not int or not 0 <= value <= _LARGEST_SIDE:
        raise ValueError(_NONSENSE)
    return value


def _require_read_only(fd: int) -> None:
    if sys.platform != "win32" and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
        raise ValueError("the picture must be open for reading only")


def _signature(fd: int) -> str:
    """Name the format by the file's first bytes; ``""`` also where they cannot be read."""
    try:
        with _rewound(fd):
            return sniff(os.read(fd, HEAD))
    except OSError:
        return ""


@contextlib.contextmanager
def _rewound(fd: int) -> Iterator[None]:
    """Put the offset at the start of the file, and back afterwards."""
    before = os.lseek(fd, 0, os.SEEK_CUR)
    os.lseek(fd, 0, os.SEEK_SET)
    try:
        yield
    finally:
        os.lseek(fd, before, os.SEEK_SET)
