"""Images and passwords, in one call each: AES-256-GCM under a key from PBKDF2-HMAC-SHA256.

Everything is in memory, and the caller keeps the four parts. The vault does not use this
format; it is for programs that want nothing but these calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from secimg_watch import crypto
from secimg_watch.container import PBKDF2_ITERATIONS
from secimg_watch.errors import UsageError
from secimg_watch.slots import DEFAULT_PBKDF2_ITERATIONS, encode_password

if TYPE_CHECKING:
    from secimg_watch.crypto import Buffer

SALT_SIZE: Final = 16
"""Bytes in a salt: the 128 bits that SP 800-132 asks for."""


def generate_key(
    password: str | bytes, salt: bytes, iterations: int = DEFAULT_PBKDF2_ITERATIONS
) -> bytes:
    """Derive a 256-bit key from a password by PBKDF2-HMAC-SHA256.

    Text is taken as UTF-8 in Unicode's normal form C. 600,000 iterations are OWASP's minimum
    (Password Storage Cheat Sheet, 2026); 100,000, long the customary figure, still work.

    Raises:
        UsageError: the password is empty or no valid text, the salt has fewer than 16 bytes,
            or the iterations are not 100,000 to 10,000,000.
    """
    if iterations not in PBKDF2_ITERATIONS:
        raise UsageError(
            f"{iterations} is not a fit number of iterations",
            hint=f"from {PBKDF2_ITERATIONS[0]} to {PBKDF2_ITERATIONS[-1]}",
        )
    if len(salt) < SALT_SIZE:
        raise UsageError(f"a salt has at least {SALT_SIZE} bytes")
    return crypto.pbkdf2(encode_password(password), salt, iterations)


def encrypt_image(
    image_data: Buffer, password: str | bytes, *, iterations: int = DEFAULT_PBKDF2_ITERATIONS
) -> tuple[bytes, bytes, bytes, bytes]:
    """Encrypt an image; return ``(encrypted_data, tag, iv, salt)``.

    ``encrypted_data`` is as long as ``image_data``, ``tag`` has 16 bytes. ``iv``, 12 bytes, and
    ``salt``, 16 bytes, are fresh in every call. None of the four is secret.

    Raises:
        UsageError: as for ``generate_key``, or the image is too large for one call (2 GiB).
    """
    if len(image_data) > crypto.GCM_MAX_DATA:
        raise UsageError(
            f"an image of {len(image_data)} bytes is too large to be encrypted in one call",
            hint="use `secimg-watch encrypt FILE`",
        )
    salt = crypto.random_bytes(SALT_SIZE)
    iv = crypto.random_bytes(crypto.GCM_IV_SIZE)
    key = generate_key(password, salt, iterations)
    encrypted_data, tag = crypto.gcm_encrypt(key, iv, image_data)
    return encrypted_data, tag, iv, salt


def decrypt_image(
    encrypted_data: Buffer,
    tag: bytes,
    iv: bytes,
    salt: bytes,
    password: str | bytes,
    *,
    iterations: int = DEFAULT_PBKDF2_ITERATIONS,
) -> bytes:
    """Return the image that ``encrypt_image`` was given, byte for byte.

    Raises:
        TamperedError: the password is wrong, or any of the parts differs; which, is not said.
        UsageError: the password is empty or no valid text, or the iterations are out of range.
    """
    if len(salt) != SALT_SIZE:
        raise crypto.unauthentic()
    return crypto.gcm_decrypt(generate_key(password, salt, iterations), iv, encrypted_data, tag)
