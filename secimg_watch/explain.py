"""Why one path is where it is: the answer of ``secimg-watch why``.

Everything is looked up anew, by the rules that the daemon goes by, so the answer is true whether
or not a daemon runs.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from secimg_watch import kernel
from secimg_watch.jobs import Row, State
from secimg_watch.monitor import has_sidecar, probe_lease, selection_of
from secimg_watch.quantities import format_duration
from secimg_watch.records import FolderKey, Identity, Proof
from secimg_watch.scan import Found, look
from secimg_watch.selection import Passed
from secimg_watch.settle import EMPTY_GRACE, Evidence, ProofRule, judge

if TYPE_CHECKING:
    from collections.abc import Callable

    from secimg_watch.jobs import Jobs
    from secimg_watch.policy import Folder, Policy
    from secimg_watch.records import ObjectId


class Verdict(StrEnum):
    """The answer in one word."""

    SEALED = "sealed"
    QUEUED = "queued"
    SETTLING = "settling"
    WAITING = "waiting"  # settled, but its proof is missing
    IGNORED = "ignored"
    LEFT = "left"
    KEPT = "kept"
    QUARANTINED = "quarantined"
    UNDELETABLE = "undeletable"
    OUTSIDE = "outside"
    ABSENT = "absent"


@dataclass(frozen=True, slots=True)
class Answer:
    """A verdict, its reason as a sentence, and the object if there is one."""

    verdict: Verdict
    reason: str
    object_id: str = ""


_RESTING = {
    State.LEFT: Verdict.LEFT,
    State.KEPT: Verdict.KEPT,
    State.QUARANTINED: Verdict.QUARANTINED,
    State.UNDELETABLE: Verdict.UNDELETABLE,
}


def explain(
    path: str, policy: Policy, jobs: Jobs | None, find_sealed: Callable[[str, str], ObjectId | None]
) -> Answer:
    """Say why ``path`` is where it is.

    Args:
        path: absolute, not resolved.
        policy: the policy in force.
        jobs: the queue, ``None`` where there is none yet.
        find_sealed: the newest object that was sealed from a folder under a relative path.
    """
    folder = _folder_of(path, policy)
    if folder is None:
        return Answer(Verdict.OUTSIDE, "it lies in no watched folder")
    base = folder.path if path.startswith(f"{folder.path}/") else os.path.realpath(folder.path)
    relpath = os.path.relpath(path, base)
    found = _look(folder, relpath)
    row = _row(jobs, folder, relpath, found.identity if found else None)
    if os.path.isdir(path) and not os.path.islink(path):
        return Answer(Verdict.IGNORED, str(Passed.DIRECTORY))
    if found is None:
        return _absent(folder, relpath, row, find_sealed)
    if row is not None:
        return _of_row(row)
    if found.passed is not None:
        return Answer(Verdict.IGNORED, str(found.passed))
    return _unqueued(folder, relpath, found.identity)


def _folder_of(path: str, policy: Policy) -> Folder | None:
    for folder in policy.folders:
        if path.startswith((f"{folder.path}/", f"{os.path.realpath(folder.path)}/")):
            return folder
    return None


def _look(folder: Folder, relpath: str) -> Found | None:
    try:
        root = os.open(os.path.realpath(folder.path), kernel.DIRECTORY)
    except OSError:
        return None
    try:
        return look(root, relpath, selection_of(folder))
    finally:
        os.close(root)


def _row(jobs: Jobs | None, folder: Folder, relpath: str, identity: Identity | None) -> Row | None:
    rows = jobs.rows(folder=FolderKey(str(folder.path))) if jobs else []
    for row in reversed(rows):
        if row.relpath == relpath and (identity is None or row.identity.same_content(identity)):
            return row
    return None


def _of_row(row: Row) -> Answer:
    if row.state in _RESTING:
        return Answer(_RESTING[row.state], row.reason, row.object_id)
    wait = row.not_before - time.time()
    if wait > 0:
        retry = f"{row.reason}; attempt {row.attempts + 1} in {format_duration(wait)}"
        return Answer(Verdict.QUEUED, retry, row.object_id)
    return Answer(Verdict.QUEUED, row.reason or "it is complete and in the queue", row.object_id)


def _absent(
    folder: Folder,
    relpath: str,
    row: Row | None,
    find_sealed: Callable[[str, str], ObjectId | None],
) -> Answer:
    if row is not None:
        return _of_row(row)
    object_id = find_sealed(str(folder.path), relpath)
    if object_id is None:
        return Answer(Verdict.ABSENT, "there is no such file, and none was sealed under that name")
    return Answer(Verdict.SEALED, f"it was sealed as object {object_id}", object_id)


def _unqueued(folder: Folder, relpath: str, identity: Identity) -> Answer:
    root = os.open(os.path.realpath(folder.path), kernel.DIRECTORY)
    try:
        lease = probe_lease(root, relpath)
        sidecar = has_sidecar(root, relpath, folder.sidecar)
    finally:
        os.close(root)
    quiet = time.time() - max(identity.mtime_ns, identity.ctime_ns) / 1e9
    evidence = Evidence(
        writer=lease is kernel.Lease.WRITER,
        leased=lease is kernel.Lease.GRANTED,
        renamed=False,
        sidecar=sidecar,
        quiet=quiet,
        remote=kernel.is_remote(kernel.file_system_type(folder.path)),
    )
    verdict = judge(ProofRule(folder.proof), folder.settle, evidence)
    if not isinstance(verdict, Proof):
        return Answer(Verdict.WAITING, str(verdict))
    if identity.size == 0:
        grace = format_duration(EMPTY_GRACE)
        return Answer(
            Verdict.SETTLING, f"it is empty; it is looked at once it stayed so for {grace}"
        )
    settle = format_duration(folder.settle)
    return Answer(Verdict.SETTLING, f"it is taken once it stayed unchanged for {settle}")
