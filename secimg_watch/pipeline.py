"""The whole way of one picture, from a queued job to verified deletion.

At any instant, and whenever the process dies, the picture exists whole: as plaintext under its
own name or in the staging directory until step (9), and from step (7) on as an object under its
final name that was read back in step (6). Each step may be repeated; a process that finds the
work of an earlier one goes on behind it, after verifying anew.

Steps (1) to (6) are a worker's, one picture at a time. Steps (7) to (10) take all pictures that
are verified by then together, so that one sync of a directory serves many.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeVar

from secimg_watch.audit import Event, timestamp
from secimg_watch.claim import claim, remove_marker, rename_claim, set_aside
from secimg_watch.disposition import Disposition, disposition, is_indifferent
from secimg_watch.erase import Erasure, erase
from secimg_watch.errors import (
    ChangedInHandError,
    DiskFullError,
    KeyMismatchError,
    NotAllowedError,
    NotReadyError,
    SecimgError,
    StorageError,
    TamperedError,
)
from secimg_watch.hold import hold, is_unchanged
from secimg_watch.jobs import State, back_off, new_object_id
from secimg_watch.records import Inspected, Label, Proof
from secimg_watch.sealing import seal
from secimg_watch.vault import Vault, commit
from secimg_watch.verify import verify

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from secimg_watch.audit import Audit
    from secimg_watch.inspector import Inspector
    from secimg_watch.jobs import Jobs
    from secimg_watch.policy import Folder
    from secimg_watch.records import (
        Claimed,
        Committed,
        Erased,
        FileKey,
        FolderKey,
        Held,
        Job,
        KeySet,
        ObjectId,
        Staged,
        Verified,
    )
    from secimg_watch.roots import Root

R = TypeVar("R")

log = logging.getLogger(__name__)

_OUT_OF_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_FORBIDDEN: Final = frozenset({errno.EACCES, errno.EPERM})
_SURROUNDINGS: Final = frozenset(
    {errno.EIO, errno.ESTALE, errno.EHOSTDOWN, errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT}
    | {errno.ENOTCONN, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EROFS}
)
_CHANGED_DELAY: Final = 1.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a folder's pictures come from and go to."""

    policy: Folder
    root: Root
    vault: Vault
    vault_id: bytes
    reconsider: Callable[[str], None]  # told of each path whose job was dropped


@dataclass(frozen=True, slots=True)
class Task:
    """A verified object on its way into the vault, and what still holds its plaintext."""

    verified: Verified
    place: Place
    hands: ExitStack

    @property
    def held(self) -> Held:
        """The file in hand."""
        return self.verified.staged.claimed.inspected.held

    @property
    def job(self) -> Job:
        """The job that it is done for."""
        return self.held.job


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Everything that processing needs besides the job and its place."""

    jobs: Jobs
    audit: Audit
    inspector: Inspector
    keys: KeySet
    from_device: bool
    max_attempts: int
    beat: Callable[[], None]
    file_keys: dict[ObjectId, FileKey] = field(default_factory=dict, repr=False)
    """In a write-only vault: of objects that were verified, and whose plaintext is not gone."""

    def process(self, job: Job, place: Place) -> Task | None:
        """Take one job up to its verified object; ``None`` where it ends before that.

        What became of a job that ends early is recorded.

        Raises:
            NotReadyError: the surroundings fail; the job waits, with no attempt burnt.
        """
        with ExitStack() as hands:
            held = None
            try:
                held = self._hold(job, place, hands)  # (1)
                verified = None if held is None else self._process_held(held, place, hands)
            except Exception as error:
                log.debug("object %s", job.object_id, exc_info=error)
                self._failed(job, place, held, error)
                return None
            return None if verified is None else Task(verified, place, hands.pop_all())

    def _hold(self, job: Job, place: Place, hands: ExitStack) -> Held | None:
        try:
            held = hold(job, place.root, hands)
        except FileNotFoundError:
            self._gone(job, place)
            return None
        if job.attempts > self.max_attempts:
            reason = f"given up: {job.attempts - 1} attempts ended with the whole process"
            self._quarantine(job, held, place, reason)
            return None
        return held

    def _process_held(self, held: Held, place: Place, hands: ExitStack) -> Verified | None:
        inspected = self._inspect(held, place.policy)  # (2)
        match disposition(place.policy, inspected.inspection):
            # One that was claimed before does not lie in the folder any more: it is sealed.
            case Disposition.LEAVE if not held.claimed:
                reason = f"{_describe(inspected)}; the policy leaves it in the folder"
                self._put_on_record("left", held.job, reason)
                self.jobs.rest(held.job, State.LEFT, reason)
            case Disposition.QUARANTINE:
                reason = f"{_describe(inspected)}; the policy sets it aside"
                self._quarantine(held.job, held, place, reason)
            case _:
                move = place.policy.after.action != "keep"
                claimed = claim(inspected, place.root, hands, move=move)  # (3)
                if held.job.proof is Proof.SIDECAR:
                    # It has served: left behind, it would vouch for the next file of that name.
                    remove_marker(place.root, held.job.relpath + place.policy.sidecar)
                return self._seal_and_verify(claimed, place)  # (4) to (6)
        return None

    def _inspect(self, held: Held, policy: Folder) -> Inspected:
        if is_indifferent(policy):
            return Inspected(held, self.inspector.name_only(held.fd))
        inspection = self.inspector.inspect(
            held.fd,
            size=held.identity.size,
            preview=policy.preview,
            decode=policy.undecodable != "encrypt",
        )
        return Inspected(held, inspection)

    def _seal_and_verify(self, claimed: Claimed, place: Place) -> Verified | None:
        file_key = self.file_keys.get(claimed.inspected.held.job.object_id)
        found = place.vault.find(claimed, file_key)
        if found is not None:
            return self._verify_found(found, place)
        sealed = seal(claimed, keys=self.keys, vault_id=place.vault_id, beat=self.beat)  # (4)
        staged = place.vault.stage(sealed)  # (5)
        try:
            return self._verify(staged, place)  # (6)
        except BaseException:
            place.vault.discard(staged.object_id)
            raise

    def _verify(self, staged: Staged, place: Place) -> Verified:
        return verify(
            staged,
            keys=self.keys,
            vault_id=place.vault_id,
            from_device=self.from_device,
            beat=self.beat,
        )

    def _verify_found(self, staged: Staged, place: Place) -> Verified | None:
        """Prove anew what an earlier process committed; ``None`` where that cannot be done.

        An object that does not open here, as in a write-only vault, or holds something else, may
        be the only copy of that: it stays, and the picture in hand is sealed under a new id.
        """
        try:
            return self._verify(staged, place)
        except (TamperedError, KeyMismatchError) as error:
            job = staged.claimed.inspected.held.job
            log.warning("object %s is there and proves nothing: %s", job.object_id, error)
            self.file_keys.pop(job.object_id, None)
            new_id = new_object_id()
            if not staged.claimed.in_place:
                rename_claim(place.root, job.object_id, new_id)
            self.jobs.rename(job, new_id, "sealed anew under another object id")
            return None

    def finish(self, tasks: Sequence[Task]) -> list[tuple[FolderKey, NotReadyError]]:
        """Commit verified objects and erase their plaintexts, many with one sync.

        Gives the folders whose surroundings failed, and how; their jobs wait.
        """
        faults: list[tuple[FolderKey, NotReadyError]] = []
        with ExitStack() as hands:
            for task in tasks:
                hands.push(task.hands)
                self._remember(task.verified.staged)
            committed = self._sort_out(tasks, commit([_vaulted(t) for t in tasks]), faults)  # (7)
            self._note_in_place(committed)
            on_record = self._attempt(_sealed, committed, faults, durable=True)  # (8)
            gone = erase([_erasure(task, done) for task, done in on_record])  # (9)
            erased = self._sort_out([task for task, _ in on_record], gone, faults)
            self._record(self._attempt(_erased, erased, faults, durable=False))  # (10)
        return faults

    def _attempt(
        self,
        event: Callable[[Task, R], Event],
        outcomes: list[tuple[Task, R]],
        faults: list[tuple[FolderKey, NotReadyError]],
        *,
        durable: bool,
    ) -> list[tuple[Task, R]]:
        """Put outcomes on record in the audit log, all or none; what is not goes no further."""
        try:
            self.audit.append([event(*each) for each in outcomes], durable=durable)
        except NotReadyError as fault:
            tasks = [task for task, _ in outcomes]
            return self._sort_out(tasks, [fault] * len(tasks), faults)
        return outcomes

    def _remember(self, staged: Staged) -> None:
        # Where the plaintext cannot be deleted now, the object is verified once more before that
        # is tried again; without its key it would be sealed anew, each time.
        if staged.file_key is not None and not self.keys.ring:
            self.file_keys[staged.object_id] = staged.file_key

    def _sort_out(
        self,
        tasks: Sequence[Task],
        outcomes: Sequence[R | Exception],
        faults: list[tuple[FolderKey, NotReadyError]],
    ) -> list[tuple[Task, R]]:
        """Keep what went well, and deal with what did not."""
        good = []
        for task, outcome in zip(tasks, outcomes, strict=True):
            if not isinstance(outcome, Exception):
                good.append((task, outcome))
                continue
            try:
                self._failed(task.job, task.place, task.held, outcome)
            except NotReadyError as fault:
                faults.append((task.job.folder, fault))
        return good

    def _note_in_place(self, committed: Sequence[tuple[Task, Committed]]) -> None:
        # A claimed file is found again by its directory; one in place is known by its row alone.
        for task, _ in committed:
            if task.verified.staged.claimed.in_place:
                self.jobs.committed(task.job)

    def _record(self, erased: Sequence[tuple[Task, Erased]]) -> None:
        gone = []
        for task, each in erased:
            job = task.job
            self.file_keys.pop(job.object_id, None)
            if each.refusal:
                reason = f"sealed, but the plaintext cannot be deleted: {each.refusal}"
                log.error("folder %s: object %s: %s", job.folder, job.object_id, reason)
                self.jobs.rest(job, State.UNDELETABLE, reason, sealed=True)
            elif task.place.policy.after.action == "keep":
                reason = "sealed; the policy keeps the plaintext"
                self.jobs.rest(job, State.KEPT, reason, sealed=True)
            else:
                gone.append((job, each.erased_ns))
            log.info("sealed object %s proof=%s", job.object_id, job.proof)
        self.jobs.done(gone)

    # -- what did not go through ---------------------------------------------------------------

    def _gone(self, job: Job, place: Place) -> None:
        # Either an earlier process died between deleting it and saying so (its object is there,
        # and was verified before the deletion), or somebody else took it away before we had it.
        if place.vault.has(job.object_id):
            self._put_on_record("gone", job, "sealed before, and the plaintext is not there")
            self.file_keys.pop(job.object_id, None)
            self.jobs.done([(job, None)])
        else:
            self._drop(job, place, "vanished")

    def _failed(self, job: Job, place: Place, held: Held | None, error: Exception) -> None:
        fault = _as_fault(error)
        if isinstance(fault, ChangedInHandError):
            self._changed(job, place, fault)
        elif isinstance(fault, NotReadyError):
            self.jobs.retry(job, str(fault), 0.0, burn=False)
            raise fault
        elif job.attempts >= self.max_attempts:
            reason = f"given up after {job.attempts} attempts: {fault}"
            try:
                self._quarantine(job, held, place, reason)
            except NotReadyError as unrecorded:
                self._failed(job, place, held, unrecorded)
        else:
            delay = back_off(job.attempts)
            log.warning("object %s: %s; again in %.0f s", job.object_id, fault, delay)
            self.jobs.retry(job, str(fault), delay)

    def _put_on_record(self, what: str, job: Job, reason: str) -> None:
        """Put on record what ends a job without its object.

        Raises:
            NotReadyError: that failed; the job is not at its end.
        """
        fields = {"object": job.object_id, "folder": job.folder, "reason": reason}
        self.audit.append([Event(what, fields)], durable=False)

    def _changed(self, job: Job, place: Place, fault: ChangedInHandError) -> None:
        # In the folder, a changed file settles anew as the arrival that it is. In the staging
        # directory it is known by this job alone; and one that was merely opened never changes.
        log.info("object %s: %s", job.object_id, fault)
        if place.root.has_staged(job.object_id) or is_unchanged(job, place.root):
            self.jobs.retry(job, str(fault), _CHANGED_DELAY, burn=False)
        else:
            self._drop(job, place, "changed")

    def _drop(self, job: Job, place: Place, counted_as: str) -> None:
        self.file_keys.pop(job.object_id, None)
        self.jobs.drop(job, counted_as)
        place.reconsider(job.relpath)  # only now: an arrival with a row would not be queued

    def _quarantine(self, job: Job, held: Held | None, place: Place, reason: str) -> None:
        self.file_keys.pop(job.object_id, None)
        self._put_on_record("quarantined", job, reason)
        moved = False
        with contextlib.suppress(OSError):
            moved = set_aside(job, held, place.root)
        where = "" if moved else "; it could not be moved and lies where it was"
        log.error(
            "folder %s: quarantined object %s: %s%s", job.folder, job.object_id, reason, where
        )
        self.jobs.rest(job, State.QUARANTINED, reason + where)


def _vaulted(task: Task) -> tuple[Vault, Verified]:
    return task.place.vault, task.verified


def _erasure(task: Task, committed: Committed) -> Erasure:
    after = task.place.policy.after
    keep = after.action == "keep"
    return Erasure(committed, task.place.root, keep=keep, move_to=after.directory)


def _sealed(task: Task, _committed: Committed) -> Event:
    job = task.job
    fields: dict[str, str | int] = {
        "object": job.object_id,
        "vault": task.place.vault_id.hex(),
        "folder": job.folder,
        "size": task.held.identity.size,
        "proof": job.proof,
        "seen": timestamp(job.first_seen_ns),
    }
    return Event("sealed", fields)


def _erased(task: Task, erased: Erased) -> Event:
    if erased.refusal:
        return Event("not deleted", {"object": task.job.object_id, "reason": erased.refusal})
    done = {"delete": "deleted", "keep": "kept", "move": "moved"}[task.place.policy.after.action]
    return Event(done, {"object": task.job.object_id, "at": timestamp(erased.erased_ns)})


def _as_fault(error: Exception) -> SecimgError:
    """The error of our own tree that tells what an error of the system means for a job."""
    if isinstance(error, SecimgError):
        return error
    if not isinstance(error, OSError):
        return StorageError(f"a defect: {type(error).__name__}")
    sentence = error.strerror or type(error).__name__
    if error.errno in _OUT_OF_SPACE:
        return DiskFullError(f"the file system is full: {sentence}")
    if error.errno in _SURROUNDINGS:
        return NotReadyError(f"the system does not answer as it should: {sentence}")
    if error.errno in _FORBIDDEN:
        return NotAllowedError(f"the system refuses: {sentence}")
    return StorageError(f"the system failed: {sentence}")


def _describe(inspected: Inspected) -> str:
    inspection = inspected.inspection
    detail = f" ({inspection.detail})" if inspection.detail else ""
    match inspection.label:
        case Label.IMAGE:
            return f"its format {inspection.format} is not among 'formats'{detail}"
        case Label.UNDECODABLE:
            return f"an image that does not decode{detail}"
        case Label.UNINSPECTED:
            return f"it could not be inspected{detail}"
        case Label.NOT_IMAGE:
            return f"not an image{detail}"
