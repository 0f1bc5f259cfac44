"""Makes the test vectors of the container: one object a rule, one object a failure.

``python tests/make_vectors.py DIR`` writes every vector into ``DIR``, and ``texts.json``, which
has texts of keys; tests/vectors/README.md says what is in them. Nothing is drawn at random, so
that every run on every machine writes the very same bytes: keys, salts and ids are SHAKE256 of
the vector's name and of what they are for.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import quote

import by_hand
from by_hand import CHUNK

HERE: Final = Path(__file__).parent / "vectors"
OUTCOMES: Final = ("opened", "malformed", "mismatch", "no-key", "header", "content")

CHEAPEST: Final = (8_192, 1, 1)
DEFAULT_COST: Final = (262_144, 3, 4)
HIGHEST_COST: Final = (1_048_576, 16, 16)
FEWEST_ITERATIONS: Final = 100_000
MOST_ITERATIONS: Final = 10_000_000

# Where a field begins in a slot of each type.
KEY_ID, SALT, PARAMETERS = 4, 20, 20
PASSWORD_SALT = 28
SHARE = PARAMETERS + 1_088
SEALED_ROOT = PARAMETERS + 1_120
RECIPIENT_SALT = 1_188

FIELDS: Final = (
    "name",
    "folder",
    "size",
    "mtime_ns",
    "mode",
    "format",
    "width",
    "height",
    "label",
    "source",
    "proof",
    "ingested_ns",
    "tool",
)
SIGNED: Final = frozenset({4, 12})
NUMBERS: Final = {3: 8, 4: 16, 5: 4, 7: 4, 8: 4, 12: 16}
NAME, FOLDER, SIZE, MTIME, MODE, FORMAT, WIDTH, HEIGHT, LABEL, SOURCE, PROOF, INGESTED, TOOL = (
    range(1, 14)
)


def draw(name: str, what: str, count: int) -> bytes:
    """Return the bytes that the vector ``name`` uses for ``what``."""
    return hashlib.shake_256(f"{name}\0{what}".encode()).digest(count)


COMMON: Final = "secimg-watch test vectors"
VAULT: Final = draw(COMMON, "vault id", 16)
_argon2id = lru_cache(by_hand.argon2id)
_pbkdf2 = lru_cache(by_hand.pbkdf2)


# --- what objects are sealed with ----------------------------------------------------------


class Lock(Protocol):
    """Makes a slot, and says with what it opens."""

    @property
    def opener(self) -> str:
        """The line of a vector's head that gives the key."""

    def front(self, name: str, core: bytes, /) -> bytes:
        """Return the slot up to its salt."""

    def root_key(self, name: str, /) -> bytes:
        """Return the root key of the slot."""


@dataclass(frozen=True)
class Key:
    key_id: bytes
    key: bytes

    @property
    def opener(self) -> str:
        return f"key: {self.key_id.hex()}:{self.key.hex()}"

    def front(self, _name: str, _core: bytes, /) -> bytes:
        return by_hand.key_front(self.key_id)

    def root_key(self, _name: str, /) -> bytes:
        return self.key


@dataclass(frozen=True)
class Password:
    """A password; ``form`` is the normal form in which a writer takes it."""

    text: str
    cost: tuple[int, int, int] | int = CHEAPEST
    form: str = "NFC"

    @property
    def key_id(self) -> bytes:
        return draw(COMMON, f"password {self.text} {self.cost}", 16)

    @property
    def salt(self) -> bytes:
        return draw(COMMON, f"salt {self.text} {self.cost}", 32)

    @property
    def secret(self) -> bytes:
        text = unicodedata.normalize("NFC", self.text) if self.form == "NFC" else self.text
        return text.encode()

    @property
    def opener(self) -> str:
        return f"password: {quote(self.text, safe='')}"

    def front(self, _name: str, _core: bytes, /) -> bytes:
        if isinstance(self.cost, int):
            return by_hand.pbkdf2_front(self.key_id, self.cost, self.salt)
        return by_hand.argon2id_front(self.key_id, self.cost, self.salt)

    def root_key(self, _name: str, /) -> bytes:
        if isinstance(self.cost, int):
            return _pbkdf2(self.secret, self.cost, self.salt)
        return _argon2id(self.secret, self.cost, self.salt)


@dataclass(frozen=True)
class Recipient:
    """A recipient; ``key_id`` and ``info_core`` are wrong where they are given."""

    identity: by_hand.Identity
    enc: bytes
    secret: bytes = b""
    info_core: bytes = b""

    @property
    def opener(self) -> str:
        return f"identity: {self.identity.text}"

    @property
    def key_id(self) -> bytes:
        return self.identity.key_id

    def front(self, name: str, core: bytes, /) -> bytes:
        secret = self.secret or self.identity.shared_secret(self.enc)
        info = by_hand.recipient_info(self.key_id, self.info_core or core)
        sealed = by_hand.hpke_seal(secret, info, self.root_key(name))
        return by_hand.recipient_front(self.key_id, self.enc + sealed)

    def root_key(self, name: str, /) -> bytes:
        return draw(name, f"root key for {self.key_id.hex()}", 32)


def _key(label: str) -> Key:
    return Key(draw(COMMON, f"id of {label}", 16), draw(COMMON, label, 32))


@cache
def recipients() -> tuple[Recipient, Recipient]:
    """Return both recipients, with the encapsulated keys on record."""
    lines = (HERE / "encapsulations.txt").read_text("ascii").splitlines()
    records = [line.split() for line in lines if not line.startswith("#")]
    found = []
    for label, (text, enc) in zip(("identity one", "identity two"), records, strict=True):
        identity = by_hand.Identity(draw(COMMON, label, 32))
        if identity.text != text:
            raise ValueError("the encapsulations are for other identities")
        found.append(Recipient(identity, base64.b64decode(enc)))
    return found[0], found[1]


KEY, OTHER_KEY, THIRD_KEY = _key("key one"), _key("key two"), _key("key three")
PASSWORD, OTHER_PASSWORD = Password("correct horse"), Password("battery staple", FEWEST_ITERATIONS)
FIRST, SECOND = recipients()


def filler(kind: int, parameters: bytes, name: str, which: str = "filler") -> bytes:
    """Make a slot that nobody opens, and whose structure is all that counts."""
    length = 20 + len(parameters) + 112
    return by_hand.head(kind, length, draw(name, which, 16)) + parameters + draw(name, which, 112)


def argon2id_filler(name: str, cost: tuple[int, int, int], zero: int = 0) -> bytes:
    parameters = struct.pack(">IHBB", *cost, zero) + draw(name, "password salt", 32)
    return filler(by_hand.ARGON2ID_TYPE, parameters, name, "Argon2id")


def pbkdf2_filler(
    name: str, iterations: int, digest: int = 1, zeros: bytes = bytes(3), which: str = "PBKDF2"
) -> bytes:
    parameters = struct.pack(">IB3s", iterations, digest, zeros) + draw(name, "password salt", 32)
    return filler(by_hand.PBKDF2_TYPE, parameters, name, which)


# --- objects -------------------------------------------------------------------------------


@dataclass
class Parts:
    """An object in parts. What is ``None`` is made as it should be for the others."""

    core: bytes
    slots: list[bytes]
    file_key: bytes
    meta: bytes
    preview: bytes
    body: bytes
    area: bytes | None = None
    mac: bytes | None = None

    def sign(self) -> bytes:
        return by_hand.mac(self.file_key, self.core, self.unsigned())

    def unsigned(self) -> bytes:
        return self.core + (by_hand.area(self.slots) if self.area is None else self.area)

    def pack(self) -> bytes:
        mac = self.sign() if self.mac is None else self.mac
        return self.unsigned() + mac + self.meta + self.preview + self.body


@dataclass
class Draft:
    """An object to be: everything that is not given is drawn for its name.

    ``fields`` replaces values of META by tag, or leaves out a tag. ``meta`` replaces the whole
    plaintext of META. ``patch`` replaces bytes of the core before anything is bound to it.
    """

    name: str
    locks: Sequence[Lock] = (KEY,)
    body: bytes = b"the bytes of a picture"
    preview: bytes = b""
    fields: dict[int, bytes | None] = field(default_factory=dict)
    meta: bytes | None = None
    patch: dict[int, bytes] = field(default_factory=dict)
    vault_id: bytes = VAULT
    object_id: bytes = b""
    file_key: bytes = b""

    def __post_init__(self) -> None:
        self.object_id = self.object_id or self.draw("object id", 16)
        self.file_key = self.file_key or self.draw("file key", 32)

    def draw(self, what: str, count: int) -> bytes:
        return draw(self.name, what, count)

    def values(self) -> dict[int, bytes]:
        values: dict[int, bytes | None] = {
            NAME: b"IMG_0001.jpg",
            FOLDER: b"2026/harbour",
            SIZE: len(self.body).to_bytes(8, "big"),
            MTIME: number(MTIME, 1_767_225_600_123_456_789),
            MODE: number(MODE, 0o100640),
            FORMAT: b"JPEG",
            WIDTH: number(WIDTH, 4_032),
            HEIGHT: number(HEIGHT, 3_024),
            LABEL: b"image",
            SOURCE: b"/srv/camera",
            PROOF: b"closed after writing",
            INGESTED: number(INGESTED, 1_767_225_601_000_000_001),
            TOOL: b"make_vectors.py",
        }
        values.update(self.fields)
        return {tag: value for tag, value in sorted(values.items()) if value is not None}

    def records(self) -> list[bytes]:
        return [by_hand.record(tag, value) for tag, value in self.values().items()]

    def plain_meta(self) -> bytes:
        return by_hand.padded(b"".join(self.records())) if self.meta is None else self.meta

    def core(self) -> bytes:
        meta_len = by_hand.sealed_length(len(self.plain_meta()))
        preview_len = by_hand.sealed_length(len(self.preview)) if self.preview else 0
        core = by_hand.core(meta_len, preview_len, self.object_id, self.vault_id)
        for offset, data in self.patch.items():
            core = put(core, offset, data)
        return core

    def front(self, index: int) -> bytes:
        salt = self.draw(f"salt of slot {index}", 32)
        return self.locks[index].front(self.name, self.core()) + salt

    def slot(self, index: int) -> bytes:
        root_key = self.locks[index].root_key(self.name)
        return by_hand.slot(root_key, self.front(index), self.core(), self.file_key)

    def section(self, name: str, what: str = "") -> by_hand.Message:
        salt = self.draw(f"salt of {what or name}", 24)
        return by_hand.section(self.file_key, name, self.core(), salt)

    def parts(self) -> Parts:
        slots = [self.slot(index) for index in range(len(self.locks))]
        meta = self.section("META").seal(self.plain_meta())
        preview = self.section("PREVIEW").seal(self.preview) if self.preview else b""
        body = self.section("BODY").seal(self.body)
        return Parts(self.core(), slots, self.file_key, meta, preview, body)

    def pack(self) -> bytes:
        return self.parts().pack()


def number(tag: int, value: int) -> bytes:
    return value.to_bytes(NUMBERS[tag], "big", signed=tag in SIGNED)


def put(data: bytes, offset: int, part: bytes) -> bytes:
    return data[:offset] + part + data[offset + len(part) :]


def flip(data: bytes, offset: int, mask: int = 1) -> bytes:
    """Flip bits of one byte."""
    index = offset % len(data)
    return put(data, index, bytes([data[index] ^ mask]))


# --- vectors -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vector:
    name: str
    comment: str
    expect: str
    lines: tuple[str, ...]
    data: bytes

    def pack(self) -> bytes:
        lines = [f"comment: {self.comment}", f"expect: {self.expect}", *self.lines]
        return "".join(f"{line}\n" for line in lines).encode("ascii") + b"\n" + self.data


def expectations(object_id: bytes | None, vault_id: bytes | None) -> tuple[str, ...]:
    """Say in a vector's head which object, of which vault, the reader is told to expect."""
    lines = []
    if object_id is not None:
        lines.append(f"expect-object: {object_id.hex()}")
    if vault_id is not None:
        lines.append(f"expect-vault: {vault_id.hex()}")
    return tuple(lines)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _shown(tag: int, value: bytes) -> str:
    if tag in NUMBERS:
        return str(int.from_bytes(value, "big", signed=tag in SIGNED))
    return quote(value, safe="")


def opened(
    draft: Draft,
    comment: str,
    parts: Parts | None = None,
    openers: Sequence[Lock] | None = None,
    expect: tuple[str, ...] = (),
) -> Vector:
    """Make a vector that opens: as sealed, or with ``parts`` changed."""
    given = draft.locks if openers is None else openers
    values = draft.values()
    meta = [f"{name}: {_shown(tag, values[tag])}" for tag, name in enumerate(FIELDS, start=1)]
    found = [f"preview-sha256: {_sha256(draft.preview)}", f"body-sha256: {_sha256(draft.body)}"]
    lines = (*(lock.opener for lock in given), *expect, *meta, *found)
    data = (parts or draft.parts()).pack()
    return Vector(draft.name, comment, "opened", lines, data)


def failed(
    name: str,
    expect: str,
    comment: str,
    data: bytes | Parts,
    openers: Sequence[Lock] = (KEY,),
    ids: tuple[str, ...] = (),
    released: bytes = b"",
) -> Vector:
    """Make a vector that does not open; ``released`` is what a reader may have given out."""
    lines = [*(lock.opener for lock in openers), *ids]
    if expect == "content":
        ends = range(0, len(released) + 1, CHUNK)
        lines.extend(f"released-sha256: {_sha256(released[:end])}" for end in ends)
    packed = data.pack() if isinstance(data, Parts) else data
    return Vector(name, comment, expect, tuple(lines), packed)


Group = Iterator[Vector]
GROUPS: list[Callable[[], Group]] = []


def group(make: Callable[[], Group]) -> Callable[[], Group]:
    """Add the vectors of ``make`` to the set."""
    GROUPS.append(make)
    return make


@group
def slots_that_open() -> Group:
    lanes = Password("correct horse", (8_192, 2, 3))
    default = Password("correct horse", DEFAULT_COST)
    iterations = Password("correct horse", 100_001)
    for name, lock, comment in (
        ("slot-key", KEY, "a key-encryption key opens its slot"),
        ("slot-argon2id", PASSWORD, "a password opens an Argon2id slot of the lowest cost"),
        ("slot-argon2id-lanes", lanes, "passes and lanes of Argon2id are taken from the slot"),
        ("slot-argon2id-default-cost", default, "Argon2id at the cost that writers use by default"),
        ("slot-pbkdf2", OTHER_PASSWORD, "a password opens a PBKDF2 slot of the lowest cost"),
        ("slot-pbkdf2-iterations", iterations, "iterations of PBKDF2 are taken from the slot"),
        ("slot-recipient", FIRST, "an identity opens the slot of its recipient"),
        ("slot-recipient-two", SECOND, "another identity, and another encapsulated key"),
    ):
        yield opened(Draft(name, [lock]), comment)
    zeros = Key(bytes(16), bytes(32))
    yield opened(
        Draft("slot-key-zeros", [zeros], vault_id=bytes(16), object_id=bytes(16)),
        "no value of a key, a key id, an object id or a vault id is special",
    )


@group
def slots_beside_each_other() -> Group:
    both: list[Lock] = [FIRST, SECOND]
    yield opened(
        Draft("slots-recipients-first", both), "the first of two recipients", None, both[:1]
    )
    yield opened(Draft("slots-recipients-last", both), "the last of two recipients", None, both[1:])
    two: list[Lock] = [PASSWORD, OTHER_PASSWORD]
    yield opened(Draft("slots-passwords-first", two), "the first of two passwords", None, two[:1])
    yield opened(
        Draft("slots-passwords-last", two),
        "the last of two passwords: the first password slot is passed over",
        None,
        two[1:],
    )
    mixed: list[Lock] = [PASSWORD, KEY, FIRST]
    for which, lock in zip(("password", "key", "identity"), mixed, strict=True):
        yield opened(
            Draft(f"slots-mixed-{which}", mixed), f"three types of slots: by {which}", None, [lock]
        )
    yield opened(
        Draft("slots-mixed-all-given", mixed), "key, password and identity given, all of them right"
    )
    yield opened(
        Draft("slots-keys-at-hand", [OTHER_KEY]),
        "several keys given, one of them the slot's",
        None,
        [KEY, OTHER_KEY, THIRD_KEY, FIRST],
    )
    every: list[Lock] = [KEY, OTHER_KEY, PASSWORD, OTHER_PASSWORD, FIRST, SECOND]
    draft = Draft("slots-eight", [*every, _key("key seven"), THIRD_KEY])
    yield opened(draft, "as many slots as there may be, of all types: the last", None, [THIRD_KEY])
    draft = Draft("slots-eight-recipients", [FIRST])
    parts = draft.parts()
    others = [
        filler(by_hand.RECIPIENT_TYPE, draft.draw(f"enc {i}", 1_168), draft.name, f"filler {i}")
        for i in range(7)
    ]
    parts.slots = [*others, *parts.slots]
    yield opened(draft, "the longest area of slots there may be: eight recipients", parts)


@group
def slots_passed_over() -> Group:
    def spoilt(name: str, locks: Sequence[Lock], comment: str) -> Vector:
        draft = Draft(name, locks)
        parts = draft.parts()
        parts.slots[0] = flip(parts.slots[0], -by_hand.TAIL)
        return opened(draft, comment, parts)

    yield spoilt(
        "passed-over-key", [KEY, OTHER_KEY], "a key's slot does not open, and another one's does"
    )
    yield spoilt(
        "passed-over-recipient",
        [FIRST, KEY],
        "a recipient's slot does not open, and the slot of a key does",
    )
    yield spoilt(
        "passed-over-key-then-password",
        [KEY, PASSWORD],
        "no named slot opens, and the slot of a password does",
    )
    yield spoilt(
        "passed-over-password",
        [PASSWORD, KEY],
        "a password's slot would not open; a named slot opens before it is tried",
    )
    draft = Draft("passed-over-wrong-key", [KEY, PASSWORD])
    wrong = Key(KEY.key_id, OTHER_KEY.key)
    yield opened(
        draft,
        "the key given under a slot's id is wrong, and the password right",
        None,
        [wrong, PASSWORD],
    )
    draft = Draft("passed-over-highest-costs", [KEY])
    parts = draft.parts()
    parts.slots[:0] = [
        argon2id_filler(draft.name, HIGHEST_COST),
        pbkdf2_filler(draft.name, MOST_ITERATIONS),
    ]
    yield opened(draft, "password slots of the highest costs there may be, and a key", parts)


@group
def headers_rewritten() -> Group:
    def rewritten(name: str, before: Sequence[Lock], after: Sequence[Lock]) -> tuple[Draft, Parts]:
        draft = Draft(name, before)
        parts = draft.parts()
        again = replace(draft, locks=after)
        parts.slots = [again.slot(index) for index in range(len(after))]
        return draft, parts

    draft = Draft("rewritten-order", [KEY, OTHER_KEY, PASSWORD])
    parts = draft.parts()
    parts.slots.reverse()
    yield opened(draft, "slots in another order, with a new MAC", parts, [KEY])
    draft, parts = rewritten("rewritten-for-another-key", [KEY], [OTHER_KEY])
    yield opened(draft, "a new header before the same sections", parts, [OTHER_KEY])
    draft, parts = rewritten("rewritten-old-key", [KEY], [OTHER_KEY])
    yield failed(
        draft.name,
        "no-key",
        "a new header before the same sections, opened with the old key",
        parts,
    )
    for name, lock in (("rewritten-kept-slot", FIRST), ("rewritten-added-slot", OTHER_KEY)):
        draft = Draft(name, [KEY, FIRST])
        parts = draft.parts()
        added = replace(draft, locks=[KEY, FIRST, OTHER_KEY]).slot(2)
        parts.slots = [parts.slots[1], added]
        comment = "a slot taken over verbatim, one removed and one added"
        yield opened(draft, comment, parts, [lock])


@group
def passwords() -> Group:
    decomposed = "pass\u0065\u0301e sch\u006f\u0308n"
    for name, text, comment in (
        ("password-decomposed", decomposed, "a decomposed password is brought to normal form C"),
        ("password-composed", "pass\u00e9e sch\u00f6n", "the same password, composed"),
        ("password-ligature", "\ufb01ne \u2460", "normal form C leaves compatibility characters"),
        (
            "password-control",
            "a\0b\r\nc \n",
            "zero byte, line ends and spaces belong to a password",
        ),
        ("password-astral", "\U0001f511 \U00020000", "characters beyond the basic plane"),
        ("password-long", "x" * 1_000, "a password of 1000 bytes"),
        ("password-one-byte", "x", "a password of one byte"),
    ):
        yield opened(Draft(name, [Password(text)]), comment)
    raw = Password(decomposed, form="as it is")
    draft = Draft("password-not-normal", [raw])
    comment = "the slot is derived from the decomposed password, which no reader derives"
    yield failed(draft.name, "header", comment, draft.parts(), [raw])


@group
def sections_that_open() -> Group:
    for size in (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK):
        draft = Draft(f"body-{size}", body=draw(COMMON, "body", size))
        yield opened(draft, f"a body of {size} bytes")
    for size in (1, 1_024, CHUNK):
        draft = Draft(f"preview-{size}", preview=draw(COMMON, "preview", size))
        yield opened(draft, f"a preview of {size} bytes")
    draft = Draft("preview-and-no-body", preview=b"preview", body=b"")
    yield opened(draft, "a preview before an empty body")
    draft = Draft("expected-ids")
    expect = expectations(draft.object_id, VAULT)
    yield opened(draft, "object id and vault id are the expected ones", expect=expect)
    draft = Draft("expected-no-vault", vault_id=bytes(16))
    expect = expectations(None, bytes(16))
    yield opened(
        draft, "an object that belongs to no vault, and is to belong to none", expect=expect
    )


LOWEST, HIGHEST = number(MTIME, -(2**127)), number(MTIME, 2**127 - 1)
META_THAT_OPENS: Final[tuple[tuple[str, str, dict[int, bytes | None]], ...]] = (
    ("unknown", "unknown tags are skipped", {14: b"", 0x1234: b"later", 0x7FFF: bytes(40)}),
    ("unknown-long", "an unknown tag of 4000 bytes", {14: b"x" * 4_000}),
    ("not-utf8", "name, folder and source are bytes", {
        NAME: b"caf\xe9 \xff.jpg", FOLDER: b"\xfe/\x80", SOURCE: b"/srv/\xe9",
    }),
    ("utf8", "name, folder and source in UTF-8, which is not normalized", {
        NAME: "e\u0301\u00e9.jpg".encode(), FOLDER: "\u65e5".encode(), SOURCE: "/\u00fc".encode(),
    }),
    ("odd-name", "line end, backslash and control bytes are bytes of a name", {
        NAME: b"-a\\b\n\x1b[2J:*?.", FOLDER: b" /...",
    }),
    ("bidirectional-name", "a name that displays as another one", {
        NAME: "photo\u202egpj.exe".encode(),
    }),
    ("name-longest", "a name of 4096 bytes", {NAME: b"n" * 4_096}),
    ("name-one-byte", "a name of one byte", {NAME: b"n"}),
    ("folder-longest", "a folder of 4096 bytes", {FOLDER: b"f" + b"/f" * 2_047 + b"f"}),
    ("folder-root", "the root of the watched folder", {FOLDER: b""}),
    ("folder-dots", "components that only begin with dots", {FOLDER: b"..a/.b/c.."}),
    ("source-longest", "a source of 4096 bytes", {SOURCE: b"s" * 4_096}),
    ("source-zero-byte", "a source with zero bytes", {SOURCE: b"/srv\0camera\0"}),
    ("time-negative", "times before 1970", {MTIME: number(MTIME, -1), INGESTED: number(MTIME, -2)}),
    ("time-lowest", "the lowest times there are", {MTIME: LOWEST, INGESTED: LOWEST}),
    ("time-highest", "the highest times there are", {MTIME: HIGHEST, INGESTED: HIGHEST}),
    ("mode-all-bits", "no bit of a mode is refused", {MODE: b"\xff" * 4}),
    ("mode-zero", "a mode of zero", {MODE: bytes(4)}),
    ("pixels-unknown", "width and height not known", {WIDTH: bytes(4), HEIGHT: bytes(4)}),
    ("pixels-most", "the largest width and height", {WIDTH: b"\xff" * 4, HEIGHT: b"\xff" * 4}),
    ("texts-empty", "empty texts", dict.fromkeys((FORMAT, LABEL, SOURCE, PROOF, TOOL), b"")),
    ("texts-longest", "texts of 64 bytes", {
        FORMAT: b" ~" * 32, LABEL: b"~" * 64, PROOF: b" " * 64, TOOL: b"~ " * 32,
    }),
    ("label-unknown", "no text is refused for its wording", {LABEL: b"a later word"}),
)  # fmt: skip


@group
def meta_that_opens() -> Group:
    for name, comment, fields in META_THAT_OPENS:
        yield opened(Draft(f"meta-{name}", fields=fields), comment)
    for size, comment in (
        (1_022, "the records end just before the end mark of the first KiB"),
        (1_023, "one byte more, and META has a second KiB"),
        (CHUNK - 2, "META of exactly one full chunk and an empty one"),
        (65_534, "the longest META there may be"),
    ):
        draft = Draft(f"meta-records-{size}")
        used = sum(map(len, draft.records()))
        yield opened(replace(draft, fields={14: bytes(size - used - 6)}), comment)


WITH_PREVIEW = b"the bytes of a preview"


@group
def cuts() -> Group:
    draft = Draft("cut", [KEY, OTHER_KEY], preview=WITH_PREVIEW)
    whole = draft.pack()
    parts = draft.parts()
    header = len(parts.unsigned()) + 32
    meta = header + len(parts.meta)
    preview = meta + len(parts.preview)
    last = len(whole) - 16
    ends = {
        0: "no byte at all",
        1: "one byte",
        7: "cut within the magic",
        8: "cut behind the magic",
        15: "cut within the lengths",
        55: "cut before the last byte of the core",
        56: "cut behind the core",
        59: "cut before the last byte of the length of the slots",
        60: "cut before the first slot",
        79: "cut within a slot's head",
        80: "cut behind a slot's head",
        191: "cut before the last byte of the first slot",
        192: "cut behind the first of two slots",
        header - 33: "cut before the last byte of the last slot",
        header - 32: "cut before the MAC",
        header - 31: "cut behind the first byte of the MAC",
        header - 1: "cut before the last byte of the MAC",
    }
    places = {
        header: "the header",
        header + 24: "the salt of META",
        header + 56: "the commitment of META",
        meta: "META",
        preview: "PREVIEW",
        preview + 24: "the salt of BODY",
        preview + 56: "the commitment of BODY",
        last: "the last chunk's ciphertext",
        len(whole): "the object",
    }
    for at, place in places.items():
        ends.setdefault(at - 1, f"cut one byte before the end of {place}")
        ends.setdefault(at, f"cut at the end of {place}")
        ends.setdefault(at + 1, f"cut one byte behind the end of {place}")
    for end, comment in ends.items():
        expect = "malformed" if end < header else "content"
        if end < len(whole):
            yield failed(f"cut-{end}", expect, comment, whole[:end])


@group
def cut_chunks() -> Group:
    draft = Draft("cut-chunks", body=draw(COMMON, "body", CHUNK + 5))
    whole = draft.pack()
    first = draft.body[:CHUNK]
    for name, count, comment in (
        ("cut-last-chunk", 21, "the last chunk is missing, and the size says that there is one"),
        ("cut-in-last-chunk", 18, "cut within the last chunk's bytes"),
        ("cut-in-last-tag", 1, "the last byte of the last chunk's tag is missing"),
    ):
        yield failed(name, "content", comment, whole[:-count], released=first)
    yield failed(
        "cut-in-first-tag", "content", "cut within the tag of a full chunk", whole[: -21 - 1]
    )
    draft = Draft("cut-empty-last-chunk", body=draw(COMMON, "body", CHUNK))
    comment = "the empty last chunk is missing, and the body ends with a full one"
    yield failed(draft.name, "content", comment, draft.pack()[:-16], released=draft.body)
    draft = Draft("cut-only-chunk", body=b"")
    yield failed(draft.name, "content", "the only chunk is missing", draft.pack()[:-16])


@group
def something_follows() -> Group:
    draft = Draft("trailing")
    whole = draft.pack()
    for name, tail, comment in (
        ("one-zero", b"\0", "a zero byte follows"),
        ("line-end", b"\n", "a line end follows"),
        ("sixteen", draft.draw("tail", 16), "as many bytes as a tag has follow"),
        ("zeros", bytes(512), "a block of zeros follows"),
        ("empty-chunk", draft.section("BODY").chunk(1, b""), "an authentic empty chunk follows"),
        ("message", draft.section("BODY", "more").seal(b""), "an authentic empty message follows"),
        ("itself", whole, "the same object follows"),
        ("another", Draft("trailing/other").pack(), "another object follows"),
    ):
        yield failed(f"trailing-{name}", "content", comment, whole + tail)
    draft = Draft("trailing-chunks", body=draw(COMMON, "body", CHUNK + 5))
    comment = "a zero byte follows a body of two chunks: the last one stays back"
    whole, first = draft.pack(), draft.body[:CHUNK]
    yield failed(draft.name, "content", comment, whole + b"\0", released=first)


@group
def transfers() -> Group:
    whole = Draft("transfer").pack()
    latin = whole.decode("latin-1")
    for name, data, comment in (
        ("crlf-to-lf", whole.replace(b"\r\n", b"\n"), "CR LF became LF"),
        ("lf-to-crlf", whole.replace(b"\n", b"\r\n"), "LF became CR LF"),
        ("lf-removed", whole.replace(b"\n", b""), "every LF is gone"),
        ("ctrl-z", whole[: whole.index(b"\x1a")], "cut at the first ^Z"),
        ("seven-bits", bytes(byte & 0x7F for byte in whole), "the highest bits are gone"),
        ("utf8", latin.encode(), "taken for Latin-1 and encoded as UTF-8"),
        ("base64", base64.encodebytes(whole), "encoded as base64"),
        ("shifted", b"\0" + whole, "a zero byte stands in front"),
    ):
        yield failed(f"transfer-{name}", "malformed", comment, data)


def _u32(value: int) -> bytes:
    return struct.pack(">I", value)


MALFORMED_CORES: Final = (
    ("magic-first-byte", "the first byte of the magic differs", 0, b"\x0b"),
    ("magic-last-byte", "the last byte of the magic differs", 7, b"\x1b"),
    ("version-0", "version 0", 8, b"\0"),
    ("version-2", "version 2", 8, b"\2"),
    ("version-255", "version 255", 8, b"\xff"),
    ("flags-1", "the lowest flag is set", 9, b"\1"),
    ("flags-128", "the highest flag is set", 9, b"\x80"),
    ("reserved-10", "a reserved byte is set", 10, b"\1"),
    ("reserved-11", "a reserved byte is set", 11, b"\1"),
    ("reserved-20", "a reserved byte is set", 20, b"\1"),
    ("reserved-23", "a reserved byte is set", 23, b"\1"),
    ("meta-0", "no META", 12, _u32(0)),
    ("meta-1095", "META is shorter than may be", 12, _u32(1_095)),
    ("meta-65673", "META is longer than may be", 12, _u32(65_673)),
    ("meta-most", "META is as long as the field can say", 12, _u32(2**32 - 1)),
    ("preview-1", "a PREVIEW of one sealed byte", 16, _u32(1)),
    ("preview-72", "a PREVIEW that would be empty", 16, _u32(72)),
    ("preview-1049673", "PREVIEW is longer than may be", 16, _u32(1_049_673)),
    ("preview-most", "PREVIEW is as long as the field can say", 16, _u32(2**32 - 1)),
)


@group
def cores() -> Group:
    for name, comment, offset, data in MALFORMED_CORES:
        draft = Draft(f"core-{name}", patch={offset: data})
        yield failed(draft.name, "malformed", f"{comment}; all else is right", draft.parts())
    for name, comment, offset, data in (
        ("meta-length", "another length of META", 12, _u32(1_096 + 1_024)),
        ("preview-length", "a PREVIEW that the header was not made with", 16, _u32(73)),
        ("object-id", "another object id", 24, b"\0"),
        ("vault-id", "another vault id", 40, bytes(16)),
    ):
        draft = Draft(f"core-altered-{name}")
        parts = draft.parts()
        parts.mac = parts.sign()
        parts.core = put(parts.core, offset, data)
        yield failed(draft.name, "header", f"{comment} in the core", parts)
        draft = Draft(f"core-altered-{name}-signed")
        parts = draft.parts()
        parts.core = put(parts.core, offset, data)
        bound = f"{comment} in the core, with a MAC to match: the slot is bound to the core"
        yield failed(draft.name, "header", bound, parts)
    draft = Draft("core-of-another-object")
    parts = draft.parts()
    parts.mac = parts.sign()
    parts.core = Draft("core-of-another-object/other").core()
    yield failed(draft.name, "header", "the core of one object before the rest of another", parts)


@group
def lengths() -> Group:
    for name, offset, length, comment in (
        ("meta-most", 12, 65_672, "META of the longest length there may be, and cut"),
        ("preview-least", 16, 73, "PREVIEW of the shortest length there may be, and cut"),
        ("preview-most", 16, 1_049_672, "PREVIEW of the longest length there may be, and cut"),
        ("meta-impossible", 12, 56 + 16_400, "a length of META that no message has, and cut"),
        ("preview-impossible", 16, 56 + 16_401, "a length of PREVIEW that no message has, and cut"),
    ):
        draft = Draft(f"length-{name}", patch={offset: _u32(length)})
        parts = draft.parts()
        parts.body = b""
        yield failed(draft.name, "content", comment, parts)
    for name, size, comment in (
        ("meta-1097", 1_097, "META is one byte longer, and the core says so"),
        ("meta-1112", 1_112, "META has 16 more bytes behind its last chunk, and the core says so"),
    ):
        draft = Draft(f"length-{name}", patch={12: _u32(size)})
        parts = draft.parts()
        parts.meta += bytes(size - len(parts.meta))
        yield failed(draft.name, "content", comment, parts)
    draft = Draft("length-preview-longer", preview=WITH_PREVIEW)
    size = by_hand.sealed_length(len(WITH_PREVIEW)) + 1
    draft.patch = {16: _u32(size)}
    parts = draft.parts()
    parts.preview += b"\0"
    comment = "PREVIEW is one byte longer, and the core says so"
    yield failed(draft.name, "content", comment, parts)
    draft = Draft("length-preview-impossible-whole", patch={16: _u32(56 + 16_401)})
    parts = draft.parts()
    parts.preview = draft.section("PREVIEW").seal(draw(COMMON, "preview", CHUNK))[:-15]
    comment = "PREVIEW has a length that no message has: a full chunk and one byte"
    yield failed(draft.name, "content", comment, parts)
    draft = Draft("length-preview-denied", preview=WITH_PREVIEW, patch={16: _u32(0)})
    comment = "PREVIEW stands there, and the core says that there is none"
    yield failed(draft.name, "content", comment, draft.parts())
    draft = Draft("length-preview-announced", patch={16: _u32(73)})
    comment = "PREVIEW does not stand there, and the core says that there is one"
    yield failed(draft.name, "content", comment, draft.parts())


@group
def areas() -> Group:
    def area(
        count: int, length: int, *, zero: int = 0, tail: bytes = b""
    ) -> Callable[[bytes], bytes]:
        return lambda slots: struct.pack(">BBH", count, zero, length) + slots + tail

    two = 132 + 172
    for name, comment, make in (
        ("count-0", "no slot announced", area(0, two)),
        ("count-1", "one slot announced, and two are there", area(1, two)),
        ("count-3", "three slots announced, and two are there", area(3, two)),
        ("count-9", "nine slots announced", area(9, two)),
        ("count-255", "255 slots announced", area(255, two)),
        ("zero", "the byte behind the count is set", area(2, two, zero=1)),
        ("length-0", "an area of no bytes", area(2, 0)),
        ("length-short", "the area ends one byte before its last slot does", area(2, two - 1)),
        ("length-long", "the area goes on one byte behind its last slot", area(2, two + 1)),
        ("length-one-slot", "the area ends behind its first slot", area(2, 132)),
        (
            "padded",
            "zeros behind the last slot, within the area",
            area(2, two + 20, tail=bytes(20)),
        ),
        ("length-10401", "an area that is longer than may be", area(2, 10_401)),
        ("length-most", "an area as long as the field can say", area(2, 65_535)),
    ):
        draft = Draft(f"area-{name}", [KEY, PASSWORD])
        parts = draft.parts()
        parts.area = make(b"".join(parts.slots))
        yield failed(draft.name, "malformed", comment, parts)
    draft = Draft("area-empty")
    parts = draft.parts()
    parts.area = bytes(4)
    yield failed(draft.name, "malformed", "an area without slots", parts)
    draft = Draft("area-nine-slots")
    parts = draft.parts()
    parts.slots += [filler(by_hand.KEY_TYPE, b"", draft.name, f"filler {i}") for i in range(8)]
    yield failed(draft.name, "malformed", "nine slots", parts)


MALFORMED_SLOTS: Final = (
    ("type-0", KEY, "type 0", 0, b"\0"),
    ("type-5", KEY, "type 5", 0, b"\5"),
    ("type-255", KEY, "type 255", 0, b"\xff"),
    ("type-key-as-argon2id", KEY, "a key's slot as one of Argon2id", 0, b"\2"),
    ("type-argon2id-as-pbkdf2", PASSWORD, "a slot of Argon2id as one of PBKDF2", 0, b"\3"),
    ("type-pbkdf2-as-argon2id", OTHER_PASSWORD, "a slot of PBKDF2 as one of Argon2id", 0, b"\2"),
    ("type-argon2id-as-key", PASSWORD, "a slot of Argon2id as one of a key", 0, b"\1"),
    ("type-recipient-as-key", FIRST, "a recipient's slot as one of a key", 0, b"\1"),
    ("type-key-as-recipient", KEY, "a key's slot as one of a recipient", 0, b"\4"),
    ("flags-1", KEY, "the lowest flag of a slot", 1, b"\1"),
    ("flags-128", FIRST, "the highest flag of a slot", 1, b"\x80"),
    ("length-0", KEY, "a slot's length of 0", 2, b"\0\0"),
    ("length-19", KEY, "a slot's length that is less than its head", 2, b"\0\x13"),
    ("length-131", KEY, "a slot's length that is one byte less", 2, b"\0\x83"),
    ("length-133", KEY, "a slot's length that is one byte more", 2, b"\0\x85"),
    ("length-most", KEY, "a slot's length as long as the field can say", 2, b"\xff\xff"),
    ("length-1299", FIRST, "a recipient's length that is one byte less", 2, b"\x05\x13"),
    ("length-1301", FIRST, "a recipient's length that is one byte more", 2, b"\x05\x15"),
)


@group
def slot_structure() -> Group:
    for name, lock, comment, offset, data in MALFORMED_SLOTS:
        draft = Draft(f"slot-{name}", [lock, THIRD_KEY])
        parts = draft.parts()
        parts.slots[0] = put(parts.slots[0], offset, data)
        yield failed(draft.name, "malformed", comment, parts, [lock, THIRD_KEY])
    for name, comment, slot in (
        ("unknown", "a slot of an unknown type behind one that would open", filler(5, b"", "slot")),
        ("unknown-short", "an unknown slot of a head alone", by_hand.head(9, 20, bytes(16))),
        ("key-longer", "a key's slot with 40 bytes of parameters", filler(1, bytes(40), "slot")),
        ("recipient-longer", "a recipient's slot, a byte longer", filler(4, bytes(1_169), "slot")),
        (
            "recipient-shorter",
            "a recipient's slot, a byte shorter",
            filler(4, bytes(1_167), "slot"),
        ),
        ("cut-head", "a slot that ends within its head", by_hand.head(1, 132, bytes(16))[:19]),
    ):
        draft = Draft(f"slot-{name}")
        parts = draft.parts()
        parts.slots.append(slot)
        yield failed(draft.name, "malformed", comment, parts)
    pairs: tuple[tuple[str, Lock, Lock, str], ...] = (
        ("key", KEY, Key(KEY.key_id, OTHER_KEY.key), "two keys' slots"),
        ("password", PASSWORD, Key(PASSWORD.key_id, KEY.key), "a password's and a key's slot"),
        ("recipient", FIRST, Key(FIRST.key_id, KEY.key), "a recipient's and a key's slot"),
    )
    for name, one, two, comment in pairs:
        locks = [one, two]
        draft = Draft(f"slot-same-id-{name}", locks)
        yield failed(draft.name, "malformed", f"{comment} of the same key id", draft.parts(), locks)
    draft = Draft("slot-three-passwords", [KEY, PASSWORD, OTHER_PASSWORD])
    parts = draft.parts()
    parts.slots.append(pbkdf2_filler(draft.name, FEWEST_ITERATIONS))
    yield failed(draft.name, "malformed", "three password slots", parts)


@group
def slot_costs() -> Group:
    memory, most = 8_192, HIGHEST_COST[0]
    for name, cost, comment in (
        ("memory-0", (0, 1, 1), "no memory"),
        ("memory-8191", (memory - 1, 1, 1), "1 KiB less memory than may be"),
        ("memory-1048577", (most + 1, 1, 1), "1 KiB more memory than may be"),
        ("memory-most", (2**32 - 1, 1, 1), "4 TiB of memory"),
        ("passes-0", (memory, 0, 1), "no pass"),
        ("passes-17", (memory, 17, 1), "one pass more than may be"),
        ("passes-most", (memory, 2**16 - 1, 1), "65535 passes"),
        ("lanes-0", (memory, 1, 0), "no lane"),
        ("lanes-17", (memory, 1, 17), "one lane more than may be"),
        ("lanes-255", (memory, 1, 255), "255 lanes"),
    ):
        draft = Draft(f"cost-argon2id-{name}")
        parts = draft.parts()
        parts.slots.append(argon2id_filler(draft.name, cost))
        yield failed(draft.name, "malformed", f"{comment} in an Argon2id slot", parts)
    draft = Draft("cost-argon2id-reserved")
    parts = draft.parts()
    parts.slots.append(argon2id_filler(draft.name, CHEAPEST, 1))
    yield failed(draft.name, "malformed", "the reserved byte of an Argon2id slot is set", parts)
    for name, iterations, digest, zeros, comment in (
        ("iterations-0", 0, 1, bytes(3), "no iteration"),
        ("iterations-99999", FEWEST_ITERATIONS - 1, 1, bytes(3), "one iteration less than may be"),
        ("iterations-10000001", MOST_ITERATIONS + 1, 1, bytes(3), "one iteration more than may be"),
        (
            "iterations-wrapped",
            2**24 + FEWEST_ITERATIONS,
            1,
            bytes(3),
            "2^24 and 100,000 iterations",
        ),
        ("iterations-most", 2**32 - 1, 1, bytes(3), "2^32 - 1 iterations"),
        ("digest-0", FEWEST_ITERATIONS, 0, bytes(3), "digest 0"),
        ("digest-2", FEWEST_ITERATIONS, 2, bytes(3), "digest 2"),
        ("reserved-first", FEWEST_ITERATIONS, 1, b"\1\0\0", "the first reserved byte set"),
        ("reserved-middle", FEWEST_ITERATIONS, 1, b"\0\1\0", "the middle reserved byte set"),
        ("reserved-last", FEWEST_ITERATIONS, 1, b"\0\0\1", "the last reserved byte set"),
    ):
        draft = Draft(f"cost-pbkdf2-{name}")
        parts = draft.parts()
        parts.slots.append(pbkdf2_filler(draft.name, iterations, digest, zeros))
        yield failed(draft.name, "malformed", f"{comment} in a PBKDF2 slot", parts)


# The MAC of these is right: the slot's own checks are what is tested.
DAMAGED_SLOTS: Final = (
    ("key-commitment-first-bit", KEY, "commitment", -80, 0x80),
    ("key-commitment-last-bit", KEY, "commitment", -49, 1),
    ("key-wrapped-key", KEY, "wrapped key", -48, 1),
    ("key-wrapped-tag", KEY, "tag of the wrapped key", -1, 1),
    ("key-salt", KEY, "salt", SALT, 1),
    ("argon2id-key-id", PASSWORD, "key id", KEY_ID, 1),
    ("argon2id-memory", PASSWORD, "memory", PARAMETERS + 3, 1),
    ("argon2id-passes", PASSWORD, "passes", PARAMETERS + 5, 2),
    ("argon2id-lanes", PASSWORD, "lanes", PARAMETERS + 6, 2),
    ("argon2id-password-salt", PASSWORD, "password salt", PASSWORD_SALT, 1),
    ("argon2id-salt", PASSWORD, "salt", PASSWORD_SALT + 32, 1),
    ("argon2id-commitment", PASSWORD, "commitment", -80, 1),
    ("argon2id-wrapped-key", PASSWORD, "wrapped key", -20, 1),
    ("pbkdf2-key-id", OTHER_PASSWORD, "key id", KEY_ID + 15, 1),
    ("pbkdf2-iterations", OTHER_PASSWORD, "iterations", PARAMETERS + 3, 1),
    ("pbkdf2-password-salt", OTHER_PASSWORD, "password salt", PASSWORD_SALT + 31, 1),
    ("pbkdf2-commitment", OTHER_PASSWORD, "commitment", -49, 0x80),
    ("recipient-ciphertext-first", FIRST, "ML-KEM ciphertext", PARAMETERS, 1),
    ("recipient-ciphertext-last", FIRST, "ML-KEM ciphertext", SHARE - 1, 0x80),
    ("recipient-share", FIRST, "X25519 share", SHARE, 1),
    ("recipient-share-top-bit", FIRST, "bit of the X25519 share that X25519 ignores",
     SHARE + 31, 0x80),
    ("recipient-sealed-root", FIRST, "sealed root key", SEALED_ROOT, 1),
    ("recipient-sealed-root-tag", FIRST, "tag of the sealed root key", RECIPIENT_SALT - 1, 1),
    ("recipient-salt", FIRST, "salt", RECIPIENT_SALT, 1),
    ("recipient-commitment", FIRST, "commitment", -80, 1),
    ("recipient-wrapped-key", FIRST, "wrapped key", -48, 1),
)  # fmt: skip


@group
def slots_damaged() -> Group:
    for name, lock, place, offset, mask in DAMAGED_SLOTS:
        draft = Draft(f"damaged-{name}", [lock])
        parts = draft.parts()
        parts.slots[0] = flip(parts.slots[0], offset, mask)
        comment = f"a bit differs in the {place}, with a MAC to match"
        yield failed(draft.name, "header", comment, parts, [lock])
    draft = Draft("damaged-key-commitment-zeros")
    parts = draft.parts()
    parts.slots[0] = put(parts.slots[0], 52, bytes(32))
    yield failed(draft.name, "header", "the commitment is zeros, with a MAC to match", parts)
    draft = Draft("damaged-key-id")
    parts = draft.parts()
    altered = Key(flip(KEY.key_id, 0), KEY.key)
    parts.slots[0] = put(parts.slots[0], KEY_ID, altered.key_id)
    comment = "another key id, under which the right key is given; with a MAC to match"
    yield failed(draft.name, "header", comment, parts, [altered])
    draft = Draft("damaged-password-and-key", [PASSWORD, KEY])
    parts = draft.parts()
    parts.slots = [flip(slot, -80) for slot in parts.slots]
    comment = "every slot that fits is damaged, with a MAC to match"
    yield failed(draft.name, "header", comment, parts, [KEY, PASSWORD])


@group
def keys_that_are_wrong() -> Group:
    wrong = Key(KEY.key_id, OTHER_KEY.key)
    draft = Draft("wrong-key")
    yield failed(
        draft.name, "header", "another key under the slot's key id", draft.parts(), [wrong]
    )
    for name, lock, text in (
        ("wrong-password-argon2id", PASSWORD, "correct horse "),
        ("wrong-password-pbkdf2", OTHER_PASSWORD, "Battery staple"),
    ):
        draft = Draft(name, [lock])
        yield failed(name, "header", "another password", draft.parts(), [Password(text)])
    draft = Draft("wrong-password-twice", [PASSWORD, OTHER_PASSWORD])
    comment = "a password that opens neither of two slots"
    yield failed(draft.name, "header", comment, draft.parts(), [Password("neither")])
    draft = Draft("wrong-key-and-password", [KEY, PASSWORD])
    comment = "neither the key under the slot's key id nor the password is right"
    yield failed(draft.name, "header", comment, draft.parts(), [wrong, Password("neither")])


@group
def slots_moved() -> Group:
    for name, lock in (
        ("key", KEY),
        ("argon2id", PASSWORD),
        ("pbkdf2", OTHER_PASSWORD),
        ("recipient", FIRST),
    ):
        draft = Draft(f"moved-{name}", [lock])
        other = Draft(f"moved-{name}/other", [lock], file_key=draft.file_key)
        parts = draft.parts()
        parts.slots = other.parts().slots
        comment = "the slot of another object with the same lock and file key, with a MAC to match"
        yield failed(draft.name, "header", comment, parts, [lock])
    draft = Draft("moved-between-vaults")
    other = replace(draft, vault_id=draw(COMMON, "other vault id", 16))
    parts = draft.parts()
    parts.slots = other.parts().slots
    comment = "the slot of an object that differs in nothing but the vault id, with a MAC to match"
    yield failed(draft.name, "header", comment, parts)
    draft = Draft("moved-from-former")
    former = replace(draft, file_key=draft.draw("former file key", 32))
    parts = draft.parts()
    parts.slots = former.parts().slots
    comment = "the slot of an earlier sealing under the same core: it opens to another file key"
    yield failed(draft.name, "header", comment, parts)
    draft = Draft("moved-between-types", [PASSWORD])
    parts = draft.parts()
    front = by_hand.key_front(PASSWORD.key_id) + draft.draw("salt of slot 0", 32)
    root_key = PASSWORD.root_key(draft.name)
    tail = by_hand.slot(root_key, front, draft.core(), draft.file_key)[-by_hand.TAIL :]
    parts.slots[0] = parts.slots[0][: -by_hand.TAIL] + tail
    comment = "commitment and wrapped key are those of a key's slot with the same root key"
    yield failed(draft.name, "header", comment, parts, [PASSWORD])


@group
def order_of_slots() -> Group:
    def one_misleads(
        name: str, comment: str, locks: Sequence[Lock], index: int
    ) -> tuple[Draft, Parts, str]:
        """Make an object of which one slot opens to another file key, under a right MAC."""
        draft = Draft(f"order-{name}", locks)
        parts = draft.parts()
        former = replace(draft, file_key=draft.draw("former file key", 32))
        parts.slots[index] = former.slot(index)
        return draft, parts, f"{comment}; the other slot opens to another file key"

    same_password = Password(PASSWORD.text, FEWEST_ITERATIONS)
    rights: tuple[tuple[str, list[Lock], int, str], ...] = (
        ("named-first", [PASSWORD, KEY], 0, "a key's slot is tried before that of a password"),
        (
            "first-recipient",
            [FIRST, KEY],
            1,
            "a recipient's slot is tried first where it stands first",
        ),
        ("first-key", [KEY, FIRST], 1, "a key's slot is tried first where it stands first"),
    )
    for name, locks, index, comment in rights:
        draft, parts, said = one_misleads(name, comment, locks, index)
        yield opened(draft, said, parts)
    wrongs: tuple[tuple[str, list[Lock], str], ...] = (
        ("misled-by-key", [KEY, OTHER_KEY], "the second of two keys' slots is right"),
        ("misled-by-recipient", [FIRST, KEY], "a key's slot behind a recipient's is right"),
        ("misled-before-recipient", [KEY, FIRST], "a recipient's slot behind a key's is right"),
        ("misled-before-password", [KEY, PASSWORD], "a password's slot behind a key's is right"),
        (
            "misled-by-password",
            [same_password, PASSWORD],
            "the second of a password's slots is right",
        ),
        (
            "misled-by-argon2id",
            [PASSWORD, same_password],
            "a PBKDF2 slot behind an Argon2id slot for the same password is right",
        ),
    )
    for name, locks, comment in wrongs:
        draft, parts, said = one_misleads(name, comment, locks, 0)
        openers = locks[:1] if same_password in locks else locks
        said = f"{said}, and the first that opens decides"
        yield failed(draft.name, "header", said, parts, openers)


@group
def neighbouring_ids() -> Group:
    # Only the first byte tells the two from each other.
    twin = Key(bytes([KEY.key_id[0] ^ 1]) + KEY.key_id[1:], OTHER_KEY.key)
    draft = Draft("ids-of-one-byte", [KEY, twin])
    yield opened(draft, "two key ids that differ in their first byte alone", openers=[twin])


@group
def two_keys() -> Group:
    twin = Key(KEY.key_id, OTHER_KEY.key)
    same = draw(COMMON, "shared password", 80)
    first = _argon2id(b"one", CHEAPEST, same[:32])
    second = _argon2id(b"two", CHEAPEST, same[:32])
    password_front = by_hand.argon2id_front(same[32:48], CHEAPEST, same[:32]) + same[48:]
    key_front = by_hand.key_front(KEY.key_id) + same[48:]
    for name, front, roots, openers in (
        ("two-keys", key_front, (KEY.key, twin.key), (KEY, twin)),
        ("two-passwords", password_front, (first, second), (Password("one"), Password("two"))),
    ):
        for which in (0, 1):
            draft = Draft(f"{name}-{'first' if which == 0 else 'second'}")
            keys, commitments = zip(
                *(by_hand.slot_keys(root, front, draft.core()) for root in roots), strict=True
            )
            block = draft.draw("first block", 16)
            wrapped, *file_keys = by_hand.wrap_for_two(keys[0], keys[1], block)
            draft.file_key = file_keys[which]
            parts = replace(draft, locks=[]).parts()
            parts.slots = [front + commitments[0] + wrapped]
            comment = "the wrapped key opens under two keys by GCM; the commitment is the first's"
            if which == 0:
                yield opened(draft, f"{comment}, which opens", parts, openers[:1])
            else:
                comment = f"{comment}, and all else is the second's, which must not open"
                yield failed(draft.name, "header", comment, parts, openers[1:])
    draft = Draft("two-keys-commitment")
    parts = draft.parts()
    commitment = by_hand.slot_keys(OTHER_KEY.key, draft.front(0), draft.core())[1]
    parts.slots[0] = put(parts.slots[0], 52, commitment)
    comment = "the commitment is to another key, with a MAC to match"
    yield failed(draft.name, "header", comment, parts)


@group
def recipients_that_fail() -> Group:
    other_core = Draft("recipient-other").core()
    swapped = FIRST.identity.shared_secret(SECOND.enc)
    low, zero = b"\1" + bytes(31), bytes(32)
    for name, lock, comment in (
        (
            "recipient-info-core",
            replace(FIRST, info_core=other_core),
            "the root key is sealed under the core of another object",
        ),
        (
            "recipient-other-enc",
            replace(FIRST, enc=SECOND.enc, secret=FIRST.identity.shared_secret(FIRST.enc)),
            "the encapsulated key was made for another recipient",
        ),
    ):
        draft = Draft(name, [lock])
        yield failed(name, "header", comment, draft.parts(), [lock])
    draft = Draft("recipient-implicit-rejection", [replace(FIRST, enc=SECOND.enc, secret=swapped)])
    comment = (
        "the encapsulated key was made for another recipient: decapsulation gives a secret "
        "nevertheless, under which this one is sealed"
    )
    yield opened(draft, comment)
    for name, share, what in (("zero", zero, "all zeros"), ("low", low, "a point of low order")):
        draft = Draft(f"recipient-share-{name}", [FIRST])
        parts = draft.parts()
        parts.slots[0] = put(parts.slots[0], SHARE, share)
        comment = f"the X25519 share is {what}"
        yield failed(draft.name, "header", comment, parts, [FIRST])
        enc = FIRST.enc[:1_088] + share
        crafted = replace(FIRST, enc=enc, secret=FIRST.identity.shared_secret(enc, bytes(32)))
        draft = Draft(f"recipient-share-{name}-crafted", [crafted])
        made = f"{comment}, and the slot is made for the all-zero secret that comes of it"
        yield failed(draft.name, "header", made, draft.parts(), [FIRST])
    draft = Draft("recipient-key-id", [FIRST])
    parts = draft.parts()
    parts.slots[0] = put(parts.slots[0], KEY_ID, SECOND.key_id)
    comment = "one recipient's slot under the id of another"
    yield failed(draft.name, "header", comment, parts, [SECOND])
    draft = Draft("recipient-exchanged", [FIRST, SECOND])
    parts = draft.parts()
    one, two = (slot[PARAMETERS:RECIPIENT_SALT] for slot in parts.slots)
    parts.slots = [
        put(slot, PARAMETERS, new) for slot, new in zip(parts.slots, (two, one), strict=True)
    ]
    comment = "two recipients' sealed root keys have changed places"
    yield failed(draft.name, "header", comment, parts, [FIRST, SECOND])


# The prime of X25519: a share from there on says the same as one of the smallest numbers.
PRIME: Final = 2**255 - 19
ORDER_8: Final = "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"


@group
def shares_in_other_forms() -> Group:
    def crafted(share: bytes, exchanged: bytes, hashed: bytes = b"") -> Recipient:
        """Seal to the first recipient, with ``hashed`` where the share is to be hashed."""
        enc = FIRST.enc[:1_088]
        secret = FIRST.identity.shared_secret(enc + (hashed or share), exchanged)
        return replace(FIRST, enc=enc + share, secret=secret)

    share, public = FIRST.enc[1_088:], FIRST.identity.public_key[1_184:]
    exchanged = FIRST.identity.exchange(share)
    nine = (9).to_bytes(32, "little")  # the base point, so that the public key comes of it
    large = (PRIME + 9).to_bytes(32, "little")
    for name, form, usual, result, comment in (
        ("top-bit-set", flip(share, -1, 0x80), share, exchanged,
         "the X25519 share has its top bit set, which X25519 ignores"),
        ("not-reduced", large, nine, public, "the X25519 share is 2^255 - 10, the same as 9"),
        ("not-reduced-top-bit-set", flip(large, -1, 0x80), nine, public,
         "the X25519 share is 2^256 - 10: its top bit is ignored, and the rest the same as 9"),
    ):  # fmt: skip
        draft = Draft(f"recipient-share-{name}", [crafted(form, result)])
        yield opened(draft, f"{comment}; the shared secret takes its bytes as they stand")
        draft = Draft(f"recipient-share-{name}-hashed-as-usual", [crafted(form, result, usual)])
        said = f"{comment}; the slot is made for a shared secret of its usual form"
        yield failed(draft.name, "header", said, draft.parts(), [FIRST])
    for name, form, what in (
        ("zero-top-bit-set", bytes(31) + b"\x80", "zero with its top bit set"),
        ("prime", PRIME.to_bytes(32, "little"), "2^255 - 19, the same as zero"),
        ("prime-less-1", (PRIME - 1).to_bytes(32, "little"), "2^255 - 20, of low order"),
        ("prime-more-1", (PRIME + 1).to_bytes(32, "little"), "2^255 - 18, the same as 1"),
        ("order-8", bytes.fromhex(ORDER_8), "a point of order 8"),
    ):
        draft = Draft(f"recipient-share-{name}-crafted", [crafted(form, bytes(32))])
        said = f"the X25519 share is {what}, and the slot is made for an all-zero secret"
        yield failed(draft.name, "header", said, draft.parts(), [FIRST])


@group
def macs() -> Group:
    for name, comment, offset, mask in (
        ("first-bit", "the first bit of the MAC differs", 0, 0x80),
        ("last-bit", "the last bit of the MAC differs", -1, 1),
    ):
        draft = Draft(f"mac-{name}")
        parts = draft.parts()
        parts.mac = flip(parts.sign(), offset, mask)
        yield failed(draft.name, "header", comment, parts)
    draft = Draft("mac-other-slot-flipped", [KEY, OTHER_KEY])
    parts = draft.parts()
    parts.mac = parts.sign()
    parts.slots[1] = flip(parts.slots[1], -1)
    yield failed(draft.name, "header", "a bit differs in a slot that is not used", parts)
    draft = Draft("mac-zeros")
    parts = draft.parts()
    parts.mac = bytes(32)
    yield failed(draft.name, "header", "the MAC is zeros", parts)
    draft = Draft("mac-of-another-object")
    parts = draft.parts()
    other = Draft("mac-of-another-object/other", file_key=draft.file_key)
    parts.mac = other.parts().sign()
    yield failed(draft.name, "header", "the MAC of another object with the same file key", parts)
    draft = Draft("mac-of-another-file-key")
    parts = draft.parts()
    parts.mac = replace(parts, file_key=draft.draw("other file key", 32)).sign()
    yield failed(draft.name, "header", "the MAC is made with another file key", parts)
    draft = Draft("mac-key-of-another-core")
    parts = draft.parts()
    parts.mac = by_hand.mac(draft.file_key, bytes(56), parts.unsigned())
    yield failed(draft.name, "header", "the MAC's key is derived with another core", parts)
    extra = filler(by_hand.KEY_TYPE, b"", "mac")
    both: list[Lock] = [KEY, OTHER_KEY]
    for name, comment, change in (
        ("slot-added", "a slot was added, without a new MAC", lambda slots: [*slots, extra]),
        ("slot-removed", "a slot was removed, without a new MAC", lambda slots: slots[:1]),
        (
            "slot-replaced",
            "a slot was replaced, without a new MAC",
            lambda slots: [slots[0], extra],
        ),
        ("slots-reordered", "slots in another order, without a new MAC", lambda slots: slots[::-1]),
    ):
        draft = Draft(f"mac-{name}", both)
        parts = draft.parts()
        parts.mac = parts.sign()
        parts.slots = change(parts.slots)
        yield failed(draft.name, "header", comment, parts)


@group
def sections_exchanged() -> Group:
    def three(name: str) -> tuple[Draft, Parts]:
        draft = Draft(
            name, preview=draw(COMMON, "preview", 1_024), body=draw(COMMON, "body", 1_024)
        )
        return draft, draft.parts()

    for one, two in (("meta", "preview"), ("meta", "body"), ("preview", "body")):
        draft, parts = three(f"exchanged-{one}-{two}")
        first, second = getattr(parts, one), getattr(parts, two)
        setattr(parts, one, second)
        setattr(parts, two, first)
        comment = f"{one.upper()} and {two.upper()} have changed places"
        yield failed(draft.name, "content", comment, parts)
    for section in ("meta", "preview", "body"):
        upper = section.upper()
        draft, parts = three(f"exchanged-{section}-of-another-object")
        other = Draft(
            f"{draft.name}/other", preview=draft.preview, body=draft.body, file_key=draft.file_key
        )
        setattr(parts, section, getattr(other.parts(), section))
        comment = f"{upper} of another object with the same file key"
        yield failed(draft.name, "content", comment, parts)
        draft, parts = three(f"exchanged-{section}-of-former")
        former = replace(draft, file_key=draft.draw("former file key", 32))
        setattr(parts, section, getattr(former.parts(), section))
        comment = f"{upper} of an earlier sealing under the same core"
        yield failed(draft.name, "content", comment, parts)
        draft, parts = three(f"exchanged-{section}-chunk")
        donor = draft.section(upper, "another message")
        plain = draft.plain_meta() if section == "meta" else getattr(draft, section)
        sealed = donor.join(donor.chunk(0, plain))
        setattr(parts, section, getattr(parts, section)[:56] + sealed[56:])
        comment = f"{upper} with the chunk of another {upper} message under the same file key"
        yield failed(draft.name, "content", comment, parts)
    draft, parts = three("exchanged-header-of-former")
    former = replace(draft, file_key=draft.draw("former file key", 32))
    parts.slots, parts.file_key = former.parts().slots, former.file_key
    comment = (
        "the header of an earlier sealing, under the same core, before the sections of this one"
    )
    yield failed(draft.name, "content", comment, parts)


@group
def sections_damaged() -> Group:
    places = (
        ("salt-first", "the salt", 0, 0x80), ("salt-last", "the salt", 23, 1),
        ("commitment-first", "the commitment", 24, 0x80),
        ("commitment-last", "the commitment", 55, 1),
        ("chunk", "the chunk", 56, 1), ("tag-first", "the tag", -16, 0x80),
        ("tag-last", "the tag", -1, 1),
    )  # fmt: skip
    for section in ("meta", "preview", "body"):
        upper = section.upper()
        for name, place, offset, mask in places:
            draft = Draft(f"damaged-{section}-{name}", preview=WITH_PREVIEW)
            parts = draft.parts()
            setattr(parts, section, flip(getattr(parts, section), offset, mask))
            yield failed(draft.name, "content", f"a bit differs in {place} of {upper}", parts)
        draft = Draft(f"damaged-{section}-commitment-of-another-key", preview=WITH_PREVIEW)
        parts = draft.parts()
        other = by_hand.section(bytes(32), upper, draft.core(), draft.section(upper).salt)
        setattr(parts, section, put(getattr(parts, section), 24, other.commitment))
        comment = f"the commitment of {upper} is to another key, and its chunk is right"
        yield failed(draft.name, "content", comment, parts)
    body = draw(COMMON, "body", 2 * CHUNK + 5)
    for name, size, offset, good, comment in (
        ("first-chunk", CHUNK + 5, 56, 0, "a bit differs in the first of two chunks"),
        ("first-tag", CHUNK + 5, 56 + CHUNK, 0, "a bit differs in the tag of the first chunk"),
        (
            "middle-chunk",
            2 * CHUNK + 5,
            56 + 16_400,
            1,
            "a bit differs in the second of three chunks",
        ),
        ("last-chunk", CHUNK + 5, -17, 1, "a bit differs in the last of two chunks"),
        ("last-tag", CHUNK + 5, -1, 1, "a bit differs in the tag of the last of two chunks"),
        ("last-empty-tag", CHUNK, -1, 1, "a bit differs in the tag of the empty last chunk"),
    ):
        draft = Draft(f"damaged-body-{name}", body=body[:size])
        parts = draft.parts()
        parts.body = flip(parts.body, offset)
        yield failed(draft.name, "content", comment, parts, released=body[: good * CHUNK])


@group
def chunks() -> Group:
    body = draw(COMMON, "body", 2 * CHUNK + 5)
    full, more, rest = body[:CHUNK], body[CHUNK : 2 * CHUNK], body[2 * CHUNK :]

    def rearranged(
        name: str, comment: str, size: int, pieces: Sequence[tuple[int, bytes]], good: int
    ) -> Vector:
        """Put chunks, each sealed as the one of its index, where META says ``size``."""
        draft = Draft(f"chunks-{name}", fields={SIZE: number(SIZE, size)}, body=b"")
        parts = draft.parts()
        message = draft.section("BODY")
        parts.body = message.join(*(message.chunk(index, piece) for index, piece in pieces))
        return failed(draft.name, "content", comment, parts, released=body[: good * CHUNK])

    a, b, c = (0, full), (1, more), (2, rest)
    short = (1, rest)
    yield rearranged("swapped", "two full chunks have changed places", len(body), (b, a, c), 0)
    yield rearranged("duplicated", "a full chunk stands there twice", len(body), (a, a, c), 1)
    yield rearranged("dropped", "a full chunk is missing", len(body), (a, c), 1)
    yield rearranged(
        "dropped-size-made-to-match", "a full chunk is missing, and the size says so",
        CHUNK + 5, (a, c), 1,
    )  # fmt: skip
    yield rearranged("inserted", "a full chunk too many", CHUNK + 5, (a, b, c), 1)
    yield rearranged(
        "final-first", "the short last chunk stands before the full one", CHUNK + 5, (short, a), 0
    )
    yield rearranged(
        "final-in-the-middle", "a short chunk, and a full one behind it",
        CHUNK + 5, ((0, rest), (1, full)), 0,
    )  # fmt: skip
    yield rearranged(
        "two-finals", "two short chunks, of the length of one message", 26,
        ((0, rest), (1, rest)), 0,
    )  # fmt: skip
    yield rearranged(
        "final-twice", "the last chunk stands there twice", CHUNK + 5, (a, short, short), 1
    )
    yield rearranged(
        "no-final", "a full chunk ends the body, and its size is that of the chunk", CHUNK, (a,), 1
    )
    yield rearranged(
        "final-empty", "the last chunk is empty, and the size says otherwise",
        CHUNK + 5, (a, (1, b"")), 1,
    )  # fmt: skip
    yield rearranged("only-empty", "an empty chunk, and the size says otherwise", 5, ((0, b""),), 0)
    yield rearranged(
        "first-index-1", "the only chunk is sealed as the second one", 5, ((1, rest),), 0
    )
    yield rearranged("none", "salt and commitment, and no chunk", 0, (), 0)


@group
def sizes() -> Group:
    long = draw(COMMON, "body", CHUNK + 5)
    small = long[:22]
    chunks, rest = divmod(2**64 + len(small), CHUNK + by_hand.TAG)
    wrapped = chunks * CHUNK + rest
    for name, body, size, good, comment in (
        ("one-more", small, 21, 0, "the body is one byte longer than the size says"),
        ("one-less", small, 23, 0, "the body is one byte shorter than the size says"),
        ("sixteen-more", small, 6, 0, "the body is longer than the size says, by a tag's length"),
        ("zero", small, 0, 0, "a size of 0, and a body"),
        ("of-nothing", b"", 1, 0, "a size of 1, and no body"),
        ("first-chunk-of-two", long, CHUNK, 1, "the size ends with the first of two chunks"),
        ("within-first-chunk", long, CHUNK - 1, 0, "the size ends within the first of two chunks"),
        ("a-chunk-less", long, 5, 0, "the body is a full chunk longer than the size"),
        ("a-chunk-more", small, CHUNK + 22, 0, "the body is a full chunk shorter than the size"),
        ("largest", small, 2**52 - 1, 0, "the largest size that a message has"),
        ("too-large", small, 2**52, 0, "a size that no message has"),
        ("sign-bit", small, 2**63, 0, "a size of 2^63"),
        ("overflow", small, wrapped, 0, "a size whose sealed length is the body's, modulo 2^64"),
        ("most", small, 2**64 - 1, 0, "the largest size that the field can say"),
        ("modulo-32", small, 2**32 + 22, 0, "a size that is right in its lowest 32 bits"),
    ):  # fmt: skip
        draft = Draft(f"size-{name}", body=body, fields={SIZE: number(SIZE, size)})
        yield failed(draft.name, "content", comment, draft.parts(), released=body[: good * CHUNK])


BAD_VALUES: Final[tuple[tuple[str, int, bytes, str], ...]] = (
    ("name-empty", NAME, b"", "an empty name"),
    ("name-dot", NAME, b".", "the name ."),
    ("name-dots", NAME, b"..", "the name .."),
    ("name-slash", NAME, b"a/b", "a name with a slash"),
    ("name-absolute", NAME, b"/etc/passwd", "a name that begins with a slash"),
    ("name-zero-byte", NAME, b"a.jpg\0.exe", "a name with a zero byte"),
    ("name-4097", NAME, b"n" * 4_097, "a name of 4097 bytes"),
    ("folder-dots", FOLDER, b"a/../../b", "a folder that leads out"),
    ("folder-dot", FOLDER, b"./a", "a folder with a component ."),
    ("folder-last-dots", FOLDER, b"a/..", "a folder that ends with .."),
    ("folder-absolute", FOLDER, b"/a", "a folder that begins with a slash"),
    ("folder-slash-at-end", FOLDER, b"a/", "a folder that ends with a slash"),
    ("folder-empty-component", FOLDER, b"a//b", "a folder with an empty component"),
    ("folder-zero-byte", FOLDER, b"a\0", "a folder with a zero byte"),
    ("folder-4097", FOLDER, b"f" * 4_097, "a folder of 4097 bytes"),
    ("folder-4097-in-components", FOLDER, b"/".join([b"f" * 255] * 16) + b"/f",
     "a folder of 4097 bytes, of components that are right"),
    ("source-4097", SOURCE, b"s" * 4_097, "a source of 4097 bytes"),
    ("size-7", SIZE, b"\0\0\0\0\0\0\x16", "a size of 7 bytes"),
    ("size-9", SIZE, bytes(8) + b"\x16", "a size of 9 bytes"),
    ("size-0", SIZE, b"", "a size of no bytes"),
    ("mtime-8", MTIME, bytes(8), "a time of 8 bytes"),
    ("mode-2", MODE, b"\x01\xa0", "a mode of 2 bytes"),
    ("width-8", WIDTH, bytes(8), "a width of 8 bytes"),
    ("height-2", HEIGHT, bytes(2), "a height of 2 bytes"),
    ("ingested-17", INGESTED, bytes(17), "a time of 17 bytes"),
    ("format-65", FORMAT, b"J" * 65, "a format of 65 bytes"),
    ("format-control", FORMAT, b"JPEG\x1f", "a format with the byte 0x1f"),
    ("label-not-ascii", LABEL, b"image\x80", "a label with the byte 0x80"),
    ("label-65", LABEL, b"i" * 65, "a label of 65 bytes"),
    ("proof-delete", PROOF, b"closed\x7f", "a proof with the byte 0x7f"),
    ("proof-65", PROOF, b"p" * 65, "a proof of 65 bytes"),
    ("tool-line-end", TOOL, b"tool\n", "a tool with a line end"),
    ("tool-65", TOOL, b"t" * 65, "a tool of 65 bytes"),
)  # fmt: skip


@group
def meta_values() -> Group:
    for name, tag, value, comment in BAD_VALUES:
        draft = Draft(f"meta-bad-{name}", fields={tag: value})
        yield failed(draft.name, "content", comment, draft.parts())
    for tag, name in enumerate(FIELDS, start=1):
        draft = Draft(f"meta-without-{name}", fields={tag: None})
        yield failed(draft.name, "content", f"META without {name}", draft.parts())


@group
def meta_structure() -> Group:
    records = Draft("meta-structure").records()
    joined = b"".join(records)
    padded = by_hand.padded
    record = by_hand.record
    used = len(joined)
    more = padded(joined + record(14, bytes(1_024)))
    for name, plain, comment in (
        ("order", padded(b"".join([records[1], records[0], *records[2:]])), "tags out of order"),
        ("order-last", padded(b"".join([records[12], *records[:12]])), "the last tag stands first"),
        ("duplicate", padded(b"".join([*records[:3], *records[2:]])), "a tag twice"),
        ("duplicate-unknown", padded(joined + record(14, b"a") * 2), "an unknown tag twice"),
        (
            "unknown-order",
            padded(joined + record(15, b"") + record(14, b"")),
            "unknown tags descend",
        ),
        ("critical-lowest", padded(joined + record(0x8000, b"")), "the lowest critical tag"),
        ("critical-name", padded(joined + record(0x8001, b"n")), "a known tag, made critical"),
        ("critical-highest", padded(joined + record(0xFFFF, b"x")), "the highest critical tag"),
        ("length-past-end", padded(joined + record(14, b"", 1_024)), "a length past the end"),
        ("length-most", padded(joined + record(14, b"", 2**32 - 1)), "a length of 2^32 - 1"),
        ("first-length-most", padded(put(joined, 2, b"\xff" * 4)), "the first length is 2^32 - 1"),
        ("no-end-mark", joined + record(14, bytes(1_024 - used - 6)), "no room for the end mark"),
        (
            "half-end-mark",
            joined + record(14, bytes(1_024 - used - 7)) + b"\0",
            "room for one byte of the end mark",
        ),
        (
            "cut-head",
            joined + record(14, bytes(1_024 - used - 11)) + record(15, b"")[:5],
            "the head of a record is cut",
        ),
        ("padding-first", put(padded(joined), used + 2, b"\1"), "the first byte of padding is set"),
        ("padding-last", padded(joined)[:-1] + b"\1", "the last byte of padding is set"),
        ("padding-more", padded(joined) + bytes(1_024), "one KiB of padding too many"),
        ("padding-less", more[:-1], "one byte of padding is missing"),
        ("padding-sixteen", padded(joined) + bytes(16), "padded to no multiple of 1 KiB"),
        ("empty", bytes(1_024), "no record at all"),
        (
            "behind-end-mark",
            put(padded(joined), used + 2, record(14, b"x")),
            "more after the end mark",
        ),
        ("end-mark-in-front", b"\0\0" + padded(joined)[:-2], "the end mark stands first"),
    ):
        draft = Draft(f"meta-{name}", meta=plain)
        yield failed(draft.name, "content", comment, draft.parts())


@group
def mismatches() -> Group:
    other = draw(COMMON, "another id", 16)
    for name, object_id, vault_id, comment in (
        ("object", other, None, "another object id is expected"),
        (
            "object-vault-right",
            other,
            VAULT,
            "the vault is the expected one, and the object is not",
        ),
        ("vault", None, other, "another vault id is expected"),
        ("no-vault", None, bytes(16), "no vault is expected, and the object belongs to one"),
        ("both", other, other, "another object of another vault is expected"),
    ):
        draft = Draft(f"mismatch-{name}")
        ids = expectations(object_id, vault_id)
        yield failed(draft.name, "mismatch", comment, draft.parts(), ids=ids)
    draft = Draft("mismatch-one-bit")
    ids = expectations(flip(draft.object_id, 15), VAULT)
    comment = "an object id is expected that differs in its last bit"
    yield failed(draft.name, "mismatch", comment, draft.parts(), ids=ids)
    draft = Draft("mismatch-vault-expected", vault_id=bytes(16))
    ids = expectations(draft.object_id, VAULT)
    comment = "a vault is expected, and the object belongs to none"
    yield failed(draft.name, "mismatch", comment, draft.parts(), ids=ids)
    ids = expectations(other, None)
    draft = Draft("mismatch-before-no-key")
    comment = "ids are compared before slots are chosen"
    yield failed(draft.name, "mismatch", comment, draft.parts(), [], ids)
    draft = Draft("mismatch-before-header")
    parts = draft.parts()
    parts.slots[0] = flip(parts.slots[0], -1)
    yield failed(draft.name, "mismatch", "ids are compared before a slot is tried", parts, ids=ids)
    draft = Draft("mismatch-after-malformed", patch={8: b"\2"})
    comment = "what is malformed is refused before ids are compared"
    yield failed(draft.name, "malformed", comment, draft.parts(), ids=ids)
    draft = Draft("mismatch-after-malformed-slot", [KEY])
    parts = draft.parts()
    parts.slots.append(argon2id_filler(draft.name, (1, 1, 1)))
    comment = "slots are checked before ids are compared"
    yield failed(draft.name, "malformed", comment, parts, ids=ids)


@group
def without_a_key() -> Group:
    cases: tuple[tuple[str, list[Lock], list[Lock], str], ...] = (
        ("nothing", [KEY, PASSWORD, FIRST], [], "nothing given"),
        ("other-key", [KEY], [OTHER_KEY], "the key of another id"),
        ("same-key-other-id", [KEY], [Key(OTHER_KEY.key_id, KEY.key)], "the key under another id"),
        ("password", [KEY], [PASSWORD], "a password, and the only slot is for a key"),
        ("password-recipient", [FIRST], [PASSWORD], "a password, and the slot is a recipient's"),
        ("key-password", [PASSWORD], [KEY], "a key, and the only slot is for a password"),
        ("key-recipient", [FIRST], [KEY], "a key, and the only slot is for a recipient"),
        ("other-identity", [FIRST], [SECOND], "the identity of another recipient"),
        ("identity-key", [KEY], [FIRST], "an identity, and the only slot is for a key"),
        (
            "key-under-recipient-id", [FIRST], [Key(FIRST.key_id, KEY.key)],
            "a key under the id of a recipient",
        ),
        (
            "key-under-password-id", [PASSWORD], [Key(PASSWORD.key_id, KEY.key)],
            "a key under the id of a password slot",
        ),
        (
            "identity-under-key-id", [Key(FIRST.key_id, KEY.key)], [FIRST],
            "an identity whose recipient has the id of a key's slot",
        ),
    )  # fmt: skip
    for name, locks, openers, comment in cases:
        draft = Draft(f"no-key-{name}", locks)
        yield failed(draft.name, "no-key", comment, draft.parts(), openers)
    draft = Draft("no-key-before-header")
    parts = draft.parts()
    parts.mac = bytes(32)
    yield failed(
        draft.name, "no-key", "without a key, the MAC is not looked at", parts, [OTHER_KEY]
    )
    draft = Draft("no-key-before-content")
    whole = draft.pack()[:-30]
    yield failed(draft.name, "no-key", "without a key, no section is looked at", whole, [OTHER_KEY])
    draft = Draft("no-key-after-malformed", patch={9: b"\1"})
    yield failed(draft.name, "malformed", "structure counts first", draft.parts(), [OTHER_KEY])
    draft = Draft("no-key-id-altered")
    parts = draft.parts()
    parts.slots[0] = flip(parts.slots[0], KEY_ID)
    yield failed(draft.name, "no-key", "another key id in the slot, and no key under it", parts)


def vectors() -> dict[str, bytes]:
    """Return all vectors: file name and contents."""
    files: dict[str, bytes] = {}
    for make in GROUPS:
        for vector in make():
            if vector.expect not in OUTCOMES or f"{vector.name}.vec" in files:
                raise ValueError(f"{vector.name}: a name or an outcome is wrong")
            files[f"{vector.name}.vec"] = vector.pack()
    return files


# --- texts ---------------------------------------------------------------------------------

Entry = dict[str, str | list[str]]


def exchange(text: str, old: str, new: str) -> str:
    """Put ``new`` in the place of the last ``old`` there is."""
    before, found, after = text.rpartition(old)
    if not found:
        raise ValueError(f"there is no {old} in it")
    return before + new + after


def next_of(alphabet: str, character: str) -> str:
    return alphabet[alphabet.index(character) + 1]


BASE32: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
BASE32HEX: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUV"
BASE64URL: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"

THIRD_IDENTITY: Final = by_hand.Identity(bytes(range(32)))


def valid_identities() -> list[by_hand.Identity]:
    edges = (by_hand.Identity(bytes(32)), by_hand.Identity(b"\xff" * 32))
    return [FIRST.identity, SECOND.identity, THIRD_IDENTITY, *edges]


def refused_recipients() -> Iterator[tuple[str, str]]:
    identity = FIRST.identity
    public, text = identity.public_key, identity.recipient_text
    prefix = by_hand.RECIPIENT_PREFIX
    tail = text.removeprefix(prefix)

    def sealed(key: bytes) -> str:
        return by_hand.recipient_text(key, by_hand.checksum(prefix, key))

    yield "no text", ""
    yield "the prefix alone", prefix
    yield "without its prefix", tail
    yield "the prefix of another version", f"secimg-recipient-2:{tail}"
    yield "the prefix of an identity", by_hand.IDENTITY_PREFIX + tail
    yield "the prefix twice", prefix + text
    yield "the prefix in upper case", prefix.upper() + tail
    yield "all in upper case", text.upper()
    yield "all in lower case", text.lower()
    yield "an identity", identity.text
    yield "the last character is missing", text[:-1]
    yield "the last four characters are missing", text[:-4]
    yield "one character more", f"{text}A"
    yield "four characters more", f"{text}AAAA"
    yield "a padding character", f"{text}="
    yield "an unused bit is set", text[:-1] + next_of(BASE64URL, text[-1])
    yield "a character of the key differs", exchange(text, "b", "c")
    yield "the checksum differs", by_hand.recipient_text(public, bytes(4))
    yield (
        "the checksum is made without the prefix",
        by_hand.recipient_text(public, by_hand.checksum("", public)),
    )
    yield (
        "the checksum is made with the prefix of an identity",
        by_hand.recipient_text(public, by_hand.checksum(by_hand.IDENTITY_PREFIX, public)),
    )
    yield "a key one byte shorter, under a right checksum", sealed(public[:-1])
    yield "a key one byte longer, under a right checksum", sealed(public + b"\0")
    yield "no key, under a right checksum", sealed(b"")
    yield "a + of base64 instead of a -", prefix + exchange(tail, "-", "+")
    yield "a / of base64 instead of a _", prefix + exchange(tail, "_", "/")
    yield "a space in front", f" {text}"
    yield "a space behind", f"{text} "
    yield "a space within", f"{text[:100]} {text[100:]}"
    yield "a line end behind", f"{text}\n"
    yield "a line end within", f"{text[:100]}\n{text[100:]}"
    yield "a zero byte behind", f"{text}\0"
    yield "a long s in the prefix", f"\u017f{text[1:]}"
    yield "a fullwidth letter", exchange(text, "A", "\uff21")
    for reason, key in (
        ("a coefficient of the ML-KEM key is too large", b"\xff" * 3 + public[3:]),
        ("the X25519 key is zero", public[:1_184] + bytes(32)),
        ("the X25519 key is 1, a point of low order", public[:1_184] + b"\1" + bytes(31)),
    ):
        yield f"{reason}, under a right checksum", sealed(key)


def typed_identities() -> Iterator[tuple[str, by_hand.Identity]]:
    prefix = by_hand.IDENTITY_PREFIX
    identities = valid_identities()
    for identity in identities:
        yield identity.text.lower(), identity
    one, two, three = identities[:3]
    tail = one.text.removeprefix(prefix)
    groups = [tail[start : start + 4] for start in range(0, len(tail), 4)]
    yield prefix.title() + tail.swapcase(), one
    yield prefix + " " + " ".join(groups), one
    yield prefix + "-".join(groups), one
    yield prefix.lower() + " - ".join(groups).lower() + " -", one
    yield prefix + "-" * 100 + tail, one
    yield prefix + " ".join(tail) + "\r\n", one
    yield f"  {two.text}\n\n", two
    yield f" \t\n\v\f\r{two.text}\r\f\v\n\t ", two
    yield two.text[:40] + " \t\n\v\f\r" + two.text[40:], two
    yield three.text.replace(":", ":\n"), three


def refused_identities() -> Iterator[tuple[str, str]]:
    identity = FIRST.identity
    seed, text = identity.seed, identity.text
    prefix = by_hand.IDENTITY_PREFIX
    tail = text.removeprefix(prefix)

    def sealed(seed: bytes) -> str:
        return by_hand.identity_text(seed, by_hand.checksum(prefix, seed))

    yield "no text", ""
    yield "the prefix alone", prefix
    yield "without its prefix", tail
    yield "without its colon", text.replace(":", "")
    yield "the prefix of another version", f"SECIMG-IDENTITY-2:{tail}"
    yield "the prefix of a recipient", by_hand.RECIPIENT_PREFIX + tail
    yield "the prefix twice", prefix + text
    yield "a recipient", identity.recipient_text
    yield "the last character is missing", text[:-1]
    yield "the last eight characters are missing", text[:-8]
    yield "one character more", f"{text}A"
    yield "six characters more", f"{text}AAAAAA"
    yield "padding characters", f"{text}======"
    yield "one padding character", f"{text}="
    yield "an unused bit is set", text[:-1] + next_of(BASE32, text[-1])
    yield "a character of the seed differs", exchange(text, "Q", "R")
    yield "two characters have changed places", f"{prefix}{tail[1]}{tail[0]}{tail[2:]}"
    yield "the checksum differs", by_hand.identity_text(seed, bytes(4))
    yield (
        "the checksum is made without the prefix",
        by_hand.identity_text(seed, by_hand.checksum("", seed)),
    )
    yield (
        "the checksum is made with the prefix in lower case",
        by_hand.identity_text(seed, by_hand.checksum(prefix.lower(), seed)),
    )
    yield "a seed one byte shorter, under a right checksum", sealed(seed[:-1])
    yield "a seed one byte longer, under a right checksum", sealed(seed + b"\0")
    yield "no seed, under a right checksum", sealed(b"")
    yield "a 0 instead of an O", exchange(text, "O", "0")
    yield "a 1 instead of an I", prefix + exchange(tail, "I", "1")
    yield "base32hex", prefix + tail.translate(str.maketrans(BASE32, BASE32HEX))
    yield "a space before the colon", text.replace(":", " :")
    yield "a space within the prefix", text.replace("-IDENTITY", "- IDENTITY")
    yield "spaces instead of the dashes of the prefix", prefix.replace("-", " ") + tail
    yield "the prefix without its dashes", prefix.replace("-", "") + tail
    yield "a dash in front", f"-{text}"
    yield "quotation marks around it", f'"{text}"'
    yield from refused_characters(text, tail)


def refused_characters(text: str, tail: str) -> Iterator[tuple[str, str]]:
    """Make texts with characters that look like, or are raised to, what should stand there."""
    prefix = by_hand.IDENTITY_PREFIX
    yield "an underscore within", f"{text[:40]}_{text[40:]}"
    yield "a zero byte within", f"{text[:40]}\0{text[40:]}"
    yield "a zero byte behind", f"{text}\0"
    for code in range(0x1C, 0x20):
        mark = chr(code)
        yield f"the byte 0x{code:x}, which is no white space, within", text[:40] + mark + text[40:]
        yield f"the byte 0x{code:x}, which is no white space, behind", text + mark
    for what, mark in (
        ("a no-break space", "\u00a0"),
        ("an ideographic space", "\u3000"),
        ("a next line character", "\u0085"),
        ("a zero width space", "\u200b"),
    ):
        yield f"{what} within", text[:40] + mark + text[40:]
        yield f"{what} behind", text + mark
    yield "a byte order mark in front", f"\ufeff{text}"
    yield "an en dash within", f"{text[:40]}\u2013{text[40:]}"
    yield "a long s in the prefix, the upper case of which is S", f"\u017f{text[1:]}"
    yield (
        "a long s behind the prefix, the upper case of which is S",
        prefix + exchange(tail, "S", "\u017f"),
    )
    yield "a dotless i, the upper case of which is I", exchange(text, "I", "\u0131")
    yield "a sharp s, the upper case of which is SS", exchange(text, "SS", "\u00df")
    yield "fullwidth letters", prefix + exchange(tail, "A", "\uff21")
    yield "a fullwidth colon", text.replace(":", "\uff1a")
    yield "a Cyrillic letter", exchange(text, "E", "\u0415")


def identity_files() -> Iterator[tuple[str, str, list[by_hand.Identity]]]:
    one, two = FIRST.identity, SECOND.identity
    yield "a line", f"{one.text}\n", [one]
    yield "a last line without an end", one.text, [one]
    yield (
        "comments and empty lines",
        f"# recipient {one.key_id.hex()}\n#\n\n{one.text}\n\n# end",
        [one],
    )
    yield "lines that end with CR LF", f"# mine\r\n\r\n{one.text}\r\n", [one]
    yield "two keys", f"{one.text}\n{two.text}\n", [one, two]
    yield "two keys in the other order", f"{two.text}\n{one.text}", [two, one]
    yield "LF and CR LF", f"{one.text}\r\n{two.text}\n", [one, two]
    yield "an identity in a comment does not count", f"# {two.text}\n{one.text}\n", [one]
    yield "white space at the ends of lines", f" \t{one.text} \n\t \n  # comment\n\v\f\n", [one]
    yield "as a person typed it", f"{one.text.lower()[:40]} - {one.text.lower()[40:]}\n", [one]
    yield "a CR within a comment ends no line", f"# old:\r{two.text}\n{one.text}\n", [one]
    yield "nor do VT and FF", f"# old:\v{two.text}\f{two.text}\n{one.text}\n", [one]
    yield "nor do 0x1c to 0x1e", f"#\x1c{two.text}\x1d\x1e{two.text}\n{one.text}\n", [one]


def refused_identity_files() -> Iterator[tuple[str, str]]:
    one, two = FIRST.identity, SECOND.identity
    yield "empty", ""
    yield "only line ends", "\n\r\n\n"
    yield "only comments", f"# nothing\n# {one.text}\n"
    yield "a line of something else", f"{one.text}\nhunter2\n"
    yield "a line of something else in front", f"hunter2\n{one.text}\n"
    yield "a recipient", f"{one.recipient_text}\n{one.text}\n"
    yield "a second key with a wrong checksum", f"{one.text}\n{exchange(two.text, 'A', 'B')}\n"
    yield "something in front of the key", f"key: {one.text}\n"
    yield "a comment behind the key", f"{one.text} # mine\n"
    yield "a key in two lines", f"{one.text[:40]}\n{one.text[40:]}\n"
    yield "two keys in one line", f"{one.text} {two.text}\n"
    yield "lines that end with CR alone", f"{one.text}\r{two.text}\r"
    yield "a line that ends with FF", f"{one.text}\f{two.text}\n"
    yield "a line that ends with 0x1e", f"{one.text}\x1e"
    yield "a comment that is not ASCII", f"# caf\u00e9\n{one.text}\n"
    yield "a byte order mark", f"\ufeff{one.text}\n"
    yield "a line separator that is not ASCII", f"{one.text}\u2028{two.text}\n"
    yield "a no-break space at a line's end", f"{one.text}\u00a0\n"
    yield "a long s in the prefix", f"\u017f{one.text[1:]}\n"
    yield "a zero byte", f"{one.text}\n\0"


def key_checks() -> Iterator[Entry]:
    other_vault = draw(COMMON, "other vault id", 16)
    for key, vault_id in (
        (KEY, VAULT),
        (KEY, other_vault),
        (OTHER_KEY, VAULT),
        (Key(OTHER_KEY.key_id, KEY.key), VAULT),
        (Key(bytes(16), bytes(32)), bytes(16)),
        (Key(b"\xff" * 16, b"\xff" * 32), b"\xff" * 16),
    ):
        check = by_hand.key_check(key.key, key.key_id, vault_id)
        yield {
            "key": key.key.hex(),
            "key-id": key.key_id.hex(),
            "vault-id": vault_id.hex(),
            "check": base64.b64encode(check).decode(),
        }


def texts() -> bytes:
    """Return ``texts.json``: the texts of keys, files of them, and key checks."""

    def refused(found: Iterator[tuple[str, str]]) -> list[Entry]:
        return [{"reason": reason, "text": text} for reason, text in found]

    lists: dict[str, list[Entry]] = {
        "recipients": [
            {
                "text": identity.recipient_text,
                "recipient-id": identity.key_id.hex(),
                "public-key-sha256": _sha256(identity.public_key),
            }
            for identity in valid_identities()
        ],
        "refused-recipients": refused(refused_recipients()),
        "identities": [
            {
                "text": identity.text,
                "seed": identity.seed.hex(),
                "recipient": identity.recipient_text,
            }
            for identity in valid_identities()
        ],
        "typed-identities": [
            {"text": text, "canonical": identity.text} for text, identity in typed_identities()
        ],
        "refused-identities": refused(refused_identities()),
        "identity-files": [
            {"comment": comment, "text": text, "seeds": [each.seed.hex() for each in identities]}
            for comment, text, identities in identity_files()
        ],
        "refused-identity-files": refused(refused_identity_files()),
        "key-checks": list(key_checks()),
    }
    return json.dumps(lists, indent=1).encode("ascii") + b"\n"


def main(directory: str) -> None:
    for name, contents in {**vectors(), "texts.json": texts()}.items():
        (Path(directory) / name).write_bytes(contents)


if __name__ == "__main__":
    main(*sys.argv[1:])
