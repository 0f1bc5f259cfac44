"""One thread a watched folder: hears hints, scans, lets files settle, and queues them.

Folders do not wait for one another: a share that stopped answering holds up its own thread and
no other. Nothing here reads a picture or changes a file.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING, Final

from secimg_watch import kernel
from secimg_watch.errors import FolderGoneError, QueueError, SecimgError
from secimg_watch.names import display
from secimg_watch.quantities import format_duration
from secimg_watch.records import Arrival, FolderKey, Proof, Settled
from secimg_watch.roots import QUARANTINE_NAME, Root
from secimg_watch.scan import Found, is_gone, look, scan
from secimg_watch.selection import STAGING_NAME, Passed, Selection
from secimg_watch.settle import Candidate, Evidence, Missing, ProofRule, Tracker, judge

if TYPE_CHECKING:
    from collections.abc import Callable

    from secimg_watch.jobs import Jobs
    from secimg_watch.policy import Folder
    from secimg_watch.records import Identity
    from secimg_watch.watcher import Watcher

_TICK: Final = 1.0  # seconds between two looks at root and watcher
_HINTS: Final = 10_000  # more than these, and a scan is cheaper than looking one by one
_LOOKS: Final = 256  # files passed over since the last scan that each turn looks at again
_OVERDUE: Final = 3600.0  # seconds after which somebody should look at what is not complete
_SCAN_SHARE: Final = 10  # a folder is not scanned for more than a tenth of the time on doubt

log = logging.getLogger(__name__)


class Health(StrEnum):
    """The state of a folder, worst last."""

    STARTING = "starting"
    OK = "ok"
    DEGRADED = "degraded"  # what is complete is taken, but later than it could be, or much is not
    PAUSED = "paused"  # something around it must recover first
    GONE = "gone"  # the folder is not there


@dataclass(frozen=True, slots=True)
class Sight:
    """What a monitor knows of its folder right now."""

    health: Health
    reason: str
    mode: str  # "native" or "poll"
    waiting: int  # files seen that are not complete yet
    unready: int  # of these, settled ones that lack their proof
    temporary: int
    passed: dict[str, int]  # why -> how many, by the last full scan
    scanned: bool  # at least once since the folder was opened


class Monitor(threading.Thread):
    """Watches one folder. `attach` is called with each newly opened root before it is scanned."""

    def __init__(
        self,
        policy: Folder,
        jobs: Jobs,
        watcher: Watcher | None,
        *,
        attach: Callable[[Root], None],
        log_names: bool,
    ) -> None:
        """Nothing is opened before the thread runs. ``watcher``: ``None`` to poll."""
        super().__init__(name=f"folder {policy.path}", daemon=True)
        self.policy = policy
        self.key = FolderKey(str(policy.path))
        self.root: Root | None = None
        self._jobs = jobs
        self._attach = attach
        self._log_names = log_names
        self._selection = selection_of(policy)
        self._tracker = Tracker(policy.settle)
        self._rule = ProofRule(policy.proof)
        self.fault: QueueError | None = None  # what ended the thread
        self._native = watcher if policy.watch != "poll" else None
        self._remote = False
        self._was_mounted = False
        self._device: int | None = None
        self._changed = threading.Condition()
        self._hints: dict[str, tuple[bool, bool]] = {}
        self._doubts: list[str] = []
        self._dropped: set[str] = set()
        self._stopping = False
        self._scanned = 0.0
        self._next_scan = 0.0
        self._next_watch = 0.0
        self._scan_took = 0.0
        self._watching = False
        self._trouble = ""
        self._passed: dict[str, Passed] = {}
        self._heard: dict[str, None] = {}  # in the order in which they are looked at again
        self._unfinished: dict[str, tuple[Identity, float]] = {}
        self._told: Counter[Passed] = Counter()
        self._strays = 0  # in the staging directory, and none of ours
        self._turning = False
        self._beat = time.monotonic()
        self._sight = Sight(Health.STARTING, "", "poll", 0, 0, 0, {}, scanned=False)

    # -- called from other threads -----------------------------------------------------------

    def hint(self, relpath: str, *, directory: bool, renamed: bool) -> None:
        """Something happened to this path. Never blocks for long."""
        with self._changed:
            if len(self._hints) >= _HINTS:
                self._hints.clear()
                self._doubts.append("more events than can be followed one by one")
            was = self._hints.get(relpath, (False, False))
            self._hints[relpath] = (was[0] or directory, was[1] or renamed)
            self._changed.notify()

    def reconsider(self, relpath: str) -> None:
        """A job for this path ended without its file: whatever lies there now is an arrival."""
        with self._changed:
            self._dropped.add(relpath)
            self._hints.setdefault(relpath, (False, False))
            self._changed.notify()

    def doubt(self, why: str) -> None:
        """Events were lost, or somebody asks for a scan."""
        with self._changed:
            self._doubts.append(why)
            self._changed.notify()

    def stop(self) -> None:
        """End the thread soon."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def sight(self) -> Sight:
        """What was known of the folder at the end of the last turn."""
        return self._sight

    def is_idle(self) -> bool:
        """Whether all that is ready was queued: scanned, and nothing left that only needs time."""
        with self._changed:
            sight = self._sight
            quiet = sight.waiting == sight.unready and not (
                self._hints or self._doubts or self._turning
            )
            return sight.health is Health.GONE or (sight.scanned and quiet)

    def last_beat(self) -> float:
        """When this thread last showed a sign of life, on the monotonic clock."""
        return self._beat

    # -- the thread ----------------------------------------------------------------------------

    def run(self) -> None:
        """Turn after turn until `stop`."""
        try:
            while not self._stopping:
                self._turn()
        except QueueError as fault:
            self.fault = fault
        finally:
            # Nor may the folder stay busy: this object lives on until a collection finds it.
            self._lose_root()

    def _turn(self) -> None:
        self._beat = time.monotonic()
        try:
            self._check_root()
            if self.root is not None:
                self._follow_hints(self.root)
                self._look_again(self.root)
                self._scan_if_due(self.root)
                self._queue_complete(self.root)
        except OSError as error:
            # The folder stopped answering in the middle; the next turn looks at it anew.
            self._trouble = f"the folder does not answer: {error.strerror}"
            self._lose_root()
        # Built here and handed out whole: other threads never see the tracker half-way.
        before, self._sight = self._sight, self._look_around()
        self._report_health(before)
        with self._changed:
            self._turning = False
            if not (self._hints or self._doubts or self._stopping):
                self._changed.wait(self._sleep(time.monotonic()))

    def _report_health(self, before: Sight) -> None:
        now = self._sight
        if (now.health, now.reason) == (before.health, before.reason):
            return
        level = logging.INFO if now.health is Health.OK else logging.WARNING
        log.log(level, "folder %s: %s%s", self.key, now.health, now.reason and f": {now.reason}")

    def _look_around(self) -> Sight:
        health, reason = self._health()
        passed, empty = Counter(self._passed.values()), self._tracker.empty()
        return Sight(
            health=health,
            reason=reason,
            mode="native" if self._watching else "poll",
            waiting=self._tracker.waiting(),
            unready=len(self._tracker.unready()),
            temporary=passed[Passed.TEMPORARY],
            passed={
                **{why.name.lower(): n for why, n in passed.items() if n},
                **({"empty": empty} if empty else {}),
                **({"staging": self._strays} if self._strays else {}),
            },
            scanned=self._scanned > 0,
        )

    def _sleep(self, now: float) -> float:
        if self.root is None:
            return _TICK  # what is due cannot be done before the folder is back
        due = self._tracker.next_due()
        return max(0.0, min(_TICK, self._next_scan - now, _TICK if due is None else due - now))

    # -- root and watcher ----------------------------------------------------------------------

    def _check_root(self) -> None:
        if self.root is not None and not self.root.is_current():
            log.warning("folder %s: it was removed, replaced or mounted over", self.key)
            self._lose_root()
        if self.root is None:
            self._open_root()
        elif self._watching and self._native is not None and not self._native.is_alive(self.key):
            log.warning("folder %s: its watch died; watching anew", self.key)
            self._watch(self.root)
            self._next_scan = 0.0
        elif self._is_partly_deaf() and time.monotonic() >= self._next_watch:
            # A limit may have been raised, or others have let go of what they held.
            self._watch(self.root)
            self._next_scan = 0.0

    def _is_partly_deaf(self) -> bool:
        refused = self._refused()[0] > 0
        return self._wants_events() and (refused or not self._watching)

    def _wants_events(self) -> bool:
        return self._native is not None and not (self._remote and self.policy.watch == "auto")

    def _lose_root(self) -> None:
        if self.root is not None:
            self.root.unlock()
        self.root = None
        self._watching = False
        if self._native is not None:
            self._native.unwatch(self.key)

    def _open_root(self) -> None:
        try:
            root = Root(self.policy.path, self.policy.staging)
            root.lock()  # before its claimed files are taken for left over ones
            self._attach(root)
        except QueueError:
            raise
        except SecimgError as error:
            if not isinstance(error, FolderGoneError) and str(error) != self._trouble:
                log.error("folder %s: %s", self.key, error)
            self._trouble = str(error)
            return
        self._trouble = ""
        self._was_mounted = self._was_mounted or root.is_mount_point
        if root.device != self._device:
            # What lay on another file system is away with it, and has not vanished.
            self._tracker = Tracker(self.policy.settle)
            self._device = root.device
        self._remote = kernel.is_remote(kernel.file_system_type(self.policy.path))
        self._watch(root)
        self.root = root
        # Claimed files got their jobs before, when no worker might take them yet.
        self._jobs.look_again()
        self._next_scan = 0.0
        how = "native" if self._watching else "poll"
        log.info("folder %s: watched (%s)", self.key, how)

    def _watch(self, root: Root) -> None:
        self._watching = False
        if self._native is None or not self._wants_events():
            return
        self._next_watch = time.monotonic() + self.policy.rescan
        self._trouble = ""
        self._native.unwatch(self.key)
        path = os.path.realpath(root.path)
        try:
            self._native.watch(self.key, path, self, recursive=self.policy.recursive)
        except OSError as error:
            remedy = "; raise fs.inotify.max_user_instances" if error.errno == errno.EMFILE else ""
            self._trouble = f"it cannot be watched ({error.strerror}); polling instead{remedy}"
            return
        self._watching = True

    def _health(self) -> tuple[Health, str]:
        if self.root is None:
            return Health.GONE if self._trouble else Health.STARTING, self._trouble
        if self._trouble:
            return Health.DEGRADED, self._trouble
        if self._was_mounted and not self.root.is_mount_point:
            return Health.DEGRADED, (
                "its file system is not mounted any more; what arrives meanwhile is taken;"
                " reload the service if that is meant"
            )
        refused, why = self._refused()
        if refused:
            limit = kernel.watch_limit()
            remedy = f"; raise fs.inotify.max_user_watches (now {limit})" if limit else ""
            return Health.DEGRADED, (
                f"{refused} sub-folders cannot be watched ({why}); polling them{remedy}"
            )
        if self.root.why_no_staging:
            return Health.DEGRADED, f"{self.root.why_no_staging}; pictures are sealed in place"
        if self._native is None and self.policy.watch == "native":
            return Health.DEGRADED, "no native watching is to be had here; polling instead"
        overdue = self._overdue(time.monotonic())
        if overdue:
            patience = format_duration(_OVERDUE)
            return Health.DEGRADED, (
                f"{overdue} files are not complete after {patience}: their producer still has them"
                " open, or left them; 'why' tells of each"
            )
        return Health.OK, ""

    def _overdue(self, now: float) -> int:
        left = sum(
            path in self._passed and now - since > _OVERDUE
            for path, (_, since) in self._unfinished.items()
        )
        return left + self._tracker.overdue(now - _OVERDUE - self.policy.settle)

    def _refused(self) -> tuple[int, str]:
        return self._native.unwatched(self.key) if self._native and self._watching else (0, "")

    # -- seeing files --------------------------------------------------------------------------

    def _follow_hints(self, root: Root) -> None:
        with self._changed:
            self._turning = True
            hints, self._hints = self._hints, {}
            doubts, self._doubts = self._doubts, []
            dropped, self._dropped = self._dropped, set()
        for relpath in dropped:
            self._tracker.forget(relpath)
        if doubts:
            log.info("folder %s: scanning it whole: %s", self.key, doubts[0])
            self._next_scan = min(self._next_scan, self._scanned + self._scan_took * _SCAN_SHARE)
        directories = {path for path, (directory, _) in hints.items() if directory}
        for relpath, (directory, renamed) in hints.items():
            self._beat = time.monotonic()
            if directory:
                # A moved-in tree hints at each of its directories; the topmost scan sees all.
                if directories.isdisjoint(_ancestors(relpath)):
                    self._scan_below(root, relpath)
            else:
                found = look(root.fd, relpath, self._selection)
                if found is None:
                    self._tracker.forget(relpath)
                    self._passed.pop(relpath, None)
                else:
                    self._see(found, renamed=renamed)
                    if found.passed is not None:
                        self._heard[relpath] = None

    def _look_again(self, root: Root) -> None:
        # Nobody says when a file that is passed over goes: a rename is heard by its new name only.
        # Nor when it has one name again, after whoever may not overwrite linked and unlinked it.
        for relpath in list(islice(self._heard, _LOOKS)):
            found = look(root.fd, relpath, self._selection)
            del self._heard[relpath]
            if found is not None and found.passed is not None:
                self._heard[relpath] = None  # behind all others
                continue
            self._passed.pop(relpath, None)
            if found is not None:
                self._see(found)

    def _scan_below(self, root: Root, relpath: str) -> None:
        # A sub-folder that is new, or was moved in with all that is in it: files may have been
        # there before its watch was.
        if not self._selection.enters(relpath):
            return
        try:
            for found in scan(root.fd, self._selection, relpath):
                self._see(found)
                self._beat = time.monotonic()
        except OSError as error:
            if not is_gone(error):
                raise
            # gone again; the next full scan knows

    def _scan_if_due(self, root: Root) -> None:
        started = time.monotonic()
        if started < self._next_scan:
            return
        self._passed = {}
        self._heard.clear()
        seen: dict[str, Identity] = {}
        for found in scan(root.fd, self._selection):
            seen[found.relpath] = found.identity
            self._see(found)
            if found.passed is Passed.HARD_LINK:
                self._heard[found.relpath] = None
            self._beat = time.monotonic()
        vanished = self._tracker.retain(seen.keys())
        if vanished:
            self._jobs.count(self.key, "vanished", vanished)
        entries = root.entries()
        self._jobs.forget_vanished(self.key, seen, entries, device=root.device)
        self._count_strays(root, entries)
        self._report_passed()
        self._unfinished = {
            path: since for path, since in self._unfinished.items() if path in self._passed
        }
        self._scanned = time.monotonic()
        self._scan_took = self._scanned - started
        self._next_scan = self._scanned + self._interval()

    def _count_strays(self, root: Root, entries: list[str]) -> None:
        # A row is there before its claim is, and until that is gone: hence the second look.
        strays = self._jobs.unknown(set(entries) - {QUARANTINE_NAME})
        count = len(strays.intersection(root.entries())) if strays else 0
        if count > self._strays:
            log.warning(
                "folder %s: left in the staging directory, as no claim (%d)", self.key, count
            )
        self._strays = count

    def _interval(self) -> float:
        fully_heard = self._watching and not self._refused()[0]
        return self.policy.rescan if fully_heard else min(self.policy.poll, self.policy.rescan)

    def _report_passed(self) -> None:
        passed = Counter(self._passed.values())
        for why, count in passed.items():
            if count > self._told[why] and why is not Passed.STAGING:
                log.info("folder %s: passed over (%d): %s", self.key, count, why)
        self._told = passed

    def _see(self, found: Found, *, renamed: bool = False) -> None:
        if found.passed is not None:
            self._passed[found.relpath] = found.passed
            self._tracker.forget(found.relpath)
        if found.passed is None:
            self._passed.pop(found.relpath, None)
            now, wall = time.monotonic(), time.time_ns()
            self._tracker.observe(found.relpath, found.identity, now, wall, renamed=renamed)
        elif found.passed is Passed.TEMPORARY:
            self._tracker.observe_temporary(found.relpath, found.identity)
            before = self._unfinished.get(found.relpath)
            if before is None or before[0] != found.identity:
                self._unfinished[found.relpath] = (found.identity, time.monotonic())

    # -- queueing files ------------------------------------------------------------------------

    def _queue_complete(self, root: Root) -> None:
        now = time.monotonic()
        complete = []
        for candidate in self._tracker.due(now):
            self._beat = time.monotonic()
            verdict = judge(self._rule, self.policy.settle, self._evidence(root, candidate))
            if isinstance(verdict, Proof):
                complete.append(self._settled(candidate, verdict))
            elif look(root.fd, candidate.relpath, self._selection) is None:
                # Gone, or claimed by a worker for a job that outlived the process before. Asked
                # last: it may have gone while its proof was looked for.
                self._tracker.forget(candidate.relpath)
            else:
                self._postpone(candidate, verdict, now)
        if complete:
            self._jobs.admit(complete)
            for settled in complete:
                self._tracker.hand_over(settled.arrival.relpath)

    def _settled(self, candidate: Candidate, proof: Proof) -> Settled:
        arrival = Arrival(self.key, candidate.relpath, candidate.identity, candidate.first_seen_ns)
        return Settled(arrival, proof)

    def _postpone(self, candidate: Candidate, missing: Missing, now: float) -> None:
        self._tracker.postpone(candidate.relpath, missing, now)
        if self._log_names:
            log.debug("folder %s: %s: %s", self.key, display(candidate.relpath), missing)

    def _evidence(self, root: Root, candidate: Candidate) -> Evidence:
        lease = probe_lease(root.fd, candidate.relpath)
        return Evidence(
            writer=lease is kernel.Lease.WRITER,
            leased=lease is kernel.Lease.GRANTED,
            renamed=candidate.renamed,
            sidecar=has_sidecar(root.fd, candidate.relpath, self.policy.sidecar),
            quiet=candidate.quiet,
            remote=self._remote,
        )


def selection_of(policy: Folder) -> Selection:
    """The part of a folder's policy that looks at names."""
    return Selection(
        include=policy.include,
        exclude=policy.exclude,
        recursive=policy.recursive,
        sidecar=policy.sidecar if policy.proof == "sidecar" else "",
        staging=_staging_inside(policy) or STAGING_NAME,
    )


def _staging_inside(policy: Folder) -> str | None:
    if policy.staging is None or not policy.staging.is_relative_to(policy.path):
        return None
    return str(policy.staging.relative_to(policy.path))


def _ancestors(relpath: str) -> set[str]:
    return {relpath[:i] for i, letter in enumerate(relpath) if letter == "/"}


def probe_lease(root: int, relpath: str) -> kernel.Lease:
    """Ask whether anybody has a file open for writing, and give the lease straight back."""
    try:
        parent, name = kernel.open_parent(root, relpath)
    except OSError:
        return kernel.Lease.UNAVAILABLE
    try:
        fd = os.open(name, kernel.PICTURE, dir_fd=parent)
    except OSError:
        return kernel.Lease.UNAVAILABLE
    finally:
        os.close(parent)
    try:
        return kernel.take_read_lease(fd)
    finally:
        os.close(fd)


def has_sidecar(root: int, relpath: str, suffix: str) -> bool:
    """Whether a file's marker lies beside it."""
    try:
        parent, name = kernel.open_parent(root, relpath)
    except OSError:
        return False
    try:
        os.stat(name + suffix, dir_fd=parent, follow_symlinks=False)
    except OSError:
        return False
    finally:
        os.close(parent)
    return True
