"""Takes one safeguard out of the program at a time, and asks the rigs whether they notice.

Each mutation is made in a copy of the program, and the rig that has to find it is run on that. A
rig that finds nothing proves nothing.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

HOME: Final = Path(__file__).parents[2]
PATIENCE: Final = 900.0

POWER: Final = ("power_loss.py", "--states", "200", "--model", "weak", "--scenario")
KILL: Final = ("kill_every_call.py", "--workers", "1", "--variant", "once", "--only")
RACE: Final = ("race_every_call.py", "--variant")


@dataclass(frozen=True, slots=True)
class Mutation:
    """One safeguard: where it stands, what stands there without it, and who has to notice."""

    what: str
    module: str
    before: str
    after: str
    finder: tuple[str, ...]
    also: tuple[tuple[str, str, str], ...] = ()
    """What does the same a second time, and has to go as well."""


MUTATIONS: Final = (
    Mutation(
        "an object is not synced before it is verified",
        "vault.py",
        "                    write(fd)\n                    os.fsync(fd)",
        "                    write(fd)",
        (*POWER, "drain"),
    ),
    Mutation(
        "the directory of an object's final name is not synced",
        "vault.py",
        "synced = {shard: _outcome(kernel.sync_path, shard) for shard in shards}",
        "synced = {shard: None for shard in shards}",
        (*POWER, "drain"),
    ),
    Mutation(
        "the directory is not synced after a deletion",
        "erase.py",
        "            kernel.sync_directory(fd)\n    return outcomes",
        "            fd = fd\n    return outcomes",
        (*POWER, "drain"),
    ),
    Mutation(
        "the audit log is not synced before a deletion",
        "audit.py",
        "        os.fsync(self._log)\n",
        "",
        (*POWER, "drain"),
    ),
    Mutation(
        "the first head of the audit log is not synced",
        "audit.py",
        "                os.fsync(self._head)\n",
        "                pass\n",
        (*POWER, "key init, drain"),
    ),
    Mutation(
        "vault.json is not synced",
        "vault.py",
        '            file.write(text + "\\n")\n            file.flush()\n            os.fsync(fd)',
        '            file.write(text + "\\n")\n            file.flush()',
        (*POWER, "key rotate"),
    ),
    Mutation(
        "the directory of vault.json is not synced",
        "vault.py",
        '        os.replace(temporary, self.path / "vault.json")\n'
        "        kernel.sync_path(self.path)",
        '        os.replace(temporary, self.path / "vault.json")',
        (*POWER, "key rotate"),
    ),
    Mutation(
        "a new vault's own name is not synced",
        "vault.py",
        "            kernel.sync_above(self.path)\n",
        "",
        (*POWER, "key init, drain"),
    ),
    Mutation(
        "the key file is not synced",
        "secretline.py",
        '        stream.write(f"{line}\\n".encode("ascii"))\n'
        "        stream.flush()\n        os.fsync(fd)",
        '        stream.write(f"{line}\\n".encode("ascii"))\n        stream.flush()',
        (*POWER, "key init, drain"),
    ),
    Mutation(
        "the directory of the key file is not synced",
        "keys.py",
        "            kernel.sync_path(self.path.parent)\n",
        "",
        (*POWER, "key init, drain"),
    ),
    Mutation(
        "the directory of a replaced object is not synced",
        "vault.py",
        "        kernel.sync_path(final.parent)\n",
        "",
        (*POWER, "key retire"),
    ),
    Mutation(
        "a moved picture's new directory is not synced before its old name goes",
        "erase.py",
        "                break\n        kernel.sync_directory(fd)",
        "                break",
        (*POWER, "after: move"),
    ),
    Mutation(
        "a restored file is not synced",
        "restore.py",
        "                os.fsync(self._fd)\n",
        "",
        (*POWER, "vault restore"),
    ),
    Mutation(
        "nothing is read back",
        "verify.py",
        "        _compare(opened.body(), held.fd, beat)\n",
        "",
        (*RACE, "leased", "--action", "temporary object flipped at its end"),
    ),
    Mutation(
        "what is read back is authenticated, and not compared",
        "verify.py",
        "        _compare(opened.body(), held.fd, beat)\n",
        "        for _piece in opened.body():\n            beat()\n",
        ("test_verify_and_erase.py",),
    ),
    Mutation(
        "the file in hand is not compared any more behind the claim",
        "verify.py",
        "    refuse_if_changed(held, claimed.identity)\n",
        "",
        (*RACE, "in place unleased", "--action", "append"),
        also=(("erase.py", "    _refuse_if_swapped(claimed)\n", ""),),
    ),
    Mutation(
        "the name is not compared before it is unlinked",
        "erase.py",
        "    _refuse_if_swapped(claimed)\n",
        "",
        (*RACE, "in place", "--action", "replace"),
    ),
    Mutation(
        "the lease is not asked for before the name is unlinked",
        "erase.py",
        "    refuse_if_changed(claimed.inspected.held, claimed.identity)\n",
        "",
        (*RACE, "leased", "--action", "claimed file appended to"),
    ),
    Mutation(
        "the file in hand need not be the one that settled",
        "hold.py",
        "    if claimed is None and identity != job.identity:",
        "    if False:",
        ("test_hold_and_claim.py",),
    ),
    Mutation(
        "a file with a second name is taken",
        "hold.py",
        "    if passed is not None:",
        "    if False:",
        ("test_hold_and_claim.py",),
    ),
    Mutation(
        "an object's final name is overwritten where it is taken",
        "vault.py",
        "            kernel.rename_noreplace(\n                source.name, target.name,"
        " source_dir=source_dir, target_dir=target_dir\n            )",
        "            os.replace(source, target)",
        (*RACE, "leased", "--action", "another object under the final name"),
    ),
    Mutation(
        "a claim does not look at what it moved",
        "claim.py",
        "    if not moved.same_content(held.identity):",
        "    if False:",
        ("test_hold_and_claim.py",),
    ),
    Mutation(
        "nothing is claimed: every picture is sealed where it lies",
        "claim.py",
        "if move and root.staging is not None else None",
        "if False else None",
        (*RACE, "leased", "--action", "replace", "--action", "swap with bystander"),
    ),
    Mutation(
        "an object that was found counts without being verified",
        "pipeline.py",
        "            return self._verify(staged, place)\n        except (Tampered",
        "            return Verified(staged)\n        except (Tampered",
        (*RACE, "leased", "--action", "another object under the final name"),
    ),
    Mutation(
        "the plaintext goes before its object has its final name",
        "pipeline.py",
        "            committed = self._sort_out(tasks, commit(",
        "            erase([_erasure(task, Committed(task.verified, Path()))"
        " for task in tasks])\n            committed = self._sort_out(tasks, commit(",
        (*KILL, "drain, one worker"),
    ),
    Mutation(
        "the plaintext goes before it is on record",
        "pipeline.py",
        "            on_record = self._attempt(_sealed, committed, faults, durable=True)  # (8)\n",
        "            on_record = committed\n",
        (*KILL, "drain, one worker"),
    ),
    Mutation(
        "claimed files are not taken up again",
        "recovery.py",
        "        if is_object_id(name) and _adopt("
        "folder, root, jobs, name, State.QUEUED, move_to):",
        "        if False:",
        (*KILL, "drain, one worker"),
    ),
    Mutation(
        "what lies under tmp is not removed",
        "vault.py",
        '            _unlink(self.path / "tmp" / name)\n        return len(names)',
        "            pass\n        return len(names)",
        (*KILL, "jobs"),
    ),
    Mutation(
        "an object that was committed before is not looked for",
        "pipeline.py",
        "        if found is not None:\n",
        "        if False:\n",
        (*KILL, "drain, one worker"),
    ),
    Mutation(
        "a torn line of the audit log is not accounted for",
        "audit.py",
        "        elif torn:\n            self._write(",
        "        elif False:\n            self._write(",
        (*KILL, "drain, one worker"),
    ),
)


def edits(mutation: Mutation) -> tuple[tuple[str, str, str], ...]:
    """Module, what stands there, and what shall: every edit that it takes."""
    return ((mutation.module, mutation.before, mutation.after), *mutation.also)


def mutated(source: str, before: str, after: str) -> str:
    """A module without a safeguard.

    Raises:
        ValueError: it does not stand there, or more than once.
    """
    if source.count(before) != 1:
        raise ValueError(f"it stands there {source.count(before)} times: {before}")
    return source.replace(before, after)


def command(finder: tuple[str, ...], home: Path) -> list[str]:
    """How a rig, or a file of tests, is run on the program in ``home``."""
    name, *options = finder
    if name.startswith("test_"):
        pytest = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider"]
        return [*pytest, "--rootdir", str(home), str(home / "tests" / name), *options]
    return [sys.executable, str(home / "tests" / "campaigns" / name), *options]


@dataclass(frozen=True, slots=True)
class Result:
    """What a rig said to a mutation."""

    mutation: Mutation
    noticed: bool
    seconds: float
    words: str


def attempt(mutation: Mutation) -> Result:
    """Run the finder on a program without that safeguard."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for directory in ("secimg_watch", "tests", "config", "systemd"):
            ignored = shutil.ignore_patterns("__pycache__", "vectors")
            shutil.copytree(HOME / directory, copy / directory, ignore=ignored)
        shutil.copy(HOME / "pyproject.toml", copy)
        for file, before, after in edits(mutation):
            module = copy / "secimg_watch" / file
            text = mutated(module.read_text("utf-8"), before, after)
            module.write_text(text, encoding="utf-8")
        done = subprocess.run(
            command(mutation.finder, copy),
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=PATIENCE,
        )
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    violations = [line for line in lines if line.startswith(("VIOLATION", "FAILED"))]
    words = next(iter(violations or lines[-1:]), "")
    return Result(mutation, done.returncode == 1, time.monotonic() - started, words)


def say(line: str) -> None:
    """One line, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    """Try every mutation; exit 1 where one was not noticed."""
    parser = argparse.ArgumentParser(description="take out one safeguard at a time")
    parser.add_argument("--only", default="", help="mutations with this in their name or module")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    asked = parser.parse_args()
    chosen = [m for m in MUTATIONS if asked.only in f"{m.module} {m.what}"]
    missed = 0
    with concurrent.futures.ThreadPoolExecutor(asked.workers) as pool:
        for result in pool.map(attempt, chosen):
            rig = " ".join(result.mutation.finder)
            verdict = "noticed" if result.noticed else "NOT NOTICED"
            say(f"{verdict:11} {result.mutation.what} [{rig}] {result.seconds:.0f} s")
            say(f"            {result.words[:300]}")
            missed += not result.noticed
    say(f"{len(chosen)} safeguards taken out, {missed} not noticed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
