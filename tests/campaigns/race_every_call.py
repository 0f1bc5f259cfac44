"""An adversary acts at every file-system call of a running `drain`, in every way it can.

``python tests/campaigns/race_every_call.py [--slice] [--variant NAME] [--action NAME]``
``python tests/campaigns/race_every_call.py --seconds 600 --seed 1``

A tracer stops the service before a call; the adversary does one thing, as a producer, as somebody
who shares the folder, or as an administrator; the run goes on to its end. Then whatever was damaged
around the service is repaired, and it runs again until nothing waits. The adversary keeps a ledger
of what exists after its own deed, in clear or as an object that opens. All of that has to exist at
once and in the end; no object may hold what no file ever held; nothing behind a link may change;
and what is left in clear is what the queue or the folder's status give a reason for.

What the documentation does not promise is counted apart, and only where the trace shows that it was
just that: a picture sealed in place, or one without a lease, that was written or swapped between
the last comparison and the unlink; an object that was changed after it was verified.

With ``--seconds`` the adversary is a process of its own, and the service a daemon that nobody
traces. The exit code is 1 on any violation.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import errno
import hashlib
import io
import json
import mmap
import os
import random
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the rig lies

from daemon import Daemon
from PIL import Image
from rig import STAGING, Rig, scratch

from secimg_watch import erase, kernel, pipeline, report, seal, settle, tracer, verify
from secimg_watch import explain as explaining
from secimg_watch.errors import NotReadyError, SecimgError
from secimg_watch.gate import check_keys
from secimg_watch.jobs import Jobs, State
from secimg_watch.keys import provider_for
from secimg_watch.policy import load_policy
from secimg_watch.quantities import Reserve
from secimg_watch.records import KeyEncryptionKey, ObjectId, Staged, Verified
from secimg_watch.seal import open_object
from secimg_watch.tracer import Call, Decision, Fail, Watch
from secimg_watch.vault import Vault, is_object_id

assert sys.platform == "linux", "system calls are traced on Linux only"

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

TARGET: Final = "b/1.jpg"
BYSTANDER: Final = "0.jpg"
SIZE: Final = 40_000
STORED: Final = 16_484  # where a mapping is stored to: in the second piece
PIECE: Final = 16_384  # so that a small picture is read in several pieces, and can be torn
NOBODY: Final = 65534
LINUX: Final = sys.platform == "linux"
ROOT: Final = LINUX and os.geteuid() == 0
HEAD: Final = b"\xff\xd8\xff\xe0\0\x10JFIF\0"
RUN_SECONDS: Final = 30.0
POLLS: Final = 20
ATTEMPTS: Final = 3  # threads make a run differ a little from the next
ROUNDS: Final = 9  # healthy runs; five attempts end in quarantine

Key: TypeAlias = tuple[int, str, str, int]
"""A place in a run: which thread, the call's name, what it is about, the how-manieth of these."""

Place: TypeAlias = Key | int
"""The same, or the how-manieth call of all that an adversary can care about."""


class VoidError(Exception):
    """There is nothing here that this could be done to."""


# --- variants ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """How the service is set up, and what of the system's help it has to do without."""

    name: str
    folder: dict[str, Any] = field(default_factory=dict)
    workers: int = 1
    leases: bool = True
    moves: bool = True  # whether a claim can be renamed into the staging directory
    decodes: bool = False
    user: str = ""  # "own": an ordinary user's files; "foreign": files of another user
    sample: int = 1  # every how-manieth place is tried

    @property
    def keeps(self) -> bool:
        return self.folder.get("after") == "keep"


QUIET: Final = {"proof": "quiet"}
DECODED: Final = {"not_image": "leave", "undecodable": "quarantine", "preview": 32}
MOVE: Final = {"after": "move:moved"}  # made absolute when the site is built

VARIANTS: Final = (
    Variant("leased"),
    Variant("unleased", QUIET, leases=False),
    Variant("in place", moves=False),
    Variant("in place unleased", QUIET, leases=False, moves=False),
    Variant("keep", {"after": "keep"}),
    Variant("keep unleased", {"after": "keep", **QUIET}, leases=False),
    Variant("move", MOVE),
    Variant("move unleased", {**MOVE, **QUIET}, leases=False),
    Variant("user", user="own"),
    Variant("foreign", QUIET, user="foreign"),
    Variant("two workers", workers=2, sample=5),
    Variant("inspected", DECODED, decodes=True, sample=5),
)


# --- the site ----------------------------------------------------------------------------------


@dataclass(slots=True)
class Site(Rig):
    """The rig's site, whose service may belong to another user."""

    uid: int | None = None
    owner: int = 0
    process: int = field(default_factory=os.getpid)
    ring: tuple[KeyEncryptionKey, ...] = ()
    vault_id: bytes = b""

    def _command(self, words: Sequence[str]) -> int:
        if self.uid is not None and os.getpid() != self.process and sys.platform != "win32":
            os.setgroups([])
            os.setresgid(self.uid, self.uid, self.uid)
            os.setresuid(self.uid, self.uid, self.uid)
        return Rig._command(self, words)

    @contextlib.contextmanager
    def in_its_name(self) -> Iterator[None]:
        """What is done here is done with the rights of the service's user."""
        if self.uid is None or sys.platform == "win32":
            yield
            return
        os.setegid(self.uid)
        os.seteuid(self.uid)
        try:
            yield
        finally:
            os.seteuid(0)
            os.setegid(0)

    @property
    def outside(self) -> Path:
        """Where the adversary puts things: on the folder's file system, and not watched."""
        return self.top / "outside"

    @property
    def aside(self) -> Path:
        """Where the adversary puts what is no picture: vault, queue."""
        return self.top / "aside"

    @property
    def moved(self) -> Path:
        """Where ``after: move`` puts plaintext."""
        return self.top / "moved"

    @property
    def canary(self) -> Path:
        """A tree that the service must never touch; it holds a file of the target's name."""
        return self.top / "canary"

    def arrange(self, pictures: dict[str, bytes]) -> None:
        """Everything as new, with these pictures; it all belongs to whom it should."""
        for path in (self.outside, self.moved, self.aside):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
        self.reset(pictures)
        if self.uid is None:
            return
        give(self.vault / "tmp", self.uid)
        self.state.mkdir(mode=0o700)
        give(self.state, self.uid)
        for path in (self.drop, *self.drop.rglob("*"), self.outside, self.moved):
            os.chown(path, self.owner, self.uid)
            os.chmod(path, 0o770 if path.is_dir() else 0o640)


def give(path: Path, uid: int) -> None:
    os.chown(path, uid, uid)


def build(top: Path, variant: Variant) -> Site:
    """Make a site for a variant below ``top``."""
    folder = dict(variant.folder)
    if "moved" in str(folder.get("after")):
        folder["after"] = f"move:{top / 'moved'}"
    site = Site(top, workers=variant.workers, folder=folder)
    (top / "moved").mkdir(parents=True)
    site.build()
    site.ring = provider_for("file", "a/b", file=top / "key").load_ring()
    site.vault_id = check_keys(Vault(site.vault, Reserve(0.0, 0)), site.ring).vault_id
    canary = site.canary / TARGET
    canary.parent.mkdir(parents=True)
    canary.write_bytes(HEAD + b"canary" * 100)
    if variant.user:
        top.parent.chmod(0o711)
        site.uid = NOBODY
        site.owner = NOBODY if variant.user == "own" else 0
        for path in (top, site.policy_path, top / "key", site.vault, *site.vault.rglob("*")):
            give(path, NOBODY)
    return site


def picture(size: int = SIZE, *, decodes: bool = False) -> bytes:
    """Bytes of its own behind a picture's signature, or behind a whole picture."""
    if not decodes:
        return HEAD + os.urandom(size)
    file = io.BytesIO()
    Image.frombytes("RGB", (8, 8), os.urandom(192)).save(file, "JPEG")
    return file.getvalue() + os.urandom(size - file.tell())


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


# --- what a call is about ----------------------------------------------------------------------

_BY_PATH: Final = frozenset(
    {"open", "stat", "lstat", "rename", "mkdir", "rmdir", "creat", "unlink", "chmod", "chown"}
    | {"truncate", "statfs", "link"}
)
_AT_PATH: Final = frozenset(
    {"openat", "mkdirat", "unlinkat", "newfstatat", "renameat", "renameat2", "linkat", "fchmodat"}
    | {"fchownat", "utimensat", "statx", "openat2"}
)
_HERE: Final = (1 << 32) - 100  # AT_FDCWD, as an unsigned register shows it
_SETLEASE: Final = 1024
_COMMANDS: Final = {
    (_SETLEASE): "F_SETLEASE",
    1025: "F_GETLEASE",
    1030: "fcntl:dup",
    **dict.fromkeys((1, 2, 3, 4, 10), "fcntl:flags"),
}
_OBJECT_ID: Final = re.compile(r"[0-9a-f]{32}")
_SHARD: Final = re.compile(r"objects/[0-9a-f]{2}")


def path_of(call: Call) -> str:
    """The path that a call is about, as good as can be known; "" where there is none."""
    try:
        if call.name in _BY_PATH:
            return os.fsdecode(call.text(0))
        if call.name in _AT_PATH:
            path = os.fsdecode(call.text(1)) if call.args[1] else ""
            if path.startswith("/") or call.args[0] & 0xFFFFFFFF == _HERE:
                return path
            return os.path.normpath(os.path.join(_descriptor(call), path))
        return _descriptor(call)
    except OSError:
        return ""


def _descriptor(call: Call) -> str:
    number = call.args[0] & 0xFFFFFFFF
    return os.readlink(f"/proc/{call.thread}/fd/{number}").removesuffix(" (deleted)")


@dataclass
class Namer:
    """Gives calls names that are the same in every run: object ids are numbered as they come."""

    top: str
    ids: dict[str, int] = field(default_factory=dict)
    counts: Counter[tuple[int, str, str]] = field(default_factory=Counter)
    threads: dict[int, int] = field(default_factory=dict)
    last: dict[int, str] = field(default_factory=dict)

    def key(self, call: Call) -> Key | None:
        """The place of a call in its run; ``None`` where it is about nothing of the site's."""
        path = path_of(call)
        if not path.startswith(self.top):
            return None
        path = self.short(path)
        name = call.name
        if name == "fcntl":
            name = _COMMANDS.get(call.args[1], name)
        elif name == "openat" and call.changes:
            name = "openat:create"
        thread = self._thread(call.thread)
        if path.startswith("state"):
            # Who has to wait for the queue asks again and again: counted since something else.
            path = f"{path} after {self.last.get(thread, 'start')}"
        else:
            self.last[thread] = f"{name} {path}"
        self.counts[thread, name, path] += 1
        return thread, name, path, self.counts[thread, name, path]

    def short(self, path: str) -> str:
        """A path below the top, with object ids as numbers."""
        path = path.removesuffix(" (deleted)").removeprefix(self.top).lstrip("/")
        return _OBJECT_ID.sub(self._number, _SHARD.sub("objects/..", path))

    def _thread(self, thread: int) -> int:
        """Which one it is in the order of their making; later ones have greater ids."""
        if thread not in self.threads:
            with contextlib.suppress(OSError):
                tasks = sorted(map(int, os.listdir(f"/proc/{thread}/task")))
                self.threads[thread] = tasks.index(thread)
        return self.threads.get(thread, -1)

    def _number(self, match: re.Match[str]) -> str:
        return f"<{self.ids.setdefault(match.group(), len(self.ids) + 1)}>"


def is_shown(key: Key) -> bool:
    """Whether a call touches what an adversary may change."""
    return key[2].startswith(("drop", "vault", "state", "moved", "outside"))


# --- the adversary -----------------------------------------------------------------------------


@dataclass
class Pending:
    """An open for writing that waits for the service's lease to go.

    Held by O_PATH, so that it is the inode that was found at first, whatever becomes of its
    name: just so a blocked open(2) goes on.
    """

    pin: int
    flags: int
    then: Callable[[int], None]
    claimed: bool


@dataclass
class Adversary:
    """What it can reach, what it knows to exist, and what it waits for."""

    site: Site
    variant: Variant
    wanted: set[str] = field(default_factory=set)
    complete: set[str] = field(default_factory=set)
    waiting: list[Pending] = field(default_factory=list)
    lost_writes: int = 0
    views: list[Path] = field(default_factory=list)
    vaults: list[Path] = field(default_factory=list)
    repairs: list[Callable[[], None]] = field(default_factory=list)
    kept_open: int = -1
    mapping: mmap.mmap | None = None
    mapping_was_used: bool = False
    ids: list[str] = field(default_factory=list)
    spare: bytes = b""  # a valid object of the vault, with other content
    damaged: list[tuple[Path, int]] = field(default_factory=list)
    """Which object of the vault, and from which offset on."""
    planted: list[tuple[Path, bytes]] = field(default_factory=list)
    known: dict[tuple[int, int], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        site = self.site
        self.views += [site.drop, site.outside, site.moved]
        self.vaults += [site.vault, site.aside / "vault"]

    # -- what there is -------------------------------------------------------------------------

    @property
    def target(self) -> Path:
        """The picture's own name, unless that leads behind a link by now."""
        if (self.site.drop / TARGET).parent.is_symlink():
            raise VoidError
        return self.site.drop / TARGET

    @property
    def staging(self) -> Path:
        return self.site.drop / STAGING

    def staged(self) -> Path:
        """The target under its claim."""
        for path in self.staging.glob(f"{'[0-9a-f]' * 32}/{TARGET}"):
            return path
        raise VoidError

    def temporary(self) -> Path:
        """The target's or the bystander's object while it is being made."""
        for path in sorted((self.site.vault / "tmp").glob("*.simg")):
            return path
        raise VoidError

    def final(self) -> Path:
        """An object under its final name."""
        for path in sorted(self.site.vault.glob("objects/??/*.simg")):
            return path
        raise VoidError

    def plain(self) -> dict[Path, str]:
        """All that lies in clear, wherever the adversary or the service put it."""
        found = {}
        for view in self.views:
            for parent, _folders, names in os.walk(view):
                for name in names:
                    path = Path(parent, name)
                    with contextlib.suppress(FileNotFoundError):
                        status = path.lstat()
                        if stat.S_ISREG(status.st_mode):
                            found[path] = self._digest(path, status)
        return found

    def _digest(self, path: Path, status: os.stat_result) -> str:
        node = status.st_dev, status.st_ino
        with contextlib.suppress(PermissionError):  # its rights were taken: as it was before
            self.known[node] = digest(path.read_bytes())
        return self.known.get(node, "?")

    def sealed(self) -> tuple[dict[str, str], list[str]]:
        """What each object holds by its id, and what is wrong with those that do not open."""
        found: dict[str, str] = {}
        broken = []
        ring, vault_id = self.site.ring, self.site.vault_id
        for path in (path for vault in self.vaults for path in vault.glob("objects/??/*.simg")):
            object_id = ObjectId(path.stem)
            try:
                with path.open("rb") as stream:
                    opened = open_object(stream, ring, expect=object_id, vault_id=vault_id)
                    opened.preview()
                    found[object_id] = digest(b"".join(map(bytes, opened.body())))
            except (SecimgError, OSError) as error:
                broken.append(f"{object_id}: {error}")
        return found, broken

    def existing(self) -> set[str]:
        return {*self.plain().values(), *self.sealed()[0].values()}

    def note(self) -> None:
        """Whatever lies in clear now is the full content of a file, and may be sealed."""
        self.complete.update(self.plain().values())

    def take_stock(self) -> None:
        """After a deed of its own: what exists now has to exist from now on."""
        self.note()
        self.wanted = self.existing()
        there = [path for path, _ in self.planted if path.exists()]
        self.planted = [(path, path.read_bytes()) for path in there]

    # -- what it does --------------------------------------------------------------------------

    def fresh(self, size: int = SIZE) -> bytes:
        return picture(size, decodes=self.variant.decodes)

    def write(self, path: Path, content: bytes) -> None:
        """Make a whole new file, as the folder's producer would."""
        path.write_bytes(content)
        self.own(path)

    def own(self, path: Path) -> None:
        if self.site.uid is not None:
            os.chown(path, self.site.owner, self.site.uid, follow_symlinks=False)
            if not path.is_symlink():
                os.chmod(path, 0o770 if path.is_dir() else 0o640)

    def part(self, content: bytes | None = None) -> Path:
        """A whole new file beside the folder, to be renamed into it."""
        path = self.site.outside / os.urandom(4).hex()
        self.write(path, self.fresh() if content is None else content)
        return path

    def open_for_writing(self, path: Path, then: Callable[[int], None], flags: int = 0) -> None:
        """Open, wait as long as the kernel makes it wait, write, close."""
        try:
            pin = os.open(path, os.O_PATH | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise VoidError from None
        self.waiting.append(Pending(pin, flags, then, path.is_relative_to(self.staging)))
        self.go_on()

    def go_on(self) -> bool:
        """Try again what was blocked; whether something went through."""
        still = []
        for each in self.waiting:
            flags = each.flags | os.O_WRONLY | os.O_NONBLOCK
            try:
                fd = os.open(f"/proc/self/fd/{each.pin}", flags)
            except BlockingIOError:
                still.append(each)
                continue
            try:
                each.then(fd)
                # Who opens a claimed file has the service's own rights, and no name to write to.
                self.lost_writes += os.fstat(fd).st_nlink == 0 and not each.claimed
            finally:
                os.close(fd)
                os.close(each.pin)
        went = len(still) < len(self.waiting)
        self.waiting = still
        return went

    def close(self) -> None:
        """Let go of everything, and undo what was done around the service."""
        for each in self.waiting:
            os.close(each.pin)
        self.waiting = []
        if self.mapping is not None:
            self.mapping.close()
            self.mapping = None
        if self.kept_open >= 0:
            os.close(self.kept_open)
            self.kept_open = -1

    def repair(self) -> None:
        for act in reversed(self.repairs):
            act()
        self.repairs = []


@dataclass(frozen=True)
class Action:
    """One thing that an adversary may do."""

    name: str
    act: Callable[[Adversary], None]
    group: str
    needs: str = ""  # "name", "staged", "tmp", "object": what has to be there
    root: bool = False
    damages: bool = False  # an object, behind the service's back
    prepare: Callable[[Adversary], None] | None = None


ACTIONS: Final[dict[str, Action]] = {}

Step: TypeAlias = tuple[Action, Place]


def action(
    group: str, **options: Any
) -> Callable[[Callable[[Adversary], None]], Callable[[Adversary], None]]:
    def register(act: Callable[[Adversary], None]) -> Callable[[Adversary], None]:
        name = act.__name__.replace("_", " ")
        ACTIONS[name] = Action(name, act, group, **options)
        return act

    return register


# -- the picture in hand


@action("picture")
def replace(a: Adversary) -> None:
    put(a, a.part())


def put(a: Adversary, path: Path) -> None:
    try:
        path.rename(a.target)
    except (FileNotFoundError, NotADirectoryError):
        raise VoidError from None


@action("picture", needs="name")
def replace_with_size_and_times(a: Adversary) -> None:
    """Nothing but inode and time of change tells the new file from the old."""
    status = a.target.stat()
    path = a.part(a.fresh(status.st_size - len(HEAD)))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    put(a, path)


@action("picture", needs="name")
def append(a: Adversary) -> None:
    def write(fd: int) -> None:
        os.write(fd, os.urandom(3_000))
        a.note()
        os.write(fd, os.urandom(20_000))

    a.open_for_writing(a.target, write, os.O_APPEND)


@action("picture", needs="name")
def truncate_and_rewrite(a: Adversary) -> None:
    def write(fd: int) -> None:
        new = a.fresh(SIZE + 5_000)
        a.note()
        os.write(fd, new[:20_000])
        a.note()
        os.write(fd, new[20_000:])

    a.open_for_writing(a.target, write, os.O_TRUNC)


def scribble(fd: int) -> None:
    """Change bytes of the first, the second and the last piece, in one instant each."""
    for offset in (100, PIECE + 100, SIZE - 100):
        os.pwrite(fd, os.urandom(64), offset)


@action("picture", needs="name")
def overwrite(a: Adversary) -> None:
    a.open_for_writing(a.target, lambda fd: all_at_once(a, fd))


def all_at_once(a: Adversary, fd: int) -> None:
    for offset in (100, PIECE + 100, SIZE - 100):
        os.pwrite(fd, os.urandom(64), offset)
        a.note()


@action("picture", needs="name")
def overwrite_and_set_times_back(a: Adversary) -> None:
    status = a.target.stat()

    def write(fd: int) -> None:
        all_at_once(a, fd)
        os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns))

    a.open_for_writing(a.target, write)


@action("picture", needs="name")
def shorten(a: Adversary) -> None:
    a.open_for_writing(a.target, lambda fd: os.ftruncate(fd, SIZE // 2))


@action("picture", needs="name")
def open_and_close(a: Adversary) -> None:
    a.open_for_writing(a.target, lambda _fd: None)


@action("picture", needs="name")
def rename_away(a: Adversary) -> None:
    a.target.rename(a.site.outside / "away.jpg")


@action("picture", needs="name")
def rename_away_and_back(a: Adversary) -> None:
    away = a.target.rename(a.site.outside / "away.jpg")
    away.rename(a.target)


@action("picture", needs="name")
def rename_within(a: Adversary) -> None:
    a.target.rename(a.target.with_name("renamed.jpg"))


@action("picture", needs="name")
def rename_to_temporary(a: Adversary) -> None:
    a.target.rename(a.target.with_name("1.jpg.part"))


@action("picture", needs="name")
def unlink(a: Adversary) -> None:
    a.target.unlink()


@action("picture", needs="name")
def unlink_and_write(a: Adversary) -> None:
    a.target.unlink()
    a.write(a.target, a.fresh())


@action("picture")
def write_under_the_name(a: Adversary) -> None:
    """Where the picture was claimed its name is free: an arrival like any other."""
    if a.target.exists():
        raise VoidError
    a.write(a.target, a.fresh())


@action("picture", needs="name")
def swap_with_bystander(a: Adversary) -> None:
    other = a.site.drop / BYSTANDER
    if not other.exists():
        raise VoidError
    away = other.rename(a.site.outside / "swap.jpg")
    a.target.rename(other)
    away.rename(a.target)


@action("picture", needs="name")
def hard_link_within(a: Adversary) -> None:
    a.target.with_name("second.jpg").hardlink_to(a.target)


@action("picture", needs="name")
def hard_link_outside(a: Adversary) -> None:
    (a.site.outside / "second.jpg").hardlink_to(a.target)


@action("picture", needs="name")
def symlink_to_canary(a: Adversary) -> None:
    a.target.rename(a.site.outside / "away.jpg")
    a.target.symlink_to(a.site.canary / TARGET)
    a.own(a.target)


@action("picture", needs="name")
def directory_in_its_place(a: Adversary) -> None:
    a.target.rename(a.site.outside / "away.jpg")
    a.target.mkdir()
    a.own(a.target)
    a.write(a.target / "inner.jpg", a.fresh())


@action("picture", needs="name")
def fifo_in_its_place(a: Adversary) -> None:
    a.target.rename(a.site.outside / "away.jpg")
    os.mkfifo(a.target)


@action("picture", needs="name")
def chmod_000(a: Adversary) -> None:
    a.target.chmod(0)


@action("picture", needs="name", root=True)
def chown(a: Adversary) -> None:
    os.chown(a.target, 1234, 1234)


@action("picture", needs="name", root=True)
def chown_and_chmod_000(a: Adversary) -> None:
    os.chown(a.target, 1234, 1234)
    a.target.chmod(0)


@action("picture", needs="name")
def utime(a: Adversary) -> None:
    os.utime(a.target, ns=(10**18, 10**18))


def hold_open(a: Adversary) -> None:
    a.kept_open = os.open(a.target, os.O_RDWR)


def through_the_open_descriptor(a: Adversary, write: Callable[[int], None]) -> None:
    if a.kept_open < 0:
        raise VoidError
    write(a.kept_open)
    a.lost_writes += os.fstat(a.kept_open).st_nlink == 0


@action("picture", prepare=hold_open)
def write_to_a_descriptor_kept_open(a: Adversary) -> None:
    through_the_open_descriptor(a, lambda fd: all_at_once(a, fd))


@action("picture", prepare=hold_open)
def append_to_a_descriptor_kept_open_and_close(a: Adversary) -> None:
    def write(fd: int) -> None:
        os.pwrite(fd, os.urandom(9_000), SIZE)

    through_the_open_descriptor(a, write)
    os.close(a.kept_open)
    a.kept_open = -1


def hold_mapped(a: Adversary) -> None:
    hold_open(a)
    a.mapping = mmap.mmap(a.kept_open, 0)
    # Later stores into a page that is dirty already leave the file's times as they are.
    a.mapping[STORED : STORED + 64] = os.urandom(64)
    a.take_stock()


@action("picture", prepare=hold_mapped)
def store_through_a_mapping(a: Adversary) -> None:
    def store(_fd: int) -> None:
        assert a.mapping is not None
        a.mapping_was_used = True
        a.mapping[STORED : STORED + 64] = os.urandom(64)

    through_the_open_descriptor(a, store)


# -- the folder


@action("folder")
def sub_folder_away(a: Adversary) -> None:
    (a.site.drop / "b").rename(a.site.outside / "b")


@action("folder")
def sub_folder_away_and_back(a: Adversary) -> None:
    away = (a.site.drop / "b").rename(a.site.outside / "b")
    away.rename(a.site.drop / "b")


@action("folder")
def sub_folder_renamed(a: Adversary) -> None:
    (a.site.drop / "b").rename(a.site.drop / "c")


@action("folder")
def sub_folder_becomes_link_to_canary(a: Adversary) -> None:
    (a.site.drop / "b").rename(a.site.outside / "b")
    (a.site.drop / "b").symlink_to(a.site.canary / "b")


@action("folder")
def sub_folder_becomes_another(a: Adversary) -> None:
    (a.site.drop / "b").rename(a.site.outside / "b")
    (a.site.drop / "b").mkdir()
    a.own(a.site.drop / "b")
    a.write(a.target, a.fresh())


@action("folder")
def sub_folder_moved_into_staging(a: Adversary) -> None:
    if not a.staging.exists():
        raise VoidError
    (a.site.drop / "b").rename(a.staging / "b")


@action("folder")
def root_becomes_another(a: Adversary) -> None:
    a.site.drop.rename(a.site.outside / "drop")
    a.site.drop.mkdir()
    a.own(a.site.drop)
    a.write(a.site.drop / "new.jpg", a.fresh())


@action("folder")
def root_away_for_now(a: Adversary) -> None:
    away = a.site.drop.rename(a.site.outside / "drop")
    a.repairs.append(lambda: back(away, a.site.drop))


def back(path: Path, target: Path) -> None:
    """Put something back; what lies there meanwhile goes beside it."""
    if target.exists():
        target.rename(target.with_name(f"outside/{os.urandom(4).hex()}"))
    path.rename(target)


@action("folder")
def root_away_and_back(a: Adversary) -> None:
    away = a.site.drop.rename(a.site.outside / "drop")
    away.rename(a.site.drop)


@action("folder")
def root_replaced_for_now(a: Adversary) -> None:
    away = a.site.drop.rename(a.site.outside / "drop")
    a.site.drop.mkdir()
    a.own(a.site.drop)
    a.write(a.site.drop / "new.jpg", a.fresh())

    def merge() -> None:
        for each in list(a.site.drop.iterdir()):
            if each.name != STAGING:
                each.rename(away / each.name)
        a.site.drop.rename(a.site.outside / "other")
        away.rename(a.site.drop)

    a.repairs.append(merge)


def mount(where: Path) -> None:
    call_libc("mount", b"none", os.fsencode(where), b"tmpfs", 0, b"mode=0777")


def unmount(where: Path) -> None:
    call_libc("umount2", os.fsencode(where), 2)


def call_libc(name: str, *arguments: object) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def mount_over(a: Adversary, where: Path, fill: Callable[[], None]) -> None:
    if not has_private_mounts():
        raise VoidError
    below = os.open(where, os.O_PATH)
    seen_in = a.vaults if where == a.site.vault else a.views
    seen_in.append(Path(f"/proc/self/fd/{below}"))
    mount(where)
    fill()

    def undo() -> None:
        for path in list(where.iterdir()):  # what came there would go with the mount
            if path.is_file():
                shutil.copy(path, a.site.outside / path.name)
        unmount(where)
        os.close(below)
        seen_in.pop()

    a.repairs.append(undo)


@action("folder", root=True)
def root_mounted_over(a: Adversary) -> None:
    mount_over(a, a.site.drop, lambda: None)


@action("folder", root=True)
def sub_folder_mounted_over(a: Adversary) -> None:
    if not (a.site.drop / "b").is_dir():
        raise VoidError
    mount_over(a, a.site.drop / "b", lambda: None)


_private: list[bool] = []


def has_private_mounts() -> bool:
    """Whether this process has mounts of its own, which it takes once."""
    if not _private:
        try:
            call_libc("unshare", 0x20000)  # CLONE_NEWNS
            call_libc("mount", b"none", b"/", None, 0x4000 | 1 << 18, None)  # private, all below
            _private.append(True)
        except OSError:
            _private.append(False)
    return _private[0]


@action("folder")
def name_taken_in_the_move_directory(a: Adversary) -> None:
    path = a.site.moved / TARGET
    if not moves_plaintext(a) or path.exists():
        raise VoidError
    path.parent.mkdir(exist_ok=True)
    a.own(path.parent)
    a.write(path, a.fresh())


def moves_plaintext(a: Adversary) -> bool:
    return "move" in str(a.variant.folder.get("after"))


@action("folder")
def move_directory_becomes_link_to_canary(a: Adversary) -> None:
    path = a.site.moved / "b"
    if not moves_plaintext(a) or path.exists():
        raise VoidError
    path.symlink_to(a.site.canary / "b")
    a.repairs.append(path.unlink)


# -- what is the service's own


def flip(a: Adversary, path: Path, offset: int) -> None:
    """Change one byte in place, with the file's times as they were."""
    status = path.stat()
    if not status.st_size:
        raise VoidError
    offset = min(offset, status.st_size - 1) if offset >= 0 else status.st_size + offset
    a.damaged.append((path, offset))
    path.chmod(0o600)
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    path.chmod(stat.S_IMODE(status.st_mode))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@action("own", needs="tmp")
def temporary_object_deleted(a: Adversary) -> None:
    a.temporary().unlink()


@action("own", needs="tmp", damages=True)
def temporary_object_flipped_in_the_header(a: Adversary) -> None:
    flip(a, a.temporary(), 20)


@action("own", needs="tmp", damages=True)
def temporary_object_flipped_at_its_end(a: Adversary) -> None:
    flip(a, a.temporary(), -1)


@action("own", needs="tmp", damages=True)
def temporary_object_cut(a: Adversary) -> None:
    path = a.temporary()
    size = path.stat().st_size // 2
    path.chmod(0o600)
    os.truncate(path, size)
    path.chmod(0o400)
    a.damaged.append((path, size))


@action("own", needs="tmp", damages=True)
def temporary_object_replaced_by_a_valid_one(a: Adversary) -> None:
    path = a.temporary()
    path.unlink()
    path.write_bytes(a.spare)
    own_object(a, path)
    a.damaged.append((path, -1))


def own_object(a: Adversary, path: Path) -> None:
    path.chmod(0o400)
    if a.site.uid is not None:
        give(path, a.site.uid)


@action("own", needs="staged")
def garbage_under_the_final_name(a: Adversary) -> None:
    plant(a, b"not an object")


@action("own", needs="staged")
def another_object_under_the_final_name(a: Adversary) -> None:
    plant(a, a.spare)


def plant(a: Adversary, content: bytes) -> None:
    object_id = a.staged().relative_to(a.staging).parts[0]
    path = a.site.vault / "objects" / object_id[:2] / f"{object_id}.simg"
    if path.exists():
        raise VoidError
    path.write_bytes(content)
    own_object(a, path)
    a.planted.append((path, content))


@action("own", needs="object", damages=True)
def object_flipped(a: Adversary) -> None:
    flip(a, a.final(), -1)


@action("own", needs="object", damages=True)
def object_deleted(a: Adversary) -> None:
    path = a.final()
    path.unlink()
    a.damaged.append((path, -1))


@action("own", needs="object")
def object_hidden_for_now(a: Adversary) -> None:
    path = a.final()
    hidden = a.site.aside / path.relative_to(a.site.top)
    hidden.parent.mkdir(parents=True)
    path.rename(hidden)
    a.repairs.append(lambda: restore(hidden, path))


@action("own", needs="staging")
def staging_deleted(a: Adversary) -> None:
    shutil.rmtree(a.staging)


@action("own", needs="staging")
def staging_away(a: Adversary) -> None:
    a.staging.rename(a.site.outside / "staging")


@action("own", needs="staging")
def staging_away_for_now(a: Adversary) -> None:
    away = a.staging.rename(a.site.outside / "staging")
    a.repairs.append(lambda: restore_staging(a, away))


def restore_staging(a: Adversary, away: Path) -> None:
    if a.staging.exists():
        a.staging.rename(a.site.outside / "staging made anew")
    away.rename(a.staging)


@action("own", needs="staging")
def staging_away_and_back(a: Adversary) -> None:
    away = a.staging.rename(a.site.outside / "staging")
    away.rename(a.staging)


@action("own", needs="staging")
def staging_becomes_a_link(a: Adversary) -> None:
    away = a.staging.rename(a.site.outside / "staging")
    a.staging.symlink_to(a.site.canary)

    def undo() -> None:
        a.staging.unlink()
        restore_staging(a, away)

    a.repairs.append(undo)


@action("own", needs="staged")
def claim_renamed(a: Adversary) -> None:
    parts = a.staged().relative_to(a.staging).parts
    (a.staging / parts[0]).rename(a.staging / os.urandom(16).hex())


@action("own", needs="staged")
def claim_given_back(a: Adversary) -> None:
    if a.target.exists() or not a.target.parent.is_dir():
        raise VoidError
    a.staged().rename(a.target)


@action("own", needs="staged")
def claimed_file_corrupted(a: Adversary) -> None:
    a.open_for_writing(a.staged(), lambda fd: all_at_once(a, fd))


@action("own", needs="staged")
def claimed_file_corrupted_and_times_set_back(a: Adversary) -> None:
    path = a.staged()
    status = path.stat()

    def write(fd: int) -> None:
        all_at_once(a, fd)
        os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns))

    a.open_for_writing(path, write)


@action("own", needs="staged")
def claimed_file_appended_to(a: Adversary) -> None:
    def write(fd: int) -> None:
        os.write(fd, os.urandom(99))

    a.open_for_writing(a.staged(), write, os.O_APPEND)


@action("own", needs="staged")
def claimed_file_cut(a: Adversary) -> None:
    a.open_for_writing(a.staged(), lambda fd: os.ftruncate(fd, SIZE // 3))


@action("own", needs="staged")
def claimed_file_replaced(a: Adversary) -> None:
    a.part().rename(a.staged())


@action("own", needs="staged")
def claimed_file_replaced_with_size_and_times(a: Adversary) -> None:
    path = a.staged()
    status = path.stat()
    part = a.part(a.fresh(status.st_size - len(HEAD)))
    os.utime(part, ns=(status.st_atime_ns, status.st_mtime_ns))
    part.rename(path)


@action("own", needs="staged")
def claimed_file_deleted(a: Adversary) -> None:
    a.staged().unlink()


@action("own", needs="staged")
def claimed_file_linked(a: Adversary) -> None:
    (a.site.outside / "second.jpg").hardlink_to(a.staged())


@action("own", needs="staged")
def claimed_file_becomes_a_link(a: Adversary) -> None:
    path = a.staged()
    path.rename(a.site.outside / "away.jpg")
    path.symlink_to(a.site.canary / TARGET)


@action("own", needs="staged")
def claimed_file_chmod_000(a: Adversary) -> None:
    a.staged().chmod(0)


@action("own", needs="staged")
def stranger_beside_the_claimed_file(a: Adversary) -> None:
    a.write(a.staged().with_name("stranger.jpg"), a.fresh())


@action("state")
def queue_deleted(a: Adversary) -> None:
    for path in queue_files(a):
        path.unlink()


def queue_files(a: Adversary) -> list[Path]:
    found = list(a.site.state.glob("queue.sqlite*"))
    if not found:
        raise VoidError
    return found


@action("state")
def queue_log_deleted(a: Adversary) -> None:
    for path in queue_files(a):
        if path.suffix != ".sqlite":
            path.unlink()


@action("state")
def queue_filled_with_garbage(a: Adversary) -> None:
    for path in queue_files(a):
        if path.suffix == ".sqlite":
            path.write_bytes(os.urandom(8192))


@action("state")
def queue_emptied(a: Adversary) -> None:
    for path in queue_files(a):
        if path.suffix == ".sqlite":
            os.truncate(path, 0)


@action("state")
def state_directory_away(a: Adversary) -> None:
    if not a.site.state.exists():
        raise VoidError
    a.site.state.rename(a.site.aside / "state")
    remake_state(a)


def remake_state(a: Adversary) -> None:
    if a.site.uid is not None:  # its parent is not the service's to write
        a.site.state.mkdir(mode=0o700)
        give(a.site.state, a.site.uid)


@action("state")
def queue_from_before(a: Adversary) -> None:
    """What a restored backup looks like: rows of before, names and numbers that exist again."""
    names = queue_files(a)
    copies = {path: path.read_bytes() for path in names}

    def put_back() -> None:
        for path in a.site.state.glob("queue.sqlite*"):
            path.unlink()
        for path, content in copies.items():
            if not path.name.endswith("-shm"):
                path.write_bytes(content)
                if a.site.uid is not None:
                    give(path, a.site.uid)

    a.repairs.append(put_back)


@action("vault")
def vault_away_for_now(a: Adversary) -> None:
    away = a.site.vault.rename(a.site.aside / "vault")
    a.repairs.append(lambda: put_vault_back(a, away))


def put_vault_back(a: Adversary, away: Path) -> None:
    if a.site.vault.exists():
        a.site.vault.rename(a.site.aside / "vault of meanwhile")
    away.rename(a.site.vault)


@action("vault")
def vault_away_and_back(a: Adversary) -> None:
    away = a.site.vault.rename(a.site.aside / "vault")
    away.rename(a.site.vault)


@action("vault")
def vault_replaced_by_nothing_for_now(a: Adversary) -> None:
    """The directory below an unmounted disk, with all that a careless program would need."""
    away = a.site.vault.rename(a.site.aside / "vault")
    for path in away.rglob("*"):
        if path.is_dir():
            (a.site.vault / path.relative_to(away)).mkdir(parents=True)
    for path in (a.site.vault, *a.site.vault.rglob("*")):
        if a.site.uid is not None:
            give(path, a.site.uid)
    a.repairs.append(lambda: put_vault_back(a, away))


@action("vault", root=True)
def vault_mounted_over_for_now(a: Adversary) -> None:
    mount_over(a, a.site.vault, lambda: None)


@action("vault", damages=True)
def vault_emptied(a: Adversary) -> None:
    """All objects are gone, and so are the directories; the vault file is there."""
    shutil.rmtree(a.site.vault / "objects")
    a.damaged.append((a.site.vault / "objects", -1))

    def remake() -> None:
        for number in range(256):
            path = a.site.vault / "objects" / f"{number:02x}"
            path.mkdir(parents=True, exist_ok=True)
            if a.site.uid is not None:
                give(path, a.site.uid)
                give(path.parent, a.site.uid)

    a.repairs.append(remake)


@action("vault")
def temporary_directory_deleted(a: Adversary) -> None:
    path = a.site.vault / "tmp"
    if not path.exists():
        raise VoidError
    shutil.rmtree(path)


@action("vault")
def vault_file_hidden_for_now(a: Adversary) -> None:
    path = a.site.vault / "vault.json"
    hidden = path.rename(path.with_name("hidden"))
    a.repairs.append(lambda: restore(hidden, path))


def restore(away: Path, path: Path) -> None:
    away.rename(path)


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
        if call.name == "fcntl" and call.args[1] == _SETLEASE:
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


def in_clear(a: Adversary, plain: dict[Path, str], sealed: set[str]) -> Iterator[str]:
    """What lies in clear in the folder without a reason that somebody can look up."""
    site = a.site
    queue = Jobs(site.state / "queue.sqlite")
    with contextlib.closing(queue), site.in_its_name():
        policy = load_policy(site.policy_path)
        rows = {row.object_id: row for row in queue.rows()}
        told = report.read(site.state)
        passed = told.folders[0].passed if told is not None else {}
        for path, content in plain.items():
            if not path.is_relative_to(site.drop):
                continue
            relpath = path.relative_to(site.drop)
            if relpath.parts[0] == STAGING:
                claim = next((part for part in relpath.parts if is_object_id(part)), "")
                row = rows.get(ObjectId(claim))
                rests = row is not None and row.state is State.QUARANTINED and row.reason
                if not rests and (claim or not passed.get("staging")):
                    state = f"{row.state}: {row.reason}" if row else "no row"
                    yield f"in clear in the staging directory: {relpath} ({state})"
                continue
            answer = explaining.explain(str(path), policy, queue, lambda _f, _r: None)
            resting = {"left", "quarantined", "ignored"}
            if answer.verdict in {"kept", "undeletable"}:
                if content not in sealed:
                    yield f"in clear, said to be sealed, and not sealed: {relpath} ({answer})"
            elif answer.verdict not in resting or not answer.reason:
                yield f"in clear: {relpath} ({answer.verdict}: {answer.reason})"


def describe(tree: Path) -> list[tuple[str, int, int, int, int, str]]:
    """Everything that can be told of a tree, in order."""
    found = []
    for path in (tree, *sorted(tree.rglob("*"))):
        status = path.lstat()
        content = digest(path.read_bytes()) if path.is_file() else ""
        times = 0 if path.is_dir() else status.st_ctime_ns
        found.append((str(path), status.st_ino, status.st_mode, status.st_mtime_ns, times, content))
    return found


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
            results = [attack(site, variant, [(deed, key)], spare) for key in keys]
        if not any(result.faults for result in results):
            table.violate(f"not found: {each.deed} without {each.name}")


TURNING_POINTS: Final = frozenset(
    {"F_SETLEASE", "F_GETLEASE", "renameat", "renameat2", "unlinkat", "openat:create", "read"}
    | {"newfstatat", "fadvise64", "preadv2", "mkdirat", "fsync"}
)
SLICE: Final = 16  # runs of each variant


# --- a real daemon, and an adversary that does not wait for it ---------------------------------

RANDOM_VARIANTS: Final = ("leased", "keep", "move", "in place", "foreign", "inspected")
NAMES: Final = tuple(f"{folder}{number}.jpg" for folder in ("", "b/") for number in range(4))
_EXCHANGE: Final = 2
_NO_REPLACE: Final = 1


def rename_with(flag: int, source: Path, target: Path) -> None:
    source_name, target_name = os.fsencode(source), os.fsencode(target)
    call_libc("renameat2", -100, source_name, -100, target_name, flag)


@dataclass
class Hammer:
    """The adversary as a process of its own: one random thing after another.

    It knows exactly what it destroyed: a file is taken out of the folder by one rename, and only
    then looked at and deleted; what is written to was read through the same descriptor.
    """

    drop: Path
    outside: Path
    canary: Path
    rng: random.Random
    decodes: bool
    wanted: set[str] = field(default_factory=set)
    complete: set[str] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)
    history: list[str] = field(default_factory=list)

    def run(self, seconds: float) -> None:
        deeds = [
            *[self.put, self.away_and_back, self.append, self.overwrite, self.rewrite] * 2,
            *[self.remove, self.link, self.symlink, self.touch, self.swap],
            *[self.folder_away, self.root_away],
        ]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            # Right after its arrival: a moment later it is sealed.
            path = self.drop / self.rng.choice(NAMES)
            for deed in (self.put, *self.rng.sample(deeds, self.rng.randrange(4))):
                try:
                    deed(path)
                    self.counts[deed.__name__] += 1
                except (FileNotFoundError, NotADirectoryError, PermissionError):
                    self.counts["void"] += 1
                self.pause()

    def pause(self) -> None:
        time.sleep(self.rng.choice((0, 0, 0.0005, 0.001, 0.003, 0.005, 0.008, 0.012, 0.02)))

    def aside(self) -> Path:
        return self.outside / os.urandom(6).hex()

    def fresh(self) -> tuple[Path, str]:
        content = picture(self.rng.choice((SIZE, 200_000, 3_000_000)), decodes=self.decodes)
        path = self.aside()
        path.write_bytes(content)
        return path, digest(content)

    def note(self, content: str, what: str) -> None:
        self.history.append(f"{time.monotonic():.4f} {content} {what}")

    def destroy(self, path: Path) -> None:
        """Delete what was taken out of the folder."""
        gone = digest(path.read_bytes())
        path.unlink()
        self.wanted.discard(gone)
        self.note(gone, "destroyed")

    def arrive(self, content: str, what: str) -> None:
        self.complete.add(content)
        self.wanted.add(content)
        self.note(content, what)

    def give_back(self, away: Path, path: Path) -> None:
        with contextlib.suppress(FileExistsError):  # it stays outside then, and exists
            rename_with(_NO_REPLACE, away, path)

    def put(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        part, content = self.fresh()
        self.complete.add(content)
        for _ in range(100):
            try:
                rename_with(_EXCHANGE, part, path)
            except FileNotFoundError:
                try:
                    rename_with(_NO_REPLACE, part, path)
                except FileExistsError:
                    continue
                self.arrive(content, f"put as {path.name}")
                return
            self.arrive(content, f"put over {path.name}")
            if part.is_symlink() or part.is_dir():
                shutil.move(part, self.aside())
            else:
                self.destroy(part)
            return

    def remove(self, path: Path) -> None:
        away = self.aside()
        path.rename(away)
        if not away.is_symlink():
            self.destroy(away)

    def away_and_back(self, path: Path) -> None:
        away = self.aside()
        path.rename(away)
        self.pause()
        self.give_back(away, path)

    def _write(self, path: Path, change: Callable[[int, bytes], bytes]) -> None:
        # O_NONBLOCK only so that a FIFO would not hang; the lease makes it wait by hand.
        while True:
            try:
                fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
                break
            except BlockingIOError:
                time.sleep(0.0005)
            except OSError as error:
                if error.errno in {errno.ELOOP, errno.EISDIR, errno.ENXIO}:
                    return
                raise
        try:
            late = os.fstat(fd).st_nlink == 0
            old = os.pread(fd, 1 << 24, 0)
            new = change(fd, old)
            self.pause()
            deleted = os.fstat(fd).st_nlink == 0
        finally:
            os.close(fd)
        if deleted:
            self.counts["opened what was deleted" if late else "DELETED WHILE OPEN"] += 1
            self.note(digest(new), "written to a deleted file")
            return
        self.wanted.discard(digest(old))
        self.note(digest(old), "overwritten")
        self.arrive(digest(new), f"written to {path.name}")

    def _state(self, content: bytes) -> bytes:
        self.complete.add(digest(content))
        return content

    def append(self, path: Path) -> None:
        def change(fd: int, old: bytes) -> bytes:
            for _ in range(2):
                more = os.urandom(5_000)
                os.pwrite(fd, more, len(old))
                old = self._state(old + more)
                self.pause()
            return old

        self._write(path, change)

    def overwrite(self, path: Path) -> None:
        def change(fd: int, old: bytes) -> bytes:
            times = os.fstat(fd)
            for at in (50, len(old) // 2, len(old) - 70):
                new = os.urandom(64)
                os.pwrite(fd, new, at)
                old = self._state(old[:at] + new + old[at + 64 :])
                self.pause()
            if self.rng.random() < 0.5:
                os.utime(fd, ns=(times.st_atime_ns, times.st_mtime_ns))
            return old

        self._write(path, change)

    def rewrite(self, path: Path) -> None:
        def change(fd: int, _old: bytes) -> bytes:
            new = picture(self.rng.choice((SIZE, 90_000)), decodes=self.decodes)
            os.ftruncate(fd, 0)
            self._state(b"")
            os.pwrite(fd, new[:9_000], 0)
            self._state(new[:9_000])
            self.pause()
            os.pwrite(fd, new[9_000:], 9_000)
            return self._state(new)

        self._write(path, change)

    def link(self, path: Path) -> None:
        second = self.aside()
        os.link(path, second, follow_symlinks=False)
        self.pause()
        second.unlink()
        with contextlib.suppress(FileNotFoundError):
            os.utime(path, follow_symlinks=False)  # or nobody hears that it is alone again

    def symlink(self, path: Path) -> None:
        away = self.aside()
        path.rename(away)
        link = self.aside()
        link.symlink_to(self.canary / TARGET)
        with contextlib.suppress(FileExistsError):
            rename_with(_NO_REPLACE, link, path)
        self.pause()
        if path.is_symlink():
            path.rename(link)
        self.give_back(away, path)

    def touch(self, path: Path) -> None:
        self.rng.choice((lambda: os.utime(path), lambda: path.chmod(0o640)))()

    def swap(self, path: Path) -> None:
        rename_with(_EXCHANGE, path, self.drop / self.rng.choice(NAMES))

    def folder_away(self, _path: Path) -> None:
        if self.rng.random() < 0.2:
            folder, away = self.drop / "b", self.aside()
            folder.rename(away)
            self.pause()
            away.rename(folder)

    def root_away(self, _path: Path) -> None:
        if self.rng.random() < 0.05:
            away = self.outside / "drop"
            self.drop.rename(away)
            self.pause()
            away.rename(self.drop)


def hammer(options: argparse.Namespace) -> int:
    """The adversary's process: does its worst, then writes down what it knows."""
    top: Path = options.hammer
    if options.uid and sys.platform != "win32":
        os.setgroups([])
        os.setresgid(options.uid, options.uid, options.uid)
        os.setresuid(options.uid, options.uid, options.uid)
    adversary = Hammer(
        top / "drop",
        top / "outside",
        top / "canary",
        random.Random(options.seed),
        decodes="inspected" in (options.variant or ()),
    )
    adversary.run(options.seconds)
    known = {
        "wanted": sorted(adversary.wanted),
        "complete": sorted(adversary.complete),
        "counts": adversary.counts,
        "history": adversary.history,
    }
    (top / "outside" / "ledger.json").write_text(json.dumps(known), encoding="utf-8")
    return 0


def prepare_random(top: Path, name: str, options: argparse.Namespace) -> tuple[Site, int] | str:
    """A site for a real daemon, and the adversary's user; or why there cannot be one."""
    variant = next(each for each in VARIANTS if each.name == name)
    folder = {**variant.folder, "rescan": "1s"}
    if name == "foreign":
        folder["settle"] = "500ms"  # longer than the adversary writes
    if name == "in place":
        elsewhere = Path(tempfile.mkdtemp())
        if elsewhere.stat().st_dev == top.stat().st_dev:
            elsewhere.rmdir()
            return "there is no second file system"
        folder["staging"] = str(elsewhere)
    if name == "foreign" and not ROOT:
        return "it takes root"
    own = dataclasses.replace(variant, folder=folder, user="")
    site = build(top / name.replace(" ", "-"), own)
    site.arrange({})
    (site.drop / "b").mkdir()
    if name != "foreign":
        return site, 0
    top.chmod(0o711)
    # Files of another user, and no capability to take leases on them.
    for path in (site.drop, site.drop / "b", site.outside):
        give(path, NOBODY)
    return site, NOBODY


def random_mode(top: Path, options: argparse.Namespace) -> list[str]:
    """Let a daemon run under fire, in one variant after the other; gives what went wrong."""
    faults = []
    chosen: Sequence[str] = options.variant or RANDOM_VARIANTS
    for name in chosen:
        made = prepare_random(top, name, options)
        if isinstance(made, str):
            sys.stdout.write(f"{name}: skipped: {made}\n")
            continue
        if name == "foreign":
            drop_lease_capability()
        found = under_fire(*made, name, options.seconds / len(chosen), options.seed)
        faults += [f"{name} --seed {options.seed}: {fault}" for fault in found]
    return faults


def drop_lease_capability() -> None:
    """Nothing that is started from here on can take a lease on another user's file."""
    call_libc("prctl", 24, 28, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_LEASE


def under_fire(site: Site, uid: int, name: str, seconds: float, seed: int) -> list[str]:
    canary = describe(site.canary)
    log = site.top / "log"
    daemon = Daemon(site.policy_path, log, {})
    try:
        daemon.wait_for_notice("READY=1")
        words = [sys.executable, __file__, "--hammer", str(site.top), "--seconds", str(seconds)]
        words += ["--seed", str(seed), "--variant", name, "--uid", str(uid)]
        subprocess.run(words, check=True, timeout=seconds + 120)
        ledger = json.loads((site.outside / "ledger.json").read_text(encoding="utf-8"))
        daemon.send("USR1")
        calm = wait_for_calm(site)
        code = daemon.stop()
    finally:
        daemon.close()
    faults = [] if not code else [f"the daemon ended with {code}: {daemon.log()[-500:]}"]
    faults += [] if calm else ["it did not come to rest"]
    variant = next(each for each in VARIANTS if each.name == name)
    a = Adversary(site, variant)
    sealed, broken = a.sealed()
    plain = a.plain()
    wanted, complete = set(ledger["wanted"]), set(ledger["complete"])
    lost = wanted - {*sealed.values(), *plain.values()}
    limits = name in {"in place", "foreign"}
    counts = Counter(ledger["counts"])
    counts["sealed"], counts["objects"] = len(set(sealed.values())), len(sealed)
    if lost and limits:
        counts["documented: lost in the last moment"] = len(lost)
    elif lost:
        story = [line for line in ledger["history"] if line.split(" ")[1] in lost]
        faults.append(f"{len(lost)} contents lost: {story}")
    if counts["DELETED WHILE OPEN"] and not limits:
        faults.append("a file was deleted while it was open for writing")
    faults += [f"an object does not open: {each}" for each in broken]
    torn = set(sealed.values()) - complete
    faults += [f"an object holds what no file ever held: {sorted(torn)}"] if torn else []
    faults += in_clear(a, plain, set(sealed.values()))
    faults += ["something behind a link was changed"] if describe(site.canary) != canary else []
    if "a defect" in daemon.log() or "Traceback" in daemon.log():
        faults.append(f"the daemon's log: {daemon.log()[-2000:]}")
    told = ", ".join(f"{what} {count}" for what, count in sorted(counts.items()))
    sys.stdout.write(f"{name}: {told}\n")
    sys.stdout.flush()
    return faults


def wait_for_calm(site: Site, deadline: float = 90.0) -> bool:
    """Wait until the daemon says, for a while, that nothing is left to do."""
    end = time.monotonic() + deadline
    calm_since = None
    while time.monotonic() < end:
        told = report.read(site.state)
        folder = told.folders[0] if told is not None and told.folders else None
        calm = folder is not None and not (folder.waiting or folder.queued)
        calm_since = (calm_since or time.monotonic()) if calm else None
        if calm_since is not None and time.monotonic() - calm_since > 4:
            return True
        time.sleep(0.1)
    return False


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--slice", action="store_true", help="a few seconds of it")
    parser.add_argument("--variant", action="append", help="only this one; may be repeated")
    parser.add_argument("--action", action="append", help="only this one; may be repeated")
    parser.add_argument("--every", type=int, help="only each n-th point")
    parser.add_argument("--part", type=int, default=0, help="and which of the n parts")
    parser.add_argument("--pairs", type=int, default=0, help="so many, in two runs, at random")
    parser.add_argument("--full", action="store_true", help="each call on the queue, too")
    parser.add_argument("--seconds", type=float, default=0.0, help="under fire, with a daemon")
    parser.add_argument("--first", action="store_true", help="no more after the first violation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hammer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--uid", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--dir", type=Path, help="where to work; default: in memory")
    return parser.parse_args()


def main() -> int:
    options = parse()
    if options.hammer:
        return hammer(options)
    if options.seconds:
        with scratch() as top:
            faults = random_mode(options.dir or top, options)
        sys.stdout.writelines(f"VIOLATION {fault}\n" for fault in faults)
        return 1 if faults else 0
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
    return 1 if table.violations else 0


if __name__ == "__main__":
    sys.exit(main())
