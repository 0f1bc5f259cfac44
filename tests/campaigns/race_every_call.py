"""An adversary acts at every file-system call of a running `drain`, in every way it can.

``python tests/campaigns/race_every_call.py [--slice] [--variant NAME] [--action NAME]``

A tracer stops the service before a call; the adversary does one thing, as a producer, as somebody
who shares the folder, or as an administrator; the run goes on to its end. Then whatever was damaged
around the service is repaired, and it runs again until nothing waits. The adversary keeps a ledger
of what exists after its own deed, in clear or as an object that opens. All of that has to exist at
once and in the end; no object may hold what no file ever held; nothing behind a link may change;
and what is left in clear is what the queue or the folder's status give a reason for.

What the documentation does not promise is counted apart, and only where the trace shows that it was
just that: a picture sealed in place, or one without a lease, that was written or swapped between
the last comparison and the unlink; an object that was changed after it was verified.

The exit code is 1 on any violation. `race_daemon.py` is the same with a daemon that nobody traces.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import random
import re
import sqlite3
import sys
import time
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the rig lies
assert sys.platform == "linux", "system calls are traced on Linux only"

from adversary import (
    BYSTANDER,
    PIECE,
    ROOT,
    SETLEASE,
    TARGET,
    VARIANTS,
    Adversary,
    Key,
    Namer,
    Place,
    Site,
    Variant,
    VoidError,
    build,
    describe,
    digest,
    in_clear,
    is_shown,
    picture,
)
from deeds import ACTIONS, Action, Step
from rig import STAGING, scratch

from secimg_watch import erase, kernel, pipeline, seal, settle, tracer, verify
from secimg_watch.errors import NotReadyError
from secimg_watch.records import Staged, Verified
from secimg_watch.tracer import Call, Decision, Fail, Watch

if TYPE_CHECKING:
    from collections.abc import Sequence
RUN_SECONDS: Final = 30.0
POLLS: Final = 20
ATTEMPTS: Final = 3  # threads make a run differ a little from the next
ROUNDS: Final = 9  # healthy runs; five attempts end in quarantine

# --- one run -----------------------------------------------------------------------------------


@dataclass
class Scene:
    """What there was when a call was about to be made: what can be done there at all."""

    key: Key
    number: int
    has: frozenset[str]
    before: str  # what the call before was about


@dataclass
class Result:
    """What came of one run."""

    outcome: str = "ok"  # or "void", "missed", "window"
    faults: list[str] = field(default_factory=list)
    windows: list[str] = field(default_factory=list)
    where: str = ""
    objects: int = 0
    contents: int = 0


@dataclass
class Run:
    """A traced run, and the adversary at one place of it."""

    site: Site
    variant: Variant
    action: Action | None
    place: Place | None
    adversary: Adversary
    calls: list[Key] = field(default_factory=list)
    scenes: list[Scene] = field(default_factory=list)
    acted: int = -1  # index among `calls`
    went_through: int = -1
    where: str = ""
    void: bool = False
    faults: list[str] = field(default_factory=list)
    flying: set[int] = field(default_factory=set)
    too_late: bool = False
    due: bool = False
    earlier: bool = False  # something was done in a run before

    def __post_init__(self) -> None:
        self.namer = Namer(os.path.realpath(self.site.top))

    def decide(self, call: Call) -> Decision:
        key = self.namer.key(call)
        if key is not None and is_shown(key):
            self.calls.append(key)
            if self.action is None:
                self._remember(call, key)
            elif self.acted < 0:
                self.due = self.due or self.place in {key, len(self.calls)}
                if self.due and not self.flying:
                    self._act(call, key)
        if self.adversary.waiting and self.adversary.go_on():
            self.went_through = len(self.calls) - 1
            self.adversary.take_stock()
        if self._fails(call, key):
            return Fail(errno.EXDEV if call.name.startswith("rename") else errno.EINVAL)
        if key is not None and call.changes and not key[2].startswith("state"):
            self.flying.add(call.thread)
            return Watch()
        return None

    def returned(self, call: Call, _value: int) -> None:
        self.flying.discard(call.thread)

    def _fails(self, call: Call, key: Key | None) -> bool:
        if call.name == "fcntl" and call.args[1] == SETLEASE:
            return not self.variant.leases
        if call.name == "renameat" and key is not None and not self.variant.moves:
            return key[2].startswith("drop/") and STAGING not in key[2]
        return False

    def _remember(self, call: Call, key: Key) -> None:
        a = self.adversary
        has = {"name"} if a.target.exists() else set()
        has |= {"staging"} if a.staging.exists() else set()
        for object_id in self.namer.ids:
            places = (
                ("staged", a.staging / object_id / TARGET),
                ("tmp", self.site.vault / "tmp" / f"{object_id}.simg"),
                ("object", self.site.vault / "objects" / object_id[:2] / f"{object_id}.simg"),
            )
            has |= {what for what, path in places if path.exists()}
        before = self.calls[-2][2] if len(self.calls) > 1 else ""
        self.scenes.append(Scene(key, call.number, frozenset(has), before))

    def _act(self, call: Call, key: Key) -> None:
        assert self.action is not None
        a = self.adversary
        self.acted = len(self.calls) - 1
        self.where = f"call {call.number} {key[1]} {key[2]} (thread {key[0]}, {key[3]})"
        missing, damaged = a.wanted - a.existing(), len(a.damaged)
        if missing and not self.earlier:
            self.faults.append(f"before the deed {len(missing)} contents do not exist")
        try:
            self.action.act(a)
            for path, offset in a.damaged[damaged:]:
                self.too_late = self._was_read(call, path, offset)
        except VoidError:
            self.void = True
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            self.void = True
            self.where += f" [{error.filename}: {error.strerror}]"
        a.take_stock()

    def _was_read(self, call: Call, path: Path, offset: int) -> bool:
        """Whether the verifying reader of an object has passed this offset of it."""
        name = self.namer.short(os.fspath(path))
        if not name.startswith("vault/tmp/"):
            return True
        opened = [what for _, what, where, _ in self.calls[:-1] if where == name]
        if [what for what in opened if what.startswith("openat")][-1:] != ["openat"]:
            return False
        here = Path("/proc", str(call.thread))
        for fd in os.listdir(here / "fd"):
            with contextlib.suppress(OSError):
                if self.namer.short(os.readlink(here / "fd" / fd)) == name:
                    position = (here / "fdinfo" / fd).read_text().split()[1]
                    return int(position) > offset
        return True

    # -- documented limits ---------------------------------------------------------------------

    def window(self) -> str:
        """The documented limit that a loss falls under, as the trace shows it; "" for none."""
        assert self.action is not None
        if self.acted < 0:
            return ""
        if self.action.damages:
            return "an object that was changed after it was verified" if self.too_late else ""
        places = [(name, path) for _, name, path, _ in self.calls]
        mapped = self.adversary.mapping is not None and not self.leased
        if mapped and self._compares(places[: self.acted]):
            return "a mapping, without a lease: after the bytes were compared"
        unlinked = {i: path for i, (name, path) in enumerate(places) if name == "unlinkat"}
        for unlink, path in unlinked.items():
            title = self._title(path)
            synced = [i for i in range(unlink) if places[i] == ("fsync", "vault/objects/..")]
            if not title or not synced or (unlink < self.acted and self.action.prepare is None):
                continue
            # Not every loss before an unlink is excused: there has to be a comparison behind the
            # commit, and the deed behind that.
            late = range(synced[-1], min(unlink, self.acted))
            if ("newfstatat", path) in [places[i] for i in late]:
                return f"{title}: after the last comparison"
            if self.blocked and self.leased and ("F_GETLEASE", path) in [places[i] for i in late]:
                return f"{title}: an open that waited since the last look at the lease"
        return ""

    @staticmethod
    def _compares(places: list[tuple[str, str]]) -> bool:
        """Whether the target was read a second time, which is when its object is verified."""
        reading = [
            "seal" if name == "preadv2" else "verify"
            for name, path in places
            if name == "fadvise64" or (name == "preadv2" and path.endswith(TARGET))
        ]
        return re.search("seal.*verify.*seal", " ".join(reading)) is not None

    def _title(self, path: str) -> str:
        """Under which documented limit the unlinking of this file falls, if under any."""
        assert self.action is not None
        if os.path.basename(path) != os.path.basename(TARGET) and "swap" not in self.action.name:
            return ""
        if path.startswith(f"drop/{STAGING}/"):
            if self.action.group == "own":
                return "claimed, by the service's own user"
            return "" if self.leased else "claimed, without a lease"
        # Where nothing stands against it, a picture is not sealed in place.
        claimable = self.variant.moves and not self.variant.user and not self.earlier
        if claimable and self.action.group == "picture":
            return ""
        return "in place" if path.startswith("drop/") else ""

    def places(self) -> set[tuple[str, str]]:
        return {(name, where) for _, name, where, _ in self.calls}

    @property
    def leased(self) -> bool:
        return self.variant.leases and self.variant.user != "foreign"

    @property
    def blocked(self) -> bool:
        return self.went_through != self.acted


def new_adversary(site: Site, variant: Variant) -> tuple[Adversary, dict[str, bytes]]:
    pictures = {name: picture(decodes=variant.decodes) for name in (BYSTANDER, TARGET)}
    site.arrange(pictures)
    adversary = Adversary(site, variant)
    adversary.take_stock()
    return adversary, pictures


def attack(site: Site, variant: Variant, steps: Sequence[Step], spare: bytes) -> Result:
    """Do one thing at one place, or one in each of several runs, and look what comes of it."""
    a, _ = new_adversary(site, variant)
    a.spare = spare
    canary = describe(site.canary)
    result = Result()
    runs: list[Run] = []
    for deed, place in steps:
        if deed.prepare is not None:
            deed.prepare(a)
        run = Run(site, variant, deed, place, a, earlier=bool(runs))
        runs.append(run)
        disturb(run, result)
        lost_at_once = a.wanted - a.existing()
        if lost_at_once and not any(each.window() for each in runs):
            result.faults.append(f"{len(lost_at_once)} contents lost at once")
        a.close()
        a.repair()
        let_time_go_by(site)
    result.where = "; then ".join(run.where for run in runs)
    recover(a, result)
    judge(a, runs, result)
    if describe(site.canary) != canary:
        result.faults.append("something behind a link was changed")
    for path in (site.drop, *site.drop.rglob("*")):
        if not path.is_symlink() and not path.is_fifo():
            path.chmod(path.stat().st_mode | 0o700)
    return result


def disturb(run: Run, result: Result) -> None:
    """One traced run, and what was blocked in it goes on behind it."""
    a = run.adversary
    outcome, output = run.site.traced(
        ["drain"], run.decide, returned=run.returned, calls=tracer.CALLS, seconds=RUN_SECONDS
    )
    result.faults += run.faults
    if run.acted < 0 or run.void:
        result.outcome = "missed" if run.acted < 0 else "void"
    if outcome.timed_out:
        result.faults.append("the run did not end")
    # A mapped file that is cut kills whoever has it mapped.
    dies_of_it = run.action is not None and run.action.group == "state"
    if outcome.code < 0 and not outcome.timed_out and not dies_of_it:
        result.faults.append(f"killed by signal {-outcome.code}")
    check_output(result, output, "the run")
    while a.waiting:
        a.go_on()
        a.take_stock()


def check_output(result: Result, output: str, what: str) -> None:
    for sign in ("Traceback", "a defect", "Error:"):
        if sign in output:
            line = next(line for line in output.splitlines() if sign in line)
            result.faults.append(f"{what} said: {output.strip() if sign == 'Traceback' else line}")


def recover(a: Adversary, result: Result) -> None:
    """Healthy runs until nothing waits, as if time went by between them."""
    for _ in range(ROUNDS):
        let_time_go_by(a.site)
        outcome, output = a.site.traced(["drain"], calls=(), seconds=RUN_SECONDS)
        check_output(result, output, "a healthy run")
        if outcome.timed_out or outcome.code < 0 or outcome.code not in {0, 1, 75}:
            result.faults.append(f"a healthy run ended with {outcome.code}: {output.strip()}")
            return
        if outcome.code != NotReadyError.exit_code:
            return
    result.faults.append(f"still not done after {ROUNDS} healthy runs: {output.strip()}")


def let_time_go_by(site: Site) -> None:
    path = site.state / "queue.sqlite"
    if path.exists():
        with contextlib.suppress(sqlite3.DatabaseError):
            database = sqlite3.connect(path)
            with database:
                database.execute("UPDATE job SET not_before = 0")
            database.close()


def judge(a: Adversary, runs: Sequence[Run], result: Result) -> None:
    """Compare what there is in the end with the ledger."""
    site = a.site
    sealed, broken = a.sealed()
    plain = a.plain()
    existing = {*plain.values(), *sealed.values()}
    result.objects, result.contents = len(sealed), len(set(sealed.values()))
    lost = [f"{len(a.wanted - existing)} contents lost in the end"] if a.wanted - existing else []
    lost += ["a write went into a deleted file"] if a.lost_writes else []
    late = next((window for run in runs if (window := run.window())), "")
    if lost and late:
        result.windows.append(late)
        result.outcome = "window"
    else:
        result.faults += lost
    deeds = [run.action for run in runs if run.action is not None]
    if broken and not any(deed.damages or "final name" in deed.name for deed in deeds):
        result.faults.append(f"an object does not open: {broken[0]}")
    if set(sealed.values()) - a.complete:
        result.faults.append("an object holds what no file ever held")
    if any(path.read_bytes() != content for path, content in a.planted):
        result.faults.append("what lay under an object's name was overwritten")
    left = os.listdir(site.vault / "tmp")
    if left:
        result.faults.append(f"left in the vault's tmp: {left}")
    excused = late and (a.mapping_was_used or any(run.too_late for run in runs))
    for sentence in list(in_clear(a, plain, set(sealed.values()))):
        if "not sealed" in sentence and excused:
            result.windows.append(late)
            result.outcome = "window"
        else:
            result.faults.append(sentence)


# --- the campaign ------------------------------------------------------------------------------


def observe(site: Site, variant: Variant) -> list[Scene]:
    """A run that nobody disturbs: its calls, and what could be done at each."""
    a, pictures = new_adversary(site, variant)
    run = Run(site, variant, None, None, a)
    outcome, output = site.traced(
        ["drain"], run.decide, returned=run.returned, calls=tracer.CALLS, seconds=RUN_SECONDS
    )
    assert outcome.code == 0, output
    assert set(a.sealed()[0].values()) == {digest(each) for each in pictures.values()}
    return run.scenes


def spare_object(site: Site, variant: Variant) -> bytes:
    """A valid object of the site's vault that no run will make again."""
    new_adversary(site, variant)
    site.traced(["drain"], calls=())
    return next(iter(site.vault.glob("objects/??/*.simg"))).read_bytes()


def is_possible(variant: Variant) -> bool:
    return ROOT or not variant.user


DOMAINS: Final = {
    "picture": ("drop", "moved"),
    "folder": ("drop", "moved"),
    "own": ("drop", "moved"),
    "vault": ("vault",),
    "state": ("state",),
}
NEUTRAL: Final = frozenset({"close", "ioctl", "fcntl:dup", "fcntl:flags"})
"""Calls that neither see nor change what others can change."""


def is_worth(deed: Action, scene: Scene, *, full: bool) -> bool:
    if (deed.root and not ROOT) or (deed.needs and deed.needs not in scene.has):
        return False
    thread, _, path, count = scene.key
    if thread == 0 and path.startswith("state") and count > POLLS:
        return full  # the main thread, which asks whether all is done until it is
    # Calls on the queue do not look at the folder, nor calls on the vault at the queue: what is
    # done before one of these is the same as before the next that looks. The first of each
    # series is tried all the same, as another thread may look meanwhile.
    domain = DOMAINS[deed.group if deed.needs not in {"tmp", "object"} else "vault"]
    looks = path.startswith(domain) and scene.key[1] not in NEUTRAL
    return full or looks or scene.before.startswith(domain) > path.startswith(domain)


@dataclass
class Table:
    """Counts, and what went wrong."""

    rows: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)
    windows: dict[tuple[str, str, str], list[str]] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    missed: Counter[str] = field(default_factory=Counter)
    runs: int = 0

    def add(self, variant: Variant, deed: Action, key: Key, result: Result, what: str = "") -> None:
        self.runs += 1
        row = self.rows.setdefault((variant.name, deed.name), Counter())
        outcome = "violation" if result.faults else result.outcome
        row[outcome] += 1
        row["twice"] += result.objects > result.contents
        where = " ".join(result.where.split(" ")[2:])
        for window in result.windows:
            self.windows.setdefault((variant.name, deed.name, window), []).append(where)
        if result.outcome == "missed" and deed.prepare is None:
            self.missed[f"{variant.name}: {key}"] += 1
        if result.faults:
            faults = "; ".join(result.faults)
            self.violate(f"{variant.name}: {what or deed.name}: {result.where}: {faults}")

    def violate(self, line: str) -> None:
        self.violations.append(line)
        sys.stdout.write(f"VIOLATION {line}\n")
        sys.stdout.flush()

    def report(self) -> str:
        names = ("ok", "void", "missed", "window", "twice", "violation")
        line = "{:<18} {:<52}" + " {:>9}" * len(names) + "\n"
        lines = [line.format("variant", "action", *names)]
        for (variant, deed), row in self.rows.items():
            lines.append(line.format(variant, deed, *(row[name] for name in names)))
        sums = [sum(row[name] for row in self.rows.values()) for name in names]
        lines.append(line.format("all", "", *sums))
        for (variant, deed, window), places in sorted(self.windows.items()):
            title = f"documented: {variant}: {deed}: {window}"
            lines.append(f"{title}: {len(places)}, as before {places[0]}\n")
        lines += [f"not met again: {place}: {count}\n" for place, count in self.missed.items()]
        return "".join(lines)


def campaign(top: Path, options: argparse.Namespace, table: Table) -> None:
    for variant in VARIANTS:
        if options.variant and variant.name not in options.variant:
            continue
        if not is_possible(variant):
            sys.stdout.write(f"{variant.name}: skipped, it takes root\n")
            continue
        site = build(top / variant.name.replace(" ", "-"), variant)
        spare = spare_object(site, variant)
        scenes = observe(site, variant)
        deeds = [ACTIONS[name] for name in options.action or ACTIONS]
        points = [(s.key, d) for s in scenes for d in deeds if is_worth(d, s, full=options.full)]
        if options.pairs:
            try_pairs(site, variant, spare, scenes, options, table)
            continue
        every = variant.sample if options.every is None else options.every
        for key, deed in points:
            if number_of(key, deed) % every == options.part % every:
                table.add(variant, deed, key, attack_there(site, variant, deed, key, spare))
            if options.first and table.violations:
                return
        sys.stdout.write(f"{variant.name}: {len(scenes)} calls, {len(points)} points\n")
        sys.stdout.flush()


def try_pairs(
    site: Site,
    variant: Variant,
    spare: bytes,
    scenes: Sequence[Scene],
    options: argparse.Namespace,
    table: Table,
) -> None:
    """One deed at random, and in the run that deals with what came of it another one."""
    rng = random.Random(f"{options.seed} {variant.name}")
    deeds = [ACTIONS[name] for name in options.action or ACTIONS]
    points = [(d, s.key) for s in scenes for d in deeds if is_worth(d, s, full=False)]
    others = [d for d in ACTIONS.values() if d.prepare is None and (ROOT or not d.root)]
    for _ in range(options.pairs):
        first, key = rng.choice(points)
        second = rng.choice(others), rng.randrange(1, len(scenes))
        result = attack(site, variant, [(first, key), second], spare)
        table.add(variant, first, key, result, f"{first.name}, then {second[0].name}")
    sys.stdout.write(f"{variant.name}: {options.pairs} pairs\n")
    sys.stdout.flush()


def number_of(key: Key, deed: Action, seed: int = 0) -> int:
    """Any number, and the same one each time, to choose by."""
    return zlib.crc32(f"{seed} {key} {deed.name}".encode())


def attack_there(site: Site, variant: Variant, deed: Action, key: Key, spare: bytes) -> Result:
    """`attack`, again where the run did not come to that place."""
    for _ in range(ATTEMPTS):
        result = attack(site, variant, [(deed, key)], spare)
        if result.outcome != "missed" or result.faults or deed.prepare:
            break
    return result


def try_slice(top: Path, options: argparse.Namespace, table: Table) -> None:
    """A few points of two variants, all at the calls that matter most."""
    sites = {}
    for name in ("leased", "in place unleased"):
        variant = next(each for each in VARIANTS if each.name == name)
        site = build(top / name.replace(" ", "-"), variant)
        spare = spare_object(site, variant)
        sites[name] = site, variant, spare
        points = [
            (number_of(scene.key, deed, options.seed), scene.key, deed)
            for scene in observe(site, variant)
            for deed in ACTIONS.values()
            if deed.group in {"picture", "own"} and scene.key[1] in TURNING_POINTS
            if "state" not in scene.key[2] and is_worth(deed, scene, full=False)
        ]
        for _, key, deed in sorted(points, key=lambda point: point[0])[:SLICE]:
            table.add(variant, deed, key, attack(site, variant, [(deed, key)], spare))
    check_itself(sites, table)


@dataclass(frozen=True)
class Sabotage:
    """A guard that is taken out of the service, and a deed that has to be found out then."""

    module: object
    name: str
    put: object
    variant: str
    deed: str
    call: tuple[str, str]


def unverified(staged: Staged, **_options: object) -> Verified:
    return Verified(staged)


def overwriting(source: str, target: str, *, source_dir: int, target_dir: int) -> None:
    os.replace(source, target, src_dir_fd=source_dir, dst_dir_fd=target_dir)


SABOTAGES: Final = (
    Sabotage(
        *(erase, "_refuse_if_swapped", lambda _claimed: None),
        *("in place unleased", "replace", ("openat", "vault/objects/..")),
    ),
    Sabotage(
        *(erase, "_refuse_if_swapped", lambda _claimed: None),
        *("in place unleased", "append", ("renameat2", "vault/tmp/<2>.simg")),
    ),
    Sabotage(
        *(pipeline, "verify", unverified),
        *("leased", "temporary object cut", ("fsync", "vault/tmp/<2>.simg")),
    ),
    Sabotage(
        *(kernel, "rename_noreplace", overwriting),
        *("leased", "garbage under the final name", ("fsync", "vault/tmp/<2>.simg")),
    ),
    Sabotage(
        *(verify, "_compare", lambda *_pieces: None),
        *("in place unleased", "store through a mapping", ("fsync", "vault/tmp/<2>.simg")),
    ),
)


def check_itself(sites: dict[str, tuple[Site, Variant, bytes]], table: Table) -> None:
    """Take guards out of the service, one at a time: the ledger has to show it."""
    for each in SABOTAGES:
        site, variant, spare = sites[each.variant]
        keys = [s.key for s in observe(site, variant) if s.key[1:3] == each.call]
        with mock.patch.object(each.module, each.name, each.put):
            deed = ACTIONS[each.deed]
            results = [attack_there(site, variant, deed, key, spare) for key in keys]
        if not any(result.faults for result in results):
            table.violate(f"not found: {each.deed} without {each.name}")


TURNING_POINTS: Final = frozenset(
    {"FSETLEASE", "F_GETLEASE", "renameat", "renameat2", "unlinkat", "openat:create", "read"}
    | {"newfstatat", "fadvise64", "preadv2", "mkdirat", "fsync"}
)
SLICE: Final = 16  # runs of each variant


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--slice", action="store_true", help="a few seconds of it")
    parser.add_argument("--variant", action="append", help="only this one; may be repeated")
    parser.add_argument("--action", action="append", help="only this one; may be repeated")
    parser.add_argument("--every", type=int, help="only each n-th point")
    parser.add_argument("--part", type=int, default=0, help="and which of the n parts")
    parser.add_argument("--pairs", type=int, default=0, help="so many, in two runs, at random")
    parser.add_argument("--full", action="store_true", help="each call on the queue, too")
    parser.add_argument("--first", action="store_true", help="no more after the first violation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, help="where to work; default: in memory")
    return parser.parse_args()


def main() -> int:
    options = parse()
    seal.PIECE = PIECE  # type: ignore[misc]
    if not ROOT:
        kernel.protect_memory = lambda: None  # what its calls are about is read there
    settle.QUIET_LOCAL = 0.0  # type: ignore[misc]  # as if that time had gone by
    started = time.monotonic()
    table = Table()
    with scratch() as top:
        try:
            (try_slice if options.slice else campaign)(options.dir or top, options, table)
        except NotReadyError as error:
            sys.stdout.write(f"{error}\n")
            return error.exit_code
    sys.stdout.write(table.report())
    elapsed = time.monotonic() - started
    sys.stdout.write(f"{table.runs} runs, {len(table.violations)} violations, {elapsed:.0f} s\n")
    if not table.runs:
        return 2
    return 1 if table.violations else 0


if __name__ == "__main__":
    sys.exit(main())
