"""The order of the stages is checked by the type checker: skipping one does not pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from mypy import api

if TYPE_CHECKING:
    from pathlib import Path

BEGINNING = """
from contextlib import ExitStack
from secimg_watch.claim import claim
from secimg_watch.erase import Erasure, erase
from secimg_watch.hold import hold
from secimg_watch.records import (
    Arrival, Claimed, Committed, Erased, Held, Inspected, Inspection, Job, KeySet, Proof,
    Sealed, Settled, Staged, Verified,
)
from secimg_watch.roots import Root
from secimg_watch.sealing import seal
from secimg_watch.vault import Vault, commit
from secimg_watch.verify import verify

def beat() -> None: ...
"""

RIGHT_ORDER = """
def whole_way(
    job: Job, inspection: Inspection, root: Root, vault: Vault, keys: KeySet
) -> Erased | Exception:
    with ExitStack() as hands:
        held = hold(job, root, hands)
        claimed = claim(Inspected(held, inspection), root, hands, move=True)
        sealed = seal(claimed, keys=keys, vault_id=b"", beat=beat)
        staged = vault.stage(sealed)
        verified = verify(staged, keys=keys, vault_id=b"", from_device=True, beat=beat)
        [committed] = commit([(vault, verified)])
        if isinstance(committed, Exception):
            return committed
        [erased] = erase([Erasure(committed, root, keep=False, move_to=None)])
        return erased
"""

# Each takes a shortcut in the one line that is marked.
SHORTCUTS = {
    "erase what is merely staged": "Erasure(staged, root, keep=False, move_to=None)",
    "erase what is merely verified": "Erasure(verified, root, keep=False, move_to=None)",
    "erase what is merely claimed": "Erasure(claimed, root, keep=False, move_to=None)",
    "erase without saying what is wanted": "erase([committed])",
    "commit what is merely staged": "commit([(vault, staged)])",
    "commit what is merely sealed": "commit([(vault, sealed)])",
    "commit a second time": "commit([(vault, committed)])",
    "verify what is merely sealed": (
        "verify(sealed, keys=keys, vault_id=b'', from_device=True, beat=beat)"
    ),
    "verify what is merely claimed": (
        "verify(claimed, keys=keys, vault_id=b'', from_device=True, beat=beat)"
    ),
    "stage what is merely claimed": "vault.stage(claimed)",
    "stage what is verified": "vault.stage(verified)",
    "seal what is merely inspected": "seal(inspected, keys=keys, vault_id=b'', beat=beat)",
    "seal what is merely in hand": "seal(held, keys=keys, vault_id=b'', beat=beat)",
    "claim what was not inspected": "claim(held, root, hands, move=True)",
    "claim a job": "claim(job, root, hands, move=True)",
    "take in hand what has no job": "hold(settled, root, hands)",
    "settle without a proof": "Settled(arrival)",
    "pass evidence of another stage": "Verified(committed)",
    "change evidence": "committed.verified = verified",
}

PARAMETERS = """
    arrival: Arrival, settled: Settled, job: Job, held: Held, inspected: Inspected,
    claimed: Claimed, sealed: Sealed, staged: Staged, verified: Verified, committed: Committed,
    root: Root, hands: ExitStack, vault: Vault, keys: KeySet,
"""


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> set[int]:
    """Check all of it in one run, and give the lines that are refused."""
    folder = tmp_path_factory.mktemp("stages")
    config = folder / "mypy.ini"
    config.write_text("[mypy]\nstrict = true\n", encoding="ascii")
    script = folder / "shortcuts.py"
    script.write_text("\n".join(lines()), encoding="ascii")
    out, err, _ = api.run(
        [
            f"--config-file={config}",
            f"--cache-dir={folder / 'cache'}",
            "--follow-imports=silent",
            "--no-error-summary",
            "--hide-error-context",
            "--no-color-output",
            str(script),
        ]
    )
    assert err == ""
    complaints = [line.split(":", 3) for line in out.splitlines() if ": error:" in line]
    assert {path_of(script, each[0]) for each in complaints} == {script}, out
    return {int(each[1]) for each in complaints}


def path_of(script: Path, said: str) -> Path | str:
    return script if said.endswith(script.name) else said


def lines() -> list[str]:
    """The whole script. Each shortcut is a function of its own, in a line of its own."""
    text = [*BEGINNING.splitlines(), *RIGHT_ORDER.splitlines()]
    for number, shortcut in enumerate(SHORTCUTS.values()):
        text += [f"def shortcut_{number}(", *PARAMETERS.splitlines(), ") -> None:"]
        text.append(f"    {shortcut}")
    return text


def test_the_right_order_is_accepted(refused: set[int]) -> None:
    first_shortcut = lines().index("def shortcut_0(")
    assert [number for number in refused if number <= first_shortcut] == []


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_no_stage_can_be_skipped(refused: set[int], shortcut: str) -> None:
    assert lines().index(f"    {SHORTCUTS[shortcut]}") + 1 in refused


def test_nothing_else_is_refused(refused: set[int]) -> None:
    assert len(refused) == len(SHORTCUTS)
