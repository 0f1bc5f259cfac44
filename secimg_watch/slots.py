"""Key slots: the file key of an object, wrapped once for every key that opens it.

A slot is wrapped with a single-use key, expanded from the key-encryption key, the slot's own
salt and parameters, and the object's core. It cannot be moved to another object, and a
commitment ties it to one key-encryption key: no slot opens under two keys, and no series of
guesses learns anything from a damaged one.

A recipient's slot carries a root key of its own, sealed to the public key by HPKE, which stands
where the other slots have the key-encryption key.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from secimg_watch import crypto
from secimg_watch.container import (
    ID_SIZE,
    PBKDF2_ITERATIONS,
    SLOT_TAIL,
    Argon2idSlot,
    KeyringSlot,
    PasswordSlot,
    Pbkdf2Slot,
    RecipientSlot,
    Slot,
    Wrap,
    argon2id_allowed,
    recipient_slot_head,
)
from secimg_watch.errors import UsageError
from secimg_watch.records import KeyEncryptionKey, PrivateKey, Recipient

if TYPE_CHECKING:
    from secimg_watch.container import Core

SALT_SIZE: Final = 32

DEFAULT_MEMORY_KIB: Final = 256 * 1024
DEFAULT_PASSES: Final = 3
DEFAULT_LANES: Final = 4
DEFAULT_PBKDF2_ITERATIONS: Final = 600_000
"""OWASP's minimum for PBKDF2-HMAC-SHA256 (Password Storage Cheat Sheet, 2026)."""

_SLOT_LABEL: Final = b"secimg-watch/v1/slot\0"
_RECIPIENT_LABEL: Final = b"secimg-watch/v1/recipient-slot\0"
_CHECK_LABEL: Final = b"secimg-watch/v1/key-check\0"


def _fresh_key_id() -> bytes:
    return crypto.random_bytes(ID_SIZE)


def _fresh_salt() -> bytes:
    return crypto.random_bytes(SALT_SIZE)


@dataclass(frozen=True, slots=True)
class Password:
    """A password as a lock, and what deriving a key from it costs when sealing.

    ``memory_kib``, ``passes`` and ``lanes`` count for Argon2id (the default: 256 MiB, 3, 4,
    above RFC 9106's second recommendation), ``iterations`` for PBKDF2-HMAC-SHA256. For
    opening, only ``secret`` counts: the slot brings its own parameters.

    ``key_id`` and ``salt`` name and salt the password in every object that is sealed with
    this same instance, so that a ``PasswordCache`` derives once for all of them.

    Raises:
        UsageError: the password is empty, or the cost is not one that readers accept.
    """

    secret: bytes = field(repr=False)
    kdf: Literal["argon2id", "pbkdf2"] = "argon2id"
    memory_kib: int = DEFAULT_MEMORY_KIB
    passes: int = DEFAULT_PASSES
    lanes: int = DEFAULT_LANES
    iterations: int = DEFAULT_PBKDF2_ITERATIONS
    key_id: bytes = field(default_factory=_fresh_key_id)
    salt: bytes = field(default_factory=_fresh_salt, repr=False)

    def __post_init__(self) -> None:
        """Refuse at once what no reader would take."""
        if not self.secret:
            raise UsageError("the password is empty")
        if len(self.key_id) != ID_SIZE or len(self.salt) != SALT_SIZE:
            raise UsageError("a password has a key id of 16 bytes and a salt of 32")
        if not argon2id_allowed(self.memory_kib, self.passes, self.lanes):
            raise UsageError(
                "the cost of Argon2id is out of bounds",
                hint="8 MiB to 1 GiB of memory, 1 to 16 passes, 1 to 16 lanes",
            )
        if self.iterations not in PBKDF2_ITERATIONS:
            raise UsageError(
                "the number of PBKDF2 iterations is out of bounds",
                hint=f"{PBKDF2_ITERATIONS[0]} to {PBKDF2_ITERATIONS[-1]}",
            )


Lock: TypeAlias = KeyEncryptionKey | Password | Recipient
"""What an object is sealed with: each lock gets a slot."""

Opener: TypeAlias = KeyEncryptionKey | Password | PrivateKey
"""What opens an object that has a slot for it."""


def encode_password(password: str | bytes) -> bytes:
    """Return the bytes of a password: text as UTF-8 in normal form C, bytes as they are.

    One and the same password typed on two systems can arrive composed or decomposed; the
    normal form (Unicode Annex 15) makes them equal.

    Raises:
        UsageError: it is empty, or text that UTF-8 cannot express.
    """
    if not password:
        raise UsageError("the password is empty")
    if isinstance(password, bytes):
        return password
    try:
        return unicodedata.normalize("NFC", password).encode()
    except UnicodeEncodeError:
        raise UsageError("the password is not valid Unicode text") from None


class PasswordCache:
    """Remembers keys derived from passwords, so that many objects cost one derivation.

    Keep one for a run over many objects, and drop it with the run.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._keys: dict[tuple[bytes | int, ...], bytes] = {}

    def derive(self, secret: bytes, slot: PasswordSlot) -> bytes:
        """Return the key-encryption key for a password and a slot's salt and cost.

        Raises:
            NotReadyError: there is not enough free memory for Argon2id.
        """
        if isinstance(slot, Argon2idSlot):
            cost: tuple[int, ...] = (slot.memory_kib, slot.iterations, slot.lanes)
        else:
            cost = (slot.iterations,)
        known: tuple[bytes | int, ...] = (secret, slot.password_salt, *cost)
        if known not in self._keys:
            self._keys[known] = _derive(secret, slot)
        return self._keys[known]


def _derive(secret: bytes, slot: PasswordSlot) -> bytes:
    if isinstance(slot, Pbkdf2Slot):
        return crypto.pbkdf2(secret, slot.password_salt, slot.iterations)
    return crypto.argon2id(
        secret,
        slot.password_salt,
        memory_kib=slot.memory_kib,
        iterations=slot.iterations,
        lanes=slot.lanes,
    )


def make_slot(lock: Lock, file_key: bytes, core: Core, passwords: PasswordCache) -> Slot:
    """Wrap a file key (32 bytes) so that ``lock`` opens it, for the object of ``core`` alone.

    Raises:
        UsageError: a key-encryption key, or its id, has the wrong length.
        NotReadyError: there is not enough free memory for Argon2id.
    """
    draft, root_key = _draft(lock, core, passwords)
    wrapping_key, commitment = _expand(root_key, draft, core)
    wrapped = crypto.wrap_key(wrapping_key, file_key)
    return replace(draft, wrap=Wrap(draft.wrap.salt, commitment, wrapped))


def _draft(lock: Lock, core: Core, passwords: PasswordCache) -> tuple[Slot, bytes]:
    """Return a slot that wraps nothing yet, and its root key."""
    wrap = Wrap(_fresh_salt(), bytes(32), bytes(crypto.WRAPPED_KEY_SIZE))
    if isinstance(lock, KeyEncryptionKey):
        return KeyringSlot(lock.key_id, wrap), _checked(lock).key
    if isinstance(lock, Recipient):
        root_key = crypto.random_bytes(crypto.KEY_SIZE)
        sealed = crypto.hpke_seal(lock.public_key, _hpke_info(lock.key_id, core), root_key)
        return RecipientSlot(lock.key_id, sealed, wrap), root_key
    slot: PasswordSlot
    if lock.kdf == "pbkdf2":
        slot = Pbkdf2Slot(lock.key_id, lock.iterations, lock.salt, wrap)
    else:
        cost = (lock.memory_kib, lock.passes, lock.lanes)
        slot = Argon2idSlot(lock.key_id, *cost, lock.salt, wrap)
    return slot, passwords.derive(lock.secret, slot)


def open_slot(slot: Slot, opener: Opener, core: Core, passwords: PasswordCache) -> bytes:
    """Return the file key (32 bytes) out of a slot that ``fits`` the opener.

    Raises:
        TamperedError: the key or password is wrong, or slot or core are damaged.
        NotReadyError: there is not enough free memory for Argon2id.
    """
    root_key = _root_key(slot, opener, core, passwords)
    wrapping_key, commitment = _expand(root_key, slot, core)
    # Before the unwrapping: GCM alone can be made to open one ciphertext under two keys.
    if not crypto.equal(commitment, slot.wrap.commitment):
        raise crypto.unauthentic()
    return crypto.unwrap_key(wrapping_key, slot.wrap.wrapped)


def fits(slot: Slot, opener: Opener) -> bool:
    """Whether it makes sense to try: the key that the slot names, or a password for one."""
    match opener:
        case KeyEncryptionKey():
            return isinstance(slot, KeyringSlot) and slot.key_id == opener.key_id
        case PrivateKey():
            return isinstance(slot, RecipientSlot) and slot.key_id == opener.key_id
        case Password():
            return isinstance(slot, PasswordSlot)


def _root_key(slot: Slot, opener: Opener, core: Core, passwords: PasswordCache) -> bytes:
    match slot, opener:
        case KeyringSlot(), KeyEncryptionKey():
            return _checked(opener).key
        case RecipientSlot(), PrivateKey():
            info = _hpke_info(slot.key_id, core)
            return crypto.hpke_open(opener.seed, info, slot.sealed_root)
        case ((Argon2idSlot() | Pbkdf2Slot()), Password()):
            return passwords.derive(opener.secret, slot)
        case _:
            raise UsageError("a slot opens with a key or password of its own kind only")


def _hpke_info(key_id: bytes, core: Core) -> bytes:
    return _RECIPIENT_LABEL + recipient_slot_head(key_id) + core.pack()


def _expand(root_key: bytes, slot: Slot, core: Core) -> tuple[bytes, bytes]:
    """Return the slot's wrapping key and commitment.

    Every part of ``info`` has a fixed length for its slot type, and the type stands first,
    so that no two slots have the same one.
    """
    info = _SLOT_LABEL + slot.pack()[:-SLOT_TAIL] + core.pack()
    expanded = crypto.hkdf_expand(root_key, info, 64)
    return expanded[:32], expanded[32:]


def _checked(kek: KeyEncryptionKey) -> KeyEncryptionKey:
    if len(kek.key) != crypto.KEY_SIZE or len(kek.key_id) != ID_SIZE:
        raise UsageError("a key-encryption key has 32 bytes, and its id 16")
    return kek


def key_check(kek: KeyEncryptionKey, vault_id: bytes) -> bytes:
    """Return the 32 bytes by which a vault (id: 16 bytes) recognises its key.

    They say nothing of the key, and differ from vault to vault.

    Raises:
        UsageError: the key, its id or the vault's id has the wrong length.
    """
    if len(vault_id) != ID_SIZE:
        raise UsageError(f"a vault id has {ID_SIZE} bytes")
    info = _CHECK_LABEL + vault_id + kek.key_id
    return crypto.hkdf_expand(_checked(kek).key, info, 32)
