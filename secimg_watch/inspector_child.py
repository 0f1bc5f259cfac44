"""The process that decodes pictures: a zygote that forks one confined worker a picture.

It is started with an empty environment, all of standard input, output and error on the null
device, and one descriptor: its end of a ``SOCK_SEQPACKET`` socket pair. It loads every
decoder, confines itself, and says hello with a JSON list of what is in force. From then on
each message is a request: a JSON object, and with it two descriptors (SCM_RIGHTS), the
picture, open read-only, and one end of a stream socket pair for the reply.

The worker's reply is the length of a JSON object as four big-endian bytes, the object, and
the preview's bytes; then the socket is closed. A worker that is killed leaves it short.

Where descriptors cannot be passed, ``inspect_one`` serves a single picture on standard input.
Key, queue, vault and policy are not imported here, so that no picture can reach them.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import math
import os
import select
import signal
import socket
import struct
import sys
import time
from typing import TYPE_CHECKING, Final, NoReturn

from secimg_watch import images, sandbox
from secimg_watch.wire import MESSAGE, Request, encode_reply

if TYPE_CHECKING:
    from typing import BinaryIO

    from _typeshed import WriteableBuffer

    from secimg_watch.records import Inspection

_DESCRIPTORS: Final = 2
_INT: Final = struct.Struct("=i")
_BUFFER: Final = 1 << 16
_REAP: Final = 0.05  # seconds between looks at workers, while there are any


def _probe(file: BinaryIO, request: Request) -> Inspection:
    return images.probe(
        file, preview=request.preview, decode=request.decode, max_pixels=request.max_pixels
    )


def inspect_one(message: str) -> None:
    """Inspect the picture on standard input and write the reply to standard output.

    For systems without SCM_RIGHTS: a process for every picture, with no confinement but the
    time that the caller gives it.
    """
    images.warm()
    found = _probe(sys.stdin.buffer, Request.from_json(message.encode()))
    sys.stdout.buffer.write(encode_reply(found))


if sys.platform == "linux":

    class PositionedFile(io.RawIOBase):
        """A file that is read at positions of its own.

        The descriptor's offset, which it shares with the process that opened it, does not move.
        """

        def __init__(self, fd: int, size: int) -> None:
            """Read ``size`` bytes from ``fd``, which stays open when this object is closed."""
            super().__init__()
            self._fd = fd
            self._size = size
            self._at = 0

        def readable(self) -> bool:
            """Always true."""
            return True

        def seekable(self) -> bool:
            """Always true."""
            return True

        def readinto(self, buffer: WriteableBuffer, /) -> int:
            """Fill the buffer as far as the file goes; it may have become shorter."""
            view = memoryview(buffer).cast("B")
            data = os.pread(self._fd, len(view), self._at)
            view[: len(data)] = data
            self._at += len(data)
            return len(data)

        def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
            """Move this object's own position.

            Raises:
                ValueError: The position would lie before the start.
            """
            base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
            if base + offset < 0:
                raise ValueError("the position lies before the start of the file")
            self._at = base + offset
            return self._at

    def main(control_fd: int) -> None:
        """Run the zygote on its control socket until the other end is closed."""
        # The service manager signals a whole service at once. The daemon wants its picture in
        # hand finished first, and ends this process by closing the socket.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        control = socket.socket(fileno=control_fd)
        images.warm()
        # A collection would touch, and so copy, pages that workers share with this process.
        gc.collect()
        gc.disable()
        gc.freeze()
        confinement = ("rlimits", *sandbox.confine_zygote())
        os.write(control_fd, json.dumps(confinement).encode())
        _Zygote(control).run()

    class _Zygote:
        """Forks workers and ends those that outlive their time. Never waits for one."""

        def __init__(self, control: socket.socket) -> None:
            self._control = control
            self._deadlines: dict[int, float] = {}

        def run(self) -> None:
            poll = select.poll()
            poll.register(self._control, select.POLLIN)
            while True:
                # Looking again and again needs no signal handler, which could free a process id
                # between the decision to kill it and the call.
                if poll.poll(1000 * _REAP if self._deadlines else None) and not self._serve():
                    break
                self._reap()
            for pid in self._deadlines:
                os.kill(pid, signal.SIGKILL)

        def _serve(self) -> bool:
            """Take one request; false when there will be no more."""
            message, fds = self._receive()
            try:
                if len(fds) == _DESCRIPTORS:
                    # Not a request, or no process to be had: the reply socket closes, unused.
                    with contextlib.suppress(ValueError, TypeError, OSError):
                        self._fork(Request.from_json(message), *fds)
            finally:
                for fd in fds:
                    os.close(fd)
            return bool(message)

        def _receive(self) -> tuple[bytes, list[int]]:
            space = socket.CMSG_SPACE(_DESCRIPTORS * _INT.size)
            message, ancillary, _, _ = self._control.recvmsg(MESSAGE, space)
            fds = [
                number
                for level, kind, data in ancillary
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
                for (number,) in _INT.iter_unpack(data)
            ]
            return message, fds

        def _fork(self, request: Request, picture: int, reply: int) -> None:
            deadline = time.monotonic() + request.seconds
            parent = os.getpid()
            pid = os.fork()
            if pid == 0:
                self._control.close()
                _work(request, picture, reply, parent)
            self._deadlines[pid] = deadline

        def _reap(self) -> None:
            now = time.monotonic()
            for pid, deadline in list(self._deadlines.items()):
                if os.waitpid(pid, os.WNOHANG)[0] == pid:
                    del self._deadlines[pid]
                elif now >= deadline:
                    os.kill(pid, signal.SIGKILL)

    def _work(request: Request, picture: int, reply: int, parent: int) -> NoReturn:
        """Inspect one picture and end the process, whatever happens."""
        status = 1
        try:
            file = io.BufferedReader(PositionedFile(picture, request.size), _BUFFER)
            seconds = math.ceil(request.seconds)
            sandbox.confine_worker(memory=request.memory, seconds=seconds, parent=parent)
            data = memoryview(encode_reply(_probe(file, request)))
            while data:
                data = data[os.write(reply, data) :]
            # Taking the process apart takes longer than the reply needs to get there.
            os.close(reply)
            status = 0
        finally:
            os._exit(status)
