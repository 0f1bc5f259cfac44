"""Recipients' keys: their text forms, and the slot that only the private key opens."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import string
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from secimg_watch import crypto, seal, slots
from secimg_watch.container import SEALED_ROOT, Core, Meta, RecipientSlot
from secimg_watch.errors import KeyMismatchError, TamperedError, UsageError
from secimg_watch.recipients import (
    IDENTITY_PREFIX,
    RECIPIENT_PREFIX,
    format_identity,
    format_recipient,
    generate_identity,
    identity_file,
    parse_identity,
    parse_identity_file,
    parse_recipient,
    recipient_of,
)
from secimg_watch.records import KeyEncryptionKey, ObjectId, PrivateKey, Recipient
from secimg_watch.slots import Opener, PasswordCache

if TYPE_CHECKING:
    from collections.abc import Callable

IDENTITY = parse_identity_file(
    # The seed is 00 01 02 ... 1f.
    "SECIMG-IDENTITY-1:AAAQEAYEAUDAOCAJBIFQYDIOB4IBCEQTCQKRMFYYDENBWHA5DYPWW5ONEY\n"
)[0]
RECIPIENT = recipient_of(IDENTITY)
STRANGER = generate_identity()
KEK = KeyEncryptionKey(b"k" * 16, b"\x07" * 32)
OBJECT = ObjectId("0123456789abcdef" * 2)
CORE = Core(1_096, 0, OBJECT, b"v" * 16)
FILE_KEY = bytes(range(100, 132))
SEEDS = st.binary(min_size=32, max_size=32)
BASE32 = string.ascii_uppercase + "234567"
URL_SAFE = string.ascii_letters + string.digits + "-_"


def private_key(seed: bytes) -> PrivateKey:
    """The private key of a seed, by way of its text as the format describes it."""
    checksum = hashlib.sha256(IDENTITY_PREFIX.encode() + seed).digest()[:4]
    encoded = base64.b32encode(seed + checksum).decode().rstrip("=")
    return parse_identity(IDENTITY_PREFIX + encoded)


def text_of(public_key: bytes) -> str:
    """The text of anything that has the length of a public key, with a right checksum."""
    checksum = hashlib.sha256(RECIPIENT_PREFIX.encode() + public_key).digest()[:4]
    encoded = base64.urlsafe_b64encode(public_key + checksum).decode().rstrip("=")
    return RECIPIENT_PREFIX + encoded


def refusal(error: UsageError) -> str:
    return str(error) + error.hint


# -- the text of a private key -------------------------------------------------------------------


@given(SEEDS)
def test_a_private_key_survives_its_text(seed: bytes) -> None:
    key = private_key(seed)
    text = format_identity(key)
    assert key.seed == seed
    assert (len(text), text.isprintable(), text.isascii()) == (76, True, True)
    assert parse_identity(text) == key


def test_the_text_of_a_private_key_is_the_documented_one() -> None:
    assert IDENTITY.seed == bytes(range(32))
    assert private_key(bytes(range(32))) == IDENTITY
    assert format_identity(IDENTITY).startswith(IDENTITY_PREFIX)


def test_new_private_keys_are_all_different() -> None:
    made = [generate_identity() for _ in range(3)]
    assert len({key.seed for key in made}) == len({key.key_id for key in made}) == 3
    assert {len(key.seed) for key in made} == {32}


def test_any_character_changed_in_a_private_key_is_noticed() -> None:
    text = format_identity(IDENTITY)
    for place in range(len(IDENTITY_PREFIX), len(text)):
        for other in set(BASE32) - {text[place]}:
            with pytest.raises(UsageError, match="not the text of a private key"):
                parse_identity(text[:place] + other + text[place + 1 :])


def test_two_neighbours_swapped_in_a_private_key_are_noticed() -> None:
    text = format_identity(STRANGER)
    for place in range(len(IDENTITY_PREFIX), len(text) - 1):
        one, other = text[place], text[place + 1]
        if one != other:
            with pytest.raises(UsageError):
                parse_identity(text[:place] + other + one + text[place + 2 :])


def test_a_private_key_that_is_cut_or_goes_on_is_refused() -> None:
    text = format_identity(IDENTITY)
    for length in range(len(text)):
        with pytest.raises(UsageError):
            parse_identity(text[:length])
    for more in ("A", "AAAAAAAA", "=", "======", ":", text):
        with pytest.raises(UsageError):
            parse_identity(text + more)


@pytest.mark.parametrize(
    "prefix",
    ["", ":", "IDENTITY-1:", "SECIMG-IDENTITY-2:", "SECIMGIDENTITY1:", RECIPIENT_PREFIX, "1:"],
)
def test_a_private_key_with_another_prefix_is_refused(prefix: str) -> None:
    with pytest.raises(UsageError):
        parse_identity(prefix + format_identity(IDENTITY).removeprefix(IDENTITY_PREFIX))


def in_groups(text: str, mark: str) -> str:
    tail = text.removeprefix(IDENTITY_PREFIX)
    return IDENTITY_PREFIX + mark.join(tail[n : n + 4] for n in range(0, len(tail), 4))


@pytest.mark.parametrize("mark", ["", " ", "-", " - ", "\t"])
@pytest.mark.parametrize("case", [str, str.lower, str.title])
def test_a_private_key_may_be_typed_in_groups_and_in_any_case(
    mark: str, case: Callable[[str], str]
) -> None:
    typed = case(in_groups(format_identity(IDENTITY), mark))
    assert parse_identity(f"  {typed} \n") == IDENTITY


@given(SEEDS, st.lists(st.tuples(st.integers(0, 57), st.sampled_from(" -")), max_size=20))
def test_spaces_and_dashes_may_stand_anywhere_in_what_was_typed(
    seed: bytes, marks: list[tuple[int, str]]
) -> None:
    key = private_key(seed)
    tail = format_identity(key).removeprefix(IDENTITY_PREFIX).lower()
    for place, mark in marks:
        tail = tail[:place] + mark + tail[place:]
    assert parse_identity(IDENTITY_PREFIX + tail) == key


def test_unused_bits_of_the_last_character_are_zero() -> None:
    # 36 bytes are 57.6 characters: two bits of the last one carry nothing.
    text = format_identity(IDENTITY)
    last = BASE32.index(text[-1])
    assert last % 4 == 0
    padded = text.removeprefix(IDENTITY_PREFIX) + "======"
    for stray in (1, 2, 3):
        changed = text[:-1] + BASE32[last + stray]
        same = changed.removeprefix(IDENTITY_PREFIX) + "======"
        assert base64.b32decode(same) == base64.b32decode(padded)
        with pytest.raises(UsageError):
            parse_identity(changed)


@given(st.text() | st.text(BASE32 + BASE32.lower() + " -=", min_size=50, max_size=64))
@example(format_identity(STRANGER).removeprefix(IDENTITY_PREFIX)[:-1])
def test_a_refused_private_key_is_never_repeated(tail: str) -> None:
    try:
        parse_identity(IDENTITY_PREFIX + tail)
    except UsageError as error:
        shown = refusal(error)
    else:
        shown = ""
    assert len(tail) < len(IDENTITY_PREFIX) or tail not in shown


# -- the text of a public key --------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_a_public_key_survives_its_text(seed: bytes) -> None:
    recipient = recipient_of(private_key(seed))
    text = format_recipient(recipient)
    assert (len(text), text.isprintable(), text.isascii()) == (1646, True, True)
    assert text == text_of(recipient.public_key)
    assert parse_recipient(text) == recipient


def test_any_character_changed_in_a_public_key_is_noticed() -> None:
    text = format_recipient(RECIPIENT)
    for place in range(len(text)):
        other = URL_SAFE[(URL_SAFE.find(text[place]) + 1) % len(URL_SAFE)]
        with pytest.raises(UsageError, match="not the text of a recipient's public key"):
            parse_recipient(text[:place] + other + text[place + 1 :])


def test_every_other_last_character_of_a_public_key_is_refused() -> None:
    # 1220 bytes are 1626.7 characters: two bits of the last one carry nothing.
    text = format_recipient(RECIPIENT)
    for other in set(URL_SAFE) - {text[-1]}:
        with pytest.raises(UsageError):
            parse_recipient(text[:-1] + other)


@pytest.mark.parametrize("kept", [0, 1, 18, 19, 20, 800, 1640, 1642, 1644, 1645])
def test_a_public_key_that_is_cut_is_refused(kept: int) -> None:
    with pytest.raises(UsageError, match="or not all of it") as caught:
        parse_recipient(format_recipient(RECIPIENT)[:kept])
    assert "1646 characters" in caught.value.hint


def edited_forms() -> dict[str, str]:
    text = format_recipient(RECIPIENT)
    tail = text.removeprefix(RECIPIENT_PREFIX)
    return {
        "a blank before": f" {text}",
        "a line end": f"{text}\n",
        "padding": f"{text}=",
        "more": f"{text}AAAA",
        "twice": text + text,
        "a space within": f"{text[:100]} {text[100:]}",
        "capitals": text.upper(),
        "no prefix": tail,
        "another version": f"secimg-recipient-2:{tail}",
        "the other alphabet": text.replace("-", "+").replace("_", "/"),
        "the prefix of a private key in small letters": f"secimg-identity-1:{tail}",
        "not ASCII": f"{text[:-1]}\N{FULLWIDTH LATIN CAPITAL LETTER A}",
    }


@pytest.mark.parametrize("what", edited_forms())
def test_a_public_key_is_read_exactly(what: str) -> None:
    with pytest.raises(UsageError):
        parse_recipient(edited_forms()[what])


def test_a_private_key_in_the_place_of_a_public_one_is_refused_and_not_repeated() -> None:
    text = format_identity(IDENTITY)
    with pytest.raises(UsageError, match="a private key, and a recipient is a public one") as found:
        parse_recipient(text)
    shown = refusal(found.value)
    assert text.removeprefix(IDENTITY_PREFIX)[:8] not in shown
    assert "keep it secret" in shown


MLKEM = RECIPIENT.public_key[:1184]
X25519 = RECIPIENT.public_key[1184:]


@pytest.mark.parametrize(
    "public_key",
    [MLKEM + bytes(32), MLKEM + b"\1" + bytes(31), b"\xff" * 1184 + X25519, b"\xff" * 1216],
    ids=["all-zero share", "share of small order", "coefficients too large", "both"],
)
def test_bytes_that_are_no_public_key_are_refused_behind_a_right_checksum(
    public_key: bytes,
) -> None:
    with pytest.raises(UsageError, match="public key"):
        parse_recipient(text_of(public_key))


@pytest.mark.parametrize("size", [0, 32, 1184, 1215, 1217])
def test_a_public_key_of_another_length_is_refused_behind_a_right_checksum(size: int) -> None:
    with pytest.raises(UsageError, match="public key"):
        parse_recipient(text_of((RECIPIENT.public_key * 2)[:size]))


# -- both ----------------------------------------------------------------------------------------


def test_public_and_private_key_have_the_same_id_which_is_the_public_ones_fingerprint() -> None:
    by_hand = hashlib.sha256(b"secimg-watch/v1/recipient\0" + RECIPIENT.public_key).digest()[:16]
    assert IDENTITY.key_id == RECIPIENT.key_id == by_hand
    assert parse_recipient(format_recipient(RECIPIENT)).key_id == by_hand
    assert STRANGER.key_id != by_hand


def test_neither_key_shows_in_a_description() -> None:
    slot = slots.make_slot(RECIPIENT, FILE_KEY, CORE, PasswordCache())
    shown = " ".join(map(repr, (IDENTITY, RECIPIENT, [IDENTITY], slot)))
    for secret in (IDENTITY.seed, FILE_KEY, RECIPIENT.public_key):
        assert repr(secret)[2:-1] not in shown
        assert secret.hex() not in shown
    assert format_identity(IDENTITY).removeprefix(IDENTITY_PREFIX) not in shown
    sealed = sealed_for([RECIPIENT])
    assert repr(sealed.file_key.key)[2:-1] not in repr(sealed)


# -- identity files ------------------------------------------------------------------------------


def test_a_written_identity_file_is_read_back() -> None:
    text = identity_file(IDENTITY)
    assert parse_identity_file(text) == (IDENTITY,)
    assert text.isascii()
    assert all(line.startswith("#") for line in text.splitlines()[:-1])
    # Whoever has the file can put its public key into a policy.
    assert f"# {format_recipient(RECIPIENT)}" in text.splitlines()
    assert RECIPIENT.key_id.hex() in text


def test_comments_empty_lines_and_several_keys_may_stand_in_an_identity_file() -> None:
    one, other = format_identity(IDENTITY), format_identity(STRANGER)
    text = f"# mine\n\n  {one}  \r\n#{other}\n \n\t# yours\n{in_groups(other, ' ').lower()}"
    assert parse_identity_file(text) == (IDENTITY, STRANGER)


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n", f"# {format_identity(IDENTITY)}\n"])
def test_an_identity_file_without_a_key_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no private key"):
        parse_identity_file(text)


@pytest.mark.parametrize(
    "line",
    ["hunter2", "secimg1:00:AA", format_recipient(RECIPIENT), f"key: {format_identity(IDENTITY)}"],
    ids=["a word", "a key of a vault", "a public key", "a key behind something"],
)
def test_anything_else_in_an_identity_file_is_refused_and_not_repeated(line: str) -> None:
    with pytest.raises(UsageError, match="not the text of a private key") as caught:
        parse_identity_file(f"{format_identity(STRANGER)}\n{line}\n")
    assert line[:20] not in refusal(caught.value)


# -- the slot ------------------------------------------------------------------------------------


def sealed_for(locks: list[slots.Lock]) -> seal.SealedObject:
    return seal.seal_object(
        object_id=OBJECT,
        vault_id=CORE.vault_id,
        locks=locks,
        meta=Meta(b"a.jpg", b"", 7, 1, 0o600, "JPEG", 4, 3, "image", "/srv", "lease", 2, "a test"),
        preview=b"preview",
        read=io.BytesIO(b"picture").readinto,
    )


def opened(data: bytes, *openers: Opener) -> bytes:
    found = seal.open_object(io.BytesIO(data), openers, expect=OBJECT, vault_id=CORE.vault_id)
    return found.preview() + b"".join(bytes(piece) for piece in found.body())


def written(sealed: seal.SealedObject) -> bytes:
    return b"".join(bytes(chunk) for chunk in sealed.chunks())


def test_what_is_sealed_to_a_recipient_opens_with_that_private_key_and_no_other() -> None:
    data = written(sealed_for([RECIPIENT]))
    assert opened(data, IDENTITY) == b"previewpicture"
    assert opened(data, STRANGER, IDENTITY) == b"previewpicture"
    for others in ([STRANGER], [KEK], [STRANGER, KEK], []):
        with pytest.raises(KeyMismatchError, match=f"recipient {RECIPIENT.key_id.hex()}"):
            opened(data, *others)


def test_another_private_key_under_the_right_id_does_not_open() -> None:
    data = written(sealed_for([RECIPIENT]))
    with pytest.raises(TamperedError, match=crypto.UNAUTHENTIC):
        opened(data, PrivateKey(RECIPIENT.key_id, STRANGER.seed))


def test_key_and_recipients_each_open_an_object_by_themselves() -> None:
    data = written(sealed_for([KEK, RECIPIENT, recipient_of(STRANGER)]))
    for opener in (KEK, IDENTITY, STRANGER):
        assert opened(data, opener) == b"previewpicture"


def test_a_slot_that_was_damaged_does_not_open_and_the_header_shows_it_to_everybody() -> None:
    passwords = PasswordCache()
    header = seal.build_header(CORE, [RECIPIENT, recipient_of(STRANGER)], FILE_KEY, passwords)
    first, second = header.slots
    broken = dataclasses.replace(first, wrap=dataclasses.replace(first.wrap, wrapped=bytes(48)))
    with pytest.raises(TamperedError):
        slots.open_slot(broken, IDENTITY, CORE, passwords)
    assert slots.open_slot(second, STRANGER, CORE, passwords) == FILE_KEY
    # The header's MAC covers every slot: whoever opens another one notices as well.
    changed = dataclasses.replace(header, slots=(broken, second))
    for opener in (IDENTITY, STRANGER):
        with pytest.raises(TamperedError):
            seal.open_header(changed, [opener], passwords)


def test_a_slot_has_the_published_size_and_two_of_them_nothing_in_common() -> None:
    first, second = (slots.make_slot(RECIPIENT, FILE_KEY, CORE, PasswordCache()) for _ in "12")
    assert isinstance(first, RecipientSlot)
    assert isinstance(second, RecipientSlot)
    assert len(first.pack()) == 1300
    assert first.key_id == RECIPIENT.key_id
    assert first.sealed_root != second.sealed_root
    assert first.wrap.salt != second.wrap.salt
    assert first.wrap.wrapped != second.wrap.wrapped


def test_a_slot_follows_the_published_derivation() -> None:
    slot = slots.make_slot(RECIPIENT, FILE_KEY, CORE, PasswordCache())
    assert isinstance(slot, RecipientSlot)
    packed = slot.pack()
    info = b"secimg-watch/v1/recipient-slot\0" + packed[:20] + CORE.pack()
    root_key = crypto.hpke_open(IDENTITY.seed, info, packed[20 : 20 + SEALED_ROOT])
    label = b"secimg-watch/v1/slot\0"
    expanded = crypto.hkdf_expand(root_key, label + packed[:-80] + CORE.pack(), 64)
    assert packed[-80:-48] == expanded[32:]
    assert crypto.unwrap_key(expanded[:32], packed[-48:]) == FILE_KEY


def test_a_slot_moved_to_another_object_does_not_open() -> None:
    slot = slots.make_slot(RECIPIENT, FILE_KEY, CORE, PasswordCache())
    for other in ({"object_id": ObjectId("f" * 32)}, {"vault_id": b"w" * 16}, {"meta_len": 1_097}):
        with pytest.raises(TamperedError, match=crypto.UNAUTHENTIC):
            slots.open_slot(slot, IDENTITY, dataclasses.replace(CORE, **other), PasswordCache())


def test_a_slot_with_any_part_changed_does_not_open() -> None:
    slot = slots.make_slot(RECIPIENT, FILE_KEY, CORE, PasswordCache())
    assert isinstance(slot, RecipientSlot)
    sealed = slot.sealed_root
    for place in range(0, len(sealed), 23):
        changed = sealed[:place] + bytes([sealed[place] ^ 1]) + sealed[place + 1 :]
        with pytest.raises(TamperedError, match=crypto.UNAUTHENTIC):
            slots.open_slot(
                dataclasses.replace(slot, sealed_root=changed), IDENTITY, CORE, PasswordCache()
            )
    for part in ("salt", "commitment", "wrapped"):
        value = getattr(slot.wrap, part)
        for place in range(len(value)):
            changed = value[:place] + bytes([value[place] ^ 1]) + value[place + 1 :]
            wrap = dataclasses.replace(slot.wrap, **{part: changed})
            with pytest.raises(TamperedError, match=crypto.UNAUTHENTIC):
                slots.open_slot(
                    dataclasses.replace(slot, wrap=wrap), IDENTITY, CORE, PasswordCache()
                )


@pytest.mark.parametrize(
    "part", [slice(0, 1088), slice(1088, 1120), slice(1120, 1168)], ids=["ML-KEM", "share", "key"]
)
@pytest.mark.parametrize("byte", [b"\0", b"\xff"])
def test_a_slot_of_nonsense_is_refused_as_any_other_damage(part: slice, byte: bytes) -> None:
    slot = slots.make_slot(RECIPIENT, FILE_KEY, CORE, PasswordCache())
    assert isinstance(slot, RecipientSlot)
    sealed = bytearray(slot.sealed_root)
    sealed[part] = byte * len(sealed[part])
    with pytest.raises(TamperedError, match=crypto.UNAUTHENTIC):
        slots.open_slot(
            dataclasses.replace(slot, sealed_root=bytes(sealed)), IDENTITY, CORE, PasswordCache()
        )


def test_a_private_key_fits_the_slot_that_names_it_and_no_other() -> None:
    passwords = PasswordCache()
    slot = slots.make_slot(RECIPIENT, FILE_KEY, CORE, passwords)
    namesake = KeyEncryptionKey(RECIPIENT.key_id, bytes(32))
    keyring = slots.make_slot(namesake, FILE_KEY, CORE, passwords)
    password = slots.make_slot(
        slots.Password(b"x", kdf="pbkdf2", iterations=100_000, key_id=RECIPIENT.key_id),
        FILE_KEY,
        CORE,
        passwords,
    )
    assert slots.fits(slot, IDENTITY)
    assert not slots.fits(slot, STRANGER)
    assert not slots.fits(slot, KeyEncryptionKey(RECIPIENT.key_id, IDENTITY.seed))
    assert not slots.fits(keyring, IDENTITY)
    assert not slots.fits(password, IDENTITY)
    with pytest.raises(UsageError, match="of its own kind"):
        slots.open_slot(keyring, IDENTITY, CORE, passwords)


def test_whoever_has_the_public_key_alone_opens_nothing() -> None:
    slot = slots.make_slot(RECIPIENT, FILE_KEY, CORE, PasswordCache())
    half = Recipient(RECIPIENT.key_id, RECIPIENT.public_key)
    assert half == RECIPIENT
    with pytest.raises(TamperedError):
        slots.open_slot(slot, PrivateKey(half.key_id, half.public_key[:32]), CORE, PasswordCache())
