"""A slice of two campaigns: killed, or failed, at some of its calls, nothing is lost or left."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from secimg_watch import tracer

CAMPAIGNS: Final = Path(__file__).parent / "campaigns"
NOT_ALLOWED: Final = "the system does not allow tracing"

pytestmark = pytest.mark.skipif(not tracer.is_supported(), reason="needs ptrace as Linux has it")


def run(name: str, *words: str) -> str:
    """Run a campaign's slice; its output, once it found nothing."""
    command = [sys.executable, str(CAMPAIGNS / f"{name}.py"), "--slice", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if NOT_ALLOWED in done.stderr:
        pytest.skip(NOT_ALLOWED)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def totals(output: str) -> list[int]:
    """The numbers in the line that sums up."""
    line = next(line for line in output.splitlines() if line.startswith("all "))
    return [int(number) for number in re.findall(r"\d+", line)]


def test_a_run_that_is_killed_at_any_of_its_calls_loses_and_leaves_nothing() -> None:
    calls, points, runs, _duplicates, violations, _seconds = totals(run("kill_every_call"))
    assert calls > 100
    assert points >= 18
    assert runs > 2 * points
    assert violations == 0


def test_a_run_whose_calls_fail_ends_with_a_reason_and_is_finished_later() -> None:
    output = run("fail_every_call")
    calls, faults, struck, runs, violations, _seconds = totals(output)
    assert calls > 400
    assert faults >= 20
    assert struck > faults // 2
    assert runs >= 2 * faults
    assert violations == 0
    assert "what finished the work:" in output
