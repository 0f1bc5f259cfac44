"""A wrong key never seals, and never deletes, anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from path_builders import KEY, NO_RESERVE, tree

from secimg_watch.errors import ConfigError, KeyMismatchError, NoInputError
from secimg_watch.gate import admit_key, check_key
from secimg_watch.records import KeyEncryptionKey, ObjectId
from secimg_watch.slots import key_check
from secimg_watch.vault import Vault, VaultInfo

if TYPE_CHECKING:
    from pathlib import Path

STRANGER = KeyEncryptionKey(b"o" * 16, KEY.key)
IMPOSTOR = KeyEncryptionKey(KEY.key_id, b"\x08" * 32)


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    return Vault(tmp_path / "vault", NO_RESERVE)


def test_the_first_key_makes_the_vault_and_is_its_key_from_then_on(vault: Vault) -> None:
    info = admit_key(vault, KEY)
    assert vault.info() == info
    assert info.checks == {KEY.key_id: key_check(KEY, info.vault_id)}
    assert len(info.vault_id) == 16
    assert admit_key(vault, KEY) == info
    assert check_key(vault, KEY) == info


def test_no_two_vaults_have_the_same_id(tmp_path: Path) -> None:
    ids = {admit_key(Vault(tmp_path / name, NO_RESERVE), KEY).vault_id for name in "abc"}
    assert len(ids) == 3


def test_what_the_vault_stores_of_a_key_is_not_the_key_and_differs_between_vaults(
    tmp_path: Path,
) -> None:
    checks = set()
    for name in "ab":
        vault = Vault(tmp_path / name, NO_RESERVE)
        checks.add(admit_key(vault, KEY).checks[KEY.key_id])
        assert KEY.key.hex() not in (vault.path / "vault.json").read_text()
    assert len(checks) == 2
    assert KEY.key not in checks


@pytest.mark.parametrize("wrong", [STRANGER, IMPOSTOR], ids=["unknown id", "known id, other key"])
def test_a_key_that_is_not_the_vaults_is_refused_and_changes_nothing(
    vault: Vault, wrong: KeyEncryptionKey
) -> None:
    admit_key(vault, KEY)
    before = (vault.path / "vault.json").read_bytes(), tree(vault.path)
    for gate in (admit_key, check_key):
        with pytest.raises(KeyMismatchError, match="nothing was encrypted or deleted") as caught:
            gate(vault, wrong)
        assert "available again" in caught.value.hint
        assert wrong.key.hex() not in str(caught.value)
    assert ((vault.path / "vault.json").read_bytes(), tree(vault.path)) == before


def test_any_of_a_vaults_keys_is_admitted(vault: Vault) -> None:
    info = admit_key(vault, KEY)
    checks = {**info.checks, STRANGER.key_id: key_check(STRANGER, info.vault_id)}
    vault.write_info(VaultInfo(info.vault_id, checks))
    for key in (KEY, STRANGER):
        assert admit_key(vault, key).checks == checks
    with pytest.raises(KeyMismatchError):
        admit_key(vault, IMPOSTOR)


def test_a_check_value_does_not_serve_in_another_vault(vault: Vault) -> None:
    info = admit_key(vault, KEY)
    vault.write_info(VaultInfo(b"w" * 16, info.checks))
    with pytest.raises(KeyMismatchError):
        check_key(vault, KEY)


def test_checking_a_key_makes_no_vault(vault: Vault) -> None:
    with pytest.raises(NoInputError):
        check_key(vault, KEY)
    assert not vault.path.exists()


def test_a_vault_that_lost_its_file_is_not_made_anew_over_its_objects(vault: Vault) -> None:
    admit_key(vault, KEY)
    vault.object_path(ObjectId("ab" * 16)).write_bytes(b"an object")
    (vault.path / "vault.json").unlink()
    with pytest.raises(KeyMismatchError, match=r"lost its vault\.json") as caught:
        admit_key(vault, KEY)
    assert "backup" in caught.value.hint
    assert not vault.exists()


def test_an_empty_vault_that_lost_its_file_is_made_anew(vault: Vault) -> None:
    admit_key(vault, KEY)
    (vault.path / "vault.json").unlink()
    admit_key(vault, IMPOSTOR)
    check_key(vault, IMPOSTOR)


def test_a_damaged_vault_file_admits_nobody_and_is_not_replaced(vault: Vault) -> None:
    admit_key(vault, KEY)
    (vault.path / "vault.json").write_bytes(b"{")
    with pytest.raises(ConfigError, match="damaged"):
        admit_key(vault, KEY)
    assert (vault.path / "vault.json").read_bytes() == b"{"
