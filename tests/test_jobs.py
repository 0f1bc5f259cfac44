"""The queue: what is admitted, taken, given back and forgotten, in a real database."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import sqlite3
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest
from path_builders import (
    PATIENCE,
    can_mount,
    mounted_tmpfs,
    new_id,
    ordinary_folder,
    without_privileges,
)

from secimg_watch.errors import QueueError, StorageError
from secimg_watch.jobs import Dwell, Jobs, State, back_off
from secimg_watch.records import Arrival, FolderKey, Identity, Job, Proof, Settled

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FOLDER = FolderKey("/srv/scans")
OTHER = FolderKey("/srv/camera")
SECOND = 1_000_000_000
FILE = Identity(dev=1, ino=10, size=100, mtime_ns=5, ctime_ns=5)
_numbers = itertools.count(1)

TAKE_ALL = """
import sys
from pathlib import Path
from secimg_watch.jobs import Jobs
jobs = Jobs(Path(sys.argv[1]))
sys.stdin.readline()
while (job := jobs.take(lambda: [sys.argv[2]], 0.0)) is not None:
    print(job.object_id, flush=True)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "queue.sqlite"


@pytest.fixture
def jobs(path: Path) -> Iterator[Jobs]:
    queue = Jobs(path)
    yield queue
    queue.close()


def settled(
    relpath: str = "a.jpg",
    identity: Identity | None = None,
    *,
    folder: FolderKey = FOLDER,
    seen: int | None = None,
) -> Settled:
    number = next(_numbers)
    chosen = identity or dataclasses.replace(FILE, ino=number)
    arrival = Arrival(folder, relpath, chosen, number if seen is None else seen)
    return Settled(arrival, Proof.LEASE)


def take(jobs: Jobs, *folders: FolderKey) -> Job | None:
    return jobs.take(lambda: folders or (FOLDER,), 0.0)


def taken(jobs: Jobs, *folders: FolderKey) -> Job:
    job = take(jobs, *folders)
    assert job is not None
    return job


def admitted(jobs: Jobs, relpath: str = "a.jpg") -> Job:
    """Queue one file and take it."""
    jobs.admit([settled(relpath)])
    return taken(jobs)


# -- in ----------------------------------------------------------------------------------------


def test_a_job_says_all_that_is_known_of_its_file(jobs: Jobs) -> None:
    arrival = Arrival(FOLDER, "sub/no\udcffutf8\n.jpg", FILE, 42)
    assert jobs.admit([Settled(arrival, Proof.SIDECAR)]) == 1
    job = taken(jobs)
    assert (job.folder, job.relpath, job.identity) == (FOLDER, arrival.relpath, FILE)
    assert (job.proof, job.attempts, job.first_seen_ns) == (Proof.SIDECAR, 1, 42)


def test_device_and_inode_numbers_use_all_64_bits(jobs: Jobs) -> None:
    huge = Identity((1 << 64) - 1, (1 << 63) + 5, 1 << 62, -5, (1 << 62) + 1)
    jobs.admit([settled(identity=huge)])
    assert jobs.rows()[0].identity == huge
    assert taken(jobs).identity == huge


def test_a_file_that_is_queued_already_is_not_queued_again(jobs: Jobs) -> None:
    assert jobs.admit([settled(identity=FILE), settled(identity=FILE)]) == 1
    assert jobs.admit([settled(identity=FILE)]) == 0
    taken(jobs)
    assert jobs.admit([settled(identity=FILE)]) == 0
    assert jobs.pending() == 1


@pytest.mark.parametrize("changed", ["dev", "ino", "size", "mtime_ns"])
def test_another_file_or_other_content_under_the_name_is_another_job(
    jobs: Jobs, changed: str
) -> None:
    jobs.admit([settled(identity=FILE)])
    assert jobs.admit([settled(identity=dataclasses.replace(FILE, **{changed: 77}))]) == 1


def test_a_file_whose_rights_changed_while_it_waited_is_known_as_it_is_now(jobs: Jobs) -> None:
    jobs.admit([settled(identity=FILE)])
    later = dataclasses.replace(FILE, ctime_ns=6)
    jobs.admit([settled(identity=later)])
    assert taken(jobs).identity == later
    assert jobs.pending() == 1


def test_every_job_has_an_id_of_its_own(jobs: Jobs) -> None:
    jobs.admit([settled() for _ in range(50)])
    ids = {row.object_id for row in jobs.rows()}
    assert len(ids) == 50
    assert all(len(object_id) == 32 for object_id in ids)


def test_admitting_nothing_is_harmless(jobs: Jobs) -> None:
    assert jobs.admit([]) == 0


def test_a_batch_that_fails_half_way_is_not_queued_at_all(jobs: Jobs) -> None:
    unfit = settled(identity=dataclasses.replace(FILE, size=1 << 70))
    with pytest.raises(OverflowError):
        jobs.admit([settled(), unfit])
    assert jobs.admit([settled()]) == 1
    assert jobs.pending() == 1


@pytest.mark.skipif(not can_mount(), reason="mounting takes root's privileges")
def test_a_queue_whose_disk_was_full_goes_on_when_there_is_space_again(tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path, "256k"):
        jobs = Jobs(tmp_path / "queue.sqlite")
        jobs.admit([settled("first.jpg")])
        ballast = tmp_path / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        many = [settled("x" * 200 + str(n)) for n in range(500)]
        with pytest.raises(QueueError):
            jobs.admit(many)
        ballast.unlink()
        assert jobs.pending() == 1
        assert jobs.admit([settled("second.jpg")]) == 1
        assert [taken(jobs).relpath for _ in range(2)] == ["first.jpg", "second.jpg"]
        jobs.close()


# -- out ---------------------------------------------------------------------------------------


def test_the_oldest_file_is_taken_first(jobs: Jobs) -> None:
    for seen in (30, 10, 20):
        jobs.admit([settled(f"{seen}.jpg", seen=seen)])
    assert [taken(jobs).relpath for _ in range(3)] == ["10.jpg", "20.jpg", "30.jpg"]
    assert take(jobs) is None


def test_only_the_folders_that_may_be_worked_on_are_taken_from(jobs: Jobs) -> None:
    jobs.admit([settled(folder=OTHER), settled(folder=FOLDER)])
    assert taken(jobs, FOLDER).folder == FOLDER
    assert take(jobs, FOLDER) is None
    assert jobs.take(tuple, 0.0) is None
    assert taken(jobs, FOLDER, OTHER).folder == OTHER


def test_an_attempt_is_counted_before_the_work_starts(jobs: Jobs, path: Path) -> None:
    job = admitted(jobs)
    with sqlite3.connect(path) as other:
        assert other.execute("SELECT state, attempts FROM job").fetchone() == ("taken", 1)
    other.close()
    jobs.retry(job, "failed", 0.0)
    assert taken(jobs).attempts == 2


def test_a_picture_that_kills_the_process_every_time_is_counted(path: Path) -> None:
    first = Jobs(path)
    first.admit([settled()])
    first.close()
    for attempt in (1, 2, 3):
        jobs = Jobs(path)
        jobs.reclaim()
        assert taken(jobs).attempts == attempt
        jobs.close()


def test_taking_waits_until_there_is_something(jobs: Jobs) -> None:
    found: list[Job | None] = []
    waiting = threading.Thread(target=lambda: found.append(jobs.take(lambda: [FOLDER], PATIENCE)))
    waiting.start()
    jobs.admit([settled()])
    waiting.join(PATIENCE)
    assert len(found) == 1
    assert found[0] is not None


def test_taking_gives_up_in_the_end(jobs: Jobs) -> None:
    assert jobs.take(lambda: [FOLDER], 0.01) is None


def test_nobody_waits_any_more_after_the_release(jobs: Jobs) -> None:
    found: list[Job | None] = []
    waiting = [
        threading.Thread(target=lambda: found.append(jobs.take(lambda: [FOLDER], 3600.0)))
        for _ in range(3)
    ]
    for thread in waiting:
        thread.start()
    jobs.release()
    for thread in waiting:
        thread.join(PATIENCE)
    assert found == [None, None, None]


def test_two_threads_never_take_the_same_job(jobs: Jobs) -> None:
    jobs.admit([settled(f"{n}.jpg") for n in range(200)])
    hauls: list[list[str]] = [[], [], []]

    def work(haul: list[str]) -> None:
        while (job := take(jobs)) is not None:
            haul.append(job.object_id)

    threads = [threading.Thread(target=work, args=(haul,)) for haul in hauls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    together = [object_id for haul in hauls for object_id in haul]
    assert len(together) == len(set(together)) == 200


def test_two_processes_never_take_the_same_job(jobs: Jobs, path: Path) -> None:
    jobs.admit([settled(f"{n}.jpg") for n in range(300)])
    command = [sys.executable, "-c", TAKE_ALL, str(path), FOLDER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdin.write("go\n")
        other.stdin.flush()
        theirs = [other.stdout.readline().strip()]
        ours = []
        while (job := take(jobs)) is not None:
            ours.append(job.object_id)
        theirs += other.stdout.read().split()
    assert other.returncode == 0
    assert theirs[0]
    assert len(ours) + len(theirs) == len({*ours, *theirs}) == 300


# -- again -------------------------------------------------------------------------------------


def test_pauses_double_from_two_seconds_to_an_hour_with_a_quarter_of_jitter() -> None:
    for attempts in range(1, 101):
        middle = min(2.0 * 2 ** (attempts - 1), 3600.0)
        for _ in range(20):
            assert 0.75 * middle <= back_off(attempts) <= 1.25 * middle
    assert len({back_off(3) for _ in range(20)}) > 1, "no two folders in step"


def test_a_job_that_is_to_wait_is_not_taken_before_its_time(jobs: Jobs) -> None:
    jobs.retry(admitted(jobs), "failed", 2.0)
    assert take(jobs) is None
    assert jobs.due([FOLDER]) == 0
    assert jobs.pending() == 1
    [row] = jobs.rows()
    assert (row.state, row.reason, row.attempts) == (State.QUEUED, "failed", 1)
    assert row.not_before > time.time() + 1


def test_a_clock_that_was_set_back_holds_no_job_up_for_longer_than_its_pause(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = admitted(jobs)
    jobs.retry(job, "failed", back_off(job.attempts))
    assert take(jobs) is None
    yesterday = time.time() - 86_400
    monkeypatch.setattr(time, "time", lambda: yesterday)
    assert taken(jobs).object_id == job.object_id


def test_a_fault_of_the_surroundings_burns_no_attempt(jobs: Jobs) -> None:
    jobs.admit([settled()])
    for _ in range(5):
        job = taken(jobs)
        assert job.attempts == 1
        jobs.retry(job, "the disk is full", 0.0, burn=False)


def test_what_was_in_hand_when_the_process_died_is_queued_again(path: Path) -> None:
    first = Jobs(path)
    first.admit([settled("queued.jpg", seen=3), settled("t.jpg", seen=1), settled("c.jpg", seen=2)])
    taken(first)
    first.committed(taken(first))
    first.close()
    second = Jobs(path)
    assert take(second) is not None, "only what was queued is there to take"
    assert take(second) is None
    second.reclaim()
    assert {taken(second).relpath for _ in range(3)} == {"queued.jpg", "t.jpg", "c.jpg"}
    second.close()


@pytest.mark.parametrize("state", [State.QUARANTINED, State.LEFT, State.KEPT, State.UNDELETABLE])
def test_a_resting_job_is_not_taken_nor_reclaimed(jobs: Jobs, state: State) -> None:
    jobs.rest(admitted(jobs), state, "because")
    jobs.reclaim()
    assert take(jobs) is None
    assert jobs.pending() == 0
    assert jobs.states(FOLDER) == {str(state): 1}
    [row] = jobs.rows(folder=FOLDER, state=state)
    assert (row.state, row.reason) == (state, "because")


@pytest.mark.parametrize("state", [State.QUARANTINED, State.LEFT, State.UNDELETABLE])
def test_a_resting_job_gets_a_fresh_start_when_asked_for(jobs: Jobs, state: State) -> None:
    job = admitted(jobs)
    jobs.rest(job, state, "because")
    assert jobs.requeue(job.object_id)
    again = taken(jobs)
    assert (again.object_id, again.attempts) == (job.object_id, 1)


def test_a_waiting_job_goes_on_at_once_when_asked_for(jobs: Jobs) -> None:
    job = admitted(jobs)
    jobs.retry(job, "failed", 3600.0)
    assert jobs.requeue(job.object_id)
    assert taken(jobs).object_id == job.object_id


def test_a_job_that_is_in_hand_done_or_unknown_gets_no_fresh_start(jobs: Jobs) -> None:
    job = admitted(jobs)
    assert not jobs.requeue(job.object_id)
    jobs.rest(job, State.KEPT, "sealed; the policy keeps the plaintext", sealed=True)
    assert not jobs.requeue(job.object_id)
    assert not jobs.requeue(new_id())
    assert take(jobs) is None


def test_resting_jobs_are_forgotten_with_their_files_and_others_are_not(jobs: Jobs) -> None:
    for state in (State.LEFT, State.KEPT, State.UNDELETABLE, State.QUARANTINED):
        jobs.rest(admitted(jobs, f"{state}.jpg"), state, "")
    stays = admitted(jobs, "stays\udcff.jpg")
    jobs.rest(stays, State.LEFT, "")
    jobs.admit([settled("queued.jpg")])
    jobs.admit([settled("left.jpg", folder=OTHER)])
    jobs.forget_vanished(FOLDER, {"stays\udcff.jpg": stays.identity})
    left = {row.relpath for row in jobs.rows(folder=FOLDER)}
    assert left == {"quarantined.jpg", "stays\udcff.jpg", "queued.jpg"}
    assert len(jobs.rows(folder=OTHER)) == 1


def test_a_resting_job_is_forgotten_when_its_name_was_given_to_another_file(jobs: Jobs) -> None:
    replaced, touched = admitted(jobs, "replaced.jpg"), admitted(jobs, "touched.jpg")
    for job in (replaced, touched):
        jobs.rest(job, State.KEPT, "sealed; the policy keeps the plaintext", sealed=True)
    another = dataclasses.replace(replaced.identity, ino=replaced.identity.ino + 1)
    other_rights = dataclasses.replace(touched.identity, ctime_ns=touched.identity.ctime_ns + 1)
    jobs.forget_vanished(FOLDER, {"replaced.jpg": another, "touched.jpg": other_rights})
    assert [row.relpath for row in jobs.rows()] == ["touched.jpg"]


def test_a_job_that_is_dropped_is_counted_and_may_come_again(jobs: Jobs) -> None:
    jobs.admit([settled(identity=FILE)])
    jobs.drop(taken(jobs), "changed")
    assert jobs.rows() == []
    assert jobs.counters(FOLDER) == {"changed": 1}
    assert jobs.admit([settled(identity=FILE)]) == 1


# -- found on disk -----------------------------------------------------------------------------


def found(relpath: str = "a.jpg") -> Job:
    return Job(new_id(), FOLDER, relpath, FILE, Proof.RECOVERED, 0, 7)


def test_a_file_whose_row_was_lost_gets_its_job_back_under_its_id(jobs: Jobs) -> None:
    lost = found("sub/a\udcff.jpg")
    jobs.adopt(lost, State.QUEUED)
    assert taken(jobs) == dataclasses.replace(lost, attempts=1)


def test_a_file_whose_row_is_there_keeps_what_is_known_of_it(jobs: Jobs) -> None:
    job = admitted(jobs)
    jobs.retry(job, "failed", 0.0)
    jobs.adopt(dataclasses.replace(found(), object_id=job.object_id), State.QUEUED)
    again = taken(jobs)
    assert (again.proof, again.attempts) == (Proof.LEASE, 2)


def test_a_row_of_the_same_file_under_another_id_is_out_of_date(jobs: Jobs) -> None:
    jobs.admit([settled(identity=FILE)])
    claimed = found()
    jobs.adopt(claimed, State.QUEUED)
    assert [row.object_id for row in jobs.rows()] == [claimed.object_id]


def test_a_job_that_a_worker_has_in_hand_is_not_given_to_another(jobs: Jobs) -> None:
    job = admitted(jobs)
    jobs.adopt(job, State.QUEUED)
    assert take(jobs) is None
    jobs.committed(job)
    jobs.adopt(job, State.QUEUED)
    assert take(jobs) is None


def test_a_quarantined_file_is_listed_and_not_taken(jobs: Jobs) -> None:
    jobs.adopt(found(), State.QUARANTINED, "found in quarantine")
    assert take(jobs) is None
    assert [row.reason for row in jobs.rows(state=State.QUARANTINED)] == ["found in quarantine"]


# -- names -------------------------------------------------------------------------------------


def bytes_on_disk(path: Path) -> bytes:
    files = [each for each in path.parent.iterdir() if each.name.startswith(path.name)]
    assert path in files
    return b"".join(each.read_bytes() for each in files)


def test_a_sealed_files_name_is_nowhere_in_the_database(jobs: Jobs, path: Path) -> None:
    secret = "passport of somebody"
    relpaths = [f"{n:04}/{secret} {n}.jpg" for n in range(400)]
    relpaths.append("/".join([secret * 10] * 18))
    jobs.admit([settled(relpath) for relpath in relpaths])
    assert secret.encode() in bytes_on_disk(path)
    finished = []
    while (job := take(jobs)) is not None:
        finished.append((job, job.first_seen_ns + SECOND))
    jobs.done(finished)
    jobs.trim()
    assert secret.encode() not in bytes_on_disk(path)


def test_only_the_names_of_files_that_are_still_there_are_in_the_database(
    jobs: Jobs, path: Path
) -> None:
    for batch in range(20):
        names = [f"batch{batch:02} {'x' * (7 * n % 90)} {n:03}.jpg" for n in range(60)]
        jobs.admit([settled(name) for name in names])
        kept = taken(jobs)
        jobs.retry(kept, "later", 2.0)
        # What waits is taken last.
        others = [taken(jobs) for _ in names[1:]]
        finished = [(job, job.first_seen_ns + SECOND) for job in others]
        jobs.done(finished)
        jobs.trim()
        data = bytes_on_disk(path)
        gone = [job.relpath for job, _ in finished if job.relpath.encode() in data]
        assert gone == []
        assert kept.relpath.encode() in data


def test_only_the_owner_may_read_the_database(jobs: Jobs, path: Path) -> None:
    jobs.admit([settled()])
    for each in path.parent.iterdir():
        if each.name.startswith(path.name) and sys.platform != "win32":
            assert each.stat().st_mode & 0o077 == 0, each.name


def test_closing_leaves_no_log_behind(path: Path) -> None:
    jobs = Jobs(path)
    jobs.admit([settled()])
    jobs.close()
    assert [each.name for each in path.parent.iterdir()] == [path.name]


# -- numbers -----------------------------------------------------------------------------------


def test_counters_add_up_for_each_folder(jobs: Jobs) -> None:
    jobs.count(FOLDER, "vanished")
    jobs.count(FOLDER, "vanished", 2)
    jobs.count(OTHER, "vanished")
    assert jobs.counters(FOLDER) == {"vanished": 3}
    assert jobs.counters(OTHER) == {"vanished": 1}
    assert jobs.counters(FolderKey("/nowhere")) == {}


def test_a_finished_job_is_counted_once_with_its_bytes(jobs: Jobs) -> None:
    job = admitted(jobs)
    jobs.done([(job, job.first_seen_ns + SECOND)])
    assert jobs.counters(FOLDER) == {"sealed": 1, "bytes": 100}
    assert jobs.sealed_total() == 1
    assert jobs.rows() == []
    jobs.done([])
    assert jobs.sealed_total() == 1


def test_a_picture_whose_deletion_succeeds_later_is_counted_once(jobs: Jobs) -> None:
    job = admitted(jobs)
    jobs.rest(job, State.UNDELETABLE, "read-only", sealed=True)
    assert jobs.sealed_total() == 1
    jobs.requeue(job.object_id)
    jobs.done([(taken(jobs), job.first_seen_ns + SECOND)])
    assert jobs.counters(FOLDER) == {"sealed": 1, "bytes": 100}
    assert jobs.dwell(FOLDER).longest == 1000


def test_plaintext_that_is_still_there_has_no_dwell_time(jobs: Jobs) -> None:
    jobs.rest(admitted(jobs, "a"), State.UNDELETABLE, "read-only", sealed=True)
    jobs.rest(admitted(jobs, "b"), State.KEPT, "kept", sealed=True)
    assert jobs.sealed_total() == 2
    assert jobs.dwell(FOLDER).sample == 0


def test_dwell_times_are_what_was_counted(jobs: Jobs) -> None:
    for milliseconds in range(100, 0, -1):
        job = admitted(jobs)
        jobs.done([(job, job.first_seen_ns + milliseconds * 1_000_000)])
    assert jobs.dwell(FOLDER) == Dwell(sample=100, p50=50, p95=95, longest=100)
    assert jobs.dwell(OTHER) == Dwell(0, 0, 0, 0)


def test_a_clock_that_was_set_back_gives_no_negative_dwell_time(jobs: Jobs) -> None:
    job = admitted(jobs)
    jobs.done([(job, job.first_seen_ns - SECOND)])
    assert jobs.dwell(FOLDER) == Dwell(1, 0, 0, 0)


def test_states_and_due_jobs_are_counted(jobs: Jobs) -> None:
    jobs.admit([settled(f"{n}.jpg") for n in range(4)])
    jobs.rest(taken(jobs), State.LEFT, "")
    jobs.committed(taken(jobs))
    taken(jobs)
    assert jobs.states(FOLDER) == {"left": 1, "committed": 1, "taken": 1, "queued": 1}
    assert (jobs.pending(), jobs.due([FOLDER]), jobs.due([OTHER])) == (3, 3, 2)


def test_listings_are_filtered_and_oldest_first(jobs: Jobs) -> None:
    for seen in (3, 1, 2):
        jobs.admit([settled(f"{seen}", seen=seen), settled(f"o{seen}", folder=OTHER, seen=seen)])
    assert [row.relpath for row in jobs.rows(folder=FOLDER)] == ["1", "2", "3"]
    assert len(jobs.rows()) == 6
    taken(jobs, OTHER)
    assert [row.relpath for row in jobs.rows(state=State.TAKEN)] == ["o1"]
    assert jobs.rows(folder=FOLDER, state=State.TAKEN) == []


# -- a database that cannot be used ------------------------------------------------------------


def filled(path: Path, files: int) -> int:
    jobs = Jobs(path)
    jobs.admit([settled(f"{n:05}.jpg") for n in range(files)])
    jobs.close()
    return path.stat().st_size


def test_a_database_is_there_again_after_it_was_closed(path: Path) -> None:
    filled(path, 3)
    jobs = Jobs(path)
    assert jobs.pending() == 3
    jobs.close()


@pytest.mark.parametrize(
    "content", [b"not a database at all" * 100, b"SQLite format 3\0" + b"x" * 99]
)
def test_a_file_that_is_no_database_is_put_aside(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    jobs = Jobs(path)
    assert jobs.admit([settled()]) == 1
    jobs.close()
    assert path.with_name(path.name + ".damaged").read_bytes() == content


def test_a_job_is_taken_as_soon_as_its_folder_may_be_worked_on(jobs: Jobs) -> None:
    jobs.admit([settled()])
    open_folders: list[FolderKey] = []
    asked = threading.Event()

    def folders() -> list[FolderKey]:
        asked.set()
        return open_folders

    found: list[Job | None] = []
    worker = threading.Thread(target=lambda: found.append(jobs.take(folders, PATIENCE)))
    worker.start()
    assert asked.wait(PATIENCE)
    started = time.monotonic()
    open_folders.append(FOLDER)
    jobs.look_again()
    worker.join()
    assert found != [None]
    assert time.monotonic() - started < PATIENCE / 2


def test_a_database_that_is_damaged_inside_is_put_aside(path: Path) -> None:
    size = filled(path, 2_000)
    with path.open("r+b") as file:
        file.seek(8192)
        file.write(os.urandom(size - 8192))
    jobs = Jobs(path)
    assert jobs.admit([settled(f"{n}") for n in range(100)]) == 100
    assert jobs.pending() == 100
    jobs.close()
    assert path.with_name(path.name + ".damaged").stat().st_size == size


def test_a_database_that_was_cut_is_put_aside(path: Path) -> None:
    size = filled(path, 2_000)
    os.truncate(path, size // 2)
    jobs = Jobs(path)
    assert jobs.admit([settled()]) == 1
    jobs.close()


def test_a_database_that_may_not_be_opened_is_not_put_aside() -> None:
    with ordinary_folder() as folder, without_privileges():
        path = folder / "queue.sqlite"
        filled(path, 3)
        path.chmod(0)
        with pytest.raises(StorageError):
            Jobs(path)
        path.chmod(0o600)
        jobs = Jobs(path)
        assert jobs.pending() == 3
        jobs.close()


def test_a_database_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be opened"):
        Jobs(tmp_path / "nowhere/queue.sqlite")


def test_a_database_that_cannot_be_read_for_a_moment_is_no_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Jobs(tmp_path / "queue.sqlite").close()

    class Unread:
        def __init__(self, real: sqlite3.Connection) -> None:
            self._real = real

        def __getattr__(self, name: str) -> object:
            return getattr(self._real, name)

        def execute(self, query: str) -> sqlite3.Cursor:
            if "quick_check" in query:
                text = "*** in database main ***\\nPage 7: unable to get the page. error code=8458"
                return self._real.execute("SELECT ?", (text,))
            return self._real.execute(query)

    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **kw: Unread(real(*args, **kw)))
    with pytest.raises(StorageError, match="disk I/O error"):
        Jobs(tmp_path / "queue.sqlite")
    assert not list(tmp_path.glob("*.damaged*"))


def test_only_the_owner_puts_a_damaged_database_aside(tmp_path: Path) -> None:
    path = tmp_path / "queue.sqlite"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(StorageError, match="cannot be opened"):
        Jobs(path, replace=False)
    assert not list(tmp_path.glob("*.damaged*"))
    Jobs(path).close()
    assert list(tmp_path.glob("*.damaged"))
