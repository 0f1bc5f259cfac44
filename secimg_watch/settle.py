"""When a file is complete. Rules only: stats and a clock are handed in, verdicts come out.

A file *settles* when its identity stayed the same for the folder's settle time, counted on a
monotonic clock from the moment that state was first seen. Settling is necessary and never
enough: a producer may pause longer. So a *proof* is asked for as well, see `judge`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from secimg_watch.records import Proof

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from secimg_watch.records import Identity

QUIET_LOCAL: Final = 30.0
QUIET_REMOTE: Final = 120.0
"""Seconds without change that count as complete where nothing better can be known. A remote
file system adds attribute caching (up to 60 s by default in nfs(5)) and clock skew."""

EMPTY_GRACE: Final = 60.0
"""Seconds that an empty file is left alone: producers create first and write later."""

_FIRST_RETRY: Final = 0.5
_LAST_RETRY: Final = 10.0


class ProofRule(StrEnum):
    """What a folder accepts as proof; the policy's key ``proof``."""

    AUTO = "auto"
    LEASE = "lease"
    RENAME = "rename"
    SIDECAR = "sidecar"
    QUIET = "quiet"


class Missing(StrEnum):
    """What a settled file still lacks. The text is what a person is told."""

    WRITER = "some process still has it open for writing"
    NO_LEASE = "the file system grants no lease, and 'proof: lease' asks for one"
    NO_SIDECAR = "the producer's marker file is not there yet"
    NOT_QUIET = "no lease can be had here, so it must stay unchanged for longer"


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of one settled file."""

    writer: bool  # the kernel says that somebody has it open for writing
    leased: bool  # the kernel granted a read lease
    renamed: bool  # it was seen to appear by a rename
    sidecar: bool  # its marker file is there
    quiet: float  # seconds since its identity last changed
    remote: bool  # the folder lies on a remote file system


def judge(rule: ProofRule, settle: float, evidence: Evidence) -> Proof | Missing:
    """The proof that a settled file is complete, or what is missing.

    A known writer always refutes. Otherwise ``lease``, ``sidecar`` and ``quiet`` ask for just
    that evidence; ``rename`` relies on the producer's word that it renames finished files into
    place; ``auto`` takes the strongest there is, and where the kernel grants no lease and no
    rename was seen, waits for `QUIET_LOCAL` or `QUIET_REMOTE`.
    """
    if evidence.writer:
        return Missing.WRITER
    if rule is ProofRule.RENAME:
        return Proof.RENAME
    if rule is ProofRule.SIDECAR:
        return Proof.SIDECAR if evidence.sidecar else Missing.NO_SIDECAR
    if rule is ProofRule.QUIET:
        return Proof.QUIET
    if evidence.leased:
        return Proof.LEASE
    if rule is ProofRule.LEASE:
        return Missing.NO_LEASE
    if evidence.renamed:
        return Proof.RENAME
    enough = max(settle, QUIET_REMOTE if evidence.remote else QUIET_LOCAL)
    return Proof.QUIET if evidence.quiet >= enough else Missing.NOT_QUIET


@dataclass(slots=True)
class _Entry:
    identity: Identity
    first_seen_ns: int
    first: float
    since: float
    due: float
    renamed: bool
    retry: float = _FIRST_RETRY
    missing: Missing | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A settled file that may be taken once its proof is there."""

    relpath: str
    identity: Identity
    first_seen_ns: int
    renamed: bool
    quiet: float


class Tracker:
    """Every file of one folder on its way to being complete.

    Legal order for one path: any number of ``observe``; then, when ``due`` lists it, either
    ``postpone`` (proof missing) or ``hand_over`` (a job exists). A changed identity starts over,
    also after ``hand_over``.
    """

    def __init__(self, settle: float) -> None:
        """``settle``: seconds without change."""
        self._settle = settle
        self._entries: dict[str, _Entry] = {}
        self._handed: dict[str, Identity] = {}
        self._temporary: dict[tuple[int, int], str] = {}

    def observe(
        self, relpath: str, identity: Identity, now: float, wall_ns: int, *, renamed: bool = False
    ) -> None:
        """Take note of a file as it is now; ``renamed``: this event was a rename into place."""
        if self._handed.get(relpath) == identity:
            return
        self._handed.pop(relpath, None)
        entry = self._entries.get(relpath)
        if entry is not None and entry.identity == identity:
            self._look_again(entry, now, renamed=renamed)
            return
        wait = max(self._settle, EMPTY_GRACE) if identity.size == 0 else self._settle
        seen, first = (entry.first_seen_ns, entry.first) if entry else (wall_ns, now)
        # Used up: the kernel gives the number of a deleted file to the next one.
        known = self._temporary.pop((identity.dev, identity.ino), None) is not None
        self._entries[relpath] = _Entry(identity, seen, first, now, now + wait, renamed or known)

    def _look_again(self, entry: _Entry, now: float, *, renamed: bool) -> None:
        entry.renamed = entry.renamed or renamed
        if entry.missing is not None:
            # An event on a file that only lacked its proof: a writer may just have closed it.
            entry.due = min(entry.due, now)

    def observe_temporary(self, relpath: str, identity: Identity) -> None:
        """Remember a producer's temporary file: its inode under another name was renamed."""
        self._temporary[identity.dev, identity.ino] = relpath

    def forget(self, relpath: str) -> None:
        """The file is gone, or is none of ours any more."""
        self._entries.pop(relpath, None)
        self._handed.pop(relpath, None)

    def retain(self, seen: AbstractSet[str]) -> int:
        """Forget all but the ``seen`` paths; how many vanished before they were taken."""
        gone = self._entries.keys() - seen
        for path in gone:
            del self._entries[path]
        self._handed = {path: node for path, node in self._handed.items() if path in seen}
        self._temporary = {node: path for node, path in self._temporary.items() if path in seen}
        return len(gone)

    def due(self, now: float) -> list[Candidate]:
        """The files whose time has come, oldest first."""
        found = [
            Candidate(path, e.identity, e.first_seen_ns, e.renamed, now - e.since)
            for path, e in self._entries.items()
            if e.due <= now
        ]
        return sorted(found, key=lambda candidate: candidate.first_seen_ns)

    def next_due(self) -> float | None:
        """When the next file's time comes, or ``None``."""
        return min((e.due for e in self._entries.values()), default=None)

    def postpone(self, relpath: str, missing: Missing, now: float) -> None:
        """The proof is missing: ask again later, at growing intervals of at most ten seconds."""
        entry = self._entries[relpath]
        entry.missing = missing
        entry.due = now + entry.retry
        entry.retry = min(entry.retry * 2, _LAST_RETRY)

    def hand_over(self, relpath: str) -> None:
        """The queue knows the file now; it is not listed again while it stays as it is."""
        self._handed[relpath] = self._entries.pop(relpath).identity

    def waiting(self) -> int:
        """How many files with something in them are seen and not yet handed over."""
        return sum(e.identity.size > 0 for e in self._entries.values())

    def overdue(self, since: float) -> int:
        """How many files with something in them were there at that time, and still wait."""
        return sum(e.identity.size > 0 and e.first <= since for e in self._entries.values())

    def empty(self) -> int:
        """How many files have nothing in them yet."""
        return sum(e.identity.size == 0 for e in self._entries.values())

    def unready(self) -> list[str]:
        """The paths that settled and lack their proof."""
        return [
            path
            for path, e in self._entries.items()
            if e.missing is not None and e.identity.size > 0
        ]
