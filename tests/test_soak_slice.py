"""A few seconds of the long life: one kill, one reload, and an account of every picture."""

from __future__ import annotations

import sys
from pathlib import Path

from path_builders import only_on_linux

only_on_linux()
assert sys.platform == "linux"
sys.path.insert(0, str(Path(__file__).parent / "campaigns"))  # where the campaigns lie

import soak  # noqa: E402 - elsewhere it cannot be imported


def test_every_picture_is_accounted_for_and_what_is_missing_is_found(tmp_path: Path) -> None:
    settings = soak.Settings(
        seconds=1.5, top=tmp_path, seed=1, rate=60.0, script=("kill", "reload")
    )
    life = soak.Soak(settings)
    life.run()
    soak.Account(life).make()
    assert life.violations == []
    assert life.kills > 0
    assert len(life.ledger) > 30
    for harm in ("clear", "claim", "tmp", "remove"):
        soak.SABOTAGE[harm](life)
    soak.Account(life).make()
    for found in ("in clear", "the staging directory holds", "holds tmp/", "LOST: object"):
        assert any(found in each for each in life.violations), found
