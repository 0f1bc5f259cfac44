"""Hostile input for everything that reads bytes or text which others may have written.

``python tests/campaigns/fuzz_container.py [--seconds N] [--seed-dir DIR] [--random COUNT]``

With ``--seconds`` atheris guides the search by coverage (``pip install atheris``); with
``--random`` COUNT inputs go through each target and nothing has to be installed. Most inputs
are objects whose parts were changed and then sealed again with the key, so that they get past
the MAC and the commitments. Every target promises two things: it refuses with the error that
its documentation names, or what it read writes back to the very same bytes. On any other
outcome the input is saved and the exit code is 1.
"""

from __future__ import annotations

import argparse
import atexit
import collections
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import io
import itertools
import json
import os
import random
import re
import string
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
from base64 import b32encode, b64encode, urlsafe_b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the independent reader lies

import independent_reader

from secimg_watch import container, crypto, keys, recipients, seal
from secimg_watch.container import Argon2idSlot, Core, Meta
from secimg_watch.errors import (
    ConfigError,
    KeyMismatchError,
    TamperedError,
    UsageError,
)
from secimg_watch.quantities import Reserve
from secimg_watch.records import FileKey, KeyEncryptionKey, ObjectId, PrivateKey
from secimg_watch.slots import Password, PasswordCache
from secimg_watch.vault import Vault, VaultInfo

if TYPE_CHECKING:
    from random import Random

    from secimg_watch.container import PasswordSlot
    from secimg_watch.slots import Lock, Opener

Mutate: TypeAlias = Callable[[bytes], bytes]
"""Changes bytes with no idea of what they mean."""

HOME: Final = Path(__file__).parent
OBJECT: Final = ObjectId("0123456789abcdef" * 2)
VAULT: Final = b"v" * 16
FILE_KEY: Final = b"F" * 32
KEK: Final = KeyEncryptionKey(b"k" * 16, b"K" * 32)
OTHER_KEK: Final = KeyEncryptionKey(b"o" * 16, b"O" * 32)
IDENTITY: Final = recipients._private_key(b"i" * 32)
OTHER_IDENTITY: Final = recipients._private_key(b"j" * 32)
ARGON2: Final = Password(b"word", memory_kib=8192, passes=1, lanes=1, key_id=b"a" * 16)
PBKDF2: Final = Password(b"word", kdf="pbkdf2", iterations=100_000, key_id=b"p" * 16)
LOCKS: Final[tuple[Lock, ...]] = (
    KEK,
    OTHER_KEK,
    recipients.recipient_of(IDENTITY),
    recipients.recipient_of(OTHER_IDENTITY),
    ARGON2,
    PBKDF2,
)
WRONG_KEK: Final = KeyEncryptionKey(KEK.key_id, bytes(32))
WRONG_IDENTITY: Final = PrivateKey(IDENTITY.key_id, bytes(32))
OPENERS: Final[tuple[tuple[Opener | FileKey, ...], ...]] = (
    (KEK,),
    (IDENTITY,),
    (ARGON2,),
    (WRONG_KEK, WRONG_IDENTITY),
    (KEK, IDENTITY, ARGON2),
    (FileKey(FILE_KEY),),
    (WRONG_KEK, IDENTITY, OTHER_KEK),
    (),
)
FITTING: Final = (0, 2, 4, 0, 2, 1, 2, 0)
"""For each of them a lock that it opens, or that it cannot although the ids are the same."""

PASS_OVER_PREVIEW: Final = 0x80
EXPECT_IDS: Final = 0x40

META: Final = Meta(
    name=b"IMG_0001.jpg",
    folder=b"2026/11",
    size=300,
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

MEMORY_CAPS: Final = container.SEALED_META[-1] + container.SEALED_PREVIEW[-1] + 4 * seal.PIECE
"""The most that an announced META and PREVIEW may make a reader allocate, and its pieces."""

MEMORY_PER_BYTE: Final = 4
"""A section that is really there is held sealed, decrypted and joined for a moment."""

STEP: Final = 1_024
MAX_INPUT: Final = 131_072


class Violation(Exception):  # noqa: N818 - it is a finding, not an error of this program
    """A target did what it must not do."""


class CostsOnly(PasswordCache):
    """Derives nothing slow, and looks at what a derivation would have cost."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def derive(self, secret: bytes, slot: PasswordSlot) -> bytes:
        self.count += 1
        if isinstance(slot, Argon2idSlot):
            cost: tuple[int, ...] = (slot.memory_kib, slot.iterations, slot.lanes)
            capped = container.argon2id_allowed(*cost)
        else:
            cost = (slot.iterations,)
            capped = slot.iterations in container.PBKDF2_ITERATIONS
        if not capped or self.count > container.MAX_PASSWORD_SLOTS:
            raise Violation(f"derivation {self.count} with the cost {cost}")
        return hashlib.sha256(repr((secret, slot.password_salt, cost)).encode()).digest()


# --- what every target promises --------------------------------------------------------------


def check_header(data: bytes) -> str:
    try:
        header = container.parse_header(data)
    except TamperedError:
        return "refused"
    if header.pack() != data:
        raise Violation("a header does not pack to the bytes that it was read from")
    return "read"


def check_meta(data: bytes) -> str:
    try:
        meta = container.parse_meta(data)
    except TamperedError:
        return "refused"
    again = container.pack_meta(meta)
    if again == data:
        return "read"
    known = [each for each in records(data) if each[:2] <= b"\0\x0d"]
    if len(known) == len(records(data)) or again != padded(known):
        raise Violation("metadata does not pack to the bytes that it was read from")
    return "read, with unknown fields"


def check_object(data: bytes) -> str:
    """Read an object as its first byte says; the outcome names the step that refused it."""
    choice, stream = data[:1] or b"\0", io.BytesIO(data[1:])
    opened = _open(choice[0], stream)
    if isinstance(opened, str):
        return opened
    header = opened.header.pack()
    if header != data[1 : 1 + len(header)]:
        raise Violation("a header does not pack to the bytes that it was read from")
    check_meta(opened.packed_meta)
    step, released = "PREVIEW", 0
    try:
        if not choice[0] & PASS_OVER_PREVIEW:
            opened.preview()
        step = "BODY"
        for piece in opened.body():
            released += len(piece)
    except TamperedError:
        if released % 16_384 or released > opened.meta.size:
            raise Violation(f"{released} bytes were released of a damaged body") from None
        return f"refused: {step}"
    core = opened.header.core
    whole = len(header) + core.meta_len + core.preview_len + crypto.sealed_length(released)
    if released != opened.meta.size or whole != len(data) - 1:
        raise Violation(f"{released} bytes were released as the whole body")
    return "opened"


def _open(choice: int, stream: io.BytesIO) -> seal.OpenedObject | str:
    ids = (OBJECT, VAULT) if choice & EXPECT_IDS else (None, None)
    try:
        return seal.open_object(
            stream,
            OPENERS[choice % len(OPENERS)],
            expect=ids[0],
            vault_id=ids[1],
            passwords=CostsOnly(),
        )
    except KeyMismatchError:
        return "refused: no key"
    except TamperedError:
        position, prefix = stream.tell(), stream.getvalue()[: container.PREFIX_SIZE]
    try:
        return "refused: META" if position > container.parse_prefix(prefix) else "refused: header"
    except TamperedError:
        return "refused: header"


def check_agreement(data: bytes) -> bool:
    """Compare with the other reader, where it can be asked; whether it was."""
    openers = OPENERS[data[0] % len(OPENERS)] if data else ()
    if not data or any(isinstance(each, Password | FileKey) for each in openers):
        return False
    given = independent_reader.Secrets(
        keys={each.key_id: each.key for each in openers if isinstance(each, KeyEncryptionKey)},
        seeds={each.key_id: each.seed for each in openers if isinstance(each, PrivateKey)},
        password=None,
    )
    ours = _read_whole(data[1:], openers)
    try:
        meta, preview, body = independent_reader.read_object(data[1:], given)
        agreed = ours == ("opened", meta["name"], preview or b"", body)
    except independent_reader.RefusedError as refusal:
        # Either may hold back more than it has to.
        outcome = "no key" if refusal.outcome == "no-key" else "refused"
        agreed = ours[0] == outcome and refusal.released.startswith(ours[3])
    if not agreed:
        raise Violation(f"two readers, and only one says: {ours[0]}")
    return True


def _read_whole(
    data: bytes, openers: tuple[Opener | FileKey, ...]
) -> tuple[str, bytes, bytes, bytes]:
    released = bytearray()
    try:
        opened = seal.open_object(io.BytesIO(data), openers)
        preview = opened.preview()
        for piece in opened.body():
            released += piece
    except KeyMismatchError:
        return "no key", b"", b"", b""
    except TamperedError:
        return "refused", b"", b"", bytes(released)
    return "opened", opened.meta.name, preview, bytes(released)


def check_text(data: bytes) -> str:
    """Read a key's text; the first byte says which."""
    kind = KINDS[data[0] % len(KINDS)] if data else "ring"
    text = data[1:].decode("utf-8", "surrogateescape")
    try:
        if kind == "recipient":
            again = recipients.format_recipient(recipients.parse_recipient(text))
        elif kind == "identity":
            again, text = recipients.format_identity(recipients.parse_identity(text)), typed(text)
        elif kind == "ring":
            again = keys.encode_ring(keys.decode_ring(text))
        else:
            return _check_identity_file(data[1:])
    except (ConfigError, UsageError) as error:
        if type(error) is not (ConfigError if kind == "ring" else UsageError):
            raise
        return f"refused: {kind}"
    if again != text:
        raise Violation(f"two texts are the same {kind}")
    return f"read: {kind}"


SPACE: Final = " \t\n\v\f\r"
"""White space, as the format means it: Python's own has more."""


def typed(text: str) -> str:
    """Tidy an identity that a person typed, as the format says it."""
    raised = text.translate({ord(low): low.upper() for low in string.ascii_lowercase})
    head, colon, tail = raised.strip(SPACE).partition(":")
    return head + colon + tail.translate(dict.fromkeys(map(ord, f"{SPACE}-")))


def _check_identity_file(data: bytes) -> str:
    if not data.isascii():  # refused where the file is read
        return "refused: file"
    text = data.decode("ascii")
    lines = [line.strip(SPACE) for line in text.split("\n")]
    wanted = [typed(line) for line in lines if line and not line.startswith("#")]
    try:
        found = recipients.parse_identity_file(text)
    except UsageError:
        return "refused: file"
    if [recipients.format_identity(each) for each in found] != wanted:
        raise Violation("an identity file is cut into other lines than the format says")
    return "read: file"


@functools.cache
def _scratch() -> Vault:
    place = tempfile.TemporaryDirectory(prefix="fuzz-vault-")
    atexit.register(place.cleanup)
    return Vault(Path(place.name), Reserve(0.0, 0))


def check_vault(data: bytes) -> str:
    vault = _scratch()
    file = vault.path / "vault.json"
    file.write_bytes(data)
    try:
        info = vault.info()
    except ConfigError:
        return "refused"
    if len(info.vault_id) != 16 or any(len(each) != 16 for each in {*info.checks, *info.recovery}):
        raise Violation("an id of another length")
    file.write_text(vault_json(info), encoding="ascii")
    if vault.info() != info:
        raise Violation("what vault.json says does not write back")
    return "read"


def vault_json(info: VaultInfo) -> str:
    listed = [
        {"id": key_id.hex(), "check": b64encode(check).decode()}
        for key_id, check in info.checks.items()
    ]
    fields = {"format": 1, "vault": info.vault_id.hex(), "keys": listed}
    return json.dumps({**fields, "recovery": sorted(each.hex() for each in info.recovery)})


# --- objects, taken apart and put together again -----------------------------------------------


@dataclass(frozen=True)
class Parts:
    """An object in clear, with what its core says where that is not the truth."""

    locks: tuple[Lock, ...] = (KEK,)
    meta: bytes = b""
    preview: bytes = b""
    body: bytes = b""
    meta_len: int = 0
    preview_len: int = 0

    def core(self) -> Core:
        preview_len = crypto.sealed_length(len(self.preview)) if self.preview else 0
        meta_len = self.meta_len or crypto.sealed_length(len(self.meta))
        return Core(meta_len, self.preview_len or preview_len, OBJECT, VAULT)


def whole_meta(size: int) -> bytes:
    return container.pack_meta(dataclasses.replace(META, size=size))


def whole(size: int, preview: bytes = b"", locks: tuple[Lock, ...] = (KEK,)) -> Parts:
    return Parts(locks, whole_meta(size), preview, bytes(size))


def sealed(parts: Parts) -> bytes:
    """Seal the parts, whatever they are, under the one file key.

    Raises:
        UsageError: no core can say so.
    """
    core = parts.core()
    both = ((seal._META, parts.meta), (seal._PREVIEW, parts.preview), (seal._BODY, parts.body))
    messages = [
        crypto.seal_message(FILE_KEY, label + core.pack(), data)
        for label, data in both
        if data or label != seal._PREVIEW
    ]
    header = seal.build_header(core, parts.locks, FILE_KEY, CostsOnly())
    return header.pack() + b"".join(messages)


def take_apart(data: bytes) -> Parts | None:
    """Reverse ``sealed``, where the object still opens."""
    stream = io.BytesIO(data)
    try:
        core = seal.read_header(stream).core
        opened = [
            crypto.open_message(FILE_KEY, label + core.pack(), message)
            for label, length in (
                (seal._META, core.meta_len),
                (seal._PREVIEW, core.preview_len),
                (seal._BODY, len(data)),
            )
            if (message := stream.read(length))
        ]
    except TamperedError:
        return None
    if len(opened) < 2:
        return None
    first, *middle, last = opened
    return Parts(meta=first, preview=b"".join(middle), body=last)


def signed(data: bytes, area: bytes, count: int) -> bytes:
    """Give an object another slot area, and a MAC to match."""
    rest = data[container.parse_prefix(data) :]
    unsigned = data[: container.CORE_SIZE] + struct.pack(">BBH", count, 0, len(area)) + area
    core = container._parse_core(data[: container.CORE_SIZE])
    return unsigned + crypto.header_mac(seal._mac_key(FILE_KEY, core), unsigned) + rest


def records(meta: bytes) -> list[bytes]:
    """Take META apart into its records, as far as they go."""
    found = []
    while len(meta) > 6 and meta[:2] != b"\0\0":
        length = 6 + int.from_bytes(meta[2:6], "big")
        found.append(meta[:length])
        meta = meta[length:]
    return found


def padded(rows: list[bytes]) -> bytes:
    joined = b"".join(rows)
    return joined.ljust(-(-(len(joined) + 2) // STEP) * STEP, b"\0")


# --- seeds -----------------------------------------------------------------------------------


def header_seeds() -> Iterator[bytes]:
    for count, keep in itertools.product((1, 2, 3), (0, 1)):
        for locks in itertools.combinations(LOCKS, count):
            parts = whole(300, b"p" * keep, locks)
            yield seal.build_header(parts.core(), locks, FILE_KEY, CostsOnly()).pack()


def meta_seeds() -> Iterator[bytes]:
    for changed in ({}, {"name": b"n" * 255, "folder": b""}, {"source": "s" * 4096}):
        yield container.pack_meta(dataclasses.replace(META, **changed))
    yield padded([*records(container.pack_meta(META)), b"\0\x0e\0\0\0\1x"])
    yield padded([*records(container.pack_meta(META)), b"\x80\0\0\0\0\1x"])


def object_seeds() -> Iterator[bytes]:
    for size, keep in itertools.product((0, 300, 16_384, 40_000), (0, 500)):
        yield b"\0" + sealed(whole(size, b"p" * keep))
    for choice, lock in itertools.product(range(len(OPENERS)), LOCKS):
        yield bytes([choice | EXPECT_IDS]) + sealed(whole(300, b"p" * 9, (lock,)))
    for choice in range(len(OPENERS)):
        yield bytes([choice]) + sealed(whole(300, b"", LOCKS))


def heavy_objects() -> Iterator[bytes]:
    """Fill META and PREVIEW to their limits, and announce what is not there."""
    meta = padded(
        [*records(container.pack_meta(META)), struct.pack(">HI", 14, 64_000) + bytes(64_000)]
    )
    full = dataclasses.replace(whole(300, bytes(2**20)), meta=meta)
    for choice in (0, PASS_OVER_PREVIEW):
        data = bytes([choice]) + sealed(full)
        yield data
        yield data[:-1]
        yield data[: -(2**20)]
        yield data[:70_000]
        for size in (2**20, 2**52 - 1):
            yield bytes([choice]) + sealed(dataclasses.replace(whole(0), meta=whole_meta(size)))


KINDS: Final = ("recipient", "identity", "ring", "file")


def text_seeds() -> Iterator[bytes]:
    texts = (
        recipients.format_recipient(recipients.recipient_of(IDENTITY)),
        recipients.format_identity(IDENTITY),
        keys.encode_ring([KEK, OTHER_KEK]),
        recipients.identity_file(IDENTITY),
    )
    for kind, text in enumerate(texts):
        yield bytes([kind]) + text.encode()
    yield b"\1 secimg-identity-1:" + " ".join(re.findall(".{1,5}", texts[1][18:].lower())).encode()
    yield b"\3" + f"#\r\n{texts[1]}\r\n\n{texts[1]}".encode()


def vault_seeds() -> Iterator[bytes]:
    empty = VaultInfo(VAULT, {})
    full = VaultInfo(VAULT, {KEK.key_id: b"c" * 32, OTHER_KEK.key_id: b"d" * 32})
    for info in (empty, full, dataclasses.replace(full, recovery=frozenset({IDENTITY.key_id}))):
        yield vault_json(info).encode()
    yield b'{"format": 1, "vault": ' + b"[" * 5_000


# --- changes that know the structure -----------------------------------------------------------


def scrambled(data: bytes, rng: Random) -> bytes:
    """Change bytes with no idea of what they mean."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(out) + 1)
        run = rng.choice((1, 2, 4, 16, rng.randrange(1, 2_000)))
        match rng.randrange(8):
            case 0 | 1 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 2:
                edge = rng.choice((0, 1, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 2**31))
                number = (edge + rng.randrange(-1, 2)) % 2**32
                raw = number.to_bytes(4, "big")[-rng.choice((1, 2, 4)) :]
                out[at : at + len(raw)] = raw
            case 3:
                del out[at : at + run]
            case 4:
                out[at:at] = out[at : at + run]
            case 5:
                out[at:at] = rng.randbytes(min(run, 64))
            case 6:
                start = rng.randrange(len(out) + 1)
                out[at : at + run] = out[start : start + run]
            case 7 if rng.randrange(4) == 0:
                del out[at:]
    return bytes(out[:MAX_INPUT])


def changed_header(data: bytes, rng: Random, mutate: Mutate) -> bytes:
    """Change bytes, or lie about number or length of the slots, or mix slots."""
    if rng.randrange(2):
        return mutate(data)
    area = changed_area(data, rng, mutate)
    count = rng.choice((len(slots_of(area)), rng.randrange(10)))
    length = rng.choice((len(area), len(area), rng.randrange(10_500)))
    return data[: container.CORE_SIZE] + struct.pack(">BBH", count, 0, length) + area + bytes(32)


def changed_area(data: bytes, rng: Random, mutate: Mutate) -> bytes:
    area = data[container.PREFIX_SIZE : -container.MAC_SIZE]
    slots = slots_of(area) or [area]
    match rng.randrange(4):
        case 0:
            slots.append(rng.choice(slots))
        case 1:
            rng.shuffle(slots)
        case 2:
            slots.pop(rng.randrange(len(slots)))
        case _:
            at = rng.randrange(len(slots))
            front = rng.choice((28, 28, len(slots[at])))  # head and parameters, or all
            slots[at] = mutate(slots[at][:front]) + slots[at][front:]
    return b"".join(slots)[: container.MAX_AREA]


def slots_of(area: bytes) -> list[bytes]:
    found = []
    while area:
        length = max(int.from_bytes(area[2:4], "big"), 20)
        found.append(area[:length])
        area = area[length:]
    return found


def changed_meta(data: bytes, rng: Random, mutate: Mutate) -> bytes:
    """Change bytes, or whole records with the padding made right again."""
    rows = records(data)
    if not rows or rng.randrange(3) == 0:
        return mutate(data)
    at = rng.randrange(len(rows))
    match rng.randrange(5):
        case 0:
            rows.insert(at, rng.choice(rows))
        case 1:
            rows.pop(at)
        case 2:
            rows.append(struct.pack(">HI", rng.randrange(65_536), 2) + b"xx")
        case 3:
            rows[at] = mutate(rows[at])
        case _:
            value = mutate(rows[at][6:])
            rows[at] = rows[at][:2] + len(value).to_bytes(4, "big") + value
    return padded(rows)


def changed_object(data: bytes, rng: Random, mutate: Mutate) -> bytes:
    """Change bytes, or parts in clear with everything sealed and signed again."""
    choice, whole_object = data[:1], data[1:]
    if rng.randrange(4) == 0 or not choice:
        return mutate(data)
    parts = take_apart(whole_object) or whole(rng.choice((0, 300, 16_384)), b"p" * 9)
    if rng.randrange(8) == 0:
        choice = rng.randbytes(1)
    try:
        parts = dataclasses.replace(parts, locks=locks_for(choice[0], rng))
        return choice + changed_sealed(parts, rng, mutate)[: MAX_INPUT - 1]
    except UsageError:
        return mutate(data)


def locks_for(choice: int, rng: Random) -> tuple[Lock, ...]:
    """Choose locks of which the openers open one, as a rule."""
    first = LOCKS[FITTING[choice % len(OPENERS)]]
    more = rng.choice((0, 0, 0, 1, 3))
    return (*rng.sample([each for each in LOCKS if each is not first], more), first)


def changed_sealed(parts: Parts, rng: Random, mutate: Mutate) -> bytes:
    match rng.randrange(8):
        case 0 | 1:
            meta = changed_meta(parts.meta, rng, mutate)
            return sealed(dataclasses.replace(parts, meta=meta))
        case 2:
            return sealed(dataclasses.replace(parts, body=mutate(parts.body)))
        case 3:
            body = mutate(parts.body)
            size = rng.choice((len(body), len(body), 2**24, 2**52 - 1))
            meta = whole_meta(size)
            return sealed(dataclasses.replace(parts, meta=meta, body=body))
        case 4:
            return sealed(dataclasses.replace(parts, preview=mutate(parts.preview or b"p")))
        case 5:
            meta_len = parts.core().meta_len + rng.choice((0, 0, -1, 1, 16, 1_024, 16_400, 64_576))
            preview_len = rng.choice((0, 73, parts.core().preview_len + 1, 1_049_672))
            return sealed(dataclasses.replace(parts, meta_len=meta_len, preview_len=preview_len))
        case 6:
            return changed_chunks(sealed(parts), len(parts.body), rng, mutate)
        case _:
            data = sealed(parts)
            header = data[: container.parse_prefix(data)]
            area = changed_area(header, rng, mutate)
            return signed(data, area, len(slots_of(area)) % 256)


def changed_chunks(data: bytes, size: int, rng: Random, mutate: Mutate) -> bytes:
    start = len(data) - crypto.sealed_length(size) + 56
    chunks = [data[at : at + 16_400] for at in range(start, len(data), 16_400)]
    match rng.randrange(4):
        case 0:
            rng.shuffle(chunks)
        case 1:
            chunks.append(rng.choice(chunks))
        case 2:
            chunks.pop(rng.randrange(len(chunks)))
        case _:
            at = rng.randrange(len(chunks))
            chunks[at] = mutate(chunks[at])
    return data[:start] + b"".join(chunks)


def changed_text(data: bytes, rng: Random, mutate: Mutate) -> bytes:
    """Change characters, or the key behind them with its checksum made right again."""
    kind = data[0] % len(KINDS) if data else 0
    if kind == 0 and rng.randrange(2):
        public_key = mutate(recipients.recipient_of(IDENTITY).public_key)
        raw = public_key + recipients._checksum(recipients.RECIPIENT_PREFIX, public_key)
        text = recipients.RECIPIENT_PREFIX + urlsafe_b64encode(raw).decode().rstrip("=")
    elif kind in {1, 3} and rng.randrange(2):
        seed = mutate(IDENTITY.seed)
        raw = seed + recipients._checksum(recipients.IDENTITY_PREFIX, seed)
        text = recipients.IDENTITY_PREFIX + b32encode(raw).decode().rstrip("=")
        text = _retyped(text, rng)
    else:
        return mutate(data)
    return bytes([kind]) + text.encode("utf-8", "surrogateescape")


def _retyped(text: str, rng: Random) -> str:
    """Write a character in another way, which may be a forbidden one."""
    at = rng.randrange(len(text))
    ways = (text[at].lower(), "-" + text[at], " " + text[at], text[at] + "\r", "\u017f", "\u0131")
    return text[:at] + rng.choice(ways) + text[at + 1 :]


def changed_vault(data: bytes, rng: Random, mutate: Mutate) -> bytes:
    """Change bytes, or put one value of JSON in another's place."""
    try:
        fields = json.loads(data)
        at = rng.choice(list(fields))
    except (ValueError, TypeError, IndexError, RecursionError):
        return mutate(data)
    if rng.randrange(2):
        return mutate(data)
    values: list[object] = [
        None,
        True,
        0,
        -1,
        1.5,
        10**400,
        "",
        "0" * 32,
        [],
        [[]],
        {},
        {"id": 1},
        float("nan"),
    ]
    fields[at] = rng.choice([*values, *fields.values(), [fields[at]]])
    return json.dumps(fields).encode()


@dataclass(frozen=True)
class Target:
    """One thing to put input into; ``check`` returns the outcome or raises ``Violation``."""

    check: Callable[[bytes], str]
    seeds: Callable[[], Iterator[bytes]]
    change: Callable[[bytes, Random, Mutate], bytes]
    capped: bool = True  # nothing but a text grows with more than its length


TARGETS: Final = {
    "header": Target(check_header, header_seeds, changed_header),
    "meta": Target(check_meta, meta_seeds, changed_meta),
    "object": Target(check_object, object_seeds, changed_object),
    "text": Target(check_text, text_seeds, changed_text, capped=False),
    "vault.json": Target(check_vault, vault_seeds, changed_vault, capped=False),
}
NAMES: Final = tuple(TARGETS)


# --- running ---------------------------------------------------------------------------------


class Tally:
    """Counts outcomes, and saves the input of every violation."""

    def __init__(self, save: Path) -> None:
        self.save = save
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.violations: collections.Counter[str] = collections.Counter()
        self.peak = self.weighed = self.agreed = 0

    def run(self, name: str, data: bytes, *, weigh: bool) -> None:
        target = TARGETS[name]
        try:
            outcome = self._weighed(target, data) if weigh and target.capped else target.check(data)
            if name == "object" and weigh:
                self.agreed += check_agreement(data)
        except Exception as error:  # noqa: BLE001 - whatever a target lets out is a finding
            finding = f"{name}: {type(error).__name__}: {error}"[:100]
            if not self.violations[finding]:
                self._keep(name, data)
            self.violations[finding] += 1
            outcome = "VIOLATION"
        self.outcomes[f"{name}: {outcome}"] += 1

    def _weighed(self, target: Target, data: bytes) -> str:
        tracemalloc.start()
        try:
            outcome = target.check(data)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        self.weighed += 1
        self.peak = max(self.peak, peak)
        if peak > MEMORY_CAPS + MEMORY_PER_BYTE * len(data):
            raise Violation("it allocated more than the caps")
        return outcome

    def _keep(self, name: str, data: bytes) -> None:
        self.save.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(data).hexdigest()[:12]
        (self.save / f"{name}-{digest}").write_bytes(data)

    def as_json(self) -> str:
        plain = {"outcomes": dict(self.outcomes), "violations": dict(self.violations)}
        counts = {"peak": self.peak, "weighed": self.weighed, "agreed": self.agreed}
        return json.dumps({**plain, **counts})

    def report(self) -> str:
        lines = [f"{count:>10}  {what}" for what, count in sorted(self.outcomes.items())]
        lines += [
            f"{sum(self.outcomes.values()):>10}  inputs",
            f"{self.agreed:>10}  of them also read by the independent reader",
            f"{self.weighed:>10}  of them with their memory measured; peak {self.peak} bytes",
            f"{sum(self.violations.values()):>10}  violations",
        ]
        lines += [f"{count:>10}  {what}" for what, count in self.violations.items()]
        return "\n".join(lines) + "\n"


def random_inputs(name: str, count: int, rng: Random) -> Iterator[bytes]:
    """Every seed, then changed ones: two rounds of changes are common, a few are mere noise."""
    target = TARGETS[name]
    seeds = list(target.seeds())
    yield from seeds[:count]
    yield from heavy_objects() if name == "object" else ()
    for _ in range(count - len(seeds)):
        if rng.randrange(20) == 0:
            yield rng.randbytes(rng.randrange(2_000))
            continue
        data = rng.choice(seeds)
        for _ in range(rng.choice((1, 1, 2))):
            data = target.change(data, rng, lambda old: scrambled(old, rng))
        yield data


def run_random(count: int, save: Path, seed: int) -> Tally:
    tally, rng = Tally(save), random.Random(seed)
    for name in NAMES:
        for data in random_inputs(name, count, rng):
            tally.run(name, data, weigh=True)
    return tally


_CHILD: Final = """
import sys
import atheris
with atheris.instrument_imports(include=["secimg_watch"]):
    import fuzz_container
fuzz_container.guided(int(sys.argv[1]), *sys.argv[2:])
"""
WEIGH_EVERY: Final = 64


def guided(seconds: int, corpus: str, save: str, figures: str) -> None:
    """Search in this process; the first byte of an input chooses the target."""
    atheris = importlib.import_module("atheris")
    tally, turn = Tally(Path(save)), itertools.count()
    end = time.monotonic() + seconds

    def one(data: bytes) -> None:
        if data:
            tally.run(NAMES[data[0] % len(NAMES)], data[1:], weigh=next(turn) % WEIGH_EVERY == 0)
        if time.monotonic() > end:
            # libFuzzer would leave without giving Python a chance to write anything.
            Path(figures).write_text(tally.as_json(), encoding="ascii")
            os._exit(0)

    def change(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if not data or rng.randrange(3) == 0:
            return bytes(atheris.Mutate(data, most))
        target = TARGETS[NAMES[data[0] % len(NAMES)]]

        def mutate(old: bytes) -> bytes:
            return bytes(atheris.Mutate(old, max(len(old) + 64, 64)))

        return (data[:1] + target.change(data[1:], rng, mutate))[:most]

    options = [f"-max_len={MAX_INPUT}", "-timeout=30"]
    options += ["-rss_limit_mb=2048", f"-artifact_prefix={save}/crash-"]
    atheris.Setup(["fuzz_container", corpus, *options], one, custom_mutator=change)
    atheris.Fuzz()


def run_guided(seconds: int, corpus: Path, save: Path) -> tuple[Tally, str]:
    """Search in a child process, which a crash of the interpreter may end."""
    corpus.mkdir(parents=True, exist_ok=True)
    save.mkdir(parents=True, exist_ok=True)
    for number, (name, target) in enumerate(TARGETS.items()):
        for index, data in enumerate(target.seeds()):
            (corpus / f"{name}-{index}").write_bytes(bytes([number]) + data)
    figures = save / "figures.json"
    figures.unlink(missing_ok=True)
    command = [sys.executable, "-c", _CHILD, str(seconds), *map(str, (corpus, save, figures))]
    environ = {**os.environ, "PYTHONPATH": str(HOME)}
    done = subprocess.run(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    log = done.stdout.decode(errors="replace")
    tally = Tally(save)
    if figures.exists():
        found = json.loads(figures.read_text(encoding="ascii"))
        tally.outcomes.update(found["outcomes"])
        tally.violations.update(found["violations"])
        tally.peak, tally.weighed = found["peak"], found["weighed"]
        tally.agreed = found["agreed"]
    if done.returncode or not figures.exists():
        (save / "log").write_text(log)
        tally.violations[f"the search ended with {done.returncode}, see {save / 'log'}"] += 1
    pulses = re.findall(r"cov: \d+ ft: \d+ corp: .*? exec/s: \d+", log)
    return tally, pulses[-1] if pulses else "no coverage was reported"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=60, help="time for the guided search")
    parser.add_argument("--seed-dir", type=Path, help="inputs to start from; new ones are added")
    parser.add_argument("--random", type=int, metavar="COUNT", help="inputs a target, unguided")
    parser.add_argument("--seed", type=int, default=1, help="of the unguided inputs")
    parser.add_argument("--save", type=Path, help="where the inputs of violations are kept")
    given = parser.parse_args()
    save = given.save or Path(tempfile.mkdtemp(prefix="fuzz-"))
    started = time.monotonic()
    if given.random:
        tally, coverage = run_random(given.random, save, given.seed), "not measured"
    elif importlib.util.find_spec("atheris") is None:
        sys.stderr.write("atheris is not installed; use --random COUNT, or install it\n")
        return 1
    else:
        tally, coverage = run_guided(given.seconds, given.seed_dir or save / "corpus", save)
    sys.stdout.write(tally.report())
    sys.stdout.write(f"coverage: {coverage}\n{time.monotonic() - started:.0f} s; inputs: {save}\n")
    return 1 if tally.violations else 0


if __name__ == "__main__":
    sys.exit(main())
