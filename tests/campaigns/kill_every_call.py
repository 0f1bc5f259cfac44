"""Kills each command at each of its file-system calls, and lets it recover.

``python tests/campaigns/kill_every_call.py [--all-calls] [--only WORD] [--workers N]``

Every case is a command and the site that it works on. The command is killed at the first call
that changes a disk, then at the second, and so on, until a run survives whole. After each kill
every picture has to exist, in clear or sealed, and every object has to open and to hold what
somebody wrote; whatever is gone has to be on record in the audit log as sealed. Then a healthy run
has to finish the work: everything sealed once, save where a duplicate is documented, and nothing
left of the dead run. The variants:

``once``   a kill, then a healthy run, and another one that must find nothing to do
``again``  a kill, then a recovery that is killed at a random call as well, then a healthy run
``queue``  a kill, then the queue's database is lost, then a healthy run

Without ``--all-calls`` only the calls that change a disk are tried: all others leave the same
disk as the one before them. Exit code 1 where anything was violated.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol, TypeVar
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the small site lies

from PIL import Image
from rig import STAGING, Rig, small_pictures

from secimg_watch import kernel
from secimg_watch.audit import events_of, read_log
from secimg_watch.crypto import sha256
from secimg_watch.errors import NoInputError, SecimgError
from secimg_watch.gate import check_keys
from secimg_watch.keys import provider_for
from secimg_watch.quantities import Reserve
from secimg_watch.recipients import format_recipient, generate_identity, identity_file, recipient_of
from secimg_watch.rekey import take_census
from secimg_watch.seal import open_object
from secimg_watch.tracer import CALLS, CHANGING, Call, Fail, Kill, Outcome
from secimg_watch.vault import Vault, is_object_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from secimg_watch.records import ObjectId
    from secimg_watch.slots import Opener
    from secimg_watch.tracer import Decision

T = TypeVar("T")
S = TypeVar("S", bound="_Sum")

SIGKILLED: Final = -9
PATIENCE: Final = 20.0  # seconds for a run of a few hundredths
VARIANTS: Final = ("once", "again", "queue")
_QUIET: Final = 0.004  # seconds between two looks whether a daemon is through
_LATE: Final = 12.0  # seconds after which it is told to stop in any case

# -- where a call goes ---------------------------------------------------------------------------

_AT: Final = frozenset(
    {"openat", "openat2", "newfstatat", "unlinkat", "mkdirat", "fchownat", "renameat"}
    | {"renameat2", "linkat", "fchmodat", "utimensat", "statx"}
)
_PATHS: Final = frozenset(
    {"open", "creat", "stat", "lstat", "truncate", "rename", "mkdir", "rmdir", "link", "unlink"}
    | {"symlink", "chmod", "chown", "statfs"}
)


def where(call: Call) -> str:
    """The path that a call goes to; "" where that cannot be told."""
    try:
        if call.name in _PATHS:
            return os.fsdecode(call.text(0))
        fd = ctypes.c_int(call.args[0]).value
        link = "cwd" if fd < 0 else f"fd/{fd}"
        base = os.readlink(f"/proc/{call.thread}/{link}")
        if call.name in _AT and call.args[1]:
            return os.path.join(base, os.fsdecode(call.text(1)))
    except OSError:
        return ""
    return base


# -- a site as it was ----------------------------------------------------------------------------


@dataclass(slots=True)
class _Kept:
    content: bytes | None  # None: a symbolic link
    target: str
    mode: int
    mtime_ns: int
    mark: tuple[int, ...]


def _mark(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_mode, status.st_nlink)


class Snapshot:
    """Everything below a directory, to be brought back as often as needed."""

    def __init__(self, top: Path) -> None:
        self._top = top
        self._directories: dict[str, int] = {}
        self._files: dict[str, _Kept] = {}
        for path, entry in _walk(top):
            status = entry.stat(follow_symlinks=False)
            if entry.is_dir(follow_symlinks=False):
                self._directories[path] = status.st_mode & 0o7777
            else:
                link = entry.is_symlink()
                content = None if link else (top / path).read_bytes()
                target = os.readlink(top / path) if link else ""
                mode, mtime = status.st_mode & 0o7777, status.st_mtime_ns
                self._files[path] = _Kept(content, target, mode, mtime, _mark(status))

    def restore(self) -> None:
        good = set()
        for path, entry in reversed(list(_walk(self._top))):
            if entry.is_dir(follow_symlinks=False):
                if path not in self._directories:
                    os.rmdir(self._top / path)
                elif entry.stat().st_mode & 0o7777 != self._directories[path]:
                    os.chmod(self._top / path, self._directories[path])
                continue
            kept = self._files.get(path)
            if kept is not None and _mark(entry.stat(follow_symlinks=False)) == kept.mark:
                good.add(path)
            else:
                os.unlink(self._top / path)
        for path, mode in self._directories.items():
            with contextlib.suppress(FileExistsError):
                os.mkdir(self._top / path, mode)
        for path, kept in self._files.items():
            if path not in good:
                self._write(path, kept)

    def _write(self, relative: str, kept: _Kept) -> None:
        path = self._top / relative
        if kept.content is None:
            path.symlink_to(kept.target)
        else:
            path.write_bytes(kept.content)
            os.chmod(path, kept.mode)
            os.utime(path, ns=(kept.mtime_ns, kept.mtime_ns))
        kept.mark = _mark(os.lstat(path))


def _walk(top: Path) -> Iterable[tuple[str, os.DirEntry[str]]]:
    """Every entry below, each directory before what is in it."""
    pending = [""]
    while pending:
        below = pending.pop()
        with os.scandir(top / below) as entries:
            for entry in entries:
                path = f"{below}/{entry.name}" if below else entry.name
                if entry.is_dir(follow_symlinks=False):
                    pending.append(path)
                yield path, entry


# -- cases ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class Case:
    """A command, the site that it works on, and what is to be true of that.

    ``duplicates``: how many objects too many each kill may leave; ``homeless``: how many more
    where the queue was lost. Both only where `docs/` say so.
    """

    title: str
    words: tuple[str, ...] = ("drain",)
    folder: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    workers: int = 1
    code: int = 0
    duplicates: int = 0
    homeless: int = 0
    poor: bool = False  # on a file system without renameat2 and copy_file_range

    variants: ClassVar[tuple[str, ...]] = VARIANTS

    rig: Rig = field(init=False)
    snapshot: Snapshot = field(init=False)
    pictures: dict[str, bytes] = field(init=False, default_factory=dict)
    identity: Any = field(init=False, default=None)

    # -- making it ----

    def build(self, top: Path) -> None:
        """Make the site, ready for the command."""
        policy = {name: _expand(value, top) for name, value in self.policy.items()}
        folder = {name: _expand(value, top) for name, value in self.folder.items()}
        self.rig = Rig(top, workers=self.workers, folder=folder, policy=policy)
        self.pictures = self.make_pictures()
        self.make()
        self.fill()
        self.snapshot = Snapshot(top)

    def make(self) -> None:
        """Make policy, key and vault."""
        self.rig.build()

    def make_pictures(self) -> dict[str, bytes]:
        """What arrives; the names are to be found in a file where they should not be."""
        names = ("Kazimir-8154.jpg", "Rosalind/Ostrava-4711.jpg")
        return dict(zip(names, small_pictures(len(names)).values(), strict=True))

    def fill(self) -> None:
        """Bring the site into the state that the command begins with."""
        self.rig.put(self.pictures)

    def reset(self) -> None:
        """Bring that state back."""
        self.snapshot.restore()

    # -- running it ----

    def run(
        self, decide: Callable[[Call], Decision] = lambda _call: None, **options: Any
    ) -> tuple[Outcome, str]:
        """Run the command once."""
        words = [word.replace("TOP", str(self.rig.top)) for word in self.words]
        options.setdefault("seconds", PATIENCE)
        return self.rig.traced(words, self.poorly(decide), **options)

    def poorly(self, decide: Callable[[Call], Decision]) -> Callable[[Call], Decision]:
        """Let the calls fail that an older file system lacks, where that is the case."""

        def poor(call: Call) -> Decision:
            decision = decide(call)
            lacks = decision is None and call.name in {"renameat2", "copy_file_range"}
            return Fail(errno.EINVAL) if lacks else decision

        return poor if self.poor else decide

    def recover(self) -> Iterator[tuple[Outcome, str]]:
        """What a person does after a crash: the same again."""
        yield self.run()

    def is_good(self, code: int, _output: str) -> bool:
        """Whether a command that was not killed may end so."""
        return code == self.code

    def lose_queue(self) -> None:
        for path in self.rig.state.glob("queue.sqlite*"):
            path.unlink()

    # -- the promise ----

    @property
    def openers(self) -> Sequence[Opener]:
        """What opens every object."""
        if self.identity is not None:
            return (self.identity,)
        return provider_for("file", "a/b", file=self.rig.top / "key").load_ring()

    def sealed(self) -> dict[ObjectId, bytes]:
        """What each object holds. One that does not open raises `SecimgError`."""
        vault = Vault(self.rig.vault, Reserve(0.0, 0))
        ring = () if self.identity is not None else self.openers
        vault_id = check_keys(vault, ring).vault_id  # type: ignore[arg-type]  # keys, then
        found = {}
        for object_id in vault.object_ids():
            with vault.object_path(object_id).open("rb") as stream:
                opened = open_object(stream, self.openers, expect=object_id, vault_id=vault_id)
                opened.preview()
                found[object_id] = b"".join(map(bytes, opened.body()))
        return found

    def plaintexts(self) -> dict[str, bytes]:
        """Everything that lies in clear, by its path below the site."""
        places = (self.rig.drop, self.rig.top / "originals")
        return {
            str(path.relative_to(self.rig.top)): path.read_bytes()
            for place in places
            for path in place.rglob("*")
            if path.is_file() and not path.is_symlink()
        }

    def broken(self) -> list[str]:
        """What no crash may do: said of the disk as it is."""
        try:
            sealed = self.sealed()
        except SecimgError as error:
            return [f"an object or the vault does not open: {error}"]
        faults = []
        there = {sha256(content) for content in self.plaintexts().values()}
        there |= {sha256(content) for content in sealed.values()}
        faults += [f"lost: {name}" for name, c in self.pictures.items() if sha256(c) not in there]
        wanted = set(self.pictures.values())
        faults += [
            f"object {i} holds what nobody wrote" for i, c in sealed.items() if c not in wanted
        ]
        faults += self.strangers()
        return faults + self.unrecorded(sealed) + self.exposed()

    def unrecorded(self, sealed: Mapping[ObjectId, bytes]) -> list[str]:
        """Pictures that are gone, and of whose objects none is on record as sealed."""
        recorded: set[object] = set()
        with contextlib.suppress(NoInputError):  # nothing has run yet
            events = events_of(read_log(self.rig.state))
            recorded = {each.fields.get("object") for each in events if each.event == "sealed"}
        known = {content for object_id, content in sealed.items() if object_id in recorded}
        known.update(self.plaintexts().values())
        return [f"gone, and not on record: {n}" for n, c in self.pictures.items() if c not in known]

    def strangers(self) -> list[str]:
        """Names under ``objects/`` that are none of an object."""
        return [
            f"a stranger in the vault: {path.name}"
            for path in self.rig.vault.glob("objects/??/*")
            if path.suffix != ".simg" or not is_object_id(path.stem)
        ]

    def exposed(self) -> list[str]:
        """Files of the vault and the state that hold a part of a picture in clear."""
        pieces = [content[1000:1064] for content in self.pictures.values()]
        return [
            f"a picture in clear in {path}"
            for place in (self.rig.vault, self.rig.state)
            for path in _files(place)
            for data in (path.read_bytes(),)
            if any(piece in data for piece in pieces)
        ]

    def unfinished(self, duplicates: int) -> list[str]:
        """What is not as it should be after a healthy run."""
        faults = self.broken()
        if faults:
            return faults
        sealed = Counter(self.sealed().values())
        faults += [f"not sealed: {n}" for n, c in self.pictures.items() if not sealed[c]]
        faults += self.in_clear()
        faults += [f"left in tmp: {name}" for name in os.listdir(self.rig.vault / "tmp")]
        faults += self.left_in_staging()
        total, wanted = sealed.total(), len(self.pictures)
        if total > wanted + duplicates:
            faults.append(f"{total} objects for {wanted} pictures")
        return faults + self.queue_faults(total) + self.names_left()

    def in_clear(self) -> list[str]:
        return [f"in clear: {name}" for name in self.plaintexts()]

    def left_in_staging(self) -> list[str]:
        staging = self.rig.drop / STAGING
        names = os.listdir(staging) if staging.is_dir() else []
        return [f"left in staging: {n}" for n in names if n not in self.expected_in_staging]

    def states(self) -> dict[str, int]:
        """How many jobs are in which state."""
        with contextlib.closing(sqlite3.connect(self.rig.state / "queue.sqlite")) as queue:
            return dict(queue.execute("SELECT state, count(*) FROM job GROUP BY state"))

    expected_states: ClassVar[dict[str, int]] = {}
    expected_in_staging: ClassVar[tuple[str, ...]] = ()

    def queue_faults(self, _objects: int) -> list[str]:
        states = self.states()
        return [] if states == self.expected_states else [f"the queue says {states}"]

    def names_left(self) -> list[str]:
        """Files of the state that know the name of a picture that is not in clear any more."""
        there = {name.rpartition("/")[2] for name in self.plaintexts()}
        gone = {name.rpartition("/")[2] for name in self.pictures} - there
        return [
            f"the name {name} in {path}"
            for path in _files(self.rig.state)
            for data in (path.read_bytes(),)
            for name in gone
            if name.encode() in data
        ]

    def audit_faults(self) -> list[str]:
        """What the audit log's check finds."""
        words = ["audit", "verify"]
        if self.identity is not None:
            words += ["--identity", str(self.rig.top / "identity")]
        sink = io.StringIO()
        with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            code = self.rig._command(words)
        return [f"audit verify: {code}: {sink.getvalue()}"] if code else []


def _expand(value: Any, top: Path) -> Any:
    return value.replace("TOP", str(top)) if isinstance(value, str) else value


def _files(place: Path) -> list[Path]:
    return [path for path in place.rglob("*") if path.is_file()]


@dataclass(slots=True)
class Inspected(Case):
    """Real pictures, which a confined child decodes."""

    def make_pictures(self) -> dict[str, bytes]:
        pictures = {}
        for number, name in enumerate(("Kazimir-8154.jpg", "Rosalind/Ostrava-4711.jpg")):
            buffer = io.BytesIO()
            noise = Image.frombytes("RGB", (64, 48 + number), os.urandom(64 * (48 + number) * 3))
            noise.save(buffer, "JPEG")
            pictures[name] = buffer.getvalue()
        return pictures


@dataclass(slots=True)
class Kept(Case):
    """The plaintext stays."""

    expected_states: ClassVar[dict[str, int]] = {"kept": 2}

    def in_clear(self) -> list[str]:
        wanted = {f"drop/{name}": content for name, content in self.pictures.items()}
        return [] if self.plaintexts() == wanted else ["what was to be kept is not as it was"]


@dataclass(slots=True)
class Moved(Case):
    """The plaintext goes elsewhere."""

    def in_clear(self) -> list[str]:
        wanted = {f"originals/{name}": content for name, content in self.pictures.items()}
        there = self.plaintexts()
        return (
            [] if there == wanted else [f"what was to be moved is not there once: {sorted(there)}"]
        )


@dataclass(slots=True)
class InPlace(Case):
    """There can be no staging directory: a link has its name."""

    def fill(self) -> None:
        (self.rig.drop / STAGING).symlink_to(self.rig.top)
        Case.fill(self)

    def left_in_staging(self) -> list[str]:
        return []


_LETTER: Final = "Zbigniew-1234.pdf"


@dataclass(slots=True)
class NoPicture(Inspected):
    """A picture, and something that is none: if no decoder could be asked, that is sealed, too."""

    letter: bytes = b""

    def fill(self) -> None:
        Inspected.fill(self)
        self.letter = b"%PDF-1.7 letter" + b"\n%" * 500
        self.rig.put({_LETTER: self.letter})

    def is_sealed(self) -> bool:
        self.pictures.pop(_LETTER, None)
        with contextlib.suppress(SecimgError):
            if self.letter in self.sealed().values():
                self.pictures[_LETTER] = self.letter
        return _LETTER in self.pictures

    def is_good(self, code: int, _output: str) -> bool:
        return code == (0 if self.is_sealed() else self.code)

    def broken(self) -> list[str]:
        self.is_sealed()
        return Inspected.broken(self)

    def in_clear(self) -> list[str]:
        there = [name.endswith(_LETTER) for name in self.plaintexts()]
        return [] if there == [True] * (not self.is_sealed()) else [f"in clear: {there}"]

    def left_in_staging(self) -> list[str]:
        faults = Inspected.left_in_staging(self)
        staging = self.rig.drop / STAGING
        names = os.listdir(staging) if staging.is_dir() else []
        lacking = set(self.expected_in_staging).difference(names)
        return faults + [f"not in staging: {n}" for n in lacking if not self.is_sealed()]

    def queue_faults(self, objects: int) -> list[str]:
        return (
            [] if self.is_sealed() and not self.states() else Inspected.queue_faults(self, objects)
        )


@dataclass(slots=True)
class Left(NoPicture):
    """It stays where it is."""

    expected_states: ClassVar[dict[str, int]] = {"left": 1}


@dataclass(slots=True)
class SetAside(NoPicture):
    """It goes into quarantine."""

    expected_states: ClassVar[dict[str, int]] = {"quarantined": 1}
    expected_in_staging: ClassVar[tuple[str, ...]] = ("quarantine",)


@dataclass(slots=True)
class Interrupted(Case):
    """A run that died before it: a picture is committed and not deleted, another is claimed."""

    def fill(self) -> None:
        Case.fill(self)

        def at_the_first_deletion(call: Call) -> Decision:
            return Kill() if call.name == "unlinkat" and STAGING in where(call) else None

        outcome, output = self.rig.traced(["drain"], at_the_first_deletion)
        assert outcome.code == SIGKILLED, output


@dataclass(slots=True)
class Made(Case):
    """A site without a key and a vault, which are made before the first run."""

    variants: ClassVar[tuple[str, ...]] = ("once", "again")

    def make(self) -> None:
        self.rig.top.mkdir(parents=True)
        self.rig.drop.mkdir()
        self.rig.write_policy()

    def sealed(self) -> dict[ObjectId, bytes]:
        return Case.sealed(self) if (self.rig.vault / "vault.json").exists() else {}

    def recover(self) -> Iterator[tuple[Outcome, str]]:
        yield self.run()
        yield self.rig.traced(["drain"])


@dataclass(slots=True)
class WriteOnly(Case):
    """The machine has no key that opens what it seals."""

    def build(self, top: Path) -> None:
        self.identity = generate_identity()
        top.mkdir(parents=True, exist_ok=True)
        (top / "identity").write_text(identity_file(self.identity))
        self.policy = {
            "key": {"provider": "none"},
            "recipients": [format_recipient(recipient_of(self.identity))],
        }
        Case.build(self, top)


@dataclass(slots=True)
class Running(Case):
    """The daemon, which is told to stop once there is nothing left to do, or it takes too long."""

    def run(
        self, decide: Callable[[Call], Decision] = lambda _call: None, **options: Any
    ) -> tuple[Outcome, str]:
        over = threading.Event()
        helpers: list[threading.Thread] = []

        def stop_when_clear(pid: int) -> None:
            late = time.monotonic() + _LATE
            while not over.wait(_QUIET):
                if self._is_clear(pid) or time.monotonic() > late:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGTERM)
                    return

        def watched(call: Call) -> Decision:
            if not helpers:  # the first call is the main thread's
                helpers.append(threading.Thread(target=stop_when_clear, args=(call.thread,)))
                helpers[0].start()
            return decide(call)

        try:
            return Case.run(self, watched, **options)
        finally:
            over.set()
            for helper in helpers:
                helper.join()

    def _is_clear(self, pid: int) -> bool:
        try:
            status = json.loads((self.rig.state / "status.json").read_text())
            busy = [*self.plaintexts(), *os.listdir(self.rig.drop / STAGING)]
        except (OSError, ValueError):
            return False  # it has not begun, or works this very moment
        return status["pid"] == pid and not busy and self._queue_is_empty()

    def _queue_is_empty(self) -> bool:
        # Of a copy: to read the queue itself is to keep its owner from emptying the log.
        with tempfile.TemporaryDirectory() as copy:
            try:
                for name in ("queue.sqlite", "queue.sqlite-wal"):
                    shutil.copy(self.rig.state / name, copy)
                with contextlib.closing(sqlite3.connect(Path(copy) / "queue.sqlite")) as queue:
                    return not queue.execute("SELECT count(*) FROM job").fetchone()[0]
            except (OSError, sqlite3.Error):
                return False


@dataclass(slots=True)
class Full(Case):
    """A command on a vault whose pictures were sealed before."""

    variants: ClassVar[tuple[str, ...]] = ("once", "again")

    def fill(self) -> None:
        Case.fill(self)
        outcome, output = self.rig.traced(["drain"])
        assert outcome.code == 0, output
        self.prepare()

    def prepare(self) -> None:
        """What else has to be done before the command."""

    def rotate(self) -> None:
        assert self.rig.run_here("key", "rotate") == 0

    def ring(self) -> list[bytes]:
        """The ids of the stored keys."""
        ring = provider_for("file", "a/b", file=self.rig.top / "key").load_ring()
        return [each.key_id for each in ring]

    def slots(self) -> dict[bytes, int]:
        """How many objects open with which key."""
        census = take_census(Vault(self.rig.vault, Reserve(0.0, 0)))
        return {key_id: count for (_, key_id), count in census.slots.items()}

    def unfinished(self, duplicates: int) -> list[str]:
        faults = Case.unfinished(self, duplicates)
        aside = self.rig.vault / "rekey"
        left = [n for n in os.listdir(aside) if n != "lock"] if aside.is_dir() else []
        faults += [f"left in rekey: {name}" for name in left]
        hidden = [n for n in os.listdir(self.rig.top) if n.startswith(".")]
        faults += [f"left beside the key: {len(hidden)} files" for _ in hidden[:1]]
        return faults


@dataclass(slots=True)
class Rekeyed(Full):
    """Other keys for every object."""

    def prepare(self) -> None:
        self.rotate()

    def unfinished(self, duplicates: int) -> list[str]:
        faults = Full.unfinished(self, duplicates)
        current = {self.ring()[0]: len(self.pictures)}
        return faults + ([] if self.slots() == current else ["not all have the current key"])


@dataclass(slots=True)
class Rotated(Full):
    """A new key."""

    def unfinished(self, duplicates: int) -> list[str]:
        faults = Full.unfinished(self, duplicates)
        known = Vault(self.rig.vault, Reserve(0.0, 0)).info().checks
        return faults + ([] if self.ring()[0] in known else ["the vault does not know the key"])


@dataclass(slots=True)
class Retired(Full):
    """A former key is forgotten."""

    former: str = field(init=False, default="")

    def prepare(self) -> None:
        self.rotate()
        assert self.rig.run_here("vault", "rekey") == 0
        self.former = self.ring()[-1].hex()
        self.words = ("key", "retire", self.former)

    def is_good(self, code: int, output: str) -> bool:
        # The run that was killed may have done it all.
        return code == 0 or (code == 66 and "there is no key" in output)

    def unfinished(self, duplicates: int) -> list[str]:
        faults = Full.unfinished(self, duplicates)
        known = Vault(self.rig.vault, Reserve(0.0, 0)).info().checks
        forgotten = {bytes.fromhex(self.former)}.isdisjoint({*known, *self.ring()})
        return faults + ([] if forgotten else ["the former key is still known"])


@dataclass(slots=True)
class Restored(Full):
    """Everything back in clear, elsewhere."""

    def is_good(self, code: int, output: str) -> bool:
        # What the run that was killed restored is not overwritten.
        return code == 0 or (code == 1 and "exists already" in output)

    def broken(self) -> list[str]:
        faults = Full.broken(self)
        target = self.rig.top / "restored"
        for path in _files(target) if target.is_dir() else []:
            wanted = self.pictures.get(str(path.relative_to(target)))
            if not path.name.endswith(".part") and path.read_bytes() != wanted:
                faults.append(f"not whole: {path.name}")
        return faults

    def unfinished(self, duplicates: int) -> list[str]:
        faults = Full.unfinished(self, duplicates)
        target = self.rig.top / "restored"
        there = {
            str(path.relative_to(target)): content
            for path in _files(target)
            for content in (path.read_bytes(),)
            if content or not path.name.endswith(".part")  # that has told the umask
        }
        return faults + ([] if there == self.pictures else [f"restored: {sorted(there)}"])


@dataclass(slots=True)
class Retried(Case):
    """What was set aside comes back, and is sealed by a policy that takes it now."""

    def recover(self) -> Iterator[tuple[Outcome, str]]:
        yield self.run()
        yield self.rig.traced(["drain"])

    variants: ClassVar[tuple[str, ...]] = ("once", "again")
    expected_in_staging: ClassVar[tuple[str, ...]] = ("quarantine",)

    def make_pictures(self) -> dict[str, bytes]:
        return {"Rosalind/Zbigniew-1234.pdf": b"%PDF-1.7 letter" + os.urandom(40_000)}

    def fill(self) -> None:
        self.rig.folder["not_image"] = "quarantine"
        self.rig.write_policy()
        Case.fill(self)
        outcome, output = self.rig.traced(["drain"])
        assert outcome.code == 1, output
        del self.rig.folder["not_image"]
        self.rig.write_policy()


def cases() -> list[Case]:
    """Make all of them."""
    slow = {"not_image": "leave", "preview": 64}
    return [
        Case("drain, one worker"),
        Case("drain, two workers", workers=2),
        Case("drain, no renameat2", poor=True),
        Inspected("drain, inspected", folder=slow),
        Kept("drain, after: keep", folder={"after": "keep"}, homeless=2),
        Moved("drain, after: move", folder={"after": "move:TOP/originals"}),
        Moved(
            "drain, after: move, no renameat2", folder={"after": "move:TOP/originals"}, poor=True
        ),
        InPlace("drain, in place", homeless=2),
        Left("drain, not_image: leave", folder=slow),
        SetAside("drain, not_image: quarantine", folder=slow | {"not_image": "quarantine"}, code=1),
        WriteOnly("drain, write-only", duplicates=2),
        Interrupted("drain, after a kill"),
        Made("key init", ("key", "init")),
        Running("run", ("run",)),
        Running("run, two workers", ("run",), workers=2),
        Rekeyed("vault rekey", ("vault", "rekey")),
        Rekeyed("vault rekey, no copy_file_range", ("vault", "rekey"), poor=True),
        Rekeyed("vault reencrypt", ("vault", "reencrypt")),
        Restored("vault restore", ("vault", "restore", "--all", "--to", "TOP/restored")),
        Rotated("key rotate", ("key", "rotate")),
        Retired("key retire"),
        Retried("jobs retry", ("jobs", "retry", "--all")),
    ]


# -- killing -------------------------------------------------------------------------------------


@dataclass(slots=True)
class Tally:
    """What came of one case in one variant."""

    title: str
    variant: str
    calls: int = 0  # that an undisturbed run makes, of those that are tried
    points: int = 0
    runs: int = 0
    most: int = 0  # objects too many, in the worst case
    seconds: float = 0.0
    violations: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Take in what another process found."""
        self.calls = max(self.calls, other.calls)
        self.points += other.points
        self.runs += other.runs
        self.most = max(self.most, other.most)
        self.seconds += other.seconds
        self.violations += other.violations


@dataclass(slots=True)
class Killer:
    """Kills at the n-th of the calls that count; 0: counts only."""

    n: int
    top: str | None  # count every call below this place, not only those that change something
    seen: int = 0
    at: str = ""

    def __call__(self, call: Call) -> Decision:
        if not self._counts(call):
            return None
        self.seen += 1
        if self.seen != self.n:
            return None
        self.at = f"{call.name} {where(call)}"
        return Kill()

    def _counts(self, call: Call) -> bool:
        if self.top is None:
            return call.changes
        path = where(call)
        return not path or path.startswith(self.top)


@dataclass(slots=True)
class Campaign:
    """One case in one variant, killed at as many points as wanted."""

    case: Case
    tally: Tally
    all_calls: bool
    dice: random.Random

    def killed(self, n: int) -> tuple[Killer, bool]:
        """Run the command with a kill at the n-th call, and look; whether it died there."""
        killer = Killer(n, str(self.case.rig.top) if self.all_calls else None)
        outcome, output = self.case.run(killer, calls=CALLS if self.all_calls else CHANGING)
        self.tally.runs += 1
        if outcome.code == SIGKILLED and killer.at:
            self.note(f"call {n}, {killer.at}", self.case.broken())
            return killer, True
        self.check(outcome, output, f"call {n} was not reached")
        return killer, False

    def count(self) -> None:
        """Let the command run undisturbed."""
        self.case.reset()
        killer, _ = self.killed(0)
        self.tally.calls = killer.seen
        self.recover("undisturbed", 0)

    def point(self, n: int) -> bool:
        """Try one point; whether the command got as far as that."""
        self.tally.points += 1
        self.case.reset()
        killer, died = self.killed(n)
        what, kills = f"call {n}, {killer.at}", int(died)
        match self.tally.variant:
            case "queue":
                self.case.lose_queue()
                what += ", the queue lost"
            case "again":
                second, died_again = self.killed(self.dice.randint(1, self.tally.calls))
                kills += died_again
                what += f", then call {second.n}, {second.at}"
        for more in ("", ", and once more")[: 1 + (self.tally.variant == "once")]:
            self.recover(f"{what}, then a healthy run{more}", kills)
        return died

    def recover(self, what: str, kills: int) -> None:
        """Do what a person would, and look."""
        for outcome, output in self.case.recover():
            self.tally.runs += 1
            self.check(outcome, output, what)
        self.judge(what, kills)

    def judge(self, what: str, kills: int) -> None:
        """Look at the site after a healthy run."""
        legal = self.case.duplicates * kills
        if self.tally.variant == "queue":
            legal += self.case.homeless
        self.note(what, self.case.unfinished(legal))
        self.note(what, self.case.audit_faults())
        objects = len(list(self.case.rig.vault.glob("objects/??/*.simg")))
        self.tally.most = max(self.tally.most, objects - len(self.case.pictures))

    def check(self, outcome: Outcome, output: str, what: str) -> None:
        """Look at how a run ended that was not killed."""
        if outcome.timed_out:
            self.note(what, ["it did not end"])
        elif not self.case.is_good(outcome.code, output):
            self.note(what, [f"exit code {outcome.code}: {output.strip()}"])

    def note(self, what: str, faults: Iterable[str]) -> None:
        where_ = f"{self.case.title} ({self.tally.variant}): {what}"
        self.tally.violations += [f"{where_}: {fault}" for fault in faults]


@dataclass(frozen=True, slots=True)
class Task:
    """What one process does: every ``step``-th point from ``start`` on, or a sample."""

    title: str
    variant: str
    start: int
    step: int
    sample: int
    seed: int
    all_calls: bool
    directory: Path | None
    first: bool

    def __call__(self) -> Tally:
        """Do it; the process has no other threads and no other children."""
        started = time.monotonic()
        case = next(each for each in cases() if each.title == self.title)
        tally = Tally(self.title, self.variant)
        dice = random.Random(f"{self.seed} {self.title} {self.variant} {self.start}")
        with a_place(self.directory) as top:
            case.build(top)
            campaign = Campaign(case, tally, self.all_calls, dice)
            campaign.count()
            if self.sample:
                for _ in range(self.sample):
                    campaign.point(dice.randint(1, tally.calls))
            else:
                n = self.start
                while campaign.point(n) and not (self.first and tally.violations):
                    n += self.step
        tally.seconds = time.monotonic() - started
        return tally


def _do(task: Task) -> Tally:
    return task()


class _Sum(Protocol):
    def add(self, other: Any, /) -> None: ...


def in_processes(
    do: Callable[[T], S], tasks: Sequence[T], workers: int, shares: int
) -> Iterator[S]:
    """Do tasks in processes of their own, and add up each ``shares`` that follow one another.

    With no ``workers`` they are done here.
    """
    if not workers:
        yield from map(do, tasks)
        return
    # Each is a fresh one: whoever traces may have no other threads.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        results = pool.imap(do, tasks)
        for first in results:
            for _ in range(shares - 1):
                first.add(next(results))
            yield first


@contextlib.contextmanager
def a_place(directory: Path | None) -> Iterator[Path]:
    """A place for a site, and processes there that can be looked into."""
    memory = Path("/dev/shm")
    usual = memory if os.access(memory, os.W_OK) else None
    with (
        tempfile.TemporaryDirectory(dir=directory or usual) as name,
        # Who is not root may not look where the calls of such a process go.
        mock.patch.object(kernel, "protect_memory", return_value=None),
    ):
        yield Path(name) / "site"


def report(tally: Tally) -> str:
    line = "{:<34} {:<6} {:>5} {:>6} {:>6} {:>10} {:>10} {:>5.0f} s\n"
    return line.format(
        tally.title,
        tally.variant,
        tally.calls,
        tally.points,
        tally.runs,
        max(tally.most, 0),
        len(tally.violations),
        tally.seconds,
    )


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="kill each command at each of its calls")
    parser.add_argument("--slice", action="store_true", help="a few points of some cases")
    parser.add_argument("--all-calls", action="store_true", help="those that change nothing too")
    parser.add_argument("--only", default="", help="cases with this in their title")
    parser.add_argument("--variant", choices=VARIANTS, help="this variant only")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--first", action="store_true", help="no more after the first violation")
    parser.add_argument("--dir", type=Path, help="where the sites lie; memory by default")
    return parser.parse_args()


# One after another: every case whose run takes no more than moments, each in one variant.
SLICE: Final = (
    ("drain, one worker", "queue"),
    ("drain, after a kill", "once"),
    ("drain, write-only", "again"),
    ("vault rekey", "again"),
    ("vault restore", "once"),
    ("key rotate", "once"),
)
_SAMPLE: Final = 3


def tasks(asked: argparse.Namespace) -> Iterator[Task]:
    """What there is to do."""
    how = (asked.seed, asked.all_calls, asked.dir, asked.first)
    if asked.slice:
        for title, variant in SLICE:
            yield Task(title, variant, 1, 1, _SAMPLE, *how)
        return
    for case in cases():
        for variant in case.variants:
            if asked.only in case.title and asked.variant in {None, variant}:
                for start in range(1, asked.workers + 1):
                    yield Task(case.title, variant, start, asked.workers, 0, *how)


def main() -> int:
    asked = options()
    started = time.monotonic()
    sys.stdout.write(f"seed {asked.seed}\n")
    columns = ("case", "", "calls", "points", "runs", "duplicates", "violations", "time")
    sys.stdout.write("{:<34} {:<6} {:>5} {:>6} {:>6} {:>10} {:>10} {:>7}\n".format(*columns))
    total = Tally("all", "")
    workers = 0 if asked.slice else asked.workers
    for tally in in_processes(_do, list(tasks(asked)), workers, workers):
        sys.stdout.write(report(tally))
        sys.stdout.flush()
        total.add(tally)
    total.seconds = time.monotonic() - started
    sys.stdout.write(report(total))
    for violation in total.violations:
        sys.stdout.write(f"VIOLATION {violation}\n")
    if not total.runs:
        sys.stdout.write("no case has this in its title\n")
        return 2
    return 1 if total.violations else 0


if __name__ == "__main__":
    sys.exit(main())
