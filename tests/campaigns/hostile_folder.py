"""A folder whose other users mean harm: nothing outside it is touched, nothing in it is lost.

``python tests/campaigns/hostile_folder.py --seconds 600 [--attack NAME]``
``python tests/campaigns/hostile_folder.py --every 1 [--stage NAME]``

An honest producer brings pictures, and an adversary who may do as it likes in the same folder
goes after whatever the service does by name: sub-folders and files change places with links,
directories, FIFOs and hard links, the staging directory is moved away, taken down and planted.
As root there are two users, and the adversary is neither the service's nor the producer's. The
service runs as root, as one who owns none of the files, or as the only user there is.

With ``--every`` nothing is left to chance: a tracer stops a `drain` at each n-th call that is
about the folder, and there one directory on a picture's way changes places with a link.

Beside and above the folder lies a tree of canaries: files under the very names that the links
lead to. Owner, mode, inode, times, content and, where the mount keeps it, the time of the last
reading must be what they were, and no object may hold what is in one. Every honest picture must
end in the vault, and what is left in clear must be shown, with its reason. The exit code is 1 on
anything else.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import random
import secrets
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the tests' helpers lie

import daemon
from daemon import LINUX, ROOT, STAGING, Site, files_below, picture
from rig import Rig, scratch

from secimg_watch.errors import NotReadyError
from secimg_watch.keys import provider_for
from secimg_watch.quantities import Reserve
from secimg_watch.seal import open_object
from secimg_watch.vault import Vault

if TYPE_CHECKING:
    from collections.abc import Iterator

    from secimg_watch import tracer

ADVERSARY: Final = 65_533
NOBODY: Final = 65_534
SUBS: Final = 3
NAMES: Final = 6
_EXCHANGE: Final = 2  # RENAME_EXCHANGE
_HERE: Final = -100  # AT_FDCWD
_DIRECTORY: Final[int] = getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)
_BURST: Final = 0.05  # seconds that one attack is kept up
# Read number by number, it is in the inspector's hands for some 30 ms.
_SLOW: Final = b"P2 300 300 9\n" + b"1 " * 90_000
_RETRIED: Final = (0.5, 6.0)  # seconds in which a claim that went wrong is tried again
_PATIENCE: Final = 30.0  # seconds without any progress once the adversary rests
_SCAN, _RETRY = 15, 40  # tenths of a second in which nothing is under way


# -- canaries ------------------------------------------------------------------------------------


def keeps_reading_times(directory: Path) -> bool:
    """Whether a file's last reading can be told by its time of access."""
    probe = directory / "read me"
    probe.write_bytes(b"x")
    os.utime(probe, ns=(0, time.time_ns()))
    probe.read_bytes()
    told = probe.stat().st_atime_ns != 0
    probe.unlink()
    return told


class Canaries:
    """Files and directories that are nobody's business, and how they were in the beginning."""

    def __init__(self, top: Path) -> None:
        """Plant them in ``top/outside``, and beside and above ``top/drop``."""
        self._top = top
        self.contents: set[bytes] = set()
        self.outside = top / "outside"
        folders = [f"s{n}{deeper}" for n in range(SUBS) for deeper in ("", "/d", "/d/e")]
        for folder in (*folders, "a", "a/deep", "hard", "empty", "a/empty"):
            (self.outside / folder).mkdir(parents=True, exist_ok=True)
        # Under the names of everything that the adversary has links for.
        self._files = [top / "above.jpg", top / "drop.jpg", self.outside / "pic.jpg"]
        self._files += [self.outside / f / f"{n}.jpg" for f in folders for n in range(4)]
        self._files += [self.outside / f / "pic.jpg" for f in ("a", "a/deep", "s0", "s0/d")]
        self._files += [self.outside / "hard" / f"{n}.jpg" for n in range(NAMES)]
        for path in self._files:
            content = picture()
            self.contents.add(content)
            path.write_bytes(content)
        self._tell_reading = keeps_reading_times(top)
        self._before: dict[str, dict[str, object]] = {}

    def remember(self) -> None:
        """From now on nothing may change; hard links to canaries exist already."""
        for path in self._files:
            # Older than its last change: the next reading sets it also with "relatime".
            os.utime(path, ns=(0, path.stat().st_mtime_ns))
        self._before = self._look()

    def changes(self) -> list[str]:
        """What is not as it was."""
        now = self._look()
        found = []
        for name in sorted(self._before.keys() | now.keys()):
            before, after = self._before.get(name, {}), now.get(name, {})
            other = {
                what for what in before.keys() | after.keys() if before.get(what) != after.get(what)
            }
            found += [f"canary {name} has another {', '.join(sorted(other))}"] * bool(other)
        return found

    def _look(self) -> dict[str, dict[str, object]]:
        there = [*self._files, *self.outside.rglob("*"), self.outside]
        return {
            str(path.relative_to(self._top)): self._facts(path)
            for path in there
            if os.path.lexists(path)
        }

    def _facts(self, path: Path) -> dict[str, object]:
        status = path.lstat()
        facts: dict[str, object] = {
            "mode": status.st_mode,
            "owner": (status.st_uid, status.st_gid),
            "inode": status.st_ino,
            "size": status.st_size,
            "time of modification": status.st_mtime_ns,
        }
        if path.parent.name != "hard":  # whoever moves a hard link in the folder changes these
            facts["time of change"] = status.st_ctime_ns
            facts["number of names"] = status.st_nlink
        if path.is_dir():
            return {**facts, "list of names": sorted(os.listdir(path))}
        if self._tell_reading:
            facts["time of reading"] = status.st_atime_ns
        return {**facts, "content": _digest(path)}


def _digest(path: Path) -> str:
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOATIME", 0))
    with os.fdopen(fd, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- the adversary -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trap:
    """A directory that was claimed for a picture, the one in it, and the link for that."""

    outer: int
    inner: int
    link: str
    laid: float


def _create(parent: int, name: str, size: int, content: bytes = b"") -> None:
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=parent)
    os.write(fd, b"\xff\xd8\xff\xe0" + os.urandom(size) if size else content)
    os.close(fd)


def exchange(one: str, other: str, parent: int = _HERE, second: int = _HERE) -> None:
    """Let two names change places, in one step."""
    names = os.fsencode(one), os.fsencode(other)
    flags = ctypes.c_uint(_EXCHANGE)
    if ctypes.CDLL(None, use_errno=True).renameat2(parent, names[0], second, names[1], flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), one)


class Adversary:
    """Another user of the folder. All goes by descriptors: it may not enter what is above."""

    def __init__(self, drop: int, lair: int, outside: str, dice: random.Random) -> None:
        """``lair``: a directory of its own on the same file system."""
        self._drop = drop
        self._lair = lair
        self._outside = outside
        self._dice = dice
        self._subs = [os.open(f"s{n}", _DIRECTORY, dir_fd=drop) for n in range(SUBS)]
        self._inner = [os.open("d", _DIRECTORY, dir_fd=sub) for sub in self._subs]
        self._traps: list[Trap] = []
        self.strikes: Counter[str] = Counter()

    def strike(self, attack: str) -> None:
        """Keep one attack up for a moment."""
        end = time.monotonic() + _BURST
        while time.monotonic() < end:
            with contextlib.suppress(OSError):  # the service, or an earlier attack, was faster
                getattr(self, attack)()
                self.strikes[attack] += 1
            if self._dice.random() < 0.3:
                time.sleep(self._dice.uniform(0, 0.0005))

    def _exchange(self, parent: int, one: str, other: str, second: int | None = None) -> None:
        exchange(one, other, parent, parent if second is None else second)

    def _write(self, parent: int, name: str) -> None:
        part = f"{secrets.token_hex(8)}.part"
        _create(parent, part, self._dice.choice((500, 200_000)))
        os.rename(part, name, src_dir_fd=parent, dst_dir_fd=parent)

    # -- attacks, by the name that the command line knows them by --------------------------------

    def parents(self) -> None:
        """A sub-folder, or one inside it, and a link to the canaries change places."""
        number = self._dice.randrange(SUBS)
        if self._dice.random() < 0.5:
            self._exchange(self._drop, f"s{number}", f"l{number}")
        elif self._dice.random() < 0.5:
            self._exchange(self._subs[number], "d", "k")
        else:
            self._exchange(self._inner[number], "e", "k")

    def names(self) -> None:
        """Files, links, hard links, FIFOs and directories change places."""
        kinds = [f"{kind}{n}.jpg" for kind in ("n", "link", "hard", "pipe", "tree") for n in "012"]
        one, other = self._dice.sample(kinds, 2)
        for name in (one, other):
            try:
                os.stat(name, dir_fd=self._drop, follow_symlinks=False)
            except FileNotFoundError:  # sealed by now
                self._write(self._drop, name)
        self._exchange(self._drop, one, other)

    def claims(self) -> None:
        """What is about to be claimed becomes a directory that the adversary holds open.

        Once that lies in the staging directory, what is in it changes places with a link.
        """
        if self._dice.random() < 0.02:
            self._lay_trap()
        now = time.monotonic()
        for trap in [each for each in self._traps if _RETRIED[0] < now - each.laid < _RETRIED[1]]:
            # Between a look and the opening that follows are some 10 microseconds.
            for _ in range(201):
                self._exchange(trap.outer, "a", trap.link, self._lair)
            with contextlib.suppress(FileExistsError):
                _create(trap.inner, "pic.jpg", 900)

    def _lay_trap(self) -> None:
        bait, tree, link = (
            f"{kind}{secrets.token_hex(4)}.jpg" for kind in ("bait", "tree", "link")
        )
        os.mkdir(tree, 0o755, dir_fd=self._drop)
        outer = os.open(tree, _DIRECTORY, dir_fd=self._drop)
        os.mkdir("a", 0o755, dir_fd=outer)
        inner = os.open("a", _DIRECTORY, dir_fd=outer)
        _create(inner, "pic.jpg", 900)
        os.symlink(f"{self._outside}/a", link, dir_fd=self._lair)
        _create(self._drop, f"{bait}.part", 0, _SLOW)
        os.rename(f"{bait}.part", bait, src_dir_fd=self._drop, dst_dir_fd=self._drop)
        self._await_reader(bait)
        self._exchange(self._drop, bait, tree)
        # Whoever finds a stranger in hand wants to give it back under its name: that is taken.
        end = time.monotonic() + 0.05
        while time.monotonic() < end:
            with contextlib.suppress(FileExistsError):
                _create(self._drop, bait, 0)
                self._traps.append(Trap(outer, inner, link, time.monotonic()))
                self.strikes["smuggled"] += 1
                return
        os.close(outer)
        os.close(inner)

    def _await_reader(self, name: str) -> None:
        # Whoever decodes a picture has it in hand, and has not claimed it yet.
        before = os.stat(name, dir_fd=self._drop).st_atime_ns
        end = time.monotonic() + 2.0
        while time.monotonic() < end:
            if os.stat(name, dir_fd=self._drop).st_atime_ns != before:
                return

    def staging(self) -> None:
        """The staging directory is moved away, taken down, or planted."""
        drop, aside = self._drop, f"aside{self._dice.randrange(3)}"
        match self._dice.randrange(6):
            case 0:
                os.rmdir(STAGING, dir_fd=drop)
            case 1:
                os.rename(STAGING, aside, src_dir_fd=drop, dst_dir_fd=drop)
            case 2:
                os.rename(aside, STAGING, src_dir_fd=drop, dst_dir_fd=drop)
            case 3:
                os.symlink(self._outside, STAGING, dir_fd=drop)
            case 4:
                os.mkdir(STAGING, 0o777, dir_fd=drop)
            case _:
                os.unlink(STAGING, dir_fd=drop)
        time.sleep(self._dice.uniform(0, 0.02))


ATTACKS: Final = ("parents", "names", "claims", "staging")

_CHILD: Final = "import json, sys, hostile_folder; hostile_folder.besiege(json.loads(sys.argv[1]))"


def besiege(order: dict[str, Any]) -> None:
    """Be the adversary, in a process of its own, until the time is over; tell what was done."""
    dice = random.Random(order["seed"])
    drop: int = order["drop"]
    if sys.platform == "linux" and order["user"] is not None:
        os.setgroups([])
        os.setgid(order["user"])
        os.setuid(order["user"])
    adversary = Adversary(drop, order["lair"], order["outside"], dice)
    end = time.monotonic() + order["seconds"]
    while time.monotonic() < end:
        adversary.strike(dice.choice(order["attacks"]))
    sys.stdout.write(json.dumps(adversary.strikes))


# -- the siege -----------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What came of a siege. ``faults`` should stay empty."""

    faults: list[str] = field(default_factory=list)
    honest: int = 0
    objects: int = 0
    strikes: Counter[str] = field(default_factory=Counter)
    log: list[str] = field(default_factory=list)


class Arena:
    """A folder that everybody may write to, canaries around it, and a service that watches it."""

    def __init__(
        self, top: Path, *, user: int | None = None, mode: int = 0o777, inspected: bool = True
    ) -> None:
        """Lay it out.

        Args:
            top: for another user than who asks, all must be able to pass through it.
            user: whom the service runs as, where that is not who asks.
            mode: the folder's.
            inspected: whether a decoder looks at each file, which keeps it in hand for longer.
        """
        self.site = Site(top)
        self.canaries = Canaries(top)
        self.lair = top / "lair"
        self.lair.mkdir()
        self.honest: dict[bytes, str] = {}
        self._user = user
        self.site.drop.chmod(mode)
        # Failing twice for somebody else's doing would leave an honest picture in clear.
        self.site.policy["limits"] = {"attempts": 2}
        self.site.policy["workers"] = 3
        self.site.folder.update(
            rescan="1s", not_image="encrypt", undecodable="encrypt", proof="quiet"
        )
        self.site.folder["preview"] = 64 if inspected else 0
        self._furnish(mode)
        self.canaries.remember()

    def _furnish(self, mode: int) -> None:
        drop, outside = self.site.drop, self.canaries.outside
        for number in range(SUBS):
            deepest = drop / f"s{number}" / "d" / "e"
            deepest.mkdir(parents=True)
            (drop / f"l{number}").symlink_to(outside / f"s{number}")
            (drop / f"s{number}" / "k").symlink_to(outside / f"s{number}" / "d")
            (drop / f"s{number}" / "d" / "k").symlink_to(outside / f"s{number}" / "d" / "e")
        for number in range(3):
            (drop / f"link{number}.jpg").symlink_to(outside / "pic.jpg")
            (drop / f"hard{number}.jpg").hardlink_to(outside / "hard" / f"{number}.jpg")
            subprocess.run(["mkfifo", drop / f"pipe{number}.jpg"], check=True)
            (drop / f"tree{number}.jpg").mkdir()
            (drop / f"tree{number}.jpg" / "link.jpg").symlink_to(outside / "pic.jpg")
        for path in (self.lair, *drop.rglob("*")):
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode):
                path.chmod(mode)
            if ROOT and (status.st_nlink == 1 or stat.S_ISDIR(status.st_mode)):
                # The adversary's, so that nothing but its ideas limits it.
                give(path, ADVERSARY)

    @contextlib.contextmanager
    def service(self) -> Iterator[daemon.Daemon]:
        """Run the service, and end it."""
        self.site.make_vaults()
        self.site.state.mkdir(mode=0o700, exist_ok=True)
        if self._user is not None:
            self._give_to(self._user)
        with as_user(self._user):
            running = self.site.launch()
        try:
            running.wait_for_notice("READY=1")
            yield running
            if running.is_running():
                assert running.stop() == 0, running.log()
        finally:
            running.close()
            if self._user is not None:
                self._give_to(0)  # a key of another user is refused

    def _give_to(self, user: int) -> None:
        for owned in (self.site.vault, self.site.state, self.site.key):
            for path in (owned, *owned.rglob("*")):
                give(path, user)

    def bring(self, parents: dict[str, int], number: int) -> None:
        """Be the honest producer of one picture, who is where the adversary is, too."""
        where = random.choice(list(parents))
        content, name = picture(), f"{number % 4}.jpg" if number < 4 * len(parents) else ""
        name = name or f"honest {number}.jpg"
        part = f"{name}.part"
        fd = os.open(part, os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=parents[where])
        os.write(fd, content)
        os.close(fd)
        with contextlib.suppress(FileExistsError):
            os.link(part, name, src_dir_fd=parents[where], dst_dir_fd=parents[where])
            self.honest[content] = f"{where}/{name}"
        os.unlink(part, dir_fd=parents[where])

    def parents(self) -> dict[str, int]:
        """The sub-folders, held open: their names lead elsewhere soon."""
        drop = self.site.drop
        below = [f"s{n}{deeper}" for n in range(SUBS) for deeper in ("", "/d", "/d/e")]
        return {name: os.open(drop / name, _DIRECTORY) for name in ("", *below)}

    def still_in_clear(self) -> dict[Path, str]:
        """Where honest pictures lie in the folder yet, and what they were."""
        left = {}
        for path in files_below(self.site.drop).values():
            with contextlib.suppress(OSError):
                status = path.lstat()
                # A hard link to a canary is not to be read here either.
                if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
                    name = self.honest.get(path.read_bytes())
                    left.update({} if name is None else {path: name})
        return left

    def wait_until_done(self) -> None:
        """Wait until no honest picture lies in clear, or until nothing more is going to happen."""
        end, quiet, fewest = time.monotonic() + _PATIENCE, 0, sys.maxsize
        # Every scan, and every retry where it makes a difference, has come by then.
        while quiet < (_RETRY if (left := len(self.still_in_clear())) else _SCAN):
            if left < fewest:
                fewest, end = left, time.monotonic() + _PATIENCE
            if time.monotonic() > end:
                return
            now = self.site.status()
            busy = now.get("queued") or now.get("waiting", 0) > now.get("unready", 0)
            quiet = 0 if busy else quiet + 1
            time.sleep(0.1)

    def verdict(self) -> Iterator[str]:
        """Everything that is not as promised."""
        yield from self.canaries.changes()
        sealed = self.sealed()
        if sealed & self.canaries.contents:
            yield "an object holds what is in a canary"
        in_clear = self.still_in_clear()
        for path, name in in_clear.items():
            answer = self.site.why(path)
            # Sealed, and shown as what the system does not let go: that is all there is to do.
            if answer["verdict"] != "undeletable" or self._user is None:
                yield f"in clear: {name}: {answer}"
        lost = self.honest.keys() - sealed
        yield from (f"lost, or in clear: {self.honest[each]}" for each in lost)
        yield from self.unexplained()

    def sealed(self) -> set[bytes]:
        """What is in the objects; no restore, which would meet folders with names of files."""
        vault = Vault(self.site.vault, Reserve(0.0, 0))
        ring = provider_for("file", "hostile/folder", file=self.site.key).load_ring()
        found = set()
        for object_id in vault.object_ids():
            with vault.object_path(object_id).open("rb") as stream:
                opened = open_object(stream, ring, expect=object_id)
                opened.preview()
                found.add(b"".join(map(bytes, opened.body())))
        return found

    def unexplained(self) -> Iterator[str]:
        """What lies in clear, and neither ``why`` nor the queue knows a reason."""
        known = {row["object"] for row in self.site.ask("jobs", "list")}
        for name, path in files_below(self.site.drop).items():
            if name.startswith(f"{STAGING}/".encode()):
                if not known & set(os.fsdecode(name).split("/")):
                    yield f"nobody knows of {path}"
                continue
            with contextlib.suppress(FileNotFoundError):
                empty = not path.lstat().st_size
                answer = self.site.why(path)
                silent = {"absent", "outside", "sealed"} | (set() if empty else {"settling"})
                if answer["verdict"] in silent or not answer["reason"]:
                    yield f"{path}: {answer}"


def give(path: Path, user: int) -> None:
    """Make a file another user's; a link itself, and not what it leads to."""
    if sys.platform != "win32":
        os.chown(path, user, user, follow_symlinks=False)


@contextlib.contextmanager
def as_user(user: int | None) -> Iterator[None]:
    """Whatever is launched here runs as another user."""
    before = daemon._TIED
    if user is not None:
        ids = ("--reuid", str(user), "--regid", str(user), "--clear-groups")
        vars(daemon).update(_TIED=("setpriv", *ids, "--pdeathsig", "KILL"))
    try:
        yield
    finally:
        vars(daemon).update(_TIED=before)


def why_not_as(user: int) -> str:
    """Why the service cannot be run as this user; "" where it can."""
    if not ROOT:
        return "only root can run it as somebody else"
    if shutil.which("setpriv") is None:
        return "needs the program setpriv"
    ids = ["setpriv", "--reuid", str(user), "--regid", str(user), "--clear-groups"]
    done = subprocess.run(
        [*ids, sys.executable, "-m", "secimg_watch", "--version"], capture_output=True, check=False
    )
    return "that user may not read this checkout" if done.returncode else ""


def why_no_exchange(directory: Path) -> str:
    """Why two names cannot change places here; "" where they can."""
    if not LINUX:
        return "renameat2 is Linux's"
    with tempfile.TemporaryDirectory(dir=directory) as name:
        one, other = (Path(name, each) for each in ("one", "other"))
        one.touch()
        other.touch()
        try:
            exchange(str(one), str(other))
        except AttributeError:
            return "this C library has no renameat2"
        except OSError as error:
            return f"this file system exchanges no names: {error.strerror}"
    return ""


def siege(arena: Arena, attacks: tuple[str, ...], seconds: float, seed: int) -> Outcome:
    """Let producer, adversary and service loose on one folder, and judge what came of it."""
    outcome = Outcome()
    parents = arena.parents()
    drop = parents[""]
    lair = os.open(arena.lair, _DIRECTORY)
    order = {
        "seed": seed,
        "drop": drop,
        "lair": lair,
        "outside": str(arena.canaries.outside),
        "user": ADVERSARY if ROOT else None,
        "seconds": seconds,
        "attacks": attacks,
    }
    command = [sys.executable, "-c", _CHILD, json.dumps(order)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    with arena.service() as running:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, pass_fds=[drop, lair], env=environ, text=True
        ) as adversary:
            number = 0
            while adversary.poll() is None:
                with contextlib.suppress(FileNotFoundError):
                    arena.bring(parents, number)
                number += 1
                time.sleep(0.02)
            assert adversary.stdout is not None
            outcome.strikes.update(json.loads(adversary.stdout.read() or "{}"))
        if adversary.returncode:
            outcome.faults.append(f"the adversary ended with {adversary.returncode}")
        arena.wait_until_done()
        health = arena.site.status()
        if health["health"] not in {"ok", "degraded"}:
            outcome.faults.append(f"the folder is {health['health']}: {health['reason']}")
    outcome.log = running.log().splitlines()
    for fd in (lair, *parents.values()):
        os.close(fd)
    outcome.faults += arena.verdict()
    outcome.honest, outcome.objects = len(arena.honest), len(arena.site.objects())
    return outcome


# -- call by call --------------------------------------------------------------------------------

_ID: Final = "0123456789abcdef" * 2
_OF_PATHS: Final = frozenset(
    {"openat", "newfstatat", "statx", "mkdirat", "unlinkat", "renameat", "renameat2", "linkat"}
    | {"open", "stat", "lstat", "mkdir", "rmdir", "unlink", "rename", "link", "getdents64"}
)


@dataclass(frozen=True)
class Stage:
    """One directory on a picture's way, and what makes a picture go that way."""

    name: str
    swapped: str  # relative to the top
    inner: str  # the picture below it
    folder: dict[str, Any] = field(default_factory=dict)


STAGES: Final = (
    Stage("sub-folder", "drop/s", "d/1.jpg"),
    Stage("folder in a sub-folder", "drop/s/d", "1.jpg"),
    Stage("claimed directory", f"drop/{STAGING}/{_ID}/x.jpg/s", "d/1.jpg"),
    Stage("claim", f"drop/{STAGING}/{_ID}", "1.jpg"),
    Stage("quarantine", f"drop/{STAGING}/quarantine", f"{_ID}/1.jpg", {"not_image": "quarantine"}),
    Stage("move target", "moved/s", "", {"after": "move:moved"}),
)


def swap_at_every_call(top: Path, stage: Stage, every: int, start: int) -> Iterator[str]:
    """What is wrong after each run in which a directory changed places with a link.

    Raises:
        NotReadyError: the system does not allow tracing here.
    """
    policy = {
        key: value.replace("moved", str(top / "moved")) for key, value in stage.folder.items()
    }
    rig = Rig(top, folder=policy, policy={"limits": {"attempts": 1}})
    rig.build()
    canaries = Canaries(top)
    canaries.remember()
    at, reached = start, True
    while reached:
        honest = {"honest.jpg": picture(), "s/honest.jpg": picture(), "note.txt": b"no picture"}
        rig.reset(honest)
        _lay_out(rig, stage, canaries)
        reached, faults = _swap_at(rig, stage, canaries, at)
        faults += canaries.changes()
        contents = set(rig.sealed().values())
        faults += ["an object holds what is in a canary"] * bool(contents & canaries.contents)
        faults += [f"lost: {name}" for name in rig.lost(honest)]
        # What a link keeps from being moved on stays, sealed, with the reason.
        shown = set(honest.values()) & contents if "after" in stage.folder else set()
        in_clear = set(rig.plaintexts().values()) - {honest["note.txt"]} - shown
        faults += [f"in clear: {name}" for name, each in honest.items() if each in in_clear]
        yield from (f"call {at}: {fault}" for fault in faults)
        at += every


def _lay_out(rig: Rig, stage: Stage, canaries: Canaries) -> None:
    shutil.rmtree(rig.top / "moved", ignore_errors=True)
    (rig.top / "moved").mkdir()
    swapped = rig.top / stage.swapped
    (swapped / stage.inner).parent.mkdir(parents=True, exist_ok=True)
    swapped.mkdir(exist_ok=True)
    if stage.inner:
        (swapped / stage.inner).write_bytes(picture())
    if STAGING in stage.swapped:
        (rig.drop / STAGING).chmod(0o700)
    link = rig.top / "link"
    if os.path.lexists(link):
        link.unlink() if link.is_symlink() else shutil.rmtree(link)
    link.symlink_to(canaries.outside / "s0")


def _swap_at(rig: Rig, stage: Stage, canaries: Canaries, at: int) -> tuple[bool, list[str]]:
    count = 0
    places = tuple(os.fsencode(rig.top / name) for name in ("drop", "moved"))

    def decide(call: tracer.Call) -> tracer.Decision:
        nonlocal count
        if _path_of(call).startswith(places):
            count += 1
            if count == at:
                with contextlib.suppress(OSError):  # it is gone by now
                    exchange(str(rig.top / stage.swapped), str(rig.top / "link"))
        return None

    outcome, output = rig.traced(["drain"], decide, calls=_OF_PATHS)
    if count >= at:
        rig.run_here("drain")  # what the next start makes of it
        if not (rig.top / "link").is_symlink():
            with contextlib.suppress(OSError):
                exchange(str(rig.top / stage.swapped), str(rig.top / "link"))
        rig.run_here("drain")
    return count >= at, [output] * ("Traceback" in output or outcome.timed_out)


def _path_of(call: tracer.Call) -> bytes:
    try:
        if call.name == "getdents64":
            return os.readlink(b"/proc/%d/fd/%d" % (call.thread, call.args[0] & 0xFFFFFFFF))
        if not call.name.endswith(("at", "at2", "statx")) or call.name in {"stat", "lstat"}:
            return call.text(0)
        name = call.text(1) if call.args[1] else b""
        if name.startswith(b"/"):
            return name
        parent = os.readlink(b"/proc/%d/fd/%d" % (call.thread, call.args[0] & 0xFFFFFFFF))
    except OSError:
        return b""
    return os.path.join(parent, name)


@contextlib.contextmanager
def ground() -> Iterator[Path]:
    """A directory that every user may pass through."""
    with tempfile.TemporaryDirectory(prefix="hostile-") as name:
        os.chmod(name, 0o711)
        yield Path(name)


def call_by_call(every: int, seed: int, only: str | None) -> int:
    """Swap at each n-th call, and say what came of it."""
    dice, failed = random.Random(seed), False
    for stage in STAGES:
        if only not in {None, stage.name}:
            continue
        try:
            with scratch() as top:
                faults = list(swap_at_every_call(top, stage, every, 1 + dice.randrange(every)))
        except NotReadyError as error:
            sys.stdout.write(f"{error}\n")
            return NotReadyError.exit_code
        sys.stdout.write(f"{stage.name}: {len(faults)} faults\n")
        sys.stdout.write("".join(f"  {fault}\n" for fault in faults[:20]))
        sys.stdout.flush()
        failed |= bool(faults)
    return int(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=60, help="time for all rounds together")
    parser.add_argument("--round", type=float, default=5.0, help="time of one adversary")
    parser.add_argument("--attack", choices=ATTACKS, help="only this one")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--every", type=int, help="go call by call instead, and try each n-th")
    parser.add_argument("--stage", choices=[s.name for s in STAGES], help="only this one")
    given = parser.parse_args()
    if reason := why_no_exchange(Path(tempfile.gettempdir())):
        sys.stderr.write(f"{reason}\n")
        return 1
    if given.every:
        return call_by_call(given.every, given.seed, given.stage)
    users: list[int | None] = [None, *([] if why_not_as(NOBODY) else [NOBODY])]
    end, seed, failed = time.monotonic() + given.seconds, given.seed, False
    while time.monotonic() < end:
        attacks = (given.attack,) if given.attack else ATTACKS
        user, mode = users[seed % len(users)], (0o777, 0o1777)[seed // 2 % 2]
        with ground() as top:
            outcome = siege(Arena(top, user=user, mode=mode), attacks, given.round, seed)
        who = "this user" if user is None else f"user {user}"
        sys.stdout.write(
            f"seed {seed}, service as {who}, folder {mode:o}: {outcome.honest} honest pictures,"
            f" {outcome.objects} objects, {outcome.strikes.total()} strikes"
            f" {dict(outcome.strikes)}: {len(outcome.faults)} faults\n"
        )
        for fault in outcome.faults[:20]:
            sys.stdout.write(f"  {fault}\n")
        sys.stdout.write(
            "".join(f"  log: {line}\n" for line in outcome.log[-60:] if outcome.faults)
        )
        sys.stdout.flush()
        failed |= bool(outcome.faults)
        seed += 1
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
