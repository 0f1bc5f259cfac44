"""The audit log on disk: ``audit.log``, which only grows, and ``audit.head`` beside it.

What is in them, and what protects it, says `chain.py`. Here is the order of writing:

1. Lines are appended in one write. Where they must be durable, the log is synced.
2. Only then does the head name the last of them, so that it never speaks of more than the disk has.

Several processes may write: the service, and commands that change keys. Each appends under a lock
on the log, and looks first whether another one has written since. It believes what it wrote itself
more than the head: a log that was put back, cut or taken away while it runs does not deceive it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from secimg_watch import chain, kernel
from secimg_watch.chain import Debris, End, Epoch, Findings, Head
from secimg_watch.container import MAX_SLOTS
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
    from secimg_watch.slots import Lock, Opener

log = logging.getLogger(__name__)

LOG_NAME: Final = "audit.log"
HEAD_NAME: Final = "audit.head"
_BLOCK: Final = 1 << 20
_INCREDIBLE: Final = 10**14  # a number that no honest log reaches, and from which on it could end
_TAIL: Final = chain.FIRST * chain.MAX_LINE  # bytes that hold a last line whole
_PATIENCE: Final = 10.0  # seconds that another process may take to append


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened. Values name objects, keys, folders and reasons; never a file."""

    what: str
    fields: Fields = field(default_factory=dict)


class Audit:
    """The audit log of one state directory, open for writing. Any thread may write."""

    def __init__(self, state: Path, keys: KeySet) -> None:
        """Open the log, or make it.

        Raises:
            NotReadyError: it cannot be written.
        """
        self._state = state
        self._keys = keys
        self._own: dict[bytes, Epoch] = {}  # by header: those that this process began
        self._guard = threading.Lock()
        self._end: End | None = None  # behind what this process knows to be written
        self._unproved: Head | None = None  # a head that could not be checked; others may
        self.fault = ""
        self._unsynced = False
        self._head_lasts = False  # there is one, and a power cut leaves it or a later one
        self._log = self._head = -1
        self._files = contextlib.ExitStack()
        with _as_fault():
            state.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._open_files()

    def _open_files(self) -> None:
        with contextlib.ExitStack() as opened:
            log_file = _open(self._state, LOG_NAME, os.O_RDWR | os.O_APPEND)
            opened.callback(os.close, log_file)
            head_file = _open(self._state, HEAD_NAME, os.O_RDWR)
            opened.callback(os.close, head_file)
            if not os.fstat(head_file).st_size:
                # Its space, before there is a log: on a full disk that has to come to nothing.
                kernel.write_at(head_file, bytes(chain.HEAD_SIZE), 0)
            kernel.sync_path(self._state)
            if not os.fstat(log_file).st_size:
                kernel.sync_above(self._state)
            # Before more is written than may be there without a head: a dead process may not have.
            os.fsync(head_file)
            self._files.close()
            self._log, self._head, self._files = log_file, head_file, opened.pop_all()
            self._head_lasts = Head.parse(_read(head_file, 0, chain.HEAD_SIZE)) is not None

    def close(self) -> None:
        """Make durable what is not yet, as far as that goes, and close the log."""
        with contextlib.suppress(NotReadyError):
            self.flush()
        with self._guard:
            self._files.close()
            self._log = self._head = -1

    def append(self, events: Sequence[Event], *, durable: bool) -> None:
        """Write entries; ``durable``: they survive a power cut when this returns.

        Raises:
            NotReadyError: they could not be written.
        """
        if not events:
            return
        with self._alone():
            self._write(self._take_up(), events)
            if durable:
                self._sync()

    def flush(self) -> None:
        """Make durable what is not yet.

        Raises:
            NotReadyError: that failed.
        """
        if self._unsynced:
            with self._alone():
                self._take_up()
                self._sync()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other threads and processes away, with the files open that have the names."""
        with self._guard, _as_fault():
            if not (self._is_there(LOG_NAME, self._log) and self._is_there(HEAD_NAME, self._head)):
                self._tell("it was moved, removed or replaced")
                self._open_files()
            with kernel.locked(self._log, _PATIENCE):
                yield

    def _is_there(self, name: str, fd: int) -> bool:
        try:
            there = os.stat(self._state / name, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(fd))

    def _write(self, end: End, events: Sequence[Event], before: bytes = b"") -> None:
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
        self._unsynced = True
        # Where this fails, what it leaves behind the known end is looked at before the next one.
        kernel.write_all(self._log, data)
        self._end = replace(end, number=number, mac=mac, size=end.size + len(data))

    def _sync(self) -> None:
        os.fsync(self._log)
        self._unsynced = False
        if self._end is not None and self._end.epoch is not None:
            end, epoch = self._end, self._end.epoch
            head = Head(end.number, end.mac, end.size, end.epoch_at).sealed(epoch)
            # Within one sector, so it is the former one or this one. It may lag behind the log.
            kernel.write_at(self._head, head.pack(), 0)
            if not self._head_lasts:  # or a power cut could leave neither
                os.fsync(self._head)
                self._head_lasts = True

    # -- finding the end -----------------------------------------------------------------------

    def _take_up(self) -> End:
        """Where the chain stands, looking anew where somebody else has written."""
        size = os.fstat(self._log).st_size
        known = self._end
        if known is None:
            self._repair(*self._find_end(size))
        elif size > known.size:
            self._repair(*self._follow(known), 0)
        elif size < known.size:
            self._repair(*self._believe(size, known.number))
        assert self._end is not None  # noqa: S101 - it is repaired
        return self._end

    def _find_end(self, size: int) -> tuple[End, Debris, int | None]:
        """How far the chain holds, what lies behind that, and how many entries are missing there.

        ``None``: nobody can tell.
        """
        head = Head.parse(_read(self._head, 0, chain.HEAD_SIZE))
        if head is None:
            # Every line counts: the last one may have been put there to look like a beginning.
            is_new = size <= _TAIL and all(
                each.number <= chain.FIRST for each in events_of(_lines(self._log, 0, size))
            )
            return (*self._follow(End()), 0) if is_new else self._believe(size, 0)
        entry = chain.parse_entry(next(_lines(self._log, head.epoch), b""))
        if entry is None or entry.event != chain.EPOCH:
            return self._believe(size, 0)
        epoch = self._opened(entry)
        if epoch is not None and not head.is_of(epoch):
            return self._believe(size, 0)
        if head.end > size:
            return self._believe(size, head.number)
        self._unproved = head if epoch is None else None
        return *self._follow(End(head.number, head.mac, head.end, epoch, head.epoch)), 0

    def _believe(self, size: int, number: int) -> tuple[End, Debris, int | None]:
        """The same where entries are missing, and ``number`` of them were known to be there.

        Then the last line is taken for what it says, and nothing before it is read: a log may be
        long. Whether it is right finds who checks the whole.
        """
        start = max(0, size - _TAIL)
        end, debris = End(size=start), Debris()
        for line in _lines(self._log, start, size):
            start += len(line)
            entry = chain.parse_entry(line)
            if entry is not None and entry.number < _INCREDIBLE:
                end, debris = End(entry.number, entry.mac, start), Debris()
            else:
                debris.add(line)
        return end, debris, number - end.number if number > end.number else None

    def _follow(self, end: End) -> tuple[End, Debris]:
        return chain.follow(_lines(self._log, end.size), end, self._opened)

    def _opened(self, entry: Entry) -> Epoch | None:
        try:
            mine = self._own.get(chain.epoch_header(entry.fields))
            return mine or Epoch.open(entry.fields, self._keys.ring)
        except (KeyMismatchError, TamperedError):
            return None

    def _tell(self, fault: str) -> None:
        log.error("audit log: %s", fault)
        self.fault = fault

    def _repair(self, end: End, debris: Debris, lost: int | None) -> None:
        """Account for what lies behind the end, and begin an epoch where one is needed."""
        if lost != 0:
            self._tell("entries are missing, or its head is: secimg-watch audit verify")
        here = replace(end, size=end.size + debris.size)
        newline = b"" if debris.ends else b"\n"
        debris.add(newline)
        torn = debris.fields(lost) if debris.size or lost != 0 else {}
        locks = _locks(self._keys)
        unproved, self._unproved = self._unproved, None
        if end.epoch is None and lost == 0 and unproved is None:
            unproved = Head.parse(_read(self._head, 0, chain.HEAD_SIZE))
        is_current = end.epoch and end.epoch.key_ids == {lock.key_id for lock in locks}
        if end.epoch is None or unproved is not None or not is_current:
            epoch = Epoch.begin(locks)
            self._own[epoch.header.pack()] = epoch
            fields = {**epoch.fields(end.epoch), **torn}
            # Passed on also where the entries behind it open: it decided where they begin.
            if unproved is not None:
                fields["head"] = unproved.pack().decode()
            begun = replace(here, epoch=epoch, epoch_at=here.size + len(newline))
            self._write(begun, [Event(chain.EPOCH, fields)], newline)
        elif torn:
            self._write(here, [Event(chain.TORN, torn)], newline)
        else:
            self._end = end


def _locks(keys: KeySet) -> tuple[Lock, ...]:
    """Everything that opens a new epoch: the former keys too, for who was not told of a new one.

    A service that goes on with a former key until it is reloaded could not follow the chain
    otherwise; and the epoch that it began could not be opened once that key is retired.
    """
    return (*keys.ring[: MAX_SLOTS - len(keys.recipients)], *keys.recipients)


def events_of(lines: Iterable[bytes]) -> Iterator[Entry]:
    """Every entry that has the form of one; none of them is authenticated."""
    return filter(None, map(chain.parse_entry, lines))


def read_log(state: Path) -> Iterator[bytes]:
    """The lines of a state directory's log as it is now, with their ends.

    Raises:
        NoInputError: there is none.
        StorageError: it cannot be read.
    """
    with _log_for_reading(state) as (fd, size):
        yield from _lines(fd, 0, size)


def verify_log(
    state: Path,
    keys: Sequence[Opener],
    identities: Sequence[Opener] = (),
    *,
    kept: bytes | None = None,
) -> Findings:
    """Check the whole log of a state directory; see `chain.check`.

    Raises:
        NoInputError: there is none.
        StorageError: it cannot be read.
    """
    # First the head: whatever is written meanwhile lies behind what it names.
    head: bytes | None = None
    with (
        contextlib.suppress(OSError),
        open(state / HEAD_NAME, "rb", buffering=0, opener=_unfollowed) as head_file,
    ):
        head = head_file.read(chain.HEAD_SIZE)
    with _log_for_reading(state) as (fd, size):
        return chain.check(lambda: _lines(fd, 0, size), head, keys, identities, kept=kept)


def _unfollowed(path: str, _flags: int) -> int:
    return os.open(path, kernel.PICTURE)  # no link, and no wait for somebody's pipe


@contextlib.contextmanager
def _log_for_reading(state: Path) -> Iterator[tuple[int, int]]:
    """The log, open, and its length now; an error while it is read is one of ours."""
    try:
        with open(state / LOG_NAME, "rb", buffering=0, opener=_unfollowed) as log_file:
            yield log_file.fileno(), os.fstat(log_file.fileno()).st_size
    except FileNotFoundError:
        raise NoInputError(
            f"there is no audit log in {state}", hint="the service makes it when it first runs"
        ) from None
    except OSError as error:
        why = error.strerror or type(error).__name__  # io.UnsupportedOperation has none
        raise StorageError(f"the audit log cannot be read: {why}") from error


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
    """Open or make a file of the log, and never anything else that was put in its place."""
    for flag in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):
        flags |= getattr(os, flag, 0)
    fd = os.open(state / name, flags | os.O_CREAT, 0o600)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        os.close(fd)
        raise NotReadyError(f"the audit log cannot be written: {name} is not a file of its own")
    if not status.st_size:
        # An administrator's command may be the first to write; the service has to go on with it.
        kernel.give_owner(fd, os.stat(state))
    return fd


def _read(fd: int, start: int, size: int) -> bytes:
    buffer = bytearray(size)
    return bytes(buffer[: kernel.read_at(fd, memoryview(buffer), start)])


def _lines(fd: int, start: int, end: int = sys.maxsize) -> Iterator[bytes]:
    """The lines of a part of a file, with their ends; an endless one comes in pieces."""
    rest = b""
    while block := _read(fd, start, min(_BLOCK, end - start)):
        start += len(block)
        *lines, rest = (rest + block).split(b"\n")
        yield from (line + b"\n" for line in lines)
        if len(rest) > chain.MAX_LINE:
            yield rest
            rest = b""
    if rest:
        yield rest


def timestamp(nanoseconds: int) -> str:
    """A moment, given in nanoseconds since 1970, as entries have it: UTC, RFC 3339."""
    moment = datetime.fromtimestamp(nanoseconds // 10**6 / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
