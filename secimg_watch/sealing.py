"""From a claimed file to a sealed object: what is recorded about it, and under which key."""

from __future__ import annotations

import os
import stat
import time
from typing import TYPE_CHECKING

from secimg_watch import __version__, kernel
from secimg_watch.container import Meta
from secimg_watch.records import Claimed, Sealed
from secimg_watch.seal import seal_object

if TYPE_CHECKING:
    from collections.abc import Callable

    from secimg_watch.records import KeySet


def seal(claimed: Claimed, *, keys: KeySet, vault_id: bytes, beat: Callable[[], None]) -> Sealed:
    """Seal a claimed file under a fresh file key, wrapped for everything that ``keys`` locks with.

    Nothing is read before the object's chunks are asked for; they raise ``ChangedInHandError``
    where the file turns out longer or shorter than it was. ``beat`` is called for each piece.
    """
    job = claimed.inspected.held.job
    inspection = claimed.inspected.inspection
    sealed = seal_object(
        object_id=job.object_id,
        vault_id=vault_id,
        locks=keys.locks,
        meta=describe(claimed),
        preview=inspection.preview,
        read=reader(claimed.inspected.held.fd, beat),
    )
    return Sealed(claimed, sealed.object_id, sealed.size, sealed.chunks, sealed.file_key)


def describe(claimed: Claimed) -> Meta:
    """The metadata that is sealed beside a picture."""
    held = claimed.inspected.held
    inspection = claimed.inspected.inspection
    folder, _, name = held.job.relpath.rpartition("/")
    return Meta(
        name=os.fsencode(name),
        folder=os.fsencode(folder),
        size=claimed.identity.size,
        mtime_ns=claimed.identity.mtime_ns,
        mode=stat.S_IMODE(held.mode),
        format=inspection.format,
        width=inspection.width,
        height=inspection.height,
        label=inspection.label,
        source=held.job.folder,
        proof=held.job.proof,
        ingested_ns=time.time_ns(),
        tool=f"secimg-watch {__version__}",
    )


def reader(fd: int, beat: Callable[[], None] = lambda: None) -> Callable[[memoryview], int]:
    """A function that fills one buffer after another from a file, and says how far it got."""
    offset = 0

    def read(buffer: memoryview) -> int:
        nonlocal offset
        beat()
        count = kernel.read_at(fd, buffer, offset)
        offset += count
        return count

    return read
