"""The recovery key: made, confirmed, asked for before anything is deleted, and put to use."""

from __future__ import annotations

import os
import pty
import shutil
import stat
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from cli_runner import PATIENCE, Box, Cli, check_complaint, contents, make_box, picture

from secimg_watch.recipients import (
    IDENTITY_PREFIX,
    format_identity,
    format_recipient,
    generate_identity,
    identity_file,
    parse_identity,
    parse_identity_file,
    parse_recipient,
    recipient_of,
)

assert sys.platform != "win32"  # what is tested here does not exist there

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cli_runner import Outcome

    from secimg_watch.records import PrivateKey

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the service is for POSIX systems")

PICTURES = {
    "a.png": picture("red"),
    "2026/may/a.png": picture("green", size=(30, 20)),
    "2026/ö b.jpg": picture("blue", "JPEG"),
    "$HOME/it's; rm -rf": picture("teal", "GIF"),
}


@pytest.fixture
def box(tmp_path: Path) -> Box:
    """A box with a key and a vault, whose policy asks for a recovery key and has none."""
    box = make_box(tmp_path)
    require(box)
    return box


def require(box: Box, *identities: PrivateKey, **folder: Any) -> None:
    """Let the policy ask for a recovery key, and give it recipients."""
    recipients = [format_recipient(recipient_of(each)) for each in identities]
    box.write_policy(more={"recovery": "required", "recipients": recipients}, **folder)


def on_file(box: Box, *identities: PrivateKey, name: str = "recovery.key") -> Path:
    """A file with private keys, outside of everything that the machine keeps."""
    path = box.cli.home / name
    path.write_text("".join(identity_file(each) for each in identities))
    return path


def confirmed(box: Box, identity: PrivateKey, **folder: Any) -> Path:
    """Give the policy a recipient and confirm it; the file with its private key."""
    require(box, identity, **folder)
    path = on_file(box, identity)
    assert box("key", "recovery", "confirm", "--identity", path).code == 0
    return path


def drop(box: Box, pictures: dict[str, bytes]) -> None:
    for name, data in pictures.items():
        (box.drop / name).parent.mkdir(parents=True, exist_ok=True)
        (box.drop / name).write_bytes(data)


# -- make ----------------------------------------------------------------------------------------


def make(box: Box, *words: str) -> Outcome:
    return box.cli("key", "recovery", "make", *words)


def public_in(outcome: Outcome) -> str:
    """The public key out of the line that was printed for the policy, read as YAML."""
    [line] = [line for line in outcome.out.splitlines() if line.startswith("recipients: ")]
    [text] = yaml.safe_load(line)["recipients"]
    assert isinstance(text, str)
    return text


def test_a_recovery_key_is_written_for_the_owner_alone_and_needs_no_policy(box: Box) -> None:
    outcome = make(box, "--output", "r.key")
    assert (outcome.code, outcome.err) == (0, "")
    file = box.cli.home / "r.key"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    [identity] = parse_identity_file(file.read_text())
    assert parse_recipient(public_in(outcome)) == recipient_of(identity)
    assert public_in(outcome) in file.read_text()
    assert format_identity(identity) not in outcome.out
    assert "key recovery confirm --identity r.key" in outcome.out


def test_a_file_that_is_there_is_73_and_kept(box: Box) -> None:
    file = box.cli.home / "r.key"
    file.write_text("mine")
    outcome = make(box, "--output", "r.key")
    check_complaint(outcome, 73)
    assert "it may be the only key of a vault" in outcome.err
    file.unlink()
    file.symlink_to("elsewhere")
    check_complaint(make(box, "--output", "r.key"), 73)
    assert not (box.cli.home / "elsewhere").exists()
    check_complaint(make(box, "--output", "missing/r.key"), 73)


def test_a_printed_recovery_key_is_shown_once_and_kept_nowhere(box: Box) -> None:
    before = contents(box.directory)
    outcome = make(box, "--print")
    assert outcome.code == 0
    assert outcome.out.count(IDENTITY_PREFIX) == 1
    [line] = [line for line in outcome.out.splitlines() if line.startswith(IDENTITY_PREFIX)]
    assert parse_recipient(public_in(outcome)) == recipient_of(parse_identity(line))
    assert contents(box.directory) == before


def test_two_recovery_keys_are_never_the_same(box: Box) -> None:
    assert public_in(make(box, "--print")) != public_in(make(box, "--print"))


@pytest.mark.parametrize("words", [[], ["--print", "--output", "r.key"]])
def test_where_the_private_key_goes_has_to_be_said(box: Box, words: list[str]) -> None:
    before = contents(box.directory)
    check_complaint(make(box, *words), 64)
    assert contents(box.directory) == before


# -- nothing is deleted without ------------------------------------------------------------------


@pytest.mark.parametrize("command", ["drain", "run"])
def test_without_a_recovery_key_nothing_is_sealed_or_deleted_and_the_way_out_is_named(
    box: Box, command: str
) -> None:
    drop(box, PICTURES)
    outcome = box(command)
    assert "no confirmed recovery key, so nothing is deleted" in check_complaint(outcome, 78)
    assert "key recovery make --output FILE" in outcome.err
    assert "'recovery: declined'" in outcome.err
    assert contents(box.drop) == PICTURES
    assert box.objects() == []


@pytest.mark.parametrize("command", ["drain", "run"])
def test_a_recovery_key_that_nobody_has_shown_does_not_count(box: Box, command: str) -> None:
    require(box, generate_identity())
    drop(box, PICTURES)
    outcome = box(command)
    check_complaint(outcome, 78)
    assert "hint: confirm it with: secimg-watch key recovery confirm --identity" in outcome.err
    assert contents(box.drop) == PICTURES
    assert box.objects() == []


def test_once_its_private_key_was_shown_pictures_are_sealed_and_deleted(box: Box) -> None:
    identity = generate_identity()
    require(box, identity)
    drop(box, PICTURES)
    check_complaint(box("drain"), 78)
    told = box("key", "recovery", "confirm", "--identity", on_file(box, identity))
    assert (told.code, told.out) == (0, f"confirmed: recipient {identity.key_id.hex()}\n")
    assert box("drain").code == 0
    assert contents(box.drop) == {}
    assert len(box.objects()) == len(PICTURES)


def test_who_declines_a_recovery_key_is_not_asked(box: Box) -> None:
    box.write_policy(more={"recovery": "declined"})
    drop(box, PICTURES)
    assert box("drain").code == 0
    assert contents(box.drop) == {}


@pytest.mark.parametrize("after", ["keep", "move"])
def test_where_no_plaintext_is_deleted_no_recovery_key_is_needed(box: Box, after: str) -> None:
    target = box.directory / "done"
    target.mkdir()
    require(box, after="keep" if after == "keep" else f"move:{target}")
    drop(box, PICTURES)
    assert box("drain").code == 0
    kept = contents(box.drop if after == "keep" else target)
    assert sorted(kept.values()) == sorted(PICTURES.values())
    assert len(box.objects()) == len(PICTURES)


def test_each_vault_that_is_deleted_for_needs_its_own_confirmation(
    box: Box, tmp_path: Path
) -> None:
    identity = generate_identity()
    confirmed(box, identity)
    (tmp_path / "other").mkdir()
    folders = [
        {"path": str(box.drop), "vault": "main", "settle": "0s"},
        {"path": str(tmp_path / "other"), "vault": "more", "settle": "0s"},
    ]
    vaults = {
        "main": {"path": str(box.vault), "min_free": "0B"},
        "more": {"path": str(tmp_path / "more"), "min_free": "0B"},
    }
    recipient = format_recipient(recipient_of(identity))
    shared = {"recovery": "required", "recipients": [recipient], "vaults": vaults}
    box.write_policy(more=shared | {"folders": folders})
    assert box("key", "init").code == 0
    assert f"vault {tmp_path}/more has no" in check_complaint(box("drain"), 78)
    path = box.cli.home / "recovery.key"
    assert box("key", "recovery", "confirm", "--identity", path).code == 0
    assert box("drain").code == 0


def test_a_recipient_that_leaves_the_policy_takes_its_confirmation_with_it(box: Box) -> None:
    confirmed(box, generate_identity())
    require(box, generate_identity())
    drop(box, PICTURES)
    check_complaint(box("drain"), 78)
    assert contents(box.drop) == PICTURES


# -- confirm -------------------------------------------------------------------------------------


def test_another_private_key_confirms_nothing(box: Box) -> None:
    require(box, generate_identity())
    before = contents(box.vault)
    stranger = generate_identity()
    outcome = box("key", "recovery", "confirm", "--identity", on_file(box, stranger))
    assert "not one of the policy's recipients" in check_complaint(outcome, 78)
    assert format_identity(stranger) not in outcome.err
    assert contents(box.vault) == before
    check_complaint(box("drain"), 78)


def test_of_several_private_keys_those_of_the_policy_are_confirmed(box: Box) -> None:
    one, other, stranger = (generate_identity() for _ in range(3))
    require(box, one, other)
    file = on_file(box, stranger, one, other)
    told = box("key", "recovery", "confirm", "--identity", file)
    assert told.out.count("confirmed: recipient") == 2
    assert stranger.key_id.hex() not in told.out


@pytest.mark.parametrize(
    ("content", "code"),
    [(None, 66), ("", 64), ("# nothing\n", 64), ("hunter2\n", 64), ("x" * 70_000, 64), ("é", 64)],
)
def test_a_file_without_a_private_key_confirms_nothing(
    box: Box, content: str | None, code: int
) -> None:
    require(box, generate_identity())
    path = box.cli.home / "recovery.key"
    if content is not None:
        path.write_text(content)
    outcome = box("key", "recovery", "confirm", "--identity", path)
    check_complaint(outcome, code)
    assert "hunter2" not in outcome.err


@pytest.mark.parametrize("command", ["confirm", "test"])
def test_without_a_private_key_the_command_says_what_to_give(box: Box, command: str) -> None:
    require(box, generate_identity())
    outcome = box("key", "recovery", command)
    check_complaint(outcome, 64)
    assert "--identity FILE" in outcome.err


@pytest.mark.parametrize("case", [str.upper, str.lower])
def test_a_private_key_on_the_command_line_is_64_and_not_repeated(
    box: Box, case: Callable[[str], str]
) -> None:
    identity = generate_identity()
    require(box, identity)
    text = case(format_identity(identity))
    for command in ("key recovery confirm", "vault list", "vault restore --all --to out"):
        outcome = box(*command.split(), "--identity", text)
        check_complaint(outcome, 64)
        assert text.partition(":")[2][:8] not in outcome.out + outcome.err


def test_a_private_key_is_no_name_for_the_file_of_another_one(box: Box) -> None:
    text = format_identity(generate_identity())
    before = contents(box.cli.home)
    outcome = box("key", "recovery", "make", "--output", text)
    check_complaint(outcome, 64)
    assert text.partition(":")[2][:8] not in outcome.out + outcome.err
    assert contents(box.cli.home) == before


# -- typed in ------------------------------------------------------------------------------------


def typed(box: Box, text: str, *words: str) -> tuple[int, bytes]:
    """Run a command with a terminal and type a line; exit code and what was seen there."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        box.cli.argv("--policy", box.policy, *words),
        env=box.cli.environ,
        cwd=box.cli.home,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    seen = b""
    try:
        while b"Private key" not in seen:
            seen += os.read(ours, 4096)
        os.write(ours, text.encode())
        process.wait(PATIENCE)
        while True:
            seen += os.read(ours, 4096)
    except OSError:  # the terminal's other end was closed
        return process.wait(PATIENCE), seen
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_a_private_key_may_be_typed_as_it_stands_on_paper_and_is_not_shown(box: Box) -> None:
    identity = generate_identity()
    require(box, identity)
    prefix, colon, tail = format_identity(identity).lower().partition(":")
    groups = " ".join(tail[n : n + 5] for n in range(0, len(tail), 5))
    words = ("key", "recovery", "confirm", "--identity", "-")
    code, seen = typed(box, f"{prefix}{colon} {groups}\n", *words)
    assert code == 0, seen
    assert f"confirmed: recipient {identity.key_id.hex()}".encode() in seen
    assert groups[:11].encode() not in seen


def test_a_private_key_that_was_mistyped_is_64(box: Box) -> None:
    require(box, generate_identity())
    words = ("key", "recovery", "confirm", "--identity", "-")
    code, seen = typed(box, "SECIMG-IDENTITY-1:AAAA\n", *words)
    assert code == 64
    assert b"a character of it is wrong" in seen


def test_nobody_to_type_it_is_64(box: Box) -> None:
    require(box, generate_identity())
    outcome = box("key", "recovery", "confirm", "--identity", "-")
    assert "no private key" in check_complaint(outcome, 64)


def test_another_program_may_hand_it_over(box: Box) -> None:
    identity = generate_identity()
    require(box, identity)
    done = subprocess.run(
        box.cli.argv("--policy", box.policy, "key", "recovery", "confirm", "--identity", "-"),
        env=box.cli.environ,
        input=identity_file(identity),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"confirmed: recipient {identity.key_id.hex()}\n"


def test_whoever_interrupts_the_question_gets_no_complaint(box: Box) -> None:
    require(box, generate_identity())
    code, seen = typed(box, "\x04", "key", "recovery", "confirm", "--identity", "-")
    assert code == 130
    assert b"defect" not in seen


# -- test ----------------------------------------------------------------------------------------


def test_objects_of_before_the_recovery_key_are_named_and_rekeying_gives_it_to_them(
    box: Box,
) -> None:
    box.write_policy(more={"recovery": "declined"})
    drop(box, PICTURES)
    assert box("drain").code == 0
    before = {path.stem for path in box.objects()}
    file = confirmed(box, generate_identity())
    drop(box, {"new.png": PICTURES["a.png"]})
    assert box("drain").code == 0

    told = box("key", "recovery", "test", "--identity", file)
    assert (told.code, told.out) == (1, "1 of 5 objects open with the recovery key\n")
    assert all(f"object {object_id}: " in told.err for object_id in before)
    assert "hint: secimg-watch vault rekey" in told.err
    as_json = box("key", "recovery", "test", "--identity", file, "--json")
    assert (as_json.code, as_json.json()["opened"]) == (1, 1)
    assert as_json.json()["failed"].keys() == before

    assert box("vault", "rekey").code == 0
    told = box("key", "recovery", "test", "--identity", file)
    assert (told.code, told.out) == (0, "5 of 5 objects open with the recovery key\n")
    box.key.unlink()
    restored = box("vault", "restore", "--all", "--to", "out", "--identity", file)
    assert restored.code == 0
    assert contents(box.cli.home / "out") == {**PICTURES, "new.png": PICTURES["a.png"]}


def test_a_private_key_of_somebody_else_opens_nothing(box: Box) -> None:
    confirmed(box, generate_identity())
    drop(box, PICTURES)
    assert box("drain").code == 0
    stranger = on_file(box, generate_identity(), name="stranger.key")
    told = box("key", "recovery", "test", "--identity", stranger)
    assert (told.code, told.out) == (1, "0 of 4 objects open with the recovery key\n")


def test_the_key_is_not_what_the_test_opens_with(box: Box) -> None:
    file = confirmed(box, generate_identity())
    drop(box, PICTURES)
    assert box("drain").code == 0
    box.key.unlink()
    told = box("key", "recovery", "test", "--identity", file)
    assert (told.code, told.out) == (0, "4 of 4 objects open with the recovery key\n")


# -- the disaster --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was saved of a machine that is gone: its vault and the recovery key. Not changed."""
    top = tmp_path_factory.mktemp("disaster")
    cli = Cli(top / "home")
    assert cli("quickstart", "--setup-only", "mine").code == 0
    mine = cli.home / "mine"
    for name, data in PICTURES.items():
        (mine / "drop" / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / "drop" / name).write_bytes(data)
    assert cli("--policy", mine / "policy.yaml", "drain").code == 0
    assert contents(mine / "drop") == {}
    shutil.copytree(mine / "vault", top / "saved/vault")
    shutil.copy(mine / "recovery.key", top / "saved")
    shutil.rmtree(cli.home)
    return top / "saved"


@pytest.fixture
def other(saved: Path, tmp_path: Path) -> Cli:
    """Another machine, with a copy of what was saved and nothing else."""
    cli = Cli(tmp_path / "other")
    shutil.copytree(saved, cli.home, dirs_exist_ok=True)
    return cli


def restore(cli: Cli, *, identity: str = "recovery.key", vault: str = "./vault") -> Outcome:
    words = ("vault", "restore", "--all", "--vault", vault, "--identity", identity)
    return cli(*words, "--to", "restored")


@pytest.mark.parametrize("absolute", [True, False])
def test_vault_and_recovery_key_alone_bring_everything_back_with_one_command(
    other: Cli, *, absolute: bool
) -> None:
    before = contents(other.home / "vault")
    outcome = restore(other, vault=f"{other.home}/vault" if absolute else "vault/")
    assert (outcome.code, outcome.out, outcome.err) == (0, "4 restored, 0 failed\n", "")
    assert contents(other.home / "restored") == PICTURES
    assert contents(other.home / "vault") == before


def test_the_vaults_own_file_is_not_needed(other: Cli) -> None:
    (other.home / "vault/vault.json").unlink()
    for name in ("tmp", "lock", "vault.json.lock"):
        path = other.home / "vault" / name
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
    assert restore(other).code == 0
    assert contents(other.home / "restored") == PICTURES


def test_the_pictures_are_listed_shown_and_verified_with_the_recovery_key(other: Cli) -> None:
    words = ("--vault", "./vault", "--identity", "recovery.key")
    listed = other("vault", "list", *words, "--json").json()
    assert {os.path.join(each["folder"], each["name"]) for each in listed} == set(PICTURES)
    one = listed[0]["object"]
    shown = other("vault", "show", one, "--preview", "p.png", *words, "--json")
    assert (shown.code, shown.json()["object"]) == (0, one)
    assert (other.home / "p.png").stat().st_size
    assert other("vault", "verify", *words).out.startswith("4 objects verified")
    assert other("vault", "restore", one[:12], *words, "--to", "one").code == 0
    [data] = contents(other.home / "one").values()
    assert data in PICTURES.values()


def test_another_private_key_gives_nothing_and_an_error(other: Cli) -> None:
    identity = generate_identity()
    (other.home / "stranger.key").write_text(identity_file(identity))
    outcome = restore(other, identity="stranger.key")
    assert (outcome.code, outcome.out) == (1, "0 restored, 4 failed\n")
    assert outcome.err.count("none of that is at hand") == 4
    assert contents(other.home / "restored") == {}
    listed = other("vault", "list", "--vault", "./vault", "--identity", "stranger.key", "--json")
    assert listed.code == 1
    assert all("name" not in each for each in listed.json())


def test_without_a_private_key_the_vault_alone_is_64(other: Cli) -> None:
    outcome = other("vault", "restore", "--all", "--vault", "./vault", "--to", "restored")
    check_complaint(outcome, 64)
    assert "--identity FILE" in outcome.err
    assert not (other.home / "restored").exists()


def test_a_vaults_name_without_a_policy_says_how_to_name_its_path(other: Cli) -> None:
    outcome = restore(other, vault="vault")
    check_complaint(outcome, 66)
    assert "--vault ./vault" in outcome.err


def test_a_directory_that_is_no_vault_is_66(other: Cli) -> None:
    (other.home / "empty").mkdir()
    for vault in ("./empty", "./missing"):
        check_complaint(restore(other, vault=vault), 66)


def test_nothing_is_restored_into_the_vault_itself(other: Cli) -> None:
    words = ("vault", "restore", "--all", "--vault", "./vault", "--identity", "recovery.key")
    check_complaint(other(*words, "--to", "vault/restored"), 64)
    assert not (other.home / "vault/restored").exists()


def test_one_damaged_object_does_not_hold_up_the_others(other: Cli) -> None:
    [victim, *_] = sorted((other.home / "vault").glob("objects/??/*.simg"))
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.chmod(0o600)
    victim.write_bytes(data)
    outcome = restore(other)
    assert (outcome.code, outcome.out) == (1, "3 restored, 1 failed\n")
    found = contents(other.home / "restored")
    assert len(found) == 3
    assert found.items() <= PICTURES.items()


def test_objects_of_another_vault_come_back_as_well_once_the_vaults_file_is_gone(
    other: Cli, tmp_path: Path
) -> None:
    identity = parse_identity_file((other.home / "recovery.key").read_text())[0]
    second = make_box(tmp_path)
    confirmed(second, identity)
    drop(second, {"second.png": picture("black")})
    assert second("drain").code == 0
    [path] = second.objects()
    shutil.copy(path, other.home / "vault/objects" / path.parent.name / path.name)
    assert restore(other).out == "4 restored, 1 failed\n"
    (other.home / "vault/vault.json").unlink()
    shutil.rmtree(other.home / "restored")
    assert restore(other).code == 0
    assert contents(other.home / "restored") == {**PICTURES, "second.png": picture("black")}
