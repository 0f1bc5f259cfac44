"""Recipients' keys as text with a checksum: the public one for policies, the private for people.

A private key (identity) is a seed of 32 bytes and short enough to be kept on paper. Each key has
one text; what was typed by a person may have spaces, dashes and lower-case letters in it.
"""

from __future__ import annotations

import base64
import binascii
from typing import Final

from secimg_watch import crypto
from secimg_watch.errors import UsageError
from secimg_watch.records import PrivateKey, Recipient

RECIPIENT_PREFIX: Final = "secimg-recipient-1:"
IDENTITY_PREFIX: Final = "SECIMG-IDENTITY-1:"

IDENTITY_FILE_LIMIT: Final = 65_536
"""Most bytes of an identity file."""

# Of ASCII, str.strip and str.split take four control characters for white space as well.
_WHITE_SPACE: Final = " \t\n\v\f\r"
_NO_MARKS: Final = str.maketrans("", "", _WHITE_SPACE + "-")

_KEY_ID_SIZE: Final = 16
_CHECKSUM_SIZE: Final = 4
_ID_LABEL: Final = b"secimg-watch/v1/recipient\0"


def generate_identity() -> PrivateKey:
    """Make a private key of 256 random bits."""
    return _private_key(crypto.random_bytes(crypto.KEY_SIZE))


def _private_key(seed: bytes) -> PrivateKey:
    return PrivateKey(_fingerprint(crypto.recipient_public_key(seed)), seed)


def recipient_of(identity: PrivateKey) -> Recipient:
    """Return the public key that belongs to a private one."""
    return Recipient(identity.key_id, crypto.recipient_public_key(identity.seed))


def _fingerprint(public_key: bytes) -> bytes:
    return crypto.sha256(_ID_LABEL + public_key)[:_KEY_ID_SIZE]


def format_recipient(recipient: Recipient) -> str:
    """Write a public key as text: the prefix and 1627 characters of base64url."""
    data = recipient.public_key + _checksum(RECIPIENT_PREFIX, recipient.public_key)
    return RECIPIENT_PREFIX + base64.urlsafe_b64encode(data).decode().rstrip("=")


def format_identity(identity: PrivateKey) -> str:
    """Write a private key as text: the prefix and 58 characters of base32."""
    data = identity.seed + _checksum(IDENTITY_PREFIX, identity.seed)
    return IDENTITY_PREFIX + base64.b32encode(data).decode().rstrip("=")


def _checksum(prefix: str, key: bytes) -> bytes:
    return crypto.sha256(prefix.encode() + key)[:_CHECKSUM_SIZE]


def parse_recipient(text: str) -> Recipient:
    """Read the text of a public key, and nothing else.

    Raises:
        UsageError: it is none, or a character of it is wrong.
    """
    if text.startswith(IDENTITY_PREFIX):
        # Not repeated in the message, as nothing that may be a secret is.
        raise UsageError(
            "this is a private key, and a recipient is a public one",
            hint="keep it secret, and put the line that begins with secimg-recipient-1: here",
        )
    fault = UsageError(
        "this is not the text of a recipient's public key, or not all of it",
        hint=f"it begins with {RECIPIENT_PREFIX} and is one line of 1646 characters",
    )
    public_key = _decode(RECIPIENT_PREFIX, text, crypto.PUBLIC_KEY_SIZE)
    if public_key is None:
        raise fault
    recipient = Recipient(_fingerprint(public_key), public_key)
    try:
        crypto.check_public_key(public_key)
    except ValueError:
        raise fault from None
    return recipient


def parse_identity(text: str) -> PrivateKey:
    """Read the text of a private key as it is written, or as a person types it.

    Raises:
        UsageError: it is none, or a character of it is wrong; the text is not repeated.
    """
    head, colon, tail = text.strip(_WHITE_SPACE).upper().partition(":")
    tidy = head + colon + tail.translate(_NO_MARKS)
    # Raising letters that are not ASCII can make some that are.
    seed = _decode(IDENTITY_PREFIX, tidy, crypto.KEY_SIZE) if text.isascii() else None
    if seed is None:
        raise UsageError(
            "this is not the text of a private key, or a character of it is wrong",
            hint=f"it begins with {IDENTITY_PREFIX} and has 58 letters and digits behind that",
        )
    return _private_key(seed)


def _decode(prefix: str, text: str, size: int) -> bytes | None:
    encoded = text.removeprefix(prefix)
    decode, encode, group = (
        (base64.urlsafe_b64decode, base64.urlsafe_b64encode, 4)
        if prefix == RECIPIENT_PREFIX
        else (base64.b32decode, base64.b32encode, 8)
    )
    try:
        data = decode(encoded + "=" * (-len(encoded) % group))
    except (binascii.Error, ValueError):
        return None
    # Encoded again it has to be the very same text: one key, one text.
    if not text.startswith(prefix) or encode(data).decode().rstrip("=") != encoded:
        return None
    key, checksum = data[:size], data[size:]
    return key if len(key) == size and checksum == _checksum(prefix, key) else None


def parse_identity_file(text: str) -> tuple[PrivateKey, ...]:
    """Read an identity file: one private key a line, with empty lines and ``#`` comments.

    Raises:
        UsageError: a line is something else, or there is no key at all; or a character, even
            of a comment, is not ASCII.
    """
    if not text.isascii():
        raise UsageError("not all of it is ASCII")
    lines = [line.strip(_WHITE_SPACE) for line in text.split("\n")]
    found = tuple(parse_identity(line) for line in lines if line and not line.startswith("#"))
    if not found:
        raise UsageError("there is no private key in it")
    return found


def identity_file(identity: PrivateKey) -> str:
    """Write what an identity file holds: the private key, and what it is and opens."""
    public = format_recipient(recipient_of(identity))
    return (
        "# Private key of secimg-watch: opens every object that is sealed to the recipient below.\n"
        "# Keep it secret, and away from the machine that seals.\n"
        f"# recipient {identity.key_id.hex()}\n"
        f"# {public}\n"
        f"{format_identity(identity)}\n"
    )
