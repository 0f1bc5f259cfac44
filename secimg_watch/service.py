"""The composition root: opens everything, runs monitors and workers, and ends them again."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import queue
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from secimg_watch import __version__, kernel
from secimg_watch.audit import Audit, Event
from secimg_watch.disposition import is_indifferent
from secimg_watch.errors import (
    AlreadyRunningError,
    CannotCreateError,
    DiskFullError,
    NotReadyError,
    QueueError,
    StorageError,
    VaultGoneError,
)
from secimg_watch.gate import check_keys, require_recovery
from secimg_watch.inspector import Inspector, Limits
from secimg_watch.jobs import Jobs, back_off
from secimg_watch.keys import provider_for
from secimg_watch.monitor import Monitor
from secimg_watch.pipeline import Pipeline, Place, Task
from secimg_watch.records import FolderKey, KeySet
from secimg_watch.recovery import recover_folder
from secimg_watch.report import FolderReport, Report
from secimg_watch.vault import Vault
from secimg_watch.watcher import native_watcher

if TYPE_CHECKING:
    from collections.abc import Callable

    from secimg_watch.keys import KeyProvider
    from secimg_watch.policy import Policy
    from secimg_watch.records import FileKey, Job, ObjectId
    from secimg_watch.roots import Root
    from secimg_watch.vault import VaultInfo
    from secimg_watch.watcher import Watcher

log = logging.getLogger(__name__)

_KEY_RETRY: Final = 5.0  # seconds between two looks for a key that is locked away
_GATHER: Final = 0.002  # seconds: about one sync of a disk, and it serves all that come in it
_BATCH: Final = 64  # verified objects that are committed together at most
_IDLE: Final = 1.0  # seconds that a worker waits for a job before it shows a sign of life
_STOP: Final = 20.0  # seconds that a job in hand may still take; below TimeoutStopSec
_POLL: Final = 0.02  # seconds between two looks whether everything is done
_TRIM: Final = 600.0  # seconds between two clean-ups of the queue
_FIRST_PAUSE: Final = 1.0
_LAST_PAUSE: Final = 60.0


@dataclass(slots=True)
class _Pause:
    until: float
    length: float
    reason: str


class _Worker:
    def __init__(self, name: str, loop: Callable[[_Worker], None]) -> None:
        self.thread = threading.Thread(target=self._run, args=(loop,), name=name, daemon=True)
        self.beat = time.monotonic()
        self.fault: QueueError | None = None  # what ended it

    def _run(self, loop: Callable[[_Worker], None]) -> None:
        try:
            loop(self)
        except QueueError as fault:
            self.fault = fault


def _take_all(tasks: queue.Queue[Task | None]) -> list[Task | None]:
    """Wait a moment for one, then take what else is there; ``None`` says that no more will come."""
    taken: list[Task | None] = []
    with contextlib.suppress(queue.Empty):
        taken.append(tasks.get(timeout=_IDLE))
        time.sleep(_GATHER)
        while len(taken) < _BATCH and taken[-1] is not None:
            taken.append(tasks.get_nowait())
    return taken


def key_provider(policy: Policy) -> KeyProvider:
    """The provider that a policy names."""
    key = policy.key
    return provider_for(key.provider, key.name, file=key.file, command=key.command or ())


def open_vaults(policy: Policy) -> dict[str, Vault]:
    """The vaults of a policy by name; nothing on disk is touched."""
    return {name: Vault(vault.path, vault.min_free) for name, vault in policy.vaults.items()}


class Service:
    """One running service. ``open`` first; then either ``start`` ... ``stop``, or neither."""

    def __init__(self, policy: Policy, *, native: bool) -> None:
        """``native``: whether folders may be watched natively; otherwise all are polled."""
        self.policy = policy
        self._wants_native = native
        self._state_lock: int | None = None
        self._stopping = threading.Event()
        self._abandon_at: float | None = None
        self._key_ready = threading.Event()
        self._keys: KeySet | None = None
        self._audit: Audit | None = None
        self._unflushed = ""  # why its last entries are not on disk for certain
        self._file_keys: dict[ObjectId, FileKey] = {}
        self._key_state = "not looked for yet"
        self._log_fault = ""
        self._absent: dict[str, str] = {}
        self._paused: dict[FolderKey, _Pause] = {}
        self._monitors: dict[FolderKey, Monitor] = {}
        self._workers: list[_Worker] = []
        self._finisher: _Worker | None = None
        # Bounded, as each verified object keeps its plaintext open until it is erased.
        self._verified: queue.Queue[Task | None] = queue.Queue(_BATCH)
        self._watcher: Watcher | None = None
        self._trimmed = time.monotonic()
        self._next_key_try = 0.0
        self.vaults = open_vaults(policy)
        self._vault_ids: dict[str, bytes] = {}
        self._provider = key_provider(policy)
        limits = policy.limits
        self.inspector = Inspector(
            Limits(
                seconds=limits.decode_seconds,
                pixels=limits.decode_pixels,
                memory=limits.decode_memory,
                file_size=limits.decode_file,
            )
        )

    # -- opening and closing -------------------------------------------------------------------

    def open(self) -> None:
        """Take hold of the state directory and open the queue.

        Raises:
            CannotCreateError: the state directory cannot be made.
            AlreadyRunningError: another process uses it.
        """
        state = self.policy.state
        try:
            state.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = kernel.lock_exclusively(state / "lock")
        except OSError as error:
            message = f"the state directory {state} cannot be used: {error.strerror}"
            raise CannotCreateError(message) from error
        if lock is None:
            raise AlreadyRunningError(
                f"another secimg-watch works with the state directory {state}",
                hint="see it with: secimg-watch status",
            )
        try:
            self.jobs = Jobs(state / "queue.sqlite")
        except BaseException:
            os.close(lock)
            raise
        self._state_lock = lock
        self.jobs.reclaim()

    def admit(self) -> None:
        """Read the key if it is not read yet, and take hold of every vault that is not yet.

        What is locked away or not mounted is tried again the next time; see `waiting_for`.

        Raises:
            ConfigError: no waiting helps: the key is missing, insecure, or not a vault's, or it
                is not settled whether there is a recovery key.
            NotAllowedError: a vault cannot be written.
            NotReadyError: the audit log cannot be written.
        """
        try:
            keys = self._keys or self._load_keys()
        except NotReadyError as error:
            self._wait_for_key(str(error))
            return
        for name, vault in self.vaults.items():
            if name not in self._vault_ids:
                self._admit_vault(name, vault, keys)
        self._key_state = "ready"
        if self._audit is None:
            self._audit = self._open_audit(keys)
        self._log_fault = ""
        self._keys = keys
        self._key_ready.set()

    def _open_audit(self, keys: KeySet) -> Audit:
        audit = Audit(self.policy.state, keys)
        try:
            audit.append([Event("started", {"version": __version__})], durable=True)
        except BaseException:
            audit.close()
            raise
        return audit

    def refuse_wrong_key(self) -> None:
        """Before anything is opened: would key and vaults fit? What is absent may come later.

        Raises:
            ConfigError: no waiting helps, as for `admit`.
        """
        with contextlib.suppress(NotReadyError):
            keys = self._load_keys()
            for name, vault in self.vaults.items():
                if vault.exists():
                    self._check(name, vault, keys)

    def _load_keys(self) -> KeySet:
        return KeySet(self._provider.load_ring(), self.policy.recipients)

    def _check(self, name: str, vault: Vault, keys: KeySet) -> VaultInfo:
        info = check_keys(vault, keys.ring)
        if self.policy.recovery == "required" and name in self.policy.deleting_vaults:
            require_recovery(vault, info, keys.recipients)
        return info

    def _wait_for_key(self, reason: str) -> None:
        if self._key_state != reason:
            log.warning("key: %s", reason)
        self._key_state = reason

    def _wait_for_log(self, reason: str) -> None:
        if self._log_fault != reason:
            log.warning("%s", reason)
        self._log_fault = reason

    def _admit_vault(self, name: str, vault: Vault, keys: KeySet) -> None:
        try:
            if not vault.exists():
                raise VaultGoneError(
                    f"there is no vault in {vault.path}: its disk is not mounted,"
                    " or 'secimg-watch key init' has not made it yet"
                )
            vault_id = self._check(name, vault, keys).vault_id
            vault.lock()
            # What was checked may have been unmounted before it was locked.
            if not vault.exists() or vault.info().vault_id != vault_id:
                vault.unlock()
                raise VaultGoneError(f"the vault {vault.path} was removed, replaced or unmounted")
            vault.discard_temporaries()
        except (NotReadyError, StorageError, OSError) as error:
            vault.unlock()
            reason = str(error)
            if isinstance(error, OSError):
                reason = f"the vault {vault.path} does not answer: {error.strerror}"
            self._wait_for_vault(name, reason)
            return
        self._absent.pop(name, None)
        self._vault_ids[name] = vault_id

    def _wait_for_vault(self, name: str, reason: str) -> None:
        if self._absent.get(name) != reason:
            log.warning("vault %s: %s", name, reason)
        self._absent[name] = reason

    def waiting_for(self) -> str:
        """What must be there before anything can be sealed, and is not; "" where nothing is."""
        if self._keys is None:
            return self._log_fault or self._key_state
        return next(iter(self._absent.values()), "")

    def start(self) -> None:
        """Start the inspector, a monitor for each folder, and the workers."""
        if not all(map(is_indifferent, self.policy.folders)):
            # Loading every decoder takes a while; only inspections wait for it.
            threading.Thread(target=self._start_inspector, name="inspector", daemon=True).start()
        self._watcher = native_watcher() if self._wants_native else None
        for folder in self.policy.folders:
            key = FolderKey(str(folder.path))
            self._monitors[key] = Monitor(
                folder,
                self.jobs,
                self._watcher,
                attach=functools.partial(self._attach, key),
                log_names=self.policy.log_names,
            )
        for monitor in self._monitors.values():
            monitor.start()
        self._finisher = _Worker("finisher", self._finish)
        self._workers = [
            _Worker(f"worker {n}", self._work) for n in range(self.policy.worker_count)
        ]
        self._finisher.thread.start()  # first: a worker hands over to one that is alive
        for worker in self._workers:
            worker.thread.start()

    def _start_inspector(self) -> None:
        try:
            self.inspector.start()
            if self._stopping.is_set():  # it may have been closed before it was started
                self.inspector.close()
        except StorageError as error:
            log.error("%s; pictures are sealed without being inspected", error)

    def _attach(self, key: FolderKey, root: Root) -> None:
        move_to = self._monitors[key].policy.after.directory
        found = recover_folder(key, root, self.jobs, move_to)
        if found:
            log.info("folder %s: %d claimed files are taken up again", key, found)

    def stop(self) -> None:
        """End monitors and workers; a job in hand is finished, or given back after 20 s."""
        self._stopping.set()
        self._abandon_at = time.monotonic() + _STOP
        for monitor in self._monitors.values():
            monitor.stop()
        if self._workers:
            self.jobs.release()
        for worker in self._workers:
            worker.thread.join(max(0.0, self._abandon_at - time.monotonic()))
        # Whoever still waits for a decoder is told that it failed, and lets go of its job.
        self.inspector.close()
        for worker in self._workers:
            worker.thread.join()
        # Only now can nothing be added any more.
        if self._finisher is not None:
            while self._finisher.thread.is_alive():
                with contextlib.suppress(queue.Full):
                    self._verified.put(None, timeout=_IDLE)
                    break
            self._finisher.thread.join()
        self._finisher, self._workers = None, []
        for monitor in self._monitors.values():
            monitor.join(timeout=_IDLE)
        if self._watcher is not None:
            self._watcher.close()

    @property
    def is_open(self) -> bool:
        """Whether there is a queue to work with."""
        return self._state_lock is not None

    def close(self) -> None:
        """Close the queue and give back every lock. More calls are harmless."""
        for vault in self.vaults.values():
            vault.unlock()
        if self._audit is not None:
            with contextlib.suppress(NotReadyError):
                self._audit.append([Event("stopped")], durable=True)
            self._audit.close()
            self._audit = None
        if self._state_lock is not None:
            self.jobs.close()
            os.close(self._state_lock)
            self._state_lock = None

    # -- the workers ---------------------------------------------------------------------------

    def _work(self, worker: _Worker) -> None:
        while not self._stopping.is_set():
            worker.beat = time.monotonic()
            if not self._key_ready.wait(_IDLE):
                continue
            job = self.jobs.take(self._workable, _IDLE)
            if job is not None:
                self._process(job, worker)

    def _workable(self) -> list[FolderKey]:
        if self._stopping.is_set():
            return []
        now = time.monotonic()
        return [
            key
            for key, monitor in self._monitors.items()
            if monitor.root is not None
            and monitor.policy.vault in self._vault_ids
            and ((pause := self._paused.get(key)) is None or pause.until <= now)
        ]

    def _process(self, job: Job, worker: _Worker) -> None:
        monitor = self._monitors[job.folder]
        root, name = monitor.root, monitor.policy.vault
        vault_id = self._vault_ids.get(name)
        audit = self._audit
        if root is None or vault_id is None or self._keys is None or audit is None:
            self.jobs.retry(job, "folder or vault went away", 0.0, burn=False)
            return
        place = Place(monitor.policy, root, self.vaults[name], vault_id, monitor.reconsider)
        try:
            task = self._pipeline(self._keys, audit, worker).process(job, place)
        except QueueError:
            raise
        except NotReadyError as fault:
            self._pause(job.folder, fault)
        except Exception as error:  # noqa: BLE001 - nothing that one picture does ends a worker
            log.error("object %s: a defect: %s", job.object_id, type(error).__name__)
            self.jobs.retry(job, "a defect", back_off(job.attempts))
        else:
            if task is None:
                self._paused.pop(job.folder, None)
            else:
                self._hand_over(task)

    def _hand_over(self, task: Task) -> None:
        while self._finisher is not None and self._finisher.thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._verified.put(task, timeout=_IDLE)
                return
        task.hands.close()  # the process is about to end

    def _pipeline(self, keys: KeySet, audit: Audit, worker: _Worker) -> Pipeline:
        return Pipeline(
            jobs=self.jobs,
            audit=audit,
            inspector=self.inspector,
            keys=keys,
            from_device=self.policy.verify == "device",
            max_attempts=self.policy.limits.attempts,
            beat=functools.partial(self._beat, worker),
            file_keys=self._file_keys,
        )

    def _finish(self, worker: _Worker) -> None:
        """The finisher's loop: whatever is verified by now goes through together."""
        ended = False
        while not ended:
            worker.beat = time.monotonic()
            taken = _take_all(self._verified)
            ended = None in taken
            tasks = [task for task in taken if task is not None]
            if self._keys is None or self._audit is None:
                continue
            if tasks:
                failed = self._pipeline(self._keys, self._audit, worker).finish(tasks)
                for folder, fault in failed:
                    self._pause(folder, fault)
                for folder in {task.job.folder for task in tasks} - {f for f, _ in failed}:
                    self._paused.pop(folder, None)
            else:
                self._flush_audit(self._audit)

    def _flush_audit(self, audit: Audit) -> None:
        try:
            audit.flush()
            self._unflushed = ""
        except NotReadyError as fault:
            if str(fault) != self._unflushed:  # it is tried every second
                log.warning("%s", fault)
            self._unflushed = str(fault)

    def _beat(self, worker: _Worker) -> None:
        """A sign of life in the middle of a job, and where a stopping service lets go of it."""
        worker.beat = time.monotonic()
        if self._abandon_at is not None and worker.beat > self._abandon_at:
            raise NotReadyError("the service is stopping")

    def _pause(self, folder: FolderKey, fault: NotReadyError) -> None:
        vault = self._monitors[folder].policy.vault
        if isinstance(fault, VaultGoneError):
            self._wait_for_vault(vault, str(fault))
            # Nothing more is written there until key and vault were checked against each other.
            self._vault_ids.pop(vault, None)
            self.vaults[vault].unlock()
            return
        concerned = [
            key
            for key, monitor in self._monitors.items()
            if key == folder or (isinstance(fault, DiskFullError) and monitor.policy.vault == vault)
        ]
        for key in concerned:
            before = self._paused.get(key)
            if before is not None and time.monotonic() < before.until:
                continue  # of the jobs that were in hand together, each meets the same fault
            length = min(before.length * 2, _LAST_PAUSE) if before else _FIRST_PAUSE
            if before is None:
                log.warning("folder %s: paused: %s", key, fault)
            self._paused[key] = _Pause(time.monotonic() + length, length, str(fault))

    def drain(self, show: Callable[[int, int | None], None]) -> int:
        """Take everything that is ready, and stop; how many pictures that sealed.

        The service has been opened. ``show`` is told how many are sealed by now, and of how many.

        Raises:
            NotReadyError: key or vault is not there, or a thread died.
            ConfigError, NotAllowedError: as for `admit`.
            QueueError: the queue fails.
        """
        self.admit()
        if self.waiting_for():
            raise NotReadyError(self.waiting_for())
        before = self.jobs.sealed_total()
        self.start()
        while not self.is_idle():
            done = self.jobs.sealed_total() - before
            show(done, done + self.jobs.pending())
            self.refuse_dead_threads()
            time.sleep(_POLL)
        self.stop()
        return self.jobs.sealed_total() - before

    # -- the owner's loop ----------------------------------------------------------------------

    def tend(self) -> None:
        """What has to be done every second or so by whoever owns the service.

        Raises:
            ConfigError: the key turned out to be missing, insecure or wrong.
        """
        incomplete = self._keys is None or len(self._vault_ids) < len(self.vaults)
        if incomplete and time.monotonic() >= self._next_key_try:
            try:
                self.admit()
            except NotReadyError as fault:  # the audit log: nothing is sealed before it is there
                self._wait_for_log(str(fault))
            self._next_key_try = time.monotonic() + _KEY_RETRY
        self._end_idle_pauses()
        if time.monotonic() - self._trimmed > _TRIM:
            self.jobs.trim()
            self._trimmed = time.monotonic()

    def _end_idle_pauses(self) -> None:
        # A success ends a pause. Where nothing waits there will be none, and a pause that is over
        # would be reported for ever.
        for key, pause in list(self._paused.items()):
            states = self.jobs.states(key)
            if pause.until <= time.monotonic() and not (states.keys() & {"queued", "taken"}):
                self._paused.pop(key, None)

    def rescan(self) -> None:
        """Scan every folder now."""
        for monitor in self._monitors.values():
            monitor.doubt("asked for")

    def oldest_beat(self) -> float:
        """Seconds since the thread that has been silent longest showed a sign of life."""
        beats = [m.last_beat() for m in self._monitors.values()]
        beats += [w.beat for w in self._threads()]
        return time.monotonic() - min(beats, default=time.monotonic())

    def _threads(self) -> list[_Worker]:
        return [*self._workers, *([self._finisher] if self._finisher else [])]

    def refuse_dead_threads(self) -> None:
        """Check that every thread runs that should.

        Raises:
            QueueError: the queue ended one.
            NotReadyError: one does not; nothing but a restart helps.
        """
        faults = [m.fault for m in self._monitors.values()] + [w.fault for w in self._threads()]
        for fault in filter(None, faults):
            raise fault
        threads = [*self._monitors.values(), *(w.thread for w in self._threads())]
        dead = [thread.name for thread in threads if not thread.is_alive()]
        if dead:
            raise NotReadyError(f"a thread of the service died: {', '.join(dead)}")

    def is_idle(self) -> bool:
        """Whether everything that is ready now is done."""
        idle = all(monitor.is_idle() for monitor in self._monitors.values())
        return idle and not self.jobs.due(self._workable())

    def report(self, *, running: bool) -> Report:
        """What there is to say about the service right now."""
        warnings = [self._provider.warning] if self._provider.warning else []
        return Report(
            running=running,
            pid=os.getpid(),
            written=time.time(),
            key=self._key_state,
            inspector=self.inspector.confinement,
            warnings=tuple(warnings),
            folders=tuple(self._folder_report(m) for m in self._monitors.values()),
            audit=self._audit.fault if self._audit else "",
        )

    def _folder_report(self, monitor: Monitor) -> FolderReport:
        sight = monitor.sight()
        pause = self._paused.get(monitor.key)
        health, reason = str(sight.health), sight.reason
        absent = self._absent.get(monitor.policy.vault)
        if self._keys is None:
            absent = self.waiting_for()
        if (pause or absent) and health in {"ok", "degraded"}:
            health, reason = "paused", absent or (pause.reason if pause else "")
        counters = self.jobs.counters(monitor.key)
        states = self.jobs.states(monitor.key)
        dwell = self.jobs.dwell(monitor.key)
        return FolderReport(
            path=str(monitor.key),
            health=health,
            reason=reason,
            mode=sight.mode,
            waiting=sight.waiting,
            unready=sight.unready,
            queued=sum(states.get(s, 0) for s in ("queued", "taken", "committed")),
            sealed=counters.get("sealed", 0),
            quarantined=states.get("quarantined", 0),
            left=states.get("left", 0),
            kept=states.get("kept", 0),
            undeletable=states.get("undeletable", 0),
            vanished=counters.get("vanished", 0),
            temporary=sight.temporary,
            passed=sight.passed,
            dwell_ms={"p50": dwell.p50, "p95": dwell.p95, "max": dwell.longest},
        )
