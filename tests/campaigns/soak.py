"""A long life of the real service, at the end of which every picture is accounted for.

``python tests/campaigns/soak.py [--minutes 5 | --hours H] [--dir DIR] [--seed N]``

Producers write into folders of different policies in every way that producers have, while the
service is killed, stopped, reloaded, starved of disk space, frozen until the kernel's event queue
overflows, and lied to about the time. The first half has all of that. The second half is one life
of the service without kills, with calm phases between, after which its memory and its descriptors
are counted.

Then comes the ledger. Whatever a producer wrote whole under a final name was recorded when that
was done, with its digest. In the end each is sealed, which only a restore of the same bytes
proves, or kept, left, quarantined or pending for a reason, or its producer took it away itself
and can show it. What is left over is a violation, and the exit code is 1.

How a producer can show it: when it renames over an old file it holds that by its path alone, and
looks at its link count right afterwards. Had the service claimed the file in time, one link would
be left. What it opens again, or unlinks, is still there by the fact that it succeeds.

The seed fixes what producers and disturbances want to do. Threads and the disk decide when.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Final, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the tests' own helpers lie

from click.testing import CliRunner
from daemon import ROOT, STAGING, Daemon, Site
from PIL import Image

from secimg_watch import kernel
from secimg_watch.cli import cli
from secimg_watch.names import display

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

assert sys.platform == "linux", "the service is Linux's, and so is this campaign"

MARK: Final = "q7z"
"""In every name that is given here, so that a name that got into a log can be found there."""

PRODUCERS: Final = 6
RATE: Final = 8.0  # files in a second, all producers together
RESTING: Final = 25  # files that each producer leaves lying in a folder that keeps or leaves them
CALM: Final = 120.0  # seconds that the service may take to finish when nothing arrives any more
NUDGE: Final = 45.0  # seconds after which a calm phase asks for a scan; longer than any rescan
GRACE: Final = 75.0  # seconds that an empty file may wait, and some more
GROWTH: Final = (1.25, 8 * 2**20)  # resident memory: this many times the first, and bytes on top
MORE_FDS: Final = 4
SMALL: Final = 48 * 2**20  # bytes of the file system that becomes full
ATTEMPTS: Final = 30  # a picture that was in hand at so many kills goes into quarantine

Relative = bytes
"""A path below a watched folder."""


# --- the folders -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A folder of the policy; ``rules`` are its keys there."""

    number: int
    path: Path
    rules: dict[str, Any]

    @property
    def after(self) -> str:
        return str(self.rules.get("after", "delete")).partition(":")[0]

    def outcome(self, kind: str, image_format: str) -> str:
        """Tell what the policy wants done: seal, leave, quarantine, or nothing (``pass``)."""
        if kind == "temporary":
            return "pass"
        listed = self.rules.get("formats", [image_format])
        if kind in {"other", "empty"} or image_format not in listed:
            word = self.rules.get("not_image", "leave")
        elif kind == "half":
            word = self.rules.get("undecodable", "encrypt")
        else:
            word = "encrypt"
        return "seal" if word == "encrypt" else str(word)


def plans(top: Path) -> list[Plan]:
    """Folders of every kind. The last one is not in the policy all the time."""
    blind = {"not_image": "encrypt", "undecodable": "encrypt", "preview": 0}
    rules: dict[str, dict[str, Any]] = {
        "closes": {"settle": "0s", "preview": 96},
        "settles": {"settle": "1s", "not_image": "quarantine", "undecodable": "quarantine"},
        "blind": {"settle": "0s", "vault": "small", **blind},
        "kept": {"settle": "0s", "after": "keep", "preview": 0},
        "moved": {"settle": "0s", "after": f"move:{top / 'originals'}", "not_image": "encrypt"},
        "listed": {"settle": "0s", "vault": "small", "formats": ["JPEG", "PNG"]},
        "polled": {"settle": "1s", "watch": "poll", "poll": "1s", **blind},
        "guest": {"settle": "0s", "preview": 0},
    }
    made = []
    for number, (name, rule) in enumerate(rules.items()):
        path = top / "folders" / name
        path.mkdir(parents=True)
        whole = {"path": str(path), "vault": "main", "rescan": "20s", **rule}
        made.append(Plan(number, path, whole))
    return made


# --- the ledger --------------------------------------------------------------------------------


@dataclass
class Version:
    """Something whole under a final name. ``fate``: what its producer did to it later."""

    plan: Plan
    names: list[Relative]
    digest: str
    size: int
    kind: str  # image, half, other, empty, temporary
    how: str
    format: str = "JPEG"
    made: float = field(default_factory=time.monotonic)
    noted: float = field(default_factory=time.time)
    fate: str = ""
    touched: int = 0  # times were set after it was whole: another file to whoever compares them

    @property
    def key(self) -> str:
        return _key(self.digest, self.size, self.plan.path, self.names[-1])

    @property
    def should_go(self) -> bool:
        """Whether the service is to take it out of its folder."""
        outcome = self.plan.outcome(self.kind, self.format)
        return outcome == "quarantine" or (outcome == "seal" and self.plan.after != "keep")


def _key(digest: str, size: int, folder: Path, name: Relative) -> str:
    # Empty files are all the same; only their names tell them apart.
    return digest if size else f"empty {folder}/{shown(name)}"


def shown(name: Relative) -> str:
    return display(os.fsdecode(name))


class Ledger:
    """Everything that was written whole."""

    def __init__(self) -> None:
        self.versions: list[Version] = []
        self._waiting: list[Version] = []
        self._newest: dict[tuple[int, Relative], Version] = {}
        self._lock = threading.Lock()

    def add(self, version: Version) -> Version:
        with self._lock:
            self.versions.append(version)
            self._newest[version.plan.number, version.names[-1]] = version
            if version.should_go:
                self._waiting.append(version)
        return version

    def __len__(self) -> int:
        return len(self.versions)

    def waiting(self) -> list[Version]:
        """Give what should have left its folder by now and has not."""
        with self._lock:
            self._waiting = [each for each in self._waiting if self._still_there(each)]
            return [each for each in self._waiting if each.kind != "empty"]

    def _still_there(self, version: Version) -> bool:
        newest = self._newest.get((version.plan.number, version.names[-1]), version)
        path = os.path.join(os.fsencode(version.plan.path), version.names[-1])
        return not version.fate and newest.should_go and os.path.lexists(path)


# --- what producers write ----------------------------------------------------------------------


class Content(NamedTuple):
    data: bytes
    kind: str
    format: str = "JPEG"


class Pictures:
    """Contents, no two of them the same: random bytes follow where decoders do not look."""

    FORMATS = ("JPEG", "JPEG", "JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP")

    def __init__(self, dice: Random) -> None:
        self._bases = [
            (image_format, noise(dice.choice((8, 24, 60, 120)), image_format))
            for image_format in self.FORMATS * 3
        ]

    def image(self, dice: Random) -> Content:
        image_format, base = dice.choice(self._bases)
        padding = int(min(400_000, dice.expovariate(1 / 15_000)))
        return Content(base + os.urandom(16 + padding), "image", image_format)

    def half(self, dice: Random) -> Content:
        whole = noise(90, "JPEG")
        return Content(whole[: int(len(whole) * dice.uniform(0.3, 0.8))], "half")

    def other(self, dice: Random) -> Content:
        start = dice.choice((b"%PDF-1.7\n", b"note to myself\n", b"PK\3\4", b"<html>"))
        return Content(start + os.urandom(dice.randrange(20, 5_000)).hex().encode(), "other")


def noise(side: int, image_format: str) -> bytes:
    image = Image.frombytes("RGB", (side, side), os.urandom(3 * side * side))
    file = io.BytesIO()
    image.save(file, image_format)
    return file.getvalue()


_ODD_NAMES: Final[tuple[Callable[[bytes], bytes], ...]] = (
    lambda base: base + b"-\xff\xfe.jpg",
    lambda base: b"two\nlines " + base + b".jpg",
    lambda base: b"-rf " + base + b".jpg",
    lambda base: base + b"'\"`$(x);.jpg",
    lambda base: "\u202egpj.".encode() + base + "\U0001f4f7.jpg".encode(),
    lambda base: base + b".jpg ",
    lambda base: b"." + base + b".jpg",
    lambda base: base + b"\\x41%41.jpg",
    lambda base: base.ljust(251, b"x") + b".jpg",
    lambda base: base,
)

_TEMPORARY_NAMES: Final[tuple[Callable[[bytes], bytes], ...]] = (
    lambda base: base + b".part",
    lambda base: b".in." + base,
    lambda base: base + b".crdownload",
    lambda base: b"." + base + b".Ab12Cd",
    lambda base: b".syncthing." + base + b".tmp",
    lambda base: base + b".!sync",
)

_PARENTS: Final = (b"", b"", b"", b"2026/11/", b"with space/", b"\xe9t\xe9/")


def write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


# --- the producers -----------------------------------------------------------------------------


class Producer(threading.Thread):
    """Writes files in all ways that there are. Nobody else writes names of its number.

    Folders are opened anew for each action and then known by their descriptor, as a server for
    shares or FTP does, so that a folder's renaming disturbs nothing that is under way.
    """

    def __init__(self, number: int, soak: Soak) -> None:
        super().__init__(name=f"producer {number}", daemon=True)
        self._soak = soak
        self._number = number
        self._dice = Random(f"{soak.settings.seed} producer {number}")
        self._count = 0
        self._current: dict[tuple[int, Relative], Version] = {}
        self._resting: dict[int, deque[tuple[Plan, Relative]]] = defaultdict(deque)
        self._trees: deque[tuple[float, Plan, bytes]] = deque()
        self.idle = threading.Event()
        self._ways: dict[Callable[[Plan, int], None], int] = {
            self.rename_from_temporary: 30,
            self.write_directly: 14,
            self.write_slowly: 6,
            self.copy_with_times: 8,
            self.move_a_tree_in: 3,
            self.rewrite: 10,
            self.append_pages: 5,
            self.half: 5,
            self.empty: 2,
            self.no_image: 6,
            self.abandon: 1,
            self.rename_late: 4,
            self.delete_at_once: 6,
            self.rename_again: 3,
            self.link_and_unlink: 3,
        }

    def run(self) -> None:
        try:
            while not self._soak.ending.is_set():
                self.idle.clear()
                if self._soak.paused.is_set():
                    self.idle.set()
                    time.sleep(0.01)
                else:
                    self._act()
        except Exception as error:  # noqa: BLE001 - the run must not end well without it
            self._soak.violation(f"{self.name} failed: {error!r}")
        finally:
            self.idle.set()

    def _act(self) -> None:
        plan = self._dice.choice(self._soak.plans)
        (way,) = self._dice.choices(list(self._ways), list(self._ways.values()))
        with self._opened(plan) as root:
            if root is not None:
                way(plan, root)
        self._tidy()
        pause = self._dice.expovariate(self._soak.settings.rate / PRODUCERS)
        self._soak.paused.wait(min(pause, 5.0))

    @contextlib.contextmanager
    def _opened(self, plan: Plan) -> Iterator[int | None]:
        """Open a folder; it may have been renamed for a moment."""
        end = time.monotonic() + 10.0
        fd = None
        while fd is None and time.monotonic() < end:
            try:
                fd = os.open(plan.path, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                time.sleep(0.02)
        try:
            yield fd
        finally:
            if fd is not None:
                os.close(fd)

    # -- names ---------------------------------------------------------------------------------

    def _base(self) -> bytes:
        self._count += 1
        return f"{MARK}{self._number}x{self._count:06d}".encode()

    def _new_name(self, root: int) -> Relative:
        base = self._base()
        odd = self._dice.random() < 0.15
        name = self._dice.choice(_ODD_NAMES)(base) if odd else b"IMG_" + base + b".jpg"
        parent = self._dice.choice(_PARENTS)
        make_parents(root, parent)
        return parent + name

    def _temporary_name(self) -> bytes:
        return self._dice.choice(_TEMPORARY_NAMES)(self._base())

    def _scan_name(self) -> Relative:
        return f"SCN_000{self._number}.jpg".encode()

    # -- the book-keeping ----------------------------------------------------------------------

    def _note(
        self, plan: Plan, name: Relative, content: Content, how: str, digest: str = ""
    ) -> Version:
        digest = digest or hashlib.sha256(content.data).hexdigest()
        size = len(content.data)
        version = Version(plan, [name], digest, size, content.kind, how, content.format)
        self._soak.ledger.add(version)
        self._current[plan.number, name] = version
        if plan.after == "keep" or plan.outcome(content.kind, content.format) in {"leave", "pass"}:
            self._resting[plan.number].append((plan, name))
        return version

    def _gone(self, plan: Plan, name: Relative, fate: str) -> None:
        version = self._current.pop((plan.number, name), None)
        if version is not None:
            version.fate = fate

    def _tidy(self) -> None:
        """Take away what rests, as people do, so that folders stay as full as they are."""
        for resting in self._resting.values():
            if len(resting) > RESTING:
                plan, name = resting.popleft()
                with self._opened(plan) as root:
                    if root is not None:
                        self._remove(plan, root, name, "deleted by its owner")
        while self._trees and self._trees[0][0] < time.monotonic():
            _due, plan, tree = self._trees.popleft()
            if not remove_empty_directories(os.path.join(os.fsencode(plan.path), tree)):
                self._trees.append((time.monotonic() + 20.0, plan, tree))

    def _remove(self, plan: Plan, root: int, name: Relative, fate: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=root)
            self._gone(plan, name, fate)

    def _rename(self, plan: Plan, root: int, source: bytes, name: Relative) -> None:
        """Rename into place. What lay there is gone, unless the service was faster.

        The service may give back what it took by mistake: where nothing was to be seen, nothing
        may be overwritten.
        """
        while True:
            with glimpse(root, name) as seen:
                if seen is not None:
                    os.rename(source, name, src_dir_fd=root, dst_dir_fd=root)
                    if os.fstat(seen).st_nlink == 0:
                        self._gone(plan, name, "overwritten")
                    return
            with contextlib.suppress(FileExistsError):
                kernel.rename_noreplace(
                    os.fsdecode(source), os.fsdecode(name), source_dir=root, target_dir=root
                )
                return

    def _write_temporary(self, root: int, data: bytes) -> bytes:
        source = self._temporary_name()
        fd = os.open(source, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=root)
        try:
            write_all(fd, data)
            if self._dice.random() < 0.3:
                os.fsync(fd)
        finally:
            os.close(fd)
        return source

    def _open(
        self, plan: Plan, root: int, name: Relative, flag: int, fate: str
    ) -> tuple[int, bool]:
        """Open what is there, which that changes, or make it; tells whether it is new."""
        while True:
            with contextlib.suppress(FileNotFoundError):
                fd = os.open(name, os.O_WRONLY | flag, dir_fd=root)
                self._gone(plan, name, fate)
                return fd, False
            with contextlib.suppress(FileExistsError):
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
                return os.open(name, flags, 0o644, dir_fd=root), True

    def _write(self, fd: int, data: bytes, pieces: int, pause: float) -> None:
        size = len(data) // pieces + 1
        for start in range(0, len(data), size):
            write_all(fd, data[start : start + size])
            if pieces > 1:
                time.sleep(self._dice.uniform(0.0, pause))

    # -- the ways ------------------------------------------------------------------------------

    def rename_from_temporary(self, plan: Plan, root: int) -> None:
        content = self._soak.pictures.image(self._dice)
        self._place(plan, root, content, "rename")

    def _place(self, plan: Plan, root: int, content: Content, how: str) -> Relative:
        name = self._new_name(root)
        source = self._write_temporary(root, content.data)
        self._rename(plan, root, source, name)
        self._note(plan, name, content, how)
        return name

    def write_directly(self, plan: Plan, root: int) -> None:
        content = self._soak.pictures.image(self._dice)
        self._write_new(plan, root, content, "direct", pieces=1, pause=0.0)

    def _write_new(
        self, plan: Plan, root: int, content: Content, how: str, *, pieces: int, pause: float
    ) -> Relative:
        name = self._new_name(root)
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=root)
        try:
            self._write(fd, content.data, pieces, pause)
        finally:
            os.close(fd)
        self._note(plan, name, content, how)
        return name

    def write_slowly(self, plan: Plan, root: int) -> None:
        content = self._soak.pictures.image(self._dice)
        pieces = self._dice.randrange(3, 8)
        self._write_new(plan, root, content, "slow", pieces=pieces, pause=0.5)

    def copy_with_times(self, plan: Plan, root: int) -> None:
        content = self._soak.pictures.image(self._dice)
        name = self._write_new(plan, root, content, "cp -p", pieces=2, pause=0.02)
        version = self._current[plan.number, name]
        version.touched += 1
        when = time.time_ns() - self._dice.randrange(10**9, 10**17)
        with contextlib.suppress(FileNotFoundError):
            os.utime(name, ns=(when, when), dir_fd=root)
            os.chmod(name, 0o640, dir_fd=root)

    def move_a_tree_in(self, plan: Plan, root: int) -> None:
        outside = self._soak.top / "outside" / f"{self._number}"
        shutil.rmtree(outside, ignore_errors=True)
        tree = b"tree-" + self._base()
        contents: dict[Relative, Content] = {}
        for number in range(self._dice.randrange(2, 10)):
            parent = self._dice.choice((b"", b"a/", b"a/b/", b"\xfc/"))
            inside = parent + f"{MARK}{number}.jpg".encode()
            contents[inside] = self._soak.pictures.image(self._dice)
            path = os.path.join(os.fsencode(outside), inside)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(contents[inside].data)
        os.rename(os.fsencode(outside), tree, dst_dir_fd=root)
        for inside, content in contents.items():
            self._note(plan, tree + b"/" + inside, content, "tree")
        self._trees.append((time.monotonic() + 20.0, plan, tree))

    def rewrite(self, plan: Plan, root: int) -> None:
        """Give one name to one picture after the other, as a scanner does after a restart."""
        name = self._scan_name()
        for _ in range(self._dice.randrange(1, 6)):
            content = self._soak.pictures.image(self._dice)
            if self._dice.random() < 0.5:
                self._rename(plan, root, self._write_temporary(root, content.data), name)
            else:
                fd, _ = self._open(plan, root, name, os.O_TRUNC, "overwritten in place")
                try:
                    self._write(fd, content.data, self._dice.choice((1, 1, 3)), 0.05)
                finally:
                    os.close(fd)
            self._note(plan, name, content, "rewritten")
            time.sleep(self._dice.choice((0.0, 0.01, 0.05, 0.3)))

    def append_pages(self, plan: Plan, root: int) -> None:
        """Open, append and close for each page. Each time it is closed it could be whole."""
        name = self._new_name(root)
        so_far, size, image_format = hashlib.sha256(), 0, ""
        for _ in range(self._dice.randrange(2, 5)):
            page = self._soak.pictures.image(self._dice)
            fd, new = self._open(plan, root, name, os.O_APPEND, "continued")
            if new:
                so_far, size, image_format = hashlib.sha256(), 0, page.format
            try:
                self._write(fd, page.data, 2, 0.02)
            finally:
                os.close(fd)
            so_far.update(page.data)
            size += len(page.data)
            version = self._note(
                plan,
                name,
                Content(page.data, "image", image_format),
                "pages",
                so_far.hexdigest(),
            )
            version.size = size
            time.sleep(self._dice.choice((0.0, 0.05, 0.3, 1.3)))

    def half(self, plan: Plan, root: int) -> None:
        content = self._soak.pictures.half(self._dice)
        self._write_new(plan, root, content, "half", pieces=1, pause=0.0)

    def empty(self, plan: Plan, root: int) -> None:
        self._write_new(plan, root, Content(b"", "empty"), "empty", pieces=1, pause=0.0)

    def no_image(self, plan: Plan, root: int) -> None:
        content = self._soak.pictures.other(self._dice)
        if self._dice.random() < 0.3:
            name = b"NOTE_000" + str(self._number).encode() + b".txt"
            self._rename(plan, root, self._write_temporary(root, content.data), name)
            self._note(plan, name, content, "rewritten")
        else:
            self._place(plan, root, content, "no image")

    def abandon(self, plan: Plan, root: int) -> None:
        content = self._soak.pictures.image(self._dice)
        name = self._write_temporary(root, content.data)
        self._note(plan, name, Content(content.data, "temporary"), "abandoned")

    def rename_late(self, plan: Plan, root: int) -> None:
        content = self._soak.pictures.image(self._dice)
        name = self._new_name(root)
        source = self._write_temporary(root, content.data)
        time.sleep(self._dice.uniform(0.2, 2.5))
        self._rename(plan, root, source, name)
        self._note(plan, name, content, "renamed late")

    def delete_at_once(self, plan: Plan, root: int) -> None:
        content = self._soak.pictures.image(self._dice)
        name = self._place(plan, root, content, "deleted again")
        time.sleep(self._dice.choice((0.0, 0.0, 0.005, 0.02, 0.05, 0.2)))
        self._remove(plan, root, name, "deleted")

    def rename_again(self, plan: Plan, root: int) -> None:
        content = self._soak.pictures.image(self._dice)
        name = self._place(plan, root, content, "renamed again")
        time.sleep(self._dice.choice((0.0, 0.005, 0.02, 0.05)))
        other = self._new_name(root)
        with contextlib.suppress(FileNotFoundError):
            os.rename(name, other, src_dir_fd=root, dst_dir_fd=root)
            version = self._current.pop((plan.number, name))
            version.names.append(other)
            self._current[plan.number, other] = version
            if plan.after == "keep":
                self._resting[plan.number].append((plan, other))

    def link_and_unlink(self, plan: Plan, root: int) -> None:
        """As programs do that must not overwrite: there are two names for a moment."""
        content = self._soak.pictures.image(self._dice)
        name = self._new_name(root)
        source = self._write_temporary(root, content.data)
        os.link(source, name, src_dir_fd=root, dst_dir_fd=root)
        time.sleep(self._dice.choice((0.0, 0.0, 0.1)))
        os.unlink(source, dir_fd=root)
        self._note(plan, name, content, "linked")


@contextlib.contextmanager
def glimpse(root: int, name: Relative) -> Iterator[int | None]:
    """Hold a file without opening it, so that no lease is broken, if it is there."""
    try:
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=root)
    except FileNotFoundError:
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)


def make_parents(root: int, parent: bytes) -> None:
    path = b""
    for component in parent.split(b"/")[:-1]:
        path += component + b"/"
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, dir_fd=root)


def remove_empty_directories(top: bytes) -> bool:
    """Remove a tree if there is no file in it; true where nothing is left of it."""
    for path, _folders, _names in os.walk(top, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(path)
    return not os.path.exists(top)


# --- the service and what is done to it --------------------------------------------------------

# The system's clock is everybody's, and no namespace has one of its own for it. So the service
# itself is given another one, which is all that it can see of a jump anyway. It reads the offset
# each time; a file that is mapped or watched would be one more thing of ours in its process.
_CLOCK: Final = """
import os
import time

_fd = os.open(os.environ["SOAK_CLOCK"], os.O_RDONLY | os.O_CLOEXEC)
_time, _time_ns = time.time, time.time_ns


def _seconds():
    return int(os.pread(_fd, 20, 0) or b"0")


time.time = lambda: _time() + _seconds()
time.time_ns = lambda: _time_ns() + _seconds() * 10**9
"""


@dataclass(frozen=True)
class Settings:
    seconds: float
    top: Path
    seed: int
    rate: float = RATE
    sabotage: str = ""
    script: tuple[str, ...] | None = None
    """Disturbances in this order, once each, instead of random ones."""
    producers: int = PRODUCERS


class Sample(NamedTuple):
    """The service's process at the end of a calm phase."""

    life: int
    at: float
    resident: int
    descriptors: int
    threads: int


class Loss(NamedTuple):
    """What there was when the queue was lost: ids of objects, and of claimed files."""

    at: float
    life: int
    objects: frozenset[str]
    claimed: frozenset[str]


class Soak:
    """One run."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.top = settings.top
        self.dice = Random(f"{settings.seed} disturbances")
        self.site = Site(self.top)
        self.plans = plans(self.top)
        self.pictures = Pictures(self.dice)
        self.ledger = Ledger()
        self.paused = threading.Event()
        self.ending = threading.Event()
        self.violations: list[str] = []
        self.notes: Counter[str] = Counter()
        self.samples: list[Sample] = []
        self.losses = [Loss(time.monotonic(), 0, frozenset(), frozenset())]
        self.lives = 0
        self.kills = 0
        self.stopped = 0.0
        self.seen_anew = 0.0  # when the service forgot since when it knows what lies there
        self.daemon: Daemon | None = None
        self._small = self.top / "small"
        self._mounted = False
        self._clock = self.top / "clock"
        self._started = time.monotonic()
        self._guest = True
        self._phase = "starting"
        # CliRunner takes sys.stderr away for a moment, in whatever thread writes to it.
        self._stderr = sys.stderr
        self._calm_took: list[float] = []

    def violation(self, sentence: str) -> None:
        self.violations.append(sentence)
        self._say(f"VIOLATION: {sentence}")

    def _say(self, sentence: str) -> None:
        passed = time.monotonic() - self._started
        self._stderr.write(f"{passed:7.0f} s  {sentence}\n")
        self._stderr.flush()

    # -- setting up ----------------------------------------------------------------------------

    def prepare(self) -> None:
        (self.top / "outside").mkdir()
        self._small.mkdir()
        self._mount()
        modules = self.top / "modules"
        modules.mkdir()
        (modules / "sitecustomize.py").write_text(_CLOCK, encoding="ascii")
        self._set_clock(0)
        self.site.policy["vaults"] = {
            "main": {"path": str(self.site.vault), "min_free": 0},
            "small": {"path": str(self._small / "vault"), "min_free": 0},
        }
        self.site.policy["limits"] = {"attempts": ATTEMPTS}
        self._set_folders()
        self.site.make_vaults()

    def _set_folders(self) -> None:
        chosen = self.plans if self._guest else self.plans[:-1]
        self.site.policy["folders"] = [dict(plan.rules) for plan in chosen]

    def _mount(self) -> None:
        if self.settings.script is not None:
            return
        if not ROOT:
            self.notes["full disk left out: only root can mount a small file system"] += 1
            return
        options = f"size={SMALL},mode=0700"
        command = ["mount", "-t", "tmpfs", "-o", options, "soak", str(self._small)]
        done = subprocess.run(command, capture_output=True, check=False)
        self._mounted = done.returncode == 0
        if not self._mounted:
            self.notes["full disk left out: no small file system can be mounted here"] += 1

    def _unmount(self) -> None:
        # A process that was just killed keeps it busy for a moment longer.
        if self._mounted:
            subprocess.run(["umount", "--lazy", self._small], capture_output=True, check=False)
            self._mounted = False

    # -- the process ---------------------------------------------------------------------------

    def start(self, *, wait: bool = True) -> None:
        modules = str(self.top / "modules")
        path = os.pathsep.join(filter(None, [modules, os.environ.get("PYTHONPATH")]))
        environ = {"PYTHONPATH": path, "SOAK_CLOCK": str(self._clock)}
        self.lives += 1
        self.seen_anew = time.monotonic()
        self.daemon = self.site.launch(environ)
        if wait:
            self.daemon.wait_for_notice("READY=1")

    @property
    def running(self) -> Daemon:
        assert self.daemon is not None
        if not self.daemon.is_running():
            log = self.daemon.log()[-2_000:]
            self.violation(f"the service ended by itself with {self.daemon.ended()}:\n{log}")
            self._bury()
            self.start()
            assert self.daemon is not None
        return self.daemon

    def _bury(self) -> None:
        assert self.daemon is not None
        end = time.monotonic() + 30.0
        while not self.daemon.group_is_empty():
            if time.monotonic() > end:
                self.violation("a process of the service outlived it")
                break
            time.sleep(0.01)
        self.daemon.close()
        self.daemon = None

    def stop_service(self) -> None:
        began = time.monotonic()
        code = self.running.stop()
        if code:
            self.violation(f"SIGTERM: the service ended with {code}")
        if time.monotonic() - began > 30.0:
            self.violation("SIGTERM: the service took more than 30 s to end")
        self._bury()

    # -- disturbances --------------------------------------------------------------------------

    def kill(self) -> None:
        self.running.kill()
        self.kills += 1
        self._bury()
        self._perhaps_lose_queue()
        self.start(wait=self.dice.random() < 0.8)
        if self.daemon is not None and not any("READY" in n for n in self.daemon.notices()):
            time.sleep(self.dice.uniform(0.1, 0.9))
            self.kills += 1
            self.notes["kill -9 while it started"] += 1
            self.running.kill()
            self._bury()
            self.start()

    def terminate(self) -> None:
        self.stop_service()
        self._perhaps_lose_queue()
        time.sleep(self.dice.choice((0.0, 0.0, 1.0)))
        self.start()

    def _perhaps_lose_queue(self) -> None:
        if self.dice.random() < 0.3:
            self.lose_queue()

    def lose_queue(self) -> None:
        """Remove the database, as a disk or an administrator would, between two lives."""
        claimed = frozenset(name for plan in self.plans for name in self.claimed(plan))
        self.losses.append(Loss(time.monotonic(), self.lives, self._object_ids(), claimed))
        for file in self.site.state.glob("queue.sqlite*"):
            if self.dice.random() < 0.5:
                file.unlink()
            else:
                file.write_bytes(os.urandom(5000))
        self.notes["queue lost"] += 1

    def _object_ids(self) -> frozenset[str]:
        vaults = (self.site.vault, self._small / "vault")
        return frozenset(path.stem for vault in vaults for path in self.site.objects(vault))

    def claimed(self, plan: Plan) -> list[str]:
        try:
            return [name for name in os.listdir(plan.path / STAGING) if name != "quarantine"]
        except FileNotFoundError:
            return []

    def reload(self) -> None:
        """Change what may change without touching what waits, or break the file altogether."""
        daemon = self.running
        broken = self.dice.random() < 0.2
        if broken:
            self.site.policy_path.write_text("version: 1\nfolders: [", encoding="utf-8")
        else:
            self._guest = self._guest is False or self.dice.random() < 0.7
            self._vary()
            self.site.write_policy()
        self._reload_and_wait(daemon, "the old policy stays" if broken else "the new policy is in")
        if broken:
            self.site.write_policy()

    def _vary(self) -> None:
        dice = self.dice
        self._set_folders()
        for rules in self.site.policy["folders"]:
            rules["settle"] = dice.choice(("0s", "200ms", "1s"))
            rules["rescan"] = dice.choice(("5s", "20s", "30s"))
            if rules.get("preview") != 0:
                rules["preview"] = dice.choice((32, 256))
        self.site.policy["verify"] = dice.choice(("device", "cached"))
        self.site.policy["workers"] = dice.choice(("auto", 1, 2, 5))

    def _reload_and_wait(self, daemon: Daemon, answer: str) -> None:
        before = daemon.log().count(answer)
        notices = len(daemon.notices())
        daemon.send("HUP")
        end = time.monotonic() + 60.0
        while daemon.log().count(answer) == before and daemon.is_running():
            if time.monotonic() > end:
                self.violation("SIGHUP: no answer for 60 s")
                return
            time.sleep(0.02)
        daemon.wait_for_notice("READY=1", notices)
        self.seen_anew = time.monotonic()

    def rescan(self) -> None:
        self.running.send("USR1")

    def fill_disk(self) -> None:
        """Leave the small vault no space, or just too little, for some seconds."""
        ballast = self._small / "ballast"
        end = time.monotonic() + self.dice.uniform(2.0, 8.0)
        with open(ballast, "wb") as file:
            while time.monotonic() < end:
                spare = self.dice.choice((0, 4_096, 20_000, 100_000))
                status = os.statvfs(self._small)
                size = file.seek(0, os.SEEK_END) + status.f_bavail * status.f_frsize - spare
                with contextlib.suppress(OSError):
                    file.truncate(max(0, size))
                    os.posix_fallocate(file.fileno(), 0, max(1, size))
                time.sleep(self.dice.uniform(0.05, 0.3))
        if self.dice.random() < 0.3 and self._kills_allowed:
            self.notes["kill -9 with a full disk"] += 1
            self.kill()
        ballast.unlink()

    def jump(self) -> None:
        self._set_clock(self.dice.choice((-86_400, -3_600, -40, 0, 40, 3_600, 86_400 * 30)))

    def _set_clock(self, seconds: int) -> None:
        # One write of one length: the service may read it at any time.
        fd = os.open(self._clock, os.O_WRONLY | os.O_CREAT, 0o644)
        os.pwrite(fd, f"{seconds:<20d}".encode(), 0)
        os.close(fd)

    def overflow(self) -> None:
        """Freeze the service, and make more events than the kernel keeps for it."""
        plan = self.dice.choice([p for p in self.plans[:-1] if "watch" not in p.rules])
        limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text(encoding="ascii"))
        many = self.settings.seconds >= 600 and limit <= 20_000
        daemon = self.running
        before = daemon.log().count("queue overflowed")
        daemon.send("STOP")
        names = [plan.path / f"{MARK}{n}.part" for n in range(limit * 5 // 8 if many else 64)]
        for name in names:
            name.touch()
        for number in range(0 if many else limit + 2_000):
            # Two equal events in a row would become one.
            os.close(os.open(names[number % len(names)], os.O_WRONLY))
        time.sleep(self.dice.uniform(0.0, 0.5))
        daemon.send("CONT")
        end = time.monotonic() + 20.0
        while daemon.log().count("queue overflowed") == before and time.monotonic() < end:
            time.sleep(0.05)
        if daemon.log().count("queue overflowed") > before:
            self.notes["overflow noticed by the service"] += 1
        for name in names:
            name.unlink()

    def move_away(self) -> None:
        """Rename a folder, and rename it back after a while."""
        plan = self.dice.choice(self.plans)
        other = plan.path.with_name(f"{plan.path.name} away")
        plan.path.rename(other)
        time.sleep(self.dice.choice((0.0, 0.01, 0.5, 3.0)))
        other.rename(plan.path)
        self.seen_anew = time.monotonic()

    @property
    def _kills_allowed(self) -> bool:
        return self._phase != "one life"

    def disturbances(self) -> dict[Callable[[], None], str]:
        hard: dict[Callable[[], None], str] = {self.kill: "kill -9", self.terminate: "SIGTERM"}
        soft: dict[Callable[[], None], str] = {
            self.reload: "SIGHUP",
            self.rescan: "SIGUSR1",
            self.jump: "clock jump",
            self.overflow: "overflow storm",
            self.move_away: "folder renamed and back",
        }
        if self._mounted:
            soft[self.fill_disk] = "full disk"
        return {**hard, **soft} if self._kills_allowed else soft

    # -- phases --------------------------------------------------------------------------------

    def run(self) -> None:
        self.prepare()
        producers = [Producer(n, self) for n in range(1, self.settings.producers + 1)]
        try:
            self.start()
            for producer in producers:
                producer.start()
            self._producers = producers
            if self.settings.script is not None:
                self._follow(self.settings.script)
            else:
                self._two_halves()
            self._phase = "ending"
            self.calm()
            self._finish()
        finally:
            self.ending.set()
            for producer in producers:
                if producer.is_alive():
                    producer.join(30.0)
            if self.daemon is not None:
                self.daemon.close()

    def _follow(self, script: Sequence[str]) -> None:
        step = self.settings.seconds / (len(script) + 1)
        self._phase = "script"
        for word in script:
            time.sleep(step)
            self._do(getattr(self, word), word)
        time.sleep(step)

    def _two_halves(self) -> None:
        half = self.settings.seconds / 2
        self._phase = "with kills"
        rounds = max(1, min(6, int(half // 300)))
        for _ in range(rounds):
            self._disturb(half / rounds)
            self.calm()
        self._phase = "one life"
        rounds = max(4, min(12, int(half // 60)))
        for _ in range(rounds):
            self._disturb(half / rounds)
            self.calm()

    def _disturb(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._wait(min(self.dice.uniform(0.5, 5.0), end - time.monotonic()))
            known = self.disturbances()
            act = self.dice.choice(list(known))
            self._do(act, known[act])

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._progress()
            time.sleep(min(left, 0.5))

    def _do(self, act: Callable[[], None], word: str) -> None:
        self._progress()
        self.notes[word] += 1
        act()

    _told = 0.0

    def _progress(self) -> None:
        now = time.monotonic()
        if now - self._told >= 10.0:
            self._told = now
            disturbed = sum(self.notes.values())
            self._say(
                f"{self._phase}: {len(self.ledger)} written, {disturbed} disturbances,"
                f" life {self.lives}, {len(self.violations)} violations"
            )

    def calm(self) -> None:
        """Let the service finish while nothing arrives, and look at its process then."""
        self.paused.set()
        for producer in self._producers:
            producer.idle.wait(60.0)
        self._bring_guest_back()
        began = time.monotonic()
        nudged = False
        while reason := self._unfinished():
            passed = time.monotonic() - began
            if passed > CALM:
                self.violation(f"not finished {passed:.0f} s after the last arrival: {reason}")
                break
            if passed > NUDGE and not nudged:
                nudged = True
                self.notes["calm phases that needed a scan"] += 1
                self._say(f"a scan is asked for: {reason}")
                self.rescan()
            time.sleep(0.1)
            self._progress()
        self._calm_took.append(time.monotonic() - began)
        self._make_room()
        if self.settings.script is None:
            time.sleep(1.5)
            self._sample()
        if self._phase != "ending":
            self.paused.clear()

    def _bring_guest_back(self) -> None:
        if not self._guest:
            self._guest = True
            self._set_folders()
            self.site.write_policy()
            self._reload_and_wait(self.running, "the new policy is in")

    def _unfinished(self) -> str:
        """Say what is still to be done, by the disk and by the service's own account."""
        waiting = self.ledger.waiting()
        if waiting:
            some = ", ".join(f"{v.plan.path.name}/{shown(v.names[-1])}" for v in waiting[:3])
            return f"{len(waiting)} files are still there: {some}"
        for plan in self.plans:
            if self.claimed(plan):
                return f"{plan.path.name} has claimed files"
        for folder in self._reports():
            if folder["waiting"] or folder["queued"] or folder["health"] != "ok":
                keys = ("path", "health", "reason", "waiting", "queued")
                return ", ".join(f"{key} {folder[key]}" for key in keys)
        return ""

    def _reports(self) -> list[dict[str, Any]]:
        text = (self.site.state / "status.json").read_text(encoding="utf-8")
        folders: list[dict[str, Any]] = json.loads(text)["folders"]
        return folders

    def _make_room(self) -> None:
        if not self._mounted:
            return
        status = os.statvfs(self._small)
        total, free = (n * status.f_frsize for n in (status.f_blocks, status.f_bavail))
        if free < SMALL * 2 // 3:
            size = total - free + SMALL
            command = ["mount", "-o", f"remount,size={size}", str(self._small)]
            subprocess.run(command, capture_output=True, check=False)

    def _sample(self) -> None:
        process = Path("/proc", str(self.running.process.pid))  # what starts it execs it
        pages = int((process / "statm").read_text(encoding="ascii").split()[1])
        self.samples.append(
            Sample(
                self.lives,
                time.monotonic() - self._started,
                pages * os.sysconf("SC_PAGE_SIZE"),
                self._descriptors(process),
                len(os.listdir(process / "task")),
            )
        )

    def _descriptors(self, process: Path) -> int:
        try:
            return len(os.listdir(process / "fd"))
        except PermissionError:
            self.notes["descriptors not counted: only root may look into such a process"] = 1
            return 0

    def _finish(self) -> None:
        self.rescan()  # what was taken away since the last scan is counted no more
        time.sleep(3.0 if self.settings.script is None else 0.5)
        self.stopped = time.monotonic()
        self.stop_service()
        self.ending.set()

    def close(self) -> None:
        self._unmount()


# --- sabotage: would the ledger notice? --------------------------------------------------------


def _an_object(soak: Soak) -> Path:
    return soak.dice.choice(soak.site.objects())


def remove_object(soak: Soak) -> None:
    _an_object(soak).unlink()


def damage_object(soak: Soak) -> None:
    path = _an_object(soak)
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)


def copy_object(soak: Soak) -> None:
    """Seal a picture a second time, by letting the service take it again."""
    before = soak.site.restored_files()
    name, file = next((n, f) for n, f in before.items() if f.stat().st_size)
    target = soak.plans[0].path / f"again{len(name)}.jpg"
    shutil.copy(file, target)
    soak.start()
    soak.daemon = soak.running
    end = time.monotonic() + 30.0
    while target.exists() and time.monotonic() < end:
        time.sleep(0.05)
    soak.stop_service()


def leave_in_clear(soak: Soak) -> None:
    files = {digest_of(file)[0]: file for file in soak.site.restored_files().values()}
    plan = soak.plans[0]
    sealed = (v.digest for v in soak.ledger.versions if v.plan is plan and v.digest in files)
    shutil.copy(files[next(sealed)], plan.path / "again.jpg")


def leave_claim(soak: Soak) -> None:
    claim = soak.plans[0].path / STAGING / ("ab" * 16)
    claim.mkdir()
    (claim / "x.jpg").write_bytes(b"claimed")


def leave_temporary(soak: Soak) -> None:
    (soak.site.vault / "tmp" / "left.simg").write_bytes(b"left")


def forget_moved(soak: Soak) -> None:
    moved = [path for path in (soak.top / "originals").rglob("*") if path.is_file()]
    soak.dice.choice(moved).unlink()


SABOTAGE: Final[dict[str, Callable[[Soak], None]]] = {
    "remove": remove_object,
    "damage": damage_object,
    "twice": copy_object,
    "clear": leave_in_clear,
    "claim": leave_claim,
    "tmp": leave_temporary,
    "moved": forget_moved,
}


# --- the account at the end --------------------------------------------------------------------


@dataclass
class Sealed:
    """An object as the command line lists it, and what a restore gave."""

    object_id: str
    folder: str
    path: str
    label: str
    size: int
    digest: str = ""


def digest_of(path: Path) -> tuple[str, int]:
    data = path.read_bytes()
    return hashlib.sha256(data).hexdigest(), len(data)


CATEGORIES: Final = (
    "sealed",
    "kept",
    "left",
    "quarantined",
    "pending",
    "passed over",
    "taken away",
)


_OPENED: Final = re.compile(r"object ([0-9a-f]{32}): somebody opened the file for writing")


class Account:
    """Where everything is that was ever written, compared with the ledger."""

    def __init__(self, soak: Soak) -> None:
        self._soak = soak
        self.rows: dict[str, Counter[str]] = {plan.path.name: Counter() for plan in soak.plans}
        self.twice: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.sealed: dict[str, Sealed] = {}
        self._by_key: dict[str, list[Sealed]] = defaultdict(list)
        self._here: dict[tuple[int, str], list[Relative]] = defaultdict(list)
        self._set_aside: dict[tuple[int, str], list[str]] = defaultdict(list)
        self._moved: Counter[str] = Counter()
        self.lines: list[str] = []
        self._written_in_hand: set[str] = set()

    def _wrong(self, sentence: str) -> None:
        self._soak.violation(sentence)

    def make(self) -> None:
        for log in self._soak.top.glob("log-*"):
            text = log.read_text(encoding="utf-8", errors="replace")
            self._written_in_hand.update(_OPENED.findall(text))
        self._restore()
        self._look_into_folders()
        self._look_into_staging()
        for version in self._soak.ledger.versions:
            self._enter(version)
        self._refuse_strangers()
        self._compare_counters()
        self._look_at_vaults()
        self._look_at_logs()
        self._audit()

    # -- what there is -------------------------------------------------------------------------

    def _ask(self, *words: str) -> tuple[int, Any]:
        policy = ["--policy", str(self._soak.site.policy_path), "--json"]
        result = CliRunner().invoke(cli, [*policy, *words])
        try:
            return result.exit_code, json.loads(result.stdout)
        except ValueError:
            self._wrong(f"{' '.join(words)}: {result.output or result.exception!r}")
            return result.exit_code, {}

    def _restore(self) -> None:
        _code, listed = self._ask("vault", "list")
        for each in listed:
            if "error" in each:
                self._wrong(f"object {each['object']}: {each['error']}")
                continue
            path = os.path.join(each["folder"], each["name"])
            self.sealed[each["object"]] = Sealed(
                each["object"], each["source"], path, each["label"], each["size"]
            )
        target = Path(tempfile.mkdtemp(prefix="restored-", dir=self._soak.top))
        _code, answer = self._ask("vault", "restore", "--all", "--to", str(target))
        for object_id, error in answer.get("failed", {}).items():
            self._wrong(f"object {object_id} cannot be restored: {error}")
        files: dict[str, Path] = {}
        for parent, _folders, names in os.walk(target):
            for name in names:
                path_there = Path(parent, name)
                files[display(str(path_there.relative_to(target)))] = path_there
        for object_id, restored in answer.get("restored", {}).items():
            found = self.sealed[object_id]
            found.digest, size = digest_of(files.pop(restored))
            key = _key(found.digest, size, Path(found.folder), b"")
            self._by_key[key if size else f"empty {found.folder}/{found.path}"].append(found)
        if files:
            self._wrong(f"{len(files)} files were restored that the answer does not name")

    def _look_into_folders(self) -> None:
        for plan in self._soak.plans:
            for name, path in files_of(plan.path):
                if not name.startswith(STAGING.encode() + b"/"):
                    digest, size = digest_of(path)
                    self._here[plan.number, _key(digest, size, plan.path, name)].append(name)
        for _name, path in files_of(self._soak.top / "originals"):
            self._moved[digest_of(path)[0]] += 1

    def _look_into_staging(self) -> None:
        _code, jobs = self._ask("jobs", "list")
        reasons = {job["object"]: job["reason"] for job in jobs}
        for plan in self._soak.plans:
            staging = plan.path / STAGING
            for entry in self._soak.claimed(plan):
                self._wrong(f"{plan.path.name}: the staging directory holds {entry}")
            for name, path in files_of(staging / "quarantine"):
                object_id, _, below = name.partition(b"/")
                digest, size = digest_of(path)
                reason = reasons.get(object_id.decode(), "not in the queue")
                self._set_aside[plan.number, _key(digest, size, plan.path, below)].append(reason)

    # -- entering ------------------------------------------------------------------------------

    def _enter(self, version: Version) -> None:
        plan = version.plan
        found = self._by_key.get(version.key, [])
        here = self._here.get((plan.number, version.key), [])
        aside = self._set_aside.get((plan.number, version.key), [])
        self._check_objects(version, found)
        category = self._category(version, found, here, aside)
        row = self.rows[plan.path.name]
        row["arrived"] += 1
        row[category] += 1
        if version.fate and category == "taken away":
            self.reasons[f"taken away: {version.fate}"] += 1
        self.reasons.update(f"quarantined: {reason}" for reason in aside)

    def _describe(self, version: Version) -> str:
        name = shown(version.names[-1])
        fate = f", {version.fate}" if version.fate else ""
        return (
            f"{version.plan.path.name}/{name} ({version.how}, {version.kind}, {version.format},"
            f" {version.size} bytes, {version.digest[:12]}{fate})"
        )

    def _check_objects(self, version: Version, found: list[Sealed]) -> None:
        names = {shown(name) for name in version.names}
        for each in found:
            if each.folder != display(str(version.plan.path)) or each.path not in names:
                self._wrong(f"{self._describe(version)} is sealed as {each.folder}: {each.path}")
        if len(found) > 1:
            reason = self._why_more(version, len(found))
            if not reason:
                self._wrong(f"{self._describe(version)} was sealed {len(found)} times")
            self.twice[reason or "NO REASON"] += len(found) - 1

    def _why_more(self, version: Version, times: int) -> str:
        """Only what stays in clear may be sealed again: nothing but the queue knows it was."""
        if version.plan.after != "keep":
            return ""
        lost = sum(loss.at > version.made for loss in self._soak.losses)
        changed = version.touched + len(version.names) - 1
        if times > 1 + lost + changed:
            return ""
        return "kept, and the queue was lost" if lost else "kept, and renamed or given other times"

    def _category(
        self, version: Version, found: list[Sealed], here: list[Relative], aside: list[str]
    ) -> str:
        plan = version.plan
        outcome = plan.outcome(version.kind, version.format)
        if version.fate:
            if here:
                self._wrong(f"{self._describe(version)} came back")
            return "sealed" if found else "quarantined" if aside else "taken away"
        if aside:
            self._check_quarantine(version, outcome, aside)
            if here or found:
                self._wrong(f"{self._describe(version)} is in quarantine and elsewhere")
            return "quarantined"
        since = max(version.made, self._soak.seen_anew)
        if here and version.kind == "empty" and self._soak.stopped - since < GRACE:
            return "pending"
        if outcome in {"leave", "pass"} and here and not found:
            return "left" if outcome == "leave" else "passed over"
        if found and self._may_be_sealed(outcome, found):
            return self._sealed_category(version, here)
        if here:
            self._wrong(f"{self._describe(version)} still lies in its folder in clear")
            return "pending"
        if found:
            self._wrong(f"{self._describe(version)} was sealed, and the policy leaves it")
            return "sealed"
        self._wrong(f"LOST: {self._describe(version)}: no object, no file")
        return "lost"

    def _may_be_sealed(self, outcome: str, found: list[Sealed]) -> bool:
        # What the decoder could not be asked about is sealed, whatever it is. So is what was
        # written into a file that was claimed already, if a kill left it in the staging directory.
        return outcome in {"seal", "quarantine"} or all(
            each.label == "uninspected" or each.object_id in self._written_in_hand for each in found
        )

    def _sealed_category(self, version: Version, here: list[Relative]) -> str:
        after = version.plan.after
        if after == "keep":
            if not here:
                self._wrong(f"{self._describe(version)} was to be kept, and is not there")
            return "kept"
        if here:
            self._wrong(f"{self._describe(version)} is sealed and lies there in clear as well")
        if after == "move" and version.size and self._moved[version.digest] != 1:
            times = self._moved[version.digest]
            self._wrong(f"{self._describe(version)} was moved {times} times")
        return "sealed"

    def _check_quarantine(self, version: Version, outcome: str, aside: list[str]) -> None:
        kills = self._soak.kills
        for reason in aside:
            by_kills = "ended with the whole process" in reason and kills >= ATTEMPTS
            if outcome != "quarantine" and not by_kills:
                self._wrong(f"{self._describe(version)} is in quarantine: {reason}")

    def _refuse_strangers(self) -> None:
        known = {version.key for version in self._soak.ledger.versions}
        for key, found in self._by_key.items():
            if key not in known:
                self._wrong(f"object {found[0].object_id} ({found[0].path}) is no whole file")
        for (number, key), names in self._here.items():
            if key not in known:
                name = self._soak.plans[number].path.name
                self._wrong(f"{name}/{shown(names[0])}: nobody wrote this")
            elif len(names) > 1:
                self._wrong(f"{shown(names[0])} lies there more than once")

    # -- the service's own account ---------------------------------------------------------------

    def _compare_counters(self) -> None:
        """Since the queue was lost last, the service must have counted what the vault holds."""
        last = self._soak.losses[-1]
        logs = "".join(
            (self._soak.top / f"log-{number}").read_text(encoding="utf-8", errors="replace")
            for number in range(last.life, self._soak.lives)
        )
        _code, status = self._ask("status")
        reports = {folder["path"]: folder for folder in status.get("folders", ())}
        for plan in self._soak.plans:
            ours = [each for each in self.sealed.values() if each.folder == str(plan.path)]
            new = [each for each in ours if each.object_id not in last.objects]
            again = [e for e in ours if e.object_id in last.objects & last.claimed]
            replaced = [e for e in new if f"object {e.object_id} is there and proves" in logs]
            row = self.rows[plan.path.name]
            expected = {
                "sealed": len(new) + len(again) - len(replaced),
                "left": row["left"],
                "kept": row["kept"],
                "quarantined": row["quarantined"],
                "undeletable": 0,
                "queued": 0,
            }
            report = reports.get(str(plan.path), {})
            for what, count in expected.items():
                # An empty file may be on either side of its grace.
                slack = row["pending"] if what in {"left", "quarantined"} else 0
                if not count <= report.get(what, -1) <= count + slack:
                    self._wrong(
                        f"{plan.path.name}: the service counts {report.get(what)} {what},"
                        f" and there are {count}"
                    )
            since = [v for v in self._soak.ledger.versions if v.plan is plan and v.made > last.at]
            self.lines.append(
                f"{plan.path.name}: the service counts {report.get('vanished')} vanished since the"
                f" queue was new, and producers took {sum(bool(v.fate) for v in since)} away"
            )
            if again or replaced:
                self.lines.append(
                    f"{plan.path.name}: the counter 'sealed' has {len(again)} that were committed"
                    f" before the queue was lost, and not {len(replaced)} that changed in hand"
                )

    def _look_at_vaults(self) -> None:
        soak = self._soak
        for vault in (soak.site.vault, soak.top / "small" / "vault"):
            for name in os.listdir(vault / "tmp"):
                self._wrong(f"the vault {vault.name} holds tmp/{name}")

    def _look_at_logs(self) -> None:
        state = self._soak.site.state
        logs = [self._soak.top / f"log-{number}" for number in range(self._soak.lives)]
        for path in (*logs, state / "audit.log", state / "status.json"):
            text = path.read_text(encoding="utf-8", errors="replace")
            for word in ("Traceback", "a defect", MARK, "SCN_"):
                if word in text:
                    line = next(line for line in text.splitlines() if word in line)
                    self._wrong(f"{path.name} has {word!r}: {line[:300]}")

    def _audit(self) -> None:
        """Compare with the service's own record of what it sealed, which no kill may tear."""
        code, answer = self._ask("audit", "verify")
        self.lines.append(f"audit verify: exit {code}")
        if code:
            self._wrong(f"audit verify: exit {code}: {answer}")
        _code, entries = self._ask("audit", "show")
        recorded: dict[str, set[str]] = defaultdict(set)
        for entry in entries:
            recorded[entry["event"]].add(entry.get("object", ""))
        for object_id in recorded["sealed"] - self.sealed.keys():
            self._wrong(f"LOST: object {object_id} was sealed, says the audit log")
        for object_id in self.sealed.keys() - recorded["sealed"]:
            # Between commit and record only a kill ends it, and then only what stays is forgotten.
            in_place = self._plan_of(self.sealed[object_id]).after == "keep"
            if not (in_place and self._soak.kills and len(self._soak.losses) > 1):
                self._wrong(f"object {object_id} is not in the audit log")

    def _plan_of(self, found: Sealed) -> Plan:
        return next(p for p in self._soak.plans if display(str(p.path)) == found.folder)


def files_of(top: Path) -> Iterator[tuple[Relative, Path]]:
    root = os.fsencode(top)
    for parent, _folders, names in os.walk(root):
        for name in names:
            path = os.path.join(parent, name)
            yield os.path.relpath(path, root), Path(os.fsdecode(path))


# --- the report --------------------------------------------------------------------------------


def check_growth(soak: Soak) -> Iterator[str]:
    """Say how memory and descriptors went, one line for each life with enough to compare."""
    lives: dict[int, list[Sample]] = defaultdict(list)
    for sample in soak.samples:
        lives[sample.life].append(sample)
    for life, samples in lives.items():
        if len(samples) < 3:
            continue
        for what, unit in (("resident", 2**20), ("descriptors", 1), ("threads", 1)):
            values = [getattr(sample, what) for sample in samples]
            if not values[0]:
                continue
            first, last = values[0], values[-1]
            span = (samples[-1].at - samples[0].at) / 60
            series = " ".join(f"{value / unit:.{unit > 1:d}f}" for value in values)
            yield (
                f"life {life}, {len(values)} calm phases in {span:.1f} min:"
                f" {what} {series}{' MiB' if unit > 1 else ''}"
            )
            factor, extra = GROWTH
            limit = first * factor + extra if what == "resident" else first + MORE_FDS
            if last > limit:
                soak.violation(f"life {life}: {what} grew from {first} to {last}")


def report(soak: Soak, account: Account, seconds: float) -> str:
    growth = list(check_growth(soak))
    head = "{:<10}" + "{:>9}" + "{:>12}" * len(CATEGORIES) + "{:>7}\n"
    out = [f"seed {soak.settings.seed}, {seconds:.0f} s, {soak.lives} lives of the service\n\n"]
    out += [f"{count:>6}  {what}\n" for what, count in soak.notes.most_common()]
    out += ["\n", head.format("folder", "arrived", *CATEGORIES, "lost")]
    total: Counter[str] = Counter()
    for name, row in account.rows.items():
        out.append(head.format(name, row["arrived"], *(row[c] for c in CATEGORIES), row["lost"]))
        total += row
        if row["arrived"] != sum(row[c] for c in (*CATEGORIES, "lost")):
            soak.violation(f"{name}: the row does not add up")
    out.append(head.format("all", total["arrived"], *(total[c] for c in CATEGORIES), total["lost"]))
    ways = Counter(version.how for version in soak.ledger.versions)
    out.append("\nwritten: " + ", ".join(f"{n} {way}" for way, n in ways.most_common()) + "\n")
    out += [f"{count:>6}  {what}\n" for what, count in account.reasons.most_common()]
    out += [f"{count:>6}  sealed once more: {why}\n" for why, count in account.twice.items()]
    out.append(f"{len(account.sealed)} objects, each restored and compared\n")
    longest, middle = max(soak._calm_took), statistics.median(soak._calm_took)
    out.append(f"calm after {middle:.1f} s (median), {longest:.1f} s (longest)\n")
    out += [f"{line}\n" for line in (*growth, *account.lines)]
    out += [f"VIOLATION: {sentence}\n" for sentence in soak.violations]
    out.append(f"{len(soak.violations)} violations\n")
    return "".join(out)


def write_ledger(ledger: Ledger, path: Path) -> None:
    """Keep what was written, for whoever has to find out what became of one picture."""
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for each in ledger.versions:
            when = time.strftime("%H:%M:%S", time.localtime(each.noted))
            names = " -> ".join(map(shown, each.names))
            words = (when, each.plan.path.name, names, each.kind, each.format, each.how)
            file.write("\t".join((*words, each.fate, str(each.size), each.digest)) + "\n")


def run(settings: Settings) -> tuple[Soak, str]:
    """Do everything; gives the run, with its violations, and the report."""
    started = time.monotonic()
    soak = Soak(settings)
    try:
        soak.run()
        if settings.sabotage:
            SABOTAGE[settings.sabotage](soak)
        account = Account(soak)
        account.make()
        text = report(soak, account, time.monotonic() - started)
        write_ledger(soak.ledger, settings.top / "ledger.txt")
        (settings.top / "report.txt").write_text(text, encoding="utf-8", errors="backslashreplace")
    finally:
        soak.close()
    return soak, text


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=5.0)
    length.add_argument("--hours", type=float)
    parser.add_argument("--dir", type=Path, help="new directory for everything; it stays")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--rate", type=float, default=RATE, help="files in a second")
    parser.add_argument("--sabotage", choices=SABOTAGE, default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    top = given.dir or Path(tempfile.mkdtemp(prefix="soak-"))
    top.mkdir(exist_ok=True)
    seconds = (given.hours * 60 if given.hours is not None else given.minutes) * 60
    seed = given.seed if given.seed is not None else int.from_bytes(os.urandom(4), "big")
    # Told to end, it leaves nothing mounted either.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))
    settings = Settings(seconds, top.resolve(), seed, given.rate, given.sabotage)
    soak, text = run(settings)
    sys.stdout.write(text)
    if soak.violations:
        sys.stdout.write(f"everything lies in {top}\n")
        return 1
    if given.dir is None:
        shutil.rmtree(top)
    return 0


if __name__ == "__main__":
    sys.exit(main())
