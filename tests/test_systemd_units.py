"""The units: what they promise to systemd is what the program does."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from secimg_watch import service
from secimg_watch.errors import ConfigError
from secimg_watch.policy import Limits

SYSTEMD = Path(__file__).parent.parent / "systemd"
UNITS = {"system": SYSTEMD / "secimg-watch.service", "user": SYSTEMD / "user/secimg-watch.service"}
SECONDS = {"": 1.0, "s": 1.0, "min": 60.0, "h": 3600.0}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="systemd is Linux's")
each_unit = pytest.mark.parametrize("kind", UNITS)


def section(kind: str, name: str = "Service") -> dict[str, str]:
    parser = configparser.RawConfigParser(strict=True)
    parser.optionxform = str  # type: ignore[method-assign,assignment]  # systemd's keys have case
    parser.read_string(UNITS[kind].read_text(encoding="utf-8"))
    return dict(parser[name])


def seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+)(s|min|h|)", text)
    assert match, text
    return int(match[1]) * SECONDS[match[2]]


@each_unit
def test_systemd_finds_nothing_to_complain_of(kind: str, tmp_path: Path) -> None:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("systemd-analyze is not installed")
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    unit = tmp_path / UNITS[kind].name
    # The programs that a unit starts are not on this machine; one that is takes their place.
    text = re.sub(r"(?m)^(Exec\w+=)\S+", r"\g<1>/bin/true", UNITS[kind].read_text())
    unit.write_text(text, encoding="utf-8")
    verified = subprocess.run(
        [tool, f"--{kind}", "verify", "--man=no", unit],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(runtime)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    complaints = [line for line in verified.stderr.splitlines() if unit.name in line]
    assert complaints == []
    assert verified.returncode == 0, verified.stderr


@each_unit
def test_the_service_says_itself_when_it_is_ready(kind: str) -> None:
    unit = section(kind)
    assert unit["Type"] == "notify"
    assert unit["NotifyAccess"] == "main"


@each_unit
def test_it_runs_the_command_that_there_is(kind: str) -> None:
    words = section(kind)["ExecStart"].split()
    assert words[0].endswith("/secimg-watch")
    assert words[-1] == "run"
    assert kind != "system" or words[1:3] == ["--policy", "/etc/secimg-watch/policy.yaml"]


@each_unit
def test_a_reload_is_the_signal_that_the_daemon_listens_to(kind: str) -> None:
    assert section(kind)["ExecReload"].split() == ["/bin/kill", "-HUP", "$MAINPID"]


@each_unit
def test_a_slow_picture_does_not_wake_the_watchdog(kind: str) -> None:
    assert seconds(section(kind)["WatchdogSec"]) > 2 * Limits().decode_seconds


@each_unit
def test_a_job_in_hand_may_be_finished_before_the_service_is_killed(kind: str) -> None:
    assert seconds(section(kind)["TimeoutStopSec"]) > service._STOP


@each_unit
def test_what_only_a_person_can_correct_is_not_started_again(kind: str) -> None:
    unit = section(kind)
    assert str(ConfigError.exit_code) in unit["RestartPreventExitStatus"].split()
    assert unit["Restart"] == "on-failure"


@each_unit
def test_a_crash_leaves_no_key_and_no_picture_in_a_core(kind: str) -> None:
    assert section(kind)["LimitCORE"] == "0"


@each_unit
def test_what_it_writes_is_for_its_own_user(kind: str) -> None:
    assert section(kind)["UMask"] == "0077"


@each_unit
def test_it_can_be_enabled(kind: str) -> None:
    wanted = {"system": "multi-user.target", "user": "default.target"}
    assert section(kind, "Install")["WantedBy"] == wanted[kind]


def test_the_system_service_is_not_root_and_keeps_its_state_to_itself() -> None:
    unit = section("system")
    assert unit["User"] == unit["Group"] == "secimg-watch"
    assert unit["StateDirectory"] == "secimg-watch"
    assert unit["StateDirectoryMode"] == "0700"
    assert unit["NoNewPrivileges"] == "yes"
