"""Reading a vault: listing, finding, checking and restoring objects. Nothing is changed here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from secimg_watch.errors import NoInputError, SecimgError, StorageError, UsageError
from secimg_watch.gate import check_keys
from secimg_watch.records import KeyEncryptionKey
from secimg_watch.seal import open_object

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from secimg_watch.container import Meta
    from secimg_watch.records import ObjectId
    from secimg_watch.restore import Destination
    from secimg_watch.seal import OpenedObject
    from secimg_watch.slots import Opener
    from secimg_watch.vault import Vault

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of a vault: its metadata, or the error that says why there is none."""

    object_id: ObjectId
    meta: Meta | None
    error: SecimgError | None


class Catalog:
    """A vault and what opens it. Only `ids` works without a key."""

    def __init__(self, vault: Vault, openers: Sequence[Opener]) -> None:
        """Check the key-encryption keys, the current one first, against the vault.

        With private keys alone the vault's file may be missing: what is sealed to a recipient
        comes back from the objects and nothing else.

        Raises:
            NoInputError: there is no vault.
            KeyMismatchError: the vault does not know this key.
        """
        self._vault = vault
        self._openers = openers
        ring = [each for each in openers if isinstance(each, KeyEncryptionKey)]
        self._vault_id: bytes | None = None
        if ring or vault.exists():
            self._vault_id = check_keys(vault, ring).vault_id

    def ids(self) -> list[ObjectId]:
        """The ids of all objects, in order."""
        return self._vault.object_ids()

    def entries(self) -> Iterator[Entry]:
        """Every object's metadata, in the order of their ids, without touching the pictures."""
        for object_id in self.ids():
            try:
                yield Entry(object_id, self.meta(object_id), None)
            except SecimgError as error:
                yield Entry(object_id, None, error)

    def meta(self, object_id: ObjectId) -> Meta:
        """One object's metadata.

        Raises:
            NoInputError: there is no such object.
            TamperedError: it does not authenticate.
        """
        return self._open(object_id, lambda opened: opened.meta)

    def preview(self, object_id: ObjectId) -> bytes:
        """One object's preview, an encoded image; empty where it has none."""
        return self._open(object_id, lambda opened: opened.preview())

    def verify(self, object_id: ObjectId, beat: Callable[[int], None] = lambda _n: None) -> int:
        """Read and authenticate a whole object; the picture's size in bytes.

        ``beat`` is called with the number of bytes of each piece.
        """

        def read(opened: OpenedObject) -> int:
            opened.preview()
            for piece in opened.body():
                beat(len(piece))
            return opened.meta.size

        return self._open(object_id, read)

    def restore(
        self,
        object_id: ObjectId,
        destination: Destination,
        *,
        folder: bytes | None,
        name: bytes | None,
    ) -> str:
        """Write one object's picture below ``destination``; the relative path it got.

        ``folder`` and ``name`` replace the recorded ones where they are given.

        Raises:
            CannotCreateError: the target exists or is not safe.
            TamperedError: the object does not authenticate; nothing of it was left behind.
        """

        def write(opened: OpenedObject) -> str:
            meta = opened.meta
            into = meta.folder if folder is None else folder
            called = meta.name if name is None else name
            with destination.place(into, called) as file:
                for piece in opened.body():
                    file.write(piece)
                file.commit(mode=meta.mode, mtime_ns=meta.mtime_ns)
            return os.fsdecode(os.path.join(into, called))

        return self._open(object_id, write)

    def _open(self, object_id: ObjectId, use: Callable[[OpenedObject], T]) -> T:
        path = self._vault.object_path(object_id)
        try:
            with open(path, "rb", buffering=0) as stream:
                return use(
                    open_object(stream, self._openers, expect=object_id, vault_id=self._vault_id)
                )
        except FileNotFoundError:
            raise NoInputError(f"there is no object {object_id}") from None
        except OSError as error:
            message = f"object {object_id} cannot be read: {error.strerror}"
            raise StorageError(message) from error

    def find(self, prefix: str) -> ObjectId:
        """The one object whose id begins with ``prefix``.

        Raises:
            NoInputError: there is none.
            UsageError: there are several.
        """
        found = [object_id for object_id in self.ids() if object_id.startswith(prefix.lower())]
        if not found:
            raise NoInputError(f"there is no object {prefix} in vault {self._vault.path}")
        if len(found) > 1:
            raise UsageError(f"{len(found)} objects begin with {prefix}", hint="give more digits")
        return found[0]

    def sealed_as(self, folder: str, relpath: str) -> ObjectId | None:
        """The newest object that was sealed from a watched folder under this relative path."""
        wanted = os.fsencode(relpath)
        newest: tuple[int, ObjectId] | None = None
        for entry in self.entries():
            meta = entry.meta
            if meta is None or meta.source != folder or _path_of(meta) != wanted:
                continue
            if newest is None or meta.ingested_ns > newest[0]:
                newest = (meta.ingested_ns, entry.object_id)
        return newest[1] if newest else None


def _path_of(meta: Meta) -> bytes:
    return os.path.join(meta.folder, meta.name)


def collision_name(name: bytes, object_id: ObjectId) -> bytes:
    """Another name for a second picture of the same name: eight digits of its id are put in."""
    stem, suffix = os.path.splitext(name)
    tag = f"~{object_id[:8]}".encode()
    return stem[: 255 - len(tag) - len(suffix)] + tag + suffix
