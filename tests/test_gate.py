"""A wrong key never seals, and never deletes, anything."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from path_builders import KEY, NO_RESERVE, tree

from secimg_watch import kernel
from secimg_watch.errors import (
    AlreadyRunningError,
    ConfigError,
    KeyMismatchError,
    NoInputError,
    RecoveryOpenError,
)
from secimg_watch.gate import (
    add_key,
    admit_keys,
    check_keys,
    confirm_recovery,
    forget_key,
    require_recovery,
)
from secimg_watch.recipients import generate_identity, recipient_of
from secimg_watch.records import KeyEncryptionKey, ObjectId
from secimg_watch.slots import key_check
from secimg_watch.vault import Vault, VaultInfo

if TYPE_CHECKING:
    from pathlib import Path

STRANGER = KeyEncryptionKey(b"o" * 16, KEY.key)
IMPOSTOR = KeyEncryptionKey(KEY.key_id, b"\x08" * 32)
NEW = KeyEncryptionKey(b"n" * 16, b"\x09" * 32)
ALICE, BOB = (recipient_of(generate_identity()) for _ in "ab")


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    return Vault(tmp_path / "vault", NO_RESERVE)


def test_the_first_key_makes_the_vault_and_is_its_key_from_then_on(vault: Vault) -> None:
    info = admit_keys(vault, [KEY])
    assert vault.info() == info
    assert info.checks == {KEY.key_id: key_check(KEY, info.vault_id)}
    assert len(info.vault_id) == 16
    assert admit_keys(vault, [KEY]) == info
    assert check_keys(vault, [KEY]) == info


def test_no_two_vaults_have_the_same_id(tmp_path: Path) -> None:
    ids = {admit_keys(Vault(tmp_path / name, NO_RESERVE), [KEY]).vault_id for name in "abc"}
    assert len(ids) == 3


def test_what_the_vault_stores_of_a_key_is_not_the_key_and_differs_between_vaults(
    tmp_path: Path,
) -> None:
    checks = set()
    for name in "ab":
        vault = Vault(tmp_path / name, NO_RESERVE)
        checks.add(admit_keys(vault, [KEY]).checks[KEY.key_id])
        assert KEY.key.hex() not in (vault.path / "vault.json").read_text()
    assert len(checks) == 2
    assert KEY.key not in checks


@pytest.mark.parametrize("wrong", [STRANGER, IMPOSTOR], ids=["unknown id", "known id, other key"])
def test_a_key_that_is_not_the_vaults_is_refused_and_changes_nothing(
    vault: Vault, wrong: KeyEncryptionKey
) -> None:
    admit_keys(vault, [KEY])
    before = (vault.path / "vault.json").read_bytes(), tree(vault.path)
    for gate in (admit_keys, check_keys):
        with pytest.raises(KeyMismatchError, match="nothing was encrypted or deleted") as caught:
            gate(vault, [wrong])
        assert "available again" in caught.value.hint
        assert wrong.key.hex() not in str(caught.value)
    assert ((vault.path / "vault.json").read_bytes(), tree(vault.path)) == before


def test_any_of_a_vaults_keys_is_admitted(vault: Vault) -> None:
    info = admit_keys(vault, [KEY])
    checks = {**info.checks, STRANGER.key_id: key_check(STRANGER, info.vault_id)}
    vault.write_info(VaultInfo(info.vault_id, checks))
    for key in (KEY, STRANGER):
        assert admit_keys(vault, [key]).checks == checks
    with pytest.raises(KeyMismatchError):
        admit_keys(vault, [IMPOSTOR])


def test_a_check_value_does_not_serve_in_another_vault(vault: Vault) -> None:
    info = admit_keys(vault, [KEY])
    vault.write_info(VaultInfo(b"w" * 16, info.checks))
    with pytest.raises(KeyMismatchError):
        check_keys(vault, [KEY])


def test_checking_a_key_makes_no_vault(vault: Vault) -> None:
    with pytest.raises(NoInputError):
        check_keys(vault, [KEY])
    assert not vault.path.exists()


def test_a_vault_that_lost_its_file_is_not_made_anew_over_its_objects(vault: Vault) -> None:
    admit_keys(vault, [KEY])
    vault.object_path(ObjectId("ab" * 16)).write_bytes(b"an object")
    (vault.path / "vault.json").unlink()
    with pytest.raises(KeyMismatchError, match=r"lost its vault\.json") as caught:
        admit_keys(vault, [KEY])
    assert "backup" in caught.value.hint
    assert not vault.exists()


def test_an_empty_vault_that_lost_its_file_is_made_anew(vault: Vault) -> None:
    admit_keys(vault, [KEY])
    (vault.path / "vault.json").unlink()
    admit_keys(vault, [IMPOSTOR])
    check_keys(vault, [IMPOSTOR])


def test_a_damaged_vault_file_admits_nobody_and_is_not_replaced(vault: Vault) -> None:
    admit_keys(vault, [KEY])
    (vault.path / "vault.json").write_bytes(b"{")
    with pytest.raises(ConfigError, match="damaged"):
        admit_keys(vault, [KEY])
    assert (vault.path / "vault.json").read_bytes() == b"{"


# -- more than one key ---------------------------------------------------------------------------


def test_a_new_vault_knows_every_key_it_is_made_with(vault: Vault) -> None:
    info = admit_keys(vault, [NEW, KEY])
    assert info.checks.keys() == {NEW.key_id, KEY.key_id}
    for ring in ([NEW, KEY], [KEY, NEW], [NEW], [KEY]):
        assert check_keys(vault, ring) == info


def test_of_former_keys_the_vault_may_have_forgotten_some(vault: Vault) -> None:
    info = admit_keys(vault, [KEY])
    assert check_keys(vault, [KEY, STRANGER, NEW]) == info
    assert admit_keys(vault, [KEY, STRANGER]).checks.keys() == {KEY.key_id}


def test_the_current_key_has_to_be_known_whatever_stands_behind_it(vault: Vault) -> None:
    admit_keys(vault, [KEY])
    for gate in (admit_keys, check_keys):
        with pytest.raises(KeyMismatchError, match=f"key {NEW.key_id.hex()[:8]} is not one of"):
            gate(vault, [NEW, KEY])


def test_a_former_key_with_another_value_than_the_vault_knows_is_refused(vault: Vault) -> None:
    admit_keys(vault, [KEY])
    add_key(vault, NEW)
    with pytest.raises(KeyMismatchError, match="has the id but not the value") as caught:
        check_keys(vault, [NEW, IMPOSTOR])
    assert "available again" in caught.value.hint


def test_a_key_is_added_and_forgotten_without_touching_the_rest(vault: Vault) -> None:
    before = admit_keys(vault, [KEY])
    confirm_recovery(vault, ALICE)
    add_key(vault, NEW)
    check_keys(vault, [NEW, KEY])
    forget_key(vault, KEY.key_id)
    after = vault.info()
    assert after.checks.keys() == {NEW.key_id}
    assert after.vault_id == before.vault_id
    assert after.recovery == {ALICE.key_id}
    with pytest.raises(KeyMismatchError):
        check_keys(vault, [KEY])


def test_nobody_changes_the_vaults_file_at_the_same_time(vault: Vault) -> None:
    admit_keys(vault, [KEY])
    before = (vault.path / "vault.json").read_bytes()
    held = kernel.lock_exclusively(vault.path / "vault.json.lock")
    assert held is not None
    with pytest.raises(AlreadyRunningError):
        add_key(vault, NEW)
    with pytest.raises(AlreadyRunningError):
        confirm_recovery(vault, ALICE)
    assert (vault.path / "vault.json").read_bytes() == before
    os.close(held)
    add_key(vault, NEW)


# -- no key at all -------------------------------------------------------------------------------


def test_a_write_only_vault_is_made_without_a_key(vault: Vault) -> None:
    info = admit_keys(vault, [])
    assert info.checks == {}
    assert admit_keys(vault, []) == check_keys(vault, []) == info


def test_without_a_key_there_is_none_that_could_be_wrong(vault: Vault) -> None:
    info = admit_keys(vault, [KEY])
    assert admit_keys(vault, []) == check_keys(vault, []) == info


def test_a_vault_that_was_write_only_takes_the_first_key_in(vault: Vault) -> None:
    vault_id = admit_keys(vault, []).vault_id
    with pytest.raises(KeyMismatchError, match="none"):
        check_keys(vault, [KEY])
    info = admit_keys(vault, [KEY])
    assert info.vault_id == vault_id
    assert info.checks.keys() == {KEY.key_id}
    with pytest.raises(KeyMismatchError):
        admit_keys(vault, [NEW])


def test_a_vault_that_lost_its_file_is_not_made_anew_without_a_key_either(vault: Vault) -> None:
    admit_keys(vault, [])
    vault.object_path(ObjectId("ab" * 16)).write_bytes(b"an object")
    (vault.path / "vault.json").unlink()
    with pytest.raises(KeyMismatchError, match=r"lost its vault\.json"):
        admit_keys(vault, [])


# -- recovery ------------------------------------------------------------------------------------


def test_without_a_recipient_deletion_is_refused_and_the_way_out_named(vault: Vault) -> None:
    info = admit_keys(vault, [KEY])
    with pytest.raises(RecoveryOpenError, match="so nothing is deleted") as caught:
        require_recovery(vault, info, [])
    assert str(vault.path) in str(caught.value)
    assert "key recovery make" in caught.value.hint
    assert "recovery: declined" in caught.value.hint


def test_a_recipient_counts_only_once_its_private_key_was_shown(vault: Vault) -> None:
    info = admit_keys(vault, [KEY])
    with pytest.raises(RecoveryOpenError) as caught:
        require_recovery(vault, info, [ALICE, BOB])
    assert "key recovery confirm" in caught.value.hint
    confirm_recovery(vault, BOB)
    confirm_recovery(vault, BOB)
    assert vault.info().recovery == {BOB.key_id}
    require_recovery(vault, vault.info(), [ALICE, BOB])


def test_who_was_confirmed_and_is_not_in_the_policy_any_more_does_not_count(vault: Vault) -> None:
    admit_keys(vault, [KEY])
    confirm_recovery(vault, ALICE)
    for recipients in ([], [BOB]):
        with pytest.raises(RecoveryOpenError):
            require_recovery(vault, vault.info(), recipients)


def test_a_vaults_file_of_before_there_was_recovery_is_read_as_unconfirmed(vault: Vault) -> None:
    admit_keys(vault, [KEY])
    assert "recovery" not in (vault.path / "vault.json").read_text()
    assert vault.info().recovery == frozenset()


@pytest.mark.parametrize("ids", ['"00"', "7", '["00"]', '["zz"]', "[7]", '{"a": 1}'])
def test_a_damaged_list_of_confirmed_recipients_is_a_damaged_file(vault: Vault, ids: str) -> None:
    admit_keys(vault, [KEY])
    path = vault.path / "vault.json"
    path.write_text(path.read_text().replace('"keys"', f'"recovery": {ids}, "keys"'))
    with pytest.raises(ConfigError, match="damaged"):
        vault.info()
