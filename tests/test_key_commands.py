"""Making and listing keys, and what happens with a wrong, a lost or an exposed one."""

from __future__ import annotations

import os
import stat
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

assert sys.platform != "win32"  # what is tested here does not exist there

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the service is for POSIX systems")

READING = ["vault list", "vault verify", "vault restore --all --to out", "drain"]


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


@pytest.fixture
def sealed(tmp_path: Path) -> Box:
    """A box with one picture in its vault and another one waiting."""
    box = make_box(tmp_path)
    (box.drop / "a.png").write_bytes(picture("red"))
    assert box("drain").code == 0
    (box.drop / "b.png").write_bytes(picture("blue"))
    return box


def key_id(box: Box) -> str:
    return box.key.read_text().split(":")[1]


def test_a_new_key_is_stored_for_the_owner_alone_and_given_to_the_vault(box: Box) -> None:
    outcome = box("key", "init")
    assert (outcome.code, outcome.out) == (0, f"key made: key file {box.key}\n")
    assert f"warning: whoever reads {box.key}" in outcome.err
    assert stat.S_IMODE(box.key.stat().st_mode) == 0o400
    assert key_id(box) in (box.vault / "vault.json").read_text()
    assert box("vault", "list", "--json").json() == []


def test_a_key_that_is_there_is_kept(box: Box) -> None:
    assert box("key", "init").code == 0
    before = contents(box.directory)
    outcome = box("key", "init")
    assert (outcome.code, outcome.out) == (0, f"key exists already: key file {box.key}\n")
    assert contents(box.directory) == before


def test_a_listing_says_which_key_each_vault_knows_and_whether_it_is_there(box: Box) -> None:
    assert box("key", "init").code == 0
    outcome = box("key", "list", "--json")
    assert outcome.code == 0
    row = {
        "kind": "key",
        "key": key_id(box),
        "vault": "main",
        "at_hand": True,
        "state": "current",
    }
    assert outcome.json() == {
        "provider": f"key file {box.key}",
        "state": "at hand",
        "keys": [row],
    }
    first, heads, cells = box("key", "list").out.splitlines()
    assert first == f"key file {box.key}: at hand"
    assert heads.split("\t") == ["kind", "key", "vault", "state"]
    assert cells.split("\t") == ["key", key_id(box), "main", "current"]


def states(box: Box) -> dict[str, str]:
    """What a listing says of each key and recipient."""
    return {row["key"]: row["state"] for row in box("key", "list", "--json").json()["keys"]}


def test_a_listing_tells_the_current_key_from_former_ones(box: Box) -> None:
    assert box("key", "init").code == 0
    old = key_id(box)
    assert box("key", "rotate").code == 0
    new = key_id(box)
    assert states(box) == {old: "former", new: "current"}
    box.key.unlink()
    assert states(box) == {old: "not at hand", new: "not at hand"}


def test_a_listing_says_which_recipients_have_shown_their_private_key(box: Box) -> None:
    identities = [generate_identity() for _ in range(2)]
    shown, other = (each.key_id.hex() for each in identities)
    recipients = [format_recipient(recipient_of(each)) for each in identities]
    box.write_policy(more={"recipients": recipients})
    assert box("key", "init").code == 0
    file = box.directory / "identity"
    file.write_text(identity_file(identities[0]))
    assert box("key", "recovery", "confirm", "--identity", file).code == 0
    assert states(box) == {key_id(box): "current", shown: "confirmed", other: "not confirmed"}
    rows = box("key", "list", "--json").json()["keys"]
    assert [row["kind"] for row in rows] == ["key", "recipient", "recipient"]
    assert [row["at_hand"] for row in rows] == [True, False, False]


def test_the_keys_of_a_write_only_vault_are_its_recipients(box: Box) -> None:
    identity = generate_identity()
    recipient = format_recipient(recipient_of(identity))
    box.write_policy(more={"key": {"provider": "none"}, "recipients": [recipient]})
    outcome = box("key", "init")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("no key: none (write-only")
    assert states(box) == {identity.key_id.hex(): "not confirmed"}
    assert box("key", "list", "--json").json()["state"] == "write-only"


def test_a_listing_works_without_the_key_and_without_a_vault(box: Box) -> None:
    nothing = box("key", "list", "--json").json()
    assert nothing["keys"] == []
    assert "does not exist" in nothing["state"]
    assert box("key", "init").code == 0
    box.key.unlink()
    lost = box("key", "list", "--json").json()
    assert [row["at_hand"] for row in lost["keys"]] == [False]
    assert "does not exist" in lost["state"]


@pytest.mark.parametrize("command", READING)
def test_another_key_than_the_vaults_is_78_and_nothing_happens(sealed: Box, command: str) -> None:
    sealed.key.unlink()
    sealed.make_key()
    before = contents(sealed.vault), contents(sealed.drop)
    outcome = sealed(*command.split())
    assert "nothing was encrypted or deleted" in check_complaint(outcome, 78)
    assert (contents(sealed.vault), contents(sealed.drop)) == before
    assert not (sealed.cli.home / "out").exists()


def test_another_value_under_the_vaults_key_id_is_78_and_nothing_happens(sealed: Box) -> None:
    line = sealed.key.read_text()
    old = line.split(":")[1]
    sealed.key.unlink()
    sealed.make_key()
    other = sealed.key.read_text().split(":")[2]
    sealed.key.chmod(0o600)
    sealed.key.write_text(f"secimg1:{old}:{other}")
    before = contents(sealed.vault), contents(sealed.drop)
    for command in ("drain", "vault list"):
        check_complaint(sealed(*command.split()), 78)
    assert (contents(sealed.vault), contents(sealed.drop)) == before


def test_a_lost_key_is_78_and_says_how_to_make_one(box: Box) -> None:
    box("key", "init")
    box.key.unlink()
    for command in READING:
        outcome = box(*command.split())
        assert str(box.key) in check_complaint(outcome, 78)
        assert "hint: " in outcome.err


def test_a_lost_key_is_not_made_anew_for_a_vault_that_needs_the_old_one(sealed: Box) -> None:
    old = key_id(sealed)
    sealed.key.unlink()
    sentence = check_complaint(sealed("key", "init"), 78)
    assert old[:8] in sentence
    assert not sealed.key.exists()


def test_a_vault_that_lost_its_description_gets_no_other_key(sealed: Box) -> None:
    (sealed.vault / "vault.json").unlink()
    before = contents(sealed.vault), contents(sealed.drop)
    check_complaint(sealed("key", "init"), 78)
    assert sealed("drain").code in {75, 78}
    assert (contents(sealed.vault).keys() - {"lock"}) == before[0].keys() - {"lock"}
    assert contents(sealed.drop) == before[1]


@pytest.mark.parametrize("mode", [0o644, 0o440, 0o604, 0o660])
def test_a_key_that_others_can_read_is_78(box: Box, mode: int) -> None:
    box("key", "init")
    box.key.chmod(mode)
    (box.drop / "a.png").write_bytes(picture())
    for command in ("drain", "key init"):
        outcome = box(*command.split())
        assert str(box.key) in check_complaint(outcome, 78)
        assert "0400" in outcome.err
    assert contents(box.drop).keys() == {"a.png"}


def test_a_key_behind_a_link_or_of_another_kind_is_78(box: Box, tmp_path: Path) -> None:
    box.make_key()
    box.key.rename(tmp_path / "real")
    box.key.symlink_to("real")
    check_complaint(box("key", "init"), 78)
    box.key.unlink()
    os.mkfifo(box.key, 0o600)
    check_complaint(box("key", "init"), 78)
    box.key.unlink()
    box.key.mkdir(0o700)
    check_complaint(box("key", "init"), 78)
    assert not box.vault.exists()


@pytest.mark.parametrize("text", ["", "secimg1:\n", "password\n", "secimg1:{}\n"])
def test_a_file_without_a_key_in_it_is_78(box: Box, text: str) -> None:
    box.key.write_text(text)
    box.key.chmod(0o400)
    outcome = box("key", "init")
    check_complaint(outcome, 78)
    assert "password" not in outcome.err
    assert box.key.read_text() == text


def test_a_key_that_a_command_prints_serves(box: Box, tmp_path: Path) -> None:
    box.make_key()
    box.key.rename(tmp_path / "real")
    box.write_policy(more={"key": {"provider": "command", "command": ["cat", f"{tmp_path}/real"]}})
    assert box("key", "init").code == 0
    (box.drop / "a.png").write_bytes(picture())
    assert box("drain").code == 0
    assert len(box.objects()) == 1


def test_a_command_that_fails_is_75_and_nothing_is_made(box: Box) -> None:
    box.write_policy(more={"key": {"provider": "command", "command": ["false"]}})
    check_complaint(box("key", "init"), 75)
    check_complaint(box("drain"), 75)
    assert not box.vault.exists()


def test_without_a_session_the_keyring_is_75_and_nothing_is_made(box: Box) -> None:
    box.write_policy(more={"key": {"provider": "keyring"}})
    check_complaint(box("key", "init"), 75)
    assert not box.vault.exists()


def test_a_credential_serves_where_systemd_gives_one(box: Box, tmp_path: Path) -> None:
    box.make_key()
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    box.key.rename(credentials / "secimg-watch.main")
    box.write_policy(more={"key": {"provider": "auto"}})
    box.cli.environ["CREDENTIALS_DIRECTORY"] = str(credentials)
    outcome = box("key", "init")
    assert outcome.code == 0
    assert "systemd credential secimg-watch.main" in outcome.out
    (credentials / "secimg-watch.main").unlink()
    check_complaint(box("vault", "list"), 78)
