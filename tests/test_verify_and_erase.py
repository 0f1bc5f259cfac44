"""The proof that an object can be read back, and the deletion that only this proof allows."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from path_builders import (
    KEY,
    KEYS,
    PICTURE,
    VAULT_ID,
    Desk,
    desk_in,
    new_id,
    only_on_linux,
    open_descriptors,
    open_for_writing,
    ordinary_folder,
    tree,
    without_privileges,
)

from secimg_watch.container import PREFIX_SIZE
from secimg_watch.erase import erase
from secimg_watch.errors import ChangedInHandError, KeyMismatchError, TamperedError
from secimg_watch.records import Erased, KeyEncryptionKey, KeySet, Staged
from secimg_watch.seal import PIECE, read_header
from secimg_watch.sealing import seal
from secimg_watch.selection import STAGING_NAME
from secimg_watch.verify import verify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from secimg_watch.records import Committed

only_on_linux()
assert sys.platform == "linux"

STRANGER = b"somebody else's file"


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with desk_in(tmp_path) as made:
        yield made


def without_lease(staged: Staged) -> Staged:
    """The same, as where the file system grants no leases."""
    claimed = staged.claimed
    held = claimed.inspected.held
    fcntl.fcntl(held.fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    weak = dataclasses.replace(claimed.inspected, held=dataclasses.replace(held, leased=False))
    return dataclasses.replace(staged, claimed=dataclasses.replace(claimed, inspected=weak))


def plaintext(desk: Desk, staged: Staged) -> bytes:
    return desk.staged_path(staged.claimed.inspected.held.job).read_bytes()


# -- verify ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 7])
@pytest.mark.parametrize("from_device", [True, False])
def test_an_object_that_holds_the_very_bytes_is_verified(
    desk: Desk,
    size: int,
    from_device: bool,  # noqa: FBT001 - a parameter of the table
) -> None:
    desk.drop("a.jpg", os.urandom(size))
    staged = desk.staged(desk.job())
    assert desk.verify(staged, from_device=from_device).staged is staged


def test_verifying_shows_signs_of_life_all_along(desk: Desk) -> None:
    desk.drop("a.jpg", os.urandom(20 * PIECE))
    beats: list[None] = []
    staged = desk.staged(desk.job())
    verify(
        staged,
        keys=KEYS,
        vault_id=VAULT_ID,
        from_device=False,
        beat=lambda: beats.append(None),
    )
    assert len(beats) >= 20


def test_an_object_that_was_tampered_with_in_any_byte_is_refused(desk: Desk) -> None:
    desk.drop()
    staged = desk.staged(desk.job())
    good = staged.path.read_bytes()
    names_the_key = {offset + good.index(KEY.key_id) for offset in range(len(KEY.key_id))}
    staged.path.chmod(0o600)
    before = open_descriptors()
    for offset in range(len(good)):
        bad = bytearray(good)
        bad[offset] ^= 1 << (offset % 8)
        staged.path.write_bytes(bad)
        expected = KeyMismatchError if offset in names_the_key else TamperedError
        with pytest.raises(expected):
            desk.verify(staged, from_device=False)
    assert plaintext(desk, staged) == PICTURE
    assert open_descriptors() <= before
    staged.path.write_bytes(good)
    desk.verify(staged)


@pytest.mark.parametrize("cut", [1, 16, 1000])
def test_an_object_that_was_cut_or_goes_on_is_refused(desk: Desk, cut: int) -> None:
    desk.drop("a.jpg", os.urandom(5000))
    staged = desk.staged(desk.job())
    good = staged.path.read_bytes()
    staged.path.chmod(0o600)
    for bad in (good[:-cut], good + bytes(cut), b""):
        staged.path.write_bytes(bad)
        with pytest.raises(TamperedError):
            desk.verify(staged)


def test_another_files_object_under_the_name_is_refused(desk: Desk) -> None:
    for name in ("a.jpg", "b.jpg"):
        desk.drop(name)
    first, second = desk.staged(desk.job("a.jpg")), desk.staged(desk.job("b.jpg"))
    second.path.replace(first.path)
    with pytest.raises(TamperedError, match="not the one"):
        desk.verify(first)
    assert plaintext(desk, first) == PICTURE


def test_other_bytes_sealed_under_the_right_key_and_id_are_refused(desk: Desk) -> None:
    object_id = new_id()
    desk.drop("a.jpg", b"A" * 100_000)
    desk.drop("b.jpg", b"A" * 99_999 + b"B")
    mine = desk.staged(desk.job("a.jpg", object_id=object_id))
    good = mine.path.read_bytes()
    other = desk.claimed(desk.job("b.jpg", object_id=new_id()))
    job = dataclasses.replace(other.inspected.held.job, object_id=object_id)
    held = dataclasses.replace(other.inspected.held, job=job)
    forged = dataclasses.replace(other, inspected=dataclasses.replace(other.inspected, held=held))
    desk.vault.stage(desk.sealed(forged))
    assert len(mine.path.read_bytes()) == len(good)
    with pytest.raises(TamperedError, match="differs"):
        desk.verify(mine)


def test_an_object_of_another_vault_is_refused(desk: Desk) -> None:
    desk.drop()
    claimed = desk.claimed(desk.job())
    staged = desk.vault.stage(seal(claimed, keys=KEYS, vault_id=b"w" * 16, beat=lambda: None))
    with pytest.raises(TamperedError, match="another vault"):
        desk.verify(staged)


@pytest.mark.parametrize(
    ("stored", "refusal"),
    [
        (KeyEncryptionKey(KEY.key_id, b"\x08" * 32), TamperedError),
        (KeyEncryptionKey(b"o" * 16, KEY.key), KeyMismatchError),
    ],
)
def test_an_object_that_the_stored_key_does_not_open_is_refused(
    desk: Desk, stored: KeyEncryptionKey, refusal: type[Exception]
) -> None:
    desk.drop()
    staged = desk.staged(desk.job())
    keys = KeySet((stored,))
    with pytest.raises(refusal):
        verify(staged, keys=keys, vault_id=VAULT_ID, from_device=True, beat=lambda: None)


def test_a_preview_that_does_not_open_is_refused(desk: Desk) -> None:
    desk.drop()
    inspected = desk.inspected(desk.job())
    with_preview = dataclasses.replace(inspected.inspection, preview=b"small" * 100)
    claimed = dataclasses.replace(
        desk.claimed(inspected.held.job),
        inspected=dataclasses.replace(inspected, inspection=with_preview),
    )
    staged = desk.vault.stage(desk.sealed(claimed))
    desk.verify(staged)
    data = bytearray(staged.path.read_bytes())
    with staged.path.open("rb") as stream:
        header = read_header(stream)
        start = stream.tell() + header.core.meta_len
    assert start > PREFIX_SIZE
    data[start + 40] ^= 1
    staged.path.chmod(0o600)
    staged.path.write_bytes(data)
    with pytest.raises(TamperedError):
        desk.verify(staged)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def rewrite(path: Path) -> None:
    times = path.stat()
    path.write_bytes(PICTURE[::-1])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def shorten(path: Path) -> None:
    os.truncate(path, 3)


@pytest.mark.parametrize(
    ("meddle", "refusal"),
    [(append, ChangedInHandError), (rewrite, TamperedError), (shorten, TamperedError)],
)
def test_a_source_that_changed_since_it_was_sealed_is_refused(
    desk: Desk, meddle: Callable[[Path], None], refusal: type[Exception]
) -> None:
    desk.drop()
    staged = without_lease(desk.staged(desk.job()))
    meddle(desk.staged_path(staged.claimed.inspected.held.job))
    with pytest.raises(refusal):
        desk.verify(staged)
    assert staged.path.exists()


def test_a_source_that_was_written_with_the_same_bytes_is_refused(desk: Desk) -> None:
    desk.drop()
    staged = without_lease(desk.staged(desk.job()))
    path = desk.staged_path(staged.claimed.inspected.held.job)
    path.write_bytes(PICTURE)
    os.utime(path, ns=(1, 1))
    with pytest.raises(ChangedInHandError):
        desk.verify(staged)


def test_somebody_waiting_to_write_to_the_source_ends_the_proof(desk: Desk) -> None:
    desk.drop()
    staged = desk.staged(desk.job())
    path = desk.staged_path(staged.claimed.inspected.held.job)
    assert open_for_writing(path) == "refused"
    with pytest.raises(ChangedInHandError):
        desk.verify(staged)
    assert path.read_bytes() == PICTURE


def test_an_object_that_is_gone_is_no_proof(desk: Desk) -> None:
    desk.drop()
    staged = desk.staged(desk.job())
    staged.path.unlink()
    with pytest.raises(FileNotFoundError):
        desk.verify(staged)


# -- erase -------------------------------------------------------------------------------------


def erased(
    desk: Desk, committed: Committed, *, keep: bool = False, move_to: Path | None = None
) -> Erased | Exception:
    [outcome] = erase([desk.erasure(committed, keep=keep, move_to=move_to)])
    return outcome


def assert_erased(outcome: Erased | Exception) -> None:
    assert isinstance(outcome, Erased), outcome
    assert outcome.refusal == ""


@pytest.mark.parametrize("relpath", ["a.jpg", "2026/11/a.jpg", "no\udcffutf8\n.jpg"])
@pytest.mark.parametrize("move", [True, False], ids=["claimed", "in place"])
def test_exactly_the_one_file_goes_and_nothing_else(
    desk: Desk,
    relpath: str,
    move: bool,  # noqa: FBT001 - a parameter of the table
) -> None:
    for other in ("other.jpg", "2026/11/other.jpg", "A.jpg"):
        desk.drop(other, STRANGER)
    before = tree(desk.folder)
    desk.drop(relpath)
    job = desk.job(relpath)
    assert_erased(erased(desk, desk.committed(job, move=move)))
    assert tree(desk.folder) == before
    assert desk.root.entries() == [], "the claim's directories are gone too"
    assert desk.opened(job.object_id) == PICTURE


def swap(path: Path) -> None:
    path.rename(path.with_name("aside"))
    path.write_bytes(STRANGER)


def link(path: Path) -> None:
    path.rename(path.with_name("aside"))
    path.symlink_to("aside")


def second_name(path: Path) -> None:
    os.link(path, path.with_name("second"))


@pytest.mark.parametrize("meddle", [swap, link, second_name])
@pytest.mark.parametrize("move", [True, False], ids=["claimed", "in place"])
@pytest.mark.parametrize("after", ["delete", "move"])
def test_a_name_that_leads_elsewhere_is_left_alone(
    desk: Desk,
    tmp_path: Path,
    meddle: Callable[[Path], None],
    move: bool,  # noqa: FBT001 - a parameter of the table
    after: str,
) -> None:
    path = desk.drop()
    job = desk.job()
    committed = desk.committed(job, move=move)
    meddle(desk.staged_path(job) if move else path)
    left = tree(desk.folder)
    move_to = tmp_path / "moved" if after == "move" else None
    assert isinstance(erased(desk, committed, move_to=move_to), ChangedInHandError)
    assert tree(desk.folder) == left
    assert not (tmp_path / "moved").exists()


def test_somebody_waiting_to_write_keeps_the_plaintext(desk: Desk) -> None:
    desk.drop()
    job = desk.job()
    committed = desk.committed(job)
    assert open_for_writing(desk.staged_path(job)) == "refused"
    assert isinstance(erased(desk, committed), ChangedInHandError)
    assert desk.staged_path(job).read_bytes() == PICTURE


def test_a_name_that_is_gone_already_is_a_failure_and_no_success(desk: Desk) -> None:
    path = desk.drop()
    committed = desk.committed(desk.job(), move=False)
    path.rename(desk.folder / "elsewhere.jpg")
    assert isinstance(erased(desk, committed), ChangedInHandError | FileNotFoundError)
    assert (desk.folder / "elsewhere.jpg").read_bytes() == PICTURE


def test_where_the_policy_keeps_the_plaintext_it_stays(desk: Desk) -> None:
    path = desk.drop()
    inode = path.stat().st_ino
    assert_erased(erased(desk, desk.committed(desk.job(), move=False), keep=True))
    assert (path.read_bytes(), path.stat().st_ino) == (PICTURE, inode)


@pytest.mark.parametrize("move", [True, False], ids=["claimed", "in place"])
def test_the_plaintext_is_moved_with_its_sub_folder(
    desk: Desk,
    tmp_path: Path,
    move: bool,  # noqa: FBT001 - a parameter of the table
) -> None:
    target = tmp_path / "target"
    inode = desk.drop("2026/11/a.jpg").stat().st_ino
    committed = desk.committed(desk.job("2026/11/a.jpg"), move=move)
    assert_erased(erased(desk, committed, move_to=target))
    assert tree(target) == ["2026/11/a.jpg"]
    assert (target / "2026/11/a.jpg").stat().st_ino == inode
    assert tree(desk.folder) == [STAGING_NAME, "2026/11"]


def test_a_move_never_overwrites(desk: Desk, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "a.jpg").write_bytes(STRANGER)
    desk.drop()
    job = desk.job()
    assert_erased(erased(desk, desk.committed(job), move_to=target))
    assert (target / "a.jpg").read_bytes() == STRANGER
    assert (target / f"{job.object_id}.jpg").read_bytes() == PICTURE


def test_a_move_for_which_every_name_is_taken_fails(desk: Desk, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    desk.drop()
    job = desk.job()
    for name in ("a.jpg", f"{job.object_id}.jpg"):
        (target / name).write_bytes(STRANGER)
    assert isinstance(erased(desk, desk.committed(job), move_to=target), FileExistsError)
    assert desk.staged_path(job).read_bytes() == PICTURE
    assert {path.read_bytes() for path in target.iterdir()} == {STRANGER}


def test_a_move_to_another_file_system_is_refused_and_keeps_the_plaintext(
    desk: Desk, tmp_path: Path
) -> None:
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system that can be written")
    with tempfile.TemporaryDirectory(dir=memory) as elsewhere:
        desk.drop()
        job = desk.job()
        outcome = erased(desk, desk.committed(job), move_to=Path(elsewhere))
        assert isinstance(outcome, Erased)
        assert outcome.refusal == "Invalid cross-device link"
        assert desk.staged_path(job).read_bytes() == PICTURE
        assert list(Path(elsewhere).iterdir()) == []


@pytest.mark.parametrize("after", ["delete", "move"])
def test_where_the_system_refuses_the_deletion_it_is_said_and_not_hidden(after: str) -> None:
    with ordinary_folder() as directory, without_privileges(), desk_in(directory) as desk:
        path = desk.drop("sub/a.jpg")
        job = desk.job("sub/a.jpg")
        committed = desk.committed(job, move=False)
        path.parent.chmod(0o500)
        move_to = directory / "moved" if after == "move" else None
        outcome = erased(desk, committed, move_to=move_to)
        path.parent.chmod(0o700)
        assert isinstance(outcome, Erased)
        assert outcome.refusal == "Permission denied"
        assert path.read_bytes() == PICTURE
        assert desk.opened(job.object_id) == PICTURE


def test_what_fails_in_a_batch_does_not_hold_up_the_others(desk: Desk) -> None:
    done: list[Committed] = []
    for number in range(5):
        desk.drop(f"{number}.jpg", b"%d" % number)
        done.append(desk.committed(desk.job(f"{number}.jpg"), move=number % 2 == 0))
    swap(desk.folder / "3.jpg")
    (desk.folder / "1.jpg").unlink()
    outcomes = erase([desk.erasure(each) for each in done])
    assert [isinstance(outcome, Erased) for outcome in outcomes] == [True, False, True, False, True]
    assert (desk.folder / "3.jpg").read_bytes() == STRANGER
    assert (desk.folder / "aside").read_bytes() == b"3"
    assert desk.root.entries() == []


def test_the_outcomes_keep_the_order_of_the_batch(desk: Desk) -> None:
    batch = []
    for number in range(4):
        desk.drop(f"{number}.jpg")
        batch.append(desk.erasure(desk.committed(desk.job(f"{number}.jpg"))))
    outcomes = erase(batch)
    for erasure, outcome in zip(batch, outcomes, strict=True):
        assert isinstance(outcome, Erased)
        assert outcome.committed is erasure.committed


def test_nothing_is_left_open(desk: Desk, tmp_path: Path) -> None:
    desk.drop("a.jpg")
    desk.drop("b.jpg")
    first, second = desk.committed(desk.job("a.jpg")), desk.committed(desk.job("b.jpg"))
    before = {entry.split()[0] for entry in open_descriptors()}
    erase([desk.erasure(first), desk.erasure(second, move_to=tmp_path / "moved")])
    assert {entry.split()[0] for entry in open_descriptors()} <= before
