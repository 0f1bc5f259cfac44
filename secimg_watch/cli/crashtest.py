"""``crash-test``: whether the promise holds on this machine, on that file system."""

from __future__ import annotations

import signal
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

import click

from secimg_watch import crashtest
from secimg_watch.cli import terminal
from secimg_watch.cli.app import PATH, App, guarded, pass_app, with_json
from secimg_watch.errors import UsageError
from secimg_watch.quantities import format_duration

if TYPE_CHECKING:
    from pathlib import Path
    from types import FrameType

_NOT_TESTED: Final = "a power cut; after a kill the kernel still writes all that it was given"


@click.command("crash-test")
@click.argument("directory", metavar="DIR", type=PATH)
@click.option(
    "--points",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Kill at N places of the run, instead of for {crashtest.SECONDS:g} s.",
)
@click.option("--all", "every", is_flag=True, help="Kill at every place, which takes a while.")
@with_json
@pass_app
@guarded
def crash_test(app: App, directory: Path, points: int | None, *, every: bool) -> int:
    """Kill a service in DIR again and again; check what it leaves.

    In a new directory in DIR, a service of its own seals made-up pictures. It is killed before
    one of its calls that change the disk: every picture must be whole then, in clear or in the
    vault. It runs again: every picture must be sealed, once, and nothing be left in clear. That
    is repeated for ten seconds at other places of the run. No policy, key or vault of yours is
    touched, and all of it is removed in the end.

    Exit 0 when all that held, 1 when something did not; what was left is then kept, without the
    key. Exit 75 where the system does not allow one process to trace another.
    """
    if every and points is not None:
        raise UsageError("--points and --all exclude each other")
    _end_in_order()
    seconds = None if every or points is not None else crashtest.SECONDS
    with terminal.progress("killing", thread=False) as show:
        found = crashtest.crash_test(directory, places=points, seconds=seconds, show=show)
    if app.json:
        terminal.emit({**asdict(found), "not_tested": _NOT_TESTED})
    else:
        _tell(found)
    return 1 if found.violations else 0


def _end_in_order() -> None:
    """Let a signal that asks for the end remove what lies there, like an interrupt."""

    def leave(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), leave)


def _tell(found: crashtest.Findings) -> None:
    here = found.file_system
    named = "yes" if here.exclusive_rename else "no; objects get their names by link and unlink"
    synced = "yes" if here.directory_sync else "no; a power cut may take new names back"
    leased = "yes" if here.leases else "no; pictures in hand are compared by size and times"
    terminal.details(
        {
            "file system": here.type or "unknown",
            "read leases": leased,
            "exclusive rename": named,
            "directory sync": synced,
            "killed at": f"{found.killed} of {found.places} places",
            "violations": len(found.violations),
            "not tested": _NOT_TESTED,
            "time": format_duration(found.seconds),
        }
    )
    for violation in found.violations:
        _tell_violation(violation)
    if found.kept:
        terminal.note(f"secimg-watch: what it left lies in {found.kept}, without the key")


def _tell_violation(violation: crashtest.Violation) -> None:
    where = "without having been killed"
    if violation.number:
        call = f"{violation.call} {violation.subject}".rstrip()
        where = f"killed before call {violation.number} that changes the disk ({call})"
    terminal.note(f"secimg-watch: a violation, {where}")
    for fault in violation.faults:
        terminal.note(f"  {fault}")
