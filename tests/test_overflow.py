"""More events than the kernel keeps: what was not heard is found by a scan."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from daemon import LINUX, Site, picture, place, wait_until

pytestmark = pytest.mark.skipif(not LINUX, reason="the service is Linux's")

_LIMIT = Path("/proc/sys/fs/inotify/max_queued_events")


def test_pictures_whose_events_were_lost_are_sealed_all_the_same(site: Site) -> None:
    limit = int(_LIMIT.read_text())
    if limit > 50_000:
        pytest.skip(f"this machine keeps {limit} events; too many to overflow in a moment")
    site.folder.update(rescan="1h", exclude=["*.noise"])
    daemon = site.start()
    wait_until(lambda: site.status()["health"] == "ok", "the first scan")
    daemon.send("STOP")
    # Each file makes two events at least: it appears, and it is closed.
    for number in range(limit * 5 // 8):
        os.close(os.open(site.drop / f"{number}.noise", os.O_WRONLY | os.O_CREAT))
    contents = {
        f"{n}.jpg".encode(): place(site.drop / f"{n}.jpg", picture(padding=100)) for n in range(30)
    }
    daemon.send("CONT")
    site.wait_for_objects(30)
    wait_until(lambda: not list(site.drop.glob("*.jpg")), "the pictures to go")
    assert "the kernel's event queue overflowed" in daemon.log()
    assert site.restored() == contents
    wait_until(lambda: site.status()["passed"].get("excluded") == limit * 5 // 8, "the count")
