"""The only door to ``cryptography``: each primitive in use, with one way to call it.

Nothing of the library's own errors leaves this module. Whatever does not authenticate
raises ``TamperedError`` with one and the same message, whichever check it was.
"""

from __future__ import annotations

import hashlib
import os
from typing import Final, TypeAlias

from cryptography import exceptions
from cryptography.cobblestone import Cobblestone256Decryptor, Cobblestone256Encryptor
from cryptography.hazmat.primitives import constant_time, hashes, hmac, hpke
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC

from secimg_watch.errors import NotReadyError, TamperedError

Buffer: TypeAlias = bytes | bytearray | memoryview
"""What is accepted as a run of bytes."""

MessageEncryptor: TypeAlias = Cobblestone256Encryptor
"""``update_into(data, buffer) -> int`` and ``finalize() -> bytes``; see ``encryption_room``."""

KEY_SIZE: Final = 32
"""Bytes in every symmetric key of this package."""

WRAPPED_KEY_SIZE: Final = KEY_SIZE + 16
"""Bytes in a wrapped key: the key and a GCM tag."""

GCM_IV_SIZE: Final = 12
"""Bytes in a GCM nonce, the one length that SP 800-38D recommends."""

GCM_TAG_SIZE: Final = 16
"""Bytes in a GCM tag."""

GCM_MAX_DATA: Final = 2**31 - 1 - GCM_TAG_SIZE
"""Most bytes ``gcm_encrypt`` takes: the library's limit for one call, less the tag."""

PUBLIC_KEY_SIZE: Final = 1184 + 32
"""Bytes in a recipient's public key: ML-KEM-768 encapsulation key and X25519 public key."""

HPKE_SIZE: Final = 1088 + 32 + WRAPPED_KEY_SIZE
"""Bytes in a key sealed to a recipient: ML-KEM-768 ciphertext, X25519 share, and the key."""

UNAUTHENTIC: Final = "the data does not authenticate: wrong key or password, or damaged"
"""The message of every cryptographic failure."""

_MLKEM_PUBLIC_SIZE: Final = 1184
_MLKEM_SEED_SIZE: Final = 64
_HPKE: Final = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
_CHUNK: Final = 16_384
_SINGLE_USE_NONCE: Final = bytes(GCM_IV_SIZE)


def unauthentic() -> TamperedError:
    """Make the one error that stands for every cryptographic failure."""
    return TamperedError(UNAUTHENTIC, hint="try another key or password, or another copy")


def random_bytes(count: int) -> bytes:
    """Return ``count`` bytes from the operating system's generator."""
    return os.urandom(count)


def equal(left: Buffer, right: Buffer) -> bool:
    """Compare two runs of bytes in a time that depends on their lengths alone."""
    return constant_time.bytes_eq(bytes(left), bytes(right))


def hkdf_expand(key: bytes, info: bytes, length: int) -> bytes:
    """Derive ``length`` bytes by HKDF-Expand with SHA-512 (RFC 5869, section 2.3).

    There is no extract step: ``key`` has to be uniformly random already, which is what
    section 3.3 of the RFC asks for before the step is left out.
    """
    return HKDFExpand(hashes.SHA512(), length, info).derive(key)


def sha256(data: bytes) -> bytes:
    """Return the SHA-256 of ``data``: 32 bytes."""
    return hashlib.sha256(data).digest()


def header_mac(key: bytes, data: bytes) -> bytes:
    """Return HMAC-SHA-256 of ``data``: 32 bytes as they come, so nothing is truncated."""
    mac = hmac.HMAC(key, hashes.SHA256())
    mac.update(data)
    return mac.finalize()


def check_header_mac(key: bytes, data: bytes, mac: bytes) -> None:
    """Compare ``mac`` with the one of ``data``, in constant time.

    Raises:
        TamperedError: they differ.
    """
    if not equal(header_mac(key, data), mac):
        raise unauthentic()


def wrap_key(single_use_key: bytes, key: bytes) -> bytes:
    """Encrypt a 32-byte ``key`` by AES-256-GCM with a nonce of zeros; 48 bytes come out.

    A GCM nonce must not repeat under one key. ``single_use_key`` has to be derived from a
    fresh 256-bit salt for this one call, so that there is no second nonce to differ from.
    """
    return AESGCM(single_use_key).encrypt(_SINGLE_USE_NONCE, key, None)


def unwrap_key(single_use_key: bytes, wrapped: bytes) -> bytes:
    """Reverse ``wrap_key``.

    Raises:
        TamperedError: ``wrapped`` was not made with this key.
    """
    try:
        return AESGCM(single_use_key).decrypt(_SINGLE_USE_NONCE, wrapped, None)
    except exceptions.InvalidTag:
        raise unauthentic() from None


def recipient_public_key(seed: bytes) -> bytes:
    """Return the public key (``PUBLIC_KEY_SIZE`` bytes) that belongs to a seed of 32 bytes."""
    mlkem, x25519 = _expand_seed(seed)
    return mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()


def _expand_seed(seed: bytes) -> tuple[MLKEM768PrivateKey, X25519PrivateKey]:
    """Expand a private key as X-Wing does (draft-connolly-cfrg-xwing-kem, section 5.2)."""
    expanded = hashlib.shake_256(seed).digest(_MLKEM_SEED_SIZE + KEY_SIZE)
    return (
        MLKEM768PrivateKey.from_seed_bytes(expanded[:_MLKEM_SEED_SIZE]),
        X25519PrivateKey.from_private_bytes(expanded[_MLKEM_SEED_SIZE:]),
    )


def check_public_key(public_key: bytes) -> None:
    """Refuse what cannot be a recipient's public key, by sealing something to it.

    Raises:
        ValueError: its length is wrong, or one of its two parts is not a key.
    """
    hpke_seal(public_key, b"", bytes(KEY_SIZE))


def _public_key(public_key: bytes) -> hpke.MLKEM768X25519PublicKey:
    mlkem = MLKEM768PublicKey.from_public_bytes(public_key[:_MLKEM_PUBLIC_SIZE])
    x25519 = X25519PublicKey.from_public_bytes(public_key[_MLKEM_PUBLIC_SIZE:])
    return hpke.MLKEM768X25519PublicKey(mlkem, x25519)


def hpke_seal(public_key: bytes, info: bytes, key: bytes) -> bytes:
    """Seal a 32-byte ``key`` to a recipient; ``HPKE_SIZE`` bytes come out.

    HPKE (RFC 9180) in base mode with MLKEM768-X25519, HKDF-SHA256 and AES-256-GCM. Base mode
    says nothing of who sealed.

    Raises:
        ValueError: those bytes are not a public key.
    """
    return _HPKE.encrypt(key, _public_key(public_key), info=info)


def hpke_open(seed: bytes, info: bytes, sealed: bytes) -> bytes:
    """Reverse ``hpke_seal`` with the recipient's private key, a seed of 32 bytes.

    Raises:
        TamperedError: ``sealed`` was not made for this key and ``info``.
    """
    private_key = hpke.MLKEM768X25519PrivateKey(*_expand_seed(seed))
    try:
        return _HPKE.decrypt(sealed, private_key, info=info)
    except exceptions.InvalidTag:
        raise unauthentic() from None


def argon2id(
    password: bytes, salt: bytes, *, memory_kib: int, iterations: int, lanes: int
) -> bytes:
    """Derive 32 bytes from a password by Argon2id (RFC 9106).

    Raises:
        NotReadyError: there is not enough free memory now.
    """
    kdf = Argon2id(
        salt=salt, length=KEY_SIZE, iterations=iterations, lanes=lanes, memory_cost=memory_kib
    )
    try:
        return kdf.derive(password)
    except MemoryError:
        message = f"{memory_kib} KiB of memory, needed to check the password, are not free"
        raise NotReadyError(message, hint="close other programs and try again") from None


def pbkdf2(password: bytes, salt: bytes, iterations: int) -> bytes:
    """Derive 32 bytes from a password by PBKDF2-HMAC-SHA256 (RFC 8018)."""
    return PBKDF2HMAC(hashes.SHA256(), KEY_SIZE, salt, iterations).derive(password)


def gcm_encrypt(key: bytes, iv: bytes, data: Buffer) -> tuple[bytes, bytes]:
    """Encrypt by AES-256-GCM; return the ciphertext, as long as ``data``, and the tag.

    ``iv`` has ``GCM_IV_SIZE`` bytes and must never be used twice with one key. ``data`` has
    at most ``GCM_MAX_DATA`` bytes.
    """
    sealed = AESGCM(key).encrypt(iv, data, None)
    return sealed[:-GCM_TAG_SIZE], sealed[-GCM_TAG_SIZE:]


def gcm_decrypt(key: bytes, iv: bytes, data: Buffer, tag: bytes) -> bytes:
    """Reverse ``gcm_encrypt``.

    Raises:
        TamperedError: anything differs from what was encrypted, lengths included.
    """
    # The library takes other nonce lengths as well, and no data beyond its limit.
    if len(iv) != GCM_IV_SIZE or len(tag) != GCM_TAG_SIZE or len(data) > GCM_MAX_DATA:
        raise unauthentic()
    try:
        return AESGCM(key).decrypt(iv, b"".join((data, tag)), None)
    except exceptions.InvalidTag:
        raise unauthentic() from None


def sealed_length(count: int) -> int:
    """Return the length of the Cobblestone-256 message that holds ``count`` bytes.

    Salt 24 and commitment 32, then chunks of 16 KiB with a 16-byte tag each, of which the
    last is always short (C2SP chunked-encryption).
    """
    return 56 + count + 16 * (count // _CHUNK + 1)


def encryption_room(count: int) -> int:
    """Return how large a buffer ``update_into`` needs to encrypt ``count`` more bytes.

    The largest output is what was held back, less than a chunk, and ``count`` together.
    """
    return sealed_length(_CHUNK + count)


def decryption_room(count: int) -> int:
    """Return how large a buffer ``update_into`` needs to decrypt ``count`` more bytes.

    The largest output is what was held back, at most a chunk and its tag, and ``count``.
    """
    return count + _CHUNK + 16


def message_encryptor(key: bytes, context: bytes) -> MessageEncryptor:
    """Start a Cobblestone-256 message under ``key``, bound to ``context``."""
    return Cobblestone256Encryptor(key, context)


class MessageDecryptor:
    """Reads one Cobblestone-256 message; every byte it gives out is authenticated."""

    def __init__(self, key: bytes, context: bytes) -> None:
        """Start at the message's first byte."""
        self._decryptor = Cobblestone256Decryptor(key, context)

    def update_into(self, data: Buffer, buffer: bytearray) -> int:
        """Decrypt the next bytes into ``buffer`` (``decryption_room``); return how many.

        Raises:
            TamperedError: the message does not authenticate; ``buffer`` is zeroed then.
        """
        try:
            return self._decryptor.update_into(data, buffer)
        except exceptions.InvalidTag:
            # The library has written the chunk before it checked the tag.
            memoryview(buffer)[:] = bytes(len(buffer))
            raise unauthentic() from None

    def finalize(self) -> bytes:
        """Decrypt the last chunk, which may be empty.

        Raises:
            TamperedError: it does not authenticate, or the message was cut.
        """
        try:
            return self._decryptor.finalize()
        except exceptions.InvalidTag:
            raise unauthentic() from None


def seal_message(key: bytes, context: bytes, data: bytes) -> bytes:
    """Encrypt ``data`` as one Cobblestone-256 message of ``sealed_length`` bytes."""
    encryptor = message_encryptor(key, context)
    return encryptor.update(data) + encryptor.finalize()


def open_message(key: bytes, context: bytes, sealed: bytes) -> bytes:
    """Reverse ``seal_message``.

    Raises:
        TamperedError: the message does not authenticate.
    """
    decryptor = MessageDecryptor(key, context)
    buffer = bytearray(decryption_room(len(sealed)))
    count = decryptor.update_into(sealed, buffer)
    return bytes(memoryview(buffer)[:count]) + decryptor.finalize()
