"""A reader of `.simg` objects, written from docs/format.md alone: that text as a program.

It shares no code with the package, cuts and checks the chunks itself and (independent_hpke.py)
does HPKE step by step, so that the two agree only where the text makes them. Comments name the
sections of the text.
"""

from __future__ import annotations

import io
import struct
from hashlib import pbkdf2_hmac
from hmac import compare_digest, digest
from typing import TYPE_CHECKING, NamedTuple

from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from independent_hpke import decrypt, hpke_open

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Meta = dict[str, int | str | bytes]
SLOT_LENGTHS = {1: 132, 2: 172, 3: 172, 4: 1300}
NAMES = "name folder size mtime_ns mode format width height label source proof ingested_ns tool"
FIELDS = dict(enumerate(NAMES.split(), 1))
WIDTHS = {"size": 8, "mtime_ns": 16, "mode": 4, "width": 4, "height": 4, "ingested_ns": 16}


class RefusedError(Exception):
    """The object does not open: the class given in Reading, and what was released of BODY."""

    def __init__(self, outcome: str, released: bytes = b"") -> None:
        super().__init__(outcome)
        self.outcome, self.released = outcome, released


class Secrets(NamedTuple):
    """What a reader is given to open with: keys and identities' seeds by their ids, a password."""

    keys: Mapping[bytes, bytes]
    seeds: Mapping[bytes, bytes]
    password: bytes | None


def need(condition: object, outcome: str) -> None:
    if not condition:
        raise RefusedError(outcome)


def take(source: io.BytesIO, length: int, outcome: str) -> bytes:
    need(len(piece := source.read(length)) == length, outcome)
    return piece


def expand(key: bytes, info: bytes, length: int) -> bytes:  # Conventions
    result = block = b""
    for i in range(1, (length + 63) // 64 + 1):
        block = digest(key, block + info + bytes([i]), "sha512")
        result += block
    return result[:length]


def read_object(
    data: bytes, secrets: Secrets, object_id: bytes | None = None, vault_id: bytes | None = None
) -> tuple[Meta, bytes | None, bytes]:  # Reading
    source = io.BytesIO(data)
    start = take(source, 60, "malformed")  # step 1
    core, (count, zero, area_length) = start[:56], struct.unpack(">BBH", start[56:])
    meta_length, preview_length, reserved = struct.unpack(">III", core[12:24])
    need(core[:12] == b"\x8bSIMG\r\n\x1a\1\0\0\0" and reserved == 0, "malformed")
    need(1096 <= meta_length <= 65_672, "malformed")
    need(preview_length == 0 or 73 <= preview_length <= 1_049_672, "malformed")
    need(1 <= count <= 8 and zero == 0 and area_length <= 10_400, "malformed")
    area, mac = take(source, area_length, "malformed"), take(source, 32, "malformed")  # step 2
    slots = list(parse_slots(area, count))
    need(len({slot[4:20] for slot in slots}) == count, "malformed")
    need(sum(slot[0] in {2, 3} for slot in slots) <= 2, "malformed")
    need(object_id in {None, core[24:40]} and vault_id in {None, core[40:56]}, "mismatch")  # step 3
    file_key = find_file_key(slots, core, secrets)  # step 4
    mac_key = expand(file_key, b"secimg-watch/v1/header-mac\0" + core, 32)  # step 5
    need(compare_digest(digest(mac_key, start + area, "sha256"), mac), "header")
    context = b"secimg-watch/v1/META\0" + core  # step 6
    meta = parse_meta(b"".join(open_message(source, meta_length, file_key, context)))
    preview = None
    if preview_length:  # step 7: one that is there is always asked for
        context = b"secimg-watch/v1/PREVIEW\0" + core
        preview = b"".join(open_message(source, preview_length, file_key, context))
    need((size := int(meta["size"])) < 2**52, "content")  # step 8
    body_length = 56 + size + 16 * (size // 16_384 + 1)
    context, payload = b"secimg-watch/v1/BODY\0" + core, b""
    try:
        for chunk in open_message(source, body_length, file_key, context):
            payload += chunk
        need(source.read() == b"", "content")  # step 9
    except RefusedError as failure:
        released = payload[: len(payload) // 16_384 * 16_384]  # never the last chunk
        raise RefusedError(failure.outcome, released) from None
    return meta, preview, payload


def parse_slots(area: bytes, count: int) -> Iterator[bytes]:  # The slots
    source = io.BytesIO(area)
    for _ in range(count):
        head = take(source, 20, "malformed")
        length = SLOT_LENGTHS.get(head[0], 0)
        need(length and head[1:4] == struct.pack(">BH", 0, length), "malformed")
        slot = head + take(source, length - 20, "malformed")
        if head[0] == 2:
            memory, passes, lanes, zero = struct.unpack(">IHBB", slot[20:28])
            need(8192 <= memory <= 1_048_576 and 1 <= passes <= 16, "malformed")
            need(1 <= lanes <= 16 and zero == 0, "malformed")
        elif head[0] == 3:
            need(100_000 <= int.from_bytes(slot[20:24]) <= 10_000_000, "malformed")
            need(slot[24:28] == b"\1\0\0\0", "malformed")
        yield slot
    need(source.read() == b"", "malformed")


def find_file_key(slots: list[bytes], core: bytes, secrets: Secrets) -> bytes:  # Reading, step 4
    ids = {1: secrets.keys, 4: secrets.seeds}
    fitting = [slot for slot in slots if slot[4:20] in ids.get(slot[0], {})]
    if secrets.password is not None:
        fitting += [slot for slot in slots if slot[0] in {2, 3}]
    for slot in fitting:
        if (root_key := find_root_key(slot, core, secrets)) is not None:  # Derivations, "Slot"
            derived = expand(root_key, b"secimg-watch/v1/slot\0" + slot[:-80] + core, 64)
            if compare_digest(derived[32:], slot[-80:-48]):
                file_key = decrypt(derived[:32], bytes(12), slot[-48:])
                if file_key is not None:
                    return file_key
    raise RefusedError("header" if fitting else "no-key")


def find_root_key(slot: bytes, core: bytes, secrets: Secrets) -> bytes | None:  # Derivations
    if slot[0] == 1:
        return secrets.keys[slot[4:20]]
    if slot[0] == 4:
        return hpke_open(slot, core, secrets.seeds[slot[4:20]])
    password, salt = secrets.password or b"", slot[28:60]
    if slot[0] == 3:
        return pbkdf2_hmac("sha256", password, salt, int.from_bytes(slot[20:24]))
    memory, passes, lanes = struct.unpack(">IHB", slot[20:27])
    kdf = Argon2id(salt=salt, length=32, iterations=passes, lanes=lanes, memory_cost=memory)
    return kdf.derive(password)


def open_message(  # Sealed messages
    source: io.BytesIO, length: int, file_key: bytes, context: bytes
) -> Iterator[bytes]:
    need(length >= 72 and (length - 56) % 16_400 >= 16, "content")
    salt, commitment = take(source, 24, "content"), take(source, 32, "content")
    label = b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\0"
    derived = expand(file_key, label + salt + context, 76)
    need(compare_digest(derived[44:], commitment), "content")
    full, last = divmod(length - 56, 16_400)
    for i in range(full + 1):
        sealed = take(source, 16_400 if i < full else last, "content")
        nonce = (int.from_bytes(derived[32:44]) ^ i).to_bytes(12)
        if (chunk := decrypt(derived[:32], nonce, sealed)) is None:
            raise RefusedError("content")
        yield chunk


def parse_meta(plain: bytes) -> Meta:  # META
    source, last = io.BytesIO(plain), 0
    meta: Meta = {}
    while tag := int.from_bytes(take(source, 2, "content")):
        need(last < tag < 0x8000, "content")
        value = take(source, int.from_bytes(take(source, 4, "content")), "content")
        if tag in FIELDS:
            meta[FIELDS[tag]] = parse_field(FIELDS[tag], value)
        last = tag
    need(len(plain) == 1024 * ((source.tell() + 1023) // 1024), "content")
    need(not any(source.read()) and len(meta) == len(FIELDS), "content")
    return meta


def parse_field(name: str, value: bytes) -> int | str | bytes:
    if name in WIDTHS:
        need(len(value) == WIDTHS[name], "content")
        return int.from_bytes(value, signed=name.endswith("_ns"))
    if name not in {"name", "folder", "source"}:
        need(len(value) <= 64 and all(0x20 <= byte <= 0x7E for byte in value), "content")
        return value.decode("ascii")
    need(len(value) <= 4096, "content")
    if name == "name" or (name == "folder" and value):
        components = value.split(b"/")
        need(not {b"", b".", b".."} & set(components) and b"\0" not in value, "content")
        need(name == "folder" or len(components) == 1, "content")
    return value
