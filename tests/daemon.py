"""The real service in a process of its own, and what tests ask of it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from click.testing import CliRunner
from PIL import Image

from secimg_watch.cli import cli

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

T = TypeVar("T")

DEADLINE = 60.0
"""Seconds that anything may take on a machine with much else to do; mostly it takes some 0.1."""

LINUX = sys.platform == "linux"
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
STAGING = ".secimg-watch"
NOON_NS = 1_700_000_000_123_456_789

_STEP = 0.01
# A daemon ends with the tests, even if those are killed.
_TIED = ("setpriv", "--pdeathsig", "KILL") if shutil.which("setpriv") else ()


def wait_until(condition: Callable[[], T], what: str, deadline: float = DEADLINE) -> T:
    """Ask again and again until the answer is true, and give it."""
    end = time.monotonic() + deadline
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > end:
            raise AssertionError(f"waited {deadline:.0f} s in vain: {what}")
        time.sleep(_STEP)


def picture(kind: str = "JPEG", side: int = 24, padding: int = 0) -> bytes:
    """Make a picture of noise, so that no two are the same.

    ``padding``: random bytes behind the picture's end, where decoders do not look.
    """
    image = Image.frombytes("RGB", (side, side), os.urandom(3 * side * side))
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue() + os.urandom(padding)


def place(path: Path, content: bytes, mtime_ns: int | None = None) -> bytes:
    """Put a finished file under a name at once; gives its content."""
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    part.write_bytes(content)
    if mtime_ns is not None:
        os.utime(part, ns=(mtime_ns, mtime_ns))
    part.rename(path)
    return content


class Daemon:
    """One process that runs the service, and everything that it tells its manager."""

    def __init__(self, policy: Path, log: Path, environ: Mapping[str, str]) -> None:
        address = f"secimg-watch-{secrets.token_hex(8)}"
        family: int = getattr(socket, "AF_UNIX", 0)
        self._manager = socket.socket(family, socket.SOCK_DGRAM)
        self._manager.bind(f"\0{address}")
        self._notices: list[str] = []
        self._reader = threading.Thread(target=self._listen, name="manager", daemon=True)
        self._reader.start()
        self._log = log
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [*_TIED, sys.executable, "-m", "secimg_watch", "--policy", str(policy), "run"],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                env={**os.environ, "NOTIFY_SOCKET": f"@{address}", **environ},
                start_new_session=True,
            )

    def _listen(self) -> None:
        while message := self._manager.recv(65536):
            self._notices.append(message.decode())

    def notices(self) -> list[str]:
        """Give every assignment received up to now, in order."""
        return [line for message in list(self._notices) for line in message.split("\n")]

    def wait_for_notice(self, text: str, since: int = 0) -> None:
        """Wait for an assignment that begins with this text, after the first ``since``."""
        wait_until(
            lambda: (
                any(line.startswith(text) for line in self.notices()[since:])
                or not self.is_running()
            ),
            f"a notice {text}",
        )
        assert any(line.startswith(text) for line in self.notices()[since:]), self.log()

    def log(self) -> str:
        """Give what was written to standard output and standard error."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def wait_for_log(self, text: str) -> None:
        """Wait for a piece of the log."""
        wait_until(lambda: text in self.log(), f"{text!r} in the log")

    def is_running(self) -> bool:
        """Tell whether the process has not ended yet."""
        return self.process.poll() is None

    def send(self, name: str) -> None:
        """Send a signal, e.g. ``HUP``."""
        self.process.send_signal(signal.Signals[f"SIG{name}"])

    def ended(self) -> int:
        """Wait for the end; gives the exit code."""
        return self.process.wait(DEADLINE)

    def stop(self) -> int:
        """Ask it to end, and wait; gives the exit code."""
        self.send("TERM")
        return self.ended()

    def kill(self) -> None:
        """End it without a warning."""
        self.process.kill()
        self.process.wait(DEADLINE)

    def group_is_empty(self) -> bool:
        """Tell whether the process and all children that it started are gone."""
        try:
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return True
        return False

    def close(self) -> None:
        """End it if it still runs, and close what belongs to it here."""
        if self.is_running():
            self.send("CONT")
            self.kill()
        # An empty message ends the reader.
        with socket.socket(self._manager.family, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"", self._manager.getsockname())
        self._reader.join(DEADLINE)
        self._manager.close()


class Site:
    """A policy with all that belongs to it, below one directory.

    There is one folder ``drop`` and one vault at first. ``policy`` may be changed as wanted
    before ``start``, or written again with ``write_policy``.
    """

    def __init__(self, top: Path) -> None:
        self.top = top
        self.drop = top / "drop"
        self.vault = top / "vault"
        self.state = top / "state"
        self.policy_path = top / "policy.yaml"
        self.key = top / "key"
        self.daemons: list[Daemon] = []
        self._restores = 0
        self.drop.mkdir(parents=True)
        self.folder: dict[str, Any] = {"path": str(self.drop), "vault": "main", "settle": "0s"}
        self.policy: dict[str, Any] = {
            "version": 1,
            "state": str(self.state),
            "vaults": {"main": {"path": str(self.vault), "min_free": 0}},
            "key": {"provider": "file", "file": str(self.key)},
            "recovery": "declined",
            "folders": [self.folder],
        }

    def write_policy(self) -> None:
        """Write the policy file; every JSON text is YAML."""
        self.policy_path.write_text(json.dumps(self.policy, indent=1), encoding="utf-8")

    def make_vaults(self) -> None:
        """Make the key and every vault that is not there yet."""
        self.write_policy()
        result = CliRunner().invoke(cli, ["--policy", str(self.policy_path), "key", "init"])
        assert result.exit_code == 0, result.output

    def launch(self, environ: Mapping[str, str] | None = None) -> Daemon:
        """Start a daemon on the policy as it is now, without waiting for it."""
        self.write_policy()
        log = self.top / f"log-{len(self.daemons)}"
        self.daemons.append(Daemon(self.policy_path, log, environ or {}))
        return self.daemons[-1]

    def start(self, environ: Mapping[str, str] | None = None) -> Daemon:
        """Make what is missing, start a daemon, and wait until it says that it is ready."""
        self.make_vaults()
        daemon = self.launch(environ)
        daemon.wait_for_notice("READY=1")
        return daemon

    # -- the command line ----------------------------------------------------------------------

    def ask(self, *words: str) -> Any:
        """Run a command with ``--json``, and give its answer."""
        result = CliRunner().invoke(cli, ["--policy", str(self.policy_path), "--json", *words])
        assert result.exit_code in {0, 1}, result.output
        return json.loads(result.stdout)

    def status(self, number: int = 0) -> dict[str, Any]:
        """Tell how a folder is doing; nothing where the service has not said yet."""
        if not (self.state / "status.json").exists():
            return {"health": ""}
        folders = self.ask("status")["folders"]
        found: dict[str, Any] = folders[number] if folders else {"health": ""}
        return found

    def why(self, path: Path) -> dict[str, str]:
        """Explain one file."""
        answer: dict[str, str] = self.ask("why", str(path))
        return answer

    def listed(self) -> list[dict[str, Any]]:
        """List the vaults."""
        entries: list[dict[str, Any]] = self.ask("vault", "list")
        return entries

    def restored(self) -> dict[bytes, bytes]:
        """Restore everything anew, and give the contents by relative path."""
        return {name: file.read_bytes() for name, file in self.restored_files().items()}

    def restored_files(self) -> dict[bytes, Path]:
        """Restore everything anew, and give the files by relative path."""
        self._restores += 1
        target = self.top / f"restored-{self._restores}"
        answer = self.ask("vault", "restore", "--all", "--to", str(target))
        assert answer["failed"] == {}
        files = files_below(target)
        assert len(files) == len(answer["restored"])
        return files

    # -- the disk ------------------------------------------------------------------------------

    def objects(self, vault: Path | None = None) -> list[Path]:
        """List the objects under their final names."""
        return sorted((vault or self.vault).glob("objects/??/*.simg"))

    def temporaries(self) -> list[str]:
        """List what lies in the vault under a temporary name."""
        return os.listdir(self.vault / "tmp")

    def plaintexts(self, folder: Path | None = None) -> list[bytes]:
        """List every file below a folder, those in hand and in quarantine among them."""
        return sorted(files_below(folder or self.drop))

    def wait_for_objects(self, count: int, vault: Path | None = None) -> None:
        """Wait until that many objects are committed; more of them are an error."""
        wait_until(lambda: len(self.objects(vault)) >= count, f"{count} objects")
        assert len(self.objects(vault)) == count

    def wait_until_clear(self, folder: Path | None = None, deadline: float = DEADLINE) -> None:
        """Wait until no file is left below a folder."""
        wait_until(
            lambda: not self.plaintexts(folder),
            f"nothing left of {self.plaintexts(folder)[:5]}",
            deadline,
        )


def files_below(top: Path) -> dict[bytes, Path]:
    """Give everything but directories below a directory, by path relative to it."""
    found = {}
    for parent, _folders, names in os.walk(top):
        for name in names:
            path = Path(parent, name)
            with contextlib.suppress(FileNotFoundError):
                path.lstat()
                found[os.fsencode(path.relative_to(top))] = path
    # os.walk lists links to directories among the directories.
    for parent, folders, _names in os.walk(top):
        for name in folders:
            path = Path(parent, name)
            if path.is_symlink():
                found[os.fsencode(path.relative_to(top))] = path
    return found
