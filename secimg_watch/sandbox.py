"""Takes away from the calling process what decoding a picture does not need. Linux only.

Three layers, each of use without the others: Landlock (no file can be opened, no port
reached, nobody outside signalled), a seccomp allow-list of system calls, resource limits.
What the kernel, or a filter that is already in force, does not offer is left out, and the
result says what is in force. The calls are made with ctypes, so there is nothing to install;
system call numbers are those of the kernel's ``asm/unistd_64.h`` and ``asm-generic/unistd.h``.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
import signal
import struct
import sys
from dataclasses import dataclass
from typing import Final

from secimg_watch.seccomp import (
    ALLOW,
    AND,
    ARCHITECTURE,
    ARGUMENTS,
    AUDIT_ARCHITECTURE,
    IF_EQUAL,
    KILL_PROCESS,
    LOAD,
    NUMBER,
    REFUSE,
    RETURN,
    install,
    libc,
    operation,
    prctl,
)

if sys.platform == "linux":
    import resource

# <linux/prctl.h>
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NO_NEW_PRIVS: Final = 38

# <linux/landlock.h>. The system call numbers are the same on every machine.
_CREATE_RULESET: Final = 444
_RESTRICT_SELF: Final = 446
_CREATE_RULESET_VERSION: Final = 1
_NET_RIGHTS: Final = 0b11  # bind and connect TCP
_SCOPES: Final = 0b11  # abstract Unix sockets and signals
_NET_ABI: Final = 4
_SCOPE_ABI: Final = 6
# Number of rights to the file system, all of them low bits, that came with each ABI version.
_FILE_RIGHTS: Final = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}

# Condition on an argument: which one, and what is left of it under a mask.
_NOT_EXECUTABLE: Final = (2, 4, 0)  # PROT_EXEC
_CLONE_NEW: Final = 0x7E020000  # the CLONE_NEW* flags of <linux/sched.h>
_CLONE_THREAD: Final = 0x10900  # CLONE_THREAD, and what it requires
_NO_NAMESPACE: Final = (0, _CLONE_NEW, 0)
_THREAD_ONLY: Final = (0, _CLONE_NEW | _CLONE_THREAD, _CLONE_THREAD)
_CLONE3: Final = 435  # the same on every machine; its flags lie where no filter can look

# What a decoder asks for once everything is loaded: memory, the files it was given, its end,
# and in the case of HEIF threads.
_WORKER_X86_64: Final = {
    "read": 0, "write": 1, "close": 3, "lseek": 8, "mmap": 9, "mprotect": 10,
    "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15,
    "pread64": 17, "readv": 19, "writev": 20, "sched_yield": 24, "mremap": 25, "madvise": 28,
    "nanosleep": 35, "getpid": 39, "clone": 56, "exit": 60, "gettimeofday": 96, "getrusage": 98,
    "sigaltstack": 131, "gettid": 186, "time": 201, "futex": 202, "sched_getaffinity": 204,
    "restart_syscall": 219, "clock_gettime": 228, "clock_nanosleep": 230, "exit_group": 231,
    "set_robust_list": 273, "getrandom": 318, "membarrier": 324, "rseq": 334,
}  # fmt: skip
# What the zygote needs beyond that: to take requests, to fork, and to end its children.
_ZYGOTE_X86_64: Final = {
    "poll": 7, "recvmsg": 47, "fork": 57, "wait4": 61, "kill": 62, "getppid": 110,
    "prctl": 157, "ppoll": 271, "prlimit64": 302, "seccomp": 317,
    "landlock_create_ruleset": _CREATE_RULESET, "landlock_restrict_self": _RESTRICT_SELF,
}  # fmt: skip
_WORKER_AARCH64: Final = {
    "close": 57, "lseek": 62, "read": 63, "write": 64, "readv": 65, "writev": 66, "pread64": 67,
    "exit": 93, "exit_group": 94, "futex": 98, "set_robust_list": 99,
    "nanosleep": 101, "clock_gettime": 113, "clock_nanosleep": 115, "sched_getaffinity": 123,
    "sched_yield": 124, "restart_syscall": 128, "sigaltstack": 132, "rt_sigaction": 134,
    "rt_sigprocmask": 135, "rt_sigreturn": 139, "getrusage": 165, "gettimeofday": 169,
    "getpid": 172, "gettid": 178, "brk": 214, "munmap": 215, "mremap": 216, "clone": 220,
    "mmap": 222, "mprotect": 226, "madvise": 233, "getrandom": 278, "membarrier": 283, "rseq": 293,
}  # fmt: skip
_ZYGOTE_AARCH64: Final = {
    "ppoll": 73, "kill": 129, "prctl": 167, "getppid": 173, "recvmsg": 212,
    "wait4": 260, "prlimit64": 261, "seccomp": 277,
    "landlock_create_ruleset": _CREATE_RULESET, "landlock_restrict_self": _RESTRICT_SELF,
}  # fmt: skip


# The tables above, by machine.
_MACHINES: Final = {
    "x86_64": (_WORKER_X86_64, _ZYGOTE_X86_64),
    "aarch64": (_WORKER_AARCH64, _ZYGOTE_AARCH64),
}


@dataclass(frozen=True, slots=True)
class _Filters:
    """The seccomp programs for this machine."""

    worker: bytes
    zygote: bytes


def confine_zygote() -> tuple[str, ...]:
    """Confine a process that forks workers, for good. Call it once everything is imported.

    Returns the names of what is in force, e.g. ``("landlock-abi7", "seccomp")``. It sets no
    parent-death signal: that would fire when the *thread* that started the process ends.
    """
    _protect()
    filters = _filters()
    return _landlock() + (_seccomp(filters.zygote) if filters else ())


def confine_worker(*, memory: int, seconds: int, parent: int = 0) -> tuple[str, ...]:
    """Confine a process that decodes one picture, for good, and tie its life to its parent's.

    Afterwards it can compute, start threads, read and write the descriptors it holds, and
    exit. Other system calls fail with EPERM, and a descriptor that it closes has no successor.

    Args:
        memory: Largest address space in bytes, the interpreter and its libraries included.
        seconds: Processor time after which the kernel kills the process.
        parent: The process that forked this one, if it is to be looked whether that still runs.

    Returns:
        The names of what is in force, e.g. ``("rlimits", "landlock-abi7", "seccomp")``.
    """
    _protect()
    if sys.platform == "linux":
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # No signal comes of a parent that had ended before.
        if parent and os.getppid() != parent:
            os._exit(1)
    filters = _filters()
    landlock = _landlock()
    # After Landlock, which needs a descriptor, and before seccomp, which forbids the calls.
    limits = _limit_resources(memory, seconds, threads=filters is not None)
    return limits + landlock + (_seccomp(filters.worker) if filters else ())


@functools.cache
def _filters() -> _Filters | None:
    """Assemble the filters, which a zygote's workers inherit ready made.

    None on other machines, and for a 32-bit interpreter, which makes other calls than the
    machine's name says: there the numbers would be guesses.
    """
    tables = _MACHINES.get(platform.machine()) if sys.maxsize > 1 << 32 else None
    if tables is None:
        return None
    worker, zygote = tables
    audit = AUDIT_ARCHITECTURE[platform.machine()]
    return _Filters(
        _filter(audit, worker, _THREAD_ONLY), _filter(audit, worker | zygote, _NO_NAMESPACE)
    )


def _protect() -> None:
    """Give up privileges of set-uid programs, and keep debuggers and core dumps away."""
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    prctl(_PR_SET_DUMPABLE, 0)


def _landlock() -> tuple[str, ...]:
    """Deny every right that this kernel's Landlock knows. No rule follows, so nothing is left."""
    library = libc()
    library.syscall.restype = ctypes.c_long
    abi = library.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _CREATE_RULESET_VERSION)
    if abi < 1:
        return ()
    rights = (1 << _FILE_RIGHTS.get(abi, max(_FILE_RIGHTS.values()))) - 1
    fields = [rights]
    if abi >= _NET_ABI:
        fields.append(_NET_RIGHTS)
    if abi >= _SCOPE_ABI:
        fields.append(_SCOPES)
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    ruleset = library.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return ()
    try:
        done = library.syscall(_RESTRICT_SELF, ruleset, 0) == 0
    finally:
        os.close(ruleset)
    return (f"landlock-abi{abi}",) if done else ()


def _limit_resources(memory: int, seconds: int, *, threads: bool) -> tuple[str, ...]:
    """Lower the limits; with ``threads``, something else must forbid new processes."""
    if sys.platform == "linux":
        wanted = {
            resource.RLIMIT_AS: memory,
            resource.RLIMIT_CPU: seconds,
            resource.RLIMIT_FSIZE: 0,
            resource.RLIMIT_CORE: 0,
            # No new descriptor gets a number below 0; those that are open stay open.
            resource.RLIMIT_NOFILE: 0,
        }
        if not threads:
            wanted[resource.RLIMIT_NPROC] = 0  # it counts threads and processes alike
        for which, value in wanted.items():
            _, ceiling = resource.getrlimit(which)
            lowered = value if ceiling == resource.RLIM_INFINITY else min(value, ceiling)
            resource.setrlimit(which, (lowered, lowered))
    return ("rlimits",)


def _seccomp(code: bytes) -> tuple[str, ...]:
    return ("seccomp",) if install(code) else ()


def _filter(audit: int, calls: dict[str, int], clone: tuple[int, int, int]) -> bytes:
    """Assemble a filter under which everything but ``calls`` fails with EPERM.

    The language is classic BPF (Documentation/userspace-api/seccomp_filter.rst of the kernel).
    """
    conditions = {"mmap": _NOT_EXECUTABLE, "mprotect": _NOT_EXECUTABLE, "clone": clone}
    code = operation(LOAD, ARCHITECTURE)
    # Numbers mean other calls under another architecture's entry point.
    code += operation(IF_EQUAL, audit, 1, 0) + operation(RETURN, KILL_PROCESS)
    code += operation(LOAD, NUMBER)
    # The C library takes ENOSYS for an old kernel, and uses clone instead.
    code += operation(IF_EQUAL, _CLONE3, 0, 1) + operation(RETURN, REFUSE | errno.ENOSYS)
    for name, number in calls.items():
        if name in conditions:
            argument, mask, wanted = conditions[name]
            code += operation(IF_EQUAL, number, 0, 5)
            code += operation(LOAD, ARGUMENTS + 8 * argument) + operation(AND, mask)
            code += operation(IF_EQUAL, wanted, 1, 0) + operation(RETURN, REFUSE | errno.EPERM)
        else:
            code += operation(IF_EQUAL, number, 0, 1)
        code += operation(RETURN, ALLOW)
    return code + operation(RETURN, REFUSE | errno.EPERM)
