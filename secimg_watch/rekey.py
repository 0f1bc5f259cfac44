"""Other keys for the objects of a vault: new slots before the same content, or all of it anew.

An object is replaced as a whole, atomically, and only after what replaces it was synced, read
back and opened: whenever the process dies, every object is there and opens with the old keys or
with the new ones. New slots given twice change nothing more; a finished re-encryption is begun
anew by the next one.
"""

from __future__ import annotations

import os
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from secimg_watch import crypto, kernel
from secimg_watch.container import KeyringSlot, PasswordSlot, RecipientSlot
from secimg_watch.errors import (
    NoInputError,
    NotReadyError,
    SecimgError,
    StorageError,
    TamperedError,
)
from secimg_watch.gate import check_keys
from secimg_watch.records import FileKey, KeySet, ObjectId
from secimg_watch.seal import (
    build_header,
    check_ids,
    open_header,
    open_object,
    read_header,
    seal_packed,
)
from secimg_watch.slots import PasswordCache
from secimg_watch.vault import write_pieces

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from io import FileIO
    from pathlib import Path

    from secimg_watch.container import Header, Slot
    from secimg_watch.seal import OpenedObject
    from secimg_watch.slots import Lock, Opener
    from secimg_watch.vault import Vault

_COMPARED = 1 << 20  # bytes of two files that are compared at a time


@dataclass(slots=True)
class Census:
    """How many objects have a slot for which key.

    ``slots`` counts by kind (``key``, ``recipient``, ``password``) and key id; objects whose
    header cannot be read are in ``unreadable``.
    """

    objects: int = 0
    slots: Counter[tuple[str, bytes]] = field(default_factory=Counter)
    unreadable: dict[ObjectId, SecimgError] = field(default_factory=dict)


def take_census(vault: Vault) -> Census:
    """Read every header of a vault. No key is needed, and nothing is authenticated."""
    census = Census()
    for object_id in vault.object_ids():
        try:
            header = _header(vault, object_id)
        except SecimgError as error:
            census.unreadable[object_id] = error
            continue
        census.objects += 1
        census.slots.update((_kind(slot), slot.key_id) for slot in header.slots)
    return census


def _kind(slot: Slot) -> str:
    match slot:
        case KeyringSlot():
            return "key"
        case RecipientSlot():
            return "recipient"
        case _:
            return "password"


def _header(vault: Vault, object_id: ObjectId) -> Header:
    with _opened(vault, object_id) as stream:
        return read_header(stream)


@contextmanager
def _opened(vault: Vault, object_id: ObjectId) -> Iterator[FileIO]:
    try:
        with open(vault.object_path(object_id), "rb", buffering=0) as stream:
            yield stream
    except FileNotFoundError:
        raise NoInputError(f"there is no object {object_id}") from None
    except OSError as error:
        raise StorageError(f"object {object_id} failed: {error.strerror}") from error


class Rekeyer:
    """Brings objects of one vault to the keys that they shall have; see `Vault.replacing`."""

    def __init__(self, vault: Vault, keys: KeySet, openers: Sequence[Opener] = ()) -> None:
        """Check the keys against the vault.

        Args:
            vault: the vault.
            keys: what every object shall have a slot for, and former keys that open.
            openers: what opens objects besides, such as a recipient's private key.

        Raises:
            NoInputError: there is no vault.
            KeyMismatchError: the vault does not know the current key.
        """
        self._vault = vault
        self._keys = keys
        self._openers = (*keys.ring, *openers)
        self._vault_id = check_keys(vault, keys.ring).vault_id
        self._passwords = PasswordCache()

    def mac(self, object_id: ObjectId) -> bytes:
        """The MAC of an object's header, which no two headers share. Not authenticated.

        Raises:
            TamperedError, StorageError: its header cannot be read.
        """
        return _header(self._vault, object_id).mac

    def is_due(self, object_id: ObjectId) -> bool:
        """Whether the object's slots are not those that it shall have.

        Raises:
            TamperedError, StorageError: its header cannot be read.
        """
        header = _header(self._vault, object_id)
        return bool(self._missing(header)) or len(self._kept(header)) < len(header.slots)

    def _wanted(self) -> set[tuple[str, bytes]]:
        current = {("key", key.key_id) for key in self._keys.ring[:1]}
        return current | {("recipient", each.key_id) for each in self._keys.recipients}

    def _kept(self, header: Header) -> list[Slot]:
        # A password's slot is nobody's but the owner's to remove.
        wanted = self._wanted()
        return [
            slot
            for slot in header.slots
            if isinstance(slot, PasswordSlot) or (_kind(slot), slot.key_id) in wanted
        ]

    def _missing(self, header: Header) -> list[Lock]:
        present = {(_kind(slot), slot.key_id) for slot in header.slots}
        current = [key for key in self._keys.ring[:1] if ("key", key.key_id) not in present]
        others = [r for r in self._keys.recipients if ("recipient", r.key_id) not in present]
        return [*current, *others]

    def rekey(self, object_id: ObjectId) -> bool:
        """Give an object the slots that it shall have; false where it has them already.

        The sealed sections are copied as they are, damage included, and compared.

        Raises:
            KeyMismatchError: nothing at hand opens it.
            TamperedError: its header does not authenticate.
            DiskFullError: there is too little space for a second copy of it.
            StorageError: the system failed a call.
        """
        with _opened(self._vault, object_id) as stream:
            header = read_header(stream)
            kept, missing = self._kept(header), self._missing(header)
            if not missing and len(kept) == len(header.slots):
                return False
            check_ids(header.core, object_id, self._vault_id)
            file_key = open_header(header, self._openers, self._passwords)
            new = build_header(header.core, missing, file_key, self._passwords, kept=kept)
            start = len(header.pack())

            def write(fd: int) -> None:
                write_pieces(fd, [memoryview(new.pack())])
                kernel.copy_from(stream.fileno(), start, fd)

            def check(path: Path) -> None:
                self._check_rekeyed(path, new, file_key, stream, start)

            size = os.fstat(stream.fileno()).st_size + len(new.pack()) - start
            self._vault.replace(object_id, size, write, check)
            return True

    def _check_rekeyed(
        self, path: Path, header: Header, file_key: bytes, old: FileIO, start: int
    ) -> None:
        with open(path, "rb", buffering=0) as stream:
            kernel.drop_cache(stream.fileno())
            read = read_header(stream)
            opens = open_header(read, self._proof(FileKey(file_key)), self._passwords)
            if read != header or opens != file_key:
                raise TamperedError("the new header is not the one that was written")
            _compare_rest(old.fileno(), start, stream.fileno(), len(header.pack()))

    def _proof(self, file_key: FileKey) -> Sequence[Opener | FileKey]:
        """What a new object has to open with: the current key, or in a write-only vault its own."""
        return self._keys.ring[:1] or (file_key,)

    def reencrypt(self, object_id: ObjectId) -> None:
        """Seal an object's content anew, under the same object id and a fresh file key.

        The old object goes only after the new one was read back and compared with it, byte for
        byte. Slots of passwords are not taken over: their passwords are not known.

        Raises:
            KeyMismatchError: nothing at hand opens it.
            TamperedError: it does not authenticate; it stays as it is.
            DiskFullError: there is too little space for a second copy of it.
            StorageError: the system failed a call.
        """
        with _opened(self._vault, object_id) as stream:
            old = self._open(stream, object_id, self._openers)
            preview = old.preview()
            sealed = seal_packed(
                object_id=object_id,
                vault_id=self._vault_id,
                locks=self._keys.locks,
                packed_meta=old.packed_meta,
                size=old.meta.size,
                preview=preview,
                read=_filler(old.body()),
            )
            self._vault.replace(
                object_id,
                sealed.size,
                lambda fd: write_pieces(fd, sealed.chunks()),
                lambda path: self._check_reencrypted(path, object_id, sealed.file_key),
            )

    def _open(
        self, stream: FileIO, object_id: ObjectId, openers: Sequence[Opener | FileKey]
    ) -> OpenedObject:
        return open_object(
            stream, openers, expect=object_id, vault_id=self._vault_id, passwords=self._passwords
        )

    def _check_reencrypted(self, path: Path, object_id: ObjectId, file_key: FileKey) -> None:
        with (
            _opened(self._vault, object_id) as old_stream,
            open(path, "rb", buffering=0) as new_stream,
        ):
            kernel.drop_cache(new_stream.fileno())
            old = self._open(old_stream, object_id, self._openers)
            new = self._open(new_stream, object_id, self._proof(file_key))
            same = old.packed_meta == new.packed_meta and old.preview() == new.preview()
            # Both bodies have the same length, so they come in the same pieces.
            pairs = zip(old.body(), new.body(), strict=True)
            if not same or any(bytes(one) != bytes(other) for one, other in pairs):
                raise TamperedError("what was written differs from the object it was read from")


def _filler(pieces: Iterator[memoryview]) -> Callable[[memoryview], int]:
    """A function that fills one buffer after another from pieces of any length."""
    left = memoryview(b"")

    def read(buffer: memoryview) -> int:
        nonlocal left
        filled = 0
        while filled < len(buffer):
            if not left:
                left = next(pieces, memoryview(b""))
                if not left:
                    break
            part = left[: len(buffer) - filled]
            buffer[filled : filled + len(part)] = part
            filled, left = filled + len(part), left[len(part) :]
        return filled

    return read


def _compare_rest(one: int, one_start: int, other: int, other_start: int) -> None:
    first, second = bytearray(_COMPARED), bytearray(_COMPARED)
    while True:
        count = kernel.read_at(one, memoryview(first), one_start)
        also = kernel.read_at(other, memoryview(second), other_start)
        if count != also or first[:count] != second[:count]:
            raise TamperedError("the sealed content was not copied as it was")
        if not count:
            return
        one_start, other_start = one_start + count, other_start + count


class Journal:
    """The objects that an unfinished run of re-encryption has done, for the next run to pass over.

    It counts only for a run to the same keys: a leak that follows another one is another run. With
    each object stands its new header's MAC, so that one that came back from a backup since is not
    passed over. A line that is lost, or cut by a crash, costs no more than doing its object once
    more.
    """

    def __init__(self, vault: Vault, keys: KeySet) -> None:
        """Read what an earlier run to these keys has left. The vault is in `Vault.replacing`."""
        ids = sorted(lock.key_id for lock in keys.locks)
        target = crypto.sha256(b"".join(ids)).hex()[:32]
        self._path = vault.path / "rekey" / f"reencrypted.{target}"
        for other in set(self._path.parent.glob("reencrypted.*")) - {self._path}:
            other.unlink()
        text = self._path.read_text("ascii", "replace") if self._path.exists() else ""
        self._done = set(text.split("\n"))
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> Self:
        """Give itself."""
        return self

    def __exit__(self, *_exception: object) -> None:
        """Close the file."""
        self._file.close()

    def has(self, object_id: ObjectId, mac: bytes) -> bool:
        """Whether an object with that header was done by an earlier run."""
        return _line(object_id, mac) in self._done

    def add(self, object_id: ObjectId, mac: bytes) -> None:
        """Note that an object is done.

        Raises:
            NotReadyError: the system failed that, or there is no space.
        """
        try:
            # The first line end is for a line that was cut, which must not spoil this one.
            self._file.write(f"\n{_line(object_id, mac)}\n".encode("ascii"))
        except OSError as error:
            raise NotReadyError(f"{self._path} cannot be written: {error.strerror}") from error

    def finish(self) -> None:
        """Note that every object is done: the next run is a new one."""
        self._path.unlink()


def _line(object_id: ObjectId, mac: bytes) -> str:
    return f"{object_id} {mac.hex()}"
