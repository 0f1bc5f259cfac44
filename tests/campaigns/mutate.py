"""Takes one safeguard out of the program at a time, and asks the rigs whether they notice.

Each mutation is made in a copy of the program, and the rig that has to find it is run on that. A
rig that finds nothing proves nothing. Nor does one that finds a program which does not run: a
violation that speaks of a `NameError` or the like counts as an accident. ``--control`` runs each
rig on the program as it is, where it has to find nothing.

There is a mutation for each sync of the data path, but for those that are made for no promise:
`crashtest.py` only asks whether directories can be synced. Not synced at all are claims, what goes
into quarantine, and rows of the queue: a power cut that takes them back leaves a file where it is
found again, at the cost of an object too many at most.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
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

POWER: Final = (
    *("power_loss.py", "--first", "--seed", "1", "--states", "200", "--model", "weak"),
    "--scenario",
)
KILL: Final = ("kill_every_call.py", "--first", "--variant", "once", "--only")
RACE: Final = ("race_every_call.py", "--first", "--variant")
ACCIDENT: Final = re.compile(
    r"\b(Name|UnboundLocal|Syntax|Indentation|Import|ModuleNotFound|Type|Attribute)Error\b"
)


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
        "a deletion that a dead process made is not synced by who comes after it",
        "recovery.py",
        "            kernel.sync_directory(root.staging.fd)\n",
        "            pass\n",
        (*POWER, "drain killed, drain", "--killed", ".secimg-watch"),
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
        (*POWER, "drain, no state yet"),
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
        "a vault's shards are not synced before there is a vault.json",
        "vault.py",
        "        kernel.sync_path(objects)\n",
        "        pass\n",
        (*POWER, "key init, drain"),
    ),
    Mutation(
        "a vault's directories are not synced before there is a vault.json",
        "vault.py",
        "            kernel.sync_path(self.path)\n            kernel.sync_above",
        "            kernel.sync_above",
        (*POWER, "key init"),
    ),
    Mutation(
        "what a dead process made of a vault is not synced by who locks it",
        "vault.py",
        "before its names were durable.\n            kernel.sync_path(self.path)\n",
        "before its names were durable.\n",
        (*POWER, "key init killed, drain", "--killed", "disk/vault"),
    ),
    Mutation(
        "the name of a key is not synced by who loads it from where a dead process left it",
        "keys.py",
        "            kernel.sync_path(self.path.parent)\n        return ring",
        "            pass\n        return ring",
        (*POWER, "key rotate killed, drain"),
    ),
    Mutation(
        "the head of the audit log is not synced where a dead process began it",
        "audit.py",
        "            os.fsync(head_file)\n",
        "",
        (*POWER, "key init killed, drain", "--killed", "audit.log"),
    ),
    Mutation(
        "an object that a dead process replaced is not synced before its former key goes",
        "cli/keys.py",
        "vault.sync_objects()",
        "vault.exists()",
        (*POWER, "vault rekey killed, key retire"),
    ),
    Mutation(
        "a new state directory's own name is not synced",
        "audit.py",
        "                kernel.sync_above(self._state)\n",
        "                pass\n",
        (*POWER, "drain, no state yet"),
    ),
    Mutation(
        "the names of the audit log are not synced",
        "audit.py",
        "            kernel.sync_path(self._state)\n",
        "",
        (*POWER, "drain, no state yet"),
    ),
    Mutation(
        "a new directory that pictures are moved to is not synced",
        "erase.py",
        "        kernel.sync_above(target)\n",
        "",
        (*POWER, "after: move"),
    ),
    Mutation(
        "a new sub-folder that pictures are moved to is not synced",
        "erase.py",
        "                kernel.sync_directory(here)\n",
        "",
        (*POWER, "after: move"),
    ),
    Mutation(
        "a new directory that is restored to is not synced",
        "restore.py",
        "                kernel.sync_above(directory)\n",
        "",
        (*POWER, "vault restore"),
    ),
    Mutation(
        "a new sub-folder that is restored to is not synced",
        "restore.py",
        "                kernel.sync_directory(here)\n",
        "",
        (*POWER, "vault restore"),
    ),
    Mutation(
        "the directory of a restored file is not synced",
        "restore.py",
        "                kernel.sync_directory(self._parent)\n",
        "",
        (*POWER, "vault restore"),
    ),
    Mutation(
        "the return of a quarantined file is not synced",
        "claim.py",
        "    kernel.sync_directory(staging.fd)\n    return True",
        "    return True",
        (*POWER, "jobs retry"),
    ),
    Mutation(
        "a picture that is written for a program is not synced",
        "images.py",
        "            os.fsync(file.fileno())\n",
        "",
        (*POWER, "bytes_to_image"),
    ),
    Mutation(
        "the directory of such a picture is not synced",
        "images.py",
        "    kernel.sync_path(Path(folder))\n",
        "",
        (*POWER, "bytes_to_image"),
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
        "os.unlink(temporary)\n            kernel.sync_path(self.path.parent)\n",
        "os.unlink(temporary)\n",
        (*POWER, "key init, drain"),
        also=(
            (
                "keys.py",
                "            kernel.sync_path(self.path.parent)\n        return ring",
                "            pass\n        return ring",
            ),
        ),
    ),
    Mutation(
        "the directory of a replaced object is not synced",
        "vault.py",
        "        kernel.sync_path(final.parent)\n",
        "",
        (*POWER, "vault rekey"),
    ),
    Mutation(
        "a moved picture's new directory is not synced",
        "erase.py",
        "                break\n        kernel.sync_directory(fd)",
        "                break",
        (*POWER, "move, older system"),
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
        (*RACE, "in place", "--action", "append"),
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
        "            from secimg_watch.records import Verified as Found\n"
        "            return Found(staged)\n        except (Tampered",
        (*RACE, "leased", "--action", "another object under the final name"),
    ),
    Mutation(
        "what is moved away overwrites what has the name",
        "erase.py",
        "kernel.rename_noreplace(\n                    claimed.name, candidate,"
        " source_dir=claimed.parent, target_dir=fd",
        "os.rename(\n                    claimed.name, candidate,"
        " src_dir_fd=claimed.parent, dst_dir_fd=fd",
        (*RACE, "move", "--action", "name taken in the move directory"),
    ),
    Mutation(
        "what was moved by mistake is given back over what has its name by now",
        "claim.py",
        "kernel.rename_noreplace(held.name, held.name, source_dir=parent, target_dir=held.parent)",
        "os.rename(held.name, held.name, src_dir_fd=parent, dst_dir_fd=held.parent)",
        ("test_hold_and_claim.py",),
    ),
    Mutation(
        "a restored file overwrites what has its name by now",
        "restore.py",
        "                    kernel.give_name(",
        "                    with contextlib.suppress(FileNotFoundError):\n"
        "                        os.unlink(self._target, dir_fd=self._parent)\n"
        "                    kernel.give_name(",
        ("test_restore.py",),
    ),
    Mutation(
        "of two keys that are stored at once the second one stays",
        "keys.py",
        "publish: Callable[[Path, Path], None] = os.link",
        "publish: Callable[[Path, Path], None] = os.replace",
        ("test_keys.py",),
    ),
    Mutation(
        "a vault that is another one by now counts as the one that was locked",
        "vault.py",
        "        fault = _outcome(Vault.refuse_if_gone, vault) or synced[path.parent]\n",
        "        fault = synced[path.parent]\n",
        ("test_vault.py",),
    ),
    Mutation(
        "the plaintext goes before its object has its final name",
        "pipeline.py",
        "            committed = self._sort_out(tasks, commit(",
        "            from pathlib import Path as Nowhere\n"
        "            from secimg_watch.records import Committed as Early\n"
        "            early = erase([_erasure(t, Early(t.verified, Nowhere())) for t in tasks])\n"
        "            committed = self._sort_out(tasks, commit(",
        (*KILL, "drain, one worker"),
        also=(
            (
                "pipeline.py",
                "gone = erase([_erasure(task, done) for task, done in on_record])",
                "gone = early",
            ),
        ),
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
        ("kill_every_call.py", "--first", "--variant", "queue", "--only", "drain, in place"),
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
        (*POWER, "drain"),
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
    if before == after:
        return source
    if source.count(before) != 1:
        raise ValueError(f"it stands there {source.count(before)} times: {before}")
    return source.replace(before, after)


def path(finder: str) -> str:
    """Where a rig, or a file of tests, lies."""
    return f"tests/{finder}" if finder.startswith("test_") else f"tests/campaigns/{finder}"


def command(finder: tuple[str, ...], home: Path) -> list[str]:
    """How a rig, or a file of tests, is run on the program in ``home``."""
    name, *options = finder
    file = str(home / path(name))
    if name.startswith("test_"):
        pytest = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider"]
        return [*pytest, "--rootdir", str(home), file, *options]
    return [sys.executable, file, *options]


@dataclass(frozen=True, slots=True)
class Result:
    """What a rig said to a mutation."""

    mutation: Mutation
    code: int
    """What the rig ended with: 1 where it found something."""
    seconds: float
    words: str
    by_accident: bool
    """Whether the program did not do what a mutation was to make it do."""

    @property
    def verdict(self) -> str:
        """In a word."""
        if self.code != 1:
            return "NOT NOTICED"
        return "ACCIDENT" if self.by_accident else "noticed"


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
    seconds = time.monotonic() - started
    by_accident = ACCIDENT.search(done.stdout + done.stderr) is not None
    return Result(mutation, done.returncode, seconds, words, by_accident)


def control(finders: set[tuple[str, ...]], workers: int) -> int:
    """Run finders on the program as it is; exit 1 where one finds something."""
    nothing = [Mutation("nothing", "vault.py", "", "", finder) for finder in sorted(finders)]
    wrong = 0
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for result in pool.map(attempt, nothing):
            rig = " ".join(result.mutation.finder)
            verdict = "FOUND SOMETHING" if result.code else "nothing found"
            say(f"{verdict} [{rig}] {result.seconds:.0f} s")
            if result.code:
                say(f"            {result.words[:300]}")
                wrong += 1
    say(f"{len(nothing)} finders, {wrong} of which find something in the program as it is")
    return 1 if wrong else 0


def say(line: str) -> None:
    """One line, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    """Try every mutation; exit 1 where one was not noticed."""
    parser = argparse.ArgumentParser(description="take out one safeguard at a time")
    parser.add_argument("--only", default="", help="mutations with this in their name or module")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    parser.add_argument("--control", action="store_true", help="run the finders on the program")
    asked = parser.parse_args()
    chosen = [m for m in MUTATIONS if asked.only in f"{m.module} {m.what}"]
    if asked.control:
        return control({mutation.finder for mutation in chosen}, asked.workers)
    if not chosen:
        parser.error("no safeguard has this in its name")
    missed = 0
    with concurrent.futures.ThreadPoolExecutor(asked.workers) as pool:
        for result in pool.map(attempt, chosen):
            rig = " ".join(result.mutation.finder)
            say(f"{result.verdict:11} {result.mutation.what} [{rig}] {result.seconds:.0f} s")
            say(f"            {result.words[:300]}")
            missed += result.verdict != "noticed"
    say(f"{len(chosen)} safeguards taken out, {missed} not noticed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
