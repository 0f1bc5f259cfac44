"""What becomes of a vault whose key is lost, or whose disk is away while keys change."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
from cli_runner import Box, check_complaint, contents, make_box, picture

from secimg_watch.recipients import (
    format_recipient,
    generate_identity,
    identity_file,
    recipient_of,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the service is for POSIX systems")


@pytest.fixture
def recovery(tmp_path: Path) -> Path:
    """A file with the private key that the box's policy has the public key of."""
    path = tmp_path / "recovery.key"
    path.write_text(identity_file(generate_identity()))
    return path


@pytest.fixture
def box(tmp_path: Path, recovery: Path) -> Box:
    """A box with two sealed pictures and a recipient, of which the private key was not shown."""
    public = recovery.read_text().split("# ")[-1].split("\n")[0]
    box = make_box(tmp_path, more={"recipients": [public]})
    (box.drop / "a.png").write_bytes(picture("red"))
    (box.drop / "b.png").write_bytes(picture("blue"))
    assert box("drain").code == 0
    return box


def key_ids(box: Box) -> list[str]:
    rows = box("key", "list", "--json").json()["keys"]
    return [row["key"] for row in rows if row["kind"] == "key"]


def test_a_lost_key_is_replaced_with_the_recovery_key_and_the_vault_goes_on(
    box: Box, recovery: Path
) -> None:
    [lost] = key_ids(box)
    box.key.unlink()
    sentence = check_complaint(box("key", "init"), 78)
    assert "is not stored here" in sentence
    assert not box.key.exists()

    assert box("key", "init", "--identity", recovery).code == 0
    assert box("vault", "list").code == 1  # the new key opens nothing yet
    assert box("vault", "rekey", "--identity", recovery).code == 0
    assert box("vault", "verify").code == 0
    (box.drop / "c.png").write_bytes(picture("green"))
    assert box("drain").code == 0
    assert box("vault", "restore", "--all", "--to", "back").code == 0
    assert contents(box.cli.home / "back") == {
        "a.png": picture("red"),
        "b.png": picture("blue"),
        "c.png": picture("green"),
    }
    assert box("key", "retire", lost).code == 0
    assert lost not in key_ids(box)


def test_somebody_elses_private_key_replaces_no_lost_key(box: Box, tmp_path: Path) -> None:
    other = tmp_path / "other.key"
    other.write_text(identity_file(generate_identity()))
    before = contents(box.vault)
    box.key.unlink()
    check_complaint(box("key", "init", "--identity", other), 78)
    assert not box.key.exists()
    assert contents(box.vault) == before


@pytest.mark.parametrize("command", [("rotate",), ("retire", "former")], ids=" ".join)
def test_no_key_changes_while_a_vault_is_away(box: Box, command: tuple[str, ...]) -> None:
    assert box("key", "rotate").code == 0
    former = next(k for k in key_ids(box) if k not in box.key.read_text().split(" ")[0])
    assert box("vault", "rekey").code == 0
    away = box.vault.with_name("away")
    box.vault.rename(away)
    before = box.key.read_bytes(), contents(away)
    words = [former if word == "former" else word for word in command]
    check_complaint(box("key", *words), 66)
    assert not box.vault.exists()
    assert (box.key.read_bytes(), contents(away)) == before


def test_keys_of_a_store_that_cannot_be_written_are_not_touched(box: Box) -> None:
    line = box.key.read_text().strip()
    box.write_policy(more={"key": {"provider": "command", "command": ["echo", line]}})
    before = contents(box.vault)
    for words in (("rotate",), ("retire", key_ids(box)[0])):
        sentence = check_complaint(box("key", *words), 78)
        assert "cannot be written" in sentence
    assert contents(box.vault) == before


def test_no_recipient_is_taken_away_for_one_that_nobody_has_shown(box: Box, recovery: Path) -> None:
    assert box("key", "recovery", "confirm", "--identity", recovery).code == 0
    stranger = format_recipient(recipient_of(generate_identity()))
    box.write_policy(
        more={"recipients": [stranger], "recovery": "required", "key": {"provider": "none"}}
    )
    before = contents(box.vault)
    for command in ("rekey", "reencrypt"):
        sentence = check_complaint(box("vault", command, "--identity", recovery), 78)
        assert "no confirmed recovery key" in sentence
    assert contents(box.vault) == {**before, "rekey/lock": b""}
