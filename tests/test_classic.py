"""The library's calls for an image and a password."""

from __future__ import annotations

import hashlib
import mmap
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from secimg_watch import crypto
from secimg_watch.classic import decrypt_image, encrypt_image, generate_key
from secimg_watch.errors import TamperedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

IMAGE = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
FAST = 100_000


@settings(max_examples=15, deadline=None)
@given(st.binary(max_size=5000), st.one_of(st.text(min_size=1), st.binary(min_size=1)))
def test_an_image_comes_back_byte_for_byte(image: bytes, password: str | bytes) -> None:
    encrypted, tag, iv, salt = encrypt_image(image, password, iterations=FAST)
    assert (len(encrypted), len(tag), len(iv), len(salt)) == (len(image), 16, 12, 16)
    assert decrypt_image(encrypted, tag, iv, salt, password, iterations=FAST) == image


def test_the_default_is_600_000_iterations() -> None:
    encrypted, tag, iv, salt = encrypt_image(IMAGE, "secret")
    assert decrypt_image(encrypted, tag, iv, salt, "secret", iterations=600_000) == IMAGE
    assert decrypt_image(encrypted, tag, iv, salt, "secret") == IMAGE


def test_the_parts_are_plain_pbkdf2_and_aes_256_gcm() -> None:
    encrypted, tag, iv, salt = encrypt_image(IMAGE, "secret", iterations=FAST)
    key = hashlib.pbkdf2_hmac("sha256", b"secret", salt, FAST)
    assert generate_key("secret", salt, iterations=FAST) == key
    assert AESGCM(key).decrypt(iv, encrypted + tag, None) == IMAGE


def test_every_call_takes_a_fresh_salt_and_iv() -> None:
    calls = [encrypt_image(IMAGE, "secret", iterations=FAST) for _ in range(3)]
    for part in zip(*calls, strict=True):
        assert len(set(part)) == 3


def refuse(parts: Sequence[bytes]) -> None:
    encrypted, tag, iv, salt = parts
    with pytest.raises(TamperedError, match=crypto.UNAUTHENTIC):
        decrypt_image(encrypted, tag, iv, salt, "secret", iterations=FAST)


def test_one_changed_bit_anywhere_is_refused() -> None:
    parts = encrypt_image(b"image", "secret", iterations=FAST)
    for index, part in enumerate(parts):
        for offset in range(len(part)):
            flipped = bytearray(part)
            flipped[offset] ^= 1 << (offset % 8)
            refuse([*parts[:index], bytes(flipped), *parts[index + 1 :]])


def test_parts_of_another_length_are_refused() -> None:
    parts = encrypt_image(b"image", "secret", iterations=FAST)
    for index, part in enumerate(parts):
        for wrong in (b"", part[:-1], part + b"\0"):
            refuse([*parts[:index], wrong, *parts[index + 1 :]])


def test_a_byte_moved_from_the_tag_to_the_data_is_refused() -> None:
    encrypted, tag, iv, salt = encrypt_image(b"image", "secret", iterations=FAST)
    refuse([encrypted + tag[:1], tag[1:], iv, salt])
    refuse([encrypted[:-1], encrypted[-1:] + tag, iv, salt])


def test_a_wrong_password_or_count_of_iterations_is_refused_in_the_same_words() -> None:
    parts = encrypt_image(IMAGE, "secret", iterations=FAST)
    with pytest.raises(TamperedError, match=crypto.UNAUTHENTIC):
        decrypt_image(*parts, "Secret", iterations=FAST)
    with pytest.raises(TamperedError, match=crypto.UNAUTHENTIC):
        decrypt_image(*parts, "secret", iterations=FAST + 1)


def test_text_is_one_password_however_it_is_composed() -> None:
    parts = encrypt_image(IMAGE, "caf\u00e9", iterations=FAST)
    assert decrypt_image(*parts, "cafe\u0301", iterations=FAST) == IMAGE
    assert decrypt_image(*parts, "caf\u00e9".encode(), iterations=FAST) == IMAGE


@pytest.mark.parametrize("iterations", [0, -1, 99_999, 10_000_001])
def test_too_few_or_too_many_iterations_are_refused(iterations: int) -> None:
    with pytest.raises(UsageError, match="iterations"):
        encrypt_image(IMAGE, "secret", iterations=iterations)
    with pytest.raises(UsageError, match="iterations"):
        decrypt_image(IMAGE, bytes(16), bytes(12), bytes(16), "secret", iterations=iterations)


def test_an_empty_password_and_a_short_salt_are_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        encrypt_image(IMAGE, "", iterations=FAST)
    with pytest.raises(UsageError, match="salt"):
        generate_key("secret", bytes(15), iterations=FAST)


def test_more_than_the_library_takes_in_one_call_is_refused_before_any_work() -> None:
    with mmap.mmap(-1, 2**31) as large:  # never touched, so it costs no memory
        with memoryview(large) as view, pytest.raises(UsageError, match="too large"):
            encrypt_image(view, "secret")
        with memoryview(large) as view, pytest.raises(TamperedError):
            decrypt_image(view, bytes(16), bytes(12), bytes(16), "secret", iterations=FAST)
