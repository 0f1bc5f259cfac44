"""What the daemon says of itself: written to a file in the state directory, read by ``status``.

Numbers, states and reasons only; never a name of a file.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pathlib import Path

_FILE: Final = "status.json"
_FRESH: Final = 15.0  # seconds; the daemon writes every one


@dataclass(frozen=True, slots=True)
class FolderReport:
    """One folder. Counts are of files; dwell times in milliseconds."""

    path: str
    health: str
    reason: str
    mode: str
    waiting: int = 0
    unready: int = 0
    queued: int = 0
    sealed: int = 0
    quarantined: int = 0
    left: int = 0
    kept: int = 0
    undeletable: int = 0
    vanished: int = 0
    temporary: int = 0
    passed: dict[str, int] = field(default_factory=dict)
    dwell_ms: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Report:
    """The whole service."""

    running: bool
    pid: int
    written: float  # unix time
    key: str  # "ready", or what is waited for
    inspector: tuple[str, ...]  # what confines the child
    warnings: tuple[str, ...]
    folders: tuple[FolderReport, ...]
    audit: str = ""  # what this run found to be wrong with the audit log

    def summary(self) -> str:
        """One line for ``systemctl status``."""
        if self.key != "ready":
            return f"waiting for key: {self.key}"
        sealed = sum(f.sealed for f in self.folders)
        waiting = sum(f.waiting + f.queued for f in self.folders)
        bad = [f for f in self.folders if f.health not in {"ok", "starting"}]
        state = f"; {bad[0].health}: {bad[0].path}: {bad[0].reason}" if bad else ""
        state += f"; audit log: {self.audit}" if self.audit else ""
        return f"{sealed} sealed, {waiting} waiting{state}"


def write(state: Path, report: Report) -> None:
    """Replace the status file. A failure is of no consequence: the next one follows soon."""
    temporary = state / f"{_FILE}.new"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8", errors="backslashreplace") as file:
            json.dump(asdict(report), file)
        os.replace(temporary, state / _FILE)
    except OSError:
        return


def read(state: Path) -> Report | None:
    """The last report, or ``None`` where there is none that can be read.

    ``running`` is false where the daemon ended, or has not written for a while.
    """
    try:
        fields: dict[str, Any] = json.loads((state / _FILE).read_text(encoding="utf-8"))
        folders = tuple(FolderReport(**folder) for folder in fields.pop("folders"))
        fields["inspector"] = tuple(fields["inspector"])
        fields["warnings"] = tuple(fields["warnings"])
        if time.time() - fields["written"] > _FRESH or not _is_alive(fields["pid"]):
            fields["running"] = False
        return Report(folders=folders, **fields)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's
    return True
