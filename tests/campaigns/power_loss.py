"""Cuts the power at every moment of a run, in every way that a disk may come back from that.

A run of the command line is recorded under `secimg_watch.tracer`: what it did to names, to
contents, and what it synced. `disk_model` says what a disk may hold after a crash at any moment.
Each such state is laid out under the very same paths, in memory, and must keep the promise:
before anything else runs no picture is lost, and after a healthy run everything is sealed once
and nothing is left in clear. ``--without-syncs`` asks the opposite: which sync could be left out
with no state to show for it?

In the scenarios with *killed* in their names the recorded run goes on from what another one left
that was killed at one of its syncs: what it saw there need not outlast a power cut.

Inode numbers and change times are not the recorded ones after that; the healthy run is made to
see the recorded ones, so that rows of the queue mean the files that they meant.

``states`` counts the different ones that are listed: all that are possible where those are few,
else a choice. Each of them is looked at for what may be lost in it; ``tried`` is a sample, half of
it of states at such a risk if there are any. Under ``halves`` pictures do get lost: no
program can help that, and it does not count. Legal costs: a picture is *sealed twice* where only
its row knew its object (in place, or kept), where its object does not open again (write-only),
and, where names reorder, when its claim did not last and its object did.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import multiprocessing
import os
import random
import re
import shutil
import stat
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeAlias, TypeVar

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the rig lies

from disk_model import (
    MODELS,
    Change,
    Disk,
    Effort,
    Model,
    State,
    Sync,
    Write,
)
from PIL import Image
from rig import STAGING, Rig, scratch, small_pictures

from secimg_watch.audit import events_of, read_log
from secimg_watch.errors import CannotCreateError, NoInputError, SecimgError
from secimg_watch.gate import check_keys
from secimg_watch.images import bytes_to_image
from secimg_watch.jobs import Jobs
from secimg_watch.jobs import State as JobState
from secimg_watch.keys import provider_for
from secimg_watch.quantities import Reserve
from secimg_watch.recipients import format_recipient, generate_identity, identity_file, recipient_of
from secimg_watch.records import Identity
from secimg_watch.rekey import take_census
from secimg_watch.roots import QUARANTINE_NAME
from secimg_watch.seal import open_object
from secimg_watch.tracer import Call, Fail, Kill, Watch, trace
from secimg_watch.vault import Vault

assert sys.platform == "linux", "system calls are traced on Linux only"

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from disk_model import Event, Node, Slot, Tree

    from secimg_watch.records import KeyEncryptionKey, ObjectId, PrivateKey
    from secimg_watch.slots import Opener
    from secimg_watch.tracer import Decision

TWICE: Final = "sealed twice"
SIGKILLED: Final = -9
PATIENCE: Final = 20.0  # seconds for a run of a few hundredths
USUAL: Final = Effort()
FEW: Final = Effort(namings=32, sample=8, contents=6)
FEW_MOMENTS: Final = 16
SLICE: Final = (
    *("drain", "key init, drain", "drain, just arrived", "in place", "vault rekey"),
    *("key rotate", "vault restore"),
)
SLICE_STATES: Final = 3
SIZE: Final = 9_000  # bytes of a picture: three blocks

_AT_FDCWD: Final = -100
_HERE: Final = None
# Where the paths of a call are: directory descriptor and path, by their place among the arguments.
_PATHS: Final[dict[str, list[tuple[int | None, int]]]] = {
    "open": [(_HERE, 0)], "creat": [(_HERE, 0)], "openat": [(0, 1)], "openat2": [(0, 1)],
    "mkdir": [(_HERE, 0)], "mkdirat": [(0, 1)], "rmdir": [(_HERE, 0)], "unlink": [(_HERE, 0)],
    "unlinkat": [(0, 1)], "rename": [(_HERE, 0), (_HERE, 1)], "renameat": [(0, 1), (2, 3)],
    "renameat2": [(0, 1), (2, 3)], "link": [(_HERE, 1)], "linkat": [(2, 3)],
    "truncate": [(_HERE, 0)],
}  # fmt: skip
# The same for the file that gets another name.
_LINKED: Final[dict[str, tuple[int | None, int]]] = {"link": (_HERE, 0), "linkat": (0, 1)}
_FLAGS: Final = {"open": 1, "openat": 2}  # which argument they are
_LACKING: Final = frozenset({"renameat2", "copy_file_range"})
# Which argument is the descriptor that is written to.
_WRITTEN: Final = {
    "write": 0, "pwrite64": 0, "writev": 0, "pwritev": 0, "pwritev2": 0, "ftruncate": 0,
    "fallocate": 0, "sendfile": 0, "copy_file_range": 2,
}  # fmt: skip
_SYNCS: Final = frozenset({"fsync", "fdatasync"})
# Attributes count as durable at once; see the model.
_PASSED_OVER: Final = frozenset(
    {"chmod", "fchmod", "chown", "fchown", "fchownat", "fchmodat", "utimensat"}
)
_SHARED_MEMORY: Final = "-shm"  # of SQLite's, which makes it anew


# -- recording ------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Begun:
    """A call that is being made."""

    when: int
    slots: list[Slot | None]
    node: Node | None


@dataclass(slots=True)
class Recorder:
    """Keeps a model of the directory ``top`` in step with what traced processes do to it.

    Files are known by their inode numbers, so that no descriptor has to be followed.
    """

    top: Path
    disk: Disk = field(default_factory=Disk)
    identities: dict[Node, Identity] = field(default_factory=dict)
    """Of the files that were there in the beginning."""
    _nodes: dict[int, Node] = field(default_factory=dict)
    _begun: dict[int, _Begun] = field(default_factory=dict)

    def __post_init__(self) -> None:
        status = os.stat(self.top)
        self.disk.modes[0] = stat.S_IMODE(status.st_mode)
        self._nodes[status.st_ino] = 0
        self._scan(self.top, 0)

    def _scan(self, directory: Path, node: Node) -> None:
        for entry in sorted(os.scandir(directory), key=lambda each: each.name):
            status = entry.stat(follow_symlinks=False)
            mode, slot = stat.S_IMODE(status.st_mode), (node, entry.name)
            if stat.S_ISDIR(status.st_mode):
                made = self.disk.place(slot, mode)
                self._scan(Path(entry.path), made)
            else:
                assert status.st_nlink == 1
                made = self.disk.place(slot, mode, Path(entry.path).read_bytes())
                self.identities[made] = Identity.of(status)
            self._nodes[status.st_ino] = made

    def arrive(self, relpath: str, content: bytes) -> None:
        """Let a file come to be, whose producer syncs nothing."""
        *folders, name = relpath.split("/")
        parent = 0
        for folder in folders:
            parent = self.disk.slots[parent, folder]
        slot = (parent, name)
        path = Path(self._path(slot))
        path.write_bytes(content)
        node = self.disk.create(slot, 0o600)
        self.disk.write(node, content)
        self._meet(str(path), node)
        self.identities[node] = Identity.of(path.stat())

    @property
    def is_idle(self) -> bool:
        """Whether no call is being made."""
        return not self._begun

    def decide(self, call: Call) -> Decision:
        """To be given to the tracer."""
        if call.name in _PASSED_OVER or not (call.changes or _is_unnamed(call)):
            return None
        begun = _Begun(len(self.disk.events), [], None)
        if call.name in _LINKED:
            begun.node = self._node(self._place(call, *_LINKED[call.name]))
        if call.name in _PATHS:
            begun.slots = [self._slot(call, *where) for where in _PATHS[call.name]]
        else:
            at = _WRITTEN.get(call.name, 0)
            begun.node = self._node(f"/proc/{call.thread}/fd/{call.args[at]}")
        if begun.node is None and not any(begun.slots):
            return None
        self._begun[call.thread] = begun
        return Watch()

    def _node(self, path: str) -> Node | None:
        try:
            return self._nodes.get(os.stat(path).st_ino)
        except OSError:
            return None

    def _place(self, call: Call, directory: int | None, at: int) -> str:
        path = os.fsdecode(call.text(at))
        if path.startswith("/proc/self/"):
            return path.replace("self", str(call.thread), 1)
        number = _AT_FDCWD if directory is None else _signed(call.args[directory])
        base = "cwd" if number == _AT_FDCWD else f"fd/{number}"
        return os.path.join(f"/proc/{call.thread}/{base}", path)

    def _slot(self, call: Call, directory: int | None, at: int) -> Slot | None:
        parent, name = os.path.split(self._place(call, directory, at))
        node = self._node(parent)
        return None if node is None or name.endswith(_SHARED_MEMORY) else (node, name)

    def returned(self, call: Call, value: int) -> None:
        """To be given to the tracer."""
        begun = self._begun.pop(call.thread)
        if value < 0:
            return
        if call.name in _SYNCS:
            assert begun.node is not None
            self.disk.sync(begun.node, begun.when)
        elif call.name in _WRITTEN:
            assert begun.node is not None
            self._wrote(call, call.args[_WRITTEN[call.name]], begun.node)
        elif _is_unnamed(call):
            self._meet(f"/proc/{call.thread}/fd/{value}", self.disk.unnamed(0o600))
        elif call.name in _LINKED:
            assert begun.node is not None
            assert begun.slots[0] is not None
            self.disk.link(begun.slots[0], begun.node)
        else:
            self._named(call, value, begun.slots)

    def _wrote(self, call: Call, fd: int, node: Node) -> None:
        # Read back from the file: it makes no difference then which call it was.
        self.disk.write(node, Path(f"/proc/{call.thread}/fd/{fd}").read_bytes())

    def _named(self, call: Call, value: int, slots: Sequence[Slot | None]) -> None:
        # Nothing comes in from outside, and nothing leaves.
        assert None not in slots, call
        known = [slot for slot in slots if slot is not None]
        disk, kind = self.disk, call.name.removesuffix("2").removesuffix("at")
        match kind:
            case "open" | "creat":
                self._opened(call, value, known[0])
            case "mkdir":
                made = disk.mkdir(known[0], 0o700)
                self._meet(self._path(known[0]), made)
            case "rmdir":
                disk.rmdir(known[0])
            case "unlink" if disk.is_directory(disk.slots[known[0]]):
                disk.rmdir(known[0])
            case "unlink":
                disk.unlink(known[0])
            case "rename":
                disk.rename(known[0], known[1])
            case _:
                raise AssertionError(call)

    def _path(self, slot: Slot) -> str:
        return str(self.top / self.disk.path_of(slot[0]) / slot[1])

    def _opened(self, call: Call, fd: int, slot: Slot) -> None:
        path = f"/proc/{call.thread}/fd/{fd}"
        if slot not in self.disk.slots:
            made = self.disk.create(slot, 0o600)
            self._meet(path, made)
        node = self.disk.slots[slot]
        if not self.disk.is_directory(node) and not os.stat(path).st_size:
            self.disk.write(node, b"")  # it was cut

    def _meet(self, path: str, node: Node) -> None:
        status = os.stat(path)
        self._nodes[status.st_ino] = node
        self.disk.modes[node] = stat.S_IMODE(status.st_mode)

    def check(self) -> None:
        """The model has to be what is there: otherwise a call was missed."""
        there = Recorder(self.top).disk
        mine = _plain(self.disk.tree(self.disk.now()))
        others = _plain(there.tree(there.now()))
        assert mine == others, {
            path for path in mine.keys() | others.keys() if mine.get(path) != others.get(path)
        }


def _is_unnamed(call: Call) -> bool:
    """Whether a call opens a new file that has no name yet."""
    at = _FLAGS.get(call.name)
    return at is not None and call.args[at] & os.O_TMPFILE == os.O_TMPFILE


def _signed(number: int) -> int:
    return ((number & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def _plain(tree: Tree) -> dict[str, bytes | None]:
    return {
        path: entry.content for path, entry in tree.items() if not path.endswith(_SHARED_MEMORY)
    }


T = TypeVar("T")

StandsFor: TypeAlias = "dict[tuple[int, int], tuple[Identity, int]]"
"""By device and inode: the recorded identity of a file, and its change time when laid out."""


def lay_out(tree: Tree, recorder: Recorder, top: Path | None = None) -> StandsFor:
    """Put a tree in the place of what is there."""
    top = recorder.top if top is None else top
    _clear(top, "", tree)
    stands_for = {}
    laid: dict[Node, str] = {}
    for path, entry in sorted(tree.items()):
        place = os.path.join(top, path) if path else str(top)
        if entry.content is None:
            with contextlib.suppress(FileExistsError):
                os.mkdir(place)
            os.chmod(place, entry.mode)
            continue
        if entry.node in laid:
            os.link(laid[entry.node], place)
            continue
        laid[entry.node] = place
        Path(place).write_bytes(entry.content)
        os.chmod(place, entry.mode)
        recorded = recorder.identities.get(entry.node)
        if recorded is not None:
            os.utime(place, ns=(recorded.mtime_ns, recorded.mtime_ns))
            status = os.stat(place)
            stands_for[status.st_dev, status.st_ino] = (recorded, status.st_ctime_ns)
    return stands_for


def _clear(top: Path, below: str, tree: Tree) -> None:
    """Remove all but the directories that are wanted: there are hundreds of those."""
    with contextlib.suppress(FileNotFoundError):
        for entry in list(os.scandir(os.path.join(top, below))):
            path = os.path.join(below, entry.name)
            wanted = tree.get(path)
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
            elif wanted is not None and wanted.content is None:
                _clear(top, path, tree)
            else:
                shutil.rmtree(entry.path)


@contextlib.contextmanager
def as_recorded(stands_for: StandsFor) -> Iterator[None]:
    """Let files be known by the inode numbers and times that they had when they were recorded."""
    genuine = Identity.of.__func__  # type: ignore[attr-defined]

    def of(cls: type[Identity], status: os.stat_result) -> Identity:
        real: Identity = genuine(cls, status)
        recorded, laid_out = stands_for.get((real.dev, real.ino), (None, 0))
        if recorded is None:
            return real
        touched = recorded.ctime_ns if real.ctime_ns == laid_out else real.ctime_ns
        return cls(recorded.dev, recorded.ino, real.size, real.mtime_ns, touched)

    Identity.of = classmethod(of)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        Identity.of = classmethod(genuine)  # type: ignore[assignment, method-assign]


# -- scenarios ------------------------------------------------------------------------------------


class Apart(Rig):
    """Vault, key and state each in a directory of its own: the sync for one serves no other."""

    __slots__ = ()

    @property
    def vault(self) -> Path:
        """The vault's directory."""
        return self.top / "disk" / "vault"

    @property
    def state(self) -> Path:
        """The state directory."""
        return self.top / "var" / "state"

    @classmethod
    def arrange(cls, top: Path) -> Apart:
        """Make all that is there before the first command."""
        key = {"provider": "file", "file": str(top / "etc" / "key")}
        rig = cls(top, policy={"key": key})
        for directory in (top, rig.drop, rig.vault.parent, top / "etc", rig.state.parent):
            directory.mkdir()
        rig.write_policy()
        return rig


@dataclass(slots=True)
class Site:
    """What a scenario works on."""

    rig: Rig
    pictures: dict[str, bytes]
    identity: PrivateKey | None = None
    """What opens the vault where the policy has no key."""
    costs: Counter[str] = field(default_factory=Counter)
    """What is legal and a pity."""
    old_system: bool = False
    """Whether the file system knows only calls that every one knows."""
    stands_for: StandsFor = field(default_factory=dict)
    """Files that were laid out, where the power had failed before already."""

    @property
    def top(self) -> Path:
        return self.rig.top

    def run(self, *words: str, good: Sequence[int] = (0,)) -> list[str]:
        """Run a command to its end; a fault where that fails."""
        calls = {*_LACKING, *_FLAGS} if self.old_system else ()
        outcome, output = self.rig.traced(words, self.lacking, calls=calls, seconds=PATIENCE)
        if outcome.code in good and not outcome.timed_out:
            return []
        last = output.strip().splitlines()[-1:] or [""]
        return [f"{' '.join(words)} ended with {outcome.code}: {last[0]}"]

    def lacking(self, call: Call) -> Decision:
        """Let the calls fail that an older file system lacks, where that is the case."""
        lacks = self.old_system and (call.name in _LACKING or _is_unnamed(call))
        return Fail(errno.EINVAL) if lacks else None

    def audited(self) -> list[str]:
        """What is wrong with the audit log after a healthy run."""
        words = ["--identity", str(self.top / "identity")] if self.identity else []
        return self.run("audit", "verify", *words)

    # -- what there is ----

    @property
    def key(self) -> Path:
        """The key file."""
        return Path(self.rig.policy.get("key", {}).get("file", self.top / "key"))

    def ring(self) -> tuple[KeyEncryptionKey, ...]:
        """The stored keys; none where there are none yet."""
        there = self.identity is None and self.key.exists()
        return provider_for("file", "a/b", file=self.key).load_ring() if there else ()

    def objects(self) -> dict[ObjectId, bytes]:
        """What all objects hold. One that does not open raises `SecimgError`."""
        vault, ring = Vault(self.rig.vault, Reserve(0.0, 0)), self.ring()
        openers: Sequence[Opener] = (self.identity,) if self.identity else ring
        if not openers or not vault.exists():
            return {}
        vault_id = check_keys(vault, ring).vault_id
        found = {}
        for object_id in vault.object_ids():
            with vault.object_path(object_id).open("rb") as stream:
                opened = open_object(stream, openers, expect=object_id, vault_id=vault_id)
                opened.preview()
                found[object_id] = b"".join(map(bytes, opened.body()))
        return found

    def clear(self) -> dict[str, bytes]:
        """What lies in clear in the folder, and where originals are moved to."""
        places = (self.rig.drop, self.top / "originals")
        return {
            str(path.relative_to(self.top)): path.read_bytes()
            for place in places
            for path in place.rglob("*")
            if path.is_file() and path != self.rig.drop / STAGING
        }

    def recorded(self) -> set[str]:
        """The objects that the audit log says were sealed."""
        with contextlib.suppress(SecimgError):
            lines = read_log(self.rig.state)
            return {str(e.fields.get("object")) for e in events_of(lines) if e.event == "sealed"}
        return set()

    # -- what is wrong with it ----

    def lost(self) -> list[str]:
        """What may never be: a picture that is not there, or not on record and not in clear."""
        objects, clear, recorded = self.objects(), set(self.clear().values()), self.recorded()
        known = {content for each, content in objects.items() if each in recorded}
        faults = [f"on record, and not there: {each}" for each in recorded - objects.keys()]
        for name, content in self.pictures.items():
            if content not in clear and content not in objects.values():
                faults.append(f"lost: {name}")
            elif content not in clear and content not in known:
                faults.append(f"deleted, and its object is not on record: {name}")
        return faults

    def unsealed(self, clear: Mapping[str, bytes]) -> list[str]:
        """What is wrong after a healthy run that should have left these files in clear."""
        left, sealed = self.clear(), list(self.objects().values())
        faults = [f"in clear: {name}" for name in left.keys() - clear.keys()]
        faults += [f"not in clear: {name}" for name in clear if left.get(name) != clear[name]]
        faults += [f"not sealed: {n}" for n, each in self.pictures.items() if each not in sealed]
        for directory in (self.rig.vault / "tmp", self.rig.drop / STAGING):
            if directory.is_dir():
                faults += [f"left: {directory.name}/{name}" for name in os.listdir(directory)]
        if not set(sealed) <= set(self.pictures.values()):
            faults.append("an object holds what nobody wrote")
        self.costs[TWICE] += len(sealed) - len(set(sealed))
        return faults


class Scenario:
    """A run that is recorded, and what has to be true whenever it was cut off.

    The base class's is a folder that is drained.
    """

    name = "drain"
    rounds = 1
    """How many recordings are made."""
    attempts = 1
    """How often one is tried that may fail, as threads make a run differ from the next."""
    effort: Effort | None = None
    """How many of the states of one moment are listed, where not the usual number."""
    share = 1
    """One in so many of the usual number of states is tried, as each takes so long."""
    verdict: ClassVar[frozenset[str]] = frozenset({"ordered", "weak", "named"})
    """The models that decide; under the others it is only told what happens."""
    twice: ClassVar[frozenset[str]] = frozenset({"weak", "named", "halves"})
    """The models under which a picture may be sealed twice: a claim that did not last, and its
    object did."""
    count = 2
    workers = 1
    folder: ClassVar[dict[str, Any]] = {}
    words: tuple[tuple[str, ...], ...] = (("drain",),)
    old_system = False
    good: tuple[int, ...] = (0,)
    """Exit codes that the recorded run may end with."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def begin(self, site: Site, recorder: Recorder) -> None:
        """What happens between that and the first command."""

    def make(self, top: Path) -> Site:
        """Make a site, in the state that the recording begins with."""
        folder = {
            name: value.replace("TOP", str(top)) if isinstance(value, str) else value
            for name, value in self.folder.items()
        }
        rig = Rig(top, workers=self.workers, folder=folder)
        rig.build()
        site = Site(rig, self.pictures(), old_system=self.old_system)
        rig.put(site.pictures)
        return site

    def pictures(self) -> dict[str, bytes]:
        """What is in the folder."""
        return small_pictures(self.count, SIZE)

    def precious(self, site: Site) -> Collection[bytes]:
        """What may not be lost: states in which it might be are tried before others."""
        return site.pictures.values()

    def suspects(self, _tree: Tree) -> bool:
        """Whether states with that tree are to be tried before others for some other reason."""
        return False

    def disturbs(self, _call: Call, *, alone: bool) -> Decision:
        """What happens to the recorded run from outside; ``alone``: no other call is being made."""
        del alone
        return None

    def perform(self, site: Site, **how: Any) -> None:
        """Do what is recorded."""
        for words in self.words:
            outcome, output = site.rig.traced(words, **how)
            assert outcome.code in self.good, (words, outcome, output)

    def excused(self, _model: Model, faults: list[str], _site: Site) -> list[str]:
        """What is left of the faults where some are beyond what is promised."""
        return faults

    def at_once(self, site: Site) -> list[str]:
        """What is wrong when the power is back and nothing has run."""
        return site.lost()

    def afterwards(self, site: Site) -> list[str]:
        """What is wrong after healthy runs."""
        return site.run("drain") + site.unsealed(self.left(site)) + site.audited()

    def left(self, _site: Site) -> Mapping[str, bytes]:
        """What is to be in clear after that."""
        return {}

    def in_the_end(self, site: Site) -> list[str]:
        """What is wrong when the power failed only after the run had ended well."""
        left = self.left(site)
        return [f"still in clear: {name}" for name in site.clear() if name not in left]


class TwoWorkers(Scenario):
    name = "drain, two workers"
    workers = 2
    count = 4


class Again(Scenario):
    name = "drain, not the first"

    def make(self, top: Path) -> Site:
        site = Scenario.make(self, top)
        assert not site.run("drain")
        more = {f"more/{name}": content for name, content in small_pictures(2, SIZE).items()}
        site.pictures |= more
        site.rig.put(more)
        return site


class First(Scenario):
    name = "key init, drain"
    effort = FEW  # a moment has thousands of states
    words: tuple[tuple[str, ...], ...] = (("key", "init"), ("drain",))

    def make(self, top: Path) -> Site:
        site = Site(Apart.arrange(top), self.pictures())
        site.rig.put(site.pictures)
        return site

    def suspects(self, tree: Tree) -> bool:
        return "disk/vault/vault.json" in tree and "disk/vault/objects/ff" not in tree

    def afterwards(self, site: Site) -> list[str]:
        return site.run("key", "init") + Scenario.afterwards(self, site)


class NewState(Scenario):
    """The state directory is missing, and with it the audit log."""

    name = "drain, no state yet"

    def make(self, top: Path) -> Site:
        site = First.make(First(0), top)
        assert not site.run("key", "init")
        shutil.rmtree(site.rig.state)
        return site


class Init(First):
    name = "key init"
    words = (("key", "init"),)

    def in_the_end(self, site: Site) -> list[str]:
        there = site.ring() and Vault(site.rig.vault, Reserve(0.0, 0)).exists()
        return [] if there else ["the key or the vault is gone"]


class Kept(Scenario):
    name = "after: keep"
    twice = frozenset(MODELS)  # only its row knows that it was sealed
    folder: ClassVar = {"after": "keep"}

    def left(self, site: Site) -> Mapping[str, bytes]:
        return {f"drop/{name}": content for name, content in site.pictures.items()}


class Moved(Scenario):
    name = "after: move"
    folder: ClassVar = {"after": "move:TOP/originals"}

    def pictures(self) -> dict[str, bytes]:
        # In sub-folders all: a file beside one would have that one's name synced by the way.
        return {f"b/{name}": each for name, each in Scenario.pictures(self).items()}

    def left(self, site: Site) -> Mapping[str, bytes]:
        return {f"originals/{name}": content for name, content in site.pictures.items()}

    def in_the_end(self, site: Site) -> list[str]:
        there = site.clear()
        missing = [f"moved and gone: {name}" for name in self.left(site) if name not in there]
        return missing + Scenario.in_the_end(self, site)


class Older(Scenario):
    """Neither a rename that never replaces, nor a file that gets its name when it is whole."""

    name = "drain, older system"
    old_system = True


class MovedOlder(Moved):
    """A move is a second name, and then the first one goes.

    A power cut in between may leave both, as hard links, which are never taken. Only in order is
    that excluded; no file system is known that lacks that rename and reorders names.
    """

    name = "move, older system"
    old_system = True

    def excused(self, model: Model, faults: list[str], site: Site) -> list[str]:
        linked = any(path.stat().st_nlink > 1 for path in site.rig.drop.rglob("*.jpg"))
        if model.in_order or not linked:
            return faults
        site.costs["left with two names"] += 1
        return [fault for fault in faults if not fault.startswith(("in clear: ", "drain ended"))]


class InPlace(Scenario):
    """There can be no staging directory."""

    name = "in place"
    twice = frozenset(MODELS)  # only its row knows its object
    folder: ClassVar = {"exclude": [STAGING]}

    def make(self, top: Path) -> Site:
        site = Scenario.make(self, top)
        (site.rig.drop / STAGING).write_bytes(b"in the way")
        return site


class SetAside(Scenario):
    """Something that is no picture goes into quarantine."""

    name = "quarantine"
    share = 8  # a decoder is started for each
    folder: ClassVar = {"not_image": "quarantine"}
    good = (1,)
    letter = b"%PDF-1.7 " + b"letter " * 1000

    def make(self, top: Path) -> Site:
        site = Scenario.make(self, top)
        site.rig.put({"letter.pdf": self.letter})
        return site

    def precious(self, site: Site) -> Collection[bytes]:
        return [*site.pictures.values(), self.letter]

    def at_once(self, site: Site) -> list[str]:
        there = self.letter in site.clear().values()
        return site.lost() + ["lost: letter.pdf"] * (not there)

    def afterwards(self, site: Site) -> list[str]:
        if self.letter not in site.clear().values():
            return []  # that was told of already
        faults = site.run("drain", good=(1,))  # it is something that needs attention
        aside, *more = [name for name in site.clear() if name.endswith("letter.pdf")]
        faults += [f"there twice: {name}" for name in more]
        if f"/{STAGING}/{QUARANTINE_NAME}/" not in aside:
            # The queue knows that it was set aside, and the disk does not: there it rests, too.
            site.costs["set aside where it was"] += 1
            faults += [] if self.rests(site) else [f"not set aside: {aside}"]
        left = f"left: {STAGING}/{QUARANTINE_NAME}"
        unsealed = site.unsealed({aside: self.letter})
        return faults + [fault for fault in unsealed if fault != left] + site.audited()

    def rests(self, site: Site) -> bool:
        queue = Jobs(site.rig.state / "queue.sqlite")
        try:
            return bool(queue.rows(state=JobState.QUARANTINED))
        finally:
            queue.close()

    def in_the_end(self, site: Site) -> list[str]:
        return [
            f"still in clear: {name}" for name in site.clear() if not name.endswith("letter.pdf")
        ]


class Retry(SetAside):
    """What was set aside comes back, as the policy takes it now; once that is said, it lasts."""

    name = "jobs retry"
    share = 1
    count = 0
    words = (("jobs", "retry", "--all"),)
    good = (0,)

    def make(self, top: Path) -> Site:
        site = SetAside.make(self, top)
        assert not site.run("drain", good=(1,))
        site.rig.folder["not_image"] = "encrypt"
        site.rig.write_policy()
        return site

    def at_once(self, site: Site) -> list[str]:
        there = self.letter in (*site.clear().values(), *site.objects().values())
        return [] if there else ["lost: letter.pdf"]

    def afterwards(self, site: Site) -> list[str]:
        faults = site.run(*self.words[0]) + site.run("drain")
        faults += [f"in clear: {name}" for name in site.clear()]
        sealed = list(site.objects().values()) == [self.letter]
        return faults + ["not sealed: letter.pdf"] * (not sealed) + site.audited()

    def in_the_end(self, site: Site) -> list[str]:
        return [
            f"said to be taken back: {name}" for name in site.clear() if QUARANTINE_NAME in name
        ]


class Arriving(Scenario):
    """The pictures came a moment ago, and nobody has synced them.

    What the power cut takes of them is the producer's loss, until they are on record as sealed.
    """

    name = "drain, just arrived"

    def make(self, top: Path) -> Site:
        rig = Rig(top)
        rig.build()
        return Site(rig, {"0.jpg": b"", "1.jpg": b""})

    def begin(self, site: Site, recorder: Recorder) -> None:
        site.pictures = {name: small_pictures(1, SIZE)["0.jpg"] for name in site.pictures}
        for name, content in site.pictures.items():
            recorder.arrive(f"drop/{name}", content)

    def at_once(self, site: Site) -> list[str]:
        self.sealed = set(site.objects().values())
        faults = [fault for fault in site.lost() if fault.startswith("on record")]
        return faults + ["an object holds what nobody wrote"] * bool(
            self.sealed - set(site.pictures.values())
        )

    def afterwards(self, site: Site) -> list[str]:
        faults = site.run("drain")
        faults += [f"in clear: {name}" for name, content in site.clear().items() if content]
        lost = self.sealed - set(site.objects().values())
        return faults + ["an object is gone"] * bool(lost) + site.audited()


class Twice(Scenario):
    """The power fails, and fails again during the run after that."""

    name = "drain, cut off before"
    twice = frozenset(MODELS)  # as under the weakest model, the first time
    rounds = 12

    def make(self, top: Path) -> Site:
        first = Scenario(self.random.randrange(1 << 30))
        site, recorder = record(first, top)
        model = MODELS[self.random.choice(sorted(self.verdict))]
        point = self.random.randrange(len(recorder.disk.events) + 1)
        states = list(recorder.disk.states(point, model, self.random, USUAL))
        chosen = recorder.disk.tree(self.random.choice(states))
        site.stands_for = lay_out(chosen, recorder)
        return site


class WriteOnly(Scenario):
    """Nothing on the machine opens what it seals."""

    name = "write-only vault"
    twice = frozenset(MODELS)  # an object that does not open proves nothing

    def make(self, top: Path) -> Site:
        identity = generate_identity()
        recipient = format_recipient(recipient_of(identity))
        rig = Rig(top, policy={"key": {"provider": "none"}, "recipients": [recipient]})
        rig.build()
        (top / "identity").write_text(identity_file(identity))
        (top / "identity").chmod(0o600)
        site = Site(rig, small_pictures(self.count, SIZE), identity)
        rig.put(site.pictures)
        return site


class Rekey(Scenario):
    """Every object gets slots for a new key."""

    name = "vault rekey"
    words: tuple[tuple[str, ...], ...] = (("vault", "rekey"),)

    def make(self, top: Path) -> Site:
        site = Scenario.make(self, top)
        assert not site.run("drain") + site.run("key", "rotate")
        return site

    def afterwards(self, site: Site) -> list[str]:
        return [*site.run(*self.words[0]), *self.in_the_end(site), *site.lost(), *site.audited()]

    def in_the_end(self, site: Site) -> list[str]:
        slots = take_census(Vault(site.rig.vault, Reserve(0.0, 0))).slots
        wanted = {("key", site.ring()[0].key_id): len(site.pictures)}
        left = [path.name for path in (site.rig.vault / "rekey").glob("*.simg")]
        return ["slots of a former key"] * (slots != wanted) + [f"left: {name}" for name in left]


class Reencrypt(Rekey):
    name = "vault reencrypt"
    words = (("vault", "reencrypt"),)


class Rotate(Scenario):
    """One picture is sealed, and another one waits."""

    name = "key rotate"
    words: tuple[tuple[str, ...], ...] = (("key", "rotate"),)

    def make(self, top: Path) -> Site:
        site = Scenario.make(self, top)
        assert not site.run("drain")
        more = {"more.jpg": small_pictures(1, SIZE)["0.jpg"]}
        site.pictures |= more
        site.rig.put(more)
        return site

    def afterwards(self, site: Site) -> list[str]:
        return Scenario.afterwards(self, site) + site.run(*self.words[0]) + site.lost()

    def in_the_end(self, site: Site) -> list[str]:
        return [] if len(site.ring()) > 1 else ["the new key is gone"]


class Retire(Rekey):
    name = "key retire"

    def make(self, top: Path) -> Site:
        site = Rekey.make(self, top)
        assert not site.run("vault", "rekey")
        self.words = (self.retire(site),)
        return site

    def retire(self, site: Site) -> tuple[str, ...]:
        """The command that forgets the former key."""
        return "key", "retire", site.ring()[1].key_id.hex()

    def afterwards(self, site: Site) -> list[str]:
        # A key that is retired already is none that it knows.
        good = (0, NoInputError.exit_code)
        return [
            *(fault for words in self.words[:-1] for fault in site.run(*words)),
            *site.run(*self.words[-1], good=good),
            *self.in_the_end(site),
            *site.lost(),
            *site.audited(),
        ]

    def in_the_end(self, site: Site) -> list[str]:
        return ["the former key is there"] * (len(site.ring()) > 1)


class RekeyRetire(Retire):
    """Once the key is gone no object may come back that needs it."""

    name = "vault rekey, key retire"

    def make(self, top: Path) -> Site:
        site = Rekey.make(self, top)
        self.words = (("vault", "rekey"), self.retire(site))
        return site


class Killed(Scenario):
    """The first run was killed when it was about to sync something; the others went on from there.

    What a dead process did is seen by all that come after it, and lasts no longer for that. There
    is a round for each of the first run's syncs.
    """

    attempts = 4

    def __init__(self, seed: int) -> None:
        Scenario.__init__(self, seed)
        self.spared = seed % self.rounds
        self.only = ""
        """Only syncs of a path that ends so count."""
        self.died = self.was_killed = False

    def disturbs(self, call: Call, *, alone: bool) -> Decision:
        if self.died or call.name not in _SYNCS:
            return None
        path = os.readlink(f"/proc/{call.thread}/fd/{call.args[0]}")
        if path.startswith(self.top) and path.endswith(self.only):
            # Of a call that another thread makes meanwhile nobody could say whether it was done.
            self.died = self.spared <= 0 and alone
            self.spared -= 1
        return Kill() if self.died else None

    def perform(self, site: Site, **how: Any) -> None:
        self.top = os.path.realpath(site.top)
        first, *others = self.words
        outcome, output = site.rig.traced(first, **how)
        assert outcome.code in {*self.good, SIGKILLED}, (first, outcome, output)
        self.died, self.was_killed = True, outcome.code == SIGKILLED
        self.words = tuple(others)
        Scenario.perform(self, site, **how)


class InitKilled(Killed, First):
    name = "key init killed, drain"
    words = (("key", "init"), ("key", "init"), ("drain",))
    rounds = 16


class RotateKilled(Killed, Rotate):
    """A key that something was sealed with may not be gone."""

    name = "key rotate killed, drain"
    words: tuple[tuple[str, ...], ...] = (("key", "rotate"), ("drain",))
    rounds = 11
    effort = FEW

    def afterwards(self, site: Site) -> list[str]:
        return Scenario.afterwards(self, site) + site.lost()

    def in_the_end(self, site: Site) -> list[str]:
        return Scenario.in_the_end(self, site)


class RetireKilled(Killed, RekeyRetire):
    name = "vault rekey killed, key retire"
    rounds = 8

    def make(self, top: Path) -> Site:
        site = RekeyRetire.make(self, top)
        self.words = (("vault", "rekey"), *self.words)
        return site


class DrainKilled(Killed):
    name = "drain killed, drain"
    words = (("drain",), ("drain",))
    rounds = 26
    effort = FEW


class WriteOnlyKilled(Killed, WriteOnly):
    """What was committed before does not open, so a claim gets another object's id."""

    name = "write-only killed, drain"
    words = (("drain",), ("drain",))
    rounds = 26
    effort = FEW


class SetAsideKilled(Killed, SetAside):
    name = "quarantine killed, drain"
    words = (("drain",), ("drain",))
    rounds = 25
    effort = FEW


class Restore(Scenario):
    """What stands under a final name is whole, from the moment on that it stands there."""

    name = "vault restore"

    def pictures(self) -> dict[str, bytes]:
        return Moved.pictures(Moved(0))

    def make(self, top: Path) -> Site:
        site = Scenario.make(self, top)
        assert not site.run("drain")
        self.words = (("vault", "restore", "--all", "--to", str(top / "out")),)
        return site

    def at_once(self, site: Site) -> list[str]:
        return site.lost() + [
            f"not whole: {path}"
            for path in (site.top / "out").rglob("*")
            if path.is_file()
            and path.suffix != ".part"
            and path.read_bytes() != site.pictures.get(str(path.relative_to(site.top / "out")))
        ]

    def afterwards(self, site: Site) -> list[str]:
        # What is there already is refused, and the rest is restored.
        faults = site.run(*self.words[0], good=(0, 1, CannotCreateError.exit_code))
        site.costs["left .part"] += len(list((site.top / "out").rglob("*.part")))
        return faults + self.in_the_end(site)

    def in_the_end(self, site: Site) -> list[str]:
        there = [name for name in site.pictures if (site.top / "out" / name).exists()]
        missing = [f"restored and gone: {n}" for n in site.pictures if n not in there]
        return missing + self.at_once(site)


class RestoreOlder(Restore):
    name = "restore, older system"
    old_system = True


class Library(Scenario):
    """A program that uses the library writes a picture over another one."""

    name = "bytes_to_image"
    count = 1

    def make(self, top: Path) -> Site:
        site = Scenario.make(self, top)
        self.versions = [self.picture(), self.picture()]
        (top / "out").mkdir()
        (top / "out" / "a.png").write_bytes(self.versions[0])
        return site

    @staticmethod
    def picture() -> bytes:
        buffer = io.BytesIO()
        Image.frombytes("RGB", (48, 64), os.urandom(48 * 64 * 3)).save(buffer, "PNG")
        return buffer.getvalue()

    def perform(self, site: Site, **how: Any) -> None:
        target = site.top / "out" / "a.png"

        def work() -> int:
            bytes_to_image(self.versions[1], target)
            return 0

        assert trace(work, **how).code == 0

    def at_once(self, site: Site) -> list[str]:
        there = (site.top / "out" / "a.png").read_bytes()
        return [] if there in self.versions else ["neither the former picture nor the new one"]

    def afterwards(self, _site: Site) -> list[str]:
        return []

    def in_the_end(self, site: Site) -> list[str]:
        there = (site.top / "out" / "a.png").read_bytes()
        return [] if there == self.versions[1] else ["the new picture is gone"]


SCENARIOS: Final[dict[str, type[Scenario]]] = {
    each.name: each
    for each in (
        *(
            Scenario,
            TwoWorkers,
            Again,
            Twice,
            Init,
            First,
            Arriving,
            Kept,
            Moved,
            InPlace,
            SetAside,
            Retry,
            NewState,
        ),
        *(Older, MovedOlder, RestoreOlder),
        *(WriteOnly, Rekey, Reencrypt, Rotate, Retire, RekeyRetire, Restore),
        *(InitKilled, RotateKilled, RetireKilled, DrainKilled, WriteOnlyKilled, SetAsideKilled),
        Library,
    )
}


# -- the campaign ---------------------------------------------------------------------------------


def record(scenario: Scenario, top: Path) -> tuple[Site, Recorder]:
    """Make a site, and record what is done to it."""
    site = scenario.make(top)
    with as_recorded(site.stands_for):
        recorder = Recorder(top)
        scenario.begin(site, recorder)

        def decide(call: Call) -> Decision:
            disturbed = scenario.disturbs(call, alone=recorder.is_idle)
            return site.lacking(call) or disturbed or recorder.decide(call)

        scenario.perform(site, decide=decide, returned=recorder.returned)
    recorder.check()
    return site, recorder


def distinct(
    disk: Disk,
    model: Model,
    points: Iterable[int],
    rng: random.Random,
    effort: Effort,
    without: frozenset[int] = frozenset(),
) -> Iterator[State]:
    """The states that a disk may be in after a crash at one of these points, each once.

    Those after the end are listed by themselves: more is asked of them.
    """
    seen = set()
    for point in points:
        ended = point == len(disk.events)
        for state in disk.states(point, model, rng, effort, without):
            key = hash((disk.key(state), ended))
            if key not in seen:
                seen.add(key)
                yield state


@dataclass(frozen=True, slots=True)
class Risk:
    """Tells by its files alone, before it is laid out, whether something may be lost in a state."""

    scenario: Scenario
    wanted: Collection[bytes]
    objects: Mapping[str, tuple[bytes, bytes]]
    """By path: each object as it was in the end, and what it holds."""
    end: int
    in_clear: Collection[bytes | None]
    """What lay in clear in the end."""

    @classmethod
    def of(cls, scenario: Scenario, site: Site, disk: Disk) -> Risk:
        """Look at a site whose commands have just ended."""
        objects = {}
        for object_id, content in site.objects().items():
            path = Vault(site.rig.vault, Reserve(0.0, 0)).object_path(object_id)
            objects[str(path.relative_to(site.top))] = (path.read_bytes(), content)
        in_clear = {entry.content for entry in disk.tree(disk.now()).values()}
        return cls(scenario, scenario.precious(site), objects, len(disk.events), in_clear)

    def __call__(self, state: State, tree: Tree) -> bool:
        """Whether it may; or lies in clear again when the commands have ended."""
        there = {entry.content for entry in tree.values()}
        if state.point == self.end and not there.intersection(self.wanted) <= set(self.in_clear):
            return True
        for path, (sealed, content) in self.objects.items():
            if path in tree and tree[path].content == sealed:
                there.add(content)
        return not there.issuperset(self.wanted) or self.scenario.suspects(tree)


def choice(
    states: Iterable[State], disk: Disk, risk: Risk, limit: int, rng: random.Random
) -> tuple[int, Collection[int]]:
    """How many states there are, and which of them to try: half of these at a risk, if any are."""
    count, risky = 0, []
    for number, state in enumerate(states):
        count += 1
        if risk(state, disk.tree(state)):
            risky.append(number)
    chosen = {risky[at] for at in sampled(len(risky), max(1, limit // 2), rng)}
    return count, chosen | set(sampled(count, max(1, limit - len(chosen)), rng))


def judge(
    scenario: Scenario, site: Site, recorder: Recorder, state: State, model: Model
) -> list[str]:
    """Lay out a state; what is wrong with it, at once and after a healthy run."""
    stands_for = lay_out(recorder.disk.tree(state), recorder)
    faults = [f"at once: {fault}" for fault in _asked(scenario.at_once, site)]
    if state.point == len(recorder.disk.events):  # the commands have ended, and said so
        faults += [f"in the end: {fault}" for fault in _asked(scenario.in_the_end, site)]
    with as_recorded(stands_for):
        later = _asked(scenario.afterwards, site)
    return faults + scenario.excused(model, later, site)


def _asked(question: Callable[[Site], list[str]], site: Site) -> list[str]:
    try:
        return question(site)
    except (SecimgError, OSError) as error:
        return [f"{type(error).__name__}: {error}"]


def described(disk: Disk, state: State) -> str:
    """What a state is, for people: the moment, and what did not last."""
    last = disk.events[state.point - 1] if state.point else None
    lines = [f"behind event {state.point} of {len(disk.events)}: {_shown(disk, last)}"]
    lines += [f"  without {_shown(disk, disk.events[at])}" for at in state.missing]
    for node, content in state.contents.items():
        held = disk.contents_of(node, state.point)
        if content != held[-1]:
            what = "an earlier one" if content in held else "torn"
            lines.append(f"  {disk.path_of(node)}: {what}, {len(content)} of {len(held[-1])} bytes")
    return "\n".join(lines)


def _shown(disk: Disk, event: Event | None) -> str:
    match event:
        case Change():
            return event.what
        case Write():
            return f"write {disk.path_of(event.node)}"
        case Sync():
            return f"sync {event.path}"
        case None:
            return "the beginning"


def nameless(text: str) -> str:
    """The same for all objects and runs."""
    text = re.sub(r"/\S*/top/", "TOP/", re.sub(r"[0-9a-f]{32}", "ID", text))
    return re.sub(r"objects/[0-9a-f]{2}\b", "objects/ab", text)


@dataclass(slots=True)
class Findings:
    """What came of one scenario under one model."""

    scenario: str
    model: str
    points: int = 0
    states: int = 0
    tried: int = 0
    seconds: float = 0.0
    costs: Counter[str] = field(default_factory=Counter)
    violations: dict[str, list[str]] = field(default_factory=dict)
    """By what is wrong: each state, described."""

    @property
    def count(self) -> int:
        return sum(map(len, self.violations.values()))

    @property
    def decides(self) -> bool:
        return self.model in SCENARIOS[self.scenario].verdict

    def line(self) -> str:
        costs = ", ".join(f"{n} {what}" for what, n in (+self.costs).items())
        return (
            f"{self.scenario:<21} {self.model:<8} {self.points:>6} {self.states:>7} {self.tried:>6}"
            f" {self.count:>10} {self.seconds:>5.0f} s  {costs}\n"
        )


HEAD: Final = (
    f"{'scenario':<21} {'model':<8} {'points':>6} {'states':>7} {'tried':>6} {'violations':>10}"
    f" {'time':>7}  costs\n"
)


@dataclass(slots=True)
class Row:
    """Syncs that nobody can tell apart, and what states there are without one of them."""

    scenario: str
    model: str
    path: str
    syncs: int = 0
    noticed: int = 0
    tried: int = 0
    faults: Counter[str] = field(default_factory=Counter)

    def line(self) -> str:
        seen = "; ".join(f"{n} x {what}" for what, n in self.faults.most_common(2))
        return (
            f"{self.scenario:<21} {self.model:<8} {self.syncs:>5} {self.noticed:>7} {self.tried:>6}"
            f"  {self.path:<44}  {seen}\n"
        )


ROW_HEAD: Final = (
    f"{'scenario':<21} {'model':<8} {'syncs':>5} {'noticed':>7} {'tried':>6}"
    f"  {'what is synced':<44}  what happens without\n"
)


@dataclass(frozen=True, slots=True)
class Task:
    """One scenario, and how much of it."""

    scenario: str
    models: tuple[str, ...]
    sample: int
    seed: int
    directory: Path | None = None
    keep: Path | None = None
    effort: Effort = USUAL
    moments: int = 1 << 30
    """That the power fails at: so many, or all."""
    sync: str = ""
    """Of syncs that are left out: only those of paths with this in them."""
    killed: str = ""
    """Of runs that were killed before: only those killed at the sync of a path that ends so."""
    first: bool = False
    """Whether the first violation is enough."""

    def findings(self) -> list[Findings]:
        """Record, and try states under each model."""
        kind = SCENARIOS[self.scenario]
        found = [Findings(self.scenario, name) for name in self.models]
        attempts = (number for number in range(kind.rounds) for _ in range(kind.attempts))
        good = -1
        for number in attempts:
            if number == good:
                continue
            with place(self.directory) as base:
                scenario = kind(self.seed + number)
                if isinstance(scenario, Killed) and self.killed:
                    scenario.only, scenario.spared = self.killed, number
                site, recorder = record(scenario, base / "top")
                if isinstance(scenario, Killed) and not scenario.was_killed:
                    continue
                good = number
                risk = Risk.of(scenario, site, recorder.disk)
                for each in found:
                    started = time.monotonic()
                    site.costs = each.costs
                    self._under(each, scenario, site, recorder, risk)
                    each.seconds += time.monotonic() - started
        return found

    def _under(
        self, found: Findings, scenario: Scenario, site: Site, recorder: Recorder, risk: Risk
    ) -> None:
        disk, model = recorder.disk, MODELS[found.model]

        def states() -> Iterator[State]:
            rng = random.Random(self.seed)
            points = sorted(sampled(len(disk.events) + 1, self.moments, rng))
            return distinct(disk, model, points, rng, scenario.effort or self.effort)

        # Twice, as they do not fit into memory all at once.
        rounds = 2 if self.killed else scenario.rounds
        limit = max(1, self.sample // rounds // scenario.share)
        count, chosen = choice(states(), disk, risk, limit, random.Random(self.seed))
        found.points += len(disk.events) + 1
        found.states += count
        for number, state in enumerate(states()):
            if number not in chosen or (self.first and found.violations):
                continue
            found.tried += 1
            twice = site.costs[TWICE]
            faults = judge(scenario, site, recorder, state, model)
            if site.costs[TWICE] > twice and model.name not in scenario.twice:
                faults.append(TWICE)
            if faults:
                what = nameless("; ".join(faults))
                known = found.violations.setdefault(what, [])
                if self.keep is not None and not known:
                    self._keep(recorder, state, found)
                known.append(described(disk, state))

    def without_syncs(self) -> list[Row]:
        """Record, and leave out each sync in turn: what is there that was not there before?"""
        scenario = SCENARIOS[self.scenario](self.seed)
        rows: dict[tuple[str, str], Row] = {}
        with place(self.directory) as base:
            site, recorder = record(scenario, base / "top")
            risk = Risk.of(scenario, site, recorder.disk)
            for name in self.models:
                for sync in recorder.disk.syncs():
                    event = recorder.disk.events[sync]
                    assert isinstance(event, Sync)
                    path = nameless(event.path) or "."
                    if self.sync not in path:
                        continue
                    row = rows.setdefault((name, path), Row(self.scenario, name, path))
                    row.syncs += 1
                    row.noticed += self._is_noticed(row, sync, scenario, site, recorder, risk)
        return list(rows.values())

    def _is_noticed(
        self,
        row: Row,
        sync: int,
        scenario: Scenario,
        site: Site,
        recorder: Recorder,
        risk: Risk,
    ) -> bool:
        disk, model = recorder.disk, MODELS[row.model]

        def states() -> Iterator[State]:
            rng, without = random.Random(self.seed), frozenset({sync})
            later = range(sync + 1, len(disk.events) + 1)
            points = [later[at] for at in sorted(sampled(len(later), FEW_MOMENTS, rng))]
            every = distinct(disk, model, points, rng, FEW, without)
            return (state for state in every if disk.needs(sync, state, model))

        limit = max(1, self.sample // scenario.share)
        _, chosen = choice(states(), disk, risk, limit, random.Random(self.seed))
        for number, state in enumerate(states()):
            if number in chosen:
                row.tried += 1
                faults = judge(scenario, site, recorder, state, model)
                if faults:
                    row.faults[nameless(faults[0])] += 1
                    return True
        return False

    def _keep(self, recorder: Recorder, state: State, found: Findings) -> None:
        assert self.keep is not None
        name = f"{found.scenario}, {found.model}, {len(found.violations)}"
        (self.keep / name).mkdir(parents=True, exist_ok=True)
        lay_out(recorder.disk.tree(state), recorder, self.keep / name)


def sampled(count: int, limit: int, rng: random.Random) -> Collection[int]:
    """So many numbers below ``count``, or all of them, the last one in any case."""
    if count <= limit:
        return range(count)
    return {*rng.sample(range(count), limit - 1), count - 1}


@contextlib.contextmanager
def place(directory: Path | None) -> Iterator[Path]:
    """Where the sites lie: in memory, or in a directory of their own below another one."""
    if directory is None:
        with scratch() as top:
            yield top
    else:
        with tempfile.TemporaryDirectory(dir=directory) as name:
            yield Path(name)


def campaign(asked: argparse.Namespace, tasks: Sequence[Task]) -> int:
    """Try states, tell of them, and give the exit code."""
    sys.stdout.write(f"seed {asked.seed}\n{HEAD}")
    everything: list[Findings] = []
    for some in done(Task.findings, tasks, asked.workers):
        everything += some
        sys.stdout.write("".join(found.line() for found in some))
        sys.stdout.flush()
    for found in everything:
        for what, states in found.violations.items():
            verdict = "VIOLATION" if found.decides else "beyond what is promised"
            head = f"{verdict} ({found.scenario}, {found.model}, {len(states)} states): {what}"
            sys.stdout.write(f"{head}\n{nameless(min(states, key=len))}\n")
    return int(any(found.violations and found.decides for found in everything))


def without_syncs(asked: argparse.Namespace, tasks: Sequence[Task]) -> int:
    """Leave out syncs, and tell what that does."""
    sys.stdout.write(f"seed {asked.seed}\n{ROW_HEAD}")
    for rows in done(Task.without_syncs, tasks, asked.workers):
        sys.stdout.write("".join(row.line() for row in rows))
        sys.stdout.flush()
    return 0


def done(act: Callable[[Task], T], tasks: Sequence[Task], workers: int) -> Iterator[T]:
    """What came of each task, in order."""
    if workers == 1:
        yield from map(act, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(act, tasks)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="cut the power at every moment of a run")
    parser.add_argument("--slice", action="store_true", help="a few states of some scenarios")
    parser.add_argument("--scenario", action="append", choices=list(SCENARIOS), help="only this")
    parser.add_argument("--model", action="append", choices=list(MODELS), help="only this")
    parser.add_argument("--states", type=int, help="tried of each at most, 1000 by default")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--dir", type=Path, help="where the sites lie; memory by default")
    parser.add_argument("--without-syncs", action="store_true", help="leave out each sync in turn")
    parser.add_argument("--sync", default="", help="only syncs of paths with this in them")
    parser.add_argument("--killed", default="", help="only runs killed at a sync of such a path")
    parser.add_argument("--first", action="store_true", help="no more after the first violation")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="lay out violating states there")
    return parser.parse_args()


def main() -> int:
    """Do what is asked."""
    asked = options()
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        sys.exit("only root may look at a process that keeps its memory from others")
    names = asked.scenario or (SLICE if asked.slice else list(SCENARIOS))
    # Under the strictest promise that is kept, and the weakest one.
    models = tuple(asked.model or (["ordered", "weak"] if asked.slice else MODELS))
    how: dict[str, Any] = {"directory": asked.dir, "keep": asked.keep, "sync": asked.sync}
    how |= {"first": asked.first, "killed": asked.killed}
    if asked.slice:
        how |= {"effort": FEW, "moments": FEW_MOMENTS}
    states = asked.states or (SLICE_STATES if asked.slice else 1000)
    tasks = [Task(name, models, states, asked.seed, **how) for name in names]
    return (without_syncs if asked.without_syncs else campaign)(asked, tasks)


if __name__ == "__main__":
    sys.exit(main())
