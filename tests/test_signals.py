"""What the running service does when it is told to stop, to reload, or is started twice."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from daemon import LINUX, Daemon, Site, picture, place, wait_until

pytestmark = pytest.mark.skipif(not LINUX, reason="the service is Linux's")


def backlog(site: Site, count: int) -> dict[bytes, bytes]:
    return {f"{n}.jpg".encode(): place(site.drop / f"{n}.jpg", picture()) for n in range(count)}


def reload(daemon: Daemon) -> None:
    before = len(daemon.notices())
    daemon.send("HUP")
    daemon.wait_for_notice("RELOADING=1", since=before)
    daemon.wait_for_notice("READY=1", since=before)


def test_a_stop_in_the_middle_of_a_backlog_loses_nothing_and_leaves_no_temporaries(
    site: Site,
) -> None:
    contents = backlog(site, 80)
    first = site.start()
    wait_until(lambda: len(site.objects()) >= 5, "the first objects")
    assert first.stop() == 0
    sealed, left = site.restored(), site.plaintexts()
    assert 0 < len(sealed) < 80
    assert len(sealed) + len(left) == 80
    assert site.temporaries() == []
    assert {n: (site.drop / os.fsdecode(n)).read_bytes() for n in left} == {
        name: content for name, content in contents.items() if name not in sealed
    }
    site.start()
    site.wait_until_clear()
    assert site.restored() == contents
    assert len(site.objects()) == 80


def test_a_stop_is_announced_and_ends_the_process_and_its_children(site: Site) -> None:
    daemon = site.start()
    place(site.drop / "a.jpg", picture())
    site.wait_for_objects(1)
    assert daemon.stop() == 0
    wait_until(daemon.group_is_empty, "no process to be left")
    wait_until(lambda: "STOPPING=1" in daemon.notices(), "STOPPING=1")
    assert site.ask("status")["running"] is False


def test_an_interrupt_from_the_terminal_is_a_stop(site: Site) -> None:
    daemon = site.start()
    daemon.send("INT")
    assert daemon.ended() == 0
    assert "STOPPING=1" in wait_until(daemon.notices, "notices")


def test_ready_is_said_once_the_folders_can_be_served_and_carries_a_status(site: Site) -> None:
    daemon = site.start()
    assert any(line.startswith("STATUS=0 sealed") for line in daemon.notices())
    place(site.drop / "a.jpg", picture())
    daemon.wait_for_notice("STATUS=1 sealed, 0 waiting")


def test_a_changed_policy_is_in_force_after_a_reload(site: Site) -> None:
    daemon = site.start()
    place(site.drop / "a.png", picture("PNG"))
    site.wait_until_clear()
    site.folder["exclude"] = ["*.png"]
    site.write_policy()
    reload(daemon)
    place(site.drop / "b.png", picture("PNG"))
    place(site.drop / "c.jpg", picture())
    wait_until(lambda: site.plaintexts() == [b"b.png"], "only the excluded one to be left")
    site.folder["exclude"] = []
    site.write_policy()
    reload(daemon)
    site.wait_until_clear()
    assert sorted(site.restored()) == [b"a.png", b"b.png", b"c.jpg"]
    assert "the new policy is in force" in daemon.log()


def test_a_folder_that_a_reload_adds_is_watched(site: Site) -> None:
    daemon = site.start()
    more = site.top / "more"
    more.mkdir()
    place(more / "early.jpg", picture())
    site.policy["folders"].append({"path": str(more), "vault": "main", "settle": "0s"})
    site.write_policy()
    reload(daemon)
    place(more / "late.jpg", picture())
    site.wait_until_clear(more)
    assert sorted(site.restored()) == [b"early.jpg", b"late.jpg"]


@pytest.mark.parametrize(
    "text", ["version: 2\n", "folders: [\n", "", "version: 1\nsurprise: true\n"]
)
def test_an_invalid_policy_leaves_the_old_one_in_force_and_says_so(site: Site, text: str) -> None:
    daemon = site.start()
    good = site.policy_path.read_text()
    site.policy_path.write_text(text)
    reload(daemon)
    assert "the old policy stays in force" in daemon.log()
    site.policy_path.write_text(good)
    content = place(site.drop / "a.jpg", picture())
    site.wait_until_clear()
    assert site.restored() == {b"a.jpg": content}


def test_a_policy_with_another_state_directory_is_not_taken_while_running(site: Site) -> None:
    daemon = site.start()
    site.policy["state"] = str(site.top / "other state")
    site.write_policy()
    reload(daemon)
    assert "'state' cannot change while the service runs" in daemon.log()
    place(site.drop / "a.jpg", picture())
    site.wait_until_clear()
    assert not (site.top / "other state").exists()


def test_a_reload_in_the_middle_of_a_backlog_loses_nothing(site: Site) -> None:
    daemon = site.start()
    contents = backlog(site, 40)
    for _ in range(2):
        reload(daemon)
    site.wait_until_clear()
    assert site.restored() == contents


@pytest.mark.parametrize("name", ["HUP", "USR1"])
def test_signals_that_come_in_a_burst_do_no_harm(site: Site, name: str) -> None:
    daemon = site.start()
    for number in range(20):
        daemon.send(name)
        place(site.drop / f"{number}.jpg", picture())
    site.wait_until_clear()
    assert len(site.restored()) == 20
    assert daemon.stop() == 0


def test_the_watchdog_is_fed_where_there_is_one(site: Site) -> None:
    daemon = site.start({"WATCHDOG_USEC": "5000000"})
    daemon.wait_for_notice("WATCHDOG=1")
    fed = len(daemon.notices())
    daemon.wait_for_notice("WATCHDOG=1", since=fed)
    assert daemon.stop() == 0


def test_a_second_service_on_the_same_state_is_refused(site: Site) -> None:
    first = site.start()
    second = site.launch()
    assert second.ended() == 75
    assert "another secimg-watch works with the state directory" in second.log()
    assert first.is_running()
    place(site.drop / "a.jpg", picture())
    site.wait_until_clear()


def test_a_second_service_on_the_same_vault_does_not_write_to_it(site: Site) -> None:
    first = site.start()
    place(site.drop / "a.jpg", picture())
    site.wait_until_clear()
    other = Site(site.top / "other")
    other.vault, other.key = site.vault, site.key
    other.policy["vaults"] = site.policy["vaults"]
    other.policy["key"] = site.policy["key"]
    content = place(other.drop / "b.jpg", picture())
    second = other.launch()
    try:
        second.wait_for_log("another process writes to the vault")
        assert other.plaintexts() == [b"b.jpg"]
        assert len(site.objects()) == 1
        assert first.stop() == 0
        other.wait_until_clear()
        assert content in other.restored().values()
        assert second.stop() == 0
    finally:
        second.close()


def test_a_drain_beside_a_running_service_is_refused(site: Site) -> None:
    site.start()
    command = [sys.executable, "-m", "secimg_watch", "--policy", str(site.policy_path), "drain"]
    drained = subprocess.run(command, capture_output=True, text=True, check=False)
    assert drained.returncode == 75
    assert "another secimg-watch" in drained.stderr


FLOOD = """
import os, signal, subprocess, sys
from secimg_watch.cli.running import _Signals

signals = _Signals()
code = "import os, sys\\nfor _ in range(30_000): os.kill(int(sys.argv[1]), int(sys.argv[2]))"
sender = subprocess.Popen(
    [sys.executable, "-c", code, str(os.getpid()), str(int(signal.SIGUSR1))]
)
while sender.poll() is None:
    signals.wait(0.001)
assert signals.rescan
"""


def test_signals_that_meet_each_others_handlers_do_not_wait_for_themselves() -> None:
    subprocess.run([sys.executable, "-c", FLOOD], check=True, timeout=60)
