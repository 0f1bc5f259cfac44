"""Where the key-encryption key comes from: keyring, systemd credential, command or file.

The only module that imports ``keyring``. That package's automatic choice of a backend is never
used, because it can settle on a file in clear, run code that a configuration file names, or
wait for ever on a prompt. A backend is loaded by its name, and only if it is on the list here.

A provider is chosen by configuration or by where the process runs, never because another one
failed. Whatever the provider, the stored value is one ASCII line, ``secimg1:KEY-ID:KEY``: the
key id in 32 lower-case hexadecimal digits, the key in 44 characters of base64. After a rotation
it is followed by the former keys, each behind a space: one value, so that the change from one key
to the next happens at once or not at all.
"""

from __future__ import annotations

import base64
import configparser
import contextlib
import importlib.metadata
import multiprocessing
import os
import re
import secrets
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import keyring.core
from keyring.backend import KeyringBackend
from keyring.errors import KeyringError, PasswordSetError
from keyring.util import platform_

from secimg_watch import kernel
from secimg_watch.errors import (
    CannotCreateError,
    ConfigError,
    InsecureKeyError,
    KeyMissingError,
    KeyUnavailableError,
)
from secimg_watch.records import KeyEncryptionKey
from secimg_watch.secretline import (
    INIT_HINT,
    first_line,
    read_private,
    without_line_end,
    write_private,
)

if sys.platform == "linux":
    from secimg_watch import secretservice

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from multiprocessing.connection import Connection

ProviderName = Literal["auto", "keyring", "credential", "command", "file", "none"]

HELPER_TIMEOUT = 15.0
"""Seconds that a keyring's helper process, or a command, gets before it is killed."""

LINUX_BACKEND = "keyring.backends.SecretService.Keyring"
BACKENDS = frozenset(
    {
        LINUX_BACKEND,
        "keyring.backends.kwallet.DBusKeyring",
        "keyring.backends.kwallet.DBusKeyringKWallet4",
        "keyring.backends.libsecret.Keyring",
        "keyring.backends.macOS.Keyring",
        "keyring.backends.Windows.WinVaultKeyring",
    }
)
"""The operating systems' own keyrings: every other backend is refused."""

_SYSTEM_BACKENDS = {
    "darwin": "keyring.backends.macOS.Keyring",
    "win32": "keyring.backends.Windows.WinVaultKeyring",
}

_ID_SIZE = 16
_KEY_SIZE = 32
_LINE = re.compile(r"secimg1:([0-9a-f]{32}):([A-Za-z0-9+/]{43}=)")
MAX_RING = 8
"""Most keys that are stored under one name, the current one included."""

# Both parts become part of a credential's file name.
_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,99})/([A-Za-z0-9][A-Za-z0-9._-]{0,99})")


class KeyProvider(Protocol):
    """One place that a key-encryption key is kept in."""

    @property
    def description(self) -> str:
        """Name the place, for people; never a secret."""

    @property
    def warning(self) -> str:
        """Say what should be known about the place, or nothing."""

    def load(self) -> KeyEncryptionKey:
        """Read the current key, as ``load_ring``."""

    def load_ring(self) -> tuple[KeyEncryptionKey, ...]:
        """Read the current key, and behind it former ones, afresh at every call.

        Raises:
            KeyUnavailableError: locked, silent or not running; the same call works later.
            KeyMissingError: the place answers, and holds no key of that name.
            InsecureKeyError: others can read the place.
            ConfigError: it holds something else, or more than one.
        """

    def store(self, kek: KeyEncryptionKey) -> None:
        """Keep the key, and read it back. Storing the same key again does nothing.

        Raises:
            ConfigError: another key is there already, the place cannot be written by this
                program, or it gave something else back.
            KeyUnavailableError, InsecureKeyError: as for ``load``.
        """

    def replace(self, ring: Sequence[KeyEncryptionKey]) -> None:
        """Keep these keys instead of those that are there, and read them back.

        Raises:
            ConfigError: the place cannot be written by this program, or it gave something
                else back.
            KeyMissingError: there is nothing to replace.
            KeyUnavailableError, InsecureKeyError: as for ``load``.
        """


class _Provider:
    """What every provider has in common."""

    __slots__ = ()

    def load(self: KeyProvider) -> KeyEncryptionKey:
        """Read the current key, as `KeyProvider.load`."""
        return self.load_ring()[0]


def generate() -> KeyEncryptionKey:
    """Make a key of 256 random bits, and a random id of 128."""
    return KeyEncryptionKey(secrets.token_bytes(_ID_SIZE), secrets.token_bytes(_KEY_SIZE))


def encode(kek: KeyEncryptionKey) -> str:
    """Write a key as the line that is stored: 85 ASCII characters, no line break."""
    return f"secimg1:{kek.key_id.hex()}:{base64.b64encode(kek.key).decode('ascii')}"


def decode(line: str, *, source: str = "the text") -> KeyEncryptionKey:
    """Read the line that `encode` writes, and nothing else.

    Raises:
        ConfigError: it is not exactly such a line. ``source`` names it; it is not repeated.
    """
    match = _LINE.fullmatch(line)
    if match is not None:
        kek = KeyEncryptionKey(bytes.fromhex(match[1]), base64.b64decode(match[2]))
        # The last digit of the base64 carries two bits of nothing; they have to be zero.
        if encode(kek) == line:
            return kek
    raise ConfigError(
        f"{source} holds something that is not a key of this program",
        hint="it must be one line that begins with secimg1:",
    )


def encode_ring(ring: Sequence[KeyEncryptionKey]) -> str:
    """Write keys, the current one first, as the line that is stored.

    Raises:
        ConfigError: there are more than can be kept.
    """
    if len(ring) > MAX_RING:
        raise ConfigError(
            f"more than {MAX_RING} keys cannot be kept under one name",
            hint="retire former ones: secimg-watch vault rekey, then secimg-watch key retire",
        )
    return " ".join(map(encode, ring))


def decode_ring(line: str, *, source: str = "the text") -> tuple[KeyEncryptionKey, ...]:
    """Read the line that `encode_ring` writes, and nothing else.

    Raises:
        ConfigError: it is not exactly such a line. ``source`` names it; it is not repeated.
    """
    ring = tuple(decode(word, source=source) for word in line.split(" "))
    if len(ring) > MAX_RING or len({kek.key_id for kek in ring}) != len(ring):
        raise ConfigError(f"{source} holds too many keys, or one of them twice")
    return ring


def provider_for(
    provider: ProviderName,
    name: str,
    *,
    file: Path | None = None,
    command: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
    interactive: bool = False,
) -> KeyProvider:
    """Choose where the key ``name`` (``SERVICE/USERNAME``) is kept.

    ``auto`` is the systemd credential where ``$CREDENTIALS_DIRECTORY`` is set, and else the
    keyring. ``environ`` decides, and is passed to ``command``; the session bus is found by the
    process's own environment. Only with ``interactive`` may ``store`` show a prompt.

    Raises:
        ConfigError: the name, the file or the command is not usable.
        InsecureKeyError: the keyring package is configured to a backend that is refused.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ConfigError(
            f"{name!r} cannot name a key",
            hint="write SERVICE/USERNAME, with letters, digits, '.', '_' and '-'",
        )
    service, username = match[1], match[2]
    directory = environ.get("CREDENTIALS_DIRECTORY", "")
    if provider == "credential" or (provider == "auto" and directory):
        return Credential(service, username, directory)
    if provider == "command":
        if not command:
            raise ConfigError("the key comes from a command, but none is given")
        return Command(tuple(command), environ)
    if provider == "none":
        return NoKey()
    if provider == "file":
        if file is None:
            raise ConfigError("the key comes from a file, but none is given")
        return File(file)
    return Keyring(service, username, _backend(environ), interactive=interactive)


@dataclass(frozen=True, slots=True)
class Keyring(_Provider):
    """The operating system's keyring, by the backend of that name.

    The Secret Service is read without prompting, within 10 s. Other backends run in a helper
    process that is killed after 15 s; whether they prompt is theirs to decide.
    """

    service: str
    username: str
    backend: str
    interactive: bool = False

    @property
    def description(self) -> str:
        """Backend and item."""
        return f"keyring ({self.backend.split('.')[2]}), item {self.service}/{self.username}"

    @property
    def warning(self) -> str:
        """Say what is installed and not used, and who may prompt."""
        if ".kwallet." in self.backend:
            return "KWallet may ask for its password when the key is read"
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.distribution("keyrings.alt")
            return "keyrings.alt is installed; it can keep secrets in clear, and is not used"
        return ""

    def load_ring(self) -> tuple[KeyEncryptionKey, ...]:
        """Read the item, as `KeyProvider.load_ring`."""
        if sys.platform == "linux" and self.backend == LINUX_BACKEND:
            line: str | None = secretservice.read(self.service, self.username)
        else:
            line = _ask_helper(self.backend, (self.service, self.username))
        if line is None:
            raise KeyMissingError(f"{self.description} does not exist", hint=INIT_HINT)
        return decode_ring(line, source=self.description)

    def store(self, kek: KeyEncryptionKey) -> None:
        """Create the item, as `KeyProvider.store`."""
        _store(self, kek, self._write)

    def _write(self, line: str) -> None:
        if sys.platform == "linux" and self.backend == LINUX_BACKEND:
            secretservice.write(self.service, self.username, line, interactive=self.interactive)
        else:
            _ask_helper(self.backend, (self.service, self.username, line))

    def replace(self, ring: Sequence[KeyEncryptionKey]) -> None:
        """Change the item, as `KeyProvider.replace`.

        Raises:
            ConfigError: the keyring is that of macOS, whose backend deletes an item before it
                adds the new one: a failure between the two would lose every key.
        """
        if self.backend == _SYSTEM_BACKENDS["darwin"]:
            raise ConfigError(
                f"{self.description} cannot be changed at once or not at all",
                hint="lay its line into a file, and name that in a temporary policy: provider file",
            )
        _replace(self, ring, self._write_over)

    def _write_over(self, line: str) -> None:
        if sys.platform == "linux" and self.backend == LINUX_BACKEND:
            secretservice.write_over(self.service, self.username, line)
        else:
            _ask_helper(self.backend, (self.service, self.username, line))


class CredentialBackend(KeyringBackend):
    """systemd's credentials as a keyring backend: item SERVICE, USERNAME is SERVICE.USERNAME."""

    # Below the package's own "fail" backend, so that no automatic choice ever takes it.
    priority = -1

    def __init__(self, directory: str | None = None) -> None:
        """Take ``$CREDENTIALS_DIRECTORY``, unless a directory is given."""
        # Without the base class's part, which lets the environment set any attribute.
        self._directory = (
            os.environ.get("CREDENTIALS_DIRECTORY", "") if directory is None else directory
        )

    def get_password(self, service: str, username: str) -> str | None:
        """Read the credential's only line; None where there is no such credential.

        Raises:
            InsecureKeyError: it is a link, or others can read it.
            ConfigError: it cannot be read.
        """
        name = f"{service}.{username}"
        if not self._directory or "/" in name:
            return None
        try:
            return read_private(Path(self._directory, name), acl=True)
        except KeyMissingError:
            return None

    def set_password(self, service: str, username: str, password: str) -> None:
        """Refuse: credentials are written by systemd alone."""
        del service, username, password
        raise PasswordSetError("systemd credentials cannot be written by the service")


@dataclass(frozen=True, slots=True)
class Credential(_Provider):
    """A credential that systemd hands to the service; ``directory`` is empty without one."""

    service: str
    username: str
    directory: str

    @property
    def description(self) -> str:
        """Name the credential."""
        return f"systemd credential {self.service}.{self.username}"

    @property
    def warning(self) -> str:
        """Nothing."""
        return ""

    def load_ring(self) -> tuple[KeyEncryptionKey, ...]:
        """Read the credential, as `KeyProvider.load_ring`. Only a restart brings a new value."""
        line = CredentialBackend(self.directory).get_password(self.service, self.username)
        if line is not None:
            return decode_ring(line, source=self.description)
        if not self.directory:
            raise KeyMissingError(
                f"there is no {self.description}: $CREDENTIALS_DIRECTORY is not set",
                hint="give the unit LoadCredentialEncrypted=, or choose another key.provider",
            )
        raise KeyMissingError(
            f"$CREDENTIALS_DIRECTORY has no {self.service}.{self.username}",
            hint="give LoadCredentialEncrypted= an absolute path; "
            "in a container /run must be a shared mount",
        )

    def store(self, kek: KeyEncryptionKey) -> None:
        """Refuse, unless the credential is that key already."""
        _store(self, kek, self._refusal())

    def replace(self, ring: Sequence[KeyEncryptionKey]) -> None:
        """Refuse, unless the credential holds these keys already."""
        _replace(self, ring, self._refusal())

    def _refusal(self) -> Callable[[str], None]:
        return _unwritable("systemd writes credentials", "systemd-creds encrypt")


@dataclass(frozen=True, slots=True)
class Command(_Provider):
    """A program that prints the key's line first. It runs without a shell and without input.

    What else it prints is discarded, standard error too: it might repeat a secret. It gets 15 s.
    """

    argv: tuple[str, ...] = field(repr=False)
    environ: Mapping[str, str] = field(repr=False)
    timeout: float = HELPER_TIMEOUT

    @property
    def description(self) -> str:
        """Name the program, without its arguments."""
        return f"command {self.argv[0]}"

    @property
    def warning(self) -> str:
        """Nothing."""
        return ""

    def load_ring(self) -> tuple[KeyEncryptionKey, ...]:
        """Run the command, as `KeyProvider.load_ring`.

        A failing command counts as unavailable, one that prints nothing as a missing key.
        """
        try:
            status, line = first_line(self.argv, self.environ, self.timeout)
        except OSError as error:
            raise ConfigError(f"{self.description} cannot be run: {error.strerror}") from error
        if status is None:
            raise KeyUnavailableError(f"{self.description} took longer than {self.timeout:g} s")
        if status != 0:
            raise KeyUnavailableError(
                f"{self.description} failed with status {status}",
                hint="run it by hand to see its message",
            )
        if not line:
            raise KeyMissingError(f"{self.description} printed nothing", hint=INIT_HINT)
        return decode_ring(without_line_end(line), source=self.description)

    def store(self, kek: KeyEncryptionKey) -> None:
        """Refuse, unless the command prints that key already."""
        _store(self, kek, self._refusal())

    def replace(self, ring: Sequence[KeyEncryptionKey]) -> None:
        """Refuse, unless the command prints these keys already."""
        _replace(self, ring, self._refusal())

    def _refusal(self) -> Callable[[str], None]:
        return _unwritable("the key comes from a command", "store it where that reads")


@dataclass(frozen=True, slots=True)
class File(_Provider):
    """A file with the key in clear, readable by its owner alone, who is this user or root."""

    path: Path

    @property
    def description(self) -> str:
        """Name the file."""
        return f"key file {self.path}"

    @property
    def warning(self) -> str:
        """Say what such a file is worth."""
        return f"whoever reads {self.path}, or a backup of it, can open the vault"

    def load_ring(self) -> tuple[KeyEncryptionKey, ...]:
        """Read the file, as `KeyProvider.load_ring`."""
        ring = decode_ring(read_private(self.path, acl=False), source=self.description)
        # Whoever wrote it may have died before its name was durable, and now it seals.
        with contextlib.suppress(OSError):
            kernel.sync_path(self.path.parent)
        return ring

    def store(self, kek: KeyEncryptionKey) -> None:
        """Create the file with mode 0400, whole or not at all, as `KeyProvider.store`.

        Raises:
            CannotCreateError: its directory is missing or cannot be written.
        """
        _store(self, kek, self._write)

    def replace(self, ring: Sequence[KeyEncryptionKey]) -> None:
        """Change the file at once or not at all, as `KeyProvider.replace`.

        Raises:
            CannotCreateError: its directory cannot be written.
        """
        self._remove_left()
        _replace(self, ring, lambda line: self._write(line, os.replace))

    def _remove_left(self) -> None:
        # A process that died left keys there, which may be retired since. Only one at a time
        # replaces them, and none stores where there are some.
        with contextlib.suppress(OSError):
            for name in os.listdir(self.path.parent):
                if name.startswith(f".{self.path.name}.") and name.endswith(".part"):
                    os.unlink(self.path.with_name(name))

    def _write(self, line: str, publish: Callable[[Path, Path], None] = os.link) -> None:
        # A link never replaces: of two keys stored at once, the first stays.
        temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(16)}.part")
        try:
            try:
                write_private(temporary, line, like=self.path)
                publish(temporary, self.path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
            kernel.sync_path(self.path.parent)
        except OSError as error:
            raise CannotCreateError(
                f"cannot create {self.description}: {error.strerror}"
            ) from error


@dataclass(frozen=True, slots=True)
class NoKey(_Provider):
    """A write-only vault's: nothing here opens what was sealed to the recipients."""

    @property
    def description(self) -> str:
        """Say what that means."""
        return "none (write-only: only the recipients can open the vault)"

    @property
    def warning(self) -> str:
        """Nothing."""
        return ""

    def load_ring(self) -> tuple[KeyEncryptionKey, ...]:
        """Give no key."""
        return ()

    def load(self) -> KeyEncryptionKey:
        """Refuse.

        Raises:
            KeyMissingError: always.
        """
        raise KeyMissingError(
            "this policy has no key: the vault is write-only here",
            hint="open it with a recipient's private key: --identity FILE",
        )

    def store(self, kek: KeyEncryptionKey) -> None:
        """Refuse."""
        _store(self, kek, self._refusal())

    def replace(self, ring: Sequence[KeyEncryptionKey]) -> None:
        """Refuse."""
        del ring
        self._refusal()("")

    def _refusal(self) -> Callable[[str], None]:
        return _unwritable("the policy says 'provider: none'", "choose another key.provider")


def _store(provider: KeyProvider, kek: KeyEncryptionKey, write: Callable[[str], None]) -> None:
    """Write unless something is there, and believe only what is read back."""
    try:
        present = provider.load()
    except KeyMissingError:
        write(encode(kek))
        # Some stores accept everything and keep nothing.
        if provider.load() != kek:
            raise ConfigError(f"{provider.description} did not keep the key it was given") from None
        return
    if present != kek:
        raise ConfigError(
            f"{provider.description} holds another key already; nothing was changed",
            hint="choose another key.name; the key that is there may be the only one of a vault",
        )


def _replace(
    provider: KeyProvider, ring: Sequence[KeyEncryptionKey], write: Callable[[str], None]
) -> None:
    """Write over what is there, which has to be keys, and believe only what is read back."""
    wanted = tuple(ring)
    if provider.load_ring() == wanted:
        return
    write(encode_ring(wanted))
    if provider.load_ring() != wanted:
        raise ConfigError(f"{provider.description} did not keep the keys it was given")


def _unwritable(reason: str, remedy: str) -> Callable[[str], None]:
    def refuse(_line: str) -> None:
        raise ConfigError(f"this program cannot store the key: {reason}", hint=remedy)

    return refuse


# The keyring package: its configuration, and its backends in a helper process.


def _backend(environ: Mapping[str, str]) -> str:
    """Name the backend: one that the keyring package is configured to, or the system's own."""
    name, place = environ.get("PYTHON_KEYRING_BACKEND", ""), "$PYTHON_KEYRING_BACKEND"
    if not name:
        name, place = _configured_backend()
    if not name:
        return _SYSTEM_BACKENDS.get(sys.platform, LINUX_BACKEND)
    if name not in BACKENDS:
        raise InsecureKeyError(
            f"refused keyring backend {name!r}, which {place} names: "
            "it is not one of the operating systems' keyrings",
            hint=f"take it out of {place}, or choose another key.provider",
        )
    return name


def _configured_backend() -> tuple[str, str]:
    """Read the keyring package's own configuration file, and nothing but the name in it."""
    try:
        path = platform_.config_root() / "keyringrc.cfg"
    except RuntimeError:  # a user without a home directory has no configuration either
        return "", ""
    settings = configparser.RawConfigParser()
    try:
        settings.read(path, encoding="utf-8")
    except (configparser.Error, OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the keyring configuration {path} cannot be read", hint="correct or remove it"
        ) from error
    return settings.get("backend", "default-keyring", fallback="").strip(), str(path)


def _ask_helper(
    backend: str, request: tuple[str, ...], timeout: float = HELPER_TIMEOUT
) -> str | None:
    """Get (service, username) or set (service, username, value) in a process of its own.

    A backend may hang, prompt or crash; the process can be killed, a thread could not.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    helper = context.Process(target=_help, args=(theirs,), daemon=True)
    with ours:
        with theirs:
            helper.start()
        try:
            ours.send((backend, request))
            if not ours.poll(timeout):
                raise KeyUnavailableError(
                    f"keyring backend {backend} does not answer; waiting",
                    hint="look for an unanswered password prompt",
                )
            failure, value = ours.recv()
        except (EOFError, ConnectionError) as error:
            raise KeyUnavailableError(f"keyring backend {backend} crashed") from error
        finally:
            helper.kill()
            helper.join()
            helper.close()
    if failure:
        raise KeyUnavailableError(f"keyring backend {backend} failed: {failure}")
    answer: str | None = value
    return answer


def _help(pipe: Connection) -> None:
    """Answer one request: a failure or an empty string, and the value."""
    backend, (service, username, *value) = pipe.recv()
    try:
        store = keyring.core.load_keyring(backend)
    except (RuntimeError, ImportError, OSError) as error:
        pipe.send((str(error) or type(error).__name__, None))
        return
    try:
        if value:
            store.set_password(service, username, *value)
            pipe.send(("", None))
        else:
            pipe.send(("", store.get_password(service, username)))
    except (KeyringError, RuntimeError, OSError) as error:
        # The type alone: a message may repeat what was to be stored.
        pipe.send((type(error).__name__, None))
