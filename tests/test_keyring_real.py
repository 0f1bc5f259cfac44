"""The keyring provider against a real GNOME Keyring, on a session bus of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from secimg_watch import keys
from secimg_watch.errors import ConfigError, KeyMissingError, KeyUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

secretstorage: Any = pytest.importorskip("secretstorage", reason="the Secret Service is Linux's")
secretservice: Any = pytest.importorskip("secimg_watch.secretservice")

PROGRAMS = {
    "dbus-daemon": "dbus-daemon",
    "gnome-keyring-daemon": "gnome-keyring",
    "gdbus": "libglib2.0-bin",
}
MISSING = [package for program, package in PROGRAMS.items() if shutil.which(program) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"Debian packages missing: {MISSING}")

# Without service directories nothing is started on demand: no prompter of the machine's own.
BUS = """<busconfig><type>session</type><listen>unix:path={home}/bus</listen>
<policy context="default"><allow own="*"/><allow send_destination="*"/><allow receive_sender="*"/>
</policy></busconfig>
"""
PROMPTER = "org.gnome.keyring.SystemPrompter"


class Lab:
    """A session bus and a GNOME Keyring whose files lie in a folder of their own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "XDG_RUNTIME_DIR": str(home),
            "XDG_DATA_HOME": str(home / "data"),
            "XDG_CONFIG_HOME": str(home / "config"),
            "DBUS_SESSION_BUS_ADDRESS": f"unix:path={home}/bus",
        }
        self.bus: subprocess.Popen[bytes] | None = None
        self.keyring: subprocess.Popen[bytes] | None = None

    def start_bus(self) -> None:
        (self.home / "bus.conf").write_text(BUS.format(home=self.home))
        self.bus = self._start(
            "dbus-daemon", "--nofork", "--print-address=1", f"--config-file={self.home}/bus.conf"
        )
        assert self.bus.stdout is not None
        assert self.bus.stdout.readline(), "the bus did not start"

    def start_keyring(self) -> None:
        """Start the daemon and give it the password, which makes or unlocks its collection."""
        self.keyring = self._start("gnome-keyring-daemon", "--foreground", "--unlock")
        assert self.keyring.stdin is not None
        with self.keyring.stdin as stdin:
            stdin.write(b"password of the lab\n")
        self._run("gdbus", "wait", "--session", "--timeout", "10", "org.freedesktop.secrets")

    def stop(self) -> None:
        for process in (self.keyring, self.bus):
            if process is not None:
                end(process)

    def restart_keyring(self) -> None:
        assert self.keyring is not None
        end(self.keyring)
        self.start_keyring()

    def lock(self) -> None:
        with closing(secretstorage.dbus_init()) as connection:
            secretstorage.get_collection_by_alias(connection, "default").lock()

    def python_keyring(self, *arguments: str, text: str = "") -> str:
        return self._run(sys.executable, "-m", "keyring", *arguments, text=text)

    def _start(self, *argv: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            argv,
            env=self.environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def _run(self, *argv: str, text: str = "") -> str:
        return subprocess.run(
            argv, env=self.environ, input=text, stdout=subprocess.PIPE, check=True, text=True
        ).stdout


@pytest.fixture
def bare_lab(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """Give a lab in which nothing runs yet."""
    # A socket's path has at most 107 bytes: too few for a test's own folder.
    with tempfile.TemporaryDirectory(prefix="keyring-") as folder:
        lab = Lab(Path(folder))
        for name, value in lab.environ.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("PYTHON_KEYRING_BACKEND", raising=False)
        try:
            yield lab
        finally:
            lab.stop()


@pytest.fixture
def lab(bare_lab: Lab) -> Lab:
    """Give a lab with an unlocked keyring."""
    bare_lab.start_bus()
    bare_lab.start_keyring()
    return bare_lab


@pytest.fixture
def prompter(lab: Lab) -> Iterator[Any]:
    """Take the prompter's name and never answer; gives the connection that asks arrive on."""
    with closing(secretstorage.dbus_init()) as connection:
        bus = secretstorage.util.DBusAddressWrapper(
            "/org/freedesktop/DBus", "org.freedesktop.DBus", connection
        )
        bus.bus_name = "org.freedesktop.DBus"
        bus.call("RequestName", "su", PROMPTER, 0)
        yield connection


def freeze(process: subprocess.Popen[bytes]) -> None:
    if sys.platform != "win32":
        process.send_signal(signal.SIGSTOP)


def thaw(process: subprocess.Popen[bytes]) -> None:
    if sys.platform != "win32":
        process.send_signal(signal.SIGCONT)


def end(process: subprocess.Popen[bytes]) -> None:
    thaw(process)
    with process:
        process.terminate()


def provider() -> keys.KeyProvider:
    return keys.provider_for("keyring", "secimg-watch/main")


def calls_that_arrived(connection: Any) -> list[str]:
    names: list[str] = []
    while True:
        try:
            message = connection.receive(timeout=0)
        except TimeoutError:
            return names
        if message.header.message_type.name == "method_call":
            names.append(str(message.header.fields))


def test_a_stored_key_is_found_by_the_provider_and_by_the_keyring_command(lab: Lab) -> None:
    kek = keys.generate()
    provider().store(kek)
    assert provider().load() == kek
    assert lab.python_keyring("get", "secimg-watch", "main").strip() == keys.encode(kek)


def test_a_key_that_the_keyring_command_stored_is_found(lab: Lab) -> None:
    kek = keys.generate()
    lab.python_keyring("set", "secimg-watch", "main", text=keys.encode(kek))
    assert provider().load() == kek


def test_storing_a_key_twice_is_no_error_and_makes_no_second_item(lab: Lab) -> None:
    kek = keys.generate()
    provider().store(kek)
    provider().store(kek)
    assert provider().load() == kek


def test_another_key_is_never_replaced(lab: Lab) -> None:
    kek = keys.generate()
    provider().store(kek)
    with pytest.raises(ConfigError, match="another key"):
        provider().store(keys.generate())
    assert provider().load() == kek


def items() -> int:
    """How many items of the key's name the keyring has."""
    wanted = {"service": "secimg-watch", "username": "main"}
    with closing(secretstorage.dbus_init()) as connection:
        return len(list(secretstorage.search_items(connection, wanted)))


def test_keys_are_replaced_within_the_only_item(lab: Lab) -> None:
    old, new = keys.generate(), keys.generate()
    provider().store(old)
    for ring in ((new, old), (new, old), (new,)):
        provider().replace(ring)
        assert provider().load_ring() == ring
        assert provider().load() == new
        assert items() == 1
        stored = lab.python_keyring("get", "secimg-watch", "main").strip()
        assert stored == keys.encode_ring(ring)
    lab.restart_keyring()
    assert provider().load_ring() == (new,)


def test_as_many_keys_as_are_allowed_fit_into_one_item(lab: Lab) -> None:
    ring = tuple(keys.generate() for _ in range(keys.MAX_RING))
    provider().store(ring[-1])
    provider().replace(ring)
    assert provider().load_ring() == ring


def test_what_is_not_there_is_not_replaced(lab: Lab) -> None:
    with pytest.raises(KeyMissingError):
        provider().replace((keys.generate(),))
    assert items() == 0


def test_in_a_locked_keyring_nothing_is_replaced_and_nobody_is_asked(
    lab: Lab, prompter: Any
) -> None:
    kek = keys.generate()
    provider().store(kek)
    lab.lock()
    with pytest.raises(KeyUnavailableError, match="is locked"):
        provider().replace((keys.generate(), kek))
    with pytest.raises(KeyUnavailableError, match="is locked"):
        secretservice.write_over("secimg-watch", "main", "a value")
    assert calls_that_arrived(prompter) == []
    lab.restart_keyring()
    assert provider().load_ring() == (kek,)


def test_of_two_items_of_one_name_none_is_replaced(lab: Lab) -> None:
    for _ in range(2):
        secretservice.write("secimg-watch", "main", keys.encode(keys.generate()))
    for attempt in (
        lambda: provider().replace((keys.generate(),)),
        lambda: secretservice.write_over("secimg-watch", "main", "a value"),
    ):
        with pytest.raises(ConfigError, match="2 items"):
            attempt()
    assert items() == 2


def test_a_missing_key_is_reported_with_the_collections_that_were_searched(lab: Lab) -> None:
    with pytest.raises(KeyMissingError, match="username=main in 'Login'") as caught:
        provider().load()
    assert "key init" in caught.value.hint


def test_two_items_of_one_name_are_ambiguous(lab: Lab) -> None:
    for _ in range(2):
        secretservice.write("secimg-watch", "main", keys.encode(keys.generate()))
    with pytest.raises(ConfigError, match="2 items"):
        provider().load()


def test_something_else_under_the_name_is_refused_and_not_repeated(lab: Lab) -> None:
    lab.python_keyring("set", "secimg-watch", "main", text="hunter2")
    with pytest.raises(ConfigError, match="not a key of this program") as caught:
        provider().load()
    assert "hunter2" not in str(caught.value) + caught.value.hint


def test_a_locked_keyring_is_unavailable_at_once_and_nobody_is_asked(
    lab: Lab, prompter: Any
) -> None:
    provider().store(keys.generate())
    lab.lock()
    started = time.monotonic()
    with pytest.raises(KeyUnavailableError, match="'Login' is locked; waiting, will not prompt"):
        provider().load()
    assert time.monotonic() - started < 2
    assert calls_that_arrived(prompter) == []


def test_no_key_in_a_locked_keyring_is_not_called_missing(lab: Lab) -> None:
    lab.lock()
    with pytest.raises(KeyUnavailableError, match="is locked"):
        provider().load()


def test_a_key_is_not_stored_in_a_locked_keyring_and_nobody_is_asked(
    lab: Lab, prompter: Any
) -> None:
    lab.lock()
    with pytest.raises(KeyUnavailableError, match="is locked"):
        secretservice.write("secimg-watch", "main", keys.encode(keys.generate()))
    assert calls_that_arrived(prompter) == []


def test_an_interactive_store_asks_and_gives_up_when_the_prompt_fails(lab: Lab) -> None:
    lab.lock()
    with pytest.raises(KeyUnavailableError):
        secretservice.write("secimg-watch", "main", "a value", interactive=True)


def test_the_same_provider_reads_the_key_once_the_keyring_is_unlocked(lab: Lab) -> None:
    kek = keys.generate()
    waiting = provider()
    waiting.store(kek)
    lab.lock()
    with pytest.raises(KeyUnavailableError):
        waiting.load()
    lab.restart_keyring()
    assert waiting.load() == kek


def test_a_bus_and_a_keyring_that_appear_late_are_found(bare_lab: Lab) -> None:
    early = provider()
    with pytest.raises(KeyUnavailableError, match="cannot be reached"):
        early.load()
    bare_lab.start_bus()
    with pytest.raises(KeyUnavailableError, match="no Secret Service"):
        early.load()
    bare_lab.start_keyring()
    with pytest.raises(KeyMissingError):
        early.load()


def test_an_unset_bus_address_is_unavailable(
    bare_lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DBUS_SESSION_BUS_ADDRESS")
    with pytest.raises(KeyUnavailableError, match="DBUS_SESSION_BUS_ADDRESS is unset") as caught:
        provider().load()
    assert "systemd" in caught.value.hint


def test_a_keyring_that_stops_answering_costs_the_time_limit_and_no_more(lab: Lab) -> None:
    kek = keys.generate()
    provider().store(kek)
    assert lab.keyring is not None
    freeze(lab.keyring)
    started = time.monotonic()
    for _ in range(2):
        with pytest.raises(KeyUnavailableError, match="does not answer"):
            secretservice.read("secimg-watch", "main", timeout=0.3)
    assert time.monotonic() - started < 2
    thaw(lab.keyring)
    assert provider().load() == kek


def test_a_bus_that_stops_answering_is_unavailable(lab: Lab) -> None:
    assert lab.bus is not None
    freeze(lab.bus)
    with pytest.raises(KeyUnavailableError, match="does not answer"):
        secretservice.read("secimg-watch", "main", timeout=0.3)
    thaw(lab.bus)
    with pytest.raises(KeyMissingError):
        provider().load()


def test_the_helper_process_stores_and_reads_through_a_backend_of_the_keyring_package(
    lab: Lab,
) -> None:
    assert keys._ask_helper(keys.LINUX_BACKEND, ("secimg-watch", "main")) is None
    keys._ask_helper(keys.LINUX_BACKEND, ("secimg-watch", "main", "value"))
    assert keys._ask_helper(keys.LINUX_BACKEND, ("secimg-watch", "main")) == "value"
    keys._ask_helper(keys.LINUX_BACKEND, ("secimg-watch", "main", "another"))
    assert keys._ask_helper(keys.LINUX_BACKEND, ("secimg-watch", "main")) == "another"
    assert items() == 1


def test_the_helper_process_is_killed_when_its_prompt_is_not_answered(
    lab: Lab, prompter: Any
) -> None:
    provider().store(keys.generate())
    lab.lock()
    with pytest.raises(KeyUnavailableError, match="does not answer"):
        keys._ask_helper(keys.LINUX_BACKEND, ("secimg-watch", "main"), timeout=1.5)
    assert calls_that_arrived(prompter), "the backend never came as far as its prompt"
