"""The container's bytes: canonical, bounded, and hostile input refused with one error."""

from __future__ import annotations

import dataclasses
import os
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from secimg_watch import container, crypto
from secimg_watch.container import (
    Argon2idSlot,
    Core,
    Header,
    KeyringSlot,
    Meta,
    Pbkdf2Slot,
    Slot,
    Wrap,
)
from secimg_watch.errors import TamperedError, UsageError
from secimg_watch.records import ObjectId

META = Meta(
    name=b"IMG_0001.jpg",
    folder=b"2026/11",
    size=400_000,
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
WRAP = Wrap(b"s" * 32, b"c" * 32, b"w" * 48)
KEYRING = KeyringSlot(b"a" * 16, WRAP)
ARGON2 = Argon2idSlot(b"b" * 16, 8192, 1, 1, b"p" * 32, WRAP)
PBKDF2 = Pbkdf2Slot(b"d" * 16, 100_000, b"p" * 32, WRAP)
CORE = Core(1_096, 73, ObjectId("0123456789abcdef" * 2), b"v" * 16)


def header_bytes(*slots: Slot) -> bytes:
    return container.pack_unsigned_header(CORE, slots) + b"m" * 32


def patched(data: bytes, offset: int, new: bytes) -> bytes:
    return data[:offset] + new + data[offset + len(new) :]


def split(data: bytes) -> list[bytes]:
    """Take a record apart into its fields, up to the end mark."""
    records = []
    while data[:2] != b"\0\0":
        length = 6 + int.from_bytes(data[2:6], "big")
        records.append(data[:length])
        data = data[length:]
    return records


def records_of(meta: Meta) -> list[bytes]:
    return split(container.pack_meta(meta))


def padded(records: list[bytes], extra: int = 0) -> bytes:
    joined = b"".join(records)
    return joined.ljust(-(-(len(joined) + 2) // 1024) * 1024 + extra, b"\0")


def key_ids() -> st.SearchStrategy[bytes]:
    return st.binary(min_size=16, max_size=16)


def wraps() -> st.SearchStrategy[Wrap]:
    salts = st.binary(min_size=32, max_size=32)
    return st.builds(Wrap, salts, salts, st.binary(min_size=48, max_size=48))


def slot_lists() -> st.SearchStrategy[tuple[Slot, ...]]:
    salts = st.binary(min_size=32, max_size=32)
    argon2 = st.builds(
        Argon2idSlot,
        key_ids(),
        st.integers(8 * 1024, 1024 * 1024),
        st.integers(1, 16),
        st.integers(1, 16),
        salts,
        wraps(),
    )
    pbkdf2 = st.builds(Pbkdf2Slot, key_ids(), st.integers(100_000, 10_000_000), salts, wraps())
    keyring = st.builds(KeyringSlot, key_ids(), wraps())
    return st.builds(
        lambda many, few: (*many, *few),
        st.lists(keyring, min_size=1, max_size=6),
        st.lists(st.one_of(argon2, pbkdf2), max_size=2),
    ).filter(lambda slots: len({slot.key_id for slot in slots}) == len(slots))


def cores() -> st.SearchStrategy[Core]:
    ids = st.binary(min_size=16, max_size=16)
    return st.builds(
        Core,
        st.integers(1_096, 65_672),
        st.one_of(st.just(0), st.integers(73, 1_049_672)),
        ids.map(lambda raw: ObjectId(raw.hex())),
        ids,
    )


def metas() -> st.SearchStrategy[Meta]:
    names = (
        st.binary(min_size=1, max_size=300)
        .map(lambda raw: raw.replace(b"/", b"_").replace(b"\0", b"_"))
        .filter(lambda raw: raw not in {b".", b".."})
    )
    words = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=64)
    times = st.integers(-(2**95), 2**95)
    numbers = st.integers(0, 2**32 - 1)
    return st.builds(
        Meta,
        name=names,
        folder=st.lists(names, max_size=4).map(b"/".join),
        size=st.integers(0, 2**52 - 1),
        mtime_ns=times,
        mode=numbers,
        format=words,
        width=numbers,
        height=numbers,
        label=words,
        source=st.binary(max_size=400).map(lambda raw: raw.decode("utf-8", "surrogateescape")),
        proof=words,
        ingested_ns=times,
        tool=words,
    )


@given(cores(), slot_lists(), st.binary(min_size=32, max_size=32))
def test_every_header_reads_back_as_it_was_packed(
    core: Core, slots: tuple[Slot, ...], mac: bytes
) -> None:
    header = Header(core, slots, mac)
    packed = header.pack()
    assert container.parse_prefix(packed[:60]) == len(packed)
    assert container.parse_header(packed) == header
    assert len(packed) <= 4_400


@given(st.binary(max_size=600))
@example(b"")
def test_random_bytes_are_no_header(data: bytes) -> None:
    with pytest.raises(TamperedError):
        container.parse_header(data)


@given(st.integers(0, 567), st.binary(min_size=1, max_size=8))
def test_a_changed_header_is_refused_or_packs_to_the_same_bytes(offset: int, new: bytes) -> None:
    whole = header_bytes(KEYRING, ARGON2, PBKDF2)
    data = patched(whole, offset, new)[: len(whole)]
    try:
        header = container.parse_header(data)
    except TamperedError:
        return
    assert header.pack() == data


def test_a_header_has_the_published_layout() -> None:
    data = header_bytes(KEYRING, ARGON2, PBKDF2)
    assert data[:8] == b"\x8bSIMG\r\n\x1a"
    assert data[8:12] == b"\x01\0\0\0"
    assert struct.unpack(">III", data[12:24]) == (1_096, 73, 0)
    assert data[24:40].hex() == CORE.object_id
    assert data[40:56] == CORE.vault_id
    assert struct.unpack(">BBH", data[56:60]) == (3, 0, 132 + 172 + 172)
    assert data[60:80] == b"\x01\0\0\x84" + b"a" * 16
    assert data[80:192] == b"s" * 32 + b"c" * 32 + b"w" * 48
    assert data[192:220] == b"\x02\0\0\xac" + b"b" * 16 + struct.pack(">IHBB", 8192, 1, 1, 0)
    assert data[364:392] == b"\x03\0\0\xac" + b"d" * 16 + struct.pack(">IB3x", 100_000, 1)
    assert data[-32:] == b"m" * 32


@pytest.mark.parametrize(
    ("offset", "new"),
    [
        pytest.param(0, b"\x0b", id="first bit stripped by a seven-bit transfer"),
        pytest.param(5, b"\n\x1a", id="line end changed by a text-mode transfer"),
        pytest.param(8, b"\0", id="version 0"),
        pytest.param(8, b"\2", id="version 2"),
        pytest.param(9, b"\1", id="flag set"),
        pytest.param(10, b"\0\1", id="first reserved field set"),
        pytest.param(20, b"\0\0\0\1", id="second reserved field set"),
        pytest.param(12, struct.pack(">I", 0), id="no metadata"),
        pytest.param(12, struct.pack(">I", 1_095), id="metadata too short"),
        pytest.param(12, struct.pack(">I", 65_673), id="metadata too long"),
        pytest.param(12, b"\xff" * 4, id="metadata of 4 GiB"),
        pytest.param(16, struct.pack(">I", 72), id="preview too short"),
        pytest.param(16, struct.pack(">I", 1_049_673), id="preview too long"),
        pytest.param(56, b"\0", id="no slots"),
        pytest.param(56, b"\2", id="fewer slots than there are"),
        pytest.param(56, b"\4", id="more slots than there are"),
        pytest.param(56, b"\xff", id="255 slots"),
        pytest.param(57, b"\1", id="reserved byte of the area set"),
        pytest.param(58, b"\0\0", id="area empty"),
        pytest.param(58, b"\xff\xff", id="area of 64 KiB"),
        pytest.param(58, struct.pack(">H", 475), id="area one byte short"),
        pytest.param(60, b"\4", id="slot of a later version"),
        pytest.param(60, b"\2", id="slot of a type with another length"),
        pytest.param(61, b"\1", id="slot flag set"),
        pytest.param(62, b"\0\0", id="slot without length"),
        pytest.param(62, b"\xff\xff", id="slot past the area"),
        pytest.param(196 + 16, struct.pack(">I", 0), id="Argon2id without memory"),
        pytest.param(196 + 16, struct.pack(">I", 8_191), id="Argon2id with too little memory"),
        pytest.param(196 + 16, struct.pack(">I", 1_048_577), id="Argon2id with too much memory"),
        pytest.param(196 + 16, b"\xff" * 4, id="Argon2id with 4 TiB"),
        pytest.param(196 + 20, struct.pack(">H", 0), id="Argon2id without passes"),
        pytest.param(196 + 20, struct.pack(">H", 17), id="Argon2id with 17 passes"),
        pytest.param(196 + 22, b"\0", id="Argon2id without lanes"),
        pytest.param(196 + 22, b"\x11", id="Argon2id with 17 lanes"),
        pytest.param(196 + 23, b"\1", id="Argon2id with the reserved byte set"),
        pytest.param(368 + 16, struct.pack(">I", 99_999), id="PBKDF2 with too few iterations"),
        pytest.param(368 + 16, struct.pack(">I", 10_000_001), id="PBKDF2 with too many"),
        pytest.param(368 + 20, b"\2", id="PBKDF2 with another hash"),
        pytest.param(368 + 21, b"\1", id="PBKDF2 with a reserved byte set"),
        pytest.param(196, b"a" * 16, id="two slots with one key id"),
    ],
)
def test_a_header_out_of_bounds_is_refused(offset: int, new: bytes) -> None:
    whole = header_bytes(KEYRING, ARGON2, PBKDF2)
    container.parse_header(whole)
    with pytest.raises(TamperedError):
        container.parse_header(patched(whole, offset, new))


@pytest.mark.parametrize("length", range(60))
def test_a_prefix_that_is_cut_is_refused(length: int) -> None:
    with pytest.raises(TamperedError, match="too short"):
        container.parse_prefix(header_bytes(KEYRING)[:length])


def test_a_header_that_is_cut_or_goes_on_is_refused() -> None:
    whole = header_bytes(KEYRING, ARGON2)
    for data in [whole[:length] for length in range(60, len(whole))] + [whole + b"\0"]:
        with pytest.raises(TamperedError, match="another length"):
            container.parse_header(data)


def test_more_than_two_password_slots_are_neither_written_nor_read() -> None:
    third = dataclasses.replace(ARGON2, key_id=b"e" * 16)
    with pytest.raises(UsageError, match="password slots"):
        container.pack_unsigned_header(CORE, (ARGON2, PBKDF2, third))
    area = ARGON2.pack() + PBKDF2.pack() + third.pack()
    data = CORE.pack() + struct.pack(">BBH", 3, 0, len(area)) + area + bytes(32)
    with pytest.raises(TamperedError, match="password slots"):
        container.parse_header(data)


@pytest.mark.parametrize(
    "slots",
    [
        (),
        tuple(KeyringSlot(bytes([index]) * 16, WRAP) for index in range(9)),
        (KEYRING, dataclasses.replace(ARGON2, key_id=KEYRING.key_id)),
    ],
    ids=["none", "nine", "one key id twice"],
)
def test_slots_that_no_reader_takes_are_not_written(slots: tuple[Slot, ...]) -> None:
    with pytest.raises(UsageError):
        container.pack_unsigned_header(CORE, slots)


@pytest.mark.parametrize(
    "fields",
    [
        (1_000, 0, CORE.object_id, CORE.vault_id),
        (1_096, 1, CORE.object_id, CORE.vault_id),
        (1_096, 0, ObjectId("ABCDEF0123456789" * 2), CORE.vault_id),
        (1_096, 0, ObjectId("abcdef"), CORE.vault_id),
        (1_096, 0, CORE.object_id, b"short"),
    ],
    ids=["metadata", "preview", "upper case", "short object id", "short vault id"],
)
def test_a_core_that_no_reader_takes_cannot_be_made(
    fields: tuple[int, int, ObjectId, bytes],
) -> None:
    with pytest.raises(UsageError):
        Core(*fields)


def test_the_bounds_of_the_sections_are_those_of_sealing() -> None:
    sealed = crypto.sealed_length
    assert (container.SEALED_META[0], container.SEALED_META[-1]) == (sealed(1024), sealed(65_536))
    assert (container.SEALED_PREVIEW[0], container.SEALED_PREVIEW[-1]) == (
        sealed(1),
        sealed(1_048_576),
    )


@given(metas())
def test_metadata_reads_back_as_it_was_packed(meta: Meta) -> None:
    packed = container.pack_meta(meta)
    assert len(packed) % 1024 == 0
    assert container.parse_meta(packed) == meta


@given(st.binary(max_size=3000))
def test_random_bytes_are_no_metadata(data: bytes) -> None:
    with pytest.raises(TamperedError):
        container.parse_meta(data)


@given(st.integers(0, 1023), st.binary(min_size=1, max_size=8))
@example(sum(map(len, split(container.pack_meta(META)))), b"\x01\x00")
def test_changed_metadata_is_refused_or_packs_to_the_same_bytes(offset: int, new: bytes) -> None:
    data = patched(container.pack_meta(META), offset, new)[:1024]
    try:
        meta = container.parse_meta(data)
    except TamperedError:
        return
    known = [record for record in split(data) if record[:2] <= b"\0\x0d"]
    assert container.pack_meta(meta) == padded(known)
    assert container.pack_meta(meta) == data or known != split(data)


@given(st.lists(st.tuples(st.integers(0, 20), st.binary(max_size=40)), max_size=12))
def test_records_that_are_not_all_there_are_refused(records: list[tuple[int, bytes]]) -> None:
    data = b"".join(struct.pack(">HI", tag, len(value)) + value for tag, value in records)
    with pytest.raises(TamperedError):
        container.parse_meta(padded([data]))


def test_an_unknown_field_is_left_out_and_an_unknown_critical_one_refused() -> None:
    records = records_of(META)
    assert container.parse_meta(padded([*records, b"\0\x0e\0\0\0\1x"])) == META
    assert container.parse_meta(padded([*records, b"\x7f\xff\0\0\0\0"])) == META
    with pytest.raises(TamperedError, match="critical"):
        container.parse_meta(padded([*records, b"\x80\x0e\0\0\0\1x"]))


def test_fields_missing_doubled_or_out_of_order_are_refused() -> None:
    records = records_of(META)
    assert container.parse_meta(padded(records)) == META
    for index in range(len(records)):
        fewer = records[:index] + records[index + 1 :]
        doubled = [*records[: index + 1], *records[index:]]
        for wrong in (fewer, doubled, [*fewer, records[index]][::-1]):
            with pytest.raises(TamperedError):
                container.parse_meta(padded(wrong))


def test_padding_is_zeros_and_never_more_than_needed() -> None:
    records = records_of(META)
    with pytest.raises(TamperedError, match="padded"):
        container.parse_meta(padded(records, extra=1024))
    with pytest.raises(TamperedError, match="padded"):
        container.parse_meta(padded(records)[:-1] + b"\1")
    with pytest.raises(TamperedError, match="length"):
        container.parse_meta(padded(records, extra=1))


def test_records_that_fill_the_last_bytes_leave_room_for_the_end_mark() -> None:
    used = sum(map(len, records_of(META)))
    for missing, size in [(2, 1024), (1, 2048), (0, 2048)]:
        meta = dataclasses.replace(META, name=META.name + b"x" * (1024 - used - missing))
        packed = container.pack_meta(meta)
        assert len(packed) == size
        assert container.parse_meta(packed) == meta


def test_a_field_that_goes_past_the_end_is_refused() -> None:
    for length in (1024 - 6, 1024 - 7, 65_536, 2**32 - 1):
        with pytest.raises(TamperedError, match="out of place"):
            container.parse_meta(struct.pack(">HI", 1, length).ljust(1024, b"x"))


@pytest.mark.parametrize(
    "name", [b"", b".", b"..", b"a/b", b"/etc", b"a\0b", b"x" * 4097], ids=repr
)
def test_a_name_that_no_file_has_is_neither_written_nor_read(name: bytes) -> None:
    with pytest.raises(UsageError):
        container.pack_meta(dataclasses.replace(META, name=name))
    record = struct.pack(">HI", 1, len(name)) + name
    with pytest.raises(TamperedError):
        container.parse_meta(padded([record, *records_of(META)[1:]]))


@pytest.mark.parametrize(
    "folder", [b"/", b"/a", b"a/", b"a//b", b"../a", b"a/./b", b"a\0", b"x" * 4097], ids=repr
)
def test_a_folder_that_leads_elsewhere_is_neither_written_nor_read(folder: bytes) -> None:
    with pytest.raises(UsageError):
        container.pack_meta(dataclasses.replace(META, folder=folder))
    first, _second, *others = records_of(META)
    record = struct.pack(">HI", 2, len(folder)) + folder
    with pytest.raises(TamperedError):
        container.parse_meta(padded([first, record, *others]))


@pytest.mark.parametrize(
    "change",
    [
        {"size": -1},
        {"size": 2**64},
        {"mode": 2**32},
        {"mtime_ns": 2**127},
        {"width": -1},
        {"format": "JPEG\n"},
        {"label": "\x1b[31m"},
        {"proof": "x" * 65},
        {"tool": "\N{LATIN SMALL LETTER E WITH ACUTE}"},
        {"source": "x" * 4097},
        {"source": "\ud800"},
    ],
    ids=repr,
)
def test_a_value_out_of_range_is_not_written(change: dict[str, int | str]) -> None:
    values = {**dataclasses.asdict(META), **change}
    with pytest.raises(UsageError, match="out of range"):
        container.pack_meta(Meta(**values))


@pytest.mark.parametrize(
    ("tag", "value"), [(3, bytes(7)), (4, bytes(8)), (6, b"\x1b[2J"), (10, b"x" * 4097)]
)
def test_a_value_of_the_wrong_shape_is_not_read(tag: int, value: bytes) -> None:
    records = records_of(META)
    records[tag - 1] = struct.pack(">HI", tag, len(value)) + value
    with pytest.raises(TamperedError):
        container.parse_meta(padded(records))


def test_names_that_are_not_text_survive_exactly() -> None:
    meta = dataclasses.replace(
        META, name=b"\xff\xfe\n\x1b.jpg", source=os.fsdecode(b"/srv/\xff scans")
    )
    assert container.parse_meta(container.pack_meta(meta)) == meta


def test_a_description_of_metadata_shows_no_name() -> None:
    assert "IMG_0001" not in repr(META)
    assert "2026/11" not in repr(META)
    assert "scans" not in repr(META)
