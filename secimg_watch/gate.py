"""The keys at the gate of a vault: a wrong one never seals, and never deletes, anything."""

from __future__ import annotations

import hmac
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from secimg_watch.errors import KeyMismatchError, RecoveryOpenError
from secimg_watch.slots import key_check
from secimg_watch.vault import Vault, VaultInfo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from secimg_watch.records import KeyEncryptionKey, Recipient


def admit_keys(vault: Vault, ring: Sequence[KeyEncryptionKey]) -> VaultInfo:
    """Check keys against a vault's list; a vault that does not exist yet is made with them.

    A vault that was write-only so far, and knows no key, takes them in.

    Raises:
        KeyMismatchError: the vault does not know the current key's id, or another key by it.
        ConfigError: the vault's file is damaged.
        CannotCreateError: the vault cannot be made.
    """
    if not vault.exists():
        _refuse_orphans(vault)
        vault_id = os.urandom(16)
        vault.create(VaultInfo(vault_id, {key.key_id: key_check(key, vault_id) for key in ring}))
    elif ring and not vault.info().checks:
        add_key(vault, ring[0])
    return check_keys(vault, ring)


def add_key(vault: Vault, key: KeyEncryptionKey) -> None:
    """Let a vault know one more key."""
    vault.edit_info(
        lambda info: replace(
            info, checks={**info.checks, key.key_id: key_check(key, info.vault_id)}
        )
    )


def forget_key(vault: Vault, key_id: bytes) -> None:
    """Let a vault know a key no longer. No object may need it."""
    vault.edit_info(
        lambda info: replace(
            info, checks={each: check for each, check in info.checks.items() if each != key_id}
        )
    )


def check_keys(vault: Vault, ring: Sequence[KeyEncryptionKey]) -> VaultInfo:
    """Check keys, the current one first, against a vault's list.

    Of former keys the vault may have forgotten some; the current one it has to know. With no
    keys at all, as a write-only vault has it, everything fits.

    Raises:
        NoInputError: there is no vault.
        KeyMismatchError: the vault does not know the current key's id, or another key by it.
        ConfigError: the vault's file is damaged.
    """
    info = vault.info()
    for place, key in enumerate(ring):
        known = info.checks.get(key.key_id)
        shown = f"key {key.key_id.hex()[:8]}"
        if known is None and place == 0:
            ids = ", ".join(key_id.hex()[:8] for key_id in info.checks) or "none"
            raise _wrong_key(f"{shown} is not one of vault {vault.path} ({ids})")
        if known is not None and not hmac.compare_digest(known, key_check(key, info.vault_id)):
            raise _wrong_key(f"{shown} has the id but not the value that vault {vault.path} knows")
    return info


def _wrong_key(what: str) -> KeyMismatchError:
    return KeyMismatchError(
        f"{what}; nothing was encrypted or deleted",
        hint="make the key that this vault was made with available again",
    )


def require_recovery(vault: Vault, info: VaultInfo, recipients: Sequence[Recipient]) -> None:
    """Refuse to delete plaintext for which there is no proven way back but one key.

    Raises:
        RecoveryOpenError: no private key of any of these recipients was shown to exist.
    """
    if info.recovery.isdisjoint(recipient.key_id for recipient in recipients):
        made = bool(recipients)
        raise RecoveryOpenError(
            f"vault {vault.path} has no confirmed recovery key, so nothing is deleted",
            hint="confirm it with: secimg-watch key recovery confirm --identity FILE"
            if made
            else "make one with: secimg-watch key recovery make --output FILE;"
            " or write 'recovery: declined' into the policy",
        )


def confirm_recovery(vault: Vault, recipient: Recipient) -> None:
    """Note that somebody showed a recipient's private key."""
    vault.edit_info(lambda info: replace(info, recovery=info.recovery | {recipient.key_id}))


def _refuse_orphans(vault: Vault) -> None:
    if any(vault.path.glob("objects/??/*.simg")):
        raise KeyMismatchError(
            f"the vault {vault.path} holds objects and lost its vault.json;"
            " nothing was encrypted or deleted",
            hint="restore vault.json from a backup",
        )
