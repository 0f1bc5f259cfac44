"""The whole way of one picture, from a queued job to verified deletion.

At any instant, and whenever the process dies, the picture exists whole: as plaintext under its
own name or in the staging directory until step (8), and from step (7) on as an object under its
final name that was read back in step (6). Each step may be repeated; a process that finds the
work of an earlier one goes on behind it, after verifying anew.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from secimg_watch.claim import claim, set_aside
from secimg_watch.disposition import Disposition, disposition
from secimg_watch.erase import erase, keep, move_away
from secimg_watch.errors import (
    ChangedInHandError,
    DiskFullError,
    EnvironmentFault,
    NotAllowedError,
    SecimgError,
    StorageError,
)
from secimg_watch.hold import hold
from secimg_watch.jobs import State, back_off
from secimg_watch.records import Inspected, Label
from secimg_watch.sealing import seal
from secimg_watch.verify import verify

if TYPE_CHECKING:
    from collections.abc import Callable

    from secimg_watch.inspector import Inspector
    from secimg_watch.jobs import Jobs
    from secimg_watch.policy import Folder
    from secimg_watch.records import Claimed, Committed, Erased, Held, Job, KeyEncryptionKey
    from secimg_watch.roots import Root
    from secimg_watch.vault import Vault

log = logging.getLogger(__name__)

_OUT_OF_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_FORBIDDEN: Final = frozenset({errno.EACCES, errno.EPERM})
_CANNOT_DELETE: Final = _FORBIDDEN | {errno.EROFS}
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


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Everything that processing needs besides the job and its place."""

    jobs: Jobs
    inspector: Inspector
    key: KeyEncryptionKey
    from_device: bool
    max_attempts: int
    beat: Callable[[], None]

    def process(self, job: Job, place: Place) -> None:
        """Take one job as far as it goes, and record how far that was.

        Raises:
            EnvironmentFault: the surroundings fail; the job waits, with no attempt burnt.
        """
        with ExitStack() as hands:
            try:
                held = hold(job, place.root, hands)  # (1)
            except FileNotFoundError:
                self._gone(job, place)
                return
            except (SecimgError, OSError) as error:
                self._failed(job, place, None, error)
                return
            try:
                self._process_held(held, place, hands)
            except Exception as error:  # noqa: BLE001 - nothing that one picture does ends a worker
                log.debug("object %s", job.object_id, exc_info=error)
                self._failed(job, place, held, error)

    def _process_held(self, held: Held, place: Place, hands: ExitStack) -> None:
        job = held.job
        inspected = self._inspect(held, place.policy)  # (2)
        match disposition(place.policy, inspected.inspection):
            case Disposition.LEAVE:
                reason = _describe(inspected)
                self.jobs.rest(job, State.LEFT, f"{reason}; the policy leaves it in the folder")
                return
            case Disposition.QUARANTINE:
                reason = f"{_describe(inspected)}; the policy sets it aside"
                self._quarantine(job, held, place, reason)
                return
            case Disposition.SEAL:
                pass
        move = place.policy.after.action != "keep"
        claimed = claim(inspected, place.root, hands, move=move)  # (3)
        committed = self._commit(claimed, place)  # (4) to (7)
        self.jobs.committed(job)
        self._finish(committed, place)  # (8)

    def _inspect(self, held: Held, policy: Folder) -> Inspected:
        inspection = self.inspector.inspect(
            held.fd,
            size=held.identity.size,
            preview=policy.preview,
            decode=policy.undecodable != "encrypt",
        )
        return Inspected(held, inspection)

    def _commit(self, claimed: Claimed, place: Place) -> Committed:
        vault = place.vault
        staged = vault.find(claimed)
        if staged is None:
            sealed = seal(claimed, key=self.key, vault_id=place.vault_id, beat=self.beat)  # (4)
            staged = vault.stage(sealed)  # (5)
        try:
            verified = verify(  # (6)
                staged,
                key=self.key,
                vault_id=place.vault_id,
                from_device=self.from_device,
                beat=self.beat,
            )
            return vault.commit(verified)  # (7)
        except BaseException:
            vault.discard(staged.object_id)
            raise

    def _finish(self, committed: Committed, place: Place) -> None:
        job = committed.verified.staged.claimed.inspected.held.job
        try:
            erased = self._erase(committed, place)
        except OSError as error:
            if error.errno not in _CANNOT_DELETE:
                raise
            reason = f"sealed, but the plaintext cannot be deleted: {error.strerror}"
            log.error("folder %s: object %s: %s", job.folder, job.object_id, reason)
            self.jobs.rest(job, State.UNDELETABLE, reason, sealed=True)
            return
        if place.policy.after.action == "keep":
            self.jobs.rest(job, State.KEPT, "sealed; the policy keeps the plaintext", sealed=True)
        else:
            self.jobs.done(job, committed.verified.staged.claimed.identity.size, erased.erased_ns)
        log.info("sealed object %s proof=%s", job.object_id, job.proof)

    def _erase(self, committed: Committed, place: Place) -> Erased:
        after = place.policy.after
        if after.action == "keep":
            return keep(committed)
        if after.directory is not None:
            return move_away(committed, place.root, after.directory)
        return erase(committed, place.root)

    # -- what did not go through ---------------------------------------------------------------

    def _gone(self, job: Job, place: Place) -> None:
        # Either an earlier process died between deleting it and saying so (its object is there,
        # and was verified before the deletion), or somebody else took it away before we had it.
        if place.vault.has(job.object_id):
            self.jobs.done(job, job.identity.size, job.first_seen_ns)
        else:
            self.jobs.drop(job, "vanished")

    def _failed(self, job: Job, place: Place, held: Held | None, error: Exception) -> None:
        fault = _as_fault(error)
        if isinstance(fault, ChangedInHandError):
            self._changed(job, place, fault)
        elif isinstance(fault, EnvironmentFault):
            self.jobs.retry(job, str(fault), 0.0, burn=False)
            raise fault
        elif job.attempts >= self.max_attempts:
            reason = f"given up after {job.attempts} attempts: {fault}"
            self._quarantine(job, held, place, reason)
        else:
            delay = back_off(job.attempts)
            log.warning("object %s: %s; again in %.0f s", job.object_id, fault, delay)
            self.jobs.retry(job, str(fault), delay)

    def _changed(self, job: Job, place: Place, fault: ChangedInHandError) -> None:
        # In the folder, the changed file settles anew as the arrival that it is. In the staging
        # directory it is known by this job alone.
        log.info("object %s: %s", job.object_id, fault)
        if place.root.has_staged(job.object_id):
            self.jobs.retry(job, str(fault), _CHANGED_DELAY, burn=False)
        else:
            self.jobs.drop(job, "changed")

    def _quarantine(self, job: Job, held: Held | None, place: Place, reason: str) -> None:
        moved = False
        with contextlib.suppress(OSError):
            moved = set_aside(job, held, place.root)
        where = "" if moved else "; it could not be moved and lies where it was"
        log.error("folder %s: quarantined object %s: %s%s", job.folder, job.object_id, reason, where)
        self.jobs.rest(job, State.QUARANTINED, reason + where)


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
        return EnvironmentFault(f"the system does not answer as it should: {sentence}")
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
