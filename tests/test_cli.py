"""The command line as a whole: help, versions, the search for a policy, errors and exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runner import (
    HOSTILE,
    INSPECTED,
    PATIENCE,
    Box,
    Cli,
    check_complaint,
    check_harmless,
    make_box,
)

from secimg_watch import __version__

assert sys.platform != "win32"  # what is tested here does not exist there

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the service is for POSIX systems")

COMMANDS = [
    *("quickstart", "init", "check", "run", "drain", "status", "why"),
    *("jobs list", "jobs quarantine", "jobs retry", "key init", "key list"),
    *("vault list", "vault show", "vault restore", "vault verify", "encrypt", "decrypt"),
    "crash-test",
]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path / "home")


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return make_box(tmp_path, **INSPECTED)


def test_the_version_is_that_of_the_package(cli: Cli) -> None:
    outcome = cli("--version")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.split()[-1] == __version__


def test_the_help_lists_every_command_and_every_exit_code(cli: Cli) -> None:
    outcome = cli("--help")
    assert outcome.code == 0
    for command in COMMANDS:
        assert f"\n  {command.split()[0]} " in outcome.out
    for code in (1, 64, 65, 66, 73, 74, 75, 77, 78):
        assert re.search(rf"\b{code}\s", outcome.out)


@pytest.mark.parametrize("command", ["jobs list", "vault restore", "encrypt"])
def test_a_command_explains_itself_without_a_policy(cli: Cli, command: str) -> None:
    outcome = cli(*command.split(), "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert "Usage:" in outcome.out


@pytest.mark.parametrize(
    "words",
    [
        ["no-such-command"],
        ["--no-such-option"],
        ["drain", "--no-such-option"],
        ["why"],
        ["vault", "show"],
        ["vault", "restore", "--all"],
        ["vault", "list", "--since", "soon"],
        ["encrypt", "a", "--kdf", "rot13"],
        ["jobs", "list", "--state", "lost"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_64_and_says_where_help_is(cli: Cli, words: list[str]) -> None:
    outcome = cli(*words)
    check_complaint(outcome, 64)
    assert "--help" in outcome.err
    assert outcome.out == ""


def test_a_hostile_word_on_the_command_line_is_shown_escaped(cli: Cli) -> None:
    sentence = check_complaint(cli("why", "a", HOSTILE), 64)
    assert "red" in sentence


def test_without_a_policy_the_places_that_were_looked_at_are_named(cli: Cli) -> None:
    if Path("/etc/secimg-watch/policy.yaml").exists():
        pytest.skip("this machine has a policy")
    outcome = cli("check")
    sentence = check_complaint(outcome, 66)
    assert f"{cli.home}/.config/secimg-watch/policy.yaml" in sentence
    assert "/etc/secimg-watch/policy.yaml" in sentence
    assert "hint: " in outcome.err
    assert "secimg-watch init" in outcome.err


@pytest.mark.parametrize("command", ["check", "status", "drain", "run", "vault list", "jobs list"])
def test_a_policy_that_is_not_there_is_66(cli: Cli, command: str) -> None:
    sentence = check_complaint(cli("--policy", "absent.yaml", *command.split()), 66)
    assert "absent.yaml" in sentence


def test_a_policy_with_a_hostile_name_is_shown_escaped(cli: Cli) -> None:
    check_complaint(cli("--policy", HOSTILE, "check"), 66)


def test_the_policy_is_found_in_the_environment(box: Box) -> None:
    box.cli.environ["SECIMG_WATCH_POLICY"] = str(box.policy)
    assert str(box.policy) in box.cli("check").out


def test_the_policy_is_found_in_the_users_configuration(box: Box) -> None:
    place = box.cli.home / ".config/secimg-watch/policy.yaml"
    place.parent.mkdir(parents=True)
    box.policy.rename(place)
    assert str(place) in box.cli("check").out
    elsewhere = box.directory / "xdg"
    (box.cli.home / ".config").rename(elsewhere)
    box.cli.environ["XDG_CONFIG_HOME"] = str(elsewhere)
    assert f"{elsewhere}/secimg-watch/policy.yaml" in box.cli("check").out


def test_a_named_policy_comes_before_the_environments(box: Box) -> None:
    box.cli.environ["SECIMG_WATCH_POLICY"] = "absent.yaml"
    assert str(box.policy) in box("check").out


@pytest.mark.parametrize("listing", ["check", "why x", "jobs list", "key list", "vault list"])
def test_json_may_stand_before_and_behind_the_command(box: Box, listing: str) -> None:
    before, behind = box("--json", *listing.split()), box(*listing.split(), "--json")
    assert before == behind
    assert before.code == 0
    assert before.json() is not None


def test_the_result_of_a_drain_is_json_wherever_the_option_stands(box: Box) -> None:
    before, behind = box("--json", "drain"), box("drain", "--json")
    assert before.json().keys() == behind.json().keys()
    assert (before.code, behind.code) == (0, 0)


def test_an_error_shows_its_traceback_only_when_asked_very_loudly(box: Box) -> None:
    for flags in ([], ["-v"]):
        assert "Traceback" not in box(*flags, "status").err
    loud = box("-vv", "status")
    assert loud.code == 66
    assert "Traceback" in loud.err
    assert "secimg-watch: " in loud.err


def test_a_status_before_the_first_run_is_66_and_says_how_to_start(box: Box) -> None:
    outcome = box("status")
    check_complaint(outcome, 66)
    assert "secimg-watch run" in outcome.err


def test_no_message_ever_holds_the_key(box: Box) -> None:
    secret = box.key.read_text().split(":")[2].strip()
    told = [box("-vv", *words.split()) for words in ("key init", "key list", "drain", "status")]
    box.key.chmod(0o600)
    box.key.write_text(f"secimg1:{secret}\n")
    told.append(box("-vv", "key", "list"))
    told.append(box("-vv", "vault", "list"))
    assert told[-1].code == 78
    assert not any(secret in outcome.out + outcome.err for outcome in told)


def test_a_reader_that_has_seen_enough_is_no_error(box: Box) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        box.cli.argv("--policy", box.policy, "vault", "list"),
        env=box.cli.environ,
        stdin=subprocess.DEVNULL,
        stdout=writing,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    "listing", ["jobs list", "why drop/a.png", "status", "drain", "vault list"]
)
def test_directories_of_another_user_are_an_error_and_no_crash(box: Box, listing: str) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    assert box("drain").code == 0
    box.state.chmod(0)
    box.vault.chmod(0)
    try:
        outcome = box(*listing.split())
    finally:
        box.state.chmod(0o700)
        box.vault.chmod(0o700)
    assert outcome.code in {66, 73, 74, 77}
    check_complaint(outcome, outcome.code)


def test_a_name_is_json_that_every_reader_can_read(box: Box) -> None:
    (box.drop / HOSTILE).write_bytes(b"no picture")
    (box.drop / os.fsdecode(b"latin-\xe9")).write_bytes(b"no picture")
    assert box("drain").code == 0
    outcome = box("jobs", "list", "--json")
    check_harmless(outcome)
    assert outcome.out.isascii()
    names = [job["name"] for job in json.loads(outcome.out)]
    assert len(names) == 2
    for name in names:
        # A lone surrogate is no text: strict readers refuse the whole document.
        assert name.encode()


def test_a_command_started_from_scratch_does_the_same(box: Box) -> None:
    with box.cli.start("--policy", box.policy, "key", "list", "--json") as process:
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, err) == (0, box("key", "list", "--json").out, "")
    with box.cli.start("why") as process:
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (64, "")
    assert "Traceback" not in err
