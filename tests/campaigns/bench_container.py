"""What the container costs beside the bare encryption in it.

``python tests/campaigns/bench_container.py [--rounds N] [--without-largest]``

Sealing and opening, from memory and to nowhere, in turns with the library's own encryptor or
decryptor over as many bytes, which are read from the same stream in pieces of 64 KiB into one
buffer, with no header, no metadata and nobody to hand the pieces to. A ratio of 1 would be as
fast as that; 0.8 is the least that is wanted from 5 MB on. Small pictures pay for the header,
which costs the same for all of them.
"""

from __future__ import annotations

import argparse
import functools
import gc
import io
import statistics
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cryptography.cobblestone import Cobblestone256Decryptor, Cobblestone256Encryptor

from secimg_watch import crypto, seal
from secimg_watch.container import Meta
from secimg_watch.records import KeyEncryptionKey, ObjectId

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PIECE: Final = 65_536
WINDOW: Final = 16 * PIECE
"""Sealed bytes that are made at a time, while no time counts, where an object is opened."""

LARGEST: Final = 1_000_000_000
SIZES: Final = {"40 KB": 40_000, "400 KB": 400_000, "5 MB": 5_000_000, "1 GB": LARGEST}
TARGET: Final = 0.8
TARGET_FROM: Final = 5_000_000
ENOUGH: Final = 0.1
"""Seconds that one measurement takes at least; short things are repeated for it."""

OBJECT: Final = ObjectId("0123456789abcdef" * 2)
KEK: Final = KeyEncryptionKey(b"k" * 16, b"K" * 32)
KEY: Final = b"K" * 32
CONTEXT: Final = b"c" * 77
PIXELS: Final = crypto.random_bytes(PIECE)
ROOM: Final = bytearray(WINDOW + crypto.encryption_room(seal.PIECE))
IN_HAND: Final = memoryview(bytearray(PIECE))
BARE_BUFFER: Final = bytearray(crypto.encryption_room(PIECE) + crypto.decryption_room(PIECE))


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


class Pixels:
    """A picture of any size out of one small buffer."""

    def __init__(self, size: int) -> None:
        self._left = size

    def readinto(self, buffer: memoryview) -> int:
        count = min(len(buffer), self._left, PIECE)
        buffer[:count] = memoryview(PIXELS)[:count]
        self._left -= count
        return count


@functools.cache
def picture(size: int) -> bytes:
    return crypto.random_bytes(size)


def source(size: int) -> Callable[[memoryview], int]:
    """Read from memory, of which the largest picture takes no more than a piece."""
    return Pixels(size).readinto if size == LARGEST else io.BytesIO(picture(size)).readinto


def sealed_object(size: int) -> seal.SealedObject:
    return seal.seal_object(
        object_id=OBJECT,
        vault_id=bytes(16),
        locks=[KEK],
        meta=meta_for(size),
        preview=b"",
        read=source(size),
    )


def seal_container(size: int) -> float:
    start = time.perf_counter()
    for _piece in sealed_object(size).chunks():
        pass
    return time.perf_counter() - start


def seal_bare(size: int) -> float:
    read = source(size)
    start = time.perf_counter()
    encryptor = Cobblestone256Encryptor(KEY, CONTEXT)
    while count := read(IN_HAND):
        encryptor.update_into(IN_HAND[:count], BARE_BUFFER)
    encryptor.finalize()
    return time.perf_counter() - start


class Sealed:
    """A stream of sealed bytes, of which a window is made ahead while no time counts."""

    def __init__(self, pieces: Iterator[memoryview]) -> None:
        self._pieces = pieces
        self._window = memoryview(b"")
        self.making = 0.0

    def look(self) -> memoryview:
        """Return what is there; nothing at the end."""
        if not self._window:
            start = time.perf_counter()
            made = 0
            for piece in self._pieces:
                ROOM[made : made + len(piece)] = piece
                made += len(piece)
                if made >= WINDOW:
                    break
            self._window = memoryview(ROOM)[:made]
            self.making += time.perf_counter() - start
        return self._window

    def skip(self, count: int) -> None:
        self._window = self._window[count:]

    def readinto(self, buffer: memoryview) -> int:
        window = self.look()
        count = min(len(buffer), len(window))
        buffer[:count] = window[:count]
        self.skip(count)
        return count


@functools.cache
def sealed_bytes(size: int) -> bytes:
    return b"".join(map(bytes, sealed_object(size).chunks()))


@functools.cache
def bare_bytes(size: int) -> bytes:
    return crypto.seal_message(KEY, CONTEXT, picture(size))


def open_container(size: int) -> float:
    if size == LARGEST:
        return _open_largest(size)
    stream = io.BytesIO(sealed_bytes(size))
    start = time.perf_counter()
    for _piece in seal.open_object(stream, [KEK], expect=OBJECT).body():
        pass
    return time.perf_counter() - start


def _open_largest(size: int) -> float:
    stream = Sealed(sealed_object(size).chunks())
    start = time.perf_counter()
    for _piece in seal.open_object(stream, [KEK], expect=OBJECT).body():
        pass
    return time.perf_counter() - start - stream.making


def open_bare(size: int) -> float:
    if size == LARGEST:
        stream = Sealed(bare_message(size))
        return _open_bare(stream.readinto) - stream.making
    return _open_bare(io.BytesIO(bare_bytes(size)).readinto)


def _open_bare(read: Callable[[memoryview], int]) -> float:
    start = time.perf_counter()
    decryptor = Cobblestone256Decryptor(KEY, CONTEXT)
    while count := read(IN_HAND):
        decryptor.update_into(IN_HAND[:count], BARE_BUFFER)
    decryptor.finalize()
    return time.perf_counter() - start


def bare_message(size: int) -> Iterator[memoryview]:
    """Make the same number of sealed bytes, with no header before them."""
    encryptor = Cobblestone256Encryptor(KEY, CONTEXT)
    buffer = bytearray(crypto.encryption_room(PIECE))
    read = source(size)
    while count := read(IN_HAND):
        yield memoryview(buffer)[: encryptor.update_into(IN_HAND[:count], buffer)]
    yield memoryview(encryptor.finalize())


@dataclass(frozen=True)
class Result:
    """Ratios of every round, and the speeds of the median round in MB/s."""

    ratios: list[float]
    container: float
    bare: float


def quickest(run: Callable[[int], float], size: int) -> float:
    """Return the seconds of the least disturbed time, out of as many as a measurement needs."""
    times: list[float] = []
    while sum(times) < ENOUGH:
        times.append(run(size))
    return min(times)


def compare(
    container: Callable[[int], float], bare: Callable[[int], float], size: int, rounds: int
) -> Result:
    """Measure both in turns, so that both meet the same disturbances."""
    container(min(size, TARGET_FROM))  # whatever is slow only once
    bare(min(size, TARGET_FROM))
    gc.collect()
    pairs = [(quickest(container, size), quickest(bare, size)) for _ in range(rounds)]
    speeds = [size / statistics.median(times) / 1e6 for times in zip(*pairs, strict=True)]
    return Result([theirs / ours for ours, theirs in pairs], *speeds)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--without-largest", action="store_true", help="leave out 1 GB")
    given = parser.parse_args()
    missed = False
    line = "{:<6} {:>7} {:>7} {:>7} {:>7} {:>7} {:>15} {:>11}\n"
    head = ("", "size", "rounds", "min", "median", "max", "container MB/s", "bare MB/s")
    sys.stdout.write(line.format(*head))
    for what, container, bare in (
        ("seal", seal_container, seal_bare),
        ("open", open_container, open_bare),
    ):
        for name, size in SIZES.items():
            if size == LARGEST and given.without_largest:
                continue
            result = compare(container, bare, size, given.rounds)
            middle = statistics.median(result.ratios)
            missed |= size >= TARGET_FROM and middle < TARGET
            figures = [f"{each:.3f}" for each in (min(result.ratios), middle, max(result.ratios))]
            speeds = [f"{result.container:.0f}", f"{result.bare:.0f}"]
            sys.stdout.write(line.format(what, name, given.rounds, *figures, *speeds))
            sys.stdout.flush()
    sys.stdout.write(f"the median has to be {TARGET} at least from {TARGET_FROM} bytes on\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
