"""Runs a piece of work under ptrace(2), and decides at each of its file-system calls what happens.

The work runs in a forked process, with all its threads and children. Each traced call stops
before it begins, and is numbered: one count over all threads, so that "the n-th call" means one
place in the run and every place can be tried. What stops nowhere runs at full speed: a seccomp
filter picks the calls out. Linux 5.3 and later, on x86-64 and aarch64.

This is how the promise is put to the test that a process may die anywhere; the service itself
never uses it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
import struct
import sys
import threading
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

from secimg_watch import seccomp
from secimg_watch.errors import NotReadyError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

# <linux/ptrace.h>
_CONT: Final = 7
_SYSCALL: Final = 24
_GETEVENTMSG: Final = 0x4201
_GETREGSET: Final = 0x4204
_SETREGSET: Final = 0x4205
_SEIZE: Final = 0x4206
_LISTEN: Final = 0x4208
_GET_SYSCALL_INFO: Final = 0x420E
_AT_RETURN: Final = 5 | 0x80  # SIGTRAP, marked by PTRACE_O_TRACESYSGOOD
_FORKS: Final = frozenset({1, 2, 3})  # events: fork, vfork, clone
_AT_SECCOMP: Final = 7
_AT_STOP: Final = 128
_OPTIONS: Final = (
    0x01  # PTRACE_O_TRACESYSGOOD
    | 0x02  # PTRACE_O_TRACEFORK
    | 0x04  # PTRACE_O_TRACEVFORK
    | 0x08  # PTRACE_O_TRACECLONE
    | 0x10  # PTRACE_O_TRACEEXEC
    | 0x80  # PTRACE_O_TRACESECCOMP
    | 0x100000  # PTRACE_O_EXITKILL
)
_NT_PRSTATUS: Final = 1
_NT_ARM_SYSTEM_CALL: Final = 0x404
_WALL: Final = 0x40000000
_GROUP_STOPS: Final = frozenset(
    getattr(signal, name, 0) for name in ("SIGSTOP", "SIGTSTP", "SIGTTIN", "SIGTTOU")
)

# Numbers on x86-64 and aarch64; the latter lacks what newer calls can do as well.
_NUMBERS: Final = {
    "read": (0, 63), "write": (1, 64), "open": (2, None), "close": (3, 57), "stat": (4, None),
    "fstat": (5, 80), "lstat": (6, None), "ioctl": (16, 29), "pread64": (17, 67),
    "pwrite64": (18, 68), "writev": (20, 66), "sendfile": (40, 71), "fcntl": (72, 25),
    "flock": (73, 32), "fsync": (74, 82), "fdatasync": (75, 83), "truncate": (76, 45),
    "ftruncate": (77, 46), "rename": (82, None), "mkdir": (83, None), "rmdir": (84, None),
    "creat": (85, None), "link": (86, None), "unlink": (87, None), "symlink": (88, None),
    "chmod": (90, None), "fchmod": (91, 52), "chown": (92, None), "fchown": (93, 55),
    "statfs": (137, 43), "fstatfs": (138, 44), "getdents64": (217, 61), "fadvise64": (221, 223),
    "openat": (257, 56), "mkdirat": (258, 34), "fchownat": (260, 54), "newfstatat": (262, 79),
    "unlinkat": (263, 35), "renameat": (264, 38), "linkat": (265, 37), "symlinkat": (266, 36),
    "fchmodat": (268, 53), "sync_file_range": (277, 84), "utimensat": (280, 88),
    "fallocate": (285, 47), "preadv": (295, 69), "pwritev": (296, 70), "renameat2": (316, 276),
    "copy_file_range": (326, 285), "preadv2": (327, 286), "pwritev2": (328, 287),
    "statx": (332, 291), "openat2": (437, 437),
}  # fmt: skip

CALLS: Final = frozenset(_NUMBERS)
"""Every call that can be traced."""

CHANGING: Final = CALLS & {
    "write", "open", "pwrite64", "writev", "sendfile", "fsync", "fdatasync", "truncate",
    "ftruncate", "rename", "mkdir", "rmdir", "creat", "link", "unlink", "symlink", "chmod",
    "fchmod", "chown", "fchown", "openat", "mkdirat", "fchownat", "unlinkat", "renameat",
    "linkat", "symlinkat", "fchmodat", "utimensat", "fallocate", "pwritev", "renameat2",
    "copy_file_range", "pwritev2", "openat2",
}  # fmt: skip
"""The calls that change what a disk holds, or make it durable. Opening counts where it may create
or cut a file; see `Call.changes`."""

_CREATING: Final = os.O_CREAT | os.O_TRUNC
_FLAGS_AT: Final = {"open": 1, "openat": 2}  # which argument they are
_PATH_LIMIT: Final = 4096
_PAGE: Final = 4096  # or a multiple of it


@dataclass(frozen=True, slots=True)
class Fail:
    """What a call is to fail with, without being made: a number of `errno`."""

    code: int


@dataclass(frozen=True, slots=True)
class Kill:
    """End the process that does the work, by SIGKILL, before the call is made."""


@dataclass(frozen=True, slots=True)
class Watch:
    """Make the call, and report what it returned."""


Decision: TypeAlias = Fail | Kill | Watch | None
"""What becomes of a call; ``None``: it is made."""


@dataclass(frozen=True, slots=True)
class Call:
    """A system call that is about to be made; the thread that makes it stands still.

    ``number`` counts the traced calls of the whole run from 1. ``thread`` is the system's id.
    """

    number: int
    thread: int
    name: str
    args: tuple[int, ...]

    @property
    def changes(self) -> bool:
        """Whether the call may change what a disk holds, or makes it durable."""
        at = _FLAGS_AT.get(self.name)
        creates = at is None or bool(self.args[at] & _CREATING)
        return self.name in CHANGING and creates

    def text(self, at: int) -> bytes:
        """The path that the argument ``at`` points to.

        Raises:
            OSError: the memory cannot be read.
        """
        return self.memory(self.args[at], _PATH_LIMIT).split(b"\0", 1)[0]

    def memory(self, address: int, size: int) -> bytes:
        """Read up to ``size`` bytes of the process's memory; fewer where it ends.

        Raises:
            OSError: it cannot be read, as by somebody who is not root when the process has
                made itself unreadable.
        """
        data = b""
        with open(f"/proc/{self.thread}/mem", "rb", buffering=0) as memory:
            # Page by page: what is asked for may go beyond what is mapped.
            while len(data) < size:
                step = min(size - len(data), _PAGE - (address + len(data)) % _PAGE)
                try:
                    memory.seek(address + len(data))
                    data += memory.read(step)
                except OSError:
                    if not data:
                        raise
                    break
        return data


@dataclass(slots=True)
class Outcome:
    """How a run ended: its exit code, negative for a signal, and how many calls were traced."""

    code: int
    calls: int = 0
    timed_out: bool = False


def is_supported() -> bool:
    """Whether there are tables for this machine; the system may still forbid tracing."""
    return sys.platform == "linux" and platform.machine() in seccomp.AUDIT_ARCHITECTURE


def trace(
    work: Callable[[], int | None],
    decide: Callable[[Call], Decision],
    *,
    calls: Collection[str] = CHANGING,
    returned: Callable[[Call, int], None] = lambda _call, _value: None,
    seconds: float = 60.0,
) -> Outcome:
    """Do ``work`` in a forked process, asking ``decide`` before each of these calls.

    To be called in a process with one thread and no children of its own. Nothing of what
    the work does stays here but its effects on the disk.

    Args:
        work: what to do; its result is the exit code, ``None`` means 0.
        decide: told of each call, and says what becomes of it.
        calls: names out of `CALLS`.
        returned: told what a call that was to be watched returned; an error as ``-errno``.
        seconds: how long it may take; then it is killed.

    Raises:
        NotReadyError: the system does not allow tracing here.
    """
    if not is_supported():
        raise NotReadyError(f"system calls cannot be traced on this machine: {platform.machine()}")
    gate_out, gate_in = os.pipe()
    child = os.fork()  # type: ignore[attr-defined, unused-ignore]  # not on Windows
    if child == 0:
        os.close(gate_in)
        _work(work, calls, gate_out)
    os.close(gate_out)
    try:
        _ptrace(_SEIZE, child, 0, _OPTIONS)
    except OSError as error:
        os.kill(child, signal.SIGKILL)  # type: ignore[attr-defined, unused-ignore]
        os.waitpid(child, 0)
        message = f"the system does not allow tracing: {error.strerror}"
        hint = "container managers forbid ptrace unless told otherwise"
        raise NotReadyError(message, hint=hint) from error
    finally:
        os.close(gate_in)  # lets the child go
    return _Run(child, decide, returned).follow(seconds)


def _work(work: Callable[[], int | None], calls: Collection[str], gate: int) -> None:
    """Do it, in the child, and end the process."""
    code = 70
    try:
        os.read(gate, 1)
        os.close(gate)
        # Where no filter can be had nothing stops, and whoever counts the calls finds none.
        seccomp.install(_filter(calls))
        code = work() or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - it ends here, and somebody should know why
        with contextlib.suppress(BaseException):
            traceback.print_exc()
    finally:
        # Nothing may escape to what the parent process still means to do.
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _filter(calls: Collection[str]) -> bytes:
    machine = platform.machine()
    column = list(seccomp.AUDIT_ARCHITECTURE).index(machine)
    numbers = [number for name in sorted(calls) if (number := _NUMBERS[name][column]) is not None]
    operation = seccomp.operation
    code = operation(seccomp.LOAD, seccomp.ARCHITECTURE)
    code += operation(seccomp.IF_EQUAL, seccomp.AUDIT_ARCHITECTURE[machine], 1, 0)
    code += operation(seccomp.RETURN, seccomp.ALLOW) + operation(seccomp.LOAD, seccomp.NUMBER)
    for number in numbers:
        code += operation(seccomp.IF_EQUAL, number, 0, 1)
        code += operation(seccomp.RETURN, seccomp.TRACE)
    return code + operation(seccomp.RETURN, seccomp.ALLOW)


@dataclass(slots=True)
class _Run:
    """One run: who is traced, and what is known of each."""

    main: int
    decide: Callable[[Call], Decision]
    returned: Callable[[Call, int], None]
    alive: set[int] = field(default_factory=set)
    ended: set[int] = field(default_factory=set)
    watched: dict[int, Call] = field(default_factory=dict)
    count: int = 0

    def follow(self, seconds: float) -> Outcome:
        self.alive.add(self.main)
        outcome = Outcome(0)
        over = threading.Event()

        def give_up() -> None:
            if not over.is_set():
                outcome.timed_out = True
                _kill(self.main)

        alarm = threading.Timer(seconds, give_up)
        alarm.start()
        try:
            while self.alive:
                try:
                    thread, status = os.waitpid(-1, _WALL)
                except ChildProcessError:
                    break  # one that was announced was killed before it ever came
                if os.WIFSTOPPED(status):  # type: ignore[attr-defined, unused-ignore]
                    self._stopped(thread, status)
                    continue
                self.alive.discard(thread)
                self.ended.add(thread)
                if thread == self.main:
                    over.set()
                    outcome.code = os.waitstatus_to_exitcode(status)
                    for other in self.alive:  # what the dead process started ends with it
                        _kill(other)
        finally:
            over.set()
            alarm.cancel()
            alarm.join()
        outcome.calls = self.count
        return outcome

    def _stopped(self, thread: int, status: int) -> None:
        self.alive.add(thread)
        number, event = (status >> 8) & 0xFF, status >> 16
        how, deliver = _CONT, 0
        try:
            if event == _AT_SECCOMP:
                how = self._at_call(thread)
            elif event in _FORKS:
                # It may have come and gone by now.
                self.alive |= {_event_message(thread)} - self.ended
            elif event == _AT_STOP:
                how = _LISTEN if number in _GROUP_STOPS else _CONT
            elif number == _AT_RETURN:
                self._at_return(thread)
            elif not event:
                deliver = number
            _ptrace(how, thread, 0, deliver)
        except ProcessLookupError:
            self.watched.pop(thread, None)  # killed while it stood still

    def _at_call(self, thread: int) -> int:
        fields = struct.unpack_from("<B7xQQQ6Q", _syscall_info(thread))
        name = _name_of(fields[3])
        self.count += 1
        call = Call(self.count, thread, name, tuple(fields[4:]))
        decision = self.decide(call)
        match decision:
            case Kill():
                _kill(self.main)
                _kill(thread)  # of a child it may be, whose call is not to be made either
            case Fail(code):
                _skip(thread, code)
            case Watch():
                self.watched[thread] = call
                return _SYSCALL
        return _CONT

    def _at_return(self, thread: int) -> None:
        call = self.watched.pop(thread, None)
        if call is not None:
            (value,) = struct.unpack_from("<24xq", _syscall_info(thread))
            self.returned(call, value)


def _name_of(number: int) -> str:
    column = list(seccomp.AUDIT_ARCHITECTURE).index(platform.machine())
    return next(name for name, numbers in _NUMBERS.items() if numbers[column] == number)


def _ptrace(request: int, thread: int, address: int, data: int) -> int:
    function = seccomp.libc().ptrace
    function.restype = ctypes.c_long
    result = function(
        ctypes.c_long(request),
        ctypes.c_long(thread),
        ctypes.c_void_p(address),
        ctypes.c_void_p(data),
    )
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(result)


def _event_message(thread: int) -> int:
    message = ctypes.c_ulong()
    _ptrace(_GETEVENTMSG, thread, 0, ctypes.addressof(message))
    return message.value


def _syscall_info(thread: int) -> bytes:
    buffer = ctypes.create_string_buffer(128)
    _ptrace(_GET_SYSCALL_INFO, thread, len(buffer), ctypes.addressof(buffer))
    return buffer.raw


class _Slice(ctypes.Structure):
    """``struct iovec``."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _skip(thread: int, code: int) -> None:
    """Let a call that stands at its beginning fail with an error's number, without being made."""
    registers = ctypes.create_string_buffer(512)
    place = _Slice(ctypes.addressof(registers), len(registers))
    _ptrace(_GETREGSET, thread, _NT_PRSTATUS, ctypes.addressof(place))
    if platform.machine() == "x86_64":
        struct.pack_into("<q", registers, 10 * 8, -code)  # rax of struct user_regs_struct
        struct.pack_into("<q", registers, 15 * 8, -1)  # orig_rax: no such call
    else:
        struct.pack_into("<q", registers, 0, -code)  # x0 of struct user_pt_regs
        number = ctypes.c_int(-1)
        call = _Slice(ctypes.addressof(number), ctypes.sizeof(number))
        _ptrace(_SETREGSET, thread, _NT_ARM_SYSTEM_CALL, ctypes.addressof(call))
    _ptrace(_SETREGSET, thread, _NT_PRSTATUS, ctypes.addressof(place))


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)  # type: ignore[attr-defined, unused-ignore]
