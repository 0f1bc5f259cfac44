"""Everything that can be done to an object without its keys, on a small one, with no exception.

``python tests/campaigns/tamper_object.py``

Every bit is flipped, every length is cut to, and all sections, chunks and slots are mixed,
moved, repeated and dropped, within one object and between two. Each result is read twice: with
its preview, and with the preview passed over. It has to be refused, and what was released
before has to be whole chunks of the right picture. One thing is harmless by the format: a
preview that is not what it was, where nobody asks for it. The exit code is 1 on anything else.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import random
import struct
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from secimg_watch import container, crypto, recipients, seal
from secimg_watch.container import Meta
from secimg_watch.errors import KeyMismatchError, TamperedError
from secimg_watch.records import KeyEncryptionKey, ObjectId
from secimg_watch.slots import PasswordCache

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from secimg_watch.container import Slot
    from secimg_watch.slots import Lock, Opener

CHUNK: Final = 16_384
SEALED_CHUNK: Final = CHUNK + 16
VAULT: Final = b"v" * 16
OBJECT: Final = ObjectId("0123456789abcdef" * 2)
OTHER_OBJECT: Final = ObjectId("f" * 32)
KEK: Final = KeyEncryptionKey(b"k" * 16, b"K" * 32)
OTHER_KEK: Final = KeyEncryptionKey(b"o" * 16, b"O" * 32)
IDENTITY: Final = recipients.generate_identity()
RECIPIENT: Final = recipients.recipient_of(IDENTITY)

Change: TypeAlias = tuple[str, bytes]
"""What was done, in a few words that many changes share, and what became of the object."""


@dataclass(frozen=True)
class Sample:
    """An object, what opens it, and what is in it."""

    data: bytes
    opener: Opener
    meta: Meta
    preview: bytes
    picture: bytes

    @property
    def sections(self) -> list[bytes]:
        """Core, slots, MAC, META, PREVIEW and BODY."""
        header = container.parse_prefix(self.data)
        core = seal.read_header(io.BytesIO(self.data)).core
        lengths = (56, header - 56 - 32, 32, core.meta_len, core.preview_len)
        ends = [*itertools.accumulate(lengths, initial=0), len(self.data)]
        return [self.data[start:end] for start, end in itertools.pairwise(ends)]

    @property
    def slots(self) -> tuple[Slot, ...]:
        return seal.read_header(io.BytesIO(self.data)).slots


def sample(
    size: int = 300,
    *,
    preview: bytes = b"",
    locks: Sequence[Lock] = (KEK,),
    opener: Opener = KEK,
    object_id: ObjectId = OBJECT,
) -> Sample:
    """Seal a picture of random bytes."""
    picture = crypto.random_bytes(size)
    meta = Meta(
        name=b"IMG_0001.jpg",
        folder=b"2026/11",
        size=size,
        mtime_ns=1_763_900_000_123_456_789,
        mode=0o100640,
        format="JPEG",
        width=40,
        height=30,
        label="image",
        source="/srv/scans",
        proof="lease",
        ingested_ns=1_763_900_002_000_000_000,
        tool="secimg-watch 0.1.0",
    )
    sealed = seal.seal_object(
        object_id=object_id,
        vault_id=VAULT,
        locks=locks,
        meta=meta,
        preview=preview,
        read=io.BytesIO(picture).readinto,
    )
    return Sample(b"".join(map(bytes, sealed.chunks())), opener, meta, preview, picture)


def rekeyed(old: Sample, locks: Sequence[Lock], opener: Opener) -> Sample:
    """Put other slots before the same sections, as a change of keys does."""
    header = seal.read_header(io.BytesIO(old.data))
    passwords = PasswordCache()
    file_key = seal.open_header(header, [old.opener], passwords)
    new = seal.build_header(header.core, locks, file_key, passwords).pack()
    return dataclasses.replace(old, data=new + old.data[len(header.pack()) :], opener=opener)


# --- changes -----------------------------------------------------------------------------------


def flips(data: bytes) -> Iterator[Change]:
    for offset, bit in itertools.product(range(len(data)), range(8)):
        changed = bytearray(data)
        changed[offset] ^= 1 << bit
        yield "every bit flipped", bytes(changed)


def cuts(data: bytes) -> Iterator[Change]:
    for length in range(len(data)):
        yield "cut to every length", data[:length]


def extensions(data: bytes, other: bytes) -> Iterator[Change]:
    rng = random.Random(1)
    for more in range(1, 80):
        for tail in (bytes(more), rng.randbytes(more), data[-more:]):
            yield "extended", data + tail
    for tail in (bytes(SEALED_CHUNK), data, other):
        yield "extended", data + tail


def moves(sections: list[bytes]) -> Iterator[Change]:
    """Reorder, drop and repeat the sections of one object."""
    for order in itertools.permutations(sections):
        yield "sections reordered", b"".join(order)
    places = range(len(sections))
    for count in range(1, len(sections)):
        for dropped in itertools.combinations(places, count):
            kept = [sections[at] for at in places if at not in dropped]
            yield "sections dropped", b"".join(kept)
    for source, target in itertools.product(places, range(len(sections) + 1)):
        more = [*sections[:target], sections[source], *sections[target:]]
        yield "sections repeated", b"".join(more)
    for source, target in itertools.permutations(places, 2):
        replaced = [*sections[:target], sections[source], *sections[target + 1 :]]
        yield "sections repeated", b"".join(replaced)


def mixtures(first: list[bytes], second: list[bytes], what: str) -> Iterator[Change]:
    for picks in itertools.product((0, 1), repeat=len(first)):
        pairs = zip(picks, zip(first, second, strict=True), strict=True)
        yield f"mixed: {what}", b"".join(pair[pick] for pick, pair in pairs)
    for at, cut in itertools.product(range(len(first)), (1, 16, 56)):
        left, right = first[at], second[at]
        spliced = left[:cut] + right[cut:]
        yield f"spliced: {what}", b"".join([*first[:at], spliced, *first[at + 1 :]])


def chunks(body: bytes) -> list[bytes]:
    starts = range(56, len(body), SEALED_CHUNK)
    return [body[:56], *(body[start : start + SEALED_CHUNK] for start in starts)]


def chunk_changes(first: Sample, second: Sample) -> Iterator[Change]:
    """Reorder, drop, repeat and exchange the chunks of BODY, the salt and the commitment."""
    *head, body = first.sections
    front, (own, foreign) = b"".join(head), (chunks(body), chunks(second.sections[-1]))
    for order in itertools.permutations(own):
        yield "chunks reordered", front + b"".join(order)
    places = range(len(own))
    for count in range(1, len(own)):
        for dropped in itertools.combinations(places, count):
            kept = [own[at] for at in places if at not in dropped]
            yield "chunks dropped", front + b"".join(kept)
    for source, target in itertools.product(places, range(len(own) + 1)):
        yield "chunks repeated", front + b"".join([*own[:target], own[source], *own[target:]])
    for source, target in itertools.permutations(places, 2):
        replaced = [*own[:target], own[source], *own[target + 1 :]]
        yield "chunks repeated", front + b"".join(replaced)
    for picks in itertools.product((0, 1), repeat=len(own)):
        pairs = zip(picks, zip(own, foreign, strict=True), strict=True)
        yield "chunks of two objects", front + b"".join(pair[pick] for pick, pair in pairs)
    for at, beside in itertools.product(itertools.accumulate(map(len, own)), (-16, -1, 0, 1, 16)):
        yield "cut beside a chunk's end", (front + body)[: len(front) + at + beside]


def slot_changes(first: Sample, second: Sample) -> Iterator[Change]:
    """Reorder, drop, repeat, add and exchange slots, with their number and length made right."""
    mac_and_rest = first.data[container.parse_prefix(first.data) - 32 :]
    own, foreign = ([slot.pack() for slot in each.slots] for each in (first, second))
    areas = [list(order) for order in itertools.permutations(own)]
    areas += [list(few) for few in itertools.combinations(own, len(own) - 1)]
    areas += [[one] for one in own]
    areas += [[*own, one] for one in (*own, *foreign)]
    areas += [[one, *own] for one in (*own, *foreign)]
    for picks in itertools.product((0, 1), repeat=len(own)):
        pairs = zip(picks, zip(own, foreign, strict=True), strict=True)
        areas.append([pair[pick] for pick, pair in pairs])
    for area in areas:
        joined = b"".join(area)
        head = struct.pack(">BBH", len(area), 0, len(joined))
        yield "slots changed", first.data[:56] + head + joined + mac_and_rest


# --- reading -----------------------------------------------------------------------------------


@dataclass
class Row:
    """What came of one kind of change. ``wrong`` should stay 0."""

    tried: int = 0
    refused: int = 0
    harmless: int = 0
    wrong: int = 0


Table: TypeAlias = dict[tuple[str, str], Row]


def verdict(data: bytes, genuine: Sequence[Sample], *, ask_preview: bool) -> str:
    """Read what became of an object, and compare with the genuine ones of the same keys."""
    released = bytearray()
    openers = [each.opener for each in genuine]
    try:
        opened = seal.open_object(io.BytesIO(data), openers)
        if ask_preview:
            opened.preview()
        for piece in opened.body():
            released += piece
    except (TamperedError, KeyMismatchError):
        # Only the last chunk is short, and it comes out only when all is well.
        right = any(each.picture.startswith(released) for each in genuine)
        return "refused" if right and len(released) % CHUNK == 0 else "wrong"
    if ask_preview:
        return "wrong"
    for each in genuine:
        same = opened.meta == each.meta and released == each.picture
        if same and without_preview(data, each) == without_preview(each.data, each):
            return "harmless"
    return "wrong"


def without_preview(data: bytes, genuine: Sample) -> tuple[int, bytes]:
    """What has to be the same where the preview alone was changed."""
    *front, preview, _body = map(len, genuine.sections)
    start = sum(front)
    return len(data), data[:start] + data[start + preview :]


def try_all(table: Table, title: str, changes: Iterator[Change], genuine: Sequence[Sample]) -> None:
    """Read every change in both ways; what is no change at all does not count."""
    originals = {each.data for each in genuine}
    for what, data in changes:
        if data in originals:
            continue
        for ask_preview in (True, False):
            row = table.setdefault((title, what), Row())
            row.tried += 1
            outcome = verdict(data, genuine, ask_preview=ask_preview)
            setattr(row, outcome, getattr(row, outcome) + 1)


def whole_object(table: Table, title: str, one: Sample) -> None:
    other = sample(locks=[KEK], object_id=OTHER_OBJECT)
    for changes in (flips(one.data), cuts(one.data), extensions(one.data, other.data)):
        try_all(table, title, changes, [one])
    try_all(table, title, moves(one.sections), [one])


def two_objects(table: Table, title: str, lock: Lock, opener: Opener, preview: bytes) -> None:
    """Mix two objects of the same key, in every relation that two objects can have."""
    first = sample(preview=preview, locks=[lock], opener=opener)
    small = preview and b"q"

    def another(size: int, preview: bytes, object_id: ObjectId) -> Sample:
        return sample(size, preview=preview, locks=[lock], opener=opener, object_id=object_id)

    for what, second in (
        ("the same key", another(417, small, OTHER_OBJECT)),
        ("the same key and lengths", another(300, preview[::-1], OTHER_OBJECT)),
        ("encrypted anew under the same core", another(300, preview, OBJECT)),
    ):
        mixed = mixtures(first.sections, second.sections, what)
        try_all(table, title, mixed, [first, second])
    other_keys = rekeyed(first, [OTHER_KEK, lock], opener)
    mixed = mixtures(first.sections, other_keys.sections, "other slots, the same file key")
    try_all(table, title, mixed, [first, other_keys])


def chunks_and_slots(table: Table) -> None:
    """Change an object of three chunks, and one of three slots."""
    size = 2 * CHUNK + 7_232
    first, second = sample(size), sample(size)
    try_all(table, "picture of 3 chunks", chunk_changes(first, second), [first, second])
    locks: list[Lock] = [KEK, OTHER_KEK, RECIPIENT]
    for opener in (KEK, OTHER_KEK, IDENTITY):
        first, second = (sample(locks=locks, opener=opener) for _ in "12")
        try_all(table, "object of 3 slots", slot_changes(first, second), [first, second])


KINDS: Final[tuple[tuple[str, Lock, Opener], ...]] = (
    ("key", KEK, KEK),
    ("recipient", RECIPIENT, IDENTITY),
)


def campaign() -> Table:
    table: Table = {}
    for (kind, lock, opener), preview in itertools.product(KINDS, (b"", b"preview")):
        title = f"{kind}, {'with' if preview else 'no'} preview"
        whole_object(table, title, sample(preview=preview, locks=[lock], opener=opener))
        two_objects(table, title, lock, opener, preview)
    chunks_and_slots(table)
    return table


def report(table: Table) -> str:
    line = "{:<25} {:<45} {:>7} {:>8} {:>9} {:>6}\n"
    lines = [line.format("object", "change", "tried", "refused", "harmless", "wrong")]
    for (title, what), row in table.items():
        lines.append(line.format(title, what, row.tried, row.refused, row.harmless, row.wrong))
    rows = table.values()
    sums = [sum(getattr(row, name) for row in rows) for name in Row.__dataclass_fields__]
    return "".join([*lines, line.format("all", "", *sums)])


def main() -> int:
    started = time.monotonic()
    table = campaign()
    sys.stdout.write(report(table))
    sys.stdout.write(
        "harmless: PREVIEW alone is not what it was, and it was passed over unread\n"
        f"{time.monotonic() - started:.0f} s\n"
    )
    return 1 if any(row.wrong for row in table.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
