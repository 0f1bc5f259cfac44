"""The key at the gate of a vault: a wrong one never seals, and never deletes, anything."""

from __future__ import annotations

import hmac
import os
from typing import TYPE_CHECKING

from secimg_watch.errors import KeyMismatchError
from secimg_watch.slots import key_check
from secimg_watch.vault import Vault, VaultInfo

if TYPE_CHECKING:
    from secimg_watch.records import KeyEncryptionKey


def admit_key(vault: Vault, key: KeyEncryptionKey) -> VaultInfo:
    """Check a key against a vault's list; a vault that does not exist yet is made with it.

    Raises:
        KeyMismatchError: the vault does not know the key's id, or knows another key by it.
        ConfigError: the vault's file is damaged.
        CannotCreateError: the vault cannot be made.
    """
    if not vault.exists():
        _refuse_orphans(vault)
        vault_id = os.urandom(16)
        vault.create(VaultInfo(vault_id, {key.key_id: key_check(key, vault_id)}))
    return check_key(vault, key)


def check_key(vault: Vault, key: KeyEncryptionKey) -> VaultInfo:
    """Check a key against a vault's list.

    Raises:
        NoInputError: there is no vault.
        KeyMismatchError: the vault does not know the key's id, or knows another key by it.
        ConfigError: the vault's file is damaged.
    """
    info = vault.info()
    known = info.checks.get(key.key_id)
    if known is None:
        ids = ", ".join(key_id.hex()[:8] for key_id in info.checks)
        raise KeyMismatchError(
            f"key {key.key_id.hex()[:8]} is not one of vault {vault.path} ({ids});"
            " nothing was encrypted or deleted",
            hint="make the key that this vault was made with available again",
        )
    if not hmac.compare_digest(known, key_check(key, info.vault_id)):
        raise KeyMismatchError(
            f"key {key.key_id.hex()[:8]} has the id but not the value that vault {vault.path}"
            " knows; nothing was encrypted or deleted",
            hint="make the key that this vault was made with available again",
        )
    return info


def _refuse_orphans(vault: Vault) -> None:
    if any(vault.path.glob("objects/??/*.simg")):
        raise KeyMismatchError(
            f"the vault {vault.path} holds objects and lost its vault.json;"
            " nothing was encrypted or deleted",
            hint="restore vault.json from a backup",
        )
