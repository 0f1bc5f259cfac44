"""The audit log as bytes: entries that are chained and keyed, and what checking them finds.

One JSON object a line. The last member of each is ``mac``: HMAC-SHA-256 over the MAC of the entry
before (32 zero bytes for the first) and over the line up to there. So an entry that is changed,
removed, moved or put in makes the chain break at its place for everybody who has the key, and
nobody else can mend it. That nothing is missing at the end is what the *head* is for: number and
MAC of the last entry that is on disk for certain, kept beside the log under a MAC of its own.

The key belongs to an *epoch*, which begins with an entry of that name; the first entry is one. It
is random, and wrapped like an object's file key: that entry carries the header of an object
without sections, with a slot for each key of the policy and each recipient. It also carries the
former epoch's key, wrapped with the new one, where that was at hand: who opens the last epoch
opens those before. Where it was not, the entry carries the head that was found instead, to be
checked by whoever can. A write-only machine cannot open its own log; it begins an epoch at each
start, and forgets the key at the end. Anybody can do the same who knows a recipient's public key,
so what opens with a private key alone proves little where there is a key.

A crash may leave something behind the last entry that is none: *debris*. The next entry says how
many bytes, and their hash.

Everything here takes and gives bytes; `audit.py` has the files.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import io
import json
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from secimg_watch import crypto
from secimg_watch.container import SEALED_META, Core, Header
from secimg_watch.errors import KeyMismatchError, NotReadyError, TamperedError
from secimg_watch.records import FileKey, ObjectId
from secimg_watch.seal import build_header, open_header, read_header
from secimg_watch.slots import PasswordCache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from secimg_watch.slots import Lock, Opener

Fields: TypeAlias = "Mapping[str, str | int]"
"""What an entry says besides its number, its time and what happened."""

START: Final = bytes(32)
"""What stands for the MAC before the first entry."""

EPOCH: Final = "epoch"
"""The event that begins an epoch; its fields are made by `Epoch.fields`."""

TORN: Final = "torn"
"""The event that accounts for debris: how many ``bytes``, their ``sha256``, and how many entries
are ``lost`` that had been on disk (``unknown`` where the head cannot tell). An epoch that begins
there accounts for it itself."""

FIRST: Final = 2
"""Entries that may be on disk before there is a head at all: what begins an epoch, and one more."""

HEAD_SIZE: Final = 178
"""Bytes of a stored head, always."""

MAX_LINE: Final = 64 * 1024
"""Bytes of the longest line that is read as an entry: an epoch with eight slots has 14 KiB."""

MAX_FAULTS: Final = 100
"""Faults that are named one by one."""

_LOG_ID: Final = b"secimg-watch/log"  # stands for a vault's id: no object has this one
_MAC_LABEL: Final = b"secimg-watch/v1/audit-mac\0"
_FORMER_LABEL: Final = b"secimg-watch/v1/audit-former\0"
_HEAD_LABEL: Final = b"secimg-watch/v1/audit-head\0"
_LINE: Final = re.compile(rb'(\{"n":[0-9]{1,15},"time":".*),"mac":"([0-9a-f]{64})"\}\n')
_SPECIAL: Final = re.compile(rb'"event":"(epoch|torn)"')  # as `write_entry` writes it
_HEAD: Final = re.compile(rb"([0-9]{15}) ([0-9a-f]{64}) ([0-9]{15}) ([0-9]{15}) ([0-9a-f]{64})\n")


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry. ``body`` is the line up to the MAC."""

    number: int
    time: str  # UTC, as RFC 3339
    event: str
    fields: dict[str, str | int]
    body: bytes
    mac: bytes  # 32 bytes


@dataclass(slots=True)
class Epoch:
    """The key of a run of entries, and the header that it is wrapped in."""

    root: bytes = field(repr=False)  # 32 bytes
    header: Header
    _mac_key: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Derive once what every entry needs."""
        self._mac_key = self._key(_MAC_LABEL)

    @classmethod
    def begin(cls, locks: Sequence[Lock]) -> Epoch:
        """A new key, wrapped for each of ``locks``."""
        root = crypto.random_bytes(crypto.KEY_SIZE)
        core = Core(SEALED_META[0], 0, ObjectId(crypto.random_bytes(16).hex()), _LOG_ID)
        return cls(root, build_header(core, locks, root, PasswordCache()))

    @classmethod
    def open(cls, fields: Fields, openers: Sequence[Opener]) -> Epoch:
        """Unwrap the key of the epoch that an entry begins.

        Raises:
            KeyMismatchError: none of ``openers`` is one that it was wrapped for.
            TamperedError: the entry is damaged.
        """
        header = _header(fields)
        return cls(open_header(header, openers, PasswordCache()), header)

    @property
    def key_ids(self) -> frozenset[bytes]:
        """Ids of all keys and recipients that open it."""
        return frozenset(slot.key_id for slot in self.header.slots)

    def fields(self, former: Epoch | None) -> dict[str, str | int]:
        """What the entry says that begins this epoch."""
        wrapped = crypto.wrap_key(self._key(_FORMER_LABEL), former.root) if former else b""
        packed = base64.b64encode(self.header.pack()).decode()
        return {"header": packed, "former": base64.b64encode(wrapped).decode()}

    def former(self, fields: Fields, before: Fields) -> Epoch | None:
        """The epoch before, which ``before`` begins; ``None`` where its key was not at hand.

        Raises:
            TamperedError: one of the entries is damaged.
        """
        wrapped = _decoded(fields.get("former", ""))
        if not wrapped:
            return None
        root = FileKey(crypto.unwrap_key(self._key(_FORMER_LABEL), wrapped))
        header = _header(before)
        return Epoch(open_header(header, [root], PasswordCache()), header)

    def mac(self, previous: bytes, body: bytes) -> bytes:
        """The MAC of an entry behind the one with the MAC ``previous``."""
        return crypto.header_mac(self._mac_key, previous + body)

    def head_mac(self, stated: bytes) -> bytes:
        """The MAC of a head."""
        return crypto.header_mac(self._key(_HEAD_LABEL), stated)

    def _key(self, label: bytes) -> bytes:
        return crypto.hkdf_expand(self.root, label + self.header.core.pack(), crypto.KEY_SIZE)


@dataclass(frozen=True, slots=True)
class Head:
    """The last entry that is on disk for certain, and where to go on reading.

    ``end`` and ``epoch`` are offsets in the log, in bytes: behind that entry, and of the entry
    that begins its epoch. ``seal`` is a MAC over the rest.
    """

    number: int
    mac: bytes
    end: int
    epoch: int
    seal: bytes = b""

    def sealed(self, epoch: Epoch) -> Head:
        """This head with its MAC."""
        return replace(self, seal=epoch.head_mac(self._stated()))

    def is_of(self, epoch: Epoch) -> bool:
        """Whether it was sealed by somebody with the epoch's key."""
        return crypto.equal(epoch.head_mac(self._stated()), self.seal)

    def pack(self) -> bytes:
        """As it is stored. Always of one length, so that it is replaced by a single write."""
        return self._stated() + b" " + self.seal.hex().encode() + b"\n"

    def _stated(self) -> bytes:
        return f"{self.number:015d} {self.mac.hex()} {self.end:015d} {self.epoch:015d}".encode()

    @classmethod
    def parse(cls, data: bytes) -> Head | None:
        """What a stored head says; ``None`` where it is none. Nothing is authenticated."""
        match = _HEAD.fullmatch(data[:HEAD_SIZE])
        if match is None:
            return None
        number, mac, end, epoch, seal = (each.decode() for each in match.groups())
        return cls(int(number), bytes.fromhex(mac), int(end), int(epoch), bytes.fromhex(seal))


def write_entry(
    number: int, time: str, event: str, fields: Fields, *, epoch: Epoch, previous: bytes
) -> tuple[bytes, bytes]:
    """A line of the log, and its MAC."""
    said: dict[str, Any] = {"n": number, "time": time, "event": event, **fields}
    body = json.dumps(said, separators=(",", ":"), ensure_ascii=True).encode()[:-1]
    mac = epoch.mac(previous, body)
    return body + b',"mac":"' + mac.hex().encode() + b'"}\n', mac


def parse_entry(line: bytes) -> Entry | None:
    """The entry that a line, with its end, has the form of. Nothing is authenticated."""
    match = _LINE.fullmatch(line) if len(line) < MAX_LINE else None
    if match is None:
        return None
    body, mac = match.groups()
    try:
        said = json.loads(body + b"}")
        number, time, event = said.pop("n"), said.pop("time"), said.pop("event")
    except (ValueError, KeyError, RecursionError):
        return None
    # Any JSON may stand there; of two members of one name the last one counts.
    if type(number) is not int or not isinstance(time, str) or not isinstance(event, str):
        return None
    if not all(isinstance(value, str | int) for value in said.values()):
        return None
    return Entry(number, time, event, said, body, bytes.fromhex(mac.decode()))


def epoch_header(fields: Fields) -> bytes:
    """The packed header in an entry that begins an epoch.

    Raises:
        TamperedError: the entry is damaged.
    """
    return _decoded(fields.get("header", ""))


def _header(fields: Fields) -> Header:
    header = read_header(io.BytesIO(epoch_header(fields)))
    if header.core.vault_id != _LOG_ID:
        raise TamperedError("an epoch of the audit log begins with something else than its key")
    return header


def _head_in(entry: Entry) -> Head | None:
    """The head that an entry passes on."""
    return Head.parse(str(entry.fields.get("head", "")).encode(errors="replace"))


def _decoded(text: object) -> bytes:
    try:
        return base64.b64decode(str(text), validate=True)
    except (binascii.Error, ValueError):
        raise TamperedError("an epoch of the audit log is damaged") from None


# -- following a chain ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class End:
    """Where a chain stands: behind which entry, and in which epoch, if that could be opened.

    ``size`` and ``epoch_at`` are offsets in bytes: behind that entry, and of the entry that begins
    its epoch.
    """

    number: int = 0
    mac: bytes = START
    size: int = 0
    epoch: Epoch | None = None
    epoch_at: int = 0

    def is_followed_by(self, entry: Entry, epoch: Epoch | None) -> bool:
        """Whether ``entry``, which is of ``epoch``, is the next one.

        Where its epoch cannot be opened, only its number tells.
        """
        if entry.number != self.number + 1 or (self.number == 0 and entry.event != EPOCH):
            return False
        return epoch is None or crypto.equal(epoch.mac(self.mac, entry.body), entry.mac)

    def behind(self, entry: Entry, at: int, size: int, epoch: Epoch | None) -> End:
        """Where the chain stands behind an entry of so many bytes, which begins at ``at``."""
        epoch_at = at if entry.event == EPOCH else self.epoch_at
        return End(entry.number, entry.mac, at + size, epoch, epoch_at)


@dataclass(slots=True)
class Debris:
    """Lines that do not continue the chain."""

    size: int = 0
    ends: bool = True  # with the end of a line
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, line: bytes) -> None:
        """Take one more."""
        self.size += len(line)
        self.ends = line.endswith(b"\n")
        self.digest.update(line)

    def fields(self, lost: int | None) -> dict[str, str | int]:
        """What the entry says that accounts for it; ``lost`` as for `TORN`."""
        unknown = "unknown" if lost is None else lost
        return {"bytes": self.size, "sha256": self.digest.hexdigest(), "lost": unknown}

    def is_named_by(self, entry: Entry) -> bool:
        """Whether the entry behind it accounts for all of it, or says nothing of any."""
        said = entry.fields.get("bytes", 0) if entry.event in {TORN, EPOCH} else 0
        if not self.size:
            return said == 0
        return said == self.size and entry.fields.get("sha256") == self.digest.hexdigest()


def follow(
    lines: Iterable[bytes], end: End, opened: Callable[[Entry], Epoch | None]
) -> tuple[End, Debris]:
    """Go on behind ``end`` as far as the chain holds; gives also what lies behind that.

    ``lines`` begin there, and come with their ends; ``opened`` gives the epoch that an entry
    begins.
    """
    debris = Debris()
    at = end.size
    for line in lines:
        entry = parse_entry(line)
        epoch = opened(entry) if entry is not None and entry.event == EPOCH else end.epoch
        if entry and debris.is_named_by(entry) and end.is_followed_by(entry, epoch):
            end = end.behind(entry, at, len(line), epoch)
            debris = Debris()
        else:
            debris.add(line)
        at += len(line)
    return end, debris


# -- checking a whole log ------------------------------------------------------------------------


@dataclass(slots=True)
class Findings:
    """What checking a log found. ``faults`` say that it is not what was written.

    ``notes`` are no faults: the traces of a crash, and how much the rest can prove. ``events``
    counts the entries by what happened.
    """

    entries: int = 0
    first: str = ""
    last: str = ""
    mac: str = ""
    events: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    more_faults: int = 0

    def fault(self, sentence: str) -> None:
        """Take down a fault."""
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(sentence)
        else:
            self.more_faults += 1


def check(
    read: Callable[[], Iterable[bytes]],
    head: bytes | None,
    keys: Sequence[Opener],
    identities: Sequence[Opener] = (),
    *,
    kept: bytes | None = None,
) -> Findings:
    """Check every entry of a log, and that none is missing at its end.

    Args:
        read: gives the log's lines with their ends, the same ones at each call.
        head: the stored head, or ``None`` where there is none.
        keys: the policy's.
        identities: private keys. Where there are keys, an epoch that opens with one of these
            alone is a fault.
        kept: the MAC that an entry had when it was the last one, and that has to be there.
    """
    findings = Findings()
    epochs, debris = _survey(read())
    stored = Head.parse(head) if head is not None else None
    if stored is None:
        findings.fault("there is no head that says how many entries there have to be")
    taken_over = [_head_in(each) for each in epochs]
    opened = _open_epochs(epochs, keys, identities, findings)
    checker = _Checker(findings, opened, debris, has_head=stored is not None, kept=kept)
    for each in (*taken_over, stored):
        if each is not None:
            checker.heads.setdefault(each.number, []).append(each)
    for line in read():
        checker.line(line)
    checker.finish()
    return findings


def _survey(lines: Iterable[bytes]) -> tuple[list[Entry], dict[int, int]]:
    """All entries that begin an epoch; and by its offset, how much is called debris behind it.

    Nothing of it is authenticated yet.
    """
    epochs = []
    debris: dict[int, int] = {}
    at = 0
    for line in lines:
        entry = parse_entry(line) if _SPECIAL.search(line) else None
        if entry is not None and entry.event == EPOCH:
            epochs.append(replace(entry, body=b""))  # a write-only log may have very many
        if entry is not None and isinstance(said := entry.fields.get("bytes"), int):
            debris[at - said] = max(said, debris.get(at - said, 0))
        at += len(line)
    return epochs, debris


def _open_epochs(
    entries: list[Entry],
    keys: Sequence[Opener],
    identities: Sequence[Opener],
    findings: Findings,
) -> dict[bytes, Epoch | None]:
    """Every epoch by the MAC of the entry that begins it; ``None``: it could not be opened.

    The entries are used up, from the last one on.
    """
    opened: dict[bytes, Epoch | None] = {}
    unkeyed = []
    later: tuple[Entry, Epoch | None] | None = None
    while entries:
        entry = entries.pop()
        epoch = None
        if later is not None and later[1] is not None:
            with contextlib.suppress(TamperedError):  # they need not be neighbours
                epoch = later[1].former(later[0].fields, entry.fields)
        try:
            if epoch is None:
                epoch, by_key = _open_epoch(entry, keys, identities)
                unkeyed += [] if by_key else [entry.number]
        except KeyMismatchError:
            findings.fault(f"no key at hand opens the entries from {entry.number} on")
        except (TamperedError, NotReadyError) as error:
            findings.fault(f"entry {entry.number}: {error}")
        opened[entry.mac] = epoch
        later = entry, epoch
    anybody = "whoever has a recipient's public key could have written them"
    for number in unkeyed if keys else ():
        findings.fault(f"the entries from {number} on open with a private key alone: {anybody}")
    if unkeyed and not keys:
        findings.notes.append(f"no entry needed a key: {anybody}")
    return opened


def _open_epoch(
    entry: Entry, keys: Sequence[Opener], identities: Sequence[Opener]
) -> tuple[Epoch, bool]:
    """Open an epoch, with a key where one fits; also whether it was a key."""
    try:
        return Epoch.open(entry.fields, keys), True
    except KeyMismatchError:
        return Epoch.open(entry.fields, identities), False


@dataclass(frozen=True, slots=True)
class _Line:
    """An entry, the offset of its line, and how many bytes that has."""

    entry: Entry
    at: int
    size: int


@dataclass(slots=True)
class _Checker:
    """Goes through a log line by line. ``end`` is where the chain stands.

    ``heads`` are those that are still to be met, by the number of the entry that they name.
    """

    findings: Findings
    epochs: dict[bytes, Epoch | None]
    named: dict[int, int]  # what is called debris; see `_survey`
    has_head: bool
    kept: bytes | None = None  # a MAC that is still to be met
    heads: dict[int, list[Head]] = field(default_factory=dict)
    end: End = field(default_factory=End)
    began: int = 1  # the number of the entry that begins this epoch
    at: int = 0
    debris: Debris = field(default_factory=Debris)
    broken: _Line | None = None  # the last line of the debris, where it has the form of an entry

    def line(self, line: bytes) -> None:
        """Take the next line."""
        at, self.at = self.at, self.at + len(line)
        # Debris may hold whole entries. Whether the one that says so is genuine shows in its turn.
        is_named = at < self.end.size + self.named.get(self.end.size, 0)
        entry = None if is_named else parse_entry(line)
        this = _Line(entry, at, len(line)) if entry is not None else None
        if this is not None and self._follows(self.end, this):
            self._leave_debris(this.entry)
            self._advance(this)
        elif this is not None and self.broken and self._follows(self._behind(self.broken), this):
            self._leave_broken(self.broken.entry)
            self._advance(self.broken)
            self._leave_debris(this.entry)
            self._advance(this)
        else:
            self.debris.add(line)
            self.broken = this

    def _follows(self, end: End, line: _Line) -> bool:
        entry = line.entry
        if entry.event != EPOCH:
            return end.is_followed_by(entry, end.epoch)
        known = entry.mac in self.epochs  # else it was written since the survey
        return known and end.is_followed_by(entry, self.epochs[entry.mac])

    def _behind(self, line: _Line) -> End:
        entry = line.entry
        epoch = self.epochs.get(entry.mac) if entry.event == EPOCH else self.end.epoch
        return self.end.behind(entry, line.at, line.size, epoch)

    def _leave_debris(self, entry: Entry) -> None:
        """Account for what lies between the last entry and this one, which follows it."""
        last = self.end.number
        if lost := entry.fields.get("lost"):
            missing = "nobody knows how many" if lost == "unknown" else lost
            self.findings.fault(f"entries were lost before entry {entry.number}: {missing}")
        elif entry.event == EPOCH and not self._is_tied(entry):
            self.findings.fault(f"entry {entry.number} does not say where the epoch before ended")
        if self.debris.is_named_by(entry):
            if self.debris.size:
                self.findings.notes.append(f"a crash left a torn line before entry {entry.number}")
        elif self.debris.size:
            self._tell(f"behind entry {last} there are {self.debris.size} bytes that do not belong")
        else:
            self._tell(f"what a crash had left behind entry {last} is gone")

    def _is_tied(self, entry: Entry) -> bool:
        """Whether who began this epoch could check the head of the one before, or passes it on."""
        head = _head_in(entry)
        is_covered = head is not None and head.number >= self.began
        is_short = self.end.number < self.began + FIRST
        return is_covered or is_short or bool(entry.fields.get("former"))

    def _leave_broken(self, broken: Entry) -> None:
        """Account for an entry that does not fit, while the one behind it fits to it."""
        last = self.end.number
        if broken.number > last + 1:
            gap = f"entries {last + 1} to {broken.number - 1} are"
            gap = f"entry {last + 1} is" if broken.number == last + 2 else gap
            self._tell(f"{gap} missing, and entry {broken.number} is not proved")
        elif broken.number == last + 1:
            self._tell(f"entry {broken.number} was changed")
        else:
            self._tell(f"entry {broken.number} stands behind entry {last}")

    def _tell(self, sentence: str) -> None:
        # Behind the head is what was not synced: of that a crash may leave any part.
        if self.heads or not self.has_head:
            self.findings.fault(sentence)
        else:
            self.findings.notes.append(f"{sentence}; it was not on disk for certain yet")

    def _advance(self, line: _Line) -> None:
        entry = line.entry
        self.end = self._behind(line)
        if entry.event == EPOCH:
            self.began = entry.number
        self.debris, self.broken = Debris(), None
        self.findings.entries += 1
        self.findings.first = self.findings.first or entry.time
        self.findings.last = entry.time
        if self.kept == entry.mac:
            self.kept = None
        events = self.findings.events
        events[entry.event] = events.get(entry.event, 0) + 1
        for head in self.heads.pop(entry.number, ()):
            if not crypto.equal(head.mac, entry.mac):
                self.findings.fault(f"entry {entry.number} is not the one that a head names")
            elif self.end.epoch is not None and not head.is_of(self.end.epoch):
                self.findings.fault(f"the head that names entry {entry.number} was changed")

    def finish(self) -> None:
        """Whether the end is the end."""
        last = self.end.number
        self.findings.mac = self.end.mac.hex()
        for number in sorted(self.heads):
            self.findings.fault(f"entry {last} is the last, and a head names entry {number}")
        if self.kept is not None:
            self.findings.fault(f"no entry has the MAC {self.kept.hex()}")
        if self.debris.size:
            self.findings.notes.append(
                f"{self.debris.size} bytes behind entry {last} are no entry;"
                " the next one will say so"
            )
