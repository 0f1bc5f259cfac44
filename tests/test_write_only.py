"""A vault without a key: this machine seals into it, and only the recipients open it."""

from __future__ import annotations

import base64
import errno
import os
import sys
from typing import TYPE_CHECKING

import pytest
from cli_runner import Box, check_complaint, contents
from path_builders import PICTURE, VAULT_ID, Desk, only_on_linux

from secimg_watch import keys, pipeline
from secimg_watch.audit import Audit
from secimg_watch.claim import rename_claim
from secimg_watch.container import RecipientSlot
from secimg_watch.erase import erase
from secimg_watch.errors import KeyMismatchError, TamperedError
from secimg_watch.inspector import Inspector, Limits
from secimg_watch.jobs import Jobs
from secimg_watch.pipeline import Pipeline, Place
from secimg_watch.policy import Folder
from secimg_watch.recipients import (
    format_identity,
    format_recipient,
    generate_identity,
    identity_file,
    recipient_of,
)
from secimg_watch.records import Arrival, KeySet, ObjectId, Proof, Settled
from secimg_watch.recovery import recover_folder
from secimg_watch.seal import open_object, read_header
from secimg_watch.sealing import seal
from secimg_watch.verify import verify

only_on_linux()
assert sys.platform == "linux"

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from secimg_watch.records import Claimed, Committed, Job, Sealed, Staged, Verified

OWNER, SECOND, STRANGER = (generate_identity() for _ in range(3))
WRITE_ONLY = KeySet((), (recipient_of(OWNER), recipient_of(SECOND)))

# Noise, so that no part of it is anywhere by chance; nothing of it is looked at as a picture.
PICTURES = {"a.jpg": os.urandom(5_000), "2026/ö.jpg": os.urandom(70_000), "2026/c": b"\xff" * 9}
NOISE = [data for data in PICTURES.values() if len(data) > 100]


def write_policy(box: Box, **more: object) -> None:
    """A policy without a key, by which everything is sealed and then deleted."""
    recipients = [format_recipient(each) for each in WRITE_ONLY.recipients]
    none = {"key": {"provider": "none"}, "recipients": recipients, "recovery": "required"}
    box.write_policy(more=none | more, not_image="encrypt", undecodable="encrypt", preview=0)


@pytest.fixture
def box(tmp_path: Path) -> Box:
    """A write-only vault whose first recipient is confirmed, and pictures that wait for it."""
    (tmp_path / "machine").mkdir()
    box = Box(tmp_path / "machine")
    write_policy(box)
    assert box("key", "init").code == 0
    confirm = box("key", "recovery", "confirm", "--identity", identity_of(tmp_path))
    assert confirm.code == 0, confirm
    for name, data in PICTURES.items():
        (box.drop / name).parent.mkdir(exist_ok=True)
        (box.drop / name).write_bytes(data)
    return box


@pytest.fixture
def sealed(box: Box) -> Box:
    """The same, once they were sealed."""
    outcome = box("drain")
    assert (outcome.code, outcome.out) == (0, "3 sealed, 0 failed, 0 not ready yet\n"), outcome
    return box


def identity_of(place: Path) -> Path:
    """The file with the owner's private key, on another machine as it were."""
    path = place / "elsewhere.key"
    path.write_text(identity_file(OWNER))
    return path


def test_pictures_are_sealed_to_the_recipients_alone_and_deleted(sealed: Box) -> None:
    assert contents(sealed.drop) == {}
    assert len(sealed.objects()) == 3
    for path in sealed.objects():
        with path.open("rb") as stream:
            slots = read_header(stream).slots
        assert all(isinstance(slot, RecipientSlot) for slot in slots)
        assert [slot.key_id for slot in slots] == [OWNER.key_id, SECOND.key_id]


def test_it_says_of_itself_that_it_is_write_only(sealed: Box) -> None:
    assert "key: none (write-only: only the recipients can open the vault)" in sealed("check").out
    listed = sealed("key", "list", "--json").json()
    assert listed["state"] == "write-only"
    assert [row["state"] for row in listed["keys"]] == ["confirmed", "not confirmed"]
    assert sealed("status", "--json").json()["key"] == "ready"


READING = [
    *("vault list", "vault show {}", "vault restore {} --to out", "vault restore --all --to out"),
    *("vault verify", "why drop/a.jpg", "vault rekey", "vault reencrypt"),
    *("key rotate", "key retire 00"),
]


@pytest.mark.parametrize("command", READING)
def test_whatever_reads_the_vault_is_78_without_a_private_key(sealed: Box, command: str) -> None:
    before = contents(sealed.vault)
    words = command.format(sealed.objects()[0].stem).replace("drop", str(sealed.drop)).split()
    outcome = sealed(*words)
    assert "write-only" in check_complaint(outcome, 78)
    if command.startswith("vault"):
        assert "--identity FILE" in outcome.err
    assert contents(sealed.vault) == before
    assert contents(sealed.cli.home) == {}


def test_a_private_key_that_is_not_a_recipients_opens_nothing(sealed: Box, tmp_path: Path) -> None:
    path = tmp_path / "stranger.key"
    path.write_text(identity_file(STRANGER))
    outcome = sealed("vault", "restore", "--all", "--to", "out", "--identity", path)
    assert (outcome.code, outcome.out) == (1, "0 restored, 3 failed\n")
    assert contents(sealed.cli.home) == {}


def test_a_new_key_does_not_open_what_was_sealed_without_one(sealed: Box) -> None:
    write_policy(sealed, key={"provider": "file", "file": str(sealed.key)})
    assert sealed("key", "init").code == 0
    outcome = sealed("vault", "list")
    assert outcome.code == 1
    assert outcome.err.count("none of that is at hand") == 3


def test_with_a_recipients_private_key_everything_comes_back(sealed: Box, tmp_path: Path) -> None:
    for each, name in ((OWNER, "owner"), (SECOND, "second")):
        path = tmp_path / f"{name}.key"
        path.write_text(identity_file(each))
        outcome = sealed("vault", "restore", "--all", "--to", name, "--identity", path)
        assert (outcome.code, outcome.out) == (0, "3 restored, 0 failed\n")
        assert contents(sealed.cli.home / name) == PICTURES
        assert sealed("vault", "verify", "--identity", path).code == 0
        told = sealed("key", "recovery", "test", "--identity", path)
        assert (told.code, told.out) == (0, "3 of 3 objects open with the recovery key\n")


def file_keys(box: Box) -> list[bytes]:
    """The file key of every object, as only a recipient can know it."""
    found = []
    for path in box.objects():
        with path.open("rb") as stream:
            found.append(open_object(stream, [OWNER])._file_key)
    return found


def forms(secret: bytes) -> Iterator[bytes]:
    """What a secret may look like in a file."""
    yield secret
    yield secret.hex().encode()
    yield secret.hex().upper().encode()
    yield base64.b64encode(secret)[:40]
    yield base64.urlsafe_b64encode(secret)[:40]
    yield base64.b32encode(secret)[:48]


def test_nothing_on_the_machine_holds_a_picture_a_file_key_or_a_private_key(sealed: Box) -> None:
    secrets = [*file_keys(sealed), OWNER.seed, SECOND.seed]
    traces = [form for secret in secrets for form in forms(secret)]
    traces += [format_identity(each).partition(":")[2].encode() for each in (OWNER, SECOND)]
    traces += [data[at : at + 24] for data in NOISE for at in range(0, len(data) - 24, 1_000)]
    files = contents(sealed.directory)
    assert {"policy.yaml", "vault/vault.json", "state/queue.sqlite"} <= files.keys()
    for name, data in files.items():
        assert not any(trace in data for trace in traces), name


def test_whoever_looks_for_traces_would_find_them(box: Box) -> None:
    files = contents(box.directory)
    assert all(any(data[:24] in held for held in files.values()) for data in NOISE)


def test_nothing_is_deleted_before_a_recipient_is_confirmed(tmp_path: Path) -> None:
    box = Box(tmp_path)
    write_policy(box)
    assert box("key", "init").code == 0
    (box.drop / "a.jpg").write_bytes(PICTURES["a.jpg"])
    assert "nothing is deleted" in check_complaint(box("drain"), 78)
    assert contents(box.drop) == {"a.jpg": PICTURES["a.jpg"]}
    assert box.objects() == []


def test_no_vault_is_made_by_confirming_where_its_disk_is_not_mounted(
    box: Box, tmp_path: Path
) -> None:
    box.vault.rename(tmp_path / "unmounted")
    box.vault.mkdir()
    told = box("key", "recovery", "confirm", "--identity", identity_of(tmp_path))
    check_complaint(told, 66)
    assert "key init" in told.err
    assert contents(box.vault) == {}
    assert box("drain").code == 75


@pytest.mark.parametrize("recipients", [None, []])
def test_neither_key_nor_recipients_is_a_fault_of_the_policy_with_its_place(
    tmp_path: Path, recipients: list[str] | None
) -> None:
    box = Box(tmp_path)
    none: dict[str, object] = {"key": {"provider": "none"}}
    box.write_policy(more=none if recipients is None else none | {"recipients": recipients})
    lines = box.policy.read_text().splitlines()
    [line] = [number for number, text in enumerate(lines, 1) if "provider" in text]
    column = lines[line - 1].index("none") + 1
    for command in ("check", "drain", "key init"):
        outcome = box(*command.split())
        check_complaint(outcome, 78)
        fault = f"  {box.policy}:{line}:{column}: key.provider: with none, nobody could open"
        assert fault in outcome.err
        assert 'add "recipients: [...]", or another provider' in outcome.err
    assert not box.vault.exists()


def test_a_vault_with_a_key_can_be_made_write_only_and_its_objects_rekeyed(
    tmp_path: Path,
) -> None:
    box = Box(tmp_path)
    write_policy(box, key={"provider": "file", "file": str(box.key)}, recovery="declined")
    assert box("key", "init").code == 0
    (box.drop / "a.jpg").write_bytes(PICTURES["a.jpg"])
    assert box("drain").code == 0
    write_policy(box)
    identity = identity_of(tmp_path)
    assert box("key", "recovery", "confirm", "--identity", identity).code == 0
    assert box("vault", "rekey", "--identity", identity).code == 0
    [path] = box.objects()
    with path.open("rb") as stream, pytest.raises(KeyMismatchError):
        open_object(stream, keys.provider_for("file", "a/b", file=box.key).load_ring())
    outcome = box("vault", "restore", "--all", "--to", "out", "--identity", identity)
    assert outcome.code == 0
    assert contents(box.cli.home / "out") == {"a.jpg": PICTURES["a.jpg"]}


# -- a crash in between --------------------------------------------------------------------------


class WriteOnlyDesk(Desk):
    """A desk whose vault is sealed into without a key."""

    def sealed(self, claimed: Claimed) -> Sealed:
        """Seal to the recipients."""
        return seal(claimed, keys=WRITE_ONLY, vault_id=VAULT_ID, beat=lambda: None)

    def verify(self, staged: Staged, *, from_device: bool = True) -> Verified:
        """Read the object back with the file key that the sealing left."""
        return verify(
            staged, keys=WRITE_ONLY, vault_id=VAULT_ID, from_device=from_device, beat=lambda: None
        )

    def opened(self, object_id: ObjectId) -> bytes:
        """The picture that an object holds, as the owner sees it."""
        with self.vault.object_path(object_id).open("rb") as stream:
            found = open_object(stream, [OWNER], expect=object_id, vault_id=VAULT_ID)
            return b"".join(bytes(piece) for piece in found.body())


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[WriteOnlyDesk]:
    made = WriteOnlyDesk(tmp_path)
    yield made
    made.let_go()


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    queue = Jobs(tmp_path / "queue.sqlite")
    yield queue
    queue.close()


class NewProcess:
    """What a process without a key does with a folder after a crash, without threads."""

    def __init__(self, desk: WriteOnlyDesk, jobs: Jobs, *, after: str = "delete") -> None:
        policy = Folder.model_validate(
            {
                "path": str(desk.folder),
                "vault": "main",
                "not_image": "encrypt",
                "undecodable": "encrypt",
                "preview": 0,
                "after": after,
            }
        )
        self.desk, self.jobs = desk, jobs
        self.place = Place(policy, desk.root, desk.vault, VAULT_ID, reconsider=lambda _path: None)
        self.pipeline = Pipeline(
            jobs=jobs,
            audit=Audit(desk.folder.parent / "state", WRITE_ONLY),
            inspector=Inspector(Limits()),
            keys=WRITE_ONLY,
            from_device=True,
            max_attempts=3,
            beat=lambda: None,
        )
        jobs.reclaim()
        desk.vault.discard_temporaries()
        recover_folder(desk.key, desk.root, jobs)

    def verified(self) -> list[pipeline.Task]:
        """Take every job as far as its verified object."""
        tasks = []
        while (job := self.jobs.take(lambda: [self.desk.key], 0.0)) is not None:
            task = self.pipeline.process(job, self.place)
            if task is not None:
                tasks.append(task)
        return tasks

    def work(self) -> None:
        """Do all that can be done now."""
        assert self.pipeline.finish(self.verified()) == []


def in_hand(desk: WriteOnlyDesk, jobs: Jobs, relpath: str = "2026/a.jpg") -> Job:
    """A picture in the folder, and its job in a worker's hands."""
    desk.drop(relpath)
    identity = desk.job(relpath).identity
    jobs.admit([Settled(Arrival(desk.key, relpath, identity, 1), Proof.LEASE)])
    job = jobs.take(lambda: [desk.key], 0.0)
    assert job is not None
    return job


def crashed_after_commit(desk: WriteOnlyDesk, jobs: Jobs, *, move: bool = True) -> Committed:
    """A committed object, whose process died before it deleted the plaintext."""
    committed = desk.committed(in_hand(desk, jobs), move=move)
    desk.let_go()
    return committed


def plaintexts(desk: WriteOnlyDesk) -> list[bytes]:
    return [path.read_bytes() for path in desk.folder.rglob("*.jpg")]


@pytest.mark.parametrize("stage", ["queued", "claimed", "half written", "written"])
def test_what_was_not_committed_yet_ends_in_the_vault_once(
    desk: WriteOnlyDesk, jobs: Jobs, stage: str
) -> None:
    job = in_hand(desk, jobs)
    if stage == "claimed":
        desk.claimed(job)
    elif stage != "queued":
        staged = desk.staged(job)
        if stage == "half written":
            staged.path.chmod(0o600)
            os.truncate(staged.path, 100)
    desk.let_go()
    NewProcess(desk, jobs).work()
    assert desk.vault.object_ids() == [job.object_id]
    assert desk.opened(job.object_id) == PICTURE
    assert plaintexts(desk) == []


@pytest.mark.parametrize("move", [True, False], ids=["claimed", "in place"])
def test_what_cannot_be_proven_anew_is_sealed_anew_under_another_id(
    desk: WriteOnlyDesk, jobs: Jobs, *, move: bool
) -> None:
    old = crashed_after_commit(desk, jobs, move=move)
    before = old.path.read_bytes()
    NewProcess(desk, jobs).work()
    assert old.path.read_bytes() == before
    old_id = old.verified.staged.object_id
    [new_id] = set(desk.vault.object_ids()) - {old_id}
    assert desk.opened(old_id) == desk.opened(new_id) == PICTURE
    assert plaintexts(desk) == []
    assert (jobs.rows(), desk.root.entries()) == ([], [])


def test_the_plaintext_goes_only_once_the_second_object_was_verified_and_committed(
    desk: WriteOnlyDesk, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_id = crashed_after_commit(desk, jobs).verified.staged.object_id
    steps = []

    def noted(staged: Staged, **how: object) -> Verified:
        steps.append((staged.object_id, plaintexts(desk)))
        return verify(staged, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "verify", noted)
    process = NewProcess(desk, jobs)
    [task] = process.verified()
    new_id = task.job.object_id
    assert steps == [(old_id, [PICTURE]), (new_id, [PICTURE])]
    assert plaintexts(desk) == [PICTURE]
    assert desk.vault.object_ids() == [old_id]
    assert process.pipeline.finish([task]) == []
    assert sorted(desk.vault.object_ids()) == sorted([old_id, new_id])
    assert plaintexts(desk) == []


def test_a_second_object_that_cannot_be_verified_costs_nothing(
    desk: WriteOnlyDesk, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_id = crashed_after_commit(desk, jobs).verified.staged.object_id

    def fail(staged: Staged, **how: object) -> Verified:
        if staged.object_id != old_id:
            raise TamperedError("what was written differs from what is in hand")
        return verify(staged, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "verify", fail)
    NewProcess(desk, jobs).work()
    assert plaintexts(desk) == [PICTURE]
    assert desk.vault.object_ids() == [old_id]
    assert desk.opened(old_id) == PICTURE
    [row] = jobs.rows()
    assert row.object_id != old_id


def test_a_crash_between_moving_the_picture_and_noting_its_new_id_loses_nothing(
    desk: WriteOnlyDesk, jobs: Jobs
) -> None:
    old_id = crashed_after_commit(desk, jobs).verified.staged.object_id
    new_id = ObjectId("ab" * 16)
    rename_claim(desk.root, old_id, new_id)
    NewProcess(desk, jobs).work()
    assert sorted(desk.vault.object_ids()) == sorted([old_id, new_id])
    assert desk.opened(old_id) == desk.opened(new_id) == PICTURE
    assert plaintexts(desk) == []
    assert jobs.rows() == []


def test_a_crash_after_the_deletion_makes_no_second_object(desk: WriteOnlyDesk, jobs: Jobs) -> None:
    committed = desk.committed(in_hand(desk, jobs))
    [outcome] = erase([desk.erasure(committed)])
    assert not isinstance(outcome, Exception)
    desk.let_go()
    NewProcess(desk, jobs).work()
    assert desk.vault.object_ids() == [committed.verified.staged.object_id]
    assert (jobs.rows(), jobs.counters(desk.key)["sealed"]) == ([], 1)


def test_one_crash_makes_one_more_object_and_the_next_process_none(
    desk: WriteOnlyDesk, jobs: Jobs
) -> None:
    crashed_after_commit(desk, jobs)
    for _ in range(3):
        NewProcess(desk, jobs).work()
    assert len(desk.vault.object_ids()) == 2


def test_a_plaintext_that_cannot_be_deleted_for_a_while_costs_no_second_object(
    desk: WriteOnlyDesk, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = in_hand(desk, jobs)
    process = NewProcess(desk, jobs)
    stale = OSError(errno.ESTALE, "stale")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "erase", lambda batch: [stale for _ in batch])
        for _ in range(5):
            [(_, fault)] = process.pipeline.finish(process.verified())
            assert "stale" in str(fault)
    assert plaintexts(desk) == [PICTURE]
    process.work()
    assert desk.vault.object_ids() == [job.object_id]
    assert (plaintexts(desk), jobs.rows(), process.pipeline.file_keys) == ([], [], {})


def test_where_plaintext_is_kept_a_crash_costs_no_more_than_a_second_object(
    desk: WriteOnlyDesk, jobs: Jobs
) -> None:
    old = crashed_after_commit(desk, jobs, move=False)
    NewProcess(desk, jobs, after="keep").work()
    assert plaintexts(desk) == [PICTURE]
    assert {desk.opened(each) for each in desk.vault.object_ids()} == {PICTURE}
    assert len(desk.vault.object_ids()) == 2
    assert old.path.exists()


def test_a_fresh_object_is_proven_with_its_own_key_and_a_damaged_one_is_not(
    desk: WriteOnlyDesk, jobs: Jobs
) -> None:
    staged = desk.staged(in_hand(desk, jobs))
    assert staged.file_key is not None
    assert staged.file_key.key.hex() not in repr(staged)
    desk.verify(staged)
    whole = staged.path.read_bytes()
    for place in (30, 70, 1_000, 1_500, 3_000, len(whole) - 1):
        data = bytearray(whole)
        data[place] ^= 1
        staged.path.chmod(0o600)
        staged.path.write_bytes(data)
        with pytest.raises(TamperedError):
            desk.verify(staged)
