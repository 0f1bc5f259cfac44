"""Filters on system calls, written in classic BPF. Linux only.

What is needed to say which calls a filter means and what becomes of them; what a filter is for
stands where it is made. The language and the numbers are those of the kernel's
``Documentation/userspace-api/seccomp_filter.rst``, ``<linux/filter.h>`` and ``<linux/seccomp.h>``.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from typing import Final

LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
IF_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
AND: Final = 0x54  # BPF_ALU | BPF_AND | BPF_K
RETURN: Final = 0x06  # BPF_RET | BPF_K

ALLOW: Final = 0x7FFF0000
TRACE: Final = 0x7FF00000  # stops for a tracer; without one the call fails with ENOSYS
KILL_PROCESS: Final = 0x80000000
REFUSE: Final = 0x00050000  # the error's number goes into the low half

# Offsets in struct seccomp_data; an argument's low half comes first on both machines.
NUMBER: Final = 0
ARCHITECTURE: Final = 4
ARGUMENTS: Final = 16

AUDIT_ARCHITECTURE: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""The ``AUDIT_ARCH_*`` value of each machine that there are tables for (``<linux/audit.h>``)."""

_PR_SET_SECCOMP: Final = 22
_PR_SET_NO_NEW_PRIVS: Final = 38
_MODE_FILTER: Final = 2


class _Program(ctypes.Structure):
    """``struct sock_fprog``."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def operation(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """Assemble one operation."""
    return struct.pack("=HBBI", code, if_true, if_false, value)


def install(code: bytes) -> bool:
    """Put a filter in force for the calling thread and all that it starts, for good."""
    program = _Program(len(code) // 8, code)
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    return prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.addressof(program))


def prctl(option: int, *values: int) -> bool:
    """Change a trait of the calling process, as told by its manual; whether it went well."""
    padded = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    return bool(libc().prctl(option, *padded) == 0)


@functools.cache
def libc() -> ctypes.CDLL:
    """Give the C library of this process."""
    return ctypes.CDLL(None, use_errno=True)
