"""Sealing a picture into an object, and opening an object, piece by piece.

META, PREVIEW and BODY are one Cobblestone-256 message each, under the object's own file key
and bound to the section's name and the header's core: no section can stand in for another,
nor be moved into another object. Memory use does not depend on the picture's size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from secimg_watch import container, crypto, slots
from secimg_watch.container import (
    Core,
    Header,
    KeyringSlot,
    Meta,
    PasswordSlot,
    RecipientSlot,
    Slot,
)
from secimg_watch.errors import ChangedInHandError, KeyMismatchError, TamperedError, UsageError
from secimg_watch.records import FileKey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from secimg_watch.records import ObjectId
    from secimg_watch.slots import Lock, Opener, PasswordCache

PIECE: Final = 65_536
"""Most bytes of a picture in hand at once. From 128 KiB on the allocator may take fresh pages for
every object: sealing 400 KB took 0.08 ms in pieces of 64 KiB and 0.16 to 0.23 ms in pieces of
128 KiB, while a large picture takes about the same time with both (two cores, AES in hardware)."""

_META: Final = b"secimg-watch/v1/META\0"
_PREVIEW: Final = b"secimg-watch/v1/PREVIEW\0"
_BODY: Final = b"secimg-watch/v1/BODY\0"
_HEADER_MAC: Final = b"secimg-watch/v1/header-mac\0"


class Readable(Protocol):
    """What an object is read from: a file opened ``"rb"``, buffered or not, or a pipe."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill ``buffer`` from its start; return the number of bytes, 0 at the end."""


class _Once:
    """Hands out an iterator for the first call, and refuses a second one."""

    def __init__(self, pieces: Iterator[memoryview]) -> None:
        self._pieces: Iterator[memoryview] | None = pieces

    def __call__(self) -> Iterator[memoryview]:
        pieces, self._pieces = self._pieces, None
        if pieces is None:
            # Its source was read to the end: a second pass would write an empty body.
            raise UsageError("a sealed object can be written only once")
        return pieces


@dataclass(frozen=True, slots=True)
class SealedObject:
    """An object about to be written.

    ``size`` is its length in bytes. ``chunks`` may be called once; each piece lies in a
    buffer that is used again, and is valid until the next one is asked for, so write it or
    copy it first. ``file_key`` opens the object without any slot.
    """

    object_id: ObjectId
    size: int
    chunks: Callable[[], Iterator[memoryview]]
    file_key: FileKey


def seal_object(
    *,
    object_id: ObjectId,
    vault_id: bytes,
    locks: Sequence[Lock],
    meta: Meta,
    preview: bytes,
    read: Callable[[memoryview], int],
    passwords: PasswordCache | None = None,
) -> SealedObject:
    """Seal ``meta.size`` bytes from ``read`` under a fresh file key that every lock opens.

    ``read`` fills a buffer from the picture and returns the number of bytes, 0 at its end;
    its errors pass through. ``preview`` has at most 1 MiB, ``b""`` for none. ``vault_id`` has
    16 bytes. One ``passwords`` for many objects derives a password's key only once.

    Raises:
        UsageError: an id, a key, the preview, a field of ``meta`` or the locks are unfit.
        NotReadyError: there is not enough free memory for a password's key.
        ChangedInHandError: while iterating, if ``read`` gives more or fewer bytes.
    """
    return seal_packed(
        object_id=object_id,
        vault_id=vault_id,
        locks=locks,
        packed_meta=container.pack_meta(meta),
        size=meta.size,
        preview=preview,
        read=read,
        passwords=passwords,
    )


def seal_packed(
    *,
    object_id: ObjectId,
    vault_id: bytes,
    locks: Sequence[Lock],
    packed_meta: bytes,
    size: int,
    preview: bytes,
    read: Callable[[memoryview], int],
    passwords: PasswordCache | None = None,
) -> SealedObject:
    """Seal as ``seal_object`` does, with META as it was read from another object.

    So that an object can be sealed anew with fields that this version does not know. ``size``
    is the one that META says.
    """
    preview_len = crypto.sealed_length(len(preview)) if preview else 0
    core = Core(crypto.sealed_length(len(packed_meta)), preview_len, object_id, vault_id)
    file_key = crypto.random_bytes(crypto.KEY_SIZE)
    head = [
        build_header(core, locks, file_key, passwords or slots.PasswordCache()).pack(),
        crypto.seal_message(file_key, _META + core.pack(), packed_meta),
    ]
    if preview:
        head.append(crypto.seal_message(file_key, _PREVIEW + core.pack(), preview))
    first = b"".join(head)
    encryptor = crypto.message_encryptor(file_key, _BODY + core.pack())
    pieces = _sealed_pieces(first, encryptor, size, read)
    whole = len(first) + crypto.sealed_length(size)
    return SealedObject(object_id, whole, _Once(pieces), FileKey(file_key))


def _sealed_pieces(
    first: bytes,
    encryptor: crypto.MessageEncryptor,
    size: int,
    read: Callable[[memoryview], int],
) -> Iterator[memoryview]:
    yield memoryview(first)
    # One byte more than expected, so that a source that has grown is seen at once.
    plain = memoryview(bytearray(min(PIECE, size + 1)))
    sealed = memoryview(bytearray(crypto.encryption_room(len(plain))))
    total = 0
    while count := read(plain):
        total += count
        if total > size:
            raise ChangedInHandError("the picture grew while it was being sealed")
        if length := encryptor.update_into(plain[:count], sealed):
            yield sealed[:length]
    if total != size:
        raise ChangedInHandError("the picture shrank while it was being sealed")
    yield memoryview(encryptor.finalize())


def build_header(
    core: Core,
    locks: Sequence[Lock],
    file_key: bytes,
    passwords: PasswordCache,
    *,
    kept: Sequence[Slot] = (),
) -> Header:
    """Wrap the file key for every lock and authenticate the whole header with it.

    Sections that were sealed for ``core`` under ``file_key`` stay valid behind it: this is
    all that changing an object's keys takes. ``kept`` are slots of the same object's header
    that stay as they are, and stand first.

    Raises:
        UsageError: there are no locks or too many, or a key or an id has a wrong length.
        NotReadyError: there is not enough free memory for a password's key.
    """
    made = (slots.make_slot(lock, file_key, core, passwords) for lock in locks)
    both = (*kept, *made)
    unsigned = container.pack_unsigned_header(core, both)
    return Header(core, both, crypto.header_mac(_mac_key(file_key, core), unsigned))


def _mac_key(file_key: bytes, core: Core) -> bytes:
    return crypto.hkdf_expand(file_key, _HEADER_MAC + core.pack(), 32)


def read_header(stream: Readable) -> Header:
    """Read a header, and not a byte more. No key is needed, and nothing is authenticated.

    Raises:
        TamperedError: the stream does not start with a header of this version.
    """
    prefix = _read(stream, container.PREFIX_SIZE)
    size = container.parse_prefix(prefix)
    return container.parse_header(prefix + _read(stream, size - len(prefix)))


def open_header(
    header: Header, openers: Sequence[Opener | FileKey], passwords: PasswordCache
) -> bytes:
    """Return the file key, the header being authenticated with it.

    A ``FileKey`` among the openers is taken at its word, with no slot being opened; the MAC
    tells whether it is the right one, and whether the slots are those that were written.

    Raises:
        KeyMismatchError: no opener is one that the header has a slot for.
        TamperedError: the key or password is wrong, or the header is damaged.
        NotReadyError: there is not enough free memory for a password's key.
    """
    in_hand = [opener.key for opener in openers if isinstance(opener, FileKey)]
    by_slot = [opener for opener in openers if not isinstance(opener, FileKey)]
    file_key = in_hand[0] if in_hand else _file_key(header, by_slot, passwords)
    unsigned = container.pack_unsigned_header(header.core, header.slots)
    crypto.check_header_mac(_mac_key(file_key, header.core), unsigned, header.mac)
    return file_key


def _file_key(header: Header, openers: Sequence[Opener], passwords: PasswordCache) -> bytes:
    pairs = [(slot, each) for slot in header.slots for each in openers if slots.fits(slot, each)]
    if not pairs:
        raise _no_key(header.slots)
    # Named keys first: trying a password is slow, and may turn out to be needless.
    pairs.sort(key=lambda pair: isinstance(pair[0], PasswordSlot))
    for slot, opener in pairs:
        try:
            return slots.open_slot(slot, opener, header.core, passwords)
        except TamperedError:
            continue
    raise crypto.unauthentic()


def _no_key(sealed_with: Sequence[Slot]) -> KeyMismatchError:
    names = [f"key {slot.key_id.hex()}" for slot in sealed_with if isinstance(slot, KeyringSlot)]
    names += [
        f"recipient {slot.key_id.hex()}" for slot in sealed_with if isinstance(slot, RecipientSlot)
    ]
    if not names:
        return KeyMismatchError("the object is sealed with a password, and none was given")
    return KeyMismatchError(
        f"the object is sealed with {' and '.join(names)}; none of that is at hand"
    )


def open_object(
    stream: Readable,
    openers: Sequence[Opener | FileKey],
    *,
    expect: ObjectId | None = None,
    vault_id: bytes | None = None,
    passwords: PasswordCache | None = None,
) -> OpenedObject:
    """Read and authenticate header and META; preview and body follow on request.

    ``expect`` and ``vault_id`` say which object, and of which vault, it has to be. Errors of
    the stream itself pass through.

    Raises:
        TamperedError: it is another object, or none, or the key is wrong, or it is damaged.
        KeyMismatchError: no opener is one that the object has a slot for.
        NotReadyError: there is not enough free memory for a password's key.
    """
    header = read_header(stream)
    core = header.core
    check_ids(core, expect, vault_id)
    file_key = open_header(header, openers, passwords or slots.PasswordCache())
    sealed = _read(stream, core.meta_len)
    packed = crypto.open_message(file_key, _META + core.pack(), sealed)
    return OpenedObject(stream, header, packed, file_key)


def check_ids(core: Core, expect: ObjectId | None, vault_id: bytes | None) -> None:
    """Check that an object is the one, and of the vault, that it has to be; ``None``: any.

    Raises:
        TamperedError: it is another one.
    """
    if expect is not None and core.object_id != expect:
        raise TamperedError("the object is not the one that its name says")
    if vault_id is not None and core.vault_id != vault_id:
        raise TamperedError("the object belongs to another vault")


class OpenedObject:
    """An object whose header and META are authenticated, and whose stream stands behind them.

    ``preview`` comes before ``body``, as in the stream; each can be read once.
    """

    def __init__(
        self, stream: Readable, header: Header, packed_meta: bytes, file_key: bytes
    ) -> None:
        """Take what ``open_object`` has read and authenticated.

        Raises:
            TamperedError: META is not a record of this version.
        """
        self.header = header
        self.packed_meta = packed_meta
        self.meta: Meta = container.parse_meta(packed_meta)
        self._stream = stream
        self._file_key = file_key
        self._preview_read = False
        self._body_read = False

    def preview(self) -> bytes:
        """Return the encoded preview, ``b""`` where there is none.

        Raises:
            TamperedError: it does not authenticate, or the object is cut.
            UsageError: it, or the body behind it, was read before.
        """
        sealed = self._sealed_preview()
        if not sealed:
            return b""
        return crypto.open_message(self._file_key, _PREVIEW + self.header.core.pack(), sealed)

    def _sealed_preview(self) -> bytes:
        if self._preview_read:
            raise UsageError("the preview of an object is read once, and before the body")
        self._preview_read = True
        return _read(self._stream, self.header.core.preview_len)

    def body(self) -> Iterator[memoryview]:
        """Yield the picture, authenticated piece by piece, and check that the object ends.

        A piece is valid until the next one is asked for. The picture is whole only when the
        iteration ends without an error: write it under a temporary name until then. A
        preview that was not asked for is passed over without being authenticated, so that a
        picture behind a damaged preview can still be had.

        Raises:
            TamperedError: the body does not authenticate, is cut, or something follows it.
            UsageError: it was read before.
        """
        if self._body_read:
            raise UsageError("the body of an object is read once")
        self._body_read = True
        return self._pieces()

    def _pieces(self) -> Iterator[memoryview]:
        if not self._preview_read:
            self._sealed_preview()
        left = crypto.sealed_length(self.meta.size)
        sealed = memoryview(bytearray(min(PIECE, left)))
        plain = bytearray(crypto.decryption_room(len(sealed)))
        whole = memoryview(plain)
        decryptor = crypto.MessageDecryptor(self._file_key, _BODY + self.header.core.pack())
        while left:
            part = sealed[: min(len(sealed), left)]
            _read_into(self._stream, part)
            left -= len(part)
            if count := decryptor.update_into(part, plain):
                yield whole[:count]
        if self._stream.readinto(memoryview(bytearray(1))):
            raise TamperedError("the object goes on behind its end")
        if last := decryptor.finalize():
            yield memoryview(last)


def _read(stream: Readable, size: int) -> bytes:
    buffer = bytearray(size)
    _read_into(stream, memoryview(buffer))
    return bytes(buffer)


def _read_into(stream: Readable, view: memoryview) -> None:
    filled = 0
    while filled < len(view):
        count = stream.readinto(view[filled:])
        if not count:
            raise TamperedError("the object is cut: it ends before it should")
        filled += count
