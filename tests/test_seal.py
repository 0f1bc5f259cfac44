"""Objects: what goes in comes out, and nothing else is ever let out."""

from __future__ import annotations

import dataclasses
import hmac
import io
import itertools
import os
import tracemalloc
from typing import TYPE_CHECKING

import pytest
from cryptography.cobblestone import Cobblestone256Decryptor
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from secimg_watch import crypto, seal
from secimg_watch.container import Meta, pack_meta
from secimg_watch.errors import ChangedInHandError, KeyMismatchError, TamperedError, UsageError
from secimg_watch.records import KeyEncryptionKey, ObjectId
from secimg_watch.slots import Password, PasswordCache

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from secimg_watch.slots import Lock, Opener

OBJECT = ObjectId("0123456789abcdef" * 2)
VAULT = b"v" * 16
KEK = KeyEncryptionKey(b"k" * 16, b"\x07" * 32)
OTHER_KEK = KeyEncryptionKey(b"o" * 16, b"\x08" * 32)
EDGES = [0, 1, 16_383, 16_384, 16_385, 65_535, 65_536, 65_537, 2**20 - 1, 2**20, 2**20 + 1]


def meta_for(size: int) -> Meta:
    return Meta(
        name=b"IMG_0001.jpg",
        folder=b"2026/11",
        size=size,
        mtime_ns=1_763_900_000_123_456_789,
        mode=0o100640,
        format="JPEG",
        width=4000,
        height=3000,
        label="image",
        source="/srv/scans",
        proof="lease",
        ingested_ns=1_763_900_002_000_000_000,
        tool="secimg-watch 0.1.0",
    )


def sealed(
    picture: bytes,
    *,
    preview: bytes = b"",
    locks: Sequence[Lock] = (KEK,),
    object_id: ObjectId = OBJECT,
    size: int | None = None,
) -> seal.SealedObject:
    return seal.seal_object(
        object_id=object_id,
        vault_id=VAULT,
        locks=locks,
        meta=meta_for(len(picture) if size is None else size),
        preview=preview,
        read=io.BytesIO(picture).readinto,
    )


def written(sealed_object: seal.SealedObject) -> bytes:
    out = io.BytesIO()
    for piece in sealed_object.chunks():
        out.write(piece)
    return out.getvalue()


def read_all(data: bytes, locks: Sequence[Opener] = (KEK,)) -> tuple[Meta, bytes, bytes]:
    """Read everything there is to read."""
    opened = seal.open_object(io.BytesIO(data), locks)
    preview = opened.preview()
    return opened.meta, preview, b"".join(bytes(piece) for piece in opened.body())


class Trickle:
    """A stream that cannot seek and gives a few bytes at a time, as a pipe may."""

    def __init__(self, data: bytes, step: int) -> None:
        self._data = io.BytesIO(data)
        self._step = step

    def readinto(self, buffer: memoryview, /) -> int:
        return self._data.readinto(buffer[: self._step])


class Flow:
    """Reads an object straight from the iterator that seals it."""

    def __init__(self, pieces: Iterator[memoryview]) -> None:
        self._pieces = pieces
        self._left = memoryview(b"")

    def readinto(self, buffer: memoryview, /) -> int:
        if not self._left:
            self._left = next(self._pieces, memoryview(b""))
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count


@pytest.mark.parametrize("size", EDGES)
def test_a_picture_comes_back_byte_for_byte(size: int) -> None:
    picture = os.urandom(size)
    sealed_object = sealed(picture, preview=b"small")
    data = written(sealed_object)
    assert len(data) == sealed_object.size
    assert read_all(data) == (meta_for(size), b"small", picture)


@settings(max_examples=40, deadline=None)
@given(
    st.binary(max_size=70_000), st.binary(max_size=500), st.integers(1, 70_000), st.integers(1, 999)
)
def test_it_does_not_matter_in_which_pieces_source_and_object_are_read(
    picture: bytes, preview: bytes, in_step: int, out_step: int
) -> None:
    source = Trickle(picture, in_step)
    sealed_object = seal.seal_object(
        object_id=OBJECT,
        vault_id=VAULT,
        locks=[KEK],
        meta=meta_for(len(picture)),
        preview=preview,
        read=source.readinto,
    )
    opened = seal.open_object(Trickle(written(sealed_object), out_step), [KEK])
    assert opened.preview() == preview
    assert b"".join(bytes(piece) for piece in opened.body()) == picture


def test_an_object_is_read_from_a_file_buffered_or_not(tmp_path: Path) -> None:
    path = tmp_path / "object.simg"
    picture = os.urandom(200_000)
    path.write_bytes(written(sealed(picture)))
    with path.open("rb") as buffered, path.open("rb", buffering=0) as unbuffered:
        for opened in (seal.open_object(buffered, [KEK]), seal.open_object(unbuffered, [KEK])):
            assert b"".join(bytes(piece) for piece in opened.body()) == picture


def expand_by_hand(key: bytes, info: bytes) -> bytes:
    return hmac.digest(key, info + b"\x01", "sha512")


def test_an_object_opens_with_nothing_but_the_text_of_the_format() -> None:
    data = written(sealed(b"picture", preview=b"small"))
    core, slot, signed, mac = data[:56], data[60:192], data[:192], data[192:224]
    info = b"secimg-watch/v1/slot\0" + slot[:52] + core
    wrapping_key = expand_by_hand(KEK.key, info)[:32]
    file_key = AESGCM(wrapping_key).decrypt(bytes(12), slot[84:], None)
    mac_key = expand_by_hand(file_key, b"secimg-watch/v1/header-mac\0" + core)[:32]
    assert hmac.digest(mac_key, signed, "sha256") == mac
    opened, start = [], 224
    for name, length in ((b"META", 1_096), (b"PREVIEW", 77), (b"BODY", 79)):
        context = b"secimg-watch/v1/" + name + b"\0" + core
        message = Cobblestone256Decryptor(file_key, context)
        opened.append(message.update(data[start : start + length]) + message.finalize())
        start += length
    assert start == len(data)
    assert opened == [pack_meta(meta_for(7)), b"small", b"picture"]


@pytest.mark.parametrize("count", [0, 1, 16_383, 16_384, 16_385, 100_000])
def test_the_length_of_a_message_is_known_beforehand(count: int) -> None:
    message = crypto.seal_message(bytes(32), b"context", bytes(count))
    assert len(message) == crypto.sealed_length(count)
    assert crypto.open_message(bytes(32), b"context", message) == bytes(count)


def test_any_one_of_the_locks_opens() -> None:
    password = Password(b"correct horse", memory_kib=8192, passes=1, lanes=1)
    data = written(sealed(b"picture", locks=[KEK, OTHER_KEK, password]))
    for lock in (KEK, OTHER_KEK, Password(b"correct horse")):
        assert read_all(data, [lock])[2] == b"picture"
    assert read_all(data, [Password(b"wrong"), OTHER_KEK])[2] == b"picture"


def test_the_second_of_two_passwords_opens() -> None:
    first = Password(b"first", memory_kib=8192, passes=1, lanes=1)
    second = Password(b"second", kdf="pbkdf2", iterations=100_000)
    data = written(sealed(b"picture", locks=[first, second]))
    assert read_all(data, [Password(b"second")])[2] == b"picture"


def test_no_password_is_tried_where_a_named_key_opens() -> None:
    lock = Password(b"right", memory_kib=8192, passes=1, lanes=1)
    data = written(sealed(b"picture", locks=[lock, KEK]))
    passwords = PasswordCache()
    seal.open_object(io.BytesIO(data), [lock, KEK], passwords=passwords)
    assert not passwords._keys


def test_one_changed_bit_anywhere_is_refused() -> None:
    data = written(sealed(b"picture", preview=b"p"))
    for offset, bit in itertools.product(range(len(data)), range(8)):
        changed = bytearray(data)
        changed[offset] ^= 1 << bit
        with pytest.raises((TamperedError, KeyMismatchError)) as caught:
            read_all(bytes(changed))
        # Only the key's own name, an open field, may lead to the other error.
        assert caught.type is TamperedError or 64 <= offset < 80


def test_an_object_cut_anywhere_is_refused() -> None:
    data = written(sealed(b"picture", preview=b"p"))
    for length in range(len(data)):
        with pytest.raises(TamperedError):
            read_all(data[:length])


@pytest.mark.parametrize("size", [16_383, 16_384, 65_536, 100_000])
def test_a_body_cut_at_or_beside_the_end_of_a_chunk_is_refused(size: int) -> None:
    data = written(sealed(bytes(size)))
    body = len(data) - crypto.sealed_length(size)
    ends = [body + 56 + index * 16_400 for index in range(size // 16_384 + 1)]
    for end, beside in itertools.product(ends, (-16, -1, 0, 1, 16)):
        if end + beside < len(data):
            with pytest.raises(TamperedError):
                read_all(data[: end + beside])


@pytest.mark.parametrize("more", [b"\0", bytes(15), bytes(16), bytes(17), bytes(16_400)])
@pytest.mark.parametrize("size", [0, 10, 16_384, 65_536])
def test_an_object_that_goes_on_is_refused(size: int, more: bytes) -> None:
    data = written(sealed(bytes(size)))
    with pytest.raises(TamperedError):
        read_all(data + more)
    with pytest.raises(TamperedError):
        read_all(data + data)


def sections(data: bytes) -> list[bytes]:
    header = seal.read_header(io.BytesIO(data))
    core = header.core
    lengths = [56, len(header.pack()) - 56 - 32, 32, core.meta_len, core.preview_len]
    bounds = [*itertools.accumulate(lengths, initial=0), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(bounds)]


@pytest.mark.parametrize("other_id", [OBJECT, ObjectId("f" * 32)], ids=["same id", "other id"])
def test_no_mixture_of_two_objects_opens(other_id: ObjectId) -> None:
    first = sections(written(sealed(b"picture", preview=b"p")))
    second = sections(written(sealed(b"PICTURE", preview=b"P", object_id=other_id)))
    assert [len(part) for part in first] == [len(part) for part in second]
    for choice in itertools.product((0, 1), repeat=len(first)):
        mixed = b"".join(pair[pick] for pick, *pair in zip(choice, first, second, strict=True))
        if len({*choice}) == 1 or (other_id == OBJECT and len({*choice[1:]}) == 1):
            assert read_all(mixed)[2] in {b"picture", b"PICTURE"}  # nothing was mixed
            continue
        with pytest.raises(TamperedError):
            read_all(mixed)


def test_no_section_stands_in_for_another() -> None:
    picture, preview = b"p" * 1024, b"q" * 1024
    parts = sections(written(sealed(picture, preview=preview)))
    assert len({len(part) for part in parts[3:]}) == 1
    for order in itertools.permutations(parts[3:]):
        data = b"".join([*parts[:3], *order])
        if list(order) == parts[3:]:
            assert read_all(data)[1:] == (preview, picture)
            continue
        with pytest.raises(TamperedError):
            read_all(data)


def test_chunks_of_a_body_cannot_be_swapped_doubled_or_dropped() -> None:
    size = 4 * 16_384
    data = written(sealed(os.urandom(size)))
    start = len(data) - crypto.sealed_length(size) + 56
    head, chunks, last = data[:start], data[start:-16], data[-16:]
    one, two, *rest = (chunks[at : at + 16_400] for at in range(0, len(chunks), 16_400))
    for wrong in ([two, one, *rest], [one, one, *rest], [one, *rest], [one, two, two, *rest]):
        with pytest.raises(TamperedError):
            read_all(b"".join([head, *wrong, last]))


def test_the_wrong_key_under_the_right_id_gets_nothing() -> None:
    data = written(sealed(b"picture"))
    wrong = KeyEncryptionKey(KEK.key_id, bytes(32))
    with pytest.raises(TamperedError, match=crypto.UNAUTHENTIC):
        seal.open_object(io.BytesIO(data), [wrong])


def test_a_wrong_password_is_refused_in_the_same_words() -> None:
    lock = Password(b"right", memory_kib=8192, passes=1, lanes=1)
    data = written(sealed(b"picture", locks=[lock]))
    with pytest.raises(TamperedError, match=crypto.UNAUTHENTIC):
        seal.open_object(io.BytesIO(data), [Password(b"wrong"), Password(b"worse")])


def test_an_object_of_a_key_that_is_not_at_hand_says_which() -> None:
    data = written(sealed(b"picture"))
    for locks in ([], [OTHER_KEK], [Password(b"x")]):
        with pytest.raises(KeyMismatchError, match=KEK.key_id.hex()):
            seal.open_object(io.BytesIO(data), locks)


def test_an_object_of_a_password_asks_for_one() -> None:
    lock = Password(b"right", memory_kib=8192, passes=1, lanes=1)
    data = written(sealed(b"picture", locks=[lock]))
    with pytest.raises(KeyMismatchError, match="with a password"):
        seal.open_object(io.BytesIO(data), [KEK])


def test_another_object_or_vault_than_expected_is_refused() -> None:
    data = written(sealed(b"picture"))
    seal.open_object(io.BytesIO(data), [KEK], expect=OBJECT, vault_id=VAULT)
    with pytest.raises(TamperedError, match="name"):
        seal.open_object(io.BytesIO(data), [KEK], expect=ObjectId("f" * 32))
    with pytest.raises(TamperedError, match="another vault"):
        seal.open_object(io.BytesIO(data), [KEK], vault_id=bytes(16))


def test_an_expected_object_is_checked_before_any_password_is_tried() -> None:
    lock = Password(b"right", memory_kib=8192, passes=1, lanes=1)
    data = written(sealed(b"picture", locks=[lock]))
    passwords = PasswordCache()
    with pytest.raises(TamperedError, match="name"):
        seal.open_object(io.BytesIO(data), [lock], expect=ObjectId("f" * 32), passwords=passwords)
    assert not passwords._keys


@settings(deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(TamperedError):
        seal.open_object(io.BytesIO(data), [KEK])


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 200_000])
def test_a_source_that_grows_is_refused(size: int) -> None:
    with pytest.raises(ChangedInHandError, match="grew"):
        written(sealed(bytes(size + 1), size=size))


@pytest.mark.parametrize("size", [1, 65_536, 65_537, 200_000])
def test_a_source_that_shrinks_is_refused(size: int) -> None:
    with pytest.raises(ChangedInHandError, match="shrank"):
        written(sealed(bytes(size - 1), size=size))


def test_an_error_of_the_source_passes_through() -> None:
    def read(_buffer: memoryview) -> int:
        raise OSError(5, "Input/output error")

    sealed_object = seal.seal_object(
        object_id=OBJECT, vault_id=VAULT, locks=[KEK], meta=meta_for(1), preview=b"", read=read
    )
    with pytest.raises(OSError, match="Input/output"):
        written(sealed_object)


def test_a_sealed_object_is_written_only_once() -> None:
    sealed_object = sealed(b"picture")
    written(sealed_object)
    with pytest.raises(UsageError, match="once"):
        sealed_object.chunks()


def test_no_locks_too_many_or_one_twice_seal_nothing() -> None:
    many = [KeyEncryptionKey(bytes([index]) * 16, bytes(32)) for index in range(9)]
    for locks in ([], many, [KEK, KEK]):
        with pytest.raises(UsageError):
            sealed(b"picture", locks=locks)


def test_a_preview_of_one_mebibyte_is_the_largest() -> None:
    preview = os.urandom(2**20)
    assert read_all(written(sealed(b"picture", preview=preview)))[1] == preview
    with pytest.raises(UsageError, match="preview"):
        sealed(b"picture", preview=preview + b"\0")


def test_no_two_objects_share_a_byte_of_key_or_ciphertext() -> None:
    first, second = (sections(written(sealed(bytes(1000), preview=b"p"))) for _ in "12")
    assert first[0] == second[0]
    for left, right in zip(first[1:], second[1:], strict=True):
        assert left[-32:] != right[-32:]


def test_metadata_is_listed_without_touching_the_rest() -> None:
    data = written(sealed(bytes(100_000), preview=b"small"))
    stream = io.BytesIO(data)
    opened = seal.open_object(stream, [KEK], expect=OBJECT)
    assert opened.meta == meta_for(100_000)
    assert opened.preview() == b"small"
    assert stream.tell() < 2_000


def test_a_header_is_read_without_a_key_and_not_a_byte_further() -> None:
    stream = io.BytesIO(written(sealed(b"picture")))
    header = seal.read_header(stream)
    assert header.core.object_id == OBJECT
    assert [slot.key_id for slot in header.slots] == [KEK.key_id]
    assert stream.tell() == len(header.pack())


def test_new_keys_open_the_old_sections_behind_a_new_header() -> None:
    data = written(sealed(b"picture", preview=b"p"))
    old = seal.read_header(io.BytesIO(data))
    passwords = PasswordCache()
    file_key = seal.open_header(old, [KEK], passwords)
    new = seal.build_header(old.core, [OTHER_KEK], file_key, passwords)
    rekeyed = new.pack() + data[len(old.pack()) :]
    assert read_all(rekeyed, [OTHER_KEK]) == (meta_for(7), b"p", b"picture")
    with pytest.raises(KeyMismatchError):
        read_all(rekeyed, [KEK])


def test_a_slot_added_without_the_file_key_is_refused() -> None:
    data = written(sealed(b"picture"))
    old = seal.read_header(io.BytesIO(data))
    foreign = seal.build_header(old.core, [OTHER_KEK], bytes(32), PasswordCache()).slots
    forged = dataclasses.replace(old, slots=old.slots + foreign).pack()
    with pytest.raises(TamperedError, match=crypto.UNAUTHENTIC):
        read_all(forged + data[len(old.pack()) :])


def test_a_preview_may_be_passed_over_even_if_it_is_damaged() -> None:
    parts = sections(written(sealed(b"picture", preview=b"small")))
    parts[4] = bytes(len(parts[4]))
    data = b"".join(parts)
    opened = seal.open_object(io.BytesIO(data), [KEK])
    assert b"".join(bytes(piece) for piece in opened.body()) == b"picture"
    with pytest.raises(TamperedError):
        seal.open_object(io.BytesIO(data), [KEK]).preview()


def test_preview_and_body_are_read_once_and_in_order() -> None:
    data = written(sealed(b"picture", preview=b"small"))
    opened = seal.open_object(io.BytesIO(data), [KEK])
    opened.preview()
    with pytest.raises(UsageError, match="preview"):
        opened.preview()
    for _piece in opened.body():
        with pytest.raises(UsageError, match="body"):
            opened.body()
    opened = seal.open_object(io.BytesIO(data), [KEK])
    for _piece in opened.body():
        with pytest.raises(UsageError, match="before the body"):
            opened.preview()


def test_nothing_is_released_from_a_damaged_piece_on() -> None:
    picture = os.urandom(400_000)
    data = bytearray(written(sealed(picture)))
    data[-150_000] ^= 1
    released = bytearray()
    opened = seal.open_object(io.BytesIO(data), [KEK])
    pieces = map(released.extend, opened.body())
    with pytest.raises(TamperedError, match=crypto.UNAUTHENTIC):
        list(pieces)
    assert picture.startswith(released)
    assert 0 < len(released) < 260_000


def test_a_buffer_is_zeroed_when_its_content_does_not_authenticate() -> None:
    message = bytearray(crypto.seal_message(bytes(32), b"context", b"secret" * 5_000))
    message[56 + 16_399] ^= 1
    buffer = bytearray(b"\xff" * crypto.decryption_room(len(message)))
    with pytest.raises(TamperedError):
        crypto.MessageDecryptor(bytes(32), b"context").update_into(message, buffer)
    assert not any(buffer)


def test_memory_does_not_grow_with_the_picture() -> None:
    size = 300_000_000
    remaining = size

    def read(buffer: memoryview) -> int:
        nonlocal remaining
        count = min(len(buffer), remaining)
        remaining -= count
        return count

    sealed_object = seal.seal_object(
        object_id=OBJECT, vault_id=VAULT, locks=[KEK], meta=meta_for(size), preview=b"", read=read
    )
    tracemalloc.start()
    try:
        opened = seal.open_object(Flow(sealed_object.chunks()), [KEK])
        total = sum(len(piece) for piece in opened.body())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == size
    assert peak < 2_000_000


def test_no_key_and_no_name_shows_in_a_description() -> None:
    sealed_object = sealed(b"picture")
    data = written(sealed_object)
    opened = seal.open_object(io.BytesIO(data), [KEK])
    shown = f"{sealed_object!r} {opened!r} {opened.header!r} {opened.meta!r}"
    for secret in (KEK.key, opened._file_key):
        assert repr(secret)[2:-1] not in shown
        assert secret.hex() not in shown
    assert "IMG_0001" not in shown
