"""Commands about the audit log: ``audit verify`` and ``audit show``."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from secimg_watch.audit import events_of, read_log, verify_log
from secimg_watch.cli import terminal
from secimg_watch.cli.app import App, guarded, pass_app, with_identity, with_json
from secimg_watch.errors import SecimgError, TamperedError, UsageError
from secimg_watch.service import key_provider

if TYPE_CHECKING:
    from collections.abc import Iterable

    from secimg_watch.chain import Entry
    from secimg_watch.policy import Policy
    from secimg_watch.records import KeyEncryptionKey

_KEY_FIELDS = ("header", "former")  # long, and of use to `audit verify` alone


@click.group()
def audit() -> None:
    """Check and read the log of everything that was sealed, deleted or refused."""


@audit.command("verify")
@click.option("--kept", default=None, metavar="MAC", help="This entry has to be there still.")
@with_identity
@with_json
@pass_app
@guarded
def audit_verify(app: App, kept: str | None) -> int:
    """Find entries that were changed, removed, moved or cut off; exit 65 where there are any.

    It needs the policy's key. Of a write-only vault's log, --identity opens the entries.

    The last line names the last entry. Kept elsewhere and given back with --kept, it proves later
    that log or head were not put back to an earlier state, which nothing on this machine can show.
    """
    policy = app.policy()
    identities = app.identities()
    wanted = None if kept is None else _mac(kept)
    findings = verify_log(policy.state, _ring(app, policy), identities, kept=wanted)
    if app.json:
        terminal.emit(asdict(findings))
    else:
        for what, count in sorted(findings.events.items()):
            terminal.say(f"{count} {what}")
        for note in findings.notes:
            terminal.note(f"note: {note}")
        for fault in findings.faults:
            terminal.note(f"secimg-watch: {fault}")
        if findings.more_faults:
            terminal.note(f"secimg-watch: {findings.more_faults} more faults")
        verdict = "NOT as it was written" if findings.faults else "as it was written"
        terminal.say(f"{findings.entries} entries, {findings.first} to {findings.last}: {verdict}")
        terminal.say(f"last entry {findings.mac}")
    return TamperedError.exit_code if findings.faults else 0


def _mac(text: str) -> bytes:
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise UsageError("the MAC of an entry has 64 hexadecimal digits")
    return bytes.fromhex(text)


def _ring(app: App, policy: Policy) -> tuple[KeyEncryptionKey, ...]:
    if app.identity is None:
        return app.ring(policy)
    try:
        return key_provider(policy).load_ring()
    except SecimgError as error:  # as where the key is lost, which is what that file is for
        terminal.note(f"without the key: {error}")
        return ()


@audit.command("show")
@click.option("--object", "object_id", default="", metavar="ID", help="Of this object (a prefix).")
@click.option("--event", default="", metavar="EVENT", help="Of this kind, e.g. deleted.")
@click.option("--last", type=click.IntRange(1), default=None, help="So many, the newest.")
@with_json
@pass_app
@guarded
def audit_show(app: App, object_id: str, event: str, last: int | None) -> None:
    """Print entries, oldest first, without checking them; see audit verify for that."""
    wanted = (
        entry
        for entry in events_of(read_log(app.policy().state))
        if str(entry.fields.get("object", "")).startswith(object_id.lower())
        and event in {"", entry.event}
    )
    chosen: Iterable[Entry] = wanted if last is None else deque(wanted, last)
    if app.json:
        terminal.emit([_as_json(entry) for entry in chosen])
        return
    for entry in chosen:
        said = " ".join(f"{name}={value}" for name, value in _fields(entry).items())
        terminal.say(f"{entry.number} {entry.time} {entry.event} {said}".rstrip())


def _as_json(entry: Entry) -> dict[str, object]:
    return {"n": entry.number, "time": entry.time, "event": entry.event, **_fields(entry)}


def _fields(entry: Entry) -> dict[str, str | int]:
    return {name: value for name, value in entry.fields.items() if name not in _KEY_FIELDS}
