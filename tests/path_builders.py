"""A folder, a vault and a picture at any stage of its way between them, made of the real parts."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from secimg_watch.claim import claim
from secimg_watch.erase import Erasure
from secimg_watch.hold import hold
from secimg_watch.quantities import Reserve
from secimg_watch.records import (
    FolderKey,
    Identity,
    Inspected,
    Inspection,
    Job,
    KeyEncryptionKey,
    KeySet,
    Label,
    ObjectId,
    Proof,
)
from secimg_watch.roots import Root
from secimg_watch.seal import open_object
from secimg_watch.sealing import seal
from secimg_watch.slots import key_check
from secimg_watch.vault import Vault, VaultInfo, commit
from secimg_watch.verify import verify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from secimg_watch.records import Claimed, Committed, Held, Sealed, Staged, Verified

KEY: Final = KeyEncryptionKey(b"k" * 16, b"\x07" * 32)
KEYS: Final = KeySet((KEY,))
VAULT_ID: Final = b"v" * 16
NO_RESERVE: Final = Reserve(0.0, 0)
PICTURE: Final = b"\xff\xd8\xff\xe0 a picture"
PATIENCE: Final = 60.0
"""Seconds that anything may take on a machine with much else to do."""

IS_ROOT: Final = hasattr(os, "geteuid") and os.geteuid() == 0
NOBODY: Final = 65534

_STEP: Final = 0.005
_OPEN_FOR_WRITING: Final = """
import os, sys
try:
    os.open(sys.argv[1], os.O_WRONLY | os.O_NONBLOCK)
except BlockingIOError:
    print("refused", end="")
"""


def only_on_linux() -> None:
    """Skip the whole module that calls this elsewhere."""
    if sys.platform != "linux":
        pytest.skip("leases, inotify and directory descriptors", allow_module_level=True)


def until(condition: Callable[[], bool], what: str) -> None:
    """Ask again and again until the answer is yes."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited in vain: {what}"
        time.sleep(_STEP)


def new_id() -> ObjectId:
    """A fresh object id."""
    return ObjectId(os.urandom(16).hex())


def open_for_writing(path: Path) -> str:
    """Let another process open a file for writing, without waiting; "refused" by a lease."""
    command = [sys.executable, "-I", "-S", "-c", _OPEN_FOR_WRITING, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE)
    return done.stdout


def open_descriptors() -> set[str]:
    """The numbers of this process's open descriptors, and what they lead to.

    Between two looks only a subset can be asked for: what belonged to a test before may be
    closed by the garbage collector at any time.
    """
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
    return found


def tree(directory: Path) -> list[str]:
    """Every file and every empty directory below a directory, by relative path, in order."""
    return sorted(
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir())
    )


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """Whoever runs the tests, what is done here is done as an ordinary user."""
    if sys.platform != "win32" and IS_ROOT:
        os.seteuid(NOBODY)
        try:
            yield
        finally:
            os.seteuid(0)
    else:
        yield


@contextlib.contextmanager
def ordinary_folder() -> Iterator[Path]:
    """A directory that belongs to the ordinary user of `without_privileges`."""
    with tempfile.TemporaryDirectory(prefix="path-") as name:
        if sys.platform != "win32" and IS_ROOT:
            os.chown(name, NOBODY, -1)
        yield Path(name)


@contextlib.contextmanager
def mounted_tmpfs(where: Path, size: str) -> Iterator[None]:
    """A small file system of its own. Only root may mount one."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0755", "none", str(where)]
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(where)], check=True, timeout=PATIENCE)


@functools.cache
def can_mount() -> bool:
    """Whether this process may mount file systems."""
    if not IS_ROOT:
        return False
    with tempfile.TemporaryDirectory(prefix="path-") as name:
        try:
            with mounted_tmpfs(Path(name), "64k"):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


class Desk:
    """One watched folder and one vault. Each method takes a picture one stage further."""

    def __init__(self, directory: Path, *, staging: Path | None = None) -> None:
        """Lay out ``directory/drop`` and ``directory/vault``, where they are not there yet."""
        self.folder = directory / "drop"
        self.folder.mkdir(exist_ok=True)
        self.key = FolderKey(str(self.folder))
        self.root = Root(self.folder, staging)
        self.vault = Vault(directory / "vault", NO_RESERVE)
        if not self.vault.exists():
            self.vault.create(VaultInfo(VAULT_ID, {KEY.key_id: key_check(KEY, VAULT_ID)}))
        self.hands = ExitStack()

    def drop(self, relpath: str = "a.jpg", content: bytes = PICTURE) -> Path:
        """Put a picture into the folder."""
        path = self.folder / relpath
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def staged_path(self, job: Job) -> Path:
        """Where a job's file lies once it is claimed."""
        return self.root.staging_path / job.object_id / job.relpath

    def job(self, relpath: str = "a.jpg", *, object_id: ObjectId | None = None) -> Job:
        """A job for a picture as it lies there now."""
        identity = Identity.of(os.lstat(self.folder / relpath))
        seen = time.time_ns()
        return Job(object_id or new_id(), self.key, relpath, identity, Proof.LEASE, 1, seen)

    def held(self, job: Job) -> Held:
        """Take a job's file in hand."""
        return hold(job, self.root, self.hands)

    def inspected(self, job: Job) -> Inspected:
        """The same, with what an inspector may have said."""
        return Inspected(self.held(job), Inspection(Label.IMAGE, "JPEG", 4, 3))

    def claimed(self, job: Job, *, move: bool = True) -> Claimed:
        """Claim it, or with ``move=False`` have it sealed where it lies."""
        return claim(self.inspected(job), self.root, self.hands, move=move)

    def sealed(self, claimed: Claimed) -> Sealed:
        """Seal it."""
        return seal(claimed, keys=KEYS, vault_id=VAULT_ID, beat=lambda: None)

    def staged(self, job: Job, *, move: bool = True) -> Staged:
        """Write its object under a temporary name."""
        return self.vault.stage(self.sealed(self.claimed(job, move=move)))

    def verify(self, staged: Staged, *, from_device: bool = True) -> Verified:
        """Read the object back."""
        return verify(
            staged, keys=KEYS, vault_id=VAULT_ID, from_device=from_device, beat=lambda: None
        )

    def verified(self, job: Job, *, move: bool = True) -> Verified:
        """All of it up to the object that was read back."""
        return self.verify(self.staged(job, move=move))

    def committed(self, job: Job, *, move: bool = True) -> Committed:
        """All of it up to the object under its final name."""
        [outcome] = commit([(self.vault, self.verified(job, move=move))])
        assert not isinstance(outcome, Exception), outcome
        return outcome

    def erasure(
        self, committed: Committed, *, keep: bool = False, move_to: Path | None = None
    ) -> Erasure:
        """What the policy wants done with its plaintext."""
        return Erasure(committed, self.root, keep=keep, move_to=move_to)

    def opened(self, object_id: ObjectId) -> bytes:
        """The picture that an object holds."""
        with self.vault.object_path(object_id).open("rb") as stream:
            opened = open_object(stream, [KEY], expect=object_id, vault_id=VAULT_ID)
            return b"".join(bytes(piece) for piece in opened.body())

    def let_go(self) -> None:
        """Give back every descriptor and every lease, as the end of the process would."""
        self.hands.close()


@contextlib.contextmanager
def desk_in(directory: Path) -> Iterator[Desk]:
    """Give a desk and tidy up after it."""
    desk = Desk(directory)
    try:
        yield desk
    finally:
        desk.let_go()
