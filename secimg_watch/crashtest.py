"""The promise put to the test on a file system: the service dies anywhere, and nothing is lost.

In a directory of its own a service with a folder, a vault and a key of its own seals a few files
that look like pictures. It is killed before one of its calls that change the disk; what lies
there then is compared with what must hold at any instant. Then it runs undisturbed, and has to
finish. That is done at as many places of the run as there is time for, or at all of them.

A kill takes the process alone. What the kernel has not written yet survives it, so nothing here
shows what a power cut leaves.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import stat
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from secimg_watch import kernel, keys, policyfile, tracer
from secimg_watch.audit import verify_log
from secimg_watch.errors import (
    CannotCreateError,
    NoInputError,
    NotAllowedError,
    NotReadyError,
    SecimgError,
    StorageError,
    UsageError,
)
from secimg_watch.gate import admit_keys
from secimg_watch.policy import parse_policy
from secimg_watch.seal import open_object
from secimg_watch.selection import STAGING_NAME
from secimg_watch.service import Service, open_vaults

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from secimg_watch.policy import Policy
    from secimg_watch.records import KeyEncryptionKey, ObjectId
    from secimg_watch.report import Report
    from secimg_watch.tracer import Call, Decision, Outcome
    from secimg_watch.vault import Vault

SECONDS: Final = 10.0
"""How long a test takes that is not told how many places to try."""

_PICTURES: Final = {"small.jpg": 30_000, "deeper/large.jpg": 150_000}  # the latter in pieces
_JPEG: Final = b"\xff\xd8\xff\xe0\0\x10JFIF\0"
_MEMORY: Final = "/dev/shm"  # noqa: S108 - only ever used through mkdtemp
_PATIENCE: Final = 120.0  # seconds for one run; then it counts as one that does not end

# Which argument of a call is a path. The other calls have a descriptor first.
_PATHS: Final = {
    **dict.fromkeys(("open", "rename", "mkdir", "rmdir", "link", "unlink"), 0),
    **dict.fromkeys(("openat", "renameat", "renameat2", "mkdirat", "linkat", "unlinkat"), 1),
}


@dataclass(frozen=True, slots=True)
class FileSystem:
    """What a file system offers of that which the service makes use of."""

    type: str  # as in mountinfo; "" where not known
    leases: bool
    exclusive_rename: bool  # otherwise an object gets its name by link and unlink
    directory_sync: bool


@dataclass(frozen=True, slots=True)
class Violation:
    """Where the service was killed, and what was wrong after it.

    ``number`` counts the calls that change the disk; 0 where the service was not killed at all.
    """

    number: int
    call: str
    subject: str  # the path of the call, as far as it could be read
    faults: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Findings:
    """What a test has shown."""

    directory: str
    file_system: FileSystem
    places: int  # calls that change the disk, in an undisturbed run
    killed: int  # at how many of them
    violations: tuple[Violation, ...]  # the first one ends the test
    kept: str | None  # what a violation left, to be looked at
    seconds: float


def crash_test(
    directory: Path,
    *,
    places: int | None,
    seconds: float | None,
    show: Callable[[int, int | None], None],
) -> Findings:
    """Kill a service in ``directory`` again and again, and check what it leaves.

    To be called in a process with one thread and no children. Where there is a violation, what
    it left is kept, without the key; all else is removed.

    Args:
        directory: where, on the file system that is to be tried.
        places: how many places to try, spread over the run; ``None``: as many as there is time.
        seconds: how long it may take. ``None`` for both: at every call, until a run gets through.
        show: told how many places were tried, and of how many.

    Raises:
        NoInputError, NotAllowedError: the directory is not there, cannot be looked at, or is one
            where others may rename what is made.
        UsageError: a policy cannot name it.
        CannotCreateError: it cannot be written.
        NotReadyError: tracing is not allowed, or the service cannot work there undisturbed.
        StorageError: the system failed what the test itself does.
    """
    started = time.monotonic()
    if not tracer.is_supported():
        raise NotReadyError("only Linux on x86-64 or aarch64 lets a process be killed at its calls")
    top = _make_directory(directory)
    violation = None
    try:
        with _private_directory() as private:
            test = _Test(_Site(top, Path(private) / "key"), show)
            violation = test.run(places, None if seconds is None else started + seconds)
        file_system = _look_at(top, exclusive_rename=test.exclusive_rename)
    except OSError as error:
        raise StorageError(f"the test in {directory} failed: {error.strerror}") from error
    finally:
        if violation is None:
            shutil.rmtree(top)
    return Findings(
        directory=str(directory),
        file_system=file_system,
        places=test.places,
        killed=test.killed,
        violations=() if violation is None else (violation,),
        kept=None if violation is None else str(top),
        seconds=round(time.monotonic() - started, 1),
    )


def _make_directory(directory: Path) -> Path:
    real = os.path.realpath(directory)
    try:
        real.encode()
    except UnicodeEncodeError:
        message = f"the path {directory} is not valid Unicode, which a policy must be"
        raise UsageError(message) from None
    try:
        is_directory = stat.S_ISDIR(os.stat(real).st_mode)
    except PermissionError:
        raise NotAllowedError(f"{directory} cannot be looked at: permission denied") from None
    except OSError as error:
        raise NoInputError(f"{directory} cannot be used: {error.strerror}") from error
    if not is_directory:
        raise NoInputError(f"{directory} is not a directory")
    _refuse_shared(Path(real))
    try:
        # A service that watches this very directory takes the suffix for a producer's: without
        # it, what is tried here would end in somebody's vault.
        return Path(tempfile.mkdtemp(".tmp", "secimg-watch-crash-test-", real))
    except OSError as error:
        message = f"nothing can be made in {directory}: {error.strerror}"
        raise CannotCreateError(message, hint="choose a directory that you may write") from error


def _refuse_shared(directory: Path) -> None:
    """Refuse a place where somebody else can put another directory under the name of ours.

    The service and what clears up behind it go by paths: they could be led into another vault.
    """
    user = getattr(os, "geteuid", int)()
    for each in (directory, *directory.parents):
        status = os.stat(each)
        shared = status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX
        if shared or status.st_uid not in {0, user}:
            raise NotAllowedError(
                f"others can rename what is made in {each}",
                hint="choose a directory that is yours alone, on the same file system",
            )


def _private_directory() -> tempfile.TemporaryDirectory[str]:
    # For the key: in memory, so that nothing of it is left on a disk whatever happens.
    place = _MEMORY if os.access(_MEMORY, os.W_OK | os.X_OK) else None
    return tempfile.TemporaryDirectory(prefix="secimg-watch-crash-test-", dir=place)


def _look_at(top: Path, *, exclusive_rename: bool) -> FileSystem:
    return FileSystem(
        type=kernel.file_system_type(top),
        leases=_grants_leases(top / "policy.yaml"),
        exclusive_rename=exclusive_rename,
        directory_sync=_syncs_directories(top),
    )


def _grants_leases(file: Path) -> bool:
    fd = os.open(file, kernel.PICTURE)
    try:
        return kernel.take_read_lease(fd) is kernel.Lease.GRANTED
    finally:
        os.close(fd)


def _syncs_directories(directory: Path) -> bool:
    fd = os.open(directory, kernel.DIRECTORY)
    try:
        os.fsync(fd)  # not by way of kernel.py, where it is no fault that this cannot be done
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


class _Test:
    """One test: which places are tried, and what is found at each."""

    def __init__(self, site: _Site, show: Callable[[int, int | None], None]) -> None:
        self._site = site
        self._show = show
        self._got_through = False
        self.places = 0
        self.killed = 0
        self.exclusive_rename = False

    def run(self, places: int | None, deadline: float | None) -> Violation | None:
        """Try place after place; gives the first violation."""
        violation = self._undisturbed()
        every = places is None and deadline is None
        started = time.monotonic()
        for number in itertools.count(1) if every else _spread(self.places):
            if violation is not None or self._is_done(number, places, deadline):
                break
            violation = self._killed_at(number)
            elapsed = time.monotonic() - started
            self._show(self.killed, self._expected(places, deadline, elapsed))
        return violation

    def _is_done(self, number: int, places: int | None, deadline: float | None) -> bool:
        if deadline is not None:
            return self.killed > 0 and time.monotonic() >= deadline
        if places is not None:
            return self.killed == places
        # Runs differ by a few calls, so one that gets through early is no end yet.
        return self._got_through and number > self.places

    def _expected(self, places: int | None, deadline: float | None, elapsed: float) -> int:
        if deadline is None:
            return min(self.places, places or self.places)
        left = max(0.0, deadline - time.monotonic())
        return min(self.places, self.killed + int(left / max(elapsed, 1e-3) * self.killed))

    def _undisturbed(self) -> Violation | None:
        trap = _Trap(None)
        faults, words = self._site.finish(self._site.begin(), trap)
        self._count(trap)
        self.exclusive_rename = trap.exclusive_rename
        if words or not trap.reached:
            reason = words or "no system call stopped for its tracer"
            raise NotReadyError(f"the service does not get through undisturbed here: {reason}")
        return Violation(0, "", "", tuple(faults)) if faults else None

    def _killed_at(self, number: int) -> Violation | None:
        pictures = self._site.begin()
        trap = _Trap(number)
        outcome, words = self._site.drain(trap)
        self._count(trap)
        faults = []
        if trap.sprung:
            self.killed += 1
        elif outcome.code:
            faults.append(f"a run that was not disturbed did not end well: {words}")
        faults = faults or self._site.check(pictures)
        if not faults:
            faults, words = self._site.finish(pictures, _Trap(None))
            if words:
                faults.append(f"the run after it did not end well: {words}")
        if not faults:
            return None
        return Violation(number if trap.sprung else 0, trap.call, trap.subject, tuple(faults))

    def _count(self, trap: _Trap) -> None:
        self._got_through = not trap.sprung
        self.places = max(self.places, trap.reached)


def _spread(count: int) -> Iterator[int]:
    """1 to ``count``, each once; wherever one stops, what came is spread over the whole."""
    digits = count.bit_length()
    for number in range(1 << digits):
        place = int(f"{number:0{digits}b}"[::-1], 2)
        if place < count:
            yield place + 1


class _Trap:
    """Kills a run before its n-th call that changes the disk; with ``None`` it only counts."""

    def __init__(self, number: int | None) -> None:
        self._number = number
        self.reached = 0  # calls that the run came to
        self.sprung = False
        self.call = ""
        self.subject = ""
        self.exclusive_rename = False

    def decide(self, call: Call) -> Decision:
        if self.sprung or not call.changes:
            return None
        self.reached += 1
        if self.reached == self._number:
            self.sprung, self.call, self.subject = True, call.name, _subject(call)
            return tracer.Kill()
        return tracer.Watch() if call.name == "renameat2" else None

    def returned(self, _call: Call, value: int) -> None:
        self.exclusive_rename = self.exclusive_rename or value == 0


def _subject(call: Call) -> str:
    """The path that a call is about; "" where that cannot be seen, as by who is not root."""
    try:
        if call.name in _PATHS:
            return os.fsdecode(call.text(_PATHS[call.name]))
        return os.readlink(f"/proc/{call.thread}/fd/{call.args[0]}")
    except OSError:
        return ""


class _Site:
    """A folder, a vault and a state directory below ``top``, and a key elsewhere."""

    def __init__(self, top: Path, key: Path) -> None:
        self._drop = top / "drop"
        self._state = top / "state"
        self._policy = self._write_policy(top, key)
        provider = keys.provider_for("file", self._policy.key.name, file=key)
        provider.store(keys.generate())
        self._ring: tuple[KeyEncryptionKey, ...] = provider.load_ring()
        self._vault: Vault = open_vaults(self._policy)["main"]
        self._vault_id = admit_keys(self._vault, self._ring).vault_id

    def _write_policy(self, top: Path, key: Path) -> Policy:
        folder = {
            "path": str(self._drop),
            "settle": "0s",
            "proof": "rename",  # they are whole; without leases the others would take long
            # Whatever it is, it is sealed: no decoder has to be started for each run.
            "not_image": "encrypt",
            "undecodable": "encrypt",
            "preview": 0,
        }
        policy = {
            "version": 1,
            "state": str(self._state),
            "vaults": {"main": {"path": str(top / "vault"), "min_free": "0B"}},
            "key": {"provider": "file", "file": str(key)},
            "recovery": "declined",
            "workers": 1,  # so that a number means the same place in nearly every run
            "folders": [folder],
        }
        text = policyfile.dump(policy)
        path = top / "policy.yaml"
        path.write_text(text, encoding="utf-8")
        return parse_policy(text, str(path))

    def begin(self) -> dict[str, bytes]:
        """Make everything as it was, and put pictures into the folder; gives these."""
        for directory in (self._drop, self._state):
            if directory.exists():
                shutil.rmtree(directory)
        for object_id in self._vault.object_ids():
            os.unlink(self._vault.object_path(object_id))
        pictures = {name: _JPEG + os.urandom(size) for name, size in _PICTURES.items()}
        for name, content in pictures.items():
            path = self._drop / name
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.write_bytes(content)
        return pictures

    def drain(self, trap: _Trap) -> tuple[Outcome, str]:
        """Take everything, in a traced process; gives how it ended, and its last words."""
        with tempfile.TemporaryFile() as output:
            outcome = tracer.trace(
                lambda: _drain(self._policy, output),
                trap.decide,
                returned=trap.returned,
                seconds=_PATIENCE,
            )
            output.seek(0)
            lines = output.read().decode("utf-8", "replace").splitlines()
        if outcome.timed_out:
            return outcome, f"it took longer than {_PATIENCE:g} s"
        words = next((line for line in reversed(lines) if line.strip()), "")
        return outcome, words or f"exit code {outcome.code}"

    def finish(self, pictures: dict[str, bytes], trap: _Trap) -> tuple[list[str], str]:
        """Run undisturbed; gives what is not as it must be then, and why it did not end well."""
        outcome, words = self.drain(trap)
        faults = self.check(pictures)
        faults += [f"{name} is left in clear" for name in self._in_clear()]
        sealed = Counter(name for name, _ in self._sealed([]).values())
        faults += [f"{name} was sealed {n} times" for name, n in sealed.items() if n > 1]
        faults += [f"{name} is left in tmp" for name in _names(self._vault.path / "tmp")]
        faults += [f"{name} is left in staging" for name in _names(self._drop / STAGING_NAME)]
        faults += self._faults_on_record()
        return faults, words if outcome.code else ""

    def check(self, pictures: dict[str, bytes]) -> list[str]:
        """What is not as it must be at any instant."""
        faults: list[str] = []
        sealed = set(self._sealed(faults).values())
        in_clear = set(self._in_clear().values())
        for name, content in pictures.items():
            if content not in in_clear and (name, content) not in sealed:
                faults.append(f"{name} is lost: it is whole neither in clear nor in the vault")
        faults += [
            f"an object holds what was never there, by the name {name}"
            for name, content in sealed - set(pictures.items())
        ]
        return faults

    def _faults_on_record(self) -> list[str]:
        try:
            return [f"the audit log: {f}" for f in verify_log(self._state, self._ring).faults]
        except SecimgError as error:
            return [f"the audit log: {error}"]

    def _in_clear(self) -> dict[str, bytes]:
        """Every file of the folder, claimed ones too."""
        return {
            str(path.relative_to(self._drop)): path.read_bytes()
            for path in self._drop.rglob("*")
            if path.is_file()
        }

    def _sealed(self, faults: list[str]) -> dict[ObjectId, tuple[str, bytes]]:
        """Name and content of every object; one that does not open is a fault."""
        found = {}
        for object_id in self._vault.object_ids():
            try:
                found[object_id] = self._open(object_id)
            except SecimgError as error:
                faults.append(f"object {object_id} cannot be restored: {error}")
        return found

    def _open(self, object_id: ObjectId) -> tuple[str, bytes]:
        with open(self._vault.object_path(object_id), "rb", buffering=0) as stream:
            opened = open_object(stream, self._ring, expect=object_id, vault_id=self._vault_id)
            name = os.fsdecode(os.path.join(opened.meta.folder, opened.meta.name))
            opened.preview()
            return name, b"".join(map(bytes, opened.body()))


def _names(directory: Path) -> Iterable[str]:
    with contextlib.suppress(FileNotFoundError):
        return os.listdir(directory)
    return ()


def _drain(policy: Policy, output: IO[bytes]) -> int:
    """What the traced process does: all of ``drain``; its last words go to ``output``."""
    # Whoever breaks the test off does that to the tracer, and this process ends with it.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    for standard in (1, 2):
        os.dup2(output.fileno(), standard)
    sys.stdout = sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - until the end
    kernel.protect_memory()
    try:
        why = _drained(policy)
        code = NotReadyError.exit_code if why else 0
    except SecimgError as error:
        why, code = str(error), error.exit_code
    sys.stderr.write(f"{why}\n")
    return code


def _drained(policy: Policy) -> str:
    service = Service(policy, native=False)
    try:
        service.open()
        service.drain(lambda _done, _total: None)
        return _unfinished(service.report(running=False))
    finally:
        service.stop()
        service.close()


def _unfinished(report: Report) -> str:
    for folder in report.folders:
        left = folder.waiting + folder.queued + folder.quarantined + folder.undeletable
        if left or folder.health in {"gone", "paused"}:
            return folder.reason or f"{left} pictures are not sealed, or not deleted"
    return ""
