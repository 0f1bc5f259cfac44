"""What the service manager is told, received by a real datagram socket."""

from __future__ import annotations

import os
import secrets
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secimg_watch import notify
from secimg_watch.notify import Notifier

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="systemd is Linux's")


def bound(address: str) -> socket.socket:
    family: int = getattr(socket, "AF_UNIX", 0)
    manager = socket.socket(family, socket.SOCK_DGRAM)
    manager.bind(address)
    manager.settimeout(5)
    return manager


@pytest.fixture
def path() -> Iterator[str]:
    """Give a path for a socket, short enough for one (107 bytes)."""
    with tempfile.TemporaryDirectory(prefix="notify-") as folder:
        yield str(Path(folder, "socket"))


@pytest.fixture
def manager(path: str) -> Iterator[socket.socket]:
    with bound(path) as listening:
        yield listening


@pytest.fixture
def notifier(manager: socket.socket, path: str) -> Notifier:
    return Notifier({"NOTIFY_SOCKET": path})


def received(manager: socket.socket) -> str:
    return manager.recv(65536).decode()


def test_ready_carries_the_status(manager: socket.socket, notifier: Notifier) -> None:
    notifier.ready("watching 3 folders")
    assert received(manager) == "READY=1\nSTATUS=watching 3 folders"


def test_each_call_sends_its_own_assignment(manager: socket.socket, notifier: Notifier) -> None:
    notifier.status("waiting for key")
    notifier.stopping()
    notifier.watchdog()
    notifier.extend(2.5)
    messages = [received(manager) for _ in range(4)]
    assert messages == [
        "STATUS=waiting for key",
        "STOPPING=1",
        "WATCHDOG=1",
        "EXTEND_TIMEOUT_USEC=2500000",
    ]


def test_reloading_carries_the_monotonic_time_in_microseconds(
    manager: socket.socket, notifier: Notifier
) -> None:
    before = time.monotonic_ns() // 1000
    notifier.reloading()
    first, second = received(manager).split("\n")
    assert first == "RELOADING=1"
    name, value = second.split("=")
    assert name == "MONOTONIC_USEC"
    assert before <= int(value) <= time.monotonic_ns() // 1000


@pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are Linux's")
def test_an_abstract_socket_is_reached() -> None:
    name = f"secimg-watch-{secrets.token_hex(8)}"
    with bound(f"\0{name}") as manager:
        Notifier({"NOTIFY_SOCKET": f"@{name}"}).status("here")
        assert received(manager) == "STATUS=here"


@given(st.text(max_size=2000))
def test_a_status_is_one_line_within_the_limit_whatever_it_contains(text: str) -> None:
    with tempfile.TemporaryDirectory(prefix="notify-") as folder:
        path = str(Path(folder, "socket"))
        with bound(path) as manager:
            Notifier({"NOTIFY_SOCKET": path}).status(text)
            message = received(manager)
    assert message.startswith("STATUS=")
    assert "\n" not in message
    assert len(message.encode()) < 4096


def test_a_line_break_in_a_status_makes_no_second_assignment(
    manager: socket.socket, notifier: Notifier
) -> None:
    notifier.status("scan\nMAINPID=1\udcff.png")
    assert received(manager) == "STATUS=scan MAINPID=1 .png"


@pytest.mark.parametrize("address", ["", "relative", "vsock:2:9", "/nonexistent/socket", "/" * 200])
def test_a_manager_that_cannot_be_reached_is_no_error(address: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": address})
    notifier.ready("on")
    notifier.stopping()


def test_a_manager_that_does_not_listen_any_more_is_no_error(
    manager: socket.socket, notifier: Notifier
) -> None:
    manager.close()
    notifier.watchdog()


def test_a_manager_that_reads_nothing_does_not_block_the_service(
    manager: socket.socket, notifier: Notifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "SEND_TIMEOUT", 0.01)
    limit = 2000  # net.unix.max_dgram_qlen is 10 to 512
    for _ in range(limit):
        before = time.monotonic()
        notifier.watchdog()
        if time.monotonic() - before >= 0.01:
            break
    else:
        pytest.fail("the queue never filled")
    assert received(manager) == "WATCHDOG=1"


def test_without_a_manager_nothing_is_sent_and_nobody_watches() -> None:
    notifier = Notifier({})
    notifier.ready("on")
    assert notifier.watchdog_seconds is None


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "1500000", "WATCHDOG_PID": str(os.getpid())}, 1.5),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid() + 1)}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-5"}, None),
        ({"WATCHDOG_USEC": ""}, None),
        ({"WATCHDOG_PID": str(os.getpid())}, None),
    ],
)
def test_the_watchdog_interval_is_read_if_it_is_meant_for_this_process(
    environ: dict[str, str], seconds: float | None
) -> None:
    assert Notifier(environ).watchdog_seconds == seconds


@given(st.text(), st.text())
def test_any_watchdog_setting_gives_a_positive_interval_or_none(usec: str, pid: str) -> None:
    interval = Notifier({"WATCHDOG_USEC": usec, "WATCHDOG_PID": pid}).watchdog_seconds
    assert interval is None or interval > 0
