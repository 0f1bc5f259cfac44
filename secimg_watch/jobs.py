"""The job queue: one row for each picture on its way, in SQLite.

A row is a hint; the disk is the truth. Losing the database loses the counters and the history,
never a picture. So it is written without an fsync at each commit: after a power cut the last
rows may be missing, and recovery finds their files.

A job is taken by lease and never by removal: its row says ``taken`` while a worker has it, and
its attempts are counted before the work starts, so that a picture which kills the process every
time is set aside in the end. Names of files stand in a row only while the file itself lies in
clear; with the plaintext the name goes too (``secure_delete``).
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import sqlite3
import threading
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from secimg_watch.errors import QueueError, StorageError
from secimg_watch.records import FolderKey, Identity, Job, ObjectId, Proof

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from secimg_watch.records import Settled

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS job (
  object_id TEXT PRIMARY KEY,
  folder TEXT NOT NULL,
  name BLOB NOT NULL,
  dev INTEGER NOT NULL, ino INTEGER NOT NULL, size INTEGER NOT NULL,
  mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL,
  state TEXT NOT NULL,
  proof TEXT NOT NULL,
  attempts INTEGER NOT NULL DEFAULT 0,
  not_before REAL NOT NULL DEFAULT 0,
  first_seen_ns INTEGER NOT NULL,
  reason TEXT NOT NULL DEFAULT '',
  UNIQUE (folder, name, dev, ino, size, mtime_ns)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS job_next ON job (state, not_before, first_seen_ns);
CREATE TABLE IF NOT EXISTS sealed (
  object_id TEXT PRIMARY KEY,
  folder TEXT NOT NULL,
  size INTEGER NOT NULL,
  sealed_ns INTEGER NOT NULL,
  dwell_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS sealed_when ON sealed (folder, sealed_ns);
CREATE TABLE IF NOT EXISTS counter (
  folder TEXT NOT NULL, what TEXT NOT NULL, n INTEGER NOT NULL,
  PRIMARY KEY (folder, what)
) STRICT, WITHOUT ROWID;
"""

_INTO: Final = (
    "INTO job (object_id, folder, name, dev, ino, size, mtime_ns, ctime_ns, proof,"
    " first_seen_ns, state, reason) VALUES (?,?,?,?,?,?,?,?,?,?,?,?)"
)
# Rights or owner of a file that still waits may change, and its content stays the same. One that
# rests is looked at again: what kept it from being taken or deleted may be over, and a producer
# that sets the times itself may have written something else of the same size.
_SEEN_AGAIN: Final = (
    "ON CONFLICT (folder, name, dev, ino, size, mtime_ns) DO UPDATE SET"
    " ctime_ns = excluded.ctime_ns,"
    " attempts = CASE WHEN state IN ('queued', 'taken') THEN attempts ELSE 0 END,"
    " not_before = CASE WHEN state IN ('queued', 'taken') THEN not_before ELSE 0 END,"
    " state = CASE state WHEN 'taken' THEN state ELSE 'queued' END"
    " WHERE ctime_ns <> excluded.ctime_ns AND state <> 'committed'"
)
_UNKNOWN: Final = -1  # as a dwell time: the plaintext was not deleted, or nobody saw when
_COUNT: Final = "INSERT INTO counter VALUES (?,?,?) ON CONFLICT DO UPDATE SET n = n + excluded.n"
_HISTORY: Final = 10_000  # sealed rows kept; the counters go on for ever
_DWELL_SAMPLE: Final = 1_000  # the newest sealed rows that dwell times are taken from
_FIRST_DELAY: Final = 2.0
_LAST_DELAY: Final = 3600.0
# A row waits until a time of day. One that is further away than `back_off` puts it for so many
# attempts was written before the clock was set back, and is due.
_DUE: Final = (
    f"(not_before <= :now OR not_before > :now + 1.25 * min({_LAST_DELAY}, 1 << min(attempts, 12)))"
)


class State(StrEnum):
    """Where a job is. ``queued`` and ``taken`` go on by themselves; the others rest."""

    QUEUED = "queued"
    TAKEN = "taken"
    COMMITTED = "committed"  # the object is in the vault; the plaintext is not gone yet
    QUARANTINED = "quarantined"  # given up on; waits for a person
    LEFT = "left"  # the policy leaves it in the folder
    KEPT = "kept"  # sealed, and the policy keeps the plaintext
    UNDELETABLE = "undeletable"  # sealed, and the system does not let the plaintext be deleted


@dataclass(frozen=True, slots=True)
class Row:
    """A job as a listing shows it."""

    object_id: ObjectId
    folder: FolderKey
    relpath: str
    state: State
    attempts: int
    not_before: float
    reason: str
    identity: Identity


@dataclass(frozen=True, slots=True)
class Dwell:
    """How long plaintext lay in a folder, in milliseconds, over the newest sealed pictures."""

    sample: int
    p50: int
    p95: int
    longest: int


def new_object_id() -> ObjectId:
    """Make a random id of 128 bits."""
    return ObjectId(os.urandom(16).hex())


def back_off(attempts: int) -> float:
    """Seconds until the next attempt: doubling from 2 s to 1 h, with a quarter of jitter."""
    delay = min(_FIRST_DELAY * 2.0 ** (attempts - 1), _LAST_DELAY)
    return delay * random.uniform(0.75, 1.25)  # noqa: S311 - spreads load, keeps no secret


class Jobs:
    """The queue of one state directory. All methods may be called from any thread.

    Each raises ``QueueError`` where the database fails, as on a full disk. No picture is in danger
    then, but nothing can go on without it.
    """

    def __init__(self, path: Path, *, replace: bool = True) -> None:
        """Open or create the database; a damaged one is put aside and made anew.

        Without ``replace`` it is not: that is for the one process that owns it.

        Raises:
            StorageError: it can neither be opened nor replaced.
        """
        self._changed = threading.Condition(threading.Lock())
        self._released = False
        try:
            self._db = _open_or_replace(path) if replace else _open(path)
        except sqlite3.Error as error:
            # Locked, unreadable, a full disk: no reason to give up what is in it.
            raise StorageError(f"the queue {path} cannot be opened: {error}") from error
        except OSError as error:
            raise StorageError(f"the queue {path} cannot be opened: {error.strerror}") from error

    @contextlib.contextmanager
    def _hold(self) -> Iterator[None]:
        """Have the database to oneself; every method begins with it.

        Raises:
            QueueError: the database fails.
        """
        with self._changed:
            try:
                yield
            except sqlite3.Error as error:
                raise QueueError(f"the queue cannot be used: {error}") from error

    def close(self) -> None:
        """Close the database; an empty write-ahead log is left behind."""
        with self._hold():
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._db.close()

    # -- the way of a job ------------------------------------------------------------------

    def admit(self, settled: Iterable[Settled]) -> int:
        """Queue what is not known yet, in one transaction; how many were new."""
        rows = []
        for each in settled:
            a = each.arrival
            row = _row(new_object_id(), a.folder, a.relpath, a.identity, each.proof)
            rows.append((*row, a.first_seen_ns, State.QUEUED, ""))
        with self._hold():
            before = self._count_rows()
            with self._transaction():
                for row in rows:
                    self._follow_device(row)
                self._db.executemany(f"INSERT {_INTO} {_SEEN_AGAIN}", rows)
            self._changed.notify_all()
            return self._count_rows() - before

    def _follow_device(self, row: Sequence[Any]) -> None:
        # A file system may have another number after it was mounted again. A file that is known by
        # all else shows it; what was kept there must not be sealed once more.
        _, folder, name, dev, ino, size, mtime_ns, *_ = row
        known = self._db.execute(
            "SELECT dev FROM job WHERE folder = ? AND name = ? AND ino = ? AND size = ?"
            " AND mtime_ns = ? AND dev <> ? AND state IN ('left', 'kept', 'undeletable')",
            (folder, name, ino, size, mtime_ns, dev),
        ).fetchone()
        if known is not None:
            self._db.execute(
                "UPDATE OR IGNORE job SET dev = ? WHERE folder = ? AND dev = ?"
                " AND state IN ('left', 'kept', 'undeletable')",
                (dev, folder, *known),
            )

    def _count_rows(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM job").fetchone()[0])

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        # At once: one that reads first and writes then fails where somebody wrote in between.
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # a full disk has ended it already
                self._db.execute("ROLLBACK")
            raise

    def adopt(self, job: Job, state: State, reason: str = "") -> None:
        """Make sure that a file found in the staging directory has its job, in that state."""
        with self._hold():
            # A folder may come back while a worker still has one of its files in hand.
            self._db.execute(
                "UPDATE job SET state = ?, folder = ? WHERE object_id = ?"
                " AND state NOT IN ('taken', 'committed')",
                (state, job.folder, job.object_id),
            )
            query = "SELECT 1 FROM job WHERE object_id = ?"
            if self._db.execute(query, (job.object_id,)).fetchone() is None:
                # The file is here: another row for it, from a database out of date, is wrong.
                self._db.execute(
                    f"INSERT OR REPLACE {_INTO}",
                    (
                        *_row(job.object_id, job.folder, job.relpath, job.identity, job.proof),
                        job.first_seen_ns,
                        state,
                        reason,
                    ),
                )
            self._changed.notify_all()

    def look_again(self) -> None:
        """Let whoever waits for a job ask anew which folders may be worked on."""
        with self._hold():
            self._changed.notify_all()

    def reclaim(self) -> None:
        """At start: what was in the hands of the process before is queued again."""
        with self._hold():
            self._db.execute("UPDATE job SET state = 'queued' WHERE state IN ('taken','committed')")

    def take(self, folders: Callable[[], Collection[FolderKey]], timeout: float) -> Job | None:
        """Take the oldest job that is due, or ``None`` when none came in ``timeout`` seconds.

        ``folders`` says which folders may be worked on, and is asked anew each time.
        """
        deadline = time.monotonic() + timeout
        with self._hold():
            while True:
                row = self._take_one(folders())
                left = deadline - time.monotonic()
                if row is not None or left <= 0 or self._released:
                    return row
                self._changed.wait(left)

    def _take_one(self, folders: Collection[FolderKey]) -> Job | None:
        row = self._db.execute(
            "UPDATE job SET state = 'taken', attempts = attempts + 1 WHERE object_id = ("  # noqa: S608 - only names of parameters are put in
            f"SELECT object_id FROM job WHERE state = 'queued' AND {_DUE}"
            f" AND folder IN ({_names(folders)}) ORDER BY not_before, first_seen_ns LIMIT 1)"
            " RETURNING object_id, folder, name, dev, ino, size, mtime_ns, ctime_ns, proof,"
            " attempts, first_seen_ns",
            _parameters(folders),
        ).fetchone()
        return None if row is None else _job(row)

    def committed(self, job: Job) -> None:
        """The object is in the vault for good; what is left is the plaintext."""
        self._set(job.object_id, State.COMMITTED)

    def done(self, gone: Sequence[tuple[Job, int | None]]) -> None:
        """The plaintexts are gone, each at its time (ns): count them, and forget their names.

        ``None``: nobody knows since when; such a one counts in no dwell time.
        """
        if not gone:
            return
        with self._hold():
            with self._transaction():
                for job, gone_ns in gone:
                    self._db.execute("DELETE FROM job WHERE object_id = ?", (job.object_id,))
                    if gone_ns is None:
                        self._record(job, time.time_ns(), _UNKNOWN)
                    else:
                        dwell = max(0, gone_ns - job.first_seen_ns) // 1_000_000
                        self._record(job, gone_ns, dwell)
            self._changed.notify_all()

    def rest(self, job: Job, state: State, reason: str, *, sealed: bool = False) -> None:
        """The job goes on only when asked to; ``sealed``: its object is in the vault."""
        with self._hold():
            with self._transaction():
                self._db.execute(
                    "UPDATE job SET state = ?, reason = ? WHERE object_id = ?",
                    (state, reason, job.object_id),
                )
                if sealed:
                    self._record(job, time.time_ns(), _UNKNOWN)
            self._changed.notify_all()

    def _record(self, job: Job, when_ns: int, dwell_ms: int) -> None:
        known = self._db.execute(
            "UPDATE sealed SET dwell_ms = ? WHERE object_id = ?", (dwell_ms, job.object_id)
        ).rowcount
        if known:
            return
        self._db.execute(
            "INSERT INTO sealed VALUES (?,?,?,?,?)",
            (job.object_id, job.folder, job.identity.size, when_ns, dwell_ms),
        )
        self._add(job.folder, "sealed", 1)
        self._add(job.folder, "bytes", job.identity.size)

    def retry(self, job: Job, reason: str, delay: float, *, burn: bool = True) -> None:
        """Queue a job again in ``delay`` seconds. Without ``burn`` its attempt does not count."""
        with self._hold():
            self._db.execute(
                "UPDATE job SET state = 'queued', reason = ?, not_before = ?,"
                " attempts = attempts - ? WHERE object_id = ?",
                (reason, time.time() + delay, 0 if burn else 1, job.object_id),
            )
            self._changed.notify_all()

    def rename(self, job: Job, object_id: ObjectId, reason: str) -> None:
        """Queue a job again under another object id."""
        with self._hold():
            self._db.execute(
                "UPDATE job SET object_id = ?, state = 'queued', reason = ?, not_before = 0"
                " WHERE object_id = ?",
                (object_id, reason, job.object_id),
            )
            self._changed.notify_all()

    def drop(self, job: Job, counted_as: str) -> None:
        """Forget a job whose file is gone or became another one."""
        with self._hold():
            dropped = self._db.execute(
                "DELETE FROM job WHERE object_id = ? AND ctime_ns = ?",
                (job.object_id, job.identity.ctime_ns),
            ).rowcount
            if dropped:
                self._add(job.folder, counted_as, 1)
            else:  # it was admitted again in the meantime, as it is now; nothing was tried yet
                self._db.execute(
                    "UPDATE job SET state = 'queued', attempts = attempts - 1 WHERE object_id = ?",
                    (job.object_id,),
                )
            self._changed.notify_all()

    def requeue(self, object_id: ObjectId) -> bool:
        """Give a resting job a fresh start; false where there is no such resting job."""
        with self._hold():
            changed = self._db.execute(
                "UPDATE job SET state = 'queued', attempts = 0, not_before = 0, reason = ''"
                " WHERE object_id = ?"
                " AND state IN ('quarantined', 'left', 'undeletable', 'queued')",
                (object_id,),
            ).rowcount
            self._changed.notify_all()
            return changed > 0

    def forget_vanished(
        self,
        folder: FolderKey,
        seen: Mapping[str, Identity],
        claimed: Collection[str] = (),
        *,
        device: int | None = None,
    ) -> None:
        """Forget resting jobs whose file is neither in the folder nor ``claimed`` (object ids).

        ``seen`` is what lies under each name. A name that was given to another file since then is
        no longer the resting one's. ``device``: the folder's own; what rested on a file system of
        which nothing is there now is away with it, and not gone.
        """
        there = {identity.dev for identity in seen.values()} | {device}
        with self._hold():
            rows = self._db.execute(
                "SELECT object_id, name, dev, ino, size, mtime_ns, ctime_ns FROM job"
                " WHERE folder = ? AND state IN ('left', 'kept', 'undeletable')",
                (folder,),
            ).fetchall()
            gone = []
            for object_id, name, *identity in rows:
                now, then = seen.get(os.fsdecode(name)), _identity(*identity)
                is_away = device is not None and then.dev not in there
                stays = is_away or (now is not None and now.same_content(then))
                if not stays and object_id not in claimed:
                    gone.append((object_id,))
            self._db.executemany("DELETE FROM job WHERE object_id = ?", gone)

    def unknown(self, object_ids: Collection[str]) -> set[str]:
        """Which of these names are no job's."""
        query = "SELECT 1 FROM job WHERE object_id = ?"
        with self._hold():
            return {i for i in object_ids if self._db.execute(query, (i,)).fetchone() is None}

    def release(self) -> None:
        """From now on nobody waits in `take` any more."""
        with self._hold():
            self._released = True
            self._changed.notify_all()

    def trim(self) -> None:
        """Shorten the history, and empty the log that may still hold the names of sealed files."""
        with self._hold():
            self._db.execute(
                "DELETE FROM sealed WHERE object_id IN (SELECT object_id FROM sealed"
                " ORDER BY sealed_ns DESC LIMIT -1 OFFSET ?)",
                (_HISTORY,),
            )
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    # -- counters and listings -------------------------------------------------------------

    def count(self, folder: FolderKey, what: str, by: int = 1) -> None:
        """Add to one of a folder's counters."""
        with self._hold():
            self._add(folder, what, by)

    def _add(self, folder: FolderKey, what: str, by: int) -> None:
        self._db.execute(_COUNT, (folder, what, by))

    def counters(self, folder: FolderKey) -> dict[str, int]:
        """All counters of a folder since the database was made."""
        with self._hold():
            rows = self._db.execute("SELECT what, n FROM counter WHERE folder = ?", (folder,))
            return dict(rows.fetchall())

    def states(self, folder: FolderKey) -> dict[str, int]:
        """How many jobs of a folder are in each state."""
        with self._hold():
            rows = self._db.execute(
                "SELECT state, count(*) FROM job WHERE folder = ? GROUP BY state", (folder,)
            )
            return dict(rows.fetchall())

    def pending(self) -> int:
        """How many jobs are queued or in hand."""
        with self._hold():
            query = "SELECT count(*) FROM job WHERE state IN ('queued', 'taken', 'committed')"
            return int(self._db.execute(query).fetchone()[0])

    def due(self, folders: Collection[FolderKey]) -> int:
        """How many jobs are in hand, or could be taken now."""
        with self._hold():
            query = (
                "SELECT count(*) FROM job WHERE state IN ('taken', 'committed')"  # noqa: S608 - only names of parameters are put in
                f" OR (state = 'queued' AND {_DUE} AND folder IN ({_names(folders)}))"
            )
            return int(self._db.execute(query, _parameters(folders)).fetchone()[0])

    def sealed_total(self) -> int:
        """How many pictures were ever sealed, over all folders."""
        with self._hold():
            query = "SELECT coalesce(sum(n), 0) FROM counter WHERE what = 'sealed'"
            return int(self._db.execute(query).fetchone()[0])

    def dwell(self, folder: FolderKey) -> Dwell:
        """Dwell times of the newest sealed pictures of a folder."""
        with self._hold():
            rows = self._db.execute(
                "SELECT dwell_ms FROM sealed WHERE folder = ? AND dwell_ms >= 0"
                " ORDER BY sealed_ns DESC LIMIT ?",
                (folder, _DWELL_SAMPLE),
            ).fetchall()
        times = sorted(row[0] for row in rows)
        if not times:
            return Dwell(0, 0, 0, 0)
        last = len(times) - 1
        return Dwell(len(times), times[last // 2], times[last * 95 // 100], times[-1])

    def rows(self, *, folder: FolderKey | None = None, state: State | None = None) -> list[Row]:
        """The jobs, oldest first, of one folder or one state where asked."""
        query = (
            "SELECT object_id, folder, name, state, attempts, not_before, reason, dev, ino, size,"
            " mtime_ns, ctime_ns FROM job WHERE (? IS NULL OR folder = ?)"
            " AND (? IS NULL OR state = ?) ORDER BY first_seen_ns"
        )
        with self._hold():
            found = self._db.execute(query, (folder, folder, state, state)).fetchall()
        return [
            Row(
                ObjectId(r[0]),
                FolderKey(r[1]),
                os.fsdecode(r[2]),
                State(r[3]),
                attempts=r[4],
                not_before=r[5],
                reason=r[6],
                identity=_identity(*r[7:12]),
            )
            for r in found
        ]

    def _set(self, object_id: ObjectId, state: State) -> None:
        with self._hold():
            self._db.execute("UPDATE job SET state = ? WHERE object_id = ?", (state, object_id))


def _open_or_replace(path: Path) -> sqlite3.Connection:
    try:
        return _open(path)
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError:
        _put_aside(path)
        return _open(path)


def _open(path: Path) -> sqlite3.Connection:
    # SQLite gives its log, which holds names too, the mode of the database.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    os.chmod(path, 0o600)
    database = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute("PRAGMA secure_delete = ON")
        database.executescript(_SCHEMA)
        (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            code = re.search(r"error code=(\d+)", verdict)
            # A disk that does not answer says nothing of what is on it.
            unread = code is not None and int(code[1]) & 0xFF == sqlite3.SQLITE_IOERR
            raise sqlite3.OperationalError("disk I/O error") if unread else _damage(verdict)
    except sqlite3.Error:
        database.close()
        raise
    return database


def _names(folders: Collection[FolderKey]) -> str:
    return ",".join(f":f{number}" for number in range(len(folders)))


def _parameters(folders: Collection[FolderKey]) -> dict[str, str | float]:
    return {"now": time.time(), **{f"f{number}": each for number, each in enumerate(folders)}}


def _damage(verdict: str) -> sqlite3.DatabaseError:
    return sqlite3.DatabaseError(f"it is damaged: {' '.join(verdict.split())}")


def _put_aside(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        damaged = f"{path}{suffix}"
        if os.path.exists(damaged):
            os.replace(damaged, f"{path}.damaged{suffix}")


def _row(
    object_id: ObjectId, folder: FolderKey, relpath: str, identity: Identity, proof: Proof
) -> tuple[Any, ...]:
    node = (_signed(identity.dev), _signed(identity.ino))
    content = (identity.size, identity.mtime_ns, identity.ctime_ns)
    return (object_id, folder, os.fsencode(relpath), *node, *content, proof)


# SQLite's integers are signed 64 bit; device and inode numbers are unsigned.
def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number


def _unsigned(number: int) -> int:
    return number + (1 << 64) if number < 0 else number


def _identity(dev: int, ino: int, size: int, mtime_ns: int, ctime_ns: int) -> Identity:
    return Identity(_unsigned(dev), _unsigned(ino), size, mtime_ns, ctime_ns)


def _job(row: tuple[Any, ...]) -> Job:
    object_id, folder, name, dev, ino, size, mtime, ctime, proof, attempts, seen = row
    return Job(
        object_id=ObjectId(object_id),
        folder=FolderKey(folder),
        relpath=os.fsdecode(name),
        identity=_identity(dev, ino, size, mtime, ctime),
        proof=Proof(proof),
        attempts=attempts,
        first_seen_ns=seen,
    )
