"""The ``.simg`` container, version 1, as bytes: header and META, without any cryptography.

``header | META | [PREVIEW] | BODY``, the header being ``core | slot area | MAC``. All
integers are big-endian. Parsing is canonical: whatever is accepted packs to the very same
bytes again, so that two readers cannot understand one object in two ways.

Every length and every cost is checked against its cap before anything is done with it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from secimg_watch.errors import TamperedError, UsageError
from secimg_watch.records import ObjectId

MAGIC: Final = b"\x8bSIMG\r\n\x1a"
"""First bytes of an object. The first is not ASCII, and CR LF ^Z do not survive a transfer
in text mode, so that such damage is seen at once."""

VERSION: Final = 1
CORE_SIZE: Final = 56
PREFIX_SIZE: Final = CORE_SIZE + 4
"""Bytes that tell how long the whole header is."""

ID_SIZE: Final = 16
"""Bytes in the ids of objects, vaults and keys."""

MAC_SIZE: Final = 32
MAX_SLOTS: Final = 8
MAX_PASSWORD_SLOTS: Final = 2
"""Each password slot costs a reader one slow derivation, so their number is bounded."""

SEALED_ROOT: Final = 1_168
"""Bytes of a root key sealed to a recipient: HPKE's encapsulated key 1120, ciphertext 48."""

MAX_AREA: Final = MAX_SLOTS * 1_300
"""Most bytes of slots together: as many as there may be, each of the longest type."""

SLOT_TAIL: Final = 80
"""Bytes of a slot that come out of its derivation: commitment 32, wrapped key 48."""

SEALED_META: Final = range(1_096, 65_672 + 1)
"""Lengths of a sealed META: 1 KiB to 64 KiB, and what sealing adds."""

SEALED_PREVIEW: Final = range(73, 1_049_672 + 1)
"""Lengths of a sealed preview: 1 byte to 1 MiB, and what sealing adds."""

ARGON2_MEMORY_KIB: Final = range(8 * 1024, 1024 * 1024 + 1)
ARGON2_ITERATIONS: Final = range(1, 16 + 1)
ARGON2_LANES: Final = range(1, 16 + 1)
PBKDF2_ITERATIONS: Final = range(100_000, 10_000_000 + 1)

_META_STEP: Final = 1_024
_META_MAX: Final = 65_536
_NAME_MAX: Final = 4_096
_SIZE_MAX: Final = 2**52 - 1  # what a Cobblestone message holds: 2**38 chunks, the last one short
_WORD_MAX: Final = 64
_CRITICAL: Final = 0x8000
_PRINTABLE: Final = frozenset(range(0x20, 0x7F))

_CORE: Final = struct.Struct(">8sBBHIII16s16s")
_AREA: Final = struct.Struct(">BBH")
_SLOT_HEAD: Final = struct.Struct(">BBH16s")
_WRAP: Final = struct.Struct(">32s32s48s")
_ARGON2: Final = struct.Struct(">IHBB32s")
_PBKDF2: Final = struct.Struct(">IB3s32s")
_RECORD: Final = struct.Struct(">HI")

_KEYRING_TYPE: Final = 1
_ARGON2_TYPE: Final = 2
_PBKDF2_TYPE: Final = 3
_RECIPIENT_TYPE: Final = 4
_SHA256: Final = 1
_SLOT_SIZES: Final = {
    _KEYRING_TYPE: 132,
    _ARGON2_TYPE: 172,
    _PBKDF2_TYPE: 172,
    _RECIPIENT_TYPE: 1_300,
}


def _damaged(detail: str) -> TamperedError:
    return TamperedError(f"not a secimg-watch object, or a damaged one: {detail}")


@dataclass(frozen=True, slots=True)
class Core:
    """The part of the header that never changes; every key derivation is bound to it.

    ``meta_len`` and ``preview_len`` are lengths in bytes of the sealed sections, the latter
    0 where there is no preview. ``vault_id`` has 16 bytes.

    Raises:
        UsageError: a field has no place in a core.
    """

    meta_len: int
    preview_len: int
    object_id: ObjectId
    vault_id: bytes

    def __post_init__(self) -> None:
        """Refuse what cannot be packed."""
        if fault := _lengths_fault(self.meta_len, self.preview_len):
            raise UsageError(f"an object cannot be sealed: {fault}")
        if len(self.vault_id) != ID_SIZE:
            raise UsageError(f"a vault id has {ID_SIZE} bytes")
        if len(self.object_id) != 2 * ID_SIZE or set(self.object_id) - set("0123456789abcdef"):
            raise UsageError("an object id has 32 lower-case hexadecimal digits")

    def pack(self) -> bytes:
        """Return the 56 bytes."""
        object_id = bytes.fromhex(self.object_id)
        lengths = (self.meta_len, self.preview_len)
        return _CORE.pack(MAGIC, VERSION, 0, 0, *lengths, 0, object_id, self.vault_id)


@dataclass(frozen=True, slots=True)
class Wrap:
    """The end of every slot: salt 32, commitment 32, and the wrapped file key 48 bytes."""

    salt: bytes
    commitment: bytes
    wrapped: bytes

    def pack(self) -> bytes:
        """Return the 112 bytes."""
        return _WRAP.pack(self.salt, self.commitment, self.wrapped)


@dataclass(frozen=True, slots=True)
class KeyringSlot:
    """The file key, wrapped with the key-encryption key that ``key_id`` (16 bytes) names."""

    key_id: bytes
    wrap: Wrap

    def pack(self) -> bytes:
        """Return the slot's 132 bytes."""
        return _slot_head(_KEYRING_TYPE, self.key_id) + self.wrap.pack()


@dataclass(frozen=True, slots=True)
class Argon2idSlot:
    """The file key, wrapped with a password through Argon2id.

    ``key_id`` (16 bytes) names the password, ``password_salt`` has 32 bytes.
    """

    key_id: bytes
    memory_kib: int
    iterations: int
    lanes: int
    password_salt: bytes
    wrap: Wrap

    def pack(self) -> bytes:
        """Return the slot's 172 bytes."""
        cost = (self.memory_kib, self.iterations, self.lanes)
        parameters = _ARGON2.pack(*cost, 0, self.password_salt)
        return _slot_head(_ARGON2_TYPE, self.key_id) + parameters + self.wrap.pack()


@dataclass(frozen=True, slots=True)
class Pbkdf2Slot:
    """The file key, wrapped with a password through PBKDF2-HMAC-SHA256.

    ``key_id`` (16 bytes) names the password, ``password_salt`` has 32 bytes.
    """

    key_id: bytes
    iterations: int
    password_salt: bytes
    wrap: Wrap

    def pack(self) -> bytes:
        """Return the slot's 172 bytes."""
        parameters = _PBKDF2.pack(self.iterations, _SHA256, bytes(3), self.password_salt)
        return _slot_head(_PBKDF2_TYPE, self.key_id) + parameters + self.wrap.pack()


@dataclass(frozen=True, slots=True)
class RecipientSlot:
    """The file key, wrapped with a root key that only the recipient's private key opens.

    ``key_id`` (16 bytes) names the public key, ``sealed_root`` has ``SEALED_ROOT`` bytes.
    """

    key_id: bytes
    sealed_root: bytes
    wrap: Wrap

    def pack(self) -> bytes:
        """Return the slot's 1300 bytes."""
        return recipient_slot_head(self.key_id) + self.sealed_root + self.wrap.pack()


def recipient_slot_head(key_id: bytes) -> bytes:
    """Return the first 20 bytes of a recipient's slot, to which its sealed root key is bound."""
    return _slot_head(_RECIPIENT_TYPE, key_id)


PasswordSlot: TypeAlias = Argon2idSlot | Pbkdf2Slot
NamedSlot: TypeAlias = KeyringSlot | RecipientSlot
Slot: TypeAlias = NamedSlot | PasswordSlot


@dataclass(frozen=True, slots=True)
class Header:
    """A whole header; ``mac`` has 32 bytes and covers everything before itself."""

    core: Core
    slots: tuple[Slot, ...]
    mac: bytes

    def pack(self) -> bytes:
        """Return the header's bytes."""
        return pack_unsigned_header(self.core, self.slots) + self.mac


def argon2id_allowed(memory_kib: int, iterations: int, lanes: int) -> bool:
    """Whether the cost lies within the caps: a reader must be neither cheated nor stalled.

    Within them there are always the 8 KiB of memory a lane that RFC 9106 asks for.
    """
    return (
        memory_kib in ARGON2_MEMORY_KIB
        and iterations in ARGON2_ITERATIONS
        and lanes in ARGON2_LANES
    )


def pack_unsigned_header(core: Core, slots: tuple[Slot, ...]) -> bytes:
    """Return the header up to its MAC.

    Raises:
        UsageError: there is no slot, there are too many, or two of them share a key id.
    """
    if fault := _slots_fault(slots):
        raise UsageError(f"an object cannot be sealed: {fault}")
    area = b"".join(slot.pack() for slot in slots)
    return core.pack() + _AREA.pack(len(slots), 0, len(area)) + area


def _lengths_fault(meta_len: int, preview_len: int) -> str:
    if meta_len not in SEALED_META:
        return "the length of its metadata is out of bounds"
    if preview_len and preview_len not in SEALED_PREVIEW:
        return "the length of its preview is out of bounds"
    return ""


def _slots_fault(slots: tuple[Slot, ...]) -> str:
    if not 1 <= len(slots) <= MAX_SLOTS:
        return f"the number of key slots is not 1 to {MAX_SLOTS}"
    if sum(isinstance(slot, PasswordSlot) for slot in slots) > MAX_PASSWORD_SLOTS:
        return f"there are more than {MAX_PASSWORD_SLOTS} password slots"
    if len({slot.key_id for slot in slots}) != len(slots):
        return "two key slots have the same key id"
    return ""


def parse_prefix(data: bytes) -> int:
    """Return the length in bytes of the header that starts with these ``PREFIX_SIZE`` bytes.

    Raises:
        TamperedError: they do not start a header of this version.
    """
    if len(data) < PREFIX_SIZE:
        raise _damaged("it is too short")
    _parse_core(data[:CORE_SIZE])
    count, reserved, area = _AREA.unpack(data[CORE_SIZE:PREFIX_SIZE])
    if not 1 <= count <= MAX_SLOTS or reserved or area > MAX_AREA:
        raise _damaged("the area of its key slots is malformed")
    return PREFIX_SIZE + int(area) + MAC_SIZE


def parse_header(data: bytes) -> Header:
    """Read a header of exactly these bytes. Nothing of it is authenticated yet.

    Raises:
        TamperedError: they are not a header of this version.
    """
    if parse_prefix(data) != len(data):
        raise _damaged("its header has another length than it says")
    slots = _parse_slots(data[PREFIX_SIZE:-MAC_SIZE])
    if len(slots) != data[CORE_SIZE]:
        raise _damaged("the number of its key slots is wrong")
    if fault := _slots_fault(slots):
        raise _damaged(fault)
    return Header(_parse_core(data[:CORE_SIZE]), slots, data[-MAC_SIZE:])


def _parse_core(data: bytes) -> Core:
    magic, version, flags, low, meta_len, preview_len, high, object_id, vault_id = _CORE.unpack(
        data
    )
    if magic != MAGIC:
        raise _damaged("it does not begin as one")
    if version != VERSION:
        raise TamperedError(
            f"the object has format version {version}, and only {VERSION} is known",
            hint="a newer secimg-watch may read it",
        )
    if flags or low or high:
        raise _damaged("a reserved field is set")
    if fault := _lengths_fault(meta_len, preview_len):
        raise _damaged(fault)
    return Core(meta_len, preview_len, ObjectId(object_id.hex()), vault_id)


def _slot_head(kind: int, key_id: bytes) -> bytes:
    return _SLOT_HEAD.pack(kind, 0, _SLOT_SIZES[kind], key_id)


def _parse_slots(area: bytes) -> tuple[Slot, ...]:
    slots: list[Slot] = []
    while area:
        if len(area) < _SLOT_HEAD.size:
            raise _damaged("a key slot is cut")
        kind, flags, length, key_id = _SLOT_HEAD.unpack_from(area)
        if _SLOT_SIZES.get(kind) != length or flags or len(area) < length:
            raise _damaged("a key slot is of an unknown kind, or malformed")
        slots.append(_parse_slot(kind, key_id, area[_SLOT_HEAD.size : length]))
        area = area[length:]
    return tuple(slots)


def _parse_slot(kind: int, key_id: bytes, body: bytes) -> Slot:
    wrap = Wrap(*_WRAP.unpack(body[-_WRAP.size :]))
    if kind == _KEYRING_TYPE:
        return KeyringSlot(key_id, wrap)
    if kind == _RECIPIENT_TYPE:
        return RecipientSlot(key_id, body[:SEALED_ROOT], wrap)
    if kind == _ARGON2_TYPE:
        memory_kib, iterations, lanes, reserved, salt = _ARGON2.unpack_from(body)
        if reserved or not argon2id_allowed(memory_kib, iterations, lanes):
            raise _damaged("the cost of a password slot is out of bounds")
        return Argon2idSlot(key_id, memory_kib, iterations, lanes, salt, wrap)
    iterations, digest, zeros, salt = _PBKDF2.unpack_from(body)
    if digest != _SHA256 or any(zeros) or iterations not in PBKDF2_ITERATIONS:
        raise _damaged("the cost of a password slot is out of bounds")
    return Pbkdf2Slot(key_id, iterations, salt, wrap)


@dataclass(frozen=True, slots=True)
class Meta:
    """What an object says of the picture in it; all of it is stored encrypted.

    ``name`` is the file's own name and ``folder`` where it lay, relative to the watched
    folder with ``/`` between, ``b""`` for its root; both are the exact bytes. Times are
    nanoseconds since 1970, in any range a file system can store. ``mode`` is ``st_mode`` as
    it was read: whoever restores decides which bits to apply. ``width`` and ``height`` are
    pixels, 0 where not known. ``source`` is the watched folder, with surrogate escapes
    (PEP 383) where it is not valid UTF-8; the other strings are printable ASCII.
    """

    name: bytes = field(repr=False)  # what logs must not show unless the policy says so
    folder: bytes = field(repr=False)
    size: int
    mtime_ns: int
    mode: int
    format: str
    width: int
    height: int
    label: str
    source: str = field(repr=False)
    proof: str
    ingested_ns: int
    tool: str


def _path_fault(meta: Meta) -> str:
    """Say what is wrong with name or folder; neither may lead out of its directory."""
    if not 1 <= len(meta.name) <= _NAME_MAX or len(meta.folder) > _NAME_MAX:
        return f"a name has 1 to {_NAME_MAX} bytes, and a folder at most {_NAME_MAX}"
    parts = [meta.name, *(meta.folder.split(b"/") if meta.folder else ())]
    if b"/" in meta.name or any(part in {b"", b".", b".."} or 0 in part for part in parts):
        return "a name or a folder is not one that a file can have"
    return ""


def _size_fault(meta: Meta) -> str:
    return f"a picture has at most {_SIZE_MAX} bytes" if meta.size > _SIZE_MAX else ""


def _meta_values(meta: Meta) -> tuple[bytes, ...]:
    """Return the values of all fields, encoded; a field's tag is its place, from 1."""
    return (
        meta.name,
        meta.folder,
        meta.size.to_bytes(8, "big"),
        meta.mtime_ns.to_bytes(16, "big", signed=True),
        meta.mode.to_bytes(4, "big"),
        meta.format.encode("ascii"),
        meta.width.to_bytes(4, "big"),
        meta.height.to_bytes(4, "big"),
        meta.label.encode("ascii"),
        meta.source.encode("utf-8", "surrogateescape"),
        meta.proof.encode("ascii"),
        meta.ingested_ns.to_bytes(16, "big", signed=True),
        meta.tool.encode("ascii"),
    )


_FIELDS: Final = 13
_SIZES: Final = {3: 8, 4: 16, 5: 4, 7: 4, 8: 4, 12: 16}
_WORDS: Final = {6: "format", 9: "label", 11: "proof", 13: "tool"}
_SOURCE: Final = 10


def pack_meta(meta: Meta) -> bytes:
    """Return the record's bytes, padded with zeros to a multiple of 1 KiB.

    The padding hides how long the name is.

    Raises:
        UsageError: a field has a value that a reader would refuse.
    """
    try:
        values = dict(enumerate(_meta_values(meta), start=1))
    except (OverflowError, UnicodeEncodeError):
        raise UsageError("the metadata of an object is out of range") from None
    if fault := _path_fault(meta) or _values_fault(values) or _size_fault(meta):
        raise UsageError(f"the metadata of an object is out of range: {fault}")
    records = b"".join(_RECORD.pack(tag, len(value)) + value for tag, value in values.items())
    return records.ljust(_padded(len(records)), b"\0")


def _padded(used: int) -> int:
    """Return the length for ``used`` bytes of records and the two-byte end mark."""
    return -(-(used + 2) // _META_STEP) * _META_STEP


def _values_fault(values: dict[int, bytes]) -> str:
    if any(len(values[tag]) != size for tag, size in _SIZES.items()):
        return "a number has the wrong width"
    for tag, name in _WORDS.items():
        if len(values[tag]) > _WORD_MAX or not _PRINTABLE.issuperset(values[tag]):
            return f"the {name} is not {_WORD_MAX} printable characters at most"
    if len(values[_SOURCE]) > _NAME_MAX:
        return f"the source has more than {_NAME_MAX} bytes"
    return ""


def parse_meta(data: bytes) -> Meta:
    """Read the bytes of an authenticated META section.

    Fields that this version does not know are left out, unless they are marked critical.

    Raises:
        TamperedError: they are not the bytes of such a record.
    """
    if len(data) % _META_STEP or not _META_STEP <= len(data) <= _META_MAX:
        raise _damaged("its metadata has an impossible length")
    values = _parse_records(data)
    known = {tag: value for tag, value in values.items() if tag <= _FIELDS}
    if len(known) != _FIELDS:
        raise _damaged("a field of its metadata is missing")
    if any(tag & _CRITICAL for tag in values):
        raise _damaged("its metadata has a critical field that is not known")
    if fault := _values_fault(known):
        raise _damaged(fault)
    meta = _decode_meta(known)
    if fault := _path_fault(meta) or _size_fault(meta):
        raise _damaged(fault)
    return meta


def _parse_records(data: bytes) -> dict[int, bytes]:
    values: dict[int, bytes] = {}
    offset = last = 0
    while tag := int.from_bytes(data[offset : offset + 2], "big"):
        start = offset + _RECORD.size
        length = int.from_bytes(data[offset + 2 : start], "big")
        # At least the two bytes of the end mark follow the last record.
        if tag <= last or start + length + 2 > len(data):
            raise _damaged("a field of its metadata is out of place")
        values[tag] = data[start : start + length]
        offset, last = start + length, tag
    if data[offset:].strip(b"\0") or len(data) != _padded(offset):
        raise _damaged("its metadata is not padded as it should be")
    return values


def _decode_meta(values: dict[int, bytes]) -> Meta:
    return Meta(
        name=values[1],
        folder=values[2],
        size=int.from_bytes(values[3], "big"),
        mtime_ns=int.from_bytes(values[4], "big", signed=True),
        mode=int.from_bytes(values[5], "big"),
        format=values[6].decode("ascii"),
        width=int.from_bytes(values[7], "big"),
        height=int.from_bytes(values[8], "big"),
        label=values[9].decode("ascii"),
        source=values[10].decode("utf-8", "surrogateescape"),
        proof=values[11].decode("ascii"),
        ingested_ns=int.from_bytes(values[12], "big", signed=True),
        tool=values[13].decode("ascii"),
    )
