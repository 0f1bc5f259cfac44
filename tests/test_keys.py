"""Keys: the stored line, and the providers that need no desktop."""

from __future__ import annotations

import base64
import errno
import os
import re
import select
import stat
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import secimg_watch
from secimg_watch import keys
from secimg_watch.errors import (
    CannotCreateError,
    ConfigError,
    InsecureKeyError,
    KeyMissingError,
    KeyUnavailableError,
)
from secimg_watch.records import KeyEncryptionKey
from secimg_watch.secretline import write_private

if TYPE_CHECKING:
    from collections.abc import Sequence

NAME = "secimg-watch/main"
KEK = KeyEncryptionKey(bytes(range(16)), bytes(range(32)))
LINE = keys.encode(KEK)

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="modes tell nothing on Windows")


@pytest.fixture(autouse=True)
def _no_keyring_settings_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("PYTHON_KEYRING_BACKEND", raising=False)


def rc_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "config/python_keyring").mkdir(parents=True)
    (tmp_path / "config/python_keyring/keyringrc.cfg").write_text(text)


def write(path: Path, text: str, mode: int = 0o400) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def credential(directory: Path) -> keys.KeyProvider:
    environ = {"CREDENTIALS_DIRECTORY": str(directory)}
    return keys.provider_for("credential", NAME, environ=environ)


def key_file(path: Path) -> keys.KeyProvider:
    return keys.provider_for("file", NAME, file=path)


def command(*argv: str, timeout: float = 10) -> keys.Command:
    return keys.Command(argv, os.environ, timeout)


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


# The stored line.


@given(st.binary(min_size=16, max_size=16), st.binary(min_size=32, max_size=32))
def test_a_key_survives_its_line(key_id: bytes, key: bytes) -> None:
    line = keys.encode(KeyEncryptionKey(key_id, key))
    assert line.isascii()
    assert line.isprintable()
    assert len(line) == 85
    assert keys.decode(line) == KeyEncryptionKey(key_id, key)


def test_the_line_is_the_documented_one() -> None:
    assert LINE == (
        "secimg1:000102030405060708090a0b0c0d0e0f:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
    )


@given(st.text() | st.from_regex(r"secimg1:[0-9a-f]{30,33}:[A-Za-z0-9+/=]{42,45}"))
@example(LINE + "\n")
@example(" " + LINE)
@example(LINE.replace("0a0b", "0A0B"))
@example(LINE.replace("secimg1", "secimg2"))
@example(LINE.replace("=", ""))
@example(LINE.replace("8=", "9="))  # the same 32 bytes with stray bits at the end
@example(LINE.replace(":", "\N{FULLWIDTH COLON}"))
@example(LINE.replace("00", "\N{ARABIC-INDIC DIGIT ZERO}" * 2))
def test_a_line_is_read_exactly_or_refused_and_never_repeated(line: str) -> None:
    try:
        kek = keys.decode(line)
    except ConfigError as error:
        shown = str(error) + error.hint
    else:
        shown = ""
        assert keys.encode(kek) == line
    assert len(line) <= len("secimg1:") or line not in shown


def ring_of(count: int) -> tuple[KeyEncryptionKey, ...]:
    return tuple(keys.generate() for _ in range(count))


@given(
    st.lists(
        st.builds(
            KeyEncryptionKey,
            st.binary(min_size=16, max_size=16),
            st.binary(min_size=32, max_size=32),
        ),
        min_size=1,
        max_size=keys.MAX_RING,
        unique_by=lambda kek: kek.key_id,
    )
)
def test_several_keys_survive_their_line_in_their_order(ring: list[KeyEncryptionKey]) -> None:
    line = keys.encode_ring(ring)
    assert line.isascii()
    assert line.isprintable()
    assert len(line) == 86 * len(ring) - 1
    assert keys.decode_ring(line) == tuple(ring)


def test_one_key_alone_has_the_line_that_it_always_had() -> None:
    assert keys.encode_ring([KEK]) == LINE
    assert keys.decode_ring(LINE) == (KEK,)


def test_a_program_that_knows_one_key_refuses_the_line_of_several() -> None:
    with pytest.raises(ConfigError, match="not a key of this program"):
        keys.decode(keys.encode_ring(ring_of(2)))


OTHER_LINE = keys.encode(KeyEncryptionKey(bytes(16), bytes(32)))


@given(st.text() | st.lists(st.sampled_from([LINE, OTHER_LINE, "", "\n"])).map(" ".join))
@example(f"{LINE} {LINE}")
@example(f"{LINE}  {OTHER_LINE}")
@example(f"{LINE}\t{OTHER_LINE}")
@example(f"{LINE} {OTHER_LINE} ")
@example(f" {LINE}")
@example(f"{LINE},{OTHER_LINE}")
@example(f"{LINE} {OTHER_LINE}\n")
@example(f"{LINE} {keys.encode(KeyEncryptionKey(KEK.key_id, bytes(32)))}")
def test_a_line_of_keys_is_read_exactly_or_refused_and_never_repeated(line: str) -> None:
    try:
        ring = keys.decode_ring(line)
    except ConfigError as error:
        shown = str(error) + error.hint
    else:
        shown = ""
        assert keys.encode_ring(ring) == line
        assert len({kek.key_id for kek in ring}) == len(ring)
    assert len(line) <= len("secimg1:") or line not in shown


def test_more_keys_than_are_allowed_are_neither_written_nor_read() -> None:
    ring = ring_of(keys.MAX_RING + 1)
    with pytest.raises(ConfigError, match="more than 8 keys") as caught:
        keys.encode_ring(ring)
    assert "key retire" in caught.value.hint
    with pytest.raises(ConfigError, match="too many keys"):
        keys.decode_ring(" ".join(map(keys.encode, ring)))


def test_generated_keys_differ_in_id_and_key() -> None:
    first, second = keys.generate(), keys.generate()
    assert first.key_id != second.key_id
    assert first.key != second.key
    assert (len(first.key_id), len(first.key)) == (16, 32)


# Choosing.


def test_auto_takes_the_credential_where_systemd_gives_any(tmp_path: Path) -> None:
    provider = keys.provider_for("auto", NAME, environ={"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert provider.description == "systemd credential secimg-watch.main"


def test_auto_takes_the_keyring_elsewhere() -> None:
    assert keys.provider_for("auto", NAME, environ={}).description.startswith("keyring (")


def test_auto_does_not_go_on_to_the_keyring_when_the_credential_fails(tmp_path: Path) -> None:
    provider = keys.provider_for("auto", NAME, environ={"CREDENTIALS_DIRECTORY": str(tmp_path)})
    with pytest.raises(KeyMissingError, match="CREDENTIALS_DIRECTORY has no secimg-watch"):
        provider.load()


@pytest.mark.parametrize(
    "name", ["", "main", "/main", "a/", "a/b/c", "../b", "a/..", "a/.b", "a b/c", "a/b\n", "é/a"]
)
def test_a_name_that_is_no_service_and_user_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a key"):
        keys.provider_for("auto", name)


def test_a_command_or_file_must_be_given() -> None:
    with pytest.raises(ConfigError, match="none is given"):
        keys.provider_for("command", NAME)
    with pytest.raises(ConfigError, match="none is given"):
        keys.provider_for("file", NAME)


def test_no_representation_of_a_provider_shows_arguments_or_environment() -> None:
    provider = keys.provider_for(
        "command", NAME, command=["pass", "--pin=1234"], environ={"TOKEN": "s3cret"}
    )
    shown = repr(provider) + provider.description + provider.warning
    assert "1234" not in shown
    assert "s3cret" not in shown


# Backends of the keyring package.

INSECURE = [
    "keyring.backends.null.Keyring",
    "keyring.backends.fail.Keyring",
    "keyring.backends.chainer.ChainerBackend",
    "keyrings.alt.file.PlaintextKeyring",
    "keyrings.alt.file.EncryptedKeyring",
    "no.such.module.Keyring",
    "keyring.backends.SecretService.Keyring.evil",
]


@pytest.mark.parametrize("name", INSECURE)
def test_a_backend_that_is_no_system_keyring_is_refused_by_name(name: str) -> None:
    with pytest.raises(InsecureKeyError, match=re.escape(name)) as caught:
        keys.provider_for("keyring", NAME, environ={"PYTHON_KEYRING_BACKEND": name})
    assert "PYTHON_KEYRING_BACKEND" in caught.value.hint


@pytest.mark.skipif(sys.platform == "win32", reason="the configuration lies elsewhere")
@pytest.mark.parametrize("name", INSECURE)
def test_a_configured_backend_that_is_no_system_keyring_is_refused(
    tmp_path: Path, name: str
) -> None:
    rc_file(tmp_path, f"[backend]\ndefault-keyring = {name}\nkeyring-path = {tmp_path}\n")
    with pytest.raises(InsecureKeyError, match=re.escape(name)):
        keys.provider_for("keyring", NAME, environ={})
    assert str(tmp_path) not in sys.path


@pytest.mark.skipif(sys.platform == "win32", reason="the configuration lies elsewhere")
def test_a_configuration_that_cannot_be_parsed_is_an_error(tmp_path: Path) -> None:
    rc_file(tmp_path, "default-keyring without a section\n")
    with pytest.raises(ConfigError, match="keyring configuration"):
        keys.provider_for("keyring", NAME, environ={})


@posix_only
def test_a_user_without_a_home_directory_has_no_configured_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert keys.provider_for("keyring", NAME, environ={}).description.startswith("keyring (")


@pytest.mark.parametrize("name", sorted(keys.BACKENDS))
def test_a_system_keyring_may_be_chosen_by_name(name: str) -> None:
    provider = keys.provider_for("keyring", NAME, environ={"PYTHON_KEYRING_BACKEND": name})
    assert name.split(".")[2] in provider.description


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the backend may work")
def test_a_backend_that_does_not_work_here_says_why() -> None:
    backend = "keyring.backends.Windows.WinVaultKeyring"
    provider = keys.provider_for("keyring", NAME, environ={"PYTHON_KEYRING_BACKEND": backend})
    with pytest.raises(KeyUnavailableError, match="Requires Windows"):
        provider.load()


TRAP_MODULE = """
import os
from keyring.backend import KeyringBackend
class PlaintextKeyring(KeyringBackend):
    priority = 0.5
    def get_password(self, service, username):
        return open(os.environ["TRAP"]).read()
    def set_password(self, service, username, password):
        open(os.environ["TRAP"], "w").write(password)
"""

TRAP_USE = """
import sys
import keyring
from secimg_watch import errors, keys
if sys.argv[1] == "keyring":
    keyring.set_password("secimg-watch", "main", "in clear")
else:
    provider = keys.provider_for("auto", "secimg-watch/main")
    print(provider.warning)
    for attempt in (provider.load, lambda: provider.store(keys.generate())):
        try:
            attempt()
        except errors.KeyUnavailableError as error:
            print("refused:", error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is always a system keyring")
def test_without_a_bus_an_installed_plaintext_backend_is_not_used(tmp_path: Path) -> None:
    module = tmp_path / "keyrings/alt"
    module.mkdir(parents=True)
    (module / "file.py").write_text(TRAP_MODULE)
    metadata = tmp_path / "keyrings.alt-5.0.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: keyrings.alt\nVersion: 5.0.2")
    (metadata / "entry_points.txt").write_text("[keyring.backends]\nfile = keyrings.alt.file\n")
    trap = tmp_path / "trap"

    def use(how: str) -> str:
        environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(secimg_watch.__file__).parent.parent}",
            "TRAP": str(trap),
        }
        argv = [sys.executable, "-c", TRAP_USE, how]
        return subprocess.run(argv, env=environ, capture_output=True, check=True, text=True).stdout

    output = use("secimg-watch")
    assert output.count("refused: the keyring cannot be reached") == 2
    assert "keyrings.alt is installed" in output
    assert not trap.exists()
    use("keyring")
    assert trap.read_text() == "in clear", "the trap would not have caught anybody"


# Credentials.


@posix_only
def test_a_credential_is_read_with_or_without_its_line_end(tmp_path: Path) -> None:
    path = tmp_path / "secimg-watch.main"
    for text in (LINE, f"{LINE}\n", f"{LINE}\r\n"):
        path.unlink(missing_ok=True)
        write(path, text)
        assert credential(tmp_path).load() == KEK


@posix_only
@pytest.mark.parametrize("content", ["", "\n", f"{LINE}\n\n", f"{LINE}\nmore", "hunter2" * 9999])
def test_a_credential_that_is_not_one_line_is_refused_and_not_repeated(
    tmp_path: Path, content: str
) -> None:
    write(tmp_path / "secimg-watch.main", content)
    with pytest.raises(ConfigError, match="not a key of this program") as caught:
        credential(tmp_path).load()
    assert "hunter2" not in str(caught.value)
    assert LINE not in str(caught.value)


@posix_only
@pytest.mark.parametrize("mode", [0o440, 0o404, 0o420, 0o644])
def test_a_credential_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    write(tmp_path / "secimg-watch.main", LINE, mode)
    with pytest.raises(InsecureKeyError, match="others may use it"):
        credential(tmp_path).load()


def grant_by_list(path: Path, uid: int, others: int) -> None:
    """Set the access control list that systemd sets: one named user may read, no group."""
    read, nobody = 4, 0xFFFFFFFF
    entries = [(1, read, nobody), (2, read, uid), (4, 0, nobody), (16, read, nobody)]
    packed = b"".join(struct.pack("<HHI", *entry) for entry in [*entries, (32, others, nobody)])
    if sys.platform == "linux":
        try:
            os.setxattr(path, "system.posix_acl_access", struct.pack("<I", 2) + packed)
        except OSError as error:
            pytest.skip(f"this file system has no access control lists: {error.strerror}")


@pytest.mark.skipif(sys.platform != "linux", reason="systemd is Linux's")
def test_a_credential_that_one_user_may_read_by_an_access_control_list_is_accepted(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "secimg-watch.main", LINE)
    grant_by_list(path, 12345, others=0)
    assert stat.S_IMODE(path.stat().st_mode) == 0o440
    assert credential(tmp_path).load() == KEK
    with pytest.raises(InsecureKeyError):
        key_file(path).load()
    grant_by_list(path, 12345, others=4)
    with pytest.raises(InsecureKeyError):
        credential(tmp_path).load()


@posix_only
@pytest.mark.parametrize("kind", ["link", "directory", "fifo"])
def test_a_credential_that_is_no_regular_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "secimg-watch.main"
    if kind == "link":
        path.symlink_to(write(tmp_path / "real", LINE))
    elif kind == "directory":
        path.mkdir(mode=0o700)
    elif sys.platform != "win32":
        os.mkfifo(path, 0o400)
    with pytest.raises(InsecureKeyError):
        credential(tmp_path).load()


def test_a_credential_without_a_directory_is_missing() -> None:
    provider = keys.provider_for("credential", NAME, environ={})
    with pytest.raises(KeyMissingError, match="CREDENTIALS_DIRECTORY is not set"):
        provider.load()


@posix_only
def test_a_credential_directory_that_cannot_be_entered_is_an_error(tmp_path: Path) -> None:
    if sys.platform != "win32" and os.geteuid() == 0:
        pytest.skip("root may enter everywhere")
    (tmp_path / "credentials").mkdir(mode=0)
    with pytest.raises(ConfigError, match="Permission denied"):
        credential(tmp_path / "credentials").load()


@posix_only
def test_a_credential_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot store"):
        credential(tmp_path).store(KEK)
    write(tmp_path / "secimg-watch.main", LINE)
    credential(tmp_path).store(KEK)
    with pytest.raises(ConfigError, match="another key"):
        credential(tmp_path).store(keys.generate())
    assert (tmp_path / "secimg-watch.main").read_text() == LINE


@posix_only
def test_the_keyring_command_reads_a_credential_when_told_to(tmp_path: Path) -> None:
    write(tmp_path / "secimg-watch.main", LINE)
    environ = {
        "PATH": os.environ["PATH"],
        "CREDENTIALS_DIRECTORY": str(tmp_path),
        "PYTHON_KEYRING_BACKEND": "secimg_watch.keys.CredentialBackend",
        "PYTHONPATH": str(Path(secimg_watch.__file__).parent.parent),
        "KEYRING_PROPERTY__DIRECTORY": "/nonexistent",
    }
    argv = [sys.executable, "-m", "keyring", "get", "secimg-watch", "main"]
    run = subprocess.run(argv, env=environ, capture_output=True, check=True, text=True)
    assert run.stdout.strip() == LINE


@posix_only
def test_the_credential_backend_stays_in_its_directory(tmp_path: Path) -> None:
    (tmp_path / "credentials").mkdir()
    write(tmp_path / "a.b", LINE)
    backend = keys.CredentialBackend(str(tmp_path / "credentials"))
    assert backend.get_password("../a", "b") is None
    assert backend.get_password(str(tmp_path / "a"), "b") is None


# Commands.


def test_a_command_gives_its_first_line_and_no_other() -> None:
    assert command(*python(f"print({LINE!r}); print('more')")).load() == KEK
    assert command(*python(f"print({LINE!r}, end='')")).load() == KEK


def test_a_command_that_says_much_more_is_not_blocked() -> None:
    assert command(*python(f"print({LINE!r}); print('x' * 1_000_000)")).load() == KEK


def test_a_command_gets_the_environment_and_no_input() -> None:
    code = "import os, sys; print(sys.stdin.read() + os.environ['KEY_LINE'])"
    environ = {**os.environ, "KEY_LINE": LINE}
    assert keys.provider_for("command", NAME, command=python(code), environ=environ).load() == KEK


def test_a_command_is_not_read_by_a_shell() -> None:
    code = "import sys; print(sys.argv[1])"
    with pytest.raises(ConfigError, match="not a key"):
        command(*python(code), f"$(echo {LINE})").load()


def test_a_failing_command_is_unavailable_and_its_messages_are_not_shown(
    capfd: pytest.CaptureFixture[str],
) -> None:
    code = f"import sys; print({LINE!r}); print('hunter2', file=sys.stderr); sys.exit(3)"
    with pytest.raises(KeyUnavailableError, match="failed with status 3") as caught:
        command(*python(code)).load()
    shown = str(caught.value) + caught.value.hint + "".join(capfd.readouterr())
    assert "hunter2" not in shown
    assert LINE not in shown


def test_a_command_that_prints_nothing_has_no_key() -> None:
    with pytest.raises(KeyMissingError, match="printed nothing"):
        command(*python("")).load()


def test_a_command_that_prints_something_else_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="not a key of this program") as caught:
        command(*python("import sys; sys.stdout.buffer.write(b'hunter2\\xff' * 9999)")).load()
    assert "hunter2" not in str(caught.value)


def test_a_command_that_does_not_exist_is_a_mistake_of_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be run"):
        command(str(tmp_path / "nothing")).load()


@pytest.mark.skipif(sys.platform != "linux", reason="needs a named pipe that opens without a peer")
def test_a_command_that_hangs_is_killed_with_what_it_started(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    if sys.platform != "win32":
        os.mkfifo(pipe)
    script = f"exec 9>{pipe}; sleep 60 & echo started >&9; sleep 60; echo {LINE}"
    flags: int = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
    with open(os.open(pipe, flags), "rb", buffering=0) as reader:
        with pytest.raises(KeyUnavailableError, match="took longer"):
            command("sh", "-c", script, timeout=1).load()
        assert reader.read(100) == b"started\n"
        # The pipe ends when the last process that holds its other end is gone.
        assert select.select([reader], [], [], 10)[0]
        assert reader.read(100) == b""


@posix_only
def test_a_child_left_in_the_background_delays_nothing() -> None:
    started = time.monotonic()
    assert command("sh", "-c", f"sleep 3 & echo {LINE}").load() == KEK
    assert time.monotonic() - started < 2.5


@posix_only
def test_a_background_child_that_holds_a_silent_pipe_open_counts_as_too_slow() -> None:
    with pytest.raises(KeyUnavailableError, match="took longer"):
        command("sh", "-c", "sleep 1 &", timeout=0.3).load()


def test_a_command_is_never_stored_to() -> None:
    provider = command(*python(f"print({LINE!r})"))
    provider.store(KEK)
    with pytest.raises(ConfigError, match="another key"):
        provider.store(keys.generate())
    with pytest.raises(ConfigError, match="cannot store"):
        command(*python("")).store(KEK)


# Files.


@posix_only
def test_a_key_file_is_created_for_the_owner_alone_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "key"
    key_file(path).store(KEK)
    assert path.read_text() == f"{LINE}\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o400
    assert os.listdir(tmp_path) == ["key"]
    assert key_file(path).load() == KEK


@posix_only
def test_a_key_file_warns_what_it_is_worth(tmp_path: Path) -> None:
    assert str(tmp_path / "key") in key_file(tmp_path / "key").warning


@posix_only
def test_a_key_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key"
    key_file(path).store(KEK)
    key_file(path).store(KEK)
    with pytest.raises(ConfigError, match="another key"):
        key_file(path).store(keys.generate())
    assert key_file(path).load() == KEK


@posix_only
def test_of_two_keys_stored_at_once_one_stays_and_the_other_is_refused(tmp_path: Path) -> None:
    keks = [keys.generate() for _ in range(8)]
    barrier = threading.Barrier(len(keks))
    stored: list[KeyEncryptionKey] = []

    def run(kek: KeyEncryptionKey) -> None:
        barrier.wait(10)
        try:
            key_file(tmp_path / "key").store(kek)
        except (ConfigError, CannotCreateError):
            return
        stored.append(kek)

    threads = [threading.Thread(target=run, args=(kek,)) for kek in keks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert stored == [key_file(tmp_path / "key").load()]
    assert os.listdir(tmp_path) == ["key"]


@posix_only
def test_a_key_that_was_stored_a_moment_ago_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(path: Path, line: str, *, like: Path) -> None:
        monkeypatch.undo()
        write_private(path, line, like=like)
        key_file(tmp_path / "key").store(KEK)

    monkeypatch.setattr("secimg_watch.keys.write_private", late)
    with pytest.raises(CannotCreateError):
        key_file(tmp_path / "key").store(keys.generate())
    assert key_file(tmp_path / "key").load() == KEK


@posix_only
@pytest.mark.parametrize("mode", [0o440, 0o404, 0o644, 0o660])
def test_a_key_file_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path / "key", LINE, mode)
    with pytest.raises(InsecureKeyError, match="others may use it") as caught:
        key_file(path).load()
    assert "0400" in caught.value.hint


@posix_only
def test_a_key_file_with_mode_0600_is_accepted(tmp_path: Path) -> None:
    assert key_file(write(tmp_path / "key", LINE, 0o600)).load() == KEK


@posix_only
def test_a_key_file_that_is_a_link_is_refused_and_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "key").symlink_to("elsewhere")
    for attempt in (key_file(tmp_path / "key").load, lambda: key_file(tmp_path / "key").store(KEK)):
        with pytest.raises(InsecureKeyError, match="symbolic link"):
            attempt()
    assert not (tmp_path / "elsewhere").exists()


@posix_only
def test_a_key_file_of_another_user_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "key", LINE)
    if sys.platform != "win32":
        try:
            os.chown(path, 12345, -1)
        except PermissionError:
            pytest.skip("only root can give a file away")
    with pytest.raises(InsecureKeyError, match="another user"):
        key_file(path).load()


@posix_only
def test_a_missing_key_file_is_missing_and_a_missing_directory_is_reported(tmp_path: Path) -> None:
    with pytest.raises(KeyMissingError) as caught:
        key_file(tmp_path / "key").load()
    assert "key init" in caught.value.hint
    with pytest.raises(CannotCreateError):
        key_file(tmp_path / "missing/key").store(KEK)


@posix_only
@given(content=st.binary(max_size=200) | st.just(base64.b64encode(KEK.key)))
def test_any_other_content_of_a_key_file_is_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any-content"
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    path.chmod(0o400)
    with pytest.raises(ConfigError, match="not a key of this program"):
        key_file(path).load()


# More than one key.


@posix_only
def test_every_provider_gives_the_current_key_first_and_former_ones_behind_it(
    tmp_path: Path,
) -> None:
    ring = ring_of(keys.MAX_RING)
    line = keys.encode_ring(ring)
    write(tmp_path / "secimg-watch.main", line)
    for provider in (
        credential(tmp_path),
        key_file(tmp_path / "secimg-watch.main"),
        command(*python(f"print({line!r})")),
    ):
        assert provider.load_ring() == ring
        assert provider.load() == ring[0]


@posix_only
def test_the_keys_in_a_file_are_replaced_and_stay_the_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "key"
    key_file(path).store(KEK)
    new = keys.generate()
    key_file(path).replace((new, KEK))
    assert path.read_text() == f"{keys.encode(new)} {LINE}\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o400
    assert os.listdir(tmp_path) == ["key"]
    key_file(path).replace((new,))
    assert key_file(path).load_ring() == (new,)


@posix_only
def test_whoever_reads_a_key_file_while_it_is_replaced_has_the_old_or_the_new_keys(
    tmp_path: Path,
) -> None:
    path = tmp_path / "key"
    rings = [ring_of(count) for count in (1, 3, 2, 5)]
    key_file(path).store(rings[0][0])
    with path.open() as old:
        key_file(path).replace(rings[1])
        assert old.read() == f"{keys.encode_ring(rings[0])}\n"
    seen: list[tuple[KeyEncryptionKey, ...]] = []
    ended = threading.Event()

    def read() -> None:
        done = False
        while not done:
            done = ended.is_set()
            seen.append(key_file(path).load_ring())

    reader = threading.Thread(target=read)
    reader.start()
    for ring in rings * 5:
        key_file(path).replace(ring)
    ended.set()
    reader.join(10)
    assert set(seen) <= set(rings)
    assert seen[-1] == rings[-1]


@posix_only
def test_a_key_file_that_cannot_be_replaced_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_source: Path, _target: Path) -> None:
        raise OSError(5, "Input/output error")

    path = tmp_path / "key"
    key_file(path).store(KEK)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(CannotCreateError, match="Input/output error"):
        key_file(path).replace((keys.generate(), KEK))
    assert os.listdir(tmp_path) == ["key"]
    assert key_file(path).load_ring() == (KEK,)


@posix_only
def test_the_same_keys_are_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "key"
    key_file(path).store(KEK)
    before = path.stat()
    key_file(path).replace((KEK,))
    assert path.stat() == before


@posix_only
def test_more_keys_than_are_allowed_replace_nothing(tmp_path: Path) -> None:
    path = tmp_path / "key"
    key_file(path).store(KEK)
    with pytest.raises(ConfigError, match="more than 8 keys"):
        key_file(path).replace((*ring_of(keys.MAX_RING), KEK))
    assert key_file(path).load_ring() == (KEK,)


@posix_only
def test_only_keys_that_are_there_are_replaced(tmp_path: Path) -> None:
    with pytest.raises(KeyMissingError):
        key_file(tmp_path / "key").replace((KEK,))
    assert os.listdir(tmp_path) == []
    write(tmp_path / "key", "not a key", 0o600)
    with pytest.raises(ConfigError, match="not a key of this program"):
        key_file(tmp_path / "key").replace((KEK,))
    assert (tmp_path / "key").read_text() == "not a key"
    (tmp_path / "key").chmod(0o644)
    with pytest.raises(InsecureKeyError):
        key_file(tmp_path / "key").replace((KEK,))


@posix_only
def test_a_key_with_former_ones_behind_it_is_stored_already(tmp_path: Path) -> None:
    path = tmp_path / "key"
    old = keys.generate()
    write(path, keys.encode_ring((KEK, old)))
    key_file(path).store(KEK)
    with pytest.raises(ConfigError, match="another key"):
        key_file(path).store(old)
    assert key_file(path).load_ring() == (KEK, old)


@posix_only
def test_what_this_program_cannot_write_is_not_replaced_and_the_remedy_is_named(
    tmp_path: Path,
) -> None:
    write(tmp_path / "secimg-watch.main", LINE)
    printing = command(*python(f"print({LINE!r})"))
    for provider, remedy in (
        (credential(tmp_path), "systemd-creds encrypt"),
        (printing, "store it where that reads"),
        (keys.provider_for("none", NAME), "another key.provider"),
    ):
        with pytest.raises(ConfigError, match="cannot store") as caught:
            provider.replace((keys.generate(), KEK))
        assert remedy in caught.value.hint
    for provider in (credential(tmp_path), printing):
        provider.replace((KEK,))  # which is there already
    assert (tmp_path / "secimg-watch.main").read_text() == LINE


# No key at all.


def test_a_write_only_vaults_provider_has_no_key_and_says_what_opens_the_vault() -> None:
    provider = keys.provider_for("none", NAME)
    assert provider.load_ring() == ()
    assert "write-only" in provider.description
    with pytest.raises(KeyMissingError, match="write-only") as caught:
        provider.load()
    assert "--identity" in caught.value.hint
    with pytest.raises(ConfigError, match="cannot store"):
        provider.store(KEK)


# What every provider promises.


def every_provider(tmp_path: Path) -> Sequence[keys.KeyProvider]:
    return [
        credential(tmp_path),
        key_file(tmp_path / "key"),
        command(*python("")),
        keys.provider_for("keyring", NAME, environ={}),
        keys.provider_for("none", NAME),
    ]


def test_a_description_is_one_short_line_for_people(tmp_path: Path) -> None:
    for provider in every_provider(tmp_path):
        assert provider.description.isprintable()
        assert provider.warning == "" or provider.warning.isprintable()


@posix_only
def test_a_store_that_gives_something_else_back_is_not_believed(tmp_path: Path) -> None:
    class Forgetful:
        """Keeps another key than it is given, as a broken backend might."""

        description = "a forgetful store"
        warning = ""

        def __init__(self) -> None:
            self.held: KeyEncryptionKey | None = None

        def load(self) -> KeyEncryptionKey:
            if self.held is None:
                raise KeyMissingError("nothing yet")
            return self.held

        def load_ring(self) -> tuple[KeyEncryptionKey, ...]:
            return (self.load(),)

        def replace(self, ring: Sequence[KeyEncryptionKey]) -> None:
            keys._replace(self, ring, lambda _line: setattr(self, "held", keys.generate()))

        def store(self, kek: KeyEncryptionKey) -> None:
            keys._store(self, kek, lambda _line: setattr(self, "held", keys.generate()))

    with pytest.raises(ConfigError, match="did not keep"):
        Forgetful().store(KEK)
    store = Forgetful()
    store.held = KEK
    with pytest.raises(ConfigError, match="did not keep"):
        store.replace([keys.generate(), KEK])


def test_a_key_that_could_not_be_written_whole_leaves_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = keys.File(tmp_path / "vault.key")
    file.store(keys.generate())
    before = file.path.read_bytes()

    def full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CannotCreateError):
        file.replace((keys.generate(), *file.load_ring()))
    assert [path.name for path in tmp_path.iterdir()] == ["vault.key"]
    assert file.path.read_bytes() == before
