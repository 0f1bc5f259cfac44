"""``check`` names every fault of a policy; ``init`` makes one that has none."""

from __future__ import annotations

import os
import re
import shlex
import stat
import sys
from typing import TYPE_CHECKING

import pytest
from cli_runner import HOSTILE, Box, Cli, Outcome, check_complaint, contents, make_box

from secimg_watch.policy import load_policy
from secimg_watch.recipients import (
    IDENTITY_PREFIX,
    format_identity,
    format_recipient,
    generate_identity,
    identity_file,
    parse_identity,
    parse_identity_file,
    recipient_of,
)

assert sys.platform != "win32"  # what is tested here does not exist there

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the service is for POSIX systems")

FAULTY = """\
version: 1
state: relative/path
vaults: {main: {path: /srv/vault, min_fre: 2%}}
folders:
  - path: /srv/scans
    vault: mian
    settle: 2
  - path: /srv/scans/below
    formats: [JPG]
"""
PLACES = {(2, 8), (3, 35), (6, 12), (7, 13), (8, 11), (9, 14)}


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path / "home")


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return make_box(tmp_path)


# -- check ---------------------------------------------------------------------------------------


def test_a_good_policy_is_explained(box: Box) -> None:
    outcome = box("check")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(f"{box.policy}: the policy is valid\n")
    assert f"{box.drop} (with its sub-folders) -> {box.vault}" in outcome.out
    assert f"key file {box.key}" in outcome.out
    assert box("check", "--json").json() == {"policy": str(box.policy), "faults": []}


def test_a_check_makes_nothing(tmp_path: Path) -> None:
    box = Box(tmp_path)
    assert box("check").code == 0
    assert not box.vault.exists()
    assert not box.state.exists()


def test_every_fault_is_named_with_file_line_and_column(cli: Cli) -> None:
    path = cli.home / "p.yaml"
    path.write_text(FAULTY)
    outcome = cli("--policy", path, "check")
    check_complaint(outcome, 78)
    places = re.findall(rf"^  {re.escape(str(path))}:(\d+):(\d+): \S", outcome.err, re.MULTILINE)
    assert {(int(line), int(column)) for line, column in places} == PLACES
    assert 'did you mean "min_free"?' in outcome.err
    assert 'did you mean "main"?' in outcome.err


def test_every_fault_is_named_in_json_too(cli: Cli) -> None:
    path = cli.home / "p.yaml"
    path.write_text(FAULTY)
    outcome = cli("--policy", path, "check", "--json")
    assert outcome.code == 78
    result = outcome.json()
    assert result.keys() == {"policy", "faults"}
    assert len(result["faults"]) == len(PLACES)
    assert all(fault.startswith(f"{path}:") for fault in result["faults"])


@pytest.mark.parametrize("command", ["drain", "run", "status", "vault list", "key init"])
def test_every_command_refuses_a_faulty_policy_in_the_same_words(cli: Cli, command: str) -> None:
    path = cli.home / "p.yaml"
    path.write_text(FAULTY)
    outcome = cli("--policy", path, *command.split())
    check_complaint(outcome, 78)
    assert outcome.err.count(f"  {path}:") == len(PLACES)


@pytest.mark.parametrize("text", ["", "- a list\n", "{", "version: 1\x00", "\t- x: [\n"])
def test_what_is_no_policy_at_all_is_78(cli: Cli, text: str) -> None:
    path = cli.home / "p.yaml"
    path.write_text(text)
    check_complaint(cli("--policy", path, "check"), 78)


def test_what_a_policy_names_and_the_disk_lacks_is_78(box: Box) -> None:
    box.drop.rmdir()
    outcome = box("check")
    check_complaint(outcome, 78)
    assert f"the folder {box.drop} does not exist" in outcome.err
    told = box("check", "--json")
    assert told.code == 78
    [fault] = told.json()["faults"]
    assert str(box.drop) in fault


def test_hostile_text_in_a_policy_is_shown_escaped(cli: Cli) -> None:
    path = cli.home / "p.yaml"
    path.write_text(FAULTY.replace("relative/path", '"a\\n\\e[31mred\\u202eevil"'))
    check_complaint(cli("--policy", path, "check"), 78)


def test_a_hostile_folder_that_is_valid_is_shown_escaped(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.write_policy(path=f"{box.drop}/{HOSTILE}")
    check_complaint(box("check"), 78)
    (box.drop / HOSTILE).mkdir()
    outcome = box("check")
    assert outcome.code == 0
    assert not re.search(r"[\x1b\u202e]", outcome.out)


def test_a_policy_that_may_not_be_read_is_77(box: Box) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    box.policy.chmod(0)
    check_complaint(box("check"), 77)


# -- init ----------------------------------------------------------------------------------------


def init(cli: Cli, *more: str, recovery: tuple[str, ...] = ("--no-recovery",)) -> Outcome:
    return cli(
        *("init", "--folder", "scans", "--folder", "photos", "--vault", "vault"),
        *("--provider", "file", "--key-file", "keys/vault.key", "--output", "p/policy.yaml"),
        *recovery,
        *more,
    )


def test_it_makes_a_policy_that_works_at_once(cli: Cli) -> None:
    (cli.home / "keys").mkdir()
    outcome = init(cli)
    assert outcome.code == 0, outcome
    path = cli.home / "p/policy.yaml"
    policy = load_policy(path)
    assert [str(f.path) for f in policy.folders] == [f"{cli.home}/scans", f"{cli.home}/photos"]
    assert str(policy.vaults["main"].path) == f"{cli.home}/vault"
    assert (policy.recovery, policy.recipients) == ("declined", ())
    assert f"secimg-watch --policy {path} run" in outcome.out
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((cli.home / "keys/vault.key").stat().st_mode) == 0o400
    for command in ("check", "drain"):
        assert cli("--policy", path, command).code == 0


def words_after(outcome: Outcome, head: str) -> list[str]:
    """The words of a command that was printed behind a heading, without the program's name."""
    [line] = [line for line in outcome.out.splitlines() if line.startswith(head)]
    program, *words = shlex.split(line.removeprefix(head))
    assert program == "secimg-watch"
    return words


def test_a_recovery_key_is_written_and_has_to_be_confirmed_before_anything_is_deleted(
    cli: Cli,
) -> None:
    (cli.home / "keys").mkdir()
    outcome = init(cli, recovery=("--recovery", "my recovery.key"))
    assert outcome.code == 0, outcome
    file, path = cli.home / "my recovery.key", cli.home / "p/policy.yaml"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    [identity] = parse_identity_file(file.read_text())
    policy = load_policy(path)
    assert (policy.recovery, policy.recipients) == ("required", (recipient_of(identity),))
    assert format_identity(identity) not in outcome.out + outcome.err
    check_complaint(cli("--policy", path, "drain"), 78)
    confirming = words_after(outcome, "next:")
    assert confirming[2:5] == ["key", "recovery", "confirm"]
    assert cli(*confirming).code == 0
    assert words_after(outcome, "then:") == ["--policy", str(path), "run"]
    assert cli("--policy", path, "drain").code == 0


def test_a_recovery_key_may_be_printed_instead_and_is_kept_nowhere(cli: Cli) -> None:
    (cli.home / "keys").mkdir()
    outcome = init(cli, recovery=("--recovery", "-"))
    assert outcome.code == 0, outcome
    [printed] = [line for line in outcome.out.splitlines() if line.startswith(IDENTITY_PREFIX)]
    identity = parse_identity(printed)
    policy = load_policy(cli.home / "p/policy.yaml")
    assert policy.recipients == (recipient_of(identity),)
    for name, data in contents(cli.home).items():
        assert printed.encode() not in data, name
        assert identity.seed not in data, name


def test_public_keys_that_are_there_already_are_taken_as_text_or_from_a_file(cli: Cli) -> None:
    (cli.home / "keys").mkdir()
    one, other, third = (generate_identity() for _ in range(3))
    (cli.home / "other.key").write_text(identity_file(other))
    (cli.home / "third.pub").write_text(format_recipient(recipient_of(third)) + "\n")
    given = (format_recipient(recipient_of(one)), "other.key", "third.pub")
    outcome = init(cli, recovery=tuple(word for each in given for word in ("--recipient", each)))
    assert outcome.code == 0, outcome
    policy = load_policy(cli.home / "p/policy.yaml")
    assert policy.recipients == tuple(recipient_of(each) for each in (one, other, third))
    assert policy.recovery == "required"
    assert words_after(outcome, "next:")[-2:] == ["--identity", "FILE"]


def test_a_vault_without_a_key_is_made_with_recipients_and_not_without(cli: Cli) -> None:
    words = ("init", "--folder", "f", "--vault", "v", "--provider", "none", "--output", "p.yaml")
    check_complaint(cli(*words, "--no-recovery"), 78)
    assert contents(cli.home) == {}
    outcome = cli(*words, "--recovery", "r.key")
    assert outcome.code == 0, outcome
    assert cli(*words_after(outcome, "next:")).code == 0
    assert cli("--policy", "p.yaml", "drain").code == 0


def test_whether_there_is_a_recovery_key_has_to_be_said(cli: Cli) -> None:
    (cli.home / "keys").mkdir()
    outcome = init(cli, recovery=())
    assert outcome.code == 64
    assert "give --recovery FILE or --no-recovery" in outcome.err
    assert contents(cli.home) == {}
    both = init(cli, recovery=("--no-recovery", "--recovery", "r.key"))
    check_complaint(both, 64)
    assert contents(cli.home) == {}


def test_a_recovery_file_that_is_there_is_73_and_kept(cli: Cli) -> None:
    (cli.home / "keys").mkdir()
    (cli.home / "r.key").write_text("mine")
    check_complaint(init(cli, recovery=("--recovery", "r.key")), 73)
    assert (cli.home / "r.key").read_text() == "mine"
    assert not (cli.home / "p/policy.yaml").exists()


@pytest.mark.parametrize("given", ["nothing.pub", "secimg-recipient-1:AAAA", "/dev/null"])
def test_what_is_no_public_key_is_refused_and_makes_nothing(cli: Cli, given: str) -> None:
    (cli.home / "keys").mkdir()
    outcome = init(cli, recovery=("--recipient", given))
    assert outcome.code in {64, 66}
    check_complaint(outcome, outcome.code)
    assert contents(cli.home) == {}


@pytest.mark.parametrize("case", [str.upper, str.lower])
def test_a_private_key_in_the_place_of_a_public_one_is_64_and_not_repeated(
    cli: Cli, case: Callable[[str], str]
) -> None:
    (cli.home / "keys").mkdir()
    text = case(format_identity(generate_identity()))
    outcome = init(cli, recovery=("--recipient", text))
    check_complaint(outcome, 64)
    assert text.partition(":")[2][:8] not in outcome.out + outcome.err
    assert contents(cli.home) == {}


def test_after_a_start_that_failed_the_same_command_works(cli: Cli) -> None:
    words = ("--recovery", "r.key")
    check_complaint(init(cli, recovery=words), 73)  # the key's directory is missing
    assert contents(cli.home) == {}
    (cli.home / "keys").mkdir()
    assert init(cli, recovery=words).code == 0


def test_the_global_option_names_the_policy_to_be_made(cli: Cli) -> None:
    words = ("--folder", "f", "--vault", "v", "--provider", "file", "--key-file", "k")
    assert cli("--policy", "mine.yaml", "init", *words, "--no-recovery").code == 0
    assert load_policy(cli.home / "mine.yaml").version == 1


def test_a_policy_that_is_there_is_73_and_kept(cli: Cli) -> None:
    (cli.home / "p").mkdir()
    (cli.home / "p/policy.yaml").write_text("mine")
    outcome = init(cli)
    check_complaint(outcome, 73)
    assert contents(cli.home) == {"p/policy.yaml": b"mine"}


def test_a_key_that_is_there_is_used(cli: Cli) -> None:
    (cli.home / "keys").mkdir()
    assert init(cli).code == 0
    before = (cli.home / "keys/vault.key").read_bytes()
    (cli.home / "p/policy.yaml").unlink()
    outcome = init(cli)
    assert outcome.code == 0
    assert "key exists already" in outcome.out
    assert (cli.home / "keys/vault.key").read_bytes() == before


def test_what_would_make_a_faulty_policy_is_78_and_makes_nothing(cli: Cli) -> None:
    (cli.home / "keys").mkdir()
    outcome = init(cli, "--folder", "scans/below")
    check_complaint(outcome, 78)
    assert sorted(os.listdir(cli.home)) == ["keys"]


def test_a_key_that_cannot_be_stored_leaves_no_policy(cli: Cli) -> None:
    outcome = init(cli)  # the key's directory is missing
    check_complaint(outcome, 73)
    assert contents(cli.home) == {}


def test_a_question_that_nobody_answers_is_64_and_makes_nothing(cli: Cli) -> None:
    outcome = cli("init", "--output", "p.yaml")
    assert outcome.code == 64
    assert "--folder" in outcome.err
    assert "Traceback" not in outcome.err
    assert contents(cli.home) == {}


def test_a_directory_that_cannot_be_made_is_73(cli: Cli) -> None:
    (cli.home / "keys").mkdir()
    (cli.home / "scans").write_text("mine")
    check_complaint(init(cli), 73)
    assert not (cli.home / "p/policy.yaml").exists()
