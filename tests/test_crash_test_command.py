"""``crash-test``: real kills on real file systems, and what is said of them."""

from __future__ import annotations

import itertools
import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from cli_runner import PATIENCE, Cli, Outcome, check_complaint, check_harmless, wait_until

from secimg_watch import crashtest, tracer
from secimg_watch.crashtest import Findings, Violation
from secimg_watch.policy import load_policy
from secimg_watch.selection import Passed, Selection

if TYPE_CHECKING:
    from collections.abc import Iterator

    from secimg_watch.crashtest import _Trap

assert sys.platform != "win32"  # what is tested here does not exist there

pytestmark = pytest.mark.skipif(
    not tracer.is_supported(), reason="there is no tracing on this machine"
)

MEMORY: Final = Path("/dev/shm")
NOBODY: Final = 65534
FIELDS: Final = {
    *("directory", "file_system", "places", "killed", "violations", "kept", "seconds"),
    "not_tested",
}

# Changes something in the program before it runs, in a process of its own; forked from one that
# has loaded it, as loading takes longer than most of the tests.
FORKER = """
import encodings.ascii, encodings.utf_8_sig, json, os, sys
from secimg_watch import crashtest
from secimg_watch.cli import main

for line in sys.stdin:
    order = json.loads(line)
    if pid := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        continue
    for number, path in enumerate((os.devnull, order["out"], order["err"])):
        os.dup2(os.open(path, os.O_RDWR), number)
    os.chdir(order["cwd"])
    sys.argv = ["secimg-watch", "crash-test", *order["words"]]
    exec(order["patch"])
    main()
    sys.exit(0)
"""

# A program that is started by somebody can be traced by them; one that only changes its user
# has to say so.
AS_NOBODY = """
import ctypes
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
"""

ERASES_TOO_EARLY = """
import time
from secimg_watch import pipeline
from secimg_watch.roots import remove_directories
from secimg_watch.records import Erased

commit = pipeline.commit

def commit_late(batch):
    for _, verified in batch:
        claimed = verified.staged.claimed
        os.unlink(claimed.name, dir_fd=claimed.parent)
        for _ in range(50):  # more places to be killed at
            os.fsync(claimed.parent)
    return commit(batch)

def erase(batch):
    for each in batch:
        claimed = each.committed.verified.staged.claimed
        job = claimed.inspected.held.job
        folders = os.path.dirname(f"{job.object_id}/{job.relpath}")
        remove_directories(each.root.staging.fd, folders)
    return [Erased(each.committed, time.time_ns()) for each in batch]

pipeline.commit, pipeline.erase = commit_late, erase
"""


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path / "home")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    directory = tmp_path / "place"
    directory.mkdir()
    return directory


@pytest.fixture(scope="session")
def _tracing() -> None:
    """Skip where the system forbids it, as in some containers."""
    script = "from secimg_watch.tracer import trace; trace(lambda: 0, lambda _call: None)"
    done = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, check=False)
    if done.returncode:
        pytest.skip(f"tracing is not allowed: {done.stderr.decode().splitlines()[-1]}")


class Patched:
    """Runs the command after something in the program was changed."""

    def __init__(self, process: subprocess.Popen[bytes], cwd: Path) -> None:
        self._process = process
        self._cwd = cwd

    def __call__(self, patch: str, *words: str | Path) -> Outcome:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
            order = {"patch": patch, "words": [*map(str, words)], "cwd": str(self._cwd)}
            files = {"out": out.name, "err": err.name}
            self._process.stdin.write(json.dumps(order | files).encode() + b"\n")
            self._process.stdin.flush()
            assert select.select([self._process.stdout], [], [], PATIENCE)[0]
            code = int(self._process.stdout.readline())
            return Outcome(code, out.read().decode(), err.read().decode())


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Patched]:
    environ = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    home = tmp_path_factory.mktemp("home")
    with subprocess.Popen(
        [sys.executable, "-c", FORKER],
        env={**environ, "HOME": str(home), "LANG": "C.UTF-8", "PYTHONWARNINGS": "error"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        yield Patched(process, home)
        process.communicate()


# -- real runs -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("_tracing")
def test_kills_lose_nothing_here_and_nothing_is_left_behind(cli: Cli, place: Path) -> None:
    cli.environ["SECIMG_WATCH_POLICY"] = "absent.yaml"  # none is looked for
    outcome = cli("crash-test", "--points", "2", place)
    assert (outcome.code, outcome.err) == (0, "")
    said = dict(line.split("  ", 1) for line in outcome.out.splitlines())
    fields = {name: text.strip() for name, text in said.items()}
    assert fields["killed at"].startswith("2 of ")
    assert fields["violations"] == "0"
    assert fields["not tested"].startswith("a power cut")
    assert os.listdir(place) == []
    assert os.listdir(cli.home) == []
    check_harmless(outcome)


@pytest.mark.usefixtures("_tracing")
@pytest.mark.skipif(not os.access(MEMORY, os.W_OK), reason="there is no file system in memory")
def test_in_memory_the_result_is_json_where_it_is_asked_for(cli: Cli) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as place:
        outcome = cli("--json", "crash-test", "--points", "2", place)
        result = outcome.json()
        assert os.listdir(place) == []
    assert (outcome.code, outcome.err) == (0, "")
    assert result.keys() == FIELDS
    offers = {"leases": True, "exclusive_rename": True, "directory_sync": True}
    assert result["file_system"] == {"type": "tmpfs", **offers}
    assert (result["killed"], result["violations"], result["kept"]) == (2, [], None)
    assert result["places"] > 50


@pytest.mark.usefixtures("_tracing")
def test_unless_told_otherwise_it_ends_in_time(patched: Patched, place: Path) -> None:
    outcome = patched("crashtest.SECONDS = 0.5", "--json", place)
    assert outcome.code == 0, outcome.err
    result = outcome.json()
    assert 0 < result["killed"] < result["places"]


@pytest.mark.usefixtures("_tracing")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_somebody_who_is_not_root_can_run_it(patched: Patched) -> None:
    with tempfile.TemporaryDirectory() as place:
        os.chown(place, NOBODY, NOBODY)
        outcome = patched(AS_NOBODY, "--json", "--points", "2", place)
        assert outcome.code == 0, outcome.err
        assert outcome.json()["killed"] == 2
        assert os.listdir(place) == []


@pytest.mark.usefixtures("_tracing")
def test_a_service_that_erases_too_early_is_found_out_and_the_place_named(
    patched: Patched, place: Path
) -> None:
    outcome = patched(ERASES_TOO_EARLY, "--json", "--points", "40", place)
    assert outcome.code == 1, outcome.err
    result = outcome.json()
    [violation] = result["violations"]
    assert violation["number"] > 0
    assert violation["call"] in tracer.CHANGING
    assert any("is lost" in fault for fault in violation["faults"])
    [kept] = place.iterdir()
    assert result["kept"] == str(kept)
    assert {"drop", "vault", "state", "policy.yaml"} == set(os.listdir(kept))
    key = load_policy(kept / "policy.yaml").key.file
    assert key is not None
    assert not key.parent.exists()


@pytest.mark.usefixtures("_tracing")
def test_a_service_that_seals_nothing_is_found_out_without_a_kill(
    patched: Patched, place: Path
) -> None:
    idle = "crashtest.Service.drain = lambda self, show: 0"
    outcome = patched(idle, place)
    assert outcome.code == 1
    assert "violations        1" in outcome.out
    assert "without having been killed" in outcome.err
    assert "deeper/large.jpg is left in clear" in outcome.err
    assert str(next(place.iterdir())) in outcome.err
    check_harmless(outcome)


@pytest.mark.usefixtures("_tracing")
def test_where_the_service_cannot_work_at_all_it_is_75_with_the_reason(
    patched: Patched, place: Path
) -> None:
    full = "from secimg_watch import kernel; kernel.free_space = lambda path: (0, 1)"
    outcome = patched(full, place)
    assert "too little free space" in check_complaint(outcome, 75)
    assert os.listdir(place) == []


@pytest.mark.usefixtures("_tracing")
def test_what_the_service_could_not_make_use_of_is_not_said_to_be_there(
    patched: Patched, place: Path
) -> None:
    lacking = """
from secimg_watch import kernel
kernel._renameat2 = lambda *_words: False
kernel.take_read_lease = lambda _fd: kernel.Lease.UNAVAILABLE
"""
    outcome = patched(lacking, "--points", "1", place)
    assert outcome.code == 0, outcome.err
    assert "read leases       no; " in outcome.out
    assert "exclusive rename  no; " in outcome.out


@pytest.mark.usefixtures("_tracing")
def test_ended_by_a_signal_it_leaves_nothing(cli: Cli, place: Path) -> None:
    command = cli.start("crash-test", "--all", place)
    wait_until(lambda: any(place.glob("*/state/queue.sqlite")) or command.poll() is not None)
    command.terminate()
    command.communicate(timeout=PATIENCE)
    assert command.returncode == 143
    assert os.listdir(place) == []


# -- refusals ------------------------------------------------------------------------------------


def test_a_directory_that_is_not_there_or_is_none_is_66(cli: Cli, place: Path) -> None:
    assert "absent" in check_complaint(cli("crash-test", place / "absent"), 66)
    (place / "file").write_text("text")
    assert "not a directory" in check_complaint(cli("crash-test", place / "file"), 66)
    assert os.listdir(place) == ["file"]


def test_a_directory_that_cannot_be_written_is_73(patched: Patched) -> None:
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o555)
        outcome = patched(AS_NOBODY if os.geteuid() == 0 else "", place)
        assert place in check_complaint(outcome, 73)
        os.chmod(place, 0o700)


def test_a_directory_that_cannot_be_reached_is_77(patched: Patched) -> None:
    with tempfile.TemporaryDirectory() as place:
        inner = Path(place) / "inner"
        inner.mkdir()
        os.chmod(place, 0)
        outcome = patched(AS_NOBODY if os.geteuid() == 0 else "", inner)
        check_complaint(outcome, 77)
        os.chmod(place, 0o700)


def test_a_path_that_no_policy_can_hold_is_64(cli: Cli, place: Path) -> None:
    named = place / os.fsdecode(b"\xff")
    named.mkdir()
    check_complaint(cli("crash-test", named), 64)
    assert os.listdir(named) == []


@pytest.mark.parametrize(
    "patch",
    [
        """
from secimg_watch import tracer
def refused(*_words): raise PermissionError(1, "Operation not permitted")
tracer._ptrace = refused
""",
        "import platform; platform.machine = lambda: 'riscv64'",
        "from secimg_watch import seccomp; seccomp.install = lambda code: False",
    ],
    ids=["forbidden", "another machine", "no filter"],
)
def test_where_nothing_can_be_traced_it_is_75_and_nothing_is_left(
    patched: Patched, place: Path, patch: str
) -> None:
    check_complaint(patched(patch, place), 75)
    assert os.listdir(place) == []


@pytest.mark.parametrize(
    "words", [["--points", "3", "--all", "."], ["--points", "0", "."], []], ids=" ".join
)
def test_wrong_usage_is_64(cli: Cli, words: list[str]) -> None:
    check_complaint(cli("crash-test", *words), 64)


# -- which places are tried ----------------------------------------------------------------------


class Runs:
    """In the place of a site: runs of so many calls, one after the other."""

    def __init__(self, *lengths: int, bad: int = 0) -> None:
        self._lengths = itertools.chain(lengths, itertools.repeat(lengths[-1]))
        self._bad = bad
        self.killed_at: list[int] = []

    def begin(self) -> dict[str, bytes]:
        return {}

    def drain(self, trap: _Trap) -> tuple[tracer.Outcome, str]:
        for number in range(1, next(self._lengths) + 1):
            call = tracer.Call(number, 0, "fsync", (0, 0, 0, 0, 0, 0))
            if isinstance(trap.decide(call), tracer.Kill):
                self.killed_at.append(number)
                return tracer.Outcome(-9), ""
        return tracer.Outcome(0), ""

    def check(self, _pictures: dict[str, bytes]) -> list[str]:
        return ["lost"] if self._bad in self.killed_at else []

    def finish(self, pictures: dict[str, bytes], trap: _Trap) -> tuple[list[str], str]:
        if trap._number is None and not self.killed_at:
            self.drain(trap)
        return self.check(pictures), ""


def tried(runs: Runs, places: int | None, deadline: float | None) -> tuple[Any, Violation | None]:
    test = crashtest._Test(runs, lambda _done, _total: None)  # type: ignore[arg-type]
    return test, test.run(places, deadline)


def test_all_means_every_call_until_a_run_gets_through() -> None:
    runs = Runs(9)
    test, violation = tried(runs, None, None)
    assert violation is None
    assert runs.killed_at == [*range(1, 10)]
    assert (test.killed, test.places) == (9, 9)


def test_a_shorter_run_in_between_does_not_end_it_before_the_last_call() -> None:
    runs = Runs(9, 9, 9, 2, 9)
    tried(runs, None, None)
    assert runs.killed_at == [1, 2, *range(4, 10)]


def test_so_many_places_are_spread_over_the_run() -> None:
    runs = Runs(100)
    tried(runs, 4, None)
    assert len(runs.killed_at) == 4
    assert all(any(n in range(k, k + 26) for n in runs.killed_at) for k in range(1, 101, 25))


def test_more_places_than_there_are_is_each_of_them() -> None:
    runs = Runs(5)
    test, _ = tried(runs, 50, None)
    assert sorted(runs.killed_at) == [1, 2, 3, 4, 5]
    assert test.killed == 5


def test_when_the_time_is_over_at_least_one_place_was_tried() -> None:
    runs = Runs(5)
    tried(runs, None, 0.0)
    assert len(runs.killed_at) == 1


def test_the_first_violation_ends_it() -> None:
    runs = Runs(9, bad=4)
    _, violation = tried(runs, None, None)
    assert violation == Violation(4, "fsync", "", ("lost",))
    assert runs.killed_at == [1, 2, 3, 4]


@pytest.mark.parametrize("count", [1, 2, 7, 8, 100])
def test_every_place_comes_once_and_no_gap_is_long_at_any_time(count: int) -> None:
    order = list(crashtest._spread(count))
    assert sorted(order) == [*range(1, count + 1)]
    for length in range(1, count + 1):
        taken = [0, *sorted(order[:length]), count + 1]
        gaps = [b - a for a, b in itertools.pairwise(taken)]
        assert max(gaps) <= 4 * count / length + 1


# -- what is found -------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> crashtest._Site:
    top = tmp_path / "top"
    top.mkdir()
    return crashtest._Site(top, tmp_path / "key")


def test_what_lies_in_clear_is_there(site: crashtest._Site) -> None:
    assert site.check(site.begin()) == []


def test_a_picture_that_is_gone_or_not_whole_is_lost(site: crashtest._Site, tmp_path: Path) -> None:
    pictures = site.begin()
    (tmp_path / "top/drop/small.jpg").unlink()
    large = tmp_path / "top/drop/deeper/large.jpg"
    large.write_bytes(large.read_bytes()[:-1])
    assert [fault.partition(" is lost")[0] for fault in site.check(pictures)] == [*pictures]


def test_an_object_that_does_not_open_is_a_fault(site: crashtest._Site, tmp_path: Path) -> None:
    pictures = site.begin()
    (tmp_path / f"top/vault/objects/ab/{'ab' * 16}.simg").write_bytes(b"no object")
    [fault] = site.check(pictures)
    assert "cannot be restored" in fault


def test_each_beginning_makes_other_pictures_and_takes_away_what_was_there(
    site: crashtest._Site, tmp_path: Path
) -> None:
    first = site.begin()
    (tmp_path / f"top/vault/objects/ab/{'ab' * 16}.simg").write_bytes(b"no object")
    (tmp_path / "top/drop/more").write_text("more")
    second = site.begin()
    assert first.keys() == second.keys()
    assert set(first.values()).isdisjoint(second.values())
    assert site.check(second) == []
    assert not (tmp_path / "top/drop/more").exists()


def test_a_service_that_watches_the_directory_takes_nothing_of_a_test(place: Path) -> None:
    made = crashtest._make_directory(place)
    for name in ("drop/small.jpg", f"drop/.secimg-watch/{'ab' * 16}/small.jpg"):
        assert Selection().passes_over(f"{made.name}/{name}") is Passed.TEMPORARY
    assert made.stat().st_mode & 0o777 == 0o700


def test_what_a_file_system_lacks_is_said_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    from secimg_watch.cli.crashtest import _tell  # noqa: PLC0415 - for this one alone

    lacking = crashtest.FileSystem("", leases=False, exclusive_rename=False, directory_sync=False)
    _tell(Findings("/x", lacking, 9, 9, (), None, 1.0))
    out = capsys.readouterr().out
    assert out.startswith("file system       unknown\n")
    assert out.count("no; ") == 3


@pytest.mark.parametrize("depth", ["itself", "above"])
def test_where_others_may_rename_what_is_made_it_is_77(cli: Cli, place: Path, depth: str) -> None:
    inner = place / "inner"
    inner.mkdir()
    (inner if depth == "itself" else place).chmod(0o777)
    check_complaint(cli("crash-test", inner), 77)
    assert os.listdir(inner) == []
    place.chmod(0o1777)
    inner.chmod(0o700)
    assert cli("crash-test", "--points", "1", inner).code == 0
