"""Every attempt is made for real, in a process that confined itself as a worker does."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from secimg_watch import sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")

HOME = str(Path(sandbox.__file__).parents[1])

# Runs each statement under "ATTEMPTS" after confinement, and reports by the standard output,
# a pipe, what came of it: "done", or the error's number.
PRELUDE = """
import ctypes, json, mmap, os, resource, signal, socket, sys, threading
sys.path.insert(0, HOME)
from secimg_watch import sandbox
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    if libc.syscall(ctypes.c_long(number), *(ctypes.c_long(each) for each in arguments)) < 0:
        raise OSError(ctypes.get_errno(), "refused")
PARENT = os.getppid()
OPEN = os.open("/dev/null", os.O_RDONLY)
LISTENER = socket.socket(); LISTENER.bind(("127.0.0.1", 0)); LISTENER.listen()
CALLER = socket.socket()
def attempt(statement):
    try:
        exec(statement)
    except OSError as error:
        return error.errno
    return "done"
"""

REPORT = """
os.write(1, json.dumps([names, [attempt(each) for each in ATTEMPTS]]).encode())
os._exit(0)
"""

EPERM = 1
EACCES = 13


def confined(step: str, attempts: list[str]) -> tuple[list[str], list[object]]:
    """Run ``step``, which sets ``names``, and then the attempts; give the names and results."""
    script = f"HOME = {HOME!r}\nATTEMPTS = {attempts!r}\n{PRELUDE}\n{step}\n{REPORT}"
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr.decode()
    names, results = json.loads(done.stdout)
    return names, results


WORKER = "names = sandbox.confine_worker(memory=1 << 30, seconds=10)"

ESCAPES = [
    "open('/etc/passwd')",
    "os.open('/tmp', os.O_TMPFILE | os.O_RDWR)",
    "os.stat('/')",
    "os.listdir('/')",
    "os.unlink('/nonexistent')",
    "socket.socket()",
    "socket.socket(socket.AF_UNIX)",
    "CALLER.connect(LISTENER.getsockname())",
    "LISTENER.accept()",
    "os.fork()",
    "os.execv('/bin/true', ['true'])",
    "os.kill(PARENT, 0)",
    "os.kill(PARENT, signal.SIGKILL)",
    "os.kill(os.getpid(), signal.SIGKILL)",
    "mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)",
    "mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)",
    "os.dup(OPEN)",
    "os.pipe()",
    "os.memfd_create('name')",
    "resource.prlimit(0, resource.RLIMIT_CPU)",
    "resource.prlimit(PARENT, resource.RLIMIT_CORE)",
    "os.setuid(0)",
    "os.chroot('/')",
    "os.sched_setaffinity(0, {0})",
    "os.waitpid(-1, os.WNOHANG)",
    "os.setsid()",
]
# Numbers that are the same on every machine.
ESCAPES += [f"call({number}, 0, 0, 0, 0)" for number in (424, 425, 434, 437, 440, 444)]
X86_ESCAPES = [
    "call(101, 16, PARENT, 0, 0)",  # ptrace, attach
    "call(157, 4, 1, 0, 0)",  # prctl, dumpable again
    "call(10, 0, 4096, 5)",  # mprotect, executable
    "call(310, PARENT, 0, 0, 0, 0, 0)",  # process_vm_readv
    "call(321, 0, 0, 0)",  # bpf
    "call(234, PARENT, PARENT, 9)",  # tgkill
    "call(56, 0x4111, 0, 0, 0, 0)",  # clone, sharing memory, but a process of its own
    "call(56, 0x40010900, 0, 0, 0, 0)",  # clone, a thread with its own network
    "call(39 | 0x40000000)",  # getpid by the x32 entry
]


def seccomp_expected() -> bool:
    return platform.machine() in {"x86_64", "aarch64"} and sys.maxsize > 1 << 32


def test_nothing_leads_out_of_a_worker() -> None:
    attempts = ESCAPES + (X86_ESCAPES if platform.machine() == "x86_64" else [])
    names, results = confined(WORKER, attempts)
    if "seccomp" not in names:
        pytest.skip(f"this kernel or machine has no seccomp filter: {names}")
    assert dict(zip(attempts, results, strict=True)) == dict.fromkeys(attempts, EPERM)


def test_a_worker_can_do_its_work() -> None:
    work = [
        "assert os.pread(OPEN, 10, 0) == b''",
        "bytearray(1 << 24)",
        "import_free = json.dumps({'a': 1})",
        "thread = threading.Thread(target=os.getpid); thread.start(); thread.join()",
        "os.close(OPEN)",
    ]
    names, results = confined(WORKER, work)
    assert results == ["done"] * len(work)
    assert names[0] == "rlimits"
    assert ("seccomp" in names) == seccomp_expected()


def test_landlock_alone_lets_no_file_be_opened_and_nobody_be_signalled() -> None:
    step = "sandbox._protect(); names = sandbox._landlock()"
    attempts = [
        "open('/etc/passwd')",
        "os.listdir('/')",
        "CALLER.connect(LISTENER.getsockname())",
        "os.kill(PARENT, 0)",
    ]
    names, results = confined(step, attempts)
    if not names:
        pytest.skip("this kernel has no Landlock")
    abi = int(re.fullmatch(r"landlock-abi(\d+)", names[0])[1])  # type: ignore[index]
    assert results[:2] == [EACCES, EACCES]
    assert results[2] == (EACCES if abi >= 4 else "done")
    assert results[3] == (EPERM if abi >= 6 else "done")


def test_limits_alone_stop_memory_files_and_descriptors() -> None:
    names, results = confined(
        "names = sandbox._limit_resources(256 << 20, 10, threads=True)",
        ["open('/etc/passwd')", "mmap.mmap(-1, 300 << 20)", "bytearray(1 << 20)"],
    )
    assert names == ["rlimits"]
    assert results == [24, 12, "done"]  # EMFILE, ENOMEM


def test_processor_time_is_limited() -> None:
    script = f"HOME = {HOME!r}\n{PRELUDE}\nsandbox.confine_worker(memory=1 << 30, seconds=1)\n"
    done = subprocess.run(
        [sys.executable, "-I", "-c", script + "while True: pass"], check=False, timeout=60
    )
    assert done.returncode == -9


def test_a_zygote_can_fork_and_end_workers_but_open_nothing() -> None:
    step = "names = sandbox.confine_zygote()"
    fork = (
        "pid = os.fork()\n"
        "if pid == 0: os._exit(len(sandbox.confine_worker(memory=1 << 30, seconds=9)))\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == len(names) + 1"
    )
    kill = (
        "pid = os.fork()\n"
        "while pid == 0: pass\n"
        "os.kill(pid, signal.SIGKILL)\n"
        "assert os.waitpid(pid, 0)[1] == signal.SIGKILL"
    )
    attempts = [
        fork,
        kill,
        "open('/etc/passwd')",
        "socket.socket()",
        "os.execv('/bin/true', ['x'])",
    ]
    names, results = confined(step, attempts)
    if "seccomp" not in names:
        pytest.skip(f"this kernel or machine has no seccomp filter: {names}")
    assert results[:2] == ["done", "done"]
    # Landlock's EACCES and seccomp's EPERM both mean no; the filter answers first.
    assert results[2:] == [EPERM] * 3


def test_a_filter_that_is_in_force_already_is_no_error() -> None:
    # A service's own filter may refuse Landlock: here everything that a zygote may do but that.
    step = """
sandbox._filters()
worker, zygote = sandbox._MACHINES[os.uname().machine]
audit = sandbox.AUDIT_ARCHITECTURE[os.uname().machine]
calls = {name: number for name, number in (worker | zygote).items() if "landlock" not in name}
sandbox._protect()
assert sandbox._seccomp(sandbox._filter(audit, calls, sandbox._NO_NAMESPACE)) == ("seccomp",)
names = sandbox.confine_zygote() + sandbox.confine_worker(memory=1 << 30, seconds=9)
"""
    if not seccomp_expected():
        pytest.skip("no filter is known for this machine")
    names, results = confined(step, ["open('/etc/passwd')"])
    assert names == ["seccomp", "rlimits", "seccomp"]
    assert results == [EPERM]


def test_a_machine_without_a_table_gets_no_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert sandbox._filters.__wrapped__() is None


@pytest.mark.parametrize(
    ("machine", "header"),
    [
        ("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        ("aarch64", "/usr/include/asm-generic/unistd.h"),
    ],
)
def test_system_call_numbers_are_those_of_the_kernels_headers(machine: str, header: str) -> None:
    if not Path(header).exists():
        pytest.skip("needs the Debian package linux-libc-dev")
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\n", Path(header).read_text("ascii"))
    numbers = {name: int(number) for name, number in found}
    worker, zygote = sandbox._MACHINES[machine]
    table = worker | zygote
    assert table == {name: numbers[name] for name in table}
