"""Whatever a crash or a fault leaves behind is resolved from disk; recovery deletes nothing."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

import pytest
from path_builders import (
    KEYS,
    PATIENCE,
    PICTURE,
    VAULT_ID,
    Desk,
    desk_in,
    new_id,
    only_on_linux,
    open_descriptors,
    tree,
    until,
)

from secimg_watch.audit import Audit
from secimg_watch.claim import set_aside, take_back
from secimg_watch.erase import erase
from secimg_watch.inspector import Inspector, Limits
from secimg_watch.jobs import Jobs, State
from secimg_watch.monitor import Monitor
from secimg_watch.pipeline import Pipeline, Place
from secimg_watch.policy import Folder
from secimg_watch.records import Arrival, Proof, Settled
from secimg_watch.recovery import recover_folder
from secimg_watch.roots import QUARANTINE_NAME, Root

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from secimg_watch.records import Job, ObjectId

    Step = Callable[[Desk, Job], None]

only_on_linux()
assert sys.platform == "linux"

RELPATH = "2026/11/a\udcff.jpg"


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with desk_in(tmp_path) as made:
        yield made


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    queue = Jobs(tmp_path / "queue.sqlite")
    yield queue
    queue.close()


class Service:
    """What a process does with a folder after it has started, without threads."""

    def __init__(self, desk: Desk, jobs: Jobs) -> None:
        # Nothing is shown and everything is sealed, so that no decoder has to run.
        policy = Folder.model_validate(
            {
                "path": str(desk.folder),
                "vault": "main",
                "not_image": "encrypt",
                "undecodable": "encrypt",
                "preview": 0,
            }
        )
        self.desk = desk
        self.jobs = jobs
        self.dropped: list[str] = []
        self.place = Place(policy, desk.root, desk.vault, VAULT_ID, reconsider=self.dropped.append)
        self.pipeline = Pipeline(
            jobs=jobs,
            audit=Audit(desk.folder.parent / "state", KEYS),
            inspector=Inspector(Limits()),
            keys=KEYS,
            from_device=True,
            max_attempts=3,
            beat=lambda: None,
        )

    def start(self) -> int:
        """Begin as a new process does; gives what was found claimed."""
        self.jobs.reclaim()
        self.desk.vault.discard_temporaries()
        return recover_folder(self.desk.key, self.desk.root, self.jobs)

    def work(self) -> None:
        """Do all that can be done now."""
        tasks = []
        while (job := self.jobs.take(lambda: [self.desk.key], 0.0)) is not None:
            task = self.pipeline.process(job, self.place)
            if task is not None:
                tasks.append(task)
        assert self.pipeline.finish(tasks) == []


@pytest.fixture
def service(desk: Desk, jobs: Jobs) -> Service:
    return Service(desk, jobs)


def known(desk: Desk, jobs: Jobs, relpath: str = RELPATH) -> Job:
    """Put a picture into the folder and its job into a worker's hands."""
    desk.drop(relpath)
    identity = desk.job(relpath).identity
    jobs.admit([Settled(Arrival(desk.key, relpath, identity, 1), Proof.LEASE)])
    job = jobs.take(lambda: [desk.key], 0.0)
    assert job is not None
    return job


def everything(desk: Desk) -> list[str]:
    """All files there are, in the folder, in staging and in the vault."""
    return [*tree(desk.folder), *tree(desk.vault.path / "tmp"), *desk.vault.object_ids()]


def assert_sealed(desk: Desk, jobs: Jobs, object_id: ObjectId) -> None:
    assert desk.vault.object_ids() == [object_id]
    assert desk.opened(object_id) == PICTURE
    assert desk.root.entries() == []
    assert list(desk.folder.rglob("*.jpg")) == []
    assert jobs.rows() == []
    assert jobs.counters(desk.key)["sealed"] == 1


# -- how far the process before had got --------------------------------------------------------


def queued(desk: Desk, job: Job) -> None:
    assert (desk.folder / job.relpath).exists()


def claimed(desk: Desk, job: Job) -> None:
    desk.claimed(job)


def half_written(desk: Desk, job: Job) -> None:
    path = desk.staged(job).path
    path.chmod(0o600)
    os.truncate(path, 10)


def staged(desk: Desk, job: Job) -> None:
    desk.staged(job)


def committed(desk: Desk, job: Job) -> None:
    desk.committed(job)


def committed_in_place(desk: Desk, job: Job) -> None:
    desk.committed(job, move=False)


def erased(desk: Desk, job: Job) -> None:
    [outcome] = erase([desk.erasure(desk.committed(job))])
    assert not isinstance(outcome, Exception)


STEPS = [queued, claimed, half_written, staged, committed, committed_in_place, erased]
CLAIMED = [claimed, half_written, staged, committed]


@pytest.mark.parametrize("step", STEPS)
def test_wherever_the_process_died_the_picture_ends_in_the_vault_once(
    desk: Desk, jobs: Jobs, service: Service, step: Step
) -> None:
    job = known(desk, jobs)
    step(desk, job)
    desk.let_go()
    assert service.start() == (1 if step in CLAIMED else 0)
    service.work()
    assert_sealed(desk, jobs, job.object_id)


@pytest.mark.parametrize("step", CLAIMED)
def test_the_same_without_the_database(
    desk: Desk, jobs: Jobs, service: Service, step: Step
) -> None:
    desk.drop(RELPATH)
    job = desk.job(RELPATH)
    step(desk, job)
    desk.let_go()
    assert service.start() == 1
    [row] = jobs.rows()
    assert (row.object_id, row.relpath, row.state) == (job.object_id, RELPATH, State.QUEUED)
    service.work()
    assert_sealed(desk, jobs, job.object_id)


@pytest.mark.parametrize("step", STEPS)
def test_recovering_twice_or_thrice_changes_nothing(
    desk: Desk, jobs: Jobs, service: Service, step: Step
) -> None:
    job = known(desk, jobs)
    step(desk, job)
    desk.let_go()
    first = service.start()
    rows, files = jobs.rows(), everything(desk)
    for _ in range(2):
        assert service.start() == first
        assert (jobs.rows(), everything(desk)) == (rows, files)
    service.work()
    assert_sealed(desk, jobs, job.object_id)


@pytest.mark.parametrize("step", STEPS)
def test_recovery_itself_deletes_and_seals_nothing(desk: Desk, jobs: Jobs, step: Step) -> None:
    step(desk, known(desk, jobs))
    desk.let_go()
    before = everything(desk)
    recover_folder(desk.key, desk.root, jobs)
    assert everything(desk) == before


def test_many_claimed_files_are_all_taken_up(desk: Desk, jobs: Jobs, service: Service) -> None:
    for number in range(20):
        desk.drop(f"{number}.jpg", b"%d" % number)
        CLAIMED[number % 4](desk, desk.job(f"{number}.jpg"))
    desk.let_go()
    assert service.start() == 20
    service.work()
    contents = {desk.opened(object_id) for object_id in desk.vault.object_ids()}
    assert contents == {b"%d" % number for number in range(20)}
    assert desk.root.entries() == []


# -- objects that are not what they should be --------------------------------------------------


def test_a_committed_object_that_was_damaged_does_not_cost_the_plaintext(
    desk: Desk, jobs: Jobs, service: Service
) -> None:
    job = known(desk, jobs)
    path = desk.committed(job).path
    desk.let_go()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)
    service.start()
    service.work()
    assert path.read_bytes() == data
    assert not desk.staged_path(job).exists()
    [other] = set(desk.vault.object_ids()) - {job.object_id}
    assert desk.opened(other) == PICTURE
    assert jobs.rows() == []


def test_a_committed_object_of_other_bytes_does_not_cost_the_plaintext(
    desk: Desk, jobs: Jobs, service: Service
) -> None:
    job = known(desk, jobs)
    desk.committed(job)
    desk.let_go()
    desk.staged_path(job).write_bytes(b"another picture")
    service.start()
    service.work()
    assert desk.opened(job.object_id) == PICTURE
    [other] = set(desk.vault.object_ids()) - {job.object_id}
    assert desk.opened(other) == b"another picture"


# -- what is gone ------------------------------------------------------------------------------


def test_a_file_that_was_deleted_with_its_object_in_the_vault_counts_as_sealed(
    desk: Desk, jobs: Jobs, service: Service
) -> None:
    job = known(desk, jobs)
    erased(desk, job)
    desk.let_go()
    service.start()
    service.work()
    assert jobs.counters(desk.key)["sealed"] == 1
    assert "vanished" not in jobs.counters(desk.key)


def test_a_file_that_is_gone_without_an_object_counts_as_vanished(
    desk: Desk, jobs: Jobs, service: Service
) -> None:
    job = known(desk, jobs)
    (desk.folder / job.relpath).unlink()
    service.start()
    service.work()
    assert jobs.counters(desk.key) == {"vanished": 1}
    assert jobs.rows() == []


# -- the staging directory ---------------------------------------------------------------------


def test_an_empty_staging_directory_holds_nothing(desk: Desk, jobs: Jobs) -> None:
    assert recover_folder(desk.key, desk.root, jobs) == 0
    assert jobs.rows() == []


@pytest.mark.parametrize("below", ["", "2026", "2026/11"])
def test_directories_of_a_claim_without_a_file_are_removed(
    desk: Desk, jobs: Jobs, below: str
) -> None:
    (desk.root.staging_path / new_id() / below).mkdir(parents=True)
    assert recover_folder(desk.key, desk.root, jobs) == 0
    assert desk.root.entries() == []
    assert jobs.rows() == []


def test_what_is_no_claim_of_ours_is_left_alone(desk: Desk, jobs: Jobs) -> None:
    for name in ("notes", "0123"):
        (desk.root.staging_path / name).mkdir()
        (desk.root.staging_path / name / "b.jpg").write_bytes(b"a stranger")
    assert recover_folder(desk.key, desk.root, jobs) == 0
    assert sorted(desk.root.entries()) == ["0123", "notes"]


def test_a_file_and_a_link_with_the_names_of_claims_hold_up_nothing(
    desk: Desk, jobs: Jobs, tmp_path: Path
) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private/secret.jpg").write_bytes(b"secret")
    (desk.root.staging_path / new_id()).write_bytes(b"a stranger")
    (desk.root.staging_path / new_id()).symlink_to(tmp_path / "private")
    desk.drop()
    job = desk.job()
    desk.claimed(job)
    desk.let_go()
    assert recover_folder(desk.key, desk.root, jobs) == 1
    assert [row.object_id for row in jobs.rows()] == [job.object_id]


def test_without_a_staging_directory_there_is_nothing_to_recover(
    tmp_path: Path, jobs: Jobs
) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / ".secimg-watch").symlink_to(tmp_path)
    root = Root(folder, None)
    assert root.staging is None
    assert recover_folder(Desk(tmp_path).key, root, jobs) == 0


def test_nothing_stays_open(desk: Desk, jobs: Jobs) -> None:
    for number in range(3):
        desk.drop(f"s/{number}.jpg")
        desk.claimed(desk.job(f"s/{number}.jpg"))
    (desk.root.staging_path / new_id() / "empty").mkdir(parents=True)
    desk.let_go()
    recover_folder(desk.key, desk.root, jobs)
    before = open_descriptors()
    recover_folder(desk.key, desk.root, jobs)
    assert open_descriptors() <= before


# -- quarantine --------------------------------------------------------------------------------


def quarantined(desk: Desk) -> Job:
    desk.drop(RELPATH)
    held = desk.held(desk.job(RELPATH))
    assert set_aside(held.job, held, desk.root)
    desk.let_go()
    return held.job


def test_a_quarantined_file_is_listed_again_and_stays_where_it_is(
    desk: Desk, jobs: Jobs, service: Service
) -> None:
    job = quarantined(desk)
    before = everything(desk)
    for _ in range(2):
        assert service.start() == 0
        [row] = jobs.rows()
        assert (row.object_id, row.relpath) == (job.object_id, RELPATH)
        assert (row.state, row.reason) == (State.QUARANTINED, "found in quarantine")
    service.work()
    assert everything(desk) == before


def test_a_quarantined_file_keeps_the_reason_that_is_known(desk: Desk, jobs: Jobs) -> None:
    job = known(desk, jobs)
    held = desk.held(job)
    assert set_aside(job, held, desk.root)
    jobs.rest(job, State.QUARANTINED, "given up after 5 attempts")
    recover_folder(desk.key, desk.root, jobs)
    assert [row.reason for row in jobs.rows()] == ["given up after 5 attempts"]


def test_a_file_that_is_taken_back_from_quarantine_is_sealed(
    desk: Desk, jobs: Jobs, service: Service
) -> None:
    job = quarantined(desk)
    service.start()
    assert desk.root.staging is not None
    assert take_back(job.object_id, desk.root.staging)
    assert service.start() == 1
    service.work()
    assert desk.opened(job.object_id) == PICTURE
    assert desk.root.entries() == [QUARANTINE_NAME]
    assert jobs.rows() == []


# -- a folder that comes back while the process runs -------------------------------------------


@pytest.mark.parametrize("step", CLAIMED)
def test_a_file_that_a_worker_has_in_hand_is_not_given_to_a_second_one(
    desk: Desk, jobs: Jobs, step: Step
) -> None:
    job = known(desk, jobs)
    step(desk, job)
    recover_folder(desk.key, Root(desk.folder, None), jobs)
    assert jobs.take(lambda: [desk.key], 0.0) is None
    desk.let_go()


# -- a file that a worker let go of ------------------------------------------------------------


@pytest.fixture
def monitor(desk: Desk, jobs: Jobs) -> Iterator[Monitor]:
    """Give a thread that polls the folder, and queues what it finds at once."""
    keys = {"watch": "poll", "poll": "100ms", "rescan": "1s", "settle": "0s"}
    policy = Folder.model_validate({"path": str(desk.folder), "vault": "main", **keys})
    watching = Monitor(policy, jobs, None, attach=lambda _: None, log_names=False)
    watching.start()
    yield watching
    watching.stop()
    watching.join(PATIENCE)


def next_job(desk: Desk, jobs: Jobs) -> Job:
    end = time.monotonic() + PATIENCE / 4
    while time.monotonic() < end:
        job = jobs.take(lambda: [desk.key], 0.05)
        if job is not None:
            return job
    raise AssertionError("the picture lies in clear, and nobody will ever take it")


def test_a_file_that_somebody_opened_for_writing_and_left_alone_is_taken_later(
    desk: Desk, jobs: Jobs, service: Service, monitor: Monitor
) -> None:
    path = desk.drop()
    job = next_job(desk, jobs)
    with path.open("r+b"):
        assert service.pipeline.process(job, service.place) is None
    again = next_job(desk, jobs)
    assert service.pipeline.process(again, service.place) is not None


def test_a_file_whose_rights_changed_while_it_was_queued_is_taken_later(
    desk: Desk, jobs: Jobs, service: Service, monitor: Monitor
) -> None:
    path = desk.drop()
    until(lambda: jobs.pending() == 1, "the file is queued")
    path.chmod(0o600 if path.stat().st_mode & 0o777 != 0o600 else 0o640)
    scanned = monitor.last_beat()
    until(lambda: monitor.last_beat() > scanned + 0.5, "a scan has seen the change")
    job = next_job(desk, jobs)
    if service.pipeline.process(job, service.place) is None:
        assert service.pipeline.process(next_job(desk, jobs), service.place) is not None
