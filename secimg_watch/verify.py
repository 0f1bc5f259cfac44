"""Proof that an object can be read back: the only place where a `Verified` is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secimg_watch import kernel
from secimg_watch.errors import ChangedInHandError, TamperedError
from secimg_watch.hold import refuse_if_changed
from secimg_watch.records import Staged, Verified
from secimg_watch.seal import open_object

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from secimg_watch.records import FileKey, KeySet
    from secimg_watch.slots import Opener


def verify(
    staged: Staged,
    *,
    keys: KeySet,
    vault_id: bytes,
    from_device: bool,
    beat: Callable[[], None],
) -> Verified:
    """Read an object back from disk and compare it with the plaintext in hand, byte for byte.

    The file key is unwrapped from the object's own slot with the stored key, so that what is
    proved is what a later restore needs. Nothing that the sealing left in memory is used.

    For a write-only vault there is no key but the object's own, still in memory. The header's
    MAC then proves that every slot is on disk as it was made; that the recipient's private key
    opens its slot can be proved by whoever has that key, and by nobody else.

    Args:
        staged: the object.
        keys: the keys that the vault is sealed with.
        vault_id: the vault that the object must belong to.
        from_device: drop the object from the page cache first.
        beat: called for each piece, as a sign of life.

    Raises:
        TamperedError: it does not open, or holds other bytes.
        KeyMismatchError: no key at hand opens it.
        ChangedInHandError: the plaintext changed in the meantime.
        OSError: it cannot be read.
    """
    claimed = staged.claimed
    held = claimed.inspected.held
    with open(staged.path, "rb", buffering=0) as stream:
        if from_device:
            kernel.drop_cache(stream.fileno())
        opened = open_object(
            stream, _openers(staged, keys), expect=staged.object_id, vault_id=vault_id
        )
        if opened.meta.size != claimed.identity.size:
            raise TamperedError("the object holds an earlier state of the file in hand")
        opened.preview()  # authenticated only: another decoder run need not make the same one
        _compare(opened.body(), held.fd, beat)
    refuse_if_changed(held, claimed.identity)
    return Verified(staged)


def _openers(staged: Staged, keys: KeySet) -> tuple[Opener | FileKey, ...]:
    if keys.ring:
        return keys.ring
    return () if staged.file_key is None else (staged.file_key,)


def _compare(body: Iterable[memoryview], fd: int, beat: Callable[[], None]) -> None:
    plain = bytearray()
    offset = 0
    for piece in body:
        beat()
        if len(plain) != len(piece):
            plain = bytearray(len(piece))
        # A bytearray compares as memory; two memoryviews would be compared item by item.
        if kernel.read_at(fd, memoryview(plain), offset) != len(piece) or plain != piece:
            raise TamperedError("what was written differs from what is in hand")
        offset += len(piece)
    if kernel.read_at(fd, memoryview(bytearray(1)), offset):
        raise ChangedInHandError("the file grew while it was in hand")
