"""The audit log as bytes: entries that are chained and keyed, and what checking them finds.

One JSON object a line. The last member of each is ``mac``: HMAC-SHA-256 over the MAC of the entry
before (32 zero bytes for the first) and over the line up to there. So an entry that is changed,
removed, moved or put in makes the chain break at its place for everybody who has the key, and
nobody else can mend it. That nothing is missing at the end is what the *head* is for: number and
MAC of the last entry that is on disk for certain, kept beside the log under a MAC of its own.

The key belongs to an *epoch*, which begins with an entry of that name. It is random, and wrapped
like an object's file key: that entry carries the header of an object without sections, with a
slot for the policy's key and for each recipient. It also carries the former epoch's key, wrapped
with the new one where that was at hand: who opens the last epoch opens those before. A write-only
machine cannot open its own log; it begins an epoch at each start, and forgets the key at the end.

Everything here takes and gives bytes; `audit.py` has the files.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from secimg_watch import crypto
from secimg_watch.container import SEALED_META, Core, Header
from secimg_watch.errors import KeyMismatchError, NotReadyError, TamperedError
from secimg_watch.records import ObjectId
from secimg_watch.seal import build_header, open_header, read_header
from secimg_watch.slots import PasswordCache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from secimg_watch.slots import Lock, Opener

Fields: TypeAlias = "Mapping[str, str | int]"
"""What an entry says besides its number, its time and what happened."""

START: Final = bytes(32)
"""What stands for the MAC before the first entry."""

EPOCH: Final = "epoch"
"""The event that begins an epoch; its fields are made by `Epoch.fields`."""

TORN: Final = "torn"
"""The event that accounts for what a crash left behind the last whole entry: how many ``bytes``
that are no entry, their ``sha256``, and how many entries are ``lost`` that had been on disk
(``unknown`` where the head was gone). An epoch that begins there accounts for it itself."""

MAX_LINE: Final = 64 * 1024
"""Bytes of the longest line that is read as an entry: an epoch with eight slots has 14 KiB."""

MAX_FAULTS: Final = 100
"""Faults that are named one by one."""

_LOG_ID: Final = b"secimg-watch/log"  # stands for a vault's id: no object has this one
_MAC_LABEL: Final = b"secimg-watch/v1/audit-mac\0"
_FORMER_LABEL: Final = b"secimg-watch/v1/audit-former\0"
_HEAD_LABEL: Final = b"secimg-watch/v1/audit-head\0"
_LINE: Final = re.compile(rb'(\{"n":[0-9]{1,15},"time":".*),"mac":"([0-9a-f]{64})"\}')


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry. ``body`` is the line up to the MAC."""

    number: int
    time: str  # UTC, as RFC 3339
    event: str
    fields: dict[str, str | int]
    body: bytes
    mac: bytes  # 32 bytes


@dataclass(frozen=True, slots=True)
class Epoch:
    """The key of a run of entries, and the header that it is wrapped in."""

    root: bytes = field(repr=False)  # 32 bytes
    header: Header

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
        return Epoch(crypto.unwrap_key(self._key(_FORMER_LABEL), wrapped), _header(before))

    def mac(self, previous: bytes, body: bytes) -> bytes:
        """The MAC of an entry behind the one with the MAC ``previous``."""
        return crypto.header_mac(self._key(_MAC_LABEL), previous + body)

    def head_mac(self, stated: bytes) -> bytes:
        """The MAC of a head."""
        return crypto.header_mac(self._key(_HEAD_LABEL), stated)

    def _key(self, label: bytes) -> bytes:
        return crypto.hkdf_expand(self.root, label + self.header.core.pack(), crypto.KEY_SIZE)


@dataclass(frozen=True, slots=True)
class Head:
    """The last entry that is on disk for certain, and where to go on reading.

    ``end`` and ``epoch`` are offsets in the log, in bytes: behind that entry, and of the entry
    that begins its epoch.
    """

    number: int
    mac: bytes
    end: int
    epoch: int

    def pack(self, epoch: Epoch) -> bytes:
        """As it is stored. Always of one length, so that it is replaced by a single write."""
        stated = f"{self.number:015d} {self.mac.hex()} {self.end:015d} {self.epoch:015d}".encode()
        return stated + b" " + epoch.head_mac(stated).hex().encode() + b"\n"

    @classmethod
    def parse(cls, data: bytes) -> tuple[Head, bytes, bytes] | None:
        """What a stored head says, its text and its MAC; ``None`` where it is none."""
        match = re.fullmatch(
            rb"(([0-9]{15}) ([0-9a-f]{64}) ([0-9]{15}) ([0-9]{15})) ([0-9a-f]{64})\n", data
        )
        if match is None:
            return None
        stated, number, mac, end, epoch, check = match.groups()
        head = cls(int(number), bytes.fromhex(mac.decode()), int(end), int(epoch))
        return head, stated, bytes.fromhex(check.decode())


def write_entry(
    number: int, time: str, event: str, fields: Fields, *, epoch: Epoch, previous: bytes
) -> tuple[bytes, bytes]:
    """A line of the log, and its MAC."""
    said: dict[str, Any] = {"n": number, "time": time, "event": event, **fields}
    body = json.dumps(said, separators=(",", ":"), ensure_ascii=True).encode()[:-1]
    mac = epoch.mac(previous, body)
    return body + b',"mac":"' + mac.hex().encode() + b'"}\n', mac


def parse_entry(line: bytes) -> Entry | None:
    """The entry that a line, without its end, has the form of. Nothing is authenticated."""
    match = _LINE.fullmatch(line) if len(line) < MAX_LINE else None
    if match is None:
        return None
    body, mac = match.groups()
    try:
        said = json.loads(body + b"}")
        number, time, event = said.pop("n"), said.pop("time"), said.pop("event")
    except (ValueError, KeyError, RecursionError):
        return None
    well_typed = all(isinstance(value, str | int) for value in (*said.values(), event))
    if not well_typed or not isinstance(event, str):
        return None
    return Entry(int(number), str(time), event, said, body, bytes.fromhex(mac.decode()))


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


def _decoded(text: object) -> bytes:
    try:
        return base64.b64decode(str(text), validate=True)
    except (binascii.Error, ValueError):
        raise TamperedError("an epoch of the audit log is damaged") from None


# -- checking a whole log ------------------------------------------------------------------------


@dataclass(slots=True)
class Findings:
    """What checking a log found. ``faults`` say that it is not what was written.

    ``notes`` are harmless: the traces of a crash. ``events`` counts the entries by what happened.
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
    read: Callable[[], Iterable[bytes]], head: bytes | None, openers: Sequence[Opener]
) -> Findings:
    """Check every entry of a log, and that none is missing at its end.

    Args:
        read: gives the log's lines with their ends, anew at each call.
        head: the stored head, or ``None`` where there is none.
        openers: keys that may open the log's epochs.
    """
    findings = Findings()
    epochs = _open_epochs(_epoch_entries(read()), openers, findings)
    checker = _Checker(findings, epochs, Head.parse(head) if head is not None else None)
    for line in read():
        checker.line(line)
    checker.finish()
    return findings


def _epoch_entries(lines: Iterable[bytes]) -> Iterator[Entry]:
    for line in lines:
        entry = parse_entry(line.rstrip(b"\n"))
        if entry is not None and entry.event == EPOCH:
            yield entry


def _open_epochs(
    entries: Iterable[Entry], openers: Sequence[Opener], findings: Findings
) -> dict[bytes, Epoch]:
    """Every epoch that can be opened, by the MAC of its first entry."""
    opened: dict[bytes, Epoch] = {}
    later: tuple[Entry, Epoch | None] | None = None
    for entry in reversed(list(entries)):
        epoch = None
        try:
            if later is not None and later[1] is not None:
                epoch = later[1].former(later[0].fields, entry.fields)
            epoch = epoch or Epoch.open(entry.fields, openers)
        except KeyMismatchError:
            findings.fault(f"no key at hand opens the entries from {entry.number} on")
        except (TamperedError, NotReadyError) as error:
            findings.fault(f"entry {entry.number}: {error}")
        if epoch is not None:
            opened[entry.mac] = epoch
        later = entry, epoch
    return opened


@dataclass(slots=True)
class _Pending:
    """Lines that do not continue the chain, until one comes that says what to make of them."""

    size: int = 0
    digest: Any = field(default_factory=hashlib.sha256)
    last: Entry | None = None

    def add(self, line: bytes, entry: Entry | None) -> None:
        self.size += len(line)
        self.digest.update(line)
        self.last = entry

    def is_explained_by(self, entry: Entry) -> bool:
        said = (entry.fields.get("bytes", 0), entry.fields.get("sha256"))
        return entry.event in {TORN, EPOCH} and said == (self.size, self.digest.hexdigest())


@dataclass(slots=True)
class _Checker:
    """Goes through a log line by line; ``number``, ``mac``, ``epoch``: where the chain stands."""

    findings: Findings
    epochs: dict[bytes, Epoch]
    head: tuple[Head, bytes, bytes] | None
    number: int = 0
    mac: bytes = START
    epoch: Epoch | None = None
    pending: _Pending = field(default_factory=_Pending)
    head_met: bool = False

    def line(self, line: bytes) -> None:
        """Take the next line."""
        entry = parse_entry(line.removesuffix(b"\n")) if line.endswith(b"\n") else None
        broken = self.pending.last
        if entry is not None and self._continues(entry, self.number, self.mac):
            self._leave_behind(entry)
        elif entry is not None and broken and self._continues(entry, broken.number, broken.mac):
            # The chain goes on behind an entry that did not fit itself.
            self._break(broken)
        else:
            self.pending.add(line, entry)
            return
        self.pending = _Pending()
        self._advance(entry)

    def _continues(self, entry: Entry, number: int, mac: bytes) -> bool:
        epoch = self.epochs.get(entry.mac) if entry.event == EPOCH else self.epoch
        fits = epoch is None or crypto.equal(epoch.mac(mac, entry.body), entry.mac)
        return fits and entry.number == number + 1

    def _leave_behind(self, entry: Entry) -> None:
        """Account for what lies between the last entry and this one, which follows it."""
        if lost := entry.fields.get("lost"):
            missing = "nobody knows how many" if lost == "unknown" else lost
            self.findings.fault(f"entries were lost before entry {entry.number}: {missing}")
        if self.pending.is_explained_by(entry):
            if self.pending.size:
                self.findings.notes.append(f"a crash left a torn line before entry {entry.number}")
        elif self.pending.size or entry.fields.get("bytes"):
            self.findings.fault(
                f"behind entry {self.number} there are {self.pending.size} bytes that do not belong"
            )

    def _break(self, broken: Entry) -> None:
        if broken.number > self.number + 1:
            gap = f"entries {self.number + 1} to {broken.number - 1} are missing"
            self.findings.fault(f"{gap}, and entry {broken.number} is not proved")
        elif broken.number == self.number + 1:
            self.findings.fault(f"entry {broken.number} was changed")
        else:
            self.findings.fault(f"entry {broken.number} stands behind entry {self.number}")
        self._advance(broken)

    def _advance(self, entry: Entry) -> None:
        if entry.event == EPOCH:
            self.epoch = self.epochs.get(entry.mac)
        self.findings.entries += 1
        self.findings.first = self.findings.first or entry.time
        self.findings.last = entry.time
        events = self.findings.events
        events[entry.event] = events.get(entry.event, 0) + 1
        self.number, self.mac = entry.number, entry.mac
        if self.head is not None and self.head[0].number == entry.number:
            self._meet_head(*self.head)

    def _meet_head(self, head: Head, stated: bytes, mac: bytes) -> None:
        self.head_met = True
        if not crypto.equal(head.mac, self.mac):
            self.findings.fault(f"entry {self.number} is not the one that the head names")
        if self.epoch is not None and not crypto.equal(self.epoch.head_mac(stated), mac):
            self.findings.fault("the head was changed")

    def finish(self) -> None:
        """Whether the end is the end."""
        self.findings.mac = self.mac.hex()
        if self.head is None:
            self.findings.fault("there is no head that says how many entries there have to be")
        elif not self.head_met:
            known = self.head[0].number
            self.findings.fault(
                f"{known} entries were written, and entry {self.number} is the last"
            )
        if self.pending.size:
            self.findings.notes.append(
                f"{self.pending.size} bytes behind entry {self.number} are no entry;"
                " the next one will say so"
            )


def torn_fields(debris: Iterable[bytes], lost: int | None) -> dict[str, str | int]:
    """What an entry says of the bytes before it that are no entry; ``lost`` as for `TORN`."""
    pending = _Pending()
    for block in debris:
        pending.add(block, None)
    unknown = "unknown" if lost is None else lost
    return {"bytes": pending.size, "sha256": pending.digest.hexdigest(), "lost": unknown}
