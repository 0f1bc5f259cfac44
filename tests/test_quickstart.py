"""The first five minutes: one command, drop pictures in, get them back."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from cli_runner import PATIENCE, Cli, check_complaint, contents, picture, wait_until

from secimg_watch.policy import load_policy
from secimg_watch.recipients import (
    format_identity,
    generate_identity,
    identity_file,
    parse_identity_file,
    recipient_of,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the service is for POSIX systems")


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path / "home")


def set_up(cli: Cli, directory: str | Path) -> Path:
    """Set up in ``directory``, relative to the home; the policy's path."""
    assert cli("quickstart", "--setup-only", directory).code == 0
    return cli.home / directory / "policy.yaml"


def test_it_makes_everything_that_is_needed_and_nothing_that_others_can_read(cli: Cli) -> None:
    outcome = cli("quickstart", "--setup-only", "mine")
    assert outcome.code == 0
    made = cli.home / "mine"
    names = {"policy.yaml", "drop", "vault", "state", "vault.key", "recovery.key"}
    assert {path.name for path in made.iterdir()} == names
    for path in (made, *made.iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    assert stat.S_IMODE((made / "vault.key").stat().st_mode) == 0o400
    assert stat.S_IMODE((made / "recovery.key").stat().st_mode) == 0o600
    assert cli("--policy", made / "policy.yaml", "check").code == 0


def test_without_a_keyring_it_says_so_and_warns_of_the_key_file(cli: Cli) -> None:
    outcome = cli("quickstart", "--setup-only", "mine")
    assert "no keyring can be used here" in outcome.err
    assert f"warning: whoever reads {cli.home}/mine/vault.key" in outcome.err
    assert f"key     key file {cli.home}/mine/vault.key" in outcome.out


def test_it_makes_a_recovery_key_that_counts_at_once_and_asks_to_move_it_away(cli: Cli) -> None:
    outcome = cli("quickstart", "--setup-only", "mine")
    made = cli.home / "mine"
    [asked] = [line for line in outcome.err.splitlines() if "recovery.key" in line]
    assert asked.startswith(f"move {made}/recovery.key off this machine")
    [identity] = parse_identity_file((made / "recovery.key").read_text())
    policy = load_policy(made / "policy.yaml")
    assert (policy.recipients, policy.recovery) == ((recipient_of(identity),), "required")
    rows = cli("--policy", made / "policy.yaml", "key", "list", "--json").json()["keys"]
    assert [row["state"] for row in rows] == ["current", "confirmed"]
    assert format_identity(identity) not in outcome.out + outcome.err


def test_nothing_but_the_recovery_file_holds_the_private_key(cli: Cli) -> None:
    policy = set_up(cli, "mine")
    (policy.parent / "drop/a.png").write_bytes(picture())
    assert cli("--policy", policy, "drain").code == 0
    [identity] = parse_identity_file((policy.parent / "recovery.key").read_text())
    text = format_identity(identity).encode()
    holding = [
        name
        for name, data in contents(cli.home).items()
        if identity.seed in data or text in data or text[-20:] in data
    ]
    assert holding == ["mine/recovery.key"]


def test_once_the_recovery_key_is_moved_away_nobody_is_asked_again_and_all_goes_on(
    cli: Cli,
) -> None:
    policy = set_up(cli, "mine")
    (policy.parent / "recovery.key").rename(cli.home / "safe")
    outcome = cli("quickstart", "--setup-only", "mine")
    assert (outcome.code, "recovery.key" in outcome.err) == (0, False)
    assert not (policy.parent / "recovery.key").exists()
    (policy.parent / "drop/a.png").write_bytes(picture())
    assert cli("--policy", policy, "drain").code == 0
    told = cli("--policy", policy, "key", "recovery", "test", "--identity", "safe")
    assert (told.code, told.out) == (0, "1 of 1 objects open with the recovery key\n")


def test_a_recovery_key_of_a_start_that_was_broken_off_is_kept_and_used(cli: Cli) -> None:
    (cli.home / "mine").mkdir()
    identity = generate_identity()
    (cli.home / "mine/recovery.key").write_text(identity_file(identity))
    policy = set_up(cli, "mine")
    assert load_policy(policy).recipients == (recipient_of(identity),)
    assert (cli.home / "mine/recovery.key").read_text() == identity_file(identity)


def test_without_a_directory_it_uses_one_of_its_own(cli: Cli) -> None:
    assert cli("quickstart", "--setup-only").code == 0
    assert (cli.home / "secimg/policy.yaml").is_file()


def words_of(command: str) -> list[str]:
    """What a shell makes of a command line."""
    done = subprocess.run(
        ["sh", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True
    )
    return done.stdout.removesuffix("\0").split("\0")


@pytest.mark.parametrize("name", ["plain", "with spaces and ümläuts", "it's", "$HOME"])
def test_the_next_steps_can_be_pasted_into_a_shell(cli: Cli, name: str) -> None:
    outcome = cli("quickstart", "--setup-only", name)
    assert outcome.code == 0
    first, *commands = outcome.out.partition("next:\n")[2].splitlines()
    assert words_of(first.partition(" into ")[2]) == [f"{cli.home}/{name}/drop"]
    assert len(commands) == 2
    for command in commands:
        words = words_of(command.partition(". ")[2])
        assert words[0] == "secimg-watch"
        assert cli(*words[1:]).code == 0


@pytest.mark.parametrize("name", ["plain", "with spaces and ümläuts"])
def test_a_picture_dropped_in_comes_back_bit_for_bit(cli: Cli, name: str) -> None:
    policy = set_up(cli, name)
    drop = policy.parent / "drop"
    (drop / "sub").mkdir()
    pictures = {"a.png": picture("red"), "sub/ö b.jpg": picture("blue", "JPEG")}
    for path, data in pictures.items():
        (drop / path).write_bytes(data)
    drained = cli("--policy", policy, "drain")
    assert (drained.code, drained.out) == (0, "2 sealed, 0 failed, 0 not ready yet\n")
    assert contents(drop) == {}
    listed = cli("--policy", policy, "vault", "list", "--json").json()
    assert sorted(each["name"] for each in listed) == ["a.png", "ö b.jpg"]
    assert cli("--policy", policy, "vault", "restore", "--all", "--to", "back").code == 0
    assert contents(cli.home / "back") == pictures


def test_a_second_time_it_goes_on_with_what_is_there(cli: Cli) -> None:
    policy = set_up(cli, "mine")
    names = ("vault.key", "recovery.key", "vault/vault.json")
    kept = [policy, *(policy.parent / name for name in names)]
    before = [path.read_bytes() for path in kept]
    assert set_up(cli, "mine") == policy
    assert [path.read_bytes() for path in kept] == before


def test_an_edited_policy_is_kept(cli: Cli) -> None:
    policy = set_up(cli, "mine")
    edited = policy.read_text() + "log_names: true\n"
    policy.write_text(edited)
    set_up(cli, "mine")
    assert policy.read_text() == edited


def test_a_key_that_was_lost_is_not_made_anew_over_the_vault(cli: Cli) -> None:
    policy = set_up(cli, "mine")
    (policy.parent / "vault.key").unlink()
    outcome = cli("quickstart", "--setup-only", "mine")
    check_complaint(outcome, 78)
    assert not (policy.parent / "vault.key").exists()
    policy.unlink()
    outcome = cli("quickstart", "--setup-only", "mine")
    assert outcome.code == 78
    assert "nothing was encrypted or deleted" in outcome.err


def test_a_directory_that_cannot_be_made_is_73(cli: Cli) -> None:
    (cli.home / "file").write_bytes(b"mine")
    check_complaint(cli("quickstart", "--setup-only", "file"), 73)
    check_complaint(cli("quickstart", "--setup-only", "file/below"), 73)
    assert (cli.home / "file").read_bytes() == b"mine"


def test_a_name_that_no_policy_can_hold_is_64(cli: Cli) -> None:
    check_complaint(cli("quickstart", "--setup-only", b"latin-\xe9"), 64)
    assert contents(cli.home) == {}


def test_it_runs_until_it_is_told_to_stop(cli: Cli) -> None:
    process = cli.start("quickstart", "mine")
    try:
        drop = cli.home / "mine/drop"
        # The folder's staging directory is made when it is watched, not before.
        wait_until(lambda: (drop / ".secimg-watch").exists() or process.poll() is not None)
        (drop / "a.png").write_bytes(picture())
        vault = cli.home / "mine/vault"
        wait_until(lambda: any(vault.glob("objects/??/*.simg")) or process.poll() is not None)
        wait_until(lambda: not (drop / "a.png").exists() or process.poll() is not None)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, err
    assert "next:" in out
    assert "Traceback" not in err
    policy = cli.home / "mine/policy.yaml"
    [listed] = cli("--policy", policy, "vault", "list", "--json").json()
    assert listed["name"] == "a.png"
    assert contents(drop) == {}


def test_it_needs_no_home_directory(cli: Cli, tmp_path: Path) -> None:
    environ = {name: value for name, value in cli.environ.items() if name != "HOME"}
    done = subprocess.run(
        cli.argv("quickstart", "--setup-only", tmp_path / "mine"),
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert os.path.exists(tmp_path / "mine/policy.yaml")
