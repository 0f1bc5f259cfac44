"""The data path as types: one frozen record a stage, each holding the one before.

``Arrival -> Settled -> Job -> Held -> Inspected -> Claimed -> Sealed -> Staged -> Verified ->
Committed -> Erased``

A stage function takes the record of the stage before and returns its own, so that a type
checker refuses to erase what is merely staged. A record is evidence, not a note: it exists
only while the process that gathered the evidence lives, is never stored, and is earned again
from disk after a crash.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, NewType

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator
    from pathlib import Path

ObjectId = NewType("ObjectId", str)
"""32 lower-case hexadecimal digits: the random 128 bits that name an object, its staging
directory and its vault file alike."""

FolderKey = NewType("FolderKey", str)
"""A watched folder's configured absolute path: what jobs and reports are filed under."""


class Proof(StrEnum):
    """Why a file counts as complete, strongest first."""

    LEASE = "lease"  # the kernel granted a read lease: nobody has it open for writing
    RENAME = "rename"  # it appeared whole, by a rename
    SIDECAR = "sidecar"  # the producer left its marker file beside it
    QUIET = "quiet"  # nothing changed for long: the only evidence on some file systems
    RECOVERED = "recovered"  # found claimed after a crash; the original proof is not known


class Label(StrEnum):
    """What the inspector found out about a file's content."""

    IMAGE = "image"  # recognised, and decoded where the policy asks for decoding
    UNDECODABLE = "undecodable"  # recognised, but does not decode within the limits
    NOT_IMAGE = "not-image"  # nothing that is known as a picture
    UNINSPECTED = "uninspected"  # the inspector crashed or ran out of time on it


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells one state of one file from every other: device, inode, size, times (ns)."""

    dev: int
    ino: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> Identity:
        """Take the identity out of a stat result."""
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)

    def same_content(self, other: Identity) -> bool:
        """Whether only the name can have changed: a rename touches ``ctime`` alone."""
        return (self.dev, self.ino, self.size, self.mtime_ns) == (
            other.dev,
            other.ino,
            other.size,
            other.mtime_ns,
        )


@dataclass(frozen=True, slots=True)
class Arrival:
    """A file seen in a watched folder. ``relpath`` is relative to the folder's root.

    Names that are not valid in the locale's encoding carry surrogate escapes (PEP 383), so
    that ``os.fsencode`` gives the exact bytes back.
    """

    folder: FolderKey
    relpath: str
    identity: Identity
    first_seen_ns: int  # wall clock


@dataclass(frozen=True, slots=True)
class Settled:
    """An arrival that did not change for the settle time, and the proof of completeness."""

    arrival: Arrival
    proof: Proof


@dataclass(frozen=True, slots=True)
class Job:
    """A row of the queue, taken by this process. ``attempts`` counts this one already."""

    object_id: ObjectId
    folder: FolderKey
    relpath: str
    identity: Identity
    proof: Proof
    attempts: int
    first_seen_ns: int


@dataclass(frozen=True, slots=True)
class Held:
    """A job whose file is open read-only, and under a read lease where there are leases.

    ``parent`` is an open descriptor of the directory that holds it, ``name`` its name there:
    no path is ever resolved again. ``identity`` and ``mode`` were read through ``fd``, so they
    are those of the very inode in hand.
    """

    job: Job
    fd: int
    parent: int
    name: str
    identity: Identity
    mode: int
    leased: bool
    claimed: bool  # it lies in the staging directory already, from an attempt before


@dataclass(frozen=True, slots=True)
class Inspection:
    """What the inspector says of a file. Sizes in pixels, 0 where not known."""

    label: Label
    format: str = ""  # Pillow's name of the format, e.g. "JPEG"; "" where not known
    width: int = 0
    height: int = 0
    preview: bytes = b""  # an encoded image, "" where none was asked for or could be made
    detail: str = ""  # one short clause for people, e.g. "truncated file"


@dataclass(frozen=True, slots=True)
class Inspected:
    """A held file and what the inspector says of it."""

    held: Held
    inspection: Inspection


@dataclass(frozen=True, slots=True)
class Claimed:
    """An inspected file that lies where nobody else can swap its name.

    ``parent`` and ``name`` say where it lies now. ``in_place`` says that it was not moved and
    still lies in the watched folder; then its identity is compared once more right before the
    unlink. ``identity`` was read after the move.
    """

    inspected: Inspected
    parent: int
    name: str
    identity: Identity
    in_place: bool


@dataclass(frozen=True, slots=True)
class Sealed:
    """A claimed file as an object: ``chunks`` yields the object's bytes, sealed as it is read.

    ``size`` is the object's length in bytes, known before the first chunk.
    """

    claimed: Claimed
    object_id: ObjectId
    size: int
    chunks: Callable[[], Iterator[memoryview]]
    file_key: FileKey


@dataclass(frozen=True, slots=True)
class Staged:
    """An object that is written under a temporary name in its vault, and synced.

    ``file_key`` is ``None`` for an object that an earlier process left under its final name.
    """

    claimed: Claimed
    object_id: ObjectId
    path: Path
    file_key: FileKey | None = None


@dataclass(frozen=True, slots=True)
class Verified:
    """An object that was read back, decrypted and compared byte for byte."""

    staged: Staged


@dataclass(frozen=True, slots=True)
class Committed:
    """A verified object under its final name, its directory synced."""

    verified: Verified
    path: Path


@dataclass(frozen=True, slots=True)
class Erased:
    """A committed object whose plaintext is gone, or was kept or moved, as the policy says.

    ``refusal`` is the system's reason where it does not let the plaintext be deleted.
    """

    committed: Committed
    erased_ns: int  # wall clock
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class KeyEncryptionKey:
    """The 256-bit key that wraps every file key of a vault, and the random id that names it."""

    key_id: bytes  # 16 bytes
    key: bytes = field(repr=False)  # 32 bytes; kept out of every representation


@dataclass(frozen=True, slots=True)
class Recipient:
    """A public key that objects are sealed to; ``key_id`` (16 bytes) is its fingerprint."""

    key_id: bytes
    public_key: bytes = field(repr=False)  # 1216 bytes


@dataclass(frozen=True, slots=True)
class PrivateKey:
    """What opens the objects that were sealed to a recipient; ``key_id`` is the recipient's."""

    key_id: bytes
    seed: bytes = field(repr=False)  # 32 bytes


@dataclass(frozen=True, slots=True)
class FileKey:
    """The key of one object, still in the memory of the process that sealed it."""

    key: bytes = field(repr=False)  # 32 bytes


@dataclass(frozen=True, slots=True)
class KeySet:
    """What a vault is sealed with and opened with.

    ``ring`` holds the current key-encryption key first and then former ones, which open only.
    It is empty for a write-only vault: objects are sealed to ``recipients`` alone, and nothing
    here opens them again.
    """

    ring: tuple[KeyEncryptionKey, ...]
    recipients: tuple[Recipient, ...] = ()

    @property
    def locks(self) -> tuple[KeyEncryptionKey | Recipient, ...]:
        """Everything that a new object gets a slot for."""
        return (*self.ring[:1], *self.recipients)
