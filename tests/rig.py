"""A small site for rigs that stop, fail or kill the service at its file-system calls.

Everything happens by the command line's own code, in forked children of one process: no start of
an interpreter for each of thousands of runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secimg_watch import tracer
from secimg_watch.cli import cli
from secimg_watch.gate import check_keys
from secimg_watch.keys import provider_for
from secimg_watch.quantities import Reserve
from secimg_watch.seal import open_object
from secimg_watch.vault import Vault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from secimg_watch.records import ObjectId

STAGING = ".secimg-watch"


def small_pictures(count: int = 2, size: int = 40_000) -> dict[str, bytes]:
    """Pictures, as far as a signature goes, each with bytes of its own; every second below "b"."""
    head = b"\xff\xd8\xff\xe0\0\x10JFIF\0"
    return {
        f"{'b/' if number % 2 else ''}{number}.jpg": head + os.urandom(size)
        for number in range(count)
    }


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory in memory where there is such a place; rigs that need a disk name their own."""
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


@dataclass(slots=True)
class Rig:
    """One folder, one vault, a key file and a state directory below ``top``."""

    top: Path
    workers: int = 1
    folder: dict[str, Any] = field(default_factory=dict)
    """What the folder's policy says besides path and vault; indifferent to content by default,
    so that no decoder has to be started for each run."""
    policy: dict[str, Any] = field(default_factory=dict)
    """What the policy says besides."""

    @property
    def drop(self) -> Path:
        """The watched folder."""
        return self.top / "drop"

    @property
    def vault(self) -> Path:
        """The vault's directory."""
        return self.top / "vault"

    @property
    def state(self) -> Path:
        """The state directory."""
        return self.top / "state"

    @property
    def policy_path(self) -> Path:
        """The policy file."""
        return self.top / "policy.yaml"

    def build(self) -> None:
        """Write the policy, and make key and vault."""
        self.top.mkdir(parents=True, exist_ok=True)
        self.drop.mkdir()
        self.write_policy()
        assert self.run_here("key", "init") == 0

    def write_policy(self) -> None:
        """Write the policy file; every JSON text is YAML."""
        indifferent = {"not_image": "encrypt", "undecodable": "encrypt", "preview": 0}
        place = {"path": str(self.drop), "vault": "main", "settle": "0s"}
        policy = {
            "version": 1,
            "state": str(self.state),
            "vaults": {"main": {"path": str(self.vault), "min_free": 0}},
            "key": {"provider": "file", "file": str(self.top / "key")},
            "recovery": "declined",
            "workers": self.workers,
            "folders": [{**place, **indifferent, **self.folder}],
            **self.policy,
        }
        self.policy_path.write_text(json.dumps(policy), encoding="utf-8")

    def reset(self, pictures: dict[str, bytes]) -> None:
        """As it was when built, with these pictures in the folder."""
        shutil.rmtree(self.state, ignore_errors=True)
        shutil.rmtree(self.drop)
        for directory in ("tmp", "rekey"):
            shutil.rmtree(self.vault / directory, ignore_errors=True)
        (self.vault / "tmp").mkdir(mode=0o700)
        for path in self.vault.glob("objects/??/*"):
            path.unlink()
        self.drop.mkdir()
        self.put(pictures)

    def put(self, pictures: dict[str, bytes]) -> None:
        """Place pictures in the folder."""
        for relpath, content in pictures.items():
            path = self.drop / relpath
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    # -- running ---------------------------------------------------------------------------

    def run_here(self, *words: str) -> int:
        """Run a command in this very process; gives its exit code. Its output goes nowhere."""
        sink = io.StringIO()
        with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            return self._command(words)

    def _command(self, words: Sequence[str]) -> int:
        try:
            cli.main(["--policy", str(self.policy_path), *words])
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)

    def traced(
        self,
        words: Sequence[str],
        decide: Callable[[tracer.Call], tracer.Decision] = lambda _call: None,
        **options: Any,
    ) -> tuple[tracer.Outcome, str]:
        """Run a command in a traced process; gives how it ended, and what it wrote."""
        with tempfile.TemporaryFile() as output:

            def work() -> int:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                sys.stdout = os.fdopen(1, "w", closefd=False)
                sys.stderr = os.fdopen(2, "w", closefd=False)
                return self._command(words)

            outcome = tracer.trace(work, decide, **options)
            output.seek(0)
            return outcome, output.read().decode("utf-8", "replace")

    # -- the promise -----------------------------------------------------------------------

    def plaintexts(self) -> dict[str, bytes]:
        """Everything that lies in clear, claimed and quarantined files among it."""
        return {
            str(path.relative_to(self.drop)): path.read_bytes()
            for path in self.drop.rglob("*")
            if path.is_file() and not path.is_symlink()
        }

    def sealed(self) -> dict[ObjectId, bytes]:
        """What each object under its final name holds, opened with the stored key.

        Raises:
            SecimgError: one does not open: that alone breaks a promise.
        """
        vault = Vault(self.vault, Reserve(0.0, 0))
        ring = provider_for("file", "a/b", file=self.top / "key").load_ring()
        vault_id = check_keys(vault, ring).vault_id
        found = {}
        for object_id in vault.object_ids():
            with vault.object_path(object_id).open("rb") as stream:
                opened = open_object(stream, ring, expect=object_id, vault_id=vault_id)
                opened.preview()
                found[object_id] = b"".join(map(bytes, opened.body()))
        return found

    def lost(self, pictures: dict[str, bytes]) -> list[str]:
        """Which of these pictures exist neither in clear nor sealed."""
        there = {_digest(content) for content in self.plaintexts().values()}
        there |= {_digest(content) for content in self.sealed().values()}
        return [name for name, content in pictures.items() if _digest(content) not in there]

    def unfinished(self, pictures: dict[str, bytes], *, duplicates: int = 0) -> list[str]:
        """What is wrong after a healthy run to the end: sealed once, nothing left of the rest."""
        faults = [f"lost: {name}" for name in self.lost(pictures)]
        faults += [f"in clear: {name}" for name in self.plaintexts()]
        faults += [f"left in tmp: {name}" for name in os.listdir(self.vault / "tmp")]
        staging = self.drop / STAGING
        if staging.exists():
            faults += [f"left in staging: {name}" for name in os.listdir(staging)]
        sealed = sorted(_digest(content) for content in self.sealed().values())
        wanted = sorted(_digest(content) for content in pictures.values())
        if set(sealed) - set(wanted):
            faults.append("an object holds what nobody wrote")
        if len(sealed) > len(wanted) + duplicates:
            faults.append(f"{len(sealed)} objects for {len(wanted)} pictures")
        return faults


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
