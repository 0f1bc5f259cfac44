"""A vault on disk: opaque objects, written so that an object under its final name is whole.

``vault.json``                      format version, vault id, known key ids and their check values
``objects/ab/<object id>.simg``     objects; ``ab`` are the id's first two digits
``tmp/<object id>.simg``            objects that are being written or verified
``rekey/<object id>.simg``          objects that are about to replace the one of that name
``lock``                            held by the one process that writes new objects
``vault.json.lock``                 held while ``vault.json`` is changed
``rekey/lock``                      held by the one process that replaces objects

Write order, which everything else relies on: write under ``tmp/``, sync the file, (somebody else
reads it back and compares), rename to its final name without ever overwriting, sync the
directory of that name. An object that is replaced, for other keys, goes the same way: the old one
stays under the name until the new one was synced and checked, and never is there neither. This
module never sees a key.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from secimg_watch import kernel
from secimg_watch.errors import (
    AlreadyRunningError,
    CannotCreateError,
    ConfigError,
    DiskFullError,
    NoInputError,
    NotAllowedError,
    NotReadyError,
    SecimgError,
    StorageError,
    VaultGoneError,
)
from secimg_watch.records import Claimed, Committed, ObjectId, Sealed, Staged, Verified

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from secimg_watch.quantities import Reserve
    from secimg_watch.records import FileKey

A = TypeVar("A")
R = TypeVar("R")

FORMAT: Final = 1
SUFFIX: Final = ".simg"
_OUT_OF_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_OBJECT_ID_DIGITS: Final = frozenset("0123456789abcdef")
_OBJECT_ID_LENGTH: Final = 32
_ID_SIZE: Final = 16
_CHECK_SIZE: Final = 32


def is_object_id(text: str) -> bool:
    """Whether ``text`` has the form of an object id."""
    return len(text) == _OBJECT_ID_LENGTH and set(text) <= _OBJECT_ID_DIGITS


@dataclass(frozen=True, slots=True)
class VaultInfo:
    """What ``vault.json`` says: the vault's id (16 bytes), and a check value for each key id.

    ``recovery`` are the ids of recipients whose private key was shown to exist.
    """

    vault_id: bytes
    checks: dict[bytes, bytes]  # key id (16 bytes) -> check value (32 bytes)
    recovery: frozenset[bytes] = frozenset()  # ids of 16 bytes


class Vault:
    """One vault directory."""

    def __init__(self, path: Path, reserve: Reserve) -> None:
        """``reserve``: how much of the file system must stay free."""
        self.path = path
        self._reserve = reserve
        self._lock_fd: int | None = None
        self._node: tuple[int, int] | None = None
        self._guard = threading.Lock()
        self._in_flight = 0

    # -- the vault itself ------------------------------------------------------------------

    def create(self, info: VaultInfo) -> None:
        """Lay out an empty vault.

        Raises:
            CannotCreateError: the directory cannot be made or written.
            ConfigError: there is a vault already.
        """
        if self.exists():
            raise ConfigError(f"there is a vault in {self.path} already")
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self.path / "tmp").mkdir(mode=0o700, exist_ok=True)
            self._make_shards()
            # Before there is a vault.json: where it stands, the vault will be found again, and
            # whole.
            kernel.sync_path(self.path)
            kernel.sync_above(self.path)
            self.write_info(info)
        except OSError as error:
            message = f"the vault {self.path} cannot be made: {error.strerror}"
            raise CannotCreateError(
                message, hint="choose a directory that you may write"
            ) from error

    def _make_shards(self) -> None:
        # All at once, so that no commit ever has to make one durable.
        objects = self.path / "objects"
        objects.mkdir(mode=0o700, exist_ok=True)
        for number in range(256):
            (objects / f"{number:02x}").mkdir(mode=0o700, exist_ok=True)
        kernel.sync_path(objects)

    def exists(self) -> bool:
        """Whether a vault was laid out here."""
        return (self.path / "vault.json").exists()

    def write_info(self, info: VaultInfo) -> None:
        """Write ``vault.json`` anew, atomically."""
        keys = [
            {"id": key_id.hex(), "check": base64.b64encode(check).decode()}
            for key_id, check in info.checks.items()
        ]
        fields = {"format": FORMAT, "vault": info.vault_id.hex(), "keys": keys}
        if info.recovery:
            fields["recovery"] = sorted(each.hex() for each in info.recovery)
        text = json.dumps(fields, indent=2)
        temporary = self.path / "vault.json.new"
        # One that a dead process left may have a mode by which its owner cannot write it.
        temporary.unlink(missing_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "w", encoding="ascii") as file:
            # An administrator who changes it must not take it away from the service's user.
            with contextlib.suppress(FileNotFoundError):
                kernel.give_like(fd, os.stat(self.path / "vault.json"))
            file.write(text + "\n")
            file.flush()
            os.fsync(fd)
        os.replace(temporary, self.path / "vault.json")
        kernel.sync_path(self.path)

    def edit_info(self, edit: Callable[[VaultInfo], VaultInfo]) -> None:
        """Change what ``vault.json`` says, alone and at once.

        Raises:
            AlreadyRunningError: another process is changing it in this moment.
        """
        fd = kernel.lock_exclusively(self.path / "vault.json.lock")
        if fd is None:
            raise AlreadyRunningError(f"another process changes {self.path / 'vault.json'}")
        try:
            self.write_info(edit(self.info()))
        finally:
            os.close(fd)

    def info(self) -> VaultInfo:
        """Read ``vault.json``.

        Raises:
            NoInputError: there is no vault.
            ConfigError: the file is damaged, or of another format version.
        """
        path = self.path / "vault.json"
        try:
            fields = json.loads(path.read_text(encoding="ascii"))
            if fields["format"] != FORMAT:
                raise ConfigError(f"{path} has format {fields['format']}, not {FORMAT}")
            checks = {
                _exactly(_ID_SIZE, bytes.fromhex(key["id"])): _exactly(
                    _CHECK_SIZE, base64.b64decode(key["check"], validate=True)
                )
                for key in fields["keys"]
            }
            recovery = frozenset(
                _exactly(_ID_SIZE, bytes.fromhex(each)) for each in fields.get("recovery", ())
            )
            return VaultInfo(_exactly(_ID_SIZE, bytes.fromhex(fields["vault"])), checks, recovery)
        except FileNotFoundError:
            hint = "mount its disk; or if it was never made, make it with: secimg-watch key init"
            raise NoInputError(f"there is no vault in {self.path}", hint=hint) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{path} is damaged", hint="restore it from a backup") from error
        except OSError as error:
            raise StorageError(f"{path} cannot be read: {error.strerror}") from error

    def lock(self) -> None:
        """Become the one writer of this vault.

        Raises:
            AlreadyRunningError: another process is.
            NotAllowedError: the vault may not be written.
            NotReadyError: its disk is full, or does not answer.
        """
        try:
            self._lock_fd = kernel.lock_exclusively(self.path / "lock")
            # Whoever made the vault may have died before its names were durable.
            kernel.sync_path(self.path)
        except OSError as error:
            self.unlock()
            raise self._unwritable(error) from error
        if self._lock_fd is None:
            raise AlreadyRunningError(f"another process writes to the vault {self.path}")
        self._node = self._look()

    def refuse_if_gone(self) -> None:
        """Raise where what was admitted and locked is not what the path leads to now.

        An unmounted disk would have its objects written to the empty directory below it.

        Raises:
            VaultGoneError: it was removed, replaced or unmounted.
        """
        if self._node is not None and self._look() != self._node:
            raise VaultGoneError(f"the vault {self.path} was removed, replaced or unmounted")

    def _look(self) -> tuple[int, int] | None:
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def _unwritable(self, error: OSError) -> SecimgError:
        if error.errno in _OUT_OF_SPACE:
            return DiskFullError(f"the vault {self.path} is full")
        refused = error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}
        kind = NotAllowedError if refused else NotReadyError
        return kind(f"the vault {self.path} cannot be written: {error.strerror}")

    @property
    def is_locked(self) -> bool:
        """Whether this process is the vault's writer."""
        return self._lock_fd is not None

    def unlock(self) -> None:
        """Let others write."""
        with self._guard:  # several workers may find the vault gone at once
            fd, self._lock_fd = self._lock_fd, None
        if fd is not None:
            os.close(fd)

    # -- writing ---------------------------------------------------------------------------

    def stage(self, sealed: Sealed) -> Staged:
        """Write an object under its temporary name, and sync it.

        Raises:
            VaultGoneError: the path does not lead to the vault any more that was locked.
            DiskFullError: less would stay free than the reserve; nothing was left behind.
            OSError: the system failed the write; nothing was left behind.
        """
        path = self._temporary(sealed.object_id)
        _unlink(path)
        self.refuse_if_gone()
        self._write(path, sealed.size, lambda fd: write_pieces(fd, sealed.chunks()))
        return Staged(sealed.claimed, sealed.object_id, path, sealed.file_key)

    def _write(self, path: Path, size: int, write: Callable[[int], None]) -> None:
        """Write a new file and sync it; nothing is left behind where that fails."""
        with self._space_for(size):
            try:
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400)
                try:
                    write(fd)
                    os.fsync(fd)
                finally:
                    os.close(fd)
            except BaseException as error:
                _unlink(path)
                if isinstance(error, OSError) and error.errno in _OUT_OF_SPACE:
                    raise DiskFullError(f"the vault {self.path} is full") from error
                raise

    @contextlib.contextmanager
    def _space_for(self, size: int) -> Iterator[None]:
        with self._guard:
            free, total = kernel.free_space(self.path)
            if free - self._in_flight - size < self._reserve.of(total):
                raise DiskFullError(
                    f"the vault {self.path} has too little free space",
                    hint="free some, or lower 'min_free'",
                )
            self._in_flight += size
        try:
            yield
        finally:
            with self._guard:
                self._in_flight -= size

    def find(self, claimed: Claimed, file_key: FileKey | None = None) -> Staged | None:
        """The object of a claimed file that was committed earlier, as merely staged.

        It counts for nothing until it was verified anew. ``file_key`` is its own, where this
        very process committed it and still knows that.
        """
        object_id = claimed.inspected.held.job.object_id
        path = self.object_path(object_id)
        return Staged(claimed, object_id, path, file_key) if path.exists() else None

    def rename(self, verified: Verified) -> Path:
        """Give a verified object its final name, which it may have already.

        Raises:
            OSError: the system failed; the object is still under one of its two names.
        """
        staged = verified.staged
        final = self.object_path(staged.object_id)
        if staged.path != final:
            self._rename(staged.path, final)
        return final

    def _rename(self, source: Path, target: Path) -> None:
        source_dir = os.open(source.parent, kernel.DIRECTORY)
        target_dir = os.open(target.parent, kernel.DIRECTORY)
        try:
            kernel.rename_noreplace(
                source.name, target.name, source_dir=source_dir, target_dir=target_dir
            )
        finally:
            os.close(source_dir)
            os.close(target_dir)

    def discard(self, object_id: ObjectId) -> None:
        """Remove an object's temporary file, if there is one."""
        _unlink(self._temporary(object_id))

    def discard_temporaries(self) -> int:
        """At start: remove what an earlier process left under ``tmp/``; how many it was.

        Safe, because a plaintext is only ever deleted after its object left ``tmp/``.
        """
        (self.path / "tmp").mkdir(mode=0o700, exist_ok=True)  # a backup may have left it out
        names = os.listdir(self.path / "tmp")
        for name in names:
            _unlink(self.path / "tmp" / name)
        return len(names)

    # -- replacing -------------------------------------------------------------------------

    @contextlib.contextmanager
    def replacing(self) -> Iterator[None]:
        """Be the one process that replaces objects; what an earlier one left unfinished goes.

        New objects may be written meanwhile, by this process or another one.

        Raises:
            AlreadyRunningError: another process is.
            NotAllowedError: the vault may not be written.
            NotReadyError: its disk is full, or does not answer.
        """
        aside = self.path / "rekey"
        try:
            aside.mkdir(mode=0o700, exist_ok=True)
            fd = kernel.lock_exclusively(aside / "lock")
        except OSError as error:
            raise self._unwritable(error) from error
        if fd is None:
            raise AlreadyRunningError(f"another process changes keys in the vault {self.path}")
        try:
            for left in aside.glob(f"*{SUFFIX}"):
                _unlink(left)
            yield
        finally:
            os.close(fd)

    def replace(
        self,
        object_id: ObjectId,
        size: int,
        write: Callable[[int], None],
        check: Callable[[Path], None],
    ) -> None:
        """Put another file of ``size`` bytes in the place of an object, at once or not at all.

        ``write`` is given a descriptor, ``check`` the path of what was written and synced; it
        raises where that must not replace the object. Owner and mode stay those of the object.

        Raises:
            DiskFullError: less would stay free than the reserve.
            OSError: the system failed a call.
        """
        path = self.path / "rekey" / f"{object_id}{SUFFIX}"
        final = self.object_path(object_id)
        status = os.stat(final)

        def write_as_before(fd: int) -> None:
            kernel.give_like(fd, status)
            write(fd)

        self._write(path, size, write_as_before)
        try:
            check(path)
            os.replace(path, final)
        except BaseException:
            _unlink(path)
            raise
        kernel.sync_path(final.parent)

    def sync_objects(self) -> None:
        """Make durable what was replaced, also by a process that died before it could do that.

        Raises:
            NotReadyError, NotAllowedError: the system failed that.
        """
        try:
            for number in range(256):
                shard = self.path / "objects" / f"{number:02x}"
                with contextlib.suppress(FileNotFoundError):  # a backup may have left it out
                    if os.listdir(shard):
                        kernel.sync_path(shard)
        except OSError as error:
            raise self._unwritable(error) from error

    # -- reading ---------------------------------------------------------------------------

    def object_path(self, object_id: ObjectId) -> Path:
        """Where an object lies under its final name."""
        return self.path / "objects" / object_id[:2] / f"{object_id}{SUFFIX}"

    def _temporary(self, object_id: ObjectId) -> Path:
        return self.path / "tmp" / f"{object_id}{SUFFIX}"

    def has(self, object_id: ObjectId) -> bool:
        """Whether the object was committed."""
        return self.object_path(object_id).exists()

    def object_ids(self) -> list[ObjectId]:
        """The ids of all objects, in order.

        Raises:
            NoInputError: there is no vault.
            StorageError: not all of it can be listed.
        """
        objects = self.path / "objects"
        if not objects.is_dir():
            raise NoInputError(f"there is no vault in {self.path}")
        names: list[str] = []
        # Not by a pattern: that would pass over what may not be read, and a key that is needed
        # there would count as one that nothing needs.
        for number in range(256):
            try:
                names += os.listdir(objects / f"{number:02x}")
            except FileNotFoundError:
                continue  # a backup may have left it out
            except OSError as error:
                message = f"{error.filename} cannot be listed: {error.strerror}"
                raise StorageError(message) from error
        stems = (name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX))
        return sorted(ObjectId(stem) for stem in stems if is_object_id(stem))


def commit(batch: Sequence[tuple[Vault, Verified]]) -> list[Committed | Exception]:
    """Rename verified objects to their final names, then make all the names durable. Idempotent.

    Every rename comes before the first sync: on a journalling file system that sync writes all
    of them, and the others find nothing left to do. The outcomes are in the batch's order; an
    object counts as committed only when its own directory was synced.
    """
    renamed = [_outcome(vault.rename, verified) for vault, verified in batch]
    shards = {path.parent for path in renamed if not isinstance(path, Exception)}
    synced = {shard: _outcome(kernel.sync_path, shard) for shard in shards}
    outcomes: list[Committed | Exception] = []
    for (vault, verified), path in zip(batch, renamed, strict=True):
        if isinstance(path, Exception):
            outcomes.append(path)
            continue
        # What was synced just now may lie in another directory than what was locked.
        fault = _outcome(Vault.refuse_if_gone, vault) or synced[path.parent]
        outcomes.append(fault if isinstance(fault, Exception) else Committed(verified, path))
    return outcomes


def _outcome(act: Callable[[A], R], argument: A) -> R | OSError | VaultGoneError:
    try:
        return act(argument)
    except (OSError, VaultGoneError) as error:
        return error


def _exactly(size: int, value: bytes) -> bytes:
    if len(value) != size:
        raise ValueError(f"{len(value)} bytes instead of {size}")
    return value


def _unlink(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def write_pieces(fd: int, pieces: Iterable[memoryview]) -> None:
    """Write all of every piece."""
    for piece in pieces:
        rest = piece
        while rest:
            rest = rest[os.write(fd, rest) :]
