"""A vault on disk: what has its final name is whole, and nothing is ever overwritten."""

from __future__ import annotations

import base64
import codecs
import json
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from path_builders import (
    KEY,
    NO_RESERVE,
    PATIENCE,
    PICTURE,
    VAULT_ID,
    Desk,
    can_mount,
    desk_in,
    mounted_tmpfs,
    new_id,
    only_on_linux,
    open_descriptors,
    ordinary_folder,
    tree,
    without_privileges,
)

from secimg_watch import kernel
from secimg_watch.errors import (
    AlreadyRunningError,
    CannotCreateError,
    ConfigError,
    DiskFullError,
    NoInputError,
    NotAllowedError,
    VaultGoneError,
)
from secimg_watch.quantities import Reserve
from secimg_watch.records import ObjectId, Sealed, Staged, Verified
from secimg_watch.vault import Vault, VaultInfo, commit, is_object_id

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

only_on_linux()
assert sys.platform == "linux"

VAULT = f'"{VAULT_ID.hex()}"'
CHECK = base64.b64encode(bytes(32)).decode()
INFO = VaultInfo(VAULT_ID, {b"k" * 16: b"\x01" * 32, b"l" * 16: b"\x02" * 32})

HOLD_THE_LOCK = """
import sys
from pathlib import Path
from secimg_watch.quantities import Reserve
from secimg_watch.vault import Vault
vault = Vault(Path(sys.argv[1]), Reserve(0.0, 0))
vault.lock()
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with desk_in(tmp_path) as made:
        yield made


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def temporaries(vault: Vault) -> list[str]:
    return tree(vault.path / "tmp")


def objects(vault: Vault) -> list[str]:
    return [path for path in tree(vault.path / "objects") if path.endswith(".simg")]


def sealed(desk: Desk, relpath: str = "a.jpg", content: bytes = PICTURE) -> Sealed:
    desk.drop(relpath, content)
    return desk.sealed(desk.claimed(desk.job(relpath)))


def pieces(given: Sealed, chunks: Iterator[memoryview], size: int | None = None) -> Sealed:
    """The same object, its bytes coming from elsewhere."""
    return replace(given, size=given.size if size is None else size, chunks=lambda: chunks)


# -- the vault itself --------------------------------------------------------------------------


def test_a_new_vault_is_its_owners_alone(tmp_path: Path) -> None:
    vault = Vault(tmp_path / "deep/er/vault", NO_RESERVE)
    assert not vault.exists()
    vault.create(INFO)
    assert vault.exists()
    assert mode(vault.path / "vault.json") == 0o600
    for directory in (vault.path, vault.path / "tmp", vault.path / "objects"):
        assert mode(directory) == 0o700
    shards = sorted(path.name for path in (vault.path / "objects").iterdir())
    assert shards == [f"{number:02x}" for number in range(256)]


def test_a_vault_is_never_made_over_another(tmp_path: Path) -> None:
    vault = Vault(tmp_path, NO_RESERVE)
    vault.create(INFO)
    with pytest.raises(ConfigError, match="already"):
        vault.create(VaultInfo(b"w" * 16, {}))
    assert vault.info() == INFO


def test_a_vault_that_was_made_half_way_is_finished(tmp_path: Path) -> None:
    (tmp_path / "vault/objects/7f").mkdir(parents=True)
    vault = Vault(tmp_path / "vault", NO_RESERVE)
    vault.create(INFO)
    assert len(list((tmp_path / "vault/objects").iterdir())) == 256


def test_a_vault_that_cannot_be_made_says_so() -> None:
    with ordinary_folder() as folder, without_privileges():
        folder.chmod(0o500)
        with pytest.raises(CannotCreateError, match="Permission denied"):
            Vault(folder / "vault", NO_RESERVE).create(INFO)
        folder.chmod(0o700)


def test_what_the_vault_knows_comes_back(tmp_path: Path) -> None:
    vault = Vault(tmp_path, NO_RESERVE)
    vault.create(INFO)
    assert vault.info() == INFO
    more = VaultInfo(VAULT_ID, {**INFO.checks, b"m" * 16: b"\x03" * 32})
    vault.write_info(more)
    assert vault.info() == more
    assert not (tmp_path / "vault.json.new").exists()


def test_without_a_vault_the_next_step_is_named(tmp_path: Path) -> None:
    vault = Vault(tmp_path, NO_RESERVE)
    with pytest.raises(NoInputError) as caught:
        vault.info()
    assert "key init" in caught.value.hint
    with pytest.raises(NoInputError):
        vault.object_ids()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        "{}",
        '{"format": 1, "keys": []}',
        f'{{"format": 1, "vault": "{"zz" * 16}", "keys": []}}',
        f'{{"format": 1, "vault": "{"00" * 15}", "keys": []}}',
        f'{{"format": 1, "vault": {VAULT}, "keys": 7}}',
        f'{{"format": 1, "vault": {VAULT}, "keys": [7]}}',
        f'{{"format": 1, "vault": {VAULT}, "keys": [{{"id": {VAULT}}}]}}',
        f'{{"format": 1, "vault": {VAULT}, "keys": [{{"id": "00", "check": "{CHECK}"}}]}}',
        f'{{"format": 1, "vault": {VAULT}, "keys": [{{"id": {VAULT}, "check": "AAAA"}}]}}',
        f'{{"format": 1, "vault": {VAULT}, "keys": [{{"id": {VAULT}, "check": "*{CHECK}"}}]}}',
        '{"format": 1, "vault": 7, "keys": []}',
        "\u00fc",
    ],
)
def test_a_damaged_vault_file_is_told_apart(tmp_path: Path, text: str) -> None:
    vault = Vault(tmp_path, NO_RESERVE)
    vault.create(INFO)
    (tmp_path / "vault.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="damaged"):
        vault.info()


def test_a_vault_of_another_format_is_refused(tmp_path: Path) -> None:
    vault = Vault(tmp_path, NO_RESERVE)
    vault.create(INFO)
    fields = json.loads((tmp_path / "vault.json").read_text())
    (tmp_path / "vault.json").write_text(json.dumps({**fields, "format": 2}))
    with pytest.raises(ConfigError, match="format 2"):
        vault.info()


def test_ids_have_one_form() -> None:
    assert is_object_id("0123456789abcdef" * 2)
    for other in ("", "0" * 31, "0" * 33, "0" * 31 + "A", "0" * 31 + "g", "../" + "0" * 29):
        assert not is_object_id(other)


# -- one writer --------------------------------------------------------------------------------


def test_a_vault_has_one_writer(desk: Desk) -> None:
    pair = (desk.vault, Vault(desk.vault.path, NO_RESERVE))
    pair[0].lock()
    with pytest.raises(AlreadyRunningError):
        pair[1].lock()
    assert [vault.is_locked for vault in pair] == [True, False]
    pair[0].unlock()
    pair[1].lock()
    assert [vault.is_locked for vault in pair] == [False, True]
    pair[1].unlock()


def test_the_lock_goes_with_its_process_however_that_ends(desk: Desk) -> None:
    command = [sys.executable, "-c", HOLD_THE_LOCK, str(desk.vault.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(AlreadyRunningError):
            desk.vault.lock()
        process.kill()
        process.wait(timeout=PATIENCE)
    desk.vault.lock()
    desk.vault.unlock()


def test_a_vault_that_may_not_be_written_cannot_be_locked() -> None:
    with ordinary_folder() as folder, without_privileges():
        vault = Vault(folder, NO_RESERVE)
        vault.create(INFO)
        folder.chmod(0o500)
        with pytest.raises(NotAllowedError):
            vault.lock()
        folder.chmod(0o700)


# -- the order of writing ----------------------------------------------------------------------


def test_an_object_has_its_final_name_only_when_it_was_written_and_verified(desk: Desk) -> None:
    given = sealed(desk)
    name = f"{given.object_id}.simg"
    seen = []

    def watched() -> Iterator[memoryview]:
        for chunk in given.chunks():
            seen.append((temporaries(desk.vault), objects(desk.vault)))
            yield chunk

    staged = desk.vault.stage(pieces(given, watched()))
    assert set(map(str, seen)) == {str(([name], []))}
    assert staged.path == desk.vault.path / "tmp" / name
    assert staged.path.stat().st_size == given.size
    assert mode(staged.path) == 0o400
    assert not desk.vault.has(given.object_id)
    verified = desk.verify(staged)
    assert objects(desk.vault) == []
    [committed] = commit([(desk.vault, verified)])
    assert not isinstance(committed, Exception)
    assert committed.path == desk.vault.object_path(given.object_id)
    assert temporaries(desk.vault) == []
    assert objects(desk.vault) == [f"{given.object_id[:2]}/{name}"]
    assert mode(committed.path) == 0o400
    assert desk.opened(given.object_id) == PICTURE


def test_what_an_earlier_process_left_under_the_same_id_is_written_anew(desk: Desk) -> None:
    given = sealed(desk)
    leftover = desk.vault.path / "tmp" / f"{given.object_id}.simg"
    leftover.write_bytes(b"half an object")
    leftover.chmod(0o400)
    desk.verify(desk.vault.stage(given))


def test_an_object_is_never_overwritten(desk: Desk) -> None:
    verified = desk.verify(desk.vault.stage(sealed(desk)))
    final = desk.vault.object_path(verified.staged.object_id)
    final.write_bytes(b"another object")
    [outcome] = commit([(desk.vault, verified)])
    assert isinstance(outcome, FileExistsError)
    assert final.read_bytes() == b"another object"
    assert verified.staged.path.exists()


def test_an_object_that_was_committed_before_is_found_and_committed_again(desk: Desk) -> None:
    desk.drop()
    job = desk.job()
    first = desk.committed(job)
    before = first.path.stat()
    desk.let_go()
    claimed = desk.claimed(job)
    found = desk.vault.find(claimed)
    assert found == Staged(claimed, job.object_id, first.path)
    verified = desk.verify(found)
    for _ in range(2):
        [again] = commit([(desk.vault, verified)])
        assert not isinstance(again, Exception)
        assert again.path == first.path
    assert first.path.stat().st_ino == before.st_ino


def test_an_object_that_is_merely_written_is_not_found(desk: Desk) -> None:
    staged = desk.vault.stage(sealed(desk))
    assert desk.vault.find(staged.claimed) is None


def test_what_fails_in_a_batch_does_not_hold_up_the_others(desk: Desk) -> None:
    batch: list[tuple[Vault, Verified]] = []
    for number in range(6):
        given = sealed(desk, f"{number}.jpg", b"%d" % number)
        batch.append((desk.vault, desk.verify(desk.vault.stage(given))))
    taken, gone = batch[1][1].staged, batch[4][1].staged
    desk.vault.object_path(taken.object_id).write_bytes(b"taken")
    desk.vault.discard(gone.object_id)
    outcomes = commit(batch)
    kinds = [type(each).__name__ for each in outcomes]
    assert kinds == [
        "Committed",
        "FileExistsError",
        "Committed",
        "Committed",
        "FileNotFoundError",
        "Committed",
    ]
    for number in (0, 2, 3, 5):
        assert desk.opened(batch[number][1].staged.object_id) == b"%d" % number


def test_an_empty_batch_is_committed_at_once() -> None:
    assert commit([]) == []


def test_objects_of_several_vaults_are_committed_together(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    with desk_in(tmp_path / "second") as second:
        desks = (desk, second)
        batch = [(each.vault, each.verify(each.vault.stage(sealed(each)))) for each in desks]
        outcomes = commit(batch)
        for (vault, verified), outcome in zip(batch, outcomes, strict=True):
            assert not isinstance(outcome, Exception)
            assert outcome.path == vault.object_path(verified.staged.object_id)


def test_nothing_stays_open(desk: Desk) -> None:
    given = sealed(desk)
    before = open_descriptors()
    commit([(desk.vault, desk.verify(desk.vault.stage(given)))])
    assert open_descriptors() <= before


# -- when writing fails ------------------------------------------------------------------------


def test_an_object_whose_source_fails_leaves_nothing_behind(desk: Desk) -> None:
    def failing() -> Iterator[memoryview]:
        yield memoryview(b"half")
        raise OSError(5, "the source failed")

    given = sealed(desk)
    before = open_descriptors()
    with pytest.raises(OSError, match="the source failed"):
        desk.vault.stage(pieces(given, failing()))
    assert temporaries(desk.vault) == []
    assert open_descriptors() <= before
    desk.verify(desk.vault.stage(given))


def test_the_reserve_stays_free(desk: Desk) -> None:
    given = sealed(desk)
    for reserve in (Reserve(0.0, 1 << 62), Reserve(0.9999999, 0)):
        greedy = Vault(desk.vault.path, reserve)
        with pytest.raises(DiskFullError) as caught:
            greedy.stage(given)
        assert "min_free" in caught.value.hint
        assert temporaries(greedy) == []
    desk.verify(desk.vault.stage(given))


def test_space_that_is_promised_to_one_object_is_not_promised_to_another(desk: Desk) -> None:
    first, second = sealed(desk, "a.jpg"), sealed(desk, "b.jpg")
    usage = os.statvfs(desk.vault.path)
    most = usage.f_bavail * usage.f_frsize * 6 // 10
    refused = []

    def meanwhile() -> Iterator[memoryview]:
        yield memoryview(b"first")
        try:
            desk.vault.stage(pieces(second, iter([memoryview(b"second")]), most))
        except DiskFullError as error:
            refused.append(error)

    desk.vault.stage(pieces(first, meanwhile(), most))
    assert len(refused) == 1
    desk.vault.stage(pieces(second, iter([memoryview(b"second")]), most))


@pytest.mark.skipif(not can_mount(), reason="mounting takes root's privileges")
def test_a_full_disk_leaves_nothing_behind(desk: Desk, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    given = sealed(desk)
    with mounted_tmpfs(small, "1m"):
        vault = Vault(small / "vault", NO_RESERVE)
        vault.create(INFO)
        endless = (memoryview(bytes(65_536)) for _ in range(1_000))
        with pytest.raises(DiskFullError, match="is full"):
            vault.stage(pieces(given, endless, 1))
        assert temporaries(vault) == []
        staged = vault.stage(given)
        assert staged.path.stat().st_size == given.size


def test_a_vault_whose_directory_is_gone_fails_as_the_system_does(desk: Desk) -> None:
    given = sealed(desk)
    (desk.vault.path / "tmp").rmdir()
    with pytest.raises(FileNotFoundError):
        desk.vault.stage(given)


def test_nothing_is_written_where_the_vault_was_before_it_was_replaced(
    desk: Desk, tmp_path: Path
) -> None:
    given = sealed(desk)
    desk.vault.lock()
    desk.vault.path.rename(tmp_path / "unmounted")
    with pytest.raises(VaultGoneError):
        desk.vault.stage(given)
    Vault(desk.vault.path, NO_RESERVE).create(INFO)
    with pytest.raises(VaultGoneError):
        desk.vault.stage(given)
    assert temporaries(desk.vault) == []
    shutil.rmtree(desk.vault.path)
    (tmp_path / "unmounted").rename(desk.vault.path)
    desk.verify(desk.vault.stage(given))
    desk.vault.unlock()


def test_what_was_synced_in_a_vault_that_is_another_one_by_now_is_not_committed(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.vault.lock()
    verified = desk.verify(desk.vault.stage(sealed(desk)))
    sync_path = kernel.sync_path

    def replaced_meanwhile(directory: Path) -> None:
        monkeypatch.undo()
        desk.vault.path.rename(tmp_path / "unmounted")
        Vault(desk.vault.path, NO_RESERVE).create(INFO)
        sync_path(directory)

    monkeypatch.setattr(kernel, "sync_path", replaced_meanwhile)
    (outcome,) = commit([(desk.vault, verified)])
    assert isinstance(outcome, VaultGoneError)
    desk.vault.unlock()


def test_discarding_removes_a_temporary_object_and_never_a_committed_one(desk: Desk) -> None:
    desk.drop()
    committed = desk.committed(desk.job())
    staged = desk.vault.stage(sealed(desk, "b.jpg"))
    for object_id in (staged.object_id, staged.object_id, committed.verified.staged.object_id):
        desk.vault.discard(object_id)
    assert temporaries(desk.vault) == []
    assert committed.path.exists()


def test_at_start_everything_temporary_is_removed_and_counted(desk: Desk) -> None:
    desk.drop()
    committed = desk.committed(desk.job())
    desk.vault.stage(sealed(desk, "b.jpg"))
    (desk.vault.path / "tmp/stray").write_bytes(b"")
    assert desk.vault.discard_temporaries() == 2
    assert desk.vault.discard_temporaries() == 0
    assert committed.path.exists()


# -- listing -----------------------------------------------------------------------------------


def test_objects_are_listed_in_order_and_strangers_are_not(desk: Desk) -> None:
    ids = [ObjectId("f" * 32), ObjectId("0" * 32), new_id()]
    for object_id in ids:
        desk.vault.object_path(object_id).write_bytes(b"")
    shard = desk.vault.path / "objects/00"
    for stranger in ("README.simg", f"{'0' * 32}.txt", f"{'0' * 31}.simg"):
        (shard / stranger).write_bytes(b"")
    assert desk.vault.object_ids() == sorted(ids)
    assert desk.vault.has(ids[0])
    assert not desk.vault.has(ObjectId("1" * 32))


def test_an_object_lies_under_the_first_two_digits_of_its_id(desk: Desk) -> None:
    object_id = ObjectId("ab" + "0" * 30)
    path = desk.vault.object_path(object_id)
    assert path == desk.vault.path / "objects/ab" / f"{object_id}.simg"


def test_the_bytes_on_disk_show_neither_picture_nor_name(desk: Desk) -> None:
    desk.drop("a-telling-name.jpg")
    committed = desk.committed(desk.job("a-telling-name.jpg"))
    data = committed.path.read_bytes()
    for private in (b"telling", PICTURE, KEY.key):
        assert private not in data


def test_unlocking_twice_is_harmless(desk: Desk) -> None:
    desk.vault.lock()
    desk.vault.unlock()
    desk.vault.unlock()
    assert not desk.vault.is_locked


def test_what_a_dead_process_left_of_a_new_vault_file_is_no_hindrance() -> None:
    codecs.lookup("ascii")  # it may lie where only root can import it
    with ordinary_folder() as folder, without_privileges():
        vault = Vault(folder / "vault", NO_RESERVE)
        vault.create(INFO)
        left = vault.path / "vault.json.new"
        left.write_text("half")
        left.chmod(0o400)
        vault.write_info(INFO)
        assert vault.info() == INFO
        assert not left.exists()
