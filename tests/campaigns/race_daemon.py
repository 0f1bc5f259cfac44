"""A daemon under fire from an adversary that does not wait for it.

``python tests/campaigns/race_daemon.py [--seconds 600] [--variant NAME] [--seed N]``

The adversary is a process of its own and does one random thing after another. It knows exactly
what it destroyed itself; all else has to exist in the end. The exit code is 1 on any violation.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the rig lies
assert sys.platform == "linux", "system calls are traced on Linux only"

from adversary import (
    NOBODY,
    ROOT,
    SIZE,
    TARGET,
    VARIANTS,
    Adversary,
    Site,
    build,
    describe,
    digest,
    give,
    in_clear,
    picture,
)
from daemon import Daemon
from deeds import call_libc
from rig import scratch

from secimg_watch import report

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
RANDOM_VARIANTS: Final = ("leased", "keep", "move", "in place", "foreign", "inspected")
NAMES: Final = tuple(f"{folder}{number}.jpg" for folder in ("", "b/") for number in range(4))
_EXCHANGE: Final = 2
_NO_REPLACE: Final = 1


def rename_with(flag: int, source: Path, target: Path) -> None:
    source_name, target_name = os.fsencode(source), os.fsencode(target)
    call_libc("renameat2", -100, source_name, -100, target_name, flag)


@dataclass
class Hammer:
    """The adversary as a process of its own: one random thing after another.

    It knows exactly what it destroyed: a file is taken out of the folder by one rename, and only
    then looked at and deleted; what is written to was read through the same descriptor.
    """

    drop: Path
    outside: Path
    canary: Path
    rng: random.Random
    decodes: bool
    wanted: set[str] = field(default_factory=set)
    complete: set[str] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)
    history: list[str] = field(default_factory=list)

    def run(self, seconds: float) -> None:
        deeds = [
            *[self.put, self.away_and_back, self.append, self.overwrite, self.rewrite] * 2,
            *[self.remove, self.link, self.symlink, self.touch, self.swap],
            *[self.folder_away, self.root_away],
        ]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            # Right after its arrival: a moment later it is sealed.
            path = self.drop / self.rng.choice(NAMES)
            for deed in (self.put, *self.rng.sample(deeds, self.rng.randrange(4))):
                try:
                    deed(path)
                    self.counts[deed.__name__] += 1
                except (FileNotFoundError, NotADirectoryError, PermissionError):
                    self.counts["void"] += 1
                self.pause()

    def pause(self) -> None:
        time.sleep(self.rng.choice((0, 0, 0.0005, 0.001, 0.003, 0.005, 0.008, 0.012, 0.02)))

    def aside(self) -> Path:
        return self.outside / os.urandom(6).hex()

    def fresh(self) -> tuple[Path, str]:
        content = picture(self.rng.choice((SIZE, 200_000, 3_000_000)), decodes=self.decodes)
        path = self.aside()
        path.write_bytes(content)
        return path, digest(content)

    def note(self, content: str, what: str) -> None:
        self.history.append(f"{time.monotonic():.4f} {content} {what}")

    def destroy(self, path: Path) -> None:
        """Delete what was taken out of the folder."""
        gone = digest(path.read_bytes())
        path.unlink()
        self.wanted.discard(gone)
        self.note(gone, "destroyed")

    def arrive(self, content: str, what: str) -> None:
        self.complete.add(content)
        self.wanted.add(content)
        self.note(content, what)

    def give_back(self, away: Path, path: Path) -> None:
        with contextlib.suppress(FileExistsError):  # it stays outside then, and exists
            rename_with(_NO_REPLACE, away, path)

    def put(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        part, content = self.fresh()
        self.complete.add(content)
        for _ in range(100):
            try:
                rename_with(_EXCHANGE, part, path)
            except FileNotFoundError:
                try:
                    rename_with(_NO_REPLACE, part, path)
                except FileExistsError:
                    continue
                self.arrive(content, f"put as {path.name}")
                return
            self.arrive(content, f"put over {path.name}")
            if part.is_symlink() or part.is_dir():
                shutil.move(part, self.aside())
            else:
                self.destroy(part)
            return

    def remove(self, path: Path) -> None:
        away = self.aside()
        path.rename(away)
        if not away.is_symlink():
            self.destroy(away)

    def away_and_back(self, path: Path) -> None:
        away = self.aside()
        path.rename(away)
        self.pause()
        self.give_back(away, path)

    def _write(self, path: Path, change: Callable[[int, bytes], bytes]) -> None:
        # O_NONBLOCK only so that a FIFO would not hang; the lease makes it wait by hand.
        while True:
            try:
                fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
                break
            except BlockingIOError:
                time.sleep(0.0005)
            except OSError as error:
                if error.errno in {errno.ELOOP, errno.EISDIR, errno.ENXIO}:
                    return
                raise
        try:
            late = os.fstat(fd).st_nlink == 0
            old = os.pread(fd, 1 << 24, 0)
            new = change(fd, old)
            self.pause()
            deleted = os.fstat(fd).st_nlink == 0
        finally:
            os.close(fd)
        if deleted:
            self.counts["opened what was deleted" if late else "DELETED WHILE OPEN"] += 1
            self.note(digest(new), "written to a deleted file")
            return
        self.wanted.discard(digest(old))
        self.note(digest(old), "overwritten")
        self.arrive(digest(new), f"written to {path.name}")

    def _state(self, content: bytes) -> bytes:
        self.complete.add(digest(content))
        return content

    def append(self, path: Path) -> None:
        def change(fd: int, old: bytes) -> bytes:
            for _ in range(2):
                more = os.urandom(5_000)
                os.pwrite(fd, more, len(old))
                old = self._state(old + more)
                self.pause()
            return old

        self._write(path, change)

    def overwrite(self, path: Path) -> None:
        def change(fd: int, old: bytes) -> bytes:
            times = os.fstat(fd)
            for at in (50, len(old) // 2, len(old) - 70):
                new = os.urandom(64)
                os.pwrite(fd, new, at)
                old = self._state(old[:at] + new + old[at + 64 :])
                self.pause()
            if self.rng.random() < 0.5:
                os.utime(fd, ns=(times.st_atime_ns, times.st_mtime_ns))
            return old

        self._write(path, change)

    def rewrite(self, path: Path) -> None:
        def change(fd: int, _old: bytes) -> bytes:
            new = picture(self.rng.choice((SIZE, 90_000)), decodes=self.decodes)
            os.ftruncate(fd, 0)
            self._state(b"")
            os.pwrite(fd, new[:9_000], 0)
            self._state(new[:9_000])
            self.pause()
            os.pwrite(fd, new[9_000:], 9_000)
            return self._state(new)

        self._write(path, change)

    def link(self, path: Path) -> None:
        second = self.aside()
        os.link(path, second, follow_symlinks=False)
        self.pause()
        second.unlink()
        with contextlib.suppress(FileNotFoundError):
            os.utime(path, follow_symlinks=False)  # or nobody hears that it is alone again

    def symlink(self, path: Path) -> None:
        away = self.aside()
        path.rename(away)
        link = self.aside()
        link.symlink_to(self.canary / TARGET)
        with contextlib.suppress(FileExistsError):
            rename_with(_NO_REPLACE, link, path)
        self.pause()
        if path.is_symlink():
            path.rename(link)
        self.give_back(away, path)

    def touch(self, path: Path) -> None:
        self.rng.choice((lambda: os.utime(path), lambda: path.chmod(0o640)))()

    def swap(self, path: Path) -> None:
        rename_with(_EXCHANGE, path, self.drop / self.rng.choice(NAMES))

    def folder_away(self, _path: Path) -> None:
        if self.rng.random() < 0.2:
            folder, away = self.drop / "b", self.aside()
            folder.rename(away)
            self.pause()
            away.rename(folder)

    def root_away(self, _path: Path) -> None:
        if self.rng.random() < 0.05:
            away = self.outside / "drop"
            self.drop.rename(away)
            self.pause()
            away.rename(self.drop)


def hammer(options: argparse.Namespace) -> int:
    """The adversary's process: does its worst, then writes down what it knows."""
    top: Path = options.hammer
    if options.uid and sys.platform != "win32":
        os.setgroups([])
        os.setresgid(options.uid, options.uid, options.uid)
        os.setresuid(options.uid, options.uid, options.uid)
    adversary = Hammer(
        top / "drop",
        top / "outside",
        top / "canary",
        random.Random(options.seed),
        decodes="inspected" in (options.variant or ()),
    )
    adversary.run(options.seconds)
    known = {
        "wanted": sorted(adversary.wanted),
        "complete": sorted(adversary.complete),
        "counts": adversary.counts,
        "history": adversary.history,
    }
    (top / "outside" / "ledger.json").write_text(json.dumps(known), encoding="utf-8")
    return 0


def prepare_random(top: Path, name: str, options: argparse.Namespace) -> tuple[Site, int] | str:
    """A site for a real daemon, and the adversary's user; or why there cannot be one."""
    variant = next(each for each in VARIANTS if each.name == name)
    folder = {**variant.folder, "rescan": "1s"}
    if name == "foreign":
        folder["settle"] = "500ms"  # longer than the adversary writes
    if name == "in place":
        elsewhere = Path(tempfile.mkdtemp())
        if elsewhere.stat().st_dev == top.stat().st_dev:
            elsewhere.rmdir()
            return "there is no second file system"
        folder["staging"] = str(elsewhere)
    if name == "foreign" and not ROOT:
        return "it takes root"
    own = dataclasses.replace(variant, folder=folder, user="")
    site = build(top / name.replace(" ", "-"), own)
    site.arrange({})
    (site.drop / "b").mkdir()
    if name != "foreign":
        return site, 0
    top.chmod(0o711)
    # Files of another user, and no capability to take leases on them.
    for path in (site.drop, site.drop / "b", site.outside):
        give(path, NOBODY)
    return site, NOBODY


def random_mode(top: Path, options: argparse.Namespace) -> list[str]:
    """Let a daemon run under fire, in one variant after the other; gives what went wrong."""
    faults = []
    chosen: Sequence[str] = options.variant or RANDOM_VARIANTS
    for name in chosen:
        made = prepare_random(top, name, options)
        if isinstance(made, str):
            sys.stdout.write(f"{name}: skipped: {made}\n")
            continue
        if name == "foreign":
            drop_lease_capability()
        found = under_fire(*made, name, options.seconds / len(chosen), options.seed)
        faults += [f"{name} --seed {options.seed}: {fault}" for fault in found]
    return faults


def drop_lease_capability() -> None:
    """Nothing that is started from here on can take a lease on another user's file."""
    call_libc("prctl", 24, 28, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_LEASE


def under_fire(site: Site, uid: int, name: str, seconds: float, seed: int) -> list[str]:
    canary = describe(site.canary)
    log = site.top / "log"
    daemon = Daemon(site.policy_path, log, {})
    try:
        daemon.wait_for_notice("READY=1")
        words = [sys.executable, __file__, "--hammer", str(site.top), "--seconds", str(seconds)]
        words += ["--seed", str(seed), "--variant", name, "--uid", str(uid)]
        subprocess.run(words, check=True, timeout=seconds + 120)
        ledger = json.loads((site.outside / "ledger.json").read_text(encoding="utf-8"))
        daemon.send("USR1")
        calm = wait_for_calm(site)
        code = daemon.stop()
    finally:
        daemon.close()
    faults = [] if not code else [f"the daemon ended with {code}: {daemon.log()[-500:]}"]
    faults += [] if calm else ["it did not come to rest"]
    variant = next(each for each in VARIANTS if each.name == name)
    a = Adversary(site, variant)
    sealed, broken = a.sealed()
    plain = a.plain()
    wanted, complete = set(ledger["wanted"]), set(ledger["complete"])
    lost = wanted - {*sealed.values(), *plain.values()}
    limits = name in {"in place", "foreign"}
    counts = Counter(ledger["counts"])
    counts["sealed"], counts["objects"] = len(set(sealed.values())), len(sealed)
    if lost and limits:
        counts["documented: lost in the last moment"] = len(lost)
    elif lost:
        story = [line for line in ledger["history"] if line.split(" ")[1] in lost]
        faults.append(f"{len(lost)} contents lost: {story}")
    if counts["DELETED WHILE OPEN"] and not limits:
        faults.append("a file was deleted while it was open for writing")
    faults += [f"an object does not open: {each}" for each in broken]
    torn = set(sealed.values()) - complete
    faults += [f"an object holds what no file ever held: {sorted(torn)}"] if torn else []
    faults += in_clear(a, plain, set(sealed.values()))
    faults += ["something behind a link was changed"] if describe(site.canary) != canary else []
    if "a defect" in daemon.log() or "Traceback" in daemon.log():
        faults.append(f"the daemon's log: {daemon.log()[-2000:]}")
    told = ", ".join(f"{what} {count}" for what, count in sorted(counts.items()))
    sys.stdout.write(f"{name}: {told}\n")
    sys.stdout.flush()
    return faults


def wait_for_calm(site: Site, deadline: float = 90.0) -> bool:
    """Wait until the daemon says, for a while, that nothing is left to do."""
    end = time.monotonic() + deadline
    calm_since = None
    while time.monotonic() < end:
        told = report.read(site.state)
        folder = told.folders[0] if told is not None and told.folders else None
        calm = folder is not None and not (folder.waiting or folder.queued)
        calm_since = (calm_since or time.monotonic()) if calm else None
        if calm_since is not None and time.monotonic() - calm_since > 4:
            return True
        time.sleep(0.1)
    return False


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="for all variants together")
    parser.add_argument("--variant", action="append", help="only this one; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hammer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--uid", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--dir", type=Path, help="where to work; default: in memory")
    return parser.parse_args()


def main() -> int:
    options = parse()
    if options.hammer:
        return hammer(options)
    with scratch() as top:
        faults = random_mode(options.dir or top, options)
    sys.stdout.writelines(f"VIOLATION {fault}\n" for fault in faults)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
