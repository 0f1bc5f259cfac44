"""Lets each file-system call of a command fail, with each error that it may plausibly meet.

``python tests/campaigns/fail_every_call.py [--only WORD] [--workers N]``

Each call fails once, with each of its errors; and from each call on the disk of the folder, of
the vault, of the state or of all three stays full (``ENOSPC``) or dead (``EIO``). The command has
to come to an end by itself, with one of its exit codes and a sentence that is no defect; nothing
may be lost at once, and what a person then does, with the disk well again, has to finish the
work, everything sealed once. What that was is counted: nothing but the same command again, time
for the back-off, or ``jobs retry``.

The end of the output says which error ended in which exit code with which words. Exit code 1
where anything was violated.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import math
import os
import random
import re
import sqlite3
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

sys.path.insert(0, str(Path(__file__).parent))  # where the other campaign lies

from kill_every_call import Case, Running, a_place, cases, in_processes, where

from secimg_watch.tracer import CALLS, Call, Fail

if TYPE_CHECKING:
    from collections.abc import Iterator

    from secimg_watch.tracer import Decision, Outcome

_EVERYWHERE: Final = ("EIO", "EACCES", "ESTALE")
_FULL: Final = ("ENOSPC", "EDQUOT")

ERRORS: Final[dict[str, tuple[str, ...]]] = {
    **dict.fromkeys(("open", "openat"), (*_EVERYWHERE, *_FULL, "EINTR", "EMFILE")),
    **dict.fromkeys(("write", "pwrite64", "writev"), (*_FULL, "EIO", "ESTALE", "EINTR")),
    **dict.fromkeys(("ftruncate", "fallocate", "copy_file_range"), (*_FULL, "EIO", "ESTALE")),
    **dict.fromkeys(("fsync", "fdatasync"), (*_FULL, "EIO", "ESTALE", "EINTR")),
    **dict.fromkeys(("rename", "renameat", "renameat2"), (*_EVERYWHERE, *_FULL)),
    **dict.fromkeys(("mkdir", "mkdirat", "link", "linkat"), (*_EVERYWHERE, *_FULL)),
    **dict.fromkeys(("unlink", "unlinkat", "rmdir"), (*_EVERYWHERE, "ENOSPC")),
    **dict.fromkeys(("stat", "lstat", "newfstatat", "statx", "statfs"), _EVERYWHERE),
    **dict.fromkeys(("fstat", "fstatfs", "getdents64"), ("EIO", "ESTALE")),
    **dict.fromkeys(("read", "pread64", "preadv"), ("EIO", "ESTALE", "EINTR")),
    **dict.fromkeys(("chmod", "fchmod", "utimensat"), ("EIO", "EACCES", "ESTALE")),
    "flock": ("EIO", "EINTR", "ENOLCK"),
}
"""The errors of each call. Those of a full disk do not meet a file that is only read."""

_TAKES_SPACE: Final = frozenset(name for name, errors in ERRORS.items() if "ENOSPC" in errors)
_GIVES_SPACE: Final = frozenset({"unlink", "unlinkat", "rmdir"})
_CREATES: Final = os.O_CREAT

CODES: Final = frozenset({0, 1, 66, 73, 74, 75, 77, 78})
"""Exit codes that a failing disk may lead to."""

_LIES: Final = re.compile(r"traceback|defect|sqlite3\.|errno|exception|none", re.IGNORECASE)
PATIENCE: Final = 40.0
_ROUNDS: Final = 4
_OUTAGE: Final = 1.5  # seconds that a disk fails which a daemon is to outlive


@dataclass(frozen=True, slots=True)
class Fault:
    """What fails: the k-th call of a name once, or all from the k-th on below a place.

    Both count only calls to the site. ``name`` "" means every call that the error can meet.
    """

    error: str
    k: int
    name: str = ""
    below: str = ""
    seconds: float = math.inf  # after which the disk is well again

    @property
    def is_lasting(self) -> bool:
        return not self.name

    def __str__(self) -> str:
        if self.is_lasting:
            return f"{self.error} from call {self.k} on below {self.below or 'all'}"
        return f"{self.error} at {self.name} {self.k}"


@dataclass(slots=True)
class Breaker:
    """Decides by a fault, and remembers where it struck first."""

    fault: Fault
    top: str
    seen: int = 0
    struck: str = ""
    ends: float = math.inf

    def __call__(self, call: Call) -> Decision:
        fault = self.fault
        if time.monotonic() > self.ends:
            return None
        if fault.name and call.name != fault.name:
            return None
        path = where(call)
        if not path.startswith(f"{self.top}/{fault.below}") or not meets(call, fault.error):
            return None
        self.seen += 1
        if self.seen < fault.k or (self.seen > fault.k and not fault.is_lasting):
            return None
        if not self.struck:
            self.struck = f"{call.name} {path.removeprefix(self.top)}"
            self.ends = time.monotonic() + fault.seconds
        return Fail(getattr(errno, fault.error))


def meets(call: Call, error: str) -> bool:
    """Whether a call may fail so."""
    if error not in ERRORS.get(call.name, ()):
        return False
    if error not in _FULL:
        return True
    if call.name in {"open", "openat"}:
        return bool(call.args[1 + (call.name == "openat")] & _CREATES)
    return call.name not in _GIVES_SPACE or error == "ENOSPC"


@dataclass(slots=True)
class Tally:
    """What came of one case."""

    title: str
    calls: int = 0
    faults: int = 0
    struck: int = 0
    runs: int = 0
    seconds: float = 0.0
    endings: Counter[tuple[int, str, str]] = field(default_factory=Counter)
    remedies: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Take in what another process found."""
        self.calls = max(self.calls, other.calls)
        self.faults += other.faults
        self.struck += other.struck
        self.runs += other.runs
        self.seconds += other.seconds
        self.endings += other.endings
        self.remedies += other.remedies
        self.violations += other.violations


@dataclass(slots=True)
class Campaign:
    """One case, failed at as many points as wanted."""

    case: Case
    tally: Tally

    def plan(self) -> list[Fault]:
        """Let the command run well, and list what could fail."""
        seen: Counter[tuple[str, str]] = Counter()  # of calls that may meet it: name, error
        lasting: Counter[tuple[str, str]] = Counter()
        top = f"{self.case.rig.top}/"

        def note(call: Call) -> Decision:
            path = where(call)
            if not path.startswith(top):
                return None
            self.tally.calls += 1
            for error in ERRORS.get(call.name, ()):
                seen[call.name, error] += meets(call, error)
            for error in ("ENOSPC", "EIO"):
                for below in ("", "drop", "vault", "state"):
                    if path.startswith(top + below) and meets(call, error):
                        lasting[below, error] += 1
            return None

        self.case.reset()
        outcome, output = self.case.run(note, calls=CALLS)
        assert self.case.is_good(outcome.code, output), output
        once = [Fault(e, k, name) for (name, e), n in seen.items() for k in range(1, n + 1)]
        # A daemon goes on when the disk is well again; a command has ended by then.
        seconds = _OUTAGE if isinstance(self.case, Running) else math.inf
        ever = [
            Fault(error, k, "", below, seconds)
            for (below, error), count in lasting.items()
            for k in range(1, count + 1)
        ]
        return once + ever

    def try_(self, fault: Fault) -> None:
        """Let it fail so, look, and finish the work."""
        self.case.reset()
        self.tally.faults += 1
        breaker = Breaker(fault, str(self.case.rig.top))
        outcome, output = self.case.run(breaker, calls=CALLS, seconds=PATIENCE)
        self.tally.runs += 1
        self.tally.struck += bool(breaker.struck)
        what = f"{fault} ({breaker.struck or 'not reached'})"
        self.judge_end(what, outcome, output)
        self.note(what, self.case.broken())
        if self.case.is_good(outcome.code, output) and not isinstance(self.case, Running):
            self.note(f"{what}, exit code {outcome.code}", self.untold())
        self.finish(what)

    def judge_end(self, what: str, outcome: Outcome, output: str) -> None:
        said = _words(output, str(self.case.rig.top))
        self.tally.endings[outcome.code, said, _short(what)] += 1
        if outcome.timed_out:
            self.note(what, [f"it did not end: {said}"])
        elif outcome.code not in CODES:
            self.note(what, [f"exit code {outcome.code}: {said}"])
        elif _LIES.search(said) or (outcome.code and not said):
            self.note(what, [f"exit code {outcome.code}, and says: {output!r}"])

    def untold(self) -> list[str]:
        """What is not finished, and not to be seen in the status either, after a good end."""
        if type(self.case).recover is not Case.recover:
            return []  # the command is the first of several
        try:
            status = json.loads((self.case.rig.state / "status.json").read_text())
            if any("unreadable" in folder["passed"] for folder in status["folders"]):
                return []
        except (OSError, ValueError):
            pass  # no service ran
        # An empty directory goes at the next start, and is nobody's business before.
        return [fault for fault in self.case.unfinished(0) if not fault.startswith("left in")]

    def finish(self, what: str) -> None:
        """Do what a person would until it is finished."""
        if isinstance(self.case, Running) and self._is_finished():
            self.tally.remedies["nothing: it went on by itself"] += 1
            return
        needed: list[str] = []
        faults: list[str] = []
        for _ in range(_ROUNDS):
            done = list(self.case.recover())
            self.tally.runs += len(done)
            faults = [
                f"then exit code {outcome.code}: {output.strip()}"
                for outcome, output in done
                if not self.case.is_good(outcome.code, output)
            ]
            faults = faults or self.case.unfinished(self.case.duplicates)
            remedy = self.remedy() if faults else ""
            if not remedy:
                break
            needed.append(remedy)
        self.tally.remedies[", ".join(needed) or "the same command"] += 1
        self.note(f"{what}, then {needed}", faults)
        self.note(what, self.case.audit_faults())

    def _is_finished(self) -> bool:
        try:
            return not self.case.unfinished(0)
        except (OSError, sqlite3.Error):
            return False

    def remedy(self) -> str:
        """Help on what waits for time or for a person; "" where nothing does."""
        rig = self.case.rig
        with contextlib.closing(sqlite3.connect(rig.state / "queue.sqlite")) as queue:
            late = "UPDATE job SET not_before = 0 WHERE state = 'queued' AND not_before > ?"
            changed = queue.execute(late, (time.time(),)).rowcount
            queue.commit()
            if changed:
                return "time"
            resting = queue.execute(
                "SELECT object_id FROM job WHERE state IN ('quarantined', 'undeletable')"
            ).fetchall()
            if not resting:
                return ""
        names = [object_id for (object_id,) in resting]
        code = rig.run_here("jobs", "retry", "--all") or rig.run_here("jobs", "retry", *names)
        return "jobs retry" if code == 0 else ""

    def note(self, what: str, faults: list[str]) -> None:
        self.tally.violations += [f"{self.case.title}: {what}: {fault}" for fault in faults]


_ID: Final = re.compile(r"[0-9a-f]{32}")
_HEX: Final = re.compile(r"\.\w{32}\.part")
_CLOCK: Final = re.compile(r"\d\d:\d\d:\d\d ")
_DELAY: Final = re.compile(r"again in \d+ s")


def _words(output: str, top: str) -> str:
    """What was said, with nothing in it that differs from run to run."""
    text = _CLOCK.sub("", output.replace(top, "")).strip()
    text = _DELAY.sub("again in N s", _ID.sub("ID", _HEX.sub(".part", text)))
    return " | ".join(dict.fromkeys(text.splitlines()))


def _short(what: str) -> str:
    """A fault without its number and its object's id."""
    text = _ID.sub("ID", what)
    return re.sub(r"objects/\w\w", "objects/NN", re.sub(r"(call|at \w+) \d+", r"\1", text))


@dataclass(frozen=True, slots=True)
class Task:
    """What one process does: every ``step``-th fault from ``start`` on, or a sample of them."""

    title: str
    start: int
    step: int
    sample: int
    seed: int
    directory: Path | None

    def __call__(self) -> Tally:
        """Do it; the process has no other threads and no other children."""
        started = time.monotonic()
        case = next(each for each in cases() if each.title == self.title)
        campaign = Campaign(case, Tally(self.title))
        dice = random.Random(f"{self.seed} {self.title}")
        with a_place(self.directory) as top:
            case.build(top)
            faults = campaign.plan()
            if self.sample:
                faults = dice.sample(faults, min(self.sample, len(faults)))
            for fault in faults[self.start :: self.step]:
                campaign.try_(fault)
        campaign.tally.seconds = time.monotonic() - started
        return campaign.tally


def _do(task: Task) -> Tally:
    return task()


def report(tally: Tally) -> str:
    line = "{:<34} {:>5} {:>6} {:>7} {:>6} {:>10} {:>5.0f} s\n"
    return line.format(
        tally.title,
        tally.calls,
        tally.faults,
        tally.struck,
        tally.runs,
        len(tally.violations),
        tally.seconds,
    )


def histogram(tally: Tally) -> Iterator[str]:
    """Which words and exit codes there were, how often, and after what for example."""
    groups: dict[tuple[int, str], Counter[str]] = {}
    for (code, said, what), count in tally.endings.items():
        groups.setdefault((code, said), Counter())[what] += count
    for (code, said), causes in sorted(groups.items(), key=lambda each: each[0]):
        yield f"{causes.total():>6}  exit {code}: {said}\n"
        for cause, count in causes.most_common(3):
            yield f"        {count:>6}  {cause}\n"
    yield "what finished the work:\n"
    for remedy, count in tally.remedies.most_common():
        yield f"{count:>6}  {remedy}\n"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="let each call of a command fail")
    parser.add_argument("--slice", action="store_true", help="a few faults of some cases")
    parser.add_argument("--sample", type=int, default=0, help="so many faults of each case")
    parser.add_argument("--only", default="", help="cases with this in their title")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--dir", type=Path, help="where the sites lie; memory by default")
    return parser.parse_args()


SLICE: Final = ("drain, one worker",)
_SAMPLE: Final = 20


def main() -> int:
    asked = options()
    started = time.monotonic()
    sys.stdout.write(f"seed {asked.seed}\n")
    columns = ("case", "calls", "faults", "struck", "runs", "violations", "time")
    sys.stdout.write("{:<34} {:>5} {:>6} {:>7} {:>6} {:>10} {:>7}\n".format(*columns))
    titles = SLICE if asked.slice else [c.title for c in cases() if asked.only in c.title]
    if not titles:
        sys.stdout.write("no case has this in its title\n")
        return 2
    sample = _SAMPLE if asked.slice else asked.sample
    workers = 0 if asked.slice else asked.workers
    shares = workers or 1
    tasks = [
        Task(title, start, shares, sample, asked.seed, asked.dir)
        for title in titles
        for start in range(shares)
    ]
    total = Tally("all")
    for tally in in_processes(_do, tasks, workers, shares):
        sys.stdout.write(report(tally))
        sys.stdout.flush()
        total.add(tally)
    total.seconds = time.monotonic() - started
    sys.stdout.write(report(total))
    sys.stdout.writelines(histogram(total))
    for violation in total.violations:
        sys.stdout.write(f"VIOLATION {violation}\n")
    return 1 if total.violations else 0


if __name__ == "__main__":
    sys.exit(main())
