"""Runs the command line in processes of its own, in an environment that holds nothing else."""

from __future__ import annotations

import atexit
import io
import itertools
import json
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from PIL import Image

from secimg_watch import keys, policyfile
from secimg_watch.catalog import Catalog
from secimg_watch.gate import admit_keys
from secimg_watch.quantities import Reserve
from secimg_watch.vault import Vault

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PATIENCE = 60.0
"""Seconds that anything here may take on a busy machine; nothing waits so long on purpose."""

UNINSPECTED = {"preview": 0, "not_image": "encrypt", "undecodable": "encrypt"}
"""A folder of which no decoder is asked anything: what is tested seldom needs its half second."""

INSPECTED = {"preview": 256, "not_image": "leave"}
"""The policy's own defaults."""

HOSTILE = "a\n\x1b[31mred\u202eevil"
"""A name that starts a new line, colours the terminal and turns text around."""

_LOG_LINE = re.compile(r"\d\d:\d\d:\d\d (warning|error): ")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command left: its exit code and all that it printed."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Standard output, which has to be JSON and nothing else."""
        return json.loads(self.out)

    def row(self) -> dict[str, str]:
        """The only row of a table that was printed, by column."""
        heads, cells = self.out.removesuffix("\n").split("\n")
        return dict(zip(heads.split("\t"), cells.split("\t"), strict=True))


_FORKER = """
import json, os, sys
from secimg_watch.cli import main

for line in sys.stdin:
    order = json.loads(line)
    if pid := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(code, flush=True)
        continue
    os.setsid()
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["environ"])
    for number, (path, flags) in enumerate(order["files"]):
        fd = os.open(path, flags)
        os.dup2(fd, number)
        os.close(fd)
    sys.argv = order["argv"]
    main()
    sys.exit(0)
"""


class _Forker:
    """A process that has loaded the program once and forks for every command.

    Each command still is a process of its own, in its own session, directory and environment;
    what is saved is loading the same modules hundreds of times.
    """

    _only: ClassVar[_Forker | None] = None

    def __init__(self) -> None:
        environ = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _FORKER],
            env={**environ, **_SETTING},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        atexit.register(self._end)

    @classmethod
    def get(cls) -> _Forker:
        """The one of this process, started when it is first asked for."""
        if cls._only is None:
            cls._only = cls()
        return cls._only

    def run(self, argv: list[str], cwd: Path, environ: dict[str, str]) -> Outcome:
        """Run one command to its end."""
        with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
            places = [(os.devnull, os.O_RDONLY), (out.name, os.O_RDWR), (err.name, os.O_RDWR)]
            order = {"argv": argv, "cwd": str(cwd), "environ": environ, "files": places}
            code = self._ask(json.dumps(order).encode() + b"\n")
            return Outcome(code, out.read().decode(), err.read().decode())

    def _ask(self, line: bytes) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line)
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], PATIENCE)[0]:
            self._end()
            type(self)._only = None
            raise TimeoutError("the command did not end in time")
        return int(self._process.stdout.readline())

    def _end(self) -> None:
        self._process.kill()
        self._process.communicate()


_INHERITED = ("PATH", "PYTHONPATH", "TMPDIR")
_SETTING = {"LANG": "C.UTF-8", "PYTHONWARNINGS": "error"}


class Cli:
    """The command line in a home directory of its own, without a session bus."""

    def __init__(self, home: Path) -> None:
        """``home``: becomes ``$HOME`` and the working directory; made where it is missing."""
        home.mkdir(exist_ok=True)
        self.home = home
        self.environ = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        self.environ |= {"HOME": str(home), **_SETTING}

    def __call__(self, *arguments: str | bytes | Path, cwd: Path | None = None) -> Outcome:
        """Run one command to its end, without input and without a terminal."""
        argv = ["secimg-watch", *map(os.fsdecode, arguments)]
        return _Forker.get().run(argv, cwd or self.home, self.environ)

    def start(self, *arguments: str | bytes | Path) -> subprocess.Popen[str]:
        """Start a command from scratch; whoever does ends it."""
        return subprocess.Popen(
            self.argv(*arguments),
            env=self.environ,
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def argv(self, *arguments: str | bytes | Path) -> list[str | bytes | Path]:
        """The words that start a command from scratch."""
        return [sys.executable, "-m", "secimg_watch", *arguments]


class Box:
    """A directory with a policy, a key file, a watched folder, a vault and a state directory."""

    def __init__(
        self, directory: Path, *, more: dict[str, Any] | None = None, **folder: Any
    ) -> None:
        """``more`` is added to the policy, ``folder`` to its only folder."""
        self.directory = directory
        self.drop, self.vault = directory / "drop", directory / "vault"
        self.state, self.key = directory / "state", directory / "vault.key"
        self.policy = directory / "policy.yaml"
        self.cli = Cli(directory / "home")
        self.drop.mkdir()
        self.write_policy(more=more, **folder)

    def write_policy(self, *, more: dict[str, Any] | None = None, **folder: Any) -> None:
        """Write the policy anew."""
        data: dict[str, Any] = {
            "version": 1,
            "state": str(self.state),
            "vaults": {"main": {"path": str(self.vault), "min_free": "0B"}},
            "key": {"provider": "file", "file": str(self.key)},
            "folders": [{"path": str(self.drop), "settle": "0s", **UNINSPECTED, **folder}],
            "verify": "cached",
            "recovery": "declined",
            **(more or {}),
        }
        self.policy.write_text(policyfile.dump(data))

    def make_key(self) -> None:
        """Put a new key where the policy looks for it."""
        self._provider().store(keys.generate())

    def make_vault(self) -> None:
        """Lay out the vault, with the key that is there."""
        admit_keys(self._vault(), [self._provider().load()])

    def __call__(self, *arguments: str | bytes | Path, cwd: Path | None = None) -> Outcome:
        """Run a command with this policy."""
        return self.cli("--policy", self.policy, *arguments, cwd=cwd)

    def objects(self) -> list[Path]:
        """The vault's files, in the order of their ids."""
        return sorted(self.vault.glob("objects/??/*.simg"))

    def object_named(self, name: str) -> str:
        """The id of the only object that was sealed under this name."""
        entries = Catalog(self._vault(), self._provider().load_ring()).entries()
        [found] = [e.object_id for e in entries if e.meta and e.meta.name == os.fsencode(name)]
        return found

    def _provider(self) -> keys.KeyProvider:
        return keys.provider_for("file", "secimg-watch/main", file=self.key)

    def _vault(self) -> Vault:
        return Vault(self.vault, Reserve(0.0, 0))


def make_box(directory: Path, **options: Any) -> Box:
    """A box with its key and an empty vault."""
    box = Box(directory, **options)
    box.make_key()
    box.make_vault()
    return box


def picture(colour: str = "teal", kind: str = "PNG", size: tuple[int, int] = (64, 48)) -> bytes:
    """The bytes of a small picture."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, temporary ones too: relative path and bytes."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def check_complaint(outcome: Outcome, code: int) -> str:
    """The sentence a command failed with, after checking that it is fit to be read by a person.

    One lower-case sentence behind the program's name, faults and hints indented below it,
    nothing that a terminal would obey, and no traceback. Lines of the log may come before it.
    """
    assert outcome.code == code, outcome
    assert outcome.err.endswith("\n")
    lines = outcome.err.removesuffix("\n").split("\n")
    first, *rest = itertools.dropwhile(_LOG_LINE.match, lines)
    assert first.startswith("secimg-watch: "), outcome.err
    sentence = first.removeprefix("secimg-watch: ")
    assert sentence[:1] == sentence[:1].lower(), sentence
    assert not sentence.endswith("."), sentence
    assert all(line.startswith("  ") for line in rest), outcome.err
    check_harmless(outcome)
    return sentence


def check_harmless(outcome: Outcome) -> None:
    """Whether nothing was printed that a terminal would obey, nor a traceback."""
    assert "Traceback" not in outcome.err
    for text in (outcome.out, outcome.err):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)


def wait_until(condition: Callable[[], bool], patience: float = PATIENCE) -> None:
    """Poll what cannot be awaited."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.02)
