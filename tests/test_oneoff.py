"""One file and a password: ``encrypt`` and ``decrypt``."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from cli_runner import HOSTILE, PATIENCE, Cli, check_complaint, check_harmless, contents, picture

assert sys.platform != "win32"  # what is tested here does not exist there

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the service is for POSIX systems")

PICTURE = picture("red")
NOON_NS = 1_700_000_000_123_456_789
# Argon2id by default costs half a second and half a gigabyte; most tests need neither.
CHEAP = ("--kdf", "pbkdf2")


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    cli = Cli(tmp_path / "home")
    (cli.home / "a.png").write_bytes(PICTURE)
    write_password(cli, "correct horse\nnot this line\n")
    return cli


def write_password(cli: Cli, text: str) -> None:
    (cli.home / "password").write_text(text)


def encrypt(cli: Cli) -> bytes:
    """Seal ``a.png``, and give the object's bytes."""
    done = cli("encrypt", "a.png", "--password-file", "password", *CHEAP)
    assert (done.code, done.out, done.err) == (0, "a.png.simg\n", "")
    return (cli.home / "a.png.simg").read_bytes()


@pytest.mark.parametrize("options", [(), CHEAP], ids=["argon2id", "pbkdf2"])
def test_a_file_comes_back_byte_for_byte(cli: Cli, options: tuple[str, ...]) -> None:
    os.utime(cli.home / "a.png", ns=(NOON_NS, NOON_NS))
    sealed = cli("encrypt", "a.png", "--password-file", "password", *options)
    assert (sealed.code, sealed.out, sealed.err) == (0, "a.png.simg\n", "")
    assert (cli.home / "a.png").read_bytes() == PICTURE
    assert (cli.home / "a.png.simg").stat().st_mode & 0o777 == 0o600
    assert PICTURE[:50] not in (cli.home / "a.png.simg").read_bytes()
    (cli.home / "a.png").unlink()
    opened = cli("decrypt", "a.png.simg", "--password-file", "password")
    assert (opened.code, opened.out, opened.err) == (0, "a.png\n", "")
    assert (cli.home / "a.png").read_bytes() == PICTURE
    assert (cli.home / "a.png").stat().st_mtime_ns == NOON_NS


def test_files_go_where_the_output_option_says(cli: Cli, tmp_path: Path) -> None:
    sealed, opened = tmp_path / "sealed", tmp_path / "opened.png"
    with_password = ("--password-file", "password")
    assert cli("encrypt", "a.png", *with_password, *CHEAP, "-o", sealed).out == f"{sealed}\n"
    assert cli("decrypt", sealed, *with_password, "-o", opened).out == f"{opened}\n"
    assert opened.read_bytes() == PICTURE
    assert sorted(os.listdir(cli.home)) == ["a.png", "password"]


@pytest.mark.parametrize("content", [b"", b"no picture", b"\xff\xd8\xff truncated"])
def test_any_file_can_be_sealed(cli: Cli, content: bytes) -> None:
    (cli.home / "a.png").write_bytes(content)
    encrypt(cli)
    assert cli("decrypt", "a.png.simg", "--password-file", "password", "-o", "b").code == 0
    assert (cli.home / "b").read_bytes() == content


def test_the_password_is_the_first_line_whatever_ends_it(cli: Cli) -> None:
    encrypt(cli)
    for number, text in enumerate(("correct horse", "correct horse\r\n", "correct horse\nx")):
        write_password(cli, text)
        output = f"out{number}"
        assert cli("decrypt", "a.png.simg", "--password-file", "password", "-o", output).code == 0


def test_a_wrong_password_is_65_and_leaves_no_file(cli: Cli) -> None:
    encrypt(cli)
    write_password(cli, "Correct horse")
    outcome = cli("decrypt", "a.png.simg", "--password-file", "password", "-o", "out")
    check_complaint(outcome, 65)
    assert sorted(os.listdir(cli.home)) == ["a.png", "a.png.simg", "password"]
    assert "orrect horse" not in outcome.err


def test_a_damaged_or_foreign_file_is_65_and_leaves_no_file(cli: Cli) -> None:
    data = encrypt(cli)
    flipped = bytes([*data[:-1], data[-1] ^ 1])
    for damaged in (data[:-1], data[:60], b"", flipped, data + b"\0", PICTURE):
        (cli.home / "b").write_bytes(damaged)
        outcome = cli("decrypt", "b", "--password-file", "password", "-o", "out")
        check_complaint(outcome, 65)
    assert sorted(os.listdir(cli.home)) == ["a.png", "a.png.simg", "b", "password"]


@pytest.mark.parametrize("taken", ["file", "directory", "link", "dangling link"])
def test_an_output_that_exists_is_73_and_untouched(cli: Cli, taken: str) -> None:
    output = cli.home / "out"
    if taken == "file":
        output.write_bytes(b"mine")
    elif taken == "directory":
        output.mkdir()
    else:
        output.symlink_to("a.png" if taken == "link" else "nothing")
    outcome = cli("encrypt", "a.png", "--password-file", "password", *CHEAP, "-o", "out")
    check_complaint(outcome, 73)
    assert sorted(os.listdir(cli.home)) == ["a.png", "out", "password"]
    assert taken != "file" or output.read_bytes() == b"mine"
    assert (cli.home / "a.png").read_bytes() == PICTURE


def test_a_decrypted_file_does_not_replace_the_one_it_was_made_from(cli: Cli) -> None:
    encrypt(cli)
    (cli.home / "a.png").write_bytes(b"newer")
    check_complaint(cli("decrypt", "a.png.simg", "--password-file", "password"), 73)
    assert (cli.home / "a.png").read_bytes() == b"newer"


@pytest.mark.parametrize("command", ["encrypt", "decrypt"])
@pytest.mark.parametrize("kind", ["absent", "directory", "fifo"])
def test_what_is_no_regular_file_is_66(cli: Cli, command: str, kind: str) -> None:
    path = cli.home / "input"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    outcome = cli(command, "input", "--password-file", "password", "-o", "out")
    assert "input" in check_complaint(outcome, 66)
    assert not (cli.home / "out").exists()


@pytest.mark.parametrize("command", ["encrypt", "decrypt"])
def test_a_file_that_may_not_be_read_is_77(cli: Cli, command: str) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (cli.home / "a.png").chmod(0)
    check_complaint(cli(command, "a.png", "--password-file", "password", "-o", "out"), 77)


@pytest.mark.parametrize("command", ["encrypt", "decrypt"])
def test_a_password_file_that_is_not_there_is_66(cli: Cli, command: str) -> None:
    outcome = cli(command, "a.png", "--password-file", "absent", "-o", "out")
    assert "absent" in check_complaint(outcome, 66)


@pytest.mark.parametrize("text", ["", "\n", "\nsecond line\n"])
def test_an_empty_password_is_64(cli: Cli, text: str) -> None:
    write_password(cli, text)
    outcome = cli("encrypt", "a.png", "--password-file", "password", *CHEAP)
    check_complaint(outcome, 64)
    assert sorted(os.listdir(cli.home)) == ["a.png", "password"]


def test_a_password_without_end_is_64(cli: Cli) -> None:
    write_password(cli, "x" * 5000)
    outcome = cli("encrypt", "a.png", "--password-file", "password", *CHEAP)
    check_complaint(outcome, 64)
    assert "xxx" not in outcome.err


def test_a_directory_reached_through_a_link_serves_as_well(cli: Cli) -> None:
    (cli.home / "real").mkdir()
    (cli.home / "link").symlink_to("real")
    (cli.home / "a.png").rename(cli.home / "real/a.png")
    with_password = ("--password-file", "password")
    assert cli("encrypt", "link/a.png", *with_password, *CHEAP).code == 0
    (cli.home / "real/a.png").unlink()
    assert cli("decrypt", "link/a.png.simg", *with_password).code == 0
    assert (cli.home / "real/a.png").read_bytes() == PICTURE


@pytest.mark.parametrize("name", [HOSTILE, os.fsdecode(b"latin-\xe9.png")], ids=ascii)
def test_hostile_names_are_kept_and_shown_escaped(cli: Cli, name: str) -> None:
    with_password = ("--password-file", "password")
    (cli.home / "a.png").rename(cli.home / name)
    sealed = cli("encrypt", name, *with_password, *CHEAP, "-o", "sealed")
    assert sealed.code == 0
    beside = cli("encrypt", name, *with_password, *CHEAP)
    (cli.home / name).unlink()
    opened = cli("decrypt", "sealed", *with_password)
    again = cli("decrypt", "sealed", *with_password)
    assert (beside.code, opened.code) == (0, 0), (beside, opened)
    assert (cli.home / name).read_bytes() == PICTURE
    assert len(opened.out.splitlines()) == 1
    for outcome in (beside, opened):
        check_harmless(outcome)
    check_complaint(again, 73)


@pytest.mark.parametrize("command", ["encrypt", "decrypt"])
def test_a_hostile_name_that_is_not_there_is_shown_escaped(cli: Cli, command: str) -> None:
    check_complaint(cli(command, HOSTILE, "--password-file", "password"), 66)
    check_complaint(cli(command, "a.png", "--password-file", HOSTILE, "-o", "out"), 66)


# -- asking for the password ---------------------------------------------------------------------


def ask(cli: Cli, answers: list[str], *words: str) -> tuple[int, str]:
    """Run a command at a terminal and answer its questions; the exit code, and all it showed."""
    import pty  # noqa: PLC0415 - not on every system that this module is imported on

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        cli.argv(*words),
        env=cli.environ,
        cwd=cli.home,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    shown = b""
    left = list(answers)
    deadline = time.monotonic() + PATIENCE
    try:
        while time.monotonic() < deadline:
            if not select.select([ours], [], [], PATIENCE)[0]:
                break
            with contextlib.suppress(OSError):  # what a terminal answers when nobody is left
                piece = os.read(ours, 4096)
                shown += piece
                # The question ends with a colon and a blank; echo is off by then.
                if left and shown.endswith(b": "):
                    os.write(ours, left.pop(0).encode() + b"\n")
                continue
            break
        code = process.wait(PATIENCE)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return code, shown.decode()


def test_without_a_password_file_the_password_is_asked_for_and_not_shown(cli: Cli) -> None:
    code, shown = ask(cli, ["opensesame", "opensesame"], "encrypt", "a.png", *CHEAP)
    assert code == 0
    assert "opensesame" not in shown
    code, shown = ask(cli, ["opensesame"], "decrypt", "a.png.simg", "-o", "out")
    assert code == 0
    assert "opensesame" not in shown
    assert (cli.home / "out").read_bytes() == PICTURE


def test_a_password_that_is_repeated_wrongly_is_asked_for_again(cli: Cli) -> None:
    answers = ["first", "second", "third", "third"]
    code, _ = ask(cli, answers, "encrypt", "a.png", *CHEAP)
    assert code == 0
    write_password(cli, "third")
    assert cli("decrypt", "a.png.simg", "--password-file", "password", "-o", "out").code == 0


def test_without_a_terminal_and_a_password_nothing_is_written(cli: Cli) -> None:
    outcome = cli("encrypt", "a.png", *CHEAP)
    check_complaint(outcome, 64)
    assert "--password-file" in outcome.err
    assert contents(cli.home).keys() == {"a.png", "password"}
