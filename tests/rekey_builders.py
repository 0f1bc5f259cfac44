"""A vault whose objects are written by the library, for tests that give them other keys."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from secimg_watch.container import KeyringSlot, Meta, RecipientSlot, pack_meta
from secimg_watch.gate import admit_keys
from secimg_watch.keys import generate
from secimg_watch.quantities import Reserve
from secimg_watch.recipients import generate_identity, recipient_of
from secimg_watch.records import KeyEncryptionKey, ObjectId, PrivateKey, Recipient
from secimg_watch.seal import open_object, read_header, seal_packed
from secimg_watch.vault import Vault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from secimg_watch.container import Header
    from secimg_watch.slots import Lock, Opener, PasswordCache

PREVIEW: Final = b"a preview"
KILLED: Final = 9

_CALLS: Final = ("open", "write", "fsync", "close", "rename", "replace", "link", "unlink", "mkdir")


@dataclass(frozen=True, slots=True)
class Content:
    """All that an object holds."""

    packed_meta: bytes
    preview: bytes
    body: bytes


@contextlib.contextmanager
def quick_directory() -> Iterator[Path]:
    """A directory in memory where there is such a place: a vault has 256 directories, synced."""
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


def a_key() -> KeyEncryptionKey:
    """A key that nobody else has."""
    return generate()


def a_pair() -> tuple[PrivateKey, Recipient]:
    """A private key and its public one."""
    identity = generate_identity()
    return identity, recipient_of(identity)


def a_vault(path: Path, *keys: KeyEncryptionKey) -> Vault:
    """A new vault that knows these keys."""
    vault = Vault(path, Reserve(0.0, 0))
    admit_keys(vault, keys)
    return vault


def meta_for(size: int, name: bytes = b"a.jpg") -> Meta:
    """What an object might say of a picture."""
    return Meta(
        name=name,
        folder=b"2026/11",
        size=size,
        mtime_ns=1_763_900_000_123_456_789,
        mode=0o100640,
        format="JPEG",
        width=4,
        height=3,
        label="image",
        source="/srv/scans",
        proof="lease",
        ingested_ns=1_763_900_002_000_000_000,
        tool="secimg-watch",
    )


def put(
    vault: Vault,
    locks: Sequence[Lock],
    picture: bytes = b"a picture",
    *,
    name: bytes = b"a.jpg",
    preview: bytes = PREVIEW,
    packed_meta: bytes | None = None,
    vault_id: bytes | None = None,
    passwords: PasswordCache | None = None,
) -> ObjectId:
    """Write an object under its final name, without the ceremony that a real one goes through."""
    object_id = ObjectId(os.urandom(16).hex())
    sealed = seal_packed(
        object_id=object_id,
        vault_id=vault_id or vault.info().vault_id,
        locks=locks,
        packed_meta=packed_meta or pack_meta(meta_for(len(picture), name)),
        size=len(picture),
        preview=preview,
        read=io.BytesIO(picture).readinto,
        passwords=passwords,
    )
    path = vault.object_path(object_id)
    path.write_bytes(b"".join(bytes(chunk) for chunk in sealed.chunks()))
    path.chmod(0o400)
    return object_id


def header_of(vault: Vault, object_id: ObjectId) -> Header:
    """The header as it is on disk."""
    with vault.object_path(object_id).open("rb") as stream:
        return read_header(stream)


def slots_of(vault: Vault, object_id: ObjectId) -> list[tuple[str, bytes]]:
    """The kind and key id of every slot, in an order of their own."""
    kinds = {KeyringSlot: "key", RecipientSlot: "recipient"}
    slots = header_of(vault, object_id).slots
    return sorted((kinds.get(type(slot), "password"), slot.key_id) for slot in slots)


def sections_of(vault: Vault, object_id: ObjectId) -> bytes:
    """Everything behind the header, still sealed."""
    with vault.object_path(object_id).open("rb") as stream:
        read_header(stream)
        return stream.read()


def content_of(vault: Vault, object_id: ObjectId, *openers: Opener) -> Content:
    """Everything in an object, opened."""
    vault_id = vault.info().vault_id
    with vault.object_path(object_id).open("rb") as stream:
        opened = open_object(stream, openers, expect=object_id, vault_id=vault_id)
        preview = opened.preview()
        return Content(opened.packed_meta, preview, b"".join(map(bytes, opened.body())))


def damage(vault: Vault, object_id: ObjectId, place: int) -> None:
    """Turn one bit around, ``place`` bytes from the start or, where negative, the end."""
    path = vault.object_path(object_id)
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)
    path.chmod(0o400)


def left_aside(vault: Vault) -> list[str]:
    """The unfinished objects that lie beside the others."""
    return sorted(path.name for path in (vault.path / "rekey").glob("*.simg"))


def die_at_call(number: int, act: Callable[[], None]) -> bool:
    """Do something in a process that ends without warning before a certain call of the system.

    Whether it did end so: false where everything was done before that call was reached.
    """
    child = os.fork()  # type: ignore[attr-defined, unused-ignore]  # not on Windows
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in {0, KILLED}, code
        return code == KILLED
    code = 1
    try:
        _end_at_call(number)
        act()
        code = 0
    except SystemExit as end:
        code = 0 if not end.code else 1
    finally:
        sys.stderr.flush()
        os._exit(code)


def _end_at_call(number: int) -> None:
    left = number

    def ending(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left <= 0:
                os._exit(KILLED)
            return call(*args, **kwargs)

        return counted

    for name in (*_CALLS, "copy_file_range"):
        if hasattr(os, name):
            setattr(os, name, ending(getattr(os, name)))
