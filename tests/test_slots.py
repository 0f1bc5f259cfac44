"""Key slots: bound to one key and one object, and as published."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from secimg_watch import crypto, slots
from secimg_watch.container import (
    Argon2idSlot,
    Core,
    KeyringSlot,
    PasswordSlot,
    Pbkdf2Slot,
    pack_unsigned_header,
    parse_header,
)
from secimg_watch.errors import TamperedError, UsageError
from secimg_watch.records import KeyEncryptionKey, ObjectId
from secimg_watch.slots import Password, PasswordCache

CORE = Core(1_096, 0, ObjectId("0123456789abcdef" * 2), b"v" * 16)
OTHER_CORE = dataclasses.replace(CORE, object_id=ObjectId("f" * 32))
KEK = KeyEncryptionKey(b"k" * 16, b"\x07" * 32)
FILE_KEY = bytes(range(32))


def quick(secret: bytes = b"correct horse") -> Password:
    return Password(secret, memory_kib=8192, passes=1, lanes=1)


def compatible(secret: bytes = b"correct horse") -> Password:
    return Password(secret, kdf="pbkdf2", iterations=100_000)


def expand_by_hand(key: bytes, info: bytes) -> bytes:
    return hmac.digest(key, info + b"\x01", "sha512")


def slot_by_hand(packed: bytes, key: bytes) -> bytes:
    """Open a slot with nothing but the text of the format."""
    info = b"secimg-watch/v1/slot\0" + packed[:-80] + CORE.pack()
    expanded = expand_by_hand(key, info)
    assert packed[-80:-48] == expanded[32:]
    return AESGCM(expanded[:32]).decrypt(bytes(12), packed[-48:], None)


@pytest.mark.parametrize("lock", [KEK, quick(), compatible()], ids=["key", "argon2id", "pbkdf2"])
def test_a_slot_gives_the_file_key_back(lock: KeyEncryptionKey | Password) -> None:
    slot = slots.make_slot(lock, FILE_KEY, CORE, PasswordCache())
    assert slots.fits(slot, lock)
    assert slots.open_slot(slot, lock, CORE, PasswordCache()) == FILE_KEY


def test_a_keyring_slot_follows_the_published_derivation() -> None:
    slot = slots.make_slot(KEK, FILE_KEY, CORE, PasswordCache())
    assert isinstance(slot, KeyringSlot)
    assert slot_by_hand(slot.pack(), KEK.key) == FILE_KEY


def test_a_pbkdf2_slot_follows_the_published_derivation() -> None:
    slot = slots.make_slot(compatible(), FILE_KEY, CORE, PasswordCache())
    assert isinstance(slot, Pbkdf2Slot)
    packed = slot.pack()
    key = hashlib.pbkdf2_hmac("sha256", b"correct horse", packed[28:60], 100_000)
    assert slot_by_hand(packed, key) == FILE_KEY


def test_argon2id_gives_the_result_of_the_reference_implementation() -> None:
    # A vector of that implementation's own tests: version 0x13, 64 MiB, 2 passes, 1 lane.
    expected = "09316115d5cf24ed5a15a31a3ba326e5cf32edc24702987c02b6566f61913cf7"
    key = crypto.argon2id(b"password", b"somesalt", memory_kib=65_536, iterations=2, lanes=1)
    assert key.hex() == expected


def test_two_slots_for_one_key_have_nothing_in_common() -> None:
    first, second = (slots.make_slot(KEK, FILE_KEY, CORE, PasswordCache()).wrap for _ in "12")
    assert first.salt != second.salt
    assert first.commitment != second.commitment
    assert first.wrapped != second.wrapped


def test_a_slot_moved_to_another_object_does_not_open() -> None:
    slot = slots.make_slot(KEK, FILE_KEY, CORE, PasswordCache())
    with pytest.raises(TamperedError, match=crypto.UNAUTHENTIC):
        slots.open_slot(slot, KEK, OTHER_CORE, PasswordCache())


def test_the_wrong_key_under_the_right_id_does_not_open() -> None:
    slot = slots.make_slot(KEK, FILE_KEY, CORE, PasswordCache())
    wrong = KeyEncryptionKey(KEK.key_id, bytes(32))
    assert slots.fits(slot, wrong)
    with pytest.raises(TamperedError, match=crypto.UNAUTHENTIC):
        slots.open_slot(slot, wrong, CORE, PasswordCache())


@pytest.mark.parametrize("make", [quick, compatible])
def test_the_wrong_password_does_not_open(make: type[Password]) -> None:
    slot = slots.make_slot(make(b"right"), FILE_KEY, CORE, PasswordCache())
    with pytest.raises(TamperedError, match=crypto.UNAUTHENTIC):
        slots.open_slot(slot, make(b"wrong"), CORE, PasswordCache())


@pytest.mark.parametrize("lock", [KEK, quick()], ids=["key", "argon2id"])
def test_a_slot_with_any_byte_changed_does_not_open(lock: KeyEncryptionKey | Password) -> None:
    passwords = PasswordCache()
    slot = slots.make_slot(lock, FILE_KEY, CORE, passwords)
    header = pack_unsigned_header(CORE, (slot,)) + bytes(32)
    for offset in range(60, len(header) - 32):
        changed = bytearray(header)
        changed[offset] ^= 1
        with pytest.raises(TamperedError):
            slots.open_slot(parse_header(bytes(changed)).slots[0], lock, CORE, passwords)


def test_a_wrapped_key_that_opens_under_another_key_fails_at_the_commitment() -> None:
    slot = slots.make_slot(KEK, FILE_KEY, CORE, PasswordCache())
    other = KeyEncryptionKey(KEK.key_id, b"\x08" * 32)
    info = b"secimg-watch/v1/slot\0" + slot.pack()[:-80] + CORE.pack()
    wrapped = crypto.wrap_key(expand_by_hand(other.key, info)[:32], FILE_KEY)
    forged = dataclasses.replace(slot, wrap=dataclasses.replace(slot.wrap, wrapped=wrapped))
    with pytest.raises(TamperedError, match=crypto.UNAUTHENTIC):
        slots.open_slot(forged, other, CORE, PasswordCache())


def test_a_wrapped_key_that_was_changed_fails_behind_a_right_commitment() -> None:
    slot = slots.make_slot(KEK, FILE_KEY, CORE, PasswordCache())
    wrap = dataclasses.replace(slot.wrap, wrapped=bytes(48))
    with pytest.raises(TamperedError, match=crypto.UNAUTHENTIC):
        slots.open_slot(dataclasses.replace(slot, wrap=wrap), KEK, CORE, PasswordCache())


def test_a_key_fits_the_slot_that_names_it_and_a_password_every_password_slot() -> None:
    passwords = PasswordCache()
    keyring = slots.make_slot(KEK, FILE_KEY, CORE, passwords)
    password = slots.make_slot(quick(), FILE_KEY, CORE, passwords)
    assert slots.fits(keyring, KEK)
    assert not slots.fits(keyring, KeyEncryptionKey(b"x" * 16, KEK.key))
    assert not slots.fits(keyring, quick())
    assert slots.fits(password, compatible(b"another"))
    assert not slots.fits(password, KeyEncryptionKey(password.key_id, KEK.key))


def test_a_password_cannot_be_used_on_the_slot_of_a_key() -> None:
    slot = slots.make_slot(KEK, FILE_KEY, CORE, PasswordCache())
    with pytest.raises(UsageError, match="of its own kind"):
        slots.open_slot(slot, quick(), CORE, PasswordCache())


def test_one_password_for_many_objects_is_derived_once(monkeypatch: pytest.MonkeyPatch) -> None:
    derivations = []
    real = crypto.argon2id

    def counted(password: bytes, salt: bytes, **cost: int) -> bytes:
        derivations.append(salt)
        return real(password, salt, **cost)

    monkeypatch.setattr(crypto, "argon2id", counted)
    password, passwords = quick(), PasswordCache()
    for core in (CORE, OTHER_CORE):
        slot = slots.make_slot(password, FILE_KEY, core, passwords)
        assert slots.open_slot(slot, quick(), core, passwords) == FILE_KEY
    assert derivations == [password.salt]


def test_what_the_cache_remembers_depends_on_password_salt_and_cost() -> None:
    passwords = PasswordCache()
    slot = slots.make_slot(compatible(), FILE_KEY, CORE, passwords)
    assert isinstance(slot, Pbkdf2Slot)
    same_salt = Argon2idSlot(slot.key_id, 8192, 1, 1, slot.password_salt, slot.wrap)
    variants: list[tuple[bytes, PasswordSlot]] = [
        (b"correct horse", slot),
        (b"another", slot),
        (b"correct horse", dataclasses.replace(slot, iterations=100_001)),
        (b"correct horse", dataclasses.replace(slot, password_salt=bytes(32))),
        (b"correct horse", same_salt),
    ]
    keys = [passwords.derive(secret, variant) for secret, variant in variants]
    assert len(set(keys)) == len(variants)
    assert [passwords.derive(secret, variant) for secret, variant in variants] == keys


def test_passwords_have_the_published_default_cost() -> None:
    password = Password(b"x")
    assert (password.kdf, password.memory_kib) == ("argon2id", 262_144)
    assert (password.passes, password.lanes, password.iterations) == (3, 4, 600_000)


@pytest.mark.parametrize(
    "cost",
    [
        (8_191, 3, 4, 600_000),
        (1_048_577, 3, 4, 600_000),
        (8_192, 0, 4, 600_000),
        (8_192, 17, 4, 600_000),
        (8_192, 3, 0, 600_000),
        (8_192, 3, 17, 600_000),
        (8_192, 3, 4, 99_999),
        (8_192, 3, 4, 10_000_001),
    ],
)
def test_a_cost_that_no_reader_takes_is_refused_before_any_work(
    cost: tuple[int, int, int, int],
) -> None:
    Password(b"x", "argon2id", 8_192, 3, 4, 600_000)
    with pytest.raises(UsageError, match="out of bounds"):
        Password(b"x", "argon2id", *cost)


def test_an_empty_password_or_a_misshapen_salt_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        Password(b"")
    with pytest.raises(UsageError, match="salt"):
        Password(b"x", salt=b"short")
    with pytest.raises(UsageError, match="key id"):
        Password(b"x", key_id=b"short")


@pytest.mark.parametrize(
    "kek", [KeyEncryptionKey(b"k" * 16, b"short"), KeyEncryptionKey(b"short", bytes(32))]
)
def test_a_key_of_the_wrong_length_seals_nothing(kek: KeyEncryptionKey) -> None:
    with pytest.raises(UsageError, match="32 bytes"):
        slots.key_check(kek, b"v" * 16)
    with pytest.raises(UsageError, match="32 bytes"):
        slots.make_slot(kek, FILE_KEY, CORE, PasswordCache())


def test_composed_and_decomposed_text_is_one_password() -> None:
    assert slots.encode_password("caf\u00e9") == slots.encode_password("cafe\u0301")
    assert slots.encode_password("caf\u00e9") == b"caf\xc3\xa9"
    assert slots.encode_password(b"cafe\xcc\x81") == b"cafe\xcc\x81"
    assert slots.encode_password("a\0b") == b"a\0b"


@pytest.mark.parametrize("password", ["", b"", "\ud800"])
def test_a_password_that_is_empty_or_no_text_is_refused(password: str | bytes) -> None:
    with pytest.raises(UsageError):
        slots.encode_password(password)


def test_the_check_value_tells_keys_ids_and_vaults_apart() -> None:
    checks = [
        slots.key_check(KEK, b"v" * 16),
        slots.key_check(KEK, b"w" * 16),
        slots.key_check(KeyEncryptionKey(b"l" * 16, KEK.key), b"v" * 16),
        slots.key_check(KeyEncryptionKey(KEK.key_id, bytes(32)), b"v" * 16),
    ]
    assert len(set(checks)) == 4
    info = b"secimg-watch/v1/key-check\0" + b"v" * 16 + KEK.key_id
    assert checks[0] == expand_by_hand(KEK.key, info)[:32]
    with pytest.raises(UsageError, match="vault id"):
        slots.key_check(KEK, b"short")


def test_no_key_and_no_password_shows_in_a_description() -> None:
    passwords = PasswordCache()
    password = quick(b"hunter2")
    slot = slots.make_slot(password, FILE_KEY, CORE, passwords)
    shown = " ".join(map(repr, (KEK, password, passwords, slot)))
    assert "hunter2" not in shown
    assert repr(KEK.key)[2:-1] not in shown
    assert repr(password.salt) not in repr(password)
    assert repr(FILE_KEY) not in shown


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's address space")
def test_too_little_memory_for_a_password_is_said_and_not_a_traceback() -> None:
    code = """
import resource
from secimg_watch import crypto
from secimg_watch.errors import NotReadyError
resource.setrlimit(resource.RLIMIT_AS, (600 << 20, 600 << 20))
try:
    crypto.argon2id(b"x", bytes(32), memory_kib=1 << 20, iterations=1, lanes=1)
except NotReadyError as fault:
    print(fault)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "1048576 KiB of memory, needed to check the password, are not free\n"
