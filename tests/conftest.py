"""Fixtures for tests that run the service for real, and a watch over threads left behind."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # where the tests' own helpers lie

from daemon import Site

if TYPE_CHECKING:
    from collections.abc import Iterator


def pytest_xdist_auto_num_workers() -> int:
    """One worker more than there are processors: some always wait for the service."""
    return (os.cpu_count() or 1) + 1


_OURS = ("folder ", "worker ", "finisher")
_GRACE = 5.0  # seconds that a thread may take to end after it was told to


def _left_over(known: set[threading.Thread]) -> list[str]:
    running = [t for t in threading.enumerate() if t not in known]
    return [t.name for t in running if t.name.startswith(_OURS)]


@pytest.fixture(autouse=True)
def _no_thread_is_left_behind() -> Iterator[None]:
    known = set(threading.enumerate())
    yield
    deadline = time.monotonic() + _GRACE
    while _left_over(known) and time.monotonic() < deadline:
        time.sleep(0.01)
    left = _left_over(known)
    assert not left, f"threads of the service outlived the test: {left}"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """Give a place with a key, a policy, a folder and a vault; its daemons end with the test.

    Every one that still runs then is stopped and must end well, and none may have logged a
    defect at any time.
    """
    place = Site(tmp_path)
    try:
        yield place
        for daemon in place.daemons:
            if daemon.is_running():
                assert daemon.stop() == 0, daemon.log()
        for daemon in place.daemons:
            assert "Traceback" not in daemon.log(), daemon.log()
            assert "a defect" not in daemon.log(), daemon.log()
    finally:
        for daemon in place.daemons:
            daemon.close()
