"""The audit log on disk: ``audit.log``, which only grows, and ``audit.head`` beside it.

What is in them, and what protects it, says `chain.py`. Here is the order of writing:

1. Lines are appended in one write. Where they must be durable, the log is synced.
2. Only then does the head name the last of them, so that it never speaks of more than the disk has.

Several processes may write: the service, and commands that change keys. Each appends under a lock
on the log, and looks first whether another one has written since.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from secimg_watch import chain, kernel
from secimg_watch.chain import Epoch, Findings, Head
from secimg_watch.errors import (
    DiskFullError,
    KeyMismatchError,
    NoInputError,
    NotReadyError,
    StorageError,
    TamperedError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from secimg_watch.chain import Entry, Fields
    from secimg_watch.records import KeySet
    from secimg_watch.slots import Opener

log = logging.getLogger(__name__)

LOG_NAME: Final = "audit.log"
HEAD_NAME: Final = "audit.head"
_HEAD_LIMIT: Final = 1024
_BLOCK: Final = 1 << 20
_FIRST: Final = 2  # entries that are written before there is a head at all: an epoch, and one more


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened. Values name objects, keys, folders and reasons; never a file."""

    what: str
    fields: Fields = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _End:
    """How far the chain holds, and the epoch there, if it could be opened; offsets in bytes."""

    number: int = 0
    mac: bytes = chain.START
    size: int = 0
    epoch: Epoch | None = None
    epoch_at: int = 0


class Audit:
    """The audit log of one state directory, open for writing. Any thread may write."""

    def __init__(self, state: Path, keys: KeySet) -> None:
        """Open the log, or make it.

        Raises:
            NotReadyError: it cannot be written.
        """
        self._keys = keys
        self._own: dict[bytes, Epoch] = {}  # by header: those that this process began
        self._guard = threading.Lock()
        self._end: _End | None = None
        self._unsynced = False
        with _as_fault(), contextlib.ExitStack() as opened:
            state.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._log = _open(state, LOG_NAME, os.O_RDWR | os.O_APPEND)
            opened.callback(os.close, self._log)
            self._head = _open(state, HEAD_NAME, os.O_RDWR)
            opened.callback(os.close, self._head)
            kernel.sync_path(state)
            if not os.fstat(self._log).st_size:
                kernel.sync_above(state)
            self._files = opened.pop_all()

    def close(self) -> None:
        """Make durable what is not yet, as far as that goes, and close the log."""
        with contextlib.suppress(NotReadyError):
            self.flush()
        self._files.close()

    def append(self, events: Sequence[Event], *, durable: bool) -> None:
        """Write entries; ``durable``: they survive a power cut when this returns.

        Raises:
            NotReadyError: they could not be written.
        """
        if not events:
            return
        with self._guard, _as_fault(), kernel.locked(self._log):
            self._write(self._take_up(), events)
            if durable:
                self._sync()

    def flush(self) -> None:
        """Make durable what is not yet.

        Raises:
            NotReadyError: that failed.
        """
        if self._unsynced:
            with self._guard, _as_fault(), kernel.locked(self._log):
                self._take_up()
                self._sync()

    def _write(self, end: _End, events: Sequence[Event], before: bytes = b"") -> None:
        assert end.epoch is not None  # noqa: S101 - what was taken up has one
        data, number, mac = before, end.number, end.mac
        now = timestamp(time.time_ns())
        for event in events:
            number += 1
            line, mac = chain.write_entry(
                number,
                now,
                event.what,
                event.fields,
                epoch=end.epoch,
                previous=mac,
            )
            data += line
        self._end = None  # what a write that fails leaves behind is looked at before the next
        self._unsynced = True
        kernel.write_all(self._log, data)
        self._end = _End(number, mac, end.size + len(data), end.epoch, end.epoch_at)

    def _sync(self) -> None:
        os.fsync(self._log)
        self._unsynced = False
        if self._end is not None and self._end.epoch is not None:
            end, epoch = self._end, self._end.epoch
            head = Head(end.number, end.mac, end.size, end.epoch_at).pack(epoch)
            # Within one sector, so it is the former one or this one. It may lag behind the log.
            first = Head.parse(_read(self._head, 0, _HEAD_LIMIT)) is None
            kernel.write_at(self._head, head, 0)
            if first:  # nothing is there yet that a power cut could leave instead
                os.fsync(self._head)

    # -- finding the end -----------------------------------------------------------------------

    def _take_up(self) -> _End:
        """Where the chain stands, looking anew where somebody else has written."""
        size = os.fstat(self._log).st_size
        if self._end is None or self._end.size != size:
            self._end = None
            self._repair(*self._find_end(size), size)
        assert self._end is not None  # noqa: S101 - it is repaired
        return self._end

    def _find_end(self, size: int) -> tuple[_End, int | None]:
        """How far the chain holds, and how many entries are missing behind that.

        ``None``: nobody can tell, as the head is gone or is not ours.
        """
        stored = Head.parse(_read(self._head, 0, _HEAD_LIMIT))
        if stored is None:
            found = self._walk(_End())
            return found, None if found.number > _FIRST else 0
        head, stated, mac = stored
        entry = chain.parse_entry(next(_lines(self._log, head.epoch), b"")[:-1])
        if entry is None or entry.event != chain.EPOCH or head.end > size:
            found = self._walk(_End())
            return found, max(0, head.number - found.number)
        epoch = self._opened(entry)
        if epoch is not None and epoch.head_mac(stated) != mac:
            return self._walk(_End()), None
        return self._walk(_End(head.number, head.mac, head.end, epoch, head.epoch)), 0

    def _opened(self, entry: Entry) -> Epoch | None:
        try:
            mine = self._own.get(chain.epoch_header(entry.fields))
            return mine or Epoch.open(entry.fields, self._keys.ring)
        except (KeyMismatchError, TamperedError):
            return None

    def _walk(self, end: _End) -> _End:
        """Follow the chain as far as it holds. Where an epoch cannot be opened only numbers do."""
        for line in _lines(self._log, end.size):
            entry = chain.parse_entry(line[:-1]) if line.endswith(b"\n") else None
            if entry is None or entry.number != end.number + 1:
                break
            epoch, epoch_at = end.epoch, end.epoch_at
            if entry.event == chain.EPOCH:
                epoch, epoch_at = self._opened(entry), end.size
            if epoch is not None and epoch.mac(end.mac, entry.body) != entry.mac:
                break
            end = _End(entry.number, entry.mac, end.size + len(line), epoch, epoch_at)
        return end

    def _repair(self, end: _End, lost: int | None, size: int) -> None:
        """Account for what lies behind the end, and begin an epoch where one is needed."""
        newline = b""
        torn: dict[str, str | int] = {}
        if end.size < size or lost != 0:
            newline = b"" if size == end.size or _read(self._log, size - 1, 1) == b"\n" else b"\n"
            debris = _read_blocks(self._log, end.size, newline)
            torn = chain.torn_fields(debris, lost)
        if lost != 0:
            log.error("audit log: entries are missing, or its head is: secimg-watch audit verify")
        behind = _End(end.number, end.mac, size, end.epoch, end.epoch_at)
        if end.epoch is None or end.epoch.key_ids != {lock.key_id for lock in self._keys.locks}:
            epoch = Epoch.begin(self._keys.locks)
            self._own[epoch.header.pack()] = epoch
            begun = _End(end.number, end.mac, size, epoch, size + len(newline))
            fields = {**epoch.fields(end.epoch), **torn}
            self._write(begun, [Event(chain.EPOCH, fields)], newline)
        elif torn:
            self._write(behind, [Event(chain.TORN, torn)], newline)
        else:
            self._end = behind


def events_of(lines: Iterable[bytes]) -> Iterator[Entry]:
    """Every entry that has the form of one; none of them is authenticated."""
    for line in lines:
        entry = chain.parse_entry(line.removesuffix(b"\n"))
        if entry is not None:
            yield entry


def read_log(state: Path) -> Iterator[bytes]:
    """The lines of a state directory's log, with their ends.

    Raises:
        NoInputError: there is none.
        StorageError: it cannot be read.
    """
    try:
        with open(state / LOG_NAME, "rb") as log_file:
            yield from iter(lambda: log_file.readline(chain.MAX_LINE), b"")
    except FileNotFoundError:
        raise NoInputError(
            f"there is no audit log in {state}", hint="the service makes it when it first runs"
        ) from None
    except OSError as error:
        raise StorageError(f"the audit log cannot be read: {error.strerror}") from error


def verify_log(state: Path, openers: Sequence[Opener]) -> Findings:
    """Check the whole log of a state directory.

    Raises:
        NoInputError: there is none.
        StorageError: it cannot be read.
    """
    try:
        head: bytes | None = (state / HEAD_NAME).read_bytes()
    except OSError:
        head = None
    return chain.check(lambda: read_log(state), head, openers)


@contextlib.contextmanager
def _as_fault() -> Iterator[None]:
    """Nothing is sealed or deleted while it cannot be put on record."""
    try:
        yield
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        kind = DiskFullError if full else NotReadyError
        raise kind(f"the audit log cannot be written: {error.strerror}") from error


def _open(state: Path, name: str, flags: int) -> int:
    fd = os.open(state / name, flags | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
    # An administrator's command may be the first to write; the service has to go on with it.
    kernel.give_owner(fd, os.stat(state))
    return fd


def _read(fd: int, start: int, size: int) -> bytes:
    buffer = bytearray(size)
    return bytes(buffer[: kernel.read_at(fd, memoryview(buffer), start)])


def _read_blocks(fd: int, start: int, behind: bytes) -> Iterator[bytes]:
    while block := _read(fd, start, _BLOCK):
        start += len(block)
        yield block
    yield behind


def _lines(fd: int, start: int) -> Iterator[bytes]:
    """The lines of a file from an offset on, with their ends; an endless one comes in pieces."""
    rest = b""
    while block := _read(fd, start, _BLOCK):
        start += len(block)
        *lines, rest = (rest + block).splitlines(keepends=True)
        yield from lines
        if rest.endswith(b"\n") or len(rest) > chain.MAX_LINE:
            yield rest
            rest = b""
    if rest:
        yield rest


def timestamp(nanoseconds: int) -> str:
    """A moment, given in nanoseconds since 1970, as entries have it: UTC, RFC 3339."""
    moment = datetime.fromtimestamp(nanoseconds // 10**6 / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
