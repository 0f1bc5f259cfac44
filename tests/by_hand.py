"""Writes ``.simg`` objects by hand, from the text of the format alone.

It shares no code with the package, so that an error in one of the two shows as a difference.
It draws no randomness: whoever calls it brings every key, salt and id. And it refuses nothing,
because what it writes is wrong on purpose more often than not.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import struct
from functools import cached_property
from typing import Final

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

MAGIC: Final = b"\x8bSIMG\r\n\x1a"
CHUNK: Final = 16_384
TAG: Final = 16
KEY_TYPE, ARGON2ID_TYPE, PBKDF2_TYPE, RECIPIENT_TYPE = 1, 2, 3, 4
TAIL: Final = 80  # commitment and wrapped key
IDENTITY_PREFIX: Final = "SECIMG-IDENTITY-1:"
RECIPIENT_PREFIX: Final = "secimg-recipient-1:"

_MLKEM_CIPHERTEXT: Final = 1_088
_MLKEM_SEED: Final = 64
_XWING_LABEL: Final = b"\\.//^\\"
_HPKE_SUITE: Final = b"HPKE" + bytes.fromhex("647a00010002")
_NONCE: Final = bytes(12)


def hkdf_expand(key: bytes, info: bytes, length: int, digest: str = "sha512") -> bytes:
    out = block = b""
    counter = 1
    while len(out) < length:
        block = hmac.digest(key, block + info + bytes([counter]), digest)
        out += block
        counter += 1
    return out[:length]


def gcm(key: bytes, nonce: bytes, data: bytes) -> bytes:
    return AESGCM(key).encrypt(nonce, data, None)


def core(meta_len: int, preview_len: int, object_id: bytes, vault_id: bytes) -> bytes:
    lengths = struct.pack(">III", meta_len, preview_len, 0)
    return MAGIC + bytes([1, 0, 0, 0]) + lengths + object_id + vault_id


# --- slots ---------------------------------------------------------------------------------


def head(kind: int, length: int, key_id: bytes) -> bytes:
    return struct.pack(">BBH", kind, 0, length) + key_id


def key_front(key_id: bytes) -> bytes:
    """Return all of a key's slot that stands before the salt."""
    return head(KEY_TYPE, 132, key_id)


def argon2id_front(key_id: bytes, cost: tuple[int, int, int], salt: bytes) -> bytes:
    return head(ARGON2ID_TYPE, 172, key_id) + struct.pack(">IHBB", *cost, 0) + salt


def pbkdf2_front(key_id: bytes, iterations: int, salt: bytes) -> bytes:
    return head(PBKDF2_TYPE, 172, key_id) + struct.pack(">IB3x", iterations, 1) + salt


def recipient_front(key_id: bytes, sealed_root: bytes) -> bytes:
    return head(RECIPIENT_TYPE, 1_300, key_id) + sealed_root


def argon2id(password: bytes, cost: tuple[int, int, int], salt: bytes) -> bytes:
    memory, passes, lanes = cost
    kdf = Argon2id(salt=salt, length=32, iterations=passes, lanes=lanes, memory_cost=memory)
    return kdf.derive(password)


def pbkdf2(password: bytes, iterations: int, salt: bytes) -> bytes:
    return hashlib.pbkdf2_hmac("sha256", password, salt, iterations)


def slot_keys(root_key: bytes, front: bytes, core: bytes) -> tuple[bytes, bytes]:
    """Return wrapping key and commitment; ``front`` ends with the slot's salt here."""
    both = hkdf_expand(root_key, b"secimg-watch/v1/slot\0" + front + core, 64)
    return both[:32], both[32:]


def slot(root_key: bytes, front: bytes, core: bytes, file_key: bytes) -> bytes:
    wrapping_key, commitment = slot_keys(root_key, front, core)
    return front + commitment + gcm(wrapping_key, _NONCE, file_key)


def area(slots: list[bytes]) -> bytes:
    joined = b"".join(slots)
    return struct.pack(">BBH", len(slots), 0, len(joined)) + joined


def mac(file_key: bytes, core: bytes, unsigned: bytes) -> bytes:
    key = hkdf_expand(file_key, b"secimg-watch/v1/header-mac\0" + core, 32)
    return hmac.digest(key, unsigned, "sha256")


def key_check(key: bytes, key_id: bytes, vault_id: bytes) -> bytes:
    return hkdf_expand(key, b"secimg-watch/v1/key-check\0" + vault_id + key_id, 32)


# --- recipients ----------------------------------------------------------------------------


class Identity:
    """A recipient's private key: X-Wing out of a seed of 32 bytes."""

    def __init__(self, seed: bytes) -> None:
        self.seed = seed
        expanded = hashlib.shake_256(seed).digest(96)
        self._mlkem = MLKEM768PrivateKey.from_seed_bytes(expanded[:_MLKEM_SEED])
        self._x25519 = X25519PrivateKey.from_private_bytes(expanded[_MLKEM_SEED:])
        self._share = self._x25519.public_key().public_bytes_raw()

    @cached_property
    def public_key(self) -> bytes:
        return self._mlkem.public_key().public_bytes_raw() + self._share

    @cached_property
    def key_id(self) -> bytes:
        return hashlib.sha256(b"secimg-watch/v1/recipient\0" + self.public_key).digest()[:16]

    @property
    def text(self) -> str:
        return identity_text(self.seed, checksum(IDENTITY_PREFIX, self.seed))

    @property
    def recipient_text(self) -> str:
        return recipient_text(self.public_key, checksum(RECIPIENT_PREFIX, self.public_key))

    def exchange(self, share: bytes) -> bytes:
        return self._x25519.exchange(X25519PublicKey.from_public_bytes(share))

    def shared_secret(self, enc: bytes, exchanged: bytes | None = None) -> bytes:
        """Decapsulate as X-Wing does (draft-connolly-cfrg-xwing-kem).

        ``exchanged`` is the result of X25519 where the library refuses to give it.
        """
        ciphertext, share = enc[:_MLKEM_CIPHERTEXT], enc[_MLKEM_CIPHERTEXT:]
        first = self._mlkem.decapsulate(ciphertext)
        second = self.exchange(share) if exchanged is None else exchanged
        return hashlib.sha3_256(first + second + share + self._share + _XWING_LABEL).digest()


def checksum(prefix: str, key: bytes) -> bytes:
    return hashlib.sha256(prefix.encode() + key).digest()[:4]


def identity_text(seed: bytes, check: bytes) -> str:
    return IDENTITY_PREFIX + base64.b32encode(seed + check).decode().rstrip("=")


def recipient_text(public_key: bytes, check: bytes) -> str:
    return RECIPIENT_PREFIX + base64.urlsafe_b64encode(public_key + check).decode().rstrip("=")


def recipient_info(key_id: bytes, core: bytes) -> bytes:
    return b"secimg-watch/v1/recipient-slot\0" + recipient_front(key_id, b"") + core


def hpke_seal(shared_secret: bytes, info: bytes, data: bytes) -> bytes:
    """Seal ``data`` as HPKE base mode does behind its KEM (RFC 9180, sections 5.1 and 5.2)."""
    context = b"\0" + _extract(b"", b"psk_id_hash", b"") + _extract(b"", b"info_hash", info)
    secret = _extract(shared_secret, b"secret", b"")
    key = _labelled_expand(secret, b"key", context, 32)
    nonce = _labelled_expand(secret, b"base_nonce", context, 12)
    return gcm(key, nonce, data)


def _extract(salt: bytes, label: bytes, data: bytes) -> bytes:
    return hmac.digest(salt, b"HPKE-v1" + _HPKE_SUITE + label + data, "sha256")


def _labelled_expand(secret: bytes, label: bytes, context: bytes, length: int) -> bytes:
    info = length.to_bytes(2, "big") + b"HPKE-v1" + _HPKE_SUITE + label + context
    return hkdf_expand(secret, info, length, "sha256")


# --- sections ------------------------------------------------------------------------------


def sealed_length(count: int) -> int:
    return 56 + count + TAG * (count // CHUNK + 1)


def split(data: bytes) -> list[bytes]:
    """Cut into chunks, of which the last is always short."""
    return [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)] + (
        [] if len(data) % CHUNK else [b""]
    )


class Message:
    """One Cobblestone-256 message (C2SP chunked-encryption), chunk by chunk."""

    def __init__(self, file_key: bytes, context: bytes, salt: bytes) -> None:
        info = b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\0" + salt + context
        expanded = hkdf_expand(file_key, info, 32 + 12 + 32)
        self.salt = salt
        self.commitment = expanded[44:]
        self._key, self._nonce = expanded[:32], expanded[32:44]

    def chunk(self, index: int, data: bytes) -> bytes:
        nonce = int.from_bytes(self._nonce, "big") ^ index
        return gcm(self._key, nonce.to_bytes(12, "big"), data)

    def join(self, *chunks: bytes) -> bytes:
        return self.salt + self.commitment + b"".join(chunks)

    def seal(self, data: bytes) -> bytes:
        return self.join(*(self.chunk(index, part) for index, part in enumerate(split(data))))


def section(file_key: bytes, name: str, core: bytes, salt: bytes) -> Message:
    return Message(file_key, f"secimg-watch/v1/{name}\0".encode() + core, salt)


def record(tag: int, value: bytes, length: int | None = None) -> bytes:
    return struct.pack(">HI", tag, len(value) if length is None else length) + value


def padded(records: bytes) -> bytes:
    """Add the end mark, and zeros up to the next KiB."""
    return records.ljust(-(-(len(records) + 2) // 1_024) * 1_024, b"\0")


# --- one ciphertext for two keys -----------------------------------------------------------

_FIELD: Final = 0xE1 << 120


def _times(left: int, right: int) -> int:
    """Multiply in GF(2^128), in the order of bits that GCM has (SP 800-38D, section 6.3)."""
    product = 0
    for place in range(127, -1, -1):
        if left >> place & 1:
            product ^= right
        right = right >> 1 ^ (_FIELD if right & 1 else 0)
    return product


def _inverse(value: int) -> int:
    result = 1 << 127
    for _ in range(127):  # the exponent 2^128 - 2 is 127 ones and a zero
        value = _times(value, value)
        result = _times(result, value)
    return result


def _gcm_secrets(key: bytes) -> tuple[int, int]:
    """Return the hash key, and the block that masks the tag for the nonce of zeros."""
    encryptor = Cipher(algorithms.AES256(key), modes.ECB()).encryptor()
    first = encryptor.update(bytes(16))
    mask = encryptor.update(_NONCE + b"\0\0\0\1")
    return int.from_bytes(first, "big"), int.from_bytes(mask, "big")


def wrap_for_two(one: bytes, two: bytes, block: bytes) -> tuple[bytes, bytes, bytes]:
    """Make one wrapped key that GCM opens under two wrapping keys.

    The tag is linear in the ciphertext's second block, once ``block`` is given as the first:
    solve for the second that gives both keys the same tag. Returns the wrapped key, and the
    file key that each of the two takes out of it.
    """
    (hash_one, mask_one), (hash_two, mask_two) = _gcm_secrets(one), _gcm_secrets(two)
    first = int.from_bytes(block, "big")
    lengths = 8 * 32  # no associated data, and 32 bytes of ciphertext

    def without_second(hash_key: int, mask: int) -> int:
        square = _times(hash_key, hash_key)
        return _times(first, _times(square, hash_key)) ^ _times(lengths, hash_key) ^ mask

    rest = without_second(hash_one, mask_one) ^ without_second(hash_two, mask_two)
    squares = _times(hash_one, hash_one) ^ _times(hash_two, hash_two)
    second = _times(rest, _inverse(squares))
    tag = without_second(hash_one, mask_one) ^ _times(second, _times(hash_one, hash_one))
    wrapped = b"".join(part.to_bytes(16, "big") for part in (first, second, tag))
    file_keys = [AESGCM(key).decrypt(_NONCE, wrapped, None) for key in (one, two)]
    return wrapped, file_keys[0], file_keys[1]
