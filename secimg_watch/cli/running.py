"""Commands around the running service: ``run``, ``drain``, ``status``, ``why``, ``jobs``."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import time
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Final

import click

from secimg_watch import explain as explaining
from secimg_watch import kernel, report
from secimg_watch.claim import take_back
from secimg_watch.cli import terminal
from secimg_watch.cli.app import App, guarded, pass_app, start_log, with_json
from secimg_watch.errors import (
    NoInputError,
    NotReadyError,
    PolicyError,
    SecimgError,
    UsageError,
)
from secimg_watch.jobs import Jobs, Row, State
from secimg_watch.names import display
from secimg_watch.notify import Notifier
from secimg_watch.policy import Policy, load_policy
from secimg_watch.quantities import format_duration
from secimg_watch.records import FolderKey, ObjectId
from secimg_watch.roots import Root
from secimg_watch.service import Service

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import FrameType

log = logging.getLogger("secimg_watch.run")

_TICK: Final = 1.0
_STARTING: Final = 30.0  # seconds that systemd is asked for before recovery is through


class _Signals:
    """Signal handlers that only set flags, and the pipe that wakes the main loop.

    A handler runs in the middle of whatever the main thread does, other handlers included, so it
    takes no lock: a threading.Event has one, and would wait for itself.
    """

    def __init__(self) -> None:
        self._woken, self._waker = kernel.wake_pipe()
        self.stop = False
        self.reload = False
        self.rescan = False
        wanted = {"SIGTERM": "stop", "SIGINT": "stop", "SIGHUP": "reload", "SIGUSR1": "rescan"}
        self._flags = {
            getattr(signal, name): flag for name, flag in wanted.items() if hasattr(signal, name)
        }
        for number in self._flags:
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        setattr(self, self._flags[signal.Signals(number)], True)
        with contextlib.suppress(BlockingIOError):  # full: it wakes as it is
            os.write(self._waker, b"\0")

    def wait(self, seconds: float) -> None:
        """Sleep until a signal comes, or one has come since the last call."""
        if select.select([self._woken], [], [], seconds)[0]:
            os.read(self._woken, 65_536)


class Daemon:
    """The owner's loop around a service: signals, status, systemd's watchdog."""

    def __init__(self, path: Path, policy: Policy, show: Callable[[report.Report], None]) -> None:
        """``path``: where the policy came from, to be read again on SIGHUP."""
        self._path = path
        self._show = show
        self._notifier = Notifier()
        self._signals = _Signals()
        self._service = Service(policy, native=True)
        self._last = ""

    def run(self) -> None:
        """Run until a signal says to stop.

        Raises:
            SecimgError: the service cannot start or go on; its exit code says whether a restart
                can help.
        """
        kernel.protect_memory()
        kernel.share_one_heap()
        self._service.open()
        try:
            self._begin()
            self._notifier.ready(self._service.report(running=True).summary())
            while not self._signals.stop:
                self._turn()
        finally:
            self._notifier.stopping()
            self._end()

    def _end(self) -> None:
        if self._service.is_open:
            try:
                self._service.stop()
                self._write_status(running=False)
            finally:  # a queue that fails has no numbers to report
                self._service.close()

    def _begin(self) -> None:
        self._notifier.extend(_STARTING)
        self._service.tend()
        self._service.start()
        self._write_status(running=True)

    def _turn(self) -> None:
        self._signals.wait(_TICK)
        if self._signals.reload:
            self._signals.reload = False
            self._reload()
        if self._signals.rescan:
            self._signals.rescan = False
            self._service.rescan()
        self._service.tend()
        self._feed_watchdog()
        self._write_status(running=True)

    def _feed_watchdog(self) -> None:
        self._service.refuse_dead_threads()
        limit = self._notifier.watchdog_seconds
        # A worker is silent while a picture is inspected, which the policy may allow for long.
        patience = self._service.policy.limits.decode_seconds
        if limit is None or self._service.oldest_beat() < limit + patience:
            self._notifier.watchdog()

    def _write_status(self, *, running: bool) -> None:
        now = self._service.report(running=running)
        self._show(now)
        summary = now.summary()
        if summary != self._last:
            self._notifier.status(summary)
            self._last = summary
        report.write(self._service.policy.state, now)

    def _reload(self) -> None:
        self._notifier.reloading()
        try:
            policy = load_policy(self._path)
            if policy.state != self._service.policy.state:
                raise PolicyError("'state' cannot change while the service runs; restart it")
            successor = Service(policy, native=True)
            successor.refuse_wrong_key()
        except SecimgError as error:
            log.error("reload: %s; the old policy stays in force", error)
            for fault in getattr(error, "faults", ()):
                log.error("reload: %s", fault)
        else:
            self._replace(successor)
        self._notifier.ready(self._last)

    def _replace(self, successor: Service) -> None:
        self._service.stop()
        self._service.close()
        self._service = successor
        self._service.open()
        self._begin()
        log.info("reload: the new policy is in force")


@click.command()
@pass_app
@guarded
def run(app: App) -> None:
    """Run the service in the foreground."""
    start_log(app.verbose)
    path = app.find_policy()
    Daemon(path, load_policy(path), lambda _report: None).run()


@click.command()
@with_json
@pass_app
@guarded
def drain(app: App) -> int:
    """Take everything that is ready, then exit.

    Exit 0 when nothing is left, 1 when something failed, 75 when something is not ready yet.
    """
    start_log(app.verbose, level=logging.WARNING)
    kernel.protect_memory()
    service = Service(app.policy(), native=False)
    service.open()
    try:
        with terminal.progress("sealing") as show:
            sealed = service.drain(show)
        final = service.report(running=False)
        report.write(service.policy.state, final)
        return _tell_drained(app, sealed, final)
    finally:
        service.stop()
        service.close()


def _tell_drained(app: App, sealed: int, final: report.Report) -> int:
    failed = sum(f.quarantined + f.undeletable for f in final.folders)
    unready = sum(f.waiting + f.queued for f in final.folders)
    gone = [f for f in final.folders if f.health in {"gone", "paused"}]
    if app.json:
        terminal.emit({"sealed": sealed, "failed": failed, "not_ready": unready, **asdict(final)})
    else:
        terminal.say(f"{sealed} sealed, {failed} failed, {unready} not ready yet")
        for folder in gone:
            terminal.note(f"secimg-watch: folder {folder.path}: {folder.health}: {folder.reason}")
    if gone or unready:
        return NotReadyError.exit_code
    return 1 if failed else 0


@click.command()
@click.option("--follow", is_flag=True, help="Print again every second.")
@with_json
@pass_app
@guarded
def status(app: App, *, follow: bool) -> int:
    """Show how every folder is doing.

    Exit 0 when the service runs and all is well, 1 when something needs attention.
    """
    policy = app.policy()
    while True:
        now = report.read(policy.state)
        if now is None:
            raise NoInputError(
                "the service has not run yet with this policy",
                hint="start it with: secimg-watch run",
            )
        _show_status(app, now)
        if not follow:
            return 0 if _is_well(now) else 1
        time.sleep(_TICK)


def _is_well(now: report.Report) -> bool:
    healthy = all(f.health in {"ok", "starting"} for f in now.folders)
    nothing_failed = not any(f.quarantined or f.undeletable for f in now.folders)
    return now.running and now.key == "ready" and healthy and nothing_failed and not now.audit


def _show_status(app: App, now: report.Report) -> None:
    if app.json:
        terminal.emit(asdict(now))
        return
    when = datetime.fromtimestamp(now.written).astimezone().isoformat(" ", "seconds")
    state = f"running (pid {now.pid})" if now.running else f"not running; this was so at {when}"
    terminal.details(
        {
            "service": state,
            "key": now.key,
            "inspector": ", ".join(now.inspector) or "not started",
            **({"audit log": now.audit} if now.audit else {}),
            **{f"warning {n}": text for n, text in enumerate(now.warnings, 1)},
        }
    )
    for folder in now.folders:
        terminal.say("")
        terminal.details(_folder_fields(folder))


def _folder_fields(folder: report.FolderReport) -> dict[str, object]:
    health = folder.health.upper() + (f": {folder.reason}" if folder.reason else "")
    fields: dict[str, object] = {
        "folder": folder.path,
        "health": f"{health} ({folder.mode})",
        "waiting": f"{folder.waiting} ({folder.unready} without proof that they are complete)",
        "queued": folder.queued,
        "sealed": folder.sealed,
        "quarantined": folder.quarantined,
    }
    rare = {
        "left": folder.left,
        "kept": folder.kept,
        "undeletable": folder.undeletable,
        "vanished": folder.vanished,
    }
    fields.update({name: count for name, count in rare.items() if count})
    if folder.passed:
        fields["passed over"] = ", ".join(f"{n} {why}" for why, n in folder.passed.items())
    dwell = folder.dwell_ms
    if dwell.get("max"):
        p50, p95, longest = (format_duration(dwell[k] / 1000) for k in ("p50", "p95", "max"))
        fields["in clear for"] = f"median {p50}, 95 % below {p95}, longest {longest}"
    return fields


@click.command()
@click.argument("path")
@with_json
@pass_app
@guarded
def why(app: App, path: str) -> None:
    """Explain why one file is where it is."""
    policy = app.policy()
    # The name itself is never resolved: it may be a link, or gone.
    absolute = os.path.join(os.path.realpath(os.path.dirname(path) or "."), os.path.basename(path))
    with _queue(policy) as queue:
        answer = explaining.explain(
            absolute,
            policy,
            queue,
            lambda folder, relpath: _find_sealed(app, folder, relpath),
        )
    if app.json:
        terminal.emit({"path": display(path), **asdict(answer)})
    else:
        terminal.say(f"{answer.verdict}: {answer.reason}")


def _find_sealed(app: App, folder: str, relpath: str) -> ObjectId | None:
    for catalog in app.catalogs(None).values():
        found = catalog.sealed_as(folder, relpath)
        if found is not None:
            return found
    return None


@contextlib.contextmanager
def _queue(policy: Policy) -> Iterator[Jobs | None]:
    path = policy.state / "queue.sqlite"
    if not path.exists():
        yield None
        return
    queue = Jobs(path, replace=False)
    try:
        yield queue
    finally:
        queue.close()


@click.group()
def jobs() -> None:
    """Look at the queue, and retry what was set aside."""


@jobs.command("list")
@click.option("--state", type=click.Choice([str(s) for s in State]), help="Only this state.")
@with_json
@pass_app
@guarded
def jobs_list(app: App, state: str | None) -> None:
    """List all jobs that are not finished."""
    _list_jobs(app, State(state) if state else None)


@jobs.command("quarantine")
@with_json
@pass_app
@guarded
def jobs_quarantine(app: App) -> None:
    """List what was given up on, and why."""
    _list_jobs(app, State.QUARANTINED)


def _list_jobs(app: App, state: State | None) -> None:
    with _queue(app.policy()) as queue:
        rows = queue.rows(state=state) if queue else []
    if app.json:
        terminal.emit([_fields_of(row) for row in rows])
        return
    terminal.table(
        ("object", "state", "attempts", "folder", "name", "reason"),
        ((r.object_id, r.state, r.attempts, r.folder, r.relpath, r.reason) for r in rows),
    )


def _fields_of(row: Row) -> dict[str, object]:
    return {
        "object": row.object_id,
        "state": row.state,
        "attempts": row.attempts,
        "folder": row.folder,
        "name": display(row.relpath),
        "size": row.identity.size,
        "reason": row.reason,
        "not_before": row.not_before,
    }


@jobs.command("retry")
@click.argument("object_ids", nargs=-1, metavar="[OBJECT]...")
@click.option("--all", "everything", is_flag=True, help="Everything that is quarantined.")
@pass_app
@guarded
def jobs_retry(app: App, object_ids: tuple[str, ...], *, everything: bool) -> int:
    """Give set-aside jobs a fresh start. A running service takes them up by itself."""
    policy = app.policy()
    if bool(object_ids) == everything:
        raise UsageError("name the jobs to retry, or give --all")
    with _queue(policy) as queue:
        rows = queue.rows() if queue else []
        chosen = [r for r in rows if _is_chosen(r, object_ids, everything=everything)]
        queued = sum(_retry(row, policy, queue) for row in chosen) if queue else 0
    terminal.say(f"{queued} queued again")
    return 0 if queued or everything else 1


def _is_chosen(row: Row, object_ids: tuple[str, ...], *, everything: bool) -> bool:
    if everything:
        return row.state is State.QUARANTINED
    return any(prefix and row.object_id.startswith(prefix.lower()) for prefix in object_ids)


def _retry(row: Row, policy: Policy, queue: Jobs) -> bool:
    folders = {FolderKey(str(folder.path)): folder for folder in policy.folders}
    folder = folders.get(row.folder)
    if folder is not None:
        root = Root(folder.path, folder.staging)
        if root.staging is not None:
            take_back(row.object_id, root.staging)
    return queue.requeue(row.object_id)
