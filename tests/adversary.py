"""Whoever acts on a watched folder while the service has its files in hand.

How the service is set up, which places its run has, and what an adversary knows: a ledger of what
exists, in clear or as an object that opens. What it can do is in `deeds.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import stat
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from PIL import Image
from rig import STAGING, Rig

from secimg_watch import explain as explaining
from secimg_watch import report
from secimg_watch.errors import SecimgError
from secimg_watch.gate import check_keys
from secimg_watch.jobs import Jobs, State
from secimg_watch.keys import provider_for
from secimg_watch.policy import load_policy
from secimg_watch.quantities import Reserve
from secimg_watch.records import KeyEncryptionKey, ObjectId
from secimg_watch.seal import open_object
from secimg_watch.vault import Vault, is_object_id

assert sys.platform == "linux", "system calls are traced on Linux only"

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Iterator, Sequence

    from secimg_watch.tracer import Call

TARGET: Final = "b/1.jpg"
BYSTANDER: Final = "0.jpg"
SIZE: Final = 40_000
STORED: Final = 16_484  # where a mapping is stored to: in the second piece
PIECE: Final = 16_384  # so that a small picture is read in several pieces, and can be torn
NOBODY: Final = 65534
LINUX: Final = sys.platform == "linux"
ROOT: Final = LINUX and os.geteuid() == 0
HEAD: Final = b"\xff\xd8\xff\xe0\0\x10JFIF\0"

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
SETLEASE: Final = 1024
_COMMANDS: Final = {
    (SETLEASE): "FSETLEASE",
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
