"""A slice of the races: whatever an adversary does between two calls, nothing is lost or torn."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from secimg_watch import tracer
from secimg_watch.errors import NotReadyError

CAMPAIGN: Final = Path(__file__).parent / "campaigns" / "race_every_call.py"

pytestmark = pytest.mark.skipif(
    not tracer.is_supported(), reason="system calls can be traced on some Linux machines only"
)


def test_an_adversary_at_any_call_costs_nothing_that_was_whole() -> None:
    words = [sys.executable, str(CAMPAIGN), "--slice"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode == NotReadyError.exit_code:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 violations" in done.stdout
