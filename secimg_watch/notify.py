"""Notifications to systemd, by the datagram protocol of sd_notify(3).

Without ``$NOTIFY_SOCKET`` every call does nothing, so that the same code runs in a terminal.
A notification that cannot be delivered is dropped: the service never fails over it.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

STATUS_LIMIT = 1000
"""Characters of a status that are sent. A datagram longer than 4096 bytes (``PIPE_BUF``) is
ignored by systemd, and a character takes at most 4 bytes."""

SEND_TIMEOUT = 1.0
"""Seconds to wait for room in systemd's queue."""


class Notifier:
    """What the service tells its manager about its state."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        """Take the socket and the watchdog's interval from the environment."""
        self._address = environ.get("NOTIFY_SOCKET", "")
        self._watchdog = _watchdog_seconds(environ)

    @property
    def watchdog_seconds(self) -> float | None:
        """Seconds within which ``watchdog`` must be called again; None where nobody watches."""
        return self._watchdog

    def ready(self, status: str) -> None:
        """Say that start-up, or a reload, is finished."""
        self._send("READY=1", _status(status))

    def status(self, text: str) -> None:
        """Show one line in ``systemctl status``."""
        self._send(_status(text))

    def stopping(self) -> None:
        """Say that the service is shutting down."""
        self._send("STOPPING=1")

    def reloading(self) -> None:
        """Say that a reload begins. ``ready`` must follow, whatever becomes of the reload.

        The monotonic time is what ``Type=notify-reload`` waits for; others ignore it.
        """
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def watchdog(self) -> None:
        """Say that the service makes progress."""
        self._send("WATCHDOG=1")

    def extend(self, seconds: float) -> None:
        """Ask for that much more time, counted from now, to start or to stop."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}")

    def _send(self, *assignments: str) -> None:
        if self._address.startswith(("/", "@")):
            _deliver("\n".join(assignments).encode(), self._address)


def _deliver(message: bytes, address: str) -> None:
    if sys.platform != "win32":
        # A leading "@" stands for the zero byte of an abstract address.
        raw = os.fsencode("\0" + address[1:] if address[0] == "@" else address)
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender,
        ):
            sender.settimeout(SEND_TIMEOUT)
            sender.sendto(message, raw)


def _status(text: str) -> str:
    """One line: a line break in a file's name must not become an assignment of its own."""
    line = "".join(each if each.isprintable() else " " for each in text)
    return f"STATUS={line[:STATUS_LIMIT]}"


def _watchdog_seconds(environ: Mapping[str, str]) -> float | None:
    """Read the interval, unless it is meant for another process."""
    interval = environ.get("WATCHDOG_USEC", "")
    process = environ.get("WATCHDOG_PID", "") or str(os.getpid())
    if process != str(os.getpid()):
        return None
    if not re.fullmatch(r"[0-9]{1,18}", interval) or int(interval) == 0:
        return None
    return int(interval) / 1_000_000
