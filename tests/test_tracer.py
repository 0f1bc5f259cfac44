"""The tracer that the rigs are built on: what it numbers, kills, fails and observes is so.

Whoever traces may have one thread and no other children, which a test's process has not. So this
file, run as a program, does everything that is to be looked at, and prints what came of it.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import pytest
from path_builders import only_on_linux

from secimg_watch import seccomp, tracer
from secimg_watch.errors import NotReadyError
from secimg_watch.tracer import CALLS, CHANGING, Call, Fail, Kill, Outcome, Watch, trace

only_on_linux()
assert sys.platform == "linux"

if TYPE_CHECKING:
    from collections.abc import Callable

    from secimg_watch.tracer import Decision

Scene: TypeAlias = "Callable[[Path], object]"
SCENES: Final[dict[str, Scene]] = {}
FORBIDDEN: Final = 3  # the exit code where the system does not allow tracing
PTRACE: Final = {"x86_64": 101, "aarch64": 117}


def scene(act: Scene) -> Scene:
    """Have it acted out, once for all tests, in a directory of its own."""
    SCENES[act.__name__] = act
    return act


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What came of each scene."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=False)
    if done.returncode == FORBIDDEN:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def act_all() -> int:
    """Do what is to be looked at."""
    try:
        trace(lambda: None, lambda _call: None)
    except NotReadyError as error:
        sys.stderr.write(str(error))
        return FORBIDDEN
    found = {}
    for name, act in SCENES.items():
        with tempfile.TemporaryDirectory() as place:
            found[name] = act(Path(place))
    sys.stdout.write(json.dumps(found))
    return 0


def allow(_call: Call) -> Decision:
    return None


def of(outcome: Outcome) -> list[object]:
    return [outcome.code, outcome.timed_out]


def silenced(act: Callable[[], Outcome]) -> tuple[Outcome, str]:
    """Do it with what its processes write to standard error caught."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            outcome = act()
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        caught.seek(0)
        return outcome, caught.read().decode()


def write(path: Path, content: bytes = b"x") -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    os.write(fd, content)
    os.close(fd)


# -- numbering -----------------------------------------------------------------------------------


@scene
def threads(place: Path) -> object:
    def work() -> None:
        def rename(number: int) -> None:
            write(place / f"{number}.new")
            os.rename(place / f"{number}.new", place / f"{number}")

        helpers = [threading.Thread(target=rename, args=(number,)) for number in range(3)]
        for helper in helpers:
            helper.start()
        for helper in helpers:
            helper.join()

    calls: list[Call] = []

    def note(call: Call) -> Decision:
        calls.append(call)
        return None

    outcome = trace(work, note, calls={"openat", "rename", "renameat", "write"})
    mine = {call.thread for call in calls if call.name.startswith("rename")}
    numbers = [call.number for call in calls]
    return [of(outcome), outcome.calls, numbers, len(mine), sorted(os.listdir(place))]


def test_calls_of_all_threads_have_one_count(seen: dict[str, Any]) -> None:
    outcome, count, numbers, threads_seen, files = seen["threads"]
    assert outcome == [0, False]
    assert count == len(numbers) >= 9
    assert numbers == list(range(1, count + 1))
    assert threads_seen == 3
    assert files == ["0", "1", "2"]


@scene
def names(place: Path) -> object:
    def work() -> None:
        write(place / "a")
        os.rename(place / "a", place / "b")
        os.unlink(place / "b")

    found = []

    def note(call: Call) -> Decision:
        found.append([call.name, os.path.basename(os.fsdecode(call.text(0)))])
        return None

    trace(work, note, calls={"rename", "renameat", "unlink"})
    return found


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other calls on other machines")
def test_only_the_calls_asked_for_stop_and_their_paths_can_be_read(seen: dict[str, Any]) -> None:
    assert seen["names"] == [["rename", "a"], ["unlink", "b"]]


@scene
def changing(place: Path) -> object:
    (place / "there").write_bytes(b"x")

    def work() -> None:
        os.close(os.open(place / "there", os.O_RDONLY))
        os.close(os.open(place / "new", os.O_WRONLY | os.O_CREAT, 0o600))

    found = []

    def note(call: Call) -> Decision:
        if call.name == "openat":
            found.append([os.path.basename(os.fsdecode(call.text(1))), call.changes])
        return None

    trace(work, note)
    return found


def test_opening_changes_a_disk_only_where_it_may_create(seen: dict[str, Any]) -> None:
    assert seen["changing"] == [["there", False], ["new", True]]


# -- killing -------------------------------------------------------------------------------------


@scene
def kills(place: Path) -> object:
    def work() -> None:
        for name in "abc":
            os.mkdir(place / name)
        os._exit(0)

    found = []
    for number in range(1, 5):
        for name in os.listdir(place):
            os.rmdir(place / name)
        outcome = trace(
            work,
            lambda call, number=number: Kill() if call.number == number else None,  # type: ignore[misc]
            calls={"mkdir", "mkdirat"},
        )
        found.append([outcome.code, outcome.calls, "".join(sorted(os.listdir(place)))])
    return found


def test_a_kill_comes_before_its_call_and_after_all_calls_before_that(
    seen: dict[str, Any],
) -> None:
    killed = -signal.SIGKILL.value
    assert seen["kills"] == [[killed, 1, ""], [killed, 2, "a"], [killed, 3, "ab"], [0, 3, "abc"]]


@scene
def whoever_calls(place: Path) -> object:
    def work() -> None:
        subprocess.run(["/bin/sh", "-c", f": > {place}/made"], check=False)
        time.sleep(60)  # only the whole process is worth killing

    def at_the_child(call: Call) -> Decision:
        mine = b"made" in call.text(1)
        return Kill() if mine else None

    started = time.monotonic()
    outcome = trace(work, at_the_child, calls={"openat"})
    return [outcome.code, os.listdir(place), time.monotonic() - started < 30]


def test_a_call_of_a_child_kills_the_process_that_does_the_work(seen: dict[str, Any]) -> None:
    assert seen["whoever_calls"] == [-9, [], True]


@scene
def left_behind(place: Path) -> object:
    def work() -> None:
        if os.fork() == 0:
            write(place / "pid", str(os.getpid()).encode())
            time.sleep(60)
            os._exit(0)
        while not (place / "pid").exists() or not (place / "pid").read_bytes():
            time.sleep(0.001)
        os.mkdir(place / "x")

    def at_the_end(call: Call) -> Decision:
        return Kill() if call.name.startswith("mkdir") else None

    trace(work, at_the_end, calls={"mkdir", "mkdirat"})
    state = Path("/proc", (place / "pid").read_text(), "stat")
    # Whoever inherited it may not have buried it yet.
    return "gone" if not state.exists() or state.read_text().split(") ")[1][0] in "ZX" else "alive"


def test_what_a_killed_process_started_ends_with_it(seen: dict[str, Any]) -> None:
    assert seen["left_behind"] == "gone"


@scene
def short_lived(_place: Path) -> object:
    def work() -> None:
        def fork() -> None:
            for _ in range(5):
                child = os.fork()
                if child == 0:
                    os._exit(0)
                os.waitpid(child, 0)

        helpers = [threading.Thread(target=fork) for _ in range(6)]
        for helper in helpers:
            helper.start()
        for helper in helpers:
            helper.join()

    return [of(trace(work, allow)) for _ in range(20)]


def test_a_child_may_be_gone_before_its_birth_is_announced(seen: dict[str, Any]) -> None:
    assert seen["short_lived"] == [[0, False]] * 20


# -- failing and watching ------------------------------------------------------------------------


@scene
def fails(place: Path) -> object:
    (place / "a").write_bytes(b"x")
    answers = place / "answers"

    def work() -> None:
        found: list[int | None] = []
        for _ in range(3):
            try:
                os.rename(place / "a", place / "b")
            except OSError as error:
                found.append(error.errno)
        answers.write_text(json.dumps(found))

    def refuse(call: Call) -> Decision:
        return [Fail(errno.EDQUOT), Fail(errno.ESTALE), None][call.number - 1]

    outcome = trace(work, refuse, calls={"rename", "renameat", "renameat2"})
    return [outcome.code, json.loads(answers.read_text()), sorted(os.listdir(place))]


def test_a_call_fails_with_the_error_that_was_asked_for_and_is_not_made(
    seen: dict[str, Any],
) -> None:
    assert seen["fails"] == [0, [errno.EDQUOT, errno.ESTALE], ["answers", "b"]]


@scene
def interrupted(place: Path) -> object:
    def work() -> None:
        write(place / "a", b"whole")

    def interrupt(call: Call) -> Decision:
        return Fail(errno.EINTR) if call.number == 1 else None

    outcome = trace(work, interrupt, calls={"write"})
    return [outcome.code, outcome.calls, (place / "a").read_text()]


def test_an_interrupted_call_is_made_again_by_python(seen: dict[str, Any]) -> None:
    assert seen["interrupted"] == [0, 2, "whole"]


@scene
def watches(place: Path) -> object:
    def work() -> None:
        write(place / "a", b"seven b")
        with contextlib.suppress(OSError):
            os.rmdir(place / "missing")

    found = []
    trace(
        work,
        lambda _call: Watch(),
        calls={"write", "rmdir", "unlinkat"},
        returned=lambda call, value: found.append([call.number, value]),
    )
    return found


def test_what_a_watched_call_returned_is_told(seen: dict[str, Any]) -> None:
    assert seen["watches"] == [[1, 7], [2, -errno.ENOENT]]


@scene
def memory(place: Path) -> object:
    found: list[object] = []

    def look(call: Call) -> Decision:
        data = call.memory(call.args[1], 1 << 30 if call.args[2] == 3 else 5)
        found.append([len(data) >= 3, data[:3].decode()])
        try:
            call.memory(1, 1)
        except OSError:
            found.append("nothing there")
        return None

    trace(lambda: write(place / "a", b"abcdef"), look, calls={"write"})
    return found


def test_memory_is_read_as_far_as_there_is_some(seen: dict[str, Any]) -> None:
    assert seen["memory"] == [[True, "abc"], "nothing there"]


# -- how it ends ---------------------------------------------------------------------------------


@scene
def endings(_place: Path) -> object:
    def leave(what: object) -> Callable[[], int | None]:
        def work() -> int | None:
            if isinstance(what, int | None):
                return what
            if isinstance(what, BaseException):
                raise what
            os.kill(os.getpid(), signal.SIGTERM)
            return 0

        return work

    plain = [None, 5, SystemExit(), SystemExit(6), SystemExit("words"), "a signal"]
    codes = [trace(leave(what), allow).code for what in plain]
    outcome, said = silenced(lambda: trace(leave(ValueError("why")), allow))
    return [codes, outcome.code, "ValueError: why" in said]


def test_the_exit_code_is_that_of_the_work(seen: dict[str, Any]) -> None:
    assert seen["endings"] == [[0, 5, 0, 6, 1, -signal.SIGTERM.value], 70, True]


@scene
def patience(place: Path) -> object:
    started = time.monotonic()
    sleeping = trace(lambda: time.sleep(60), allow, seconds=0.2)

    def endless() -> None:
        while True:
            write(place / "a")

    working = trace(endless, allow, seconds=0.2)
    took = time.monotonic() - started
    return [of(sleeping), of(working), took < 30]


def test_a_run_that_takes_too_long_is_ended(seen: dict[str, Any]) -> None:
    assert seen["patience"] == [[-9, True], [-9, True], True]


@scene
def signals(place: Path) -> object:
    def work() -> int:
        got = []
        signal.signal(signal.SIGUSR1, lambda number, _frame: got.append(number))
        os.kill(os.getpid(), signal.SIGUSR1)
        waker = os.fork()
        if waker == 0:
            time.sleep(0.05)
            os.kill(os.getppid(), signal.SIGCONT)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGSTOP)
        os.waitpid(waker, 0)
        write(place / "a")
        return len(got)

    return of(trace(work, allow))


def test_signals_arrive_and_a_stopped_process_goes_on(seen: dict[str, Any]) -> None:
    assert seen["signals"] == [1, False]


@scene
def nothing_is_left(_place: Path) -> object:
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        trace(lambda: None, allow)
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return sorted(os.listdir("/proc/self/fd")) == before and threading.active_count() == 1
    return "a child"


def test_a_run_leaves_no_descriptor_thread_or_child(seen: dict[str, Any]) -> None:
    assert seen["nothing_is_left"] is True


# -- where it cannot be done ---------------------------------------------------------------------


@scene
def forbidden(_place: Path) -> object:
    """What `trace` says in a process that may not trace, and what becomes of the work."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        machine = platform.machine()
        operation = seccomp.operation
        code = operation(seccomp.LOAD, seccomp.NUMBER)
        code += operation(seccomp.IF_EQUAL, PTRACE[machine], 0, 1)
        code += operation(seccomp.RETURN, seccomp.REFUSE | errno.EPERM)
        seccomp.install(code + operation(seccomp.RETURN, seccomp.ALLOW))
        said = io.StringIO()
        try:
            trace(lambda: print("it began", file=said), allow)
        except NotReadyError as error:
            said.write(f"{error}; {error.hint}")
        try:
            os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            said.write("; no child")
        os.write(into, said.getvalue().encode())
        os._exit(0)
    os.close(into)
    with open(out, "rb") as answer:
        text = answer.read().decode()
    os.waitpid(child, 0)
    return text


def test_where_tracing_is_forbidden_that_is_said_and_nothing_runs(seen: dict[str, Any]) -> None:
    assert seen["forbidden"] == (
        "the system does not allow tracing: Operation not permitted;"
        " container managers forbid ptrace unless told otherwise; no child"
    )


def test_a_machine_without_a_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert not tracer.is_supported()
    with pytest.raises(NotReadyError, match="cannot be traced on this machine: riscv64"):
        trace(lambda: None, allow)


# -- the table -----------------------------------------------------------------------------------

# On aarch64 one header serves machines of 32 bit too, and names some calls after those.
GENERIC: Final = {"newfstatat": "fstatat"}


@pytest.mark.parametrize(
    ("column", "header"),
    [
        (0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        (1, "/usr/include/asm-generic/unistd.h"),
    ],
    ids=["x86_64", "aarch64"],
)
def test_system_call_numbers_are_those_of_the_kernels_headers(column: int, header: str) -> None:
    if not Path(header).exists():
        pytest.skip("needs the Debian package linux-libc-dev")
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\n", Path(header).read_text("ascii"))
    numbers = {name: int(number) for name, number in found}
    for name, both in tracer._NUMBERS.items():
        there = numbers.get(name, numbers.get(GENERIC.get(name, "")) if column else None)
        assert both[column] == there, name


def test_what_changes_a_disk_can_be_traced() -> None:
    assert CHANGING < CALLS
    assert {"openat", "write", "fsync", "renameat2", "unlinkat", "linkat"} < CHANGING
    assert CHANGING.isdisjoint({"read", "fstat", "newfstatat", "flock", "close"})


if __name__ == "__main__":
    sys.exit(act_all())
