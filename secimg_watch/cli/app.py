"""What every command shares: the global options, finding the policy, and the way out."""

from __future__ import annotations

import functools
import logging
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, ParamSpec, TypeVar

import click

from secimg_watch.audit import Audit, Event
from secimg_watch.catalog import Catalog
from secimg_watch.cli import terminal
from secimg_watch.errors import (
    NoInputError,
    NotAllowedError,
    SecimgError,
    StorageError,
    UsageError,
)
from secimg_watch.names import display
from secimg_watch.policy import Policy, load_policy
from secimg_watch.quantities import Reserve
from secimg_watch.recipients import (
    IDENTITY_FILE_LIMIT,
    IDENTITY_PREFIX,
    RECIPIENT_PREFIX,
    parse_identity,
    parse_identity_file,
    parse_recipient,
)
from secimg_watch.records import KeySet
from secimg_watch.service import key_provider, open_vaults
from secimg_watch.vault import Vault

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from secimg_watch.records import KeyEncryptionKey, PrivateKey, Recipient
    from secimg_watch.slots import Opener

PATH = click.Path(path_type=Path, readable=False)
"""A path as an option or argument. Whether it can be read is found out by reading it: click's
own check would call that wrong usage."""

P = ParamSpec("P")
R = TypeVar("R")

_VERBOSE = 2  # -vv: show where an error was raised
_SIGINT_EXIT = 130


@dataclass(slots=True)
class App:
    """The global options."""

    policy_path: Path | None = None
    json: bool = False
    verbose: int = 0
    identity: Path | None = None

    def policy(self) -> Policy:
        """Load the policy that is named, or the first one that is there.

        Raises:
            NoInputError: there is none.
            PolicyError: it cannot be used.
        """
        return load_policy(self.find_policy())

    def find_policy(self) -> Path:
        """The path of the policy in force."""
        if self.policy_path is not None:
            return self.policy_path
        named = os.environ.get("SECIMG_WATCH_POLICY")
        if named:
            return Path(named)
        places = [user_policy(), Path("/etc/secimg-watch/policy.yaml")]
        for place in places:
            if place.exists():
                return place
        hint = "name one with --policy, or make one with: secimg-watch init"
        if self.identity is not None:
            hint = "without one, name the vault by a path with a slash in it: --vault ./vault"
        raise NoInputError(
            f"there is no policy: looked for {' and '.join(map(str, places))}", hint=hint
        )

    def ring(self, policy: Policy) -> tuple[KeyEncryptionKey, ...]:
        """The keys that the policy names, the current one first.

        Raises:
            KeyMissingError: there is none, also where the policy has none.
        """
        provider = key_provider(policy)
        return provider.load_ring() or (provider.load(),)

    def identities(self) -> tuple[PrivateKey, ...]:
        """The private keys of ``--identity``; none where it was not given.

        Raises:
            NoInputError, NotAllowedError: the file cannot be read.
            UsageError: there is no private key in it.
        """
        if self.identity is None:
            return ()
        if str(self.identity) != "-":
            return read_identities(self.identity)
        if not sys.stdin.isatty():  # another program hands it over
            text = sys.stdin.buffer.read(IDENTITY_FILE_LIMIT + 1)
            return _parsed_identities(text, "standard input")
        typed: str = click.prompt("Private key", hide_input=True, err=True)
        return (parse_identity(typed),)

    def vaults(self, policy: Policy, name: str | None) -> dict[str, Vault]:
        """The vaults of the policy, or the one of that name."""
        vaults = open_vaults(policy)
        if name is None:
            return vaults
        if name not in vaults:
            raise UsageError(f"the policy has no vault {name}: {', '.join(vaults)}")
        return {name: vaults[name]}

    def catalogs(self, name: str | None) -> dict[str, Catalog]:
        """The vaults of the policy, or the one of that name, opened for reading.

        With ``--identity`` a vault may be named by its path, and then no policy is needed.
        """
        openers: Sequence[Opener] = self.identities()
        if name is not None and names_path(name):
            if not openers:
                raise UsageError(
                    "a vault that is named by its path is opened with a private key",
                    hint="give --identity FILE",
                )
            return {name: Catalog(Vault(Path(name), Reserve(0.0, 0)), openers)}
        policy = self.policy()
        vaults = self.vaults(policy, name)
        openers = openers or self.ring(policy)
        return {each: Catalog(vault, openers) for each, vault in vaults.items()}


def put_on_record(policy: Policy, ring: Sequence[KeyEncryptionKey], event: Event) -> None:
    """Write into the audit log what a command did to keys.

    Raises:
        NotReadyError: it could not be written; what was done is done.
    """
    audit = Audit(policy.state, KeySet(tuple(ring), policy.recipients))
    try:
        audit.append([event], durable=True)
    finally:
        audit.close()


def read_identities(path: Path) -> tuple[PrivateKey, ...]:
    """Read a file of private keys.

    Raises:
        NoInputError, NotAllowedError: it cannot be read.
        UsageError: there is no private key in it.
    """
    refuse_private(str(path))
    try:
        with open(path, "rb") as file:
            text = file.read(IDENTITY_FILE_LIMIT + 1)
    except PermissionError:
        raise NotAllowedError(f"{path} cannot be read: permission denied") from None
    except OSError as error:
        raise NoInputError(f"{path} cannot be read: {error.strerror}") from error
    return _parsed_identities(text, str(path))


def _parsed_identities(text: bytes, source: str) -> tuple[PrivateKey, ...]:
    if len(text) > IDENTITY_FILE_LIMIT or not text.isascii():
        raise UsageError(f"{source} is not a file of private keys")
    try:
        return parse_identity_file(text.decode("ascii"))
    except UsageError as error:
        raise UsageError(f"{source}: {error}", hint=error.hint) from error


def refuse_private(argument: str) -> None:
    """Refuse a private key where a file or a public key belongs.

    Raises:
        UsageError: it is one; it is not repeated in the message, which may end in a log.
    """
    if argument.strip().upper().startswith(IDENTITY_PREFIX):
        raise UsageError(
            "a private key does not belong on a command line, where others can see it",
            hint="put it into a file and name that",
        )


def read_recipient(text: str) -> Recipient:
    """Read a public key, or the first one in a file.

    Raises:
        NoInputError: it is neither.
        UsageError: it is damaged, or a private key.
    """
    refuse_private(text)
    if not text.startswith(RECIPIENT_PREFIX):
        try:
            lines = Path(text).read_text("ascii").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise NoInputError(f"{text} is neither a public key nor a file with one") from error
        # In an identity file the public key is a comment.
        lines = [line.removeprefix("# ") for line in lines]
        text = next((line for line in lines if line.startswith(RECIPIENT_PREFIX)), "")
    return parse_recipient(text)


def names_path(name: str) -> bool:
    """Whether ``--vault`` was given a path; the names in a policy have no slash."""
    return os.sep in name


def user_policy() -> Path:
    """Where a person's own policy lies."""
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(home) / "secimg-watch" / "policy.yaml"


pass_app = click.make_pass_decorator(App)


def with_json(command: Callable[P, R]) -> Callable[P, R]:
    """Let ``--json`` stand behind the command as well as before it."""

    def remember(context: click.Context, _option: click.Parameter, value: bool) -> None:  # noqa: FBT001 - click's signature
        if value:
            context.find_object(App).json = True  # type: ignore[union-attr]  # made by the group

    option = click.option(
        "--json", is_flag=True, expose_value=False, callback=remember, help="Print JSON."
    )
    return option(command)


def with_identity(command: Callable[P, R]) -> Callable[P, R]:
    """Let a command open objects with a recipient's private key."""

    def remember(context: click.Context, _option: click.Parameter, value: Path | None) -> None:
        context.find_object(App).identity = value  # type: ignore[union-attr]  # made by the group

    option = click.option(
        "--identity",
        type=PATH,
        metavar="FILE",
        expose_value=False,
        callback=remember,
        help="Open with the private key in FILE, e.g. the recovery key; - asks for it.",
    )
    return option(command)


def guarded(command: Callable[P, int | None]) -> Callable[P, NoReturn]:
    """Turn a command's errors into messages, and its result into the exit code."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> NoReturn:
        verbose = click.get_current_context().find_object(App).verbose  # type: ignore[union-attr]
        try:
            sys.exit(command(*args, **kwargs) or 0)
        except SecimgError as error:
            if verbose >= _VERBOSE:
                traceback.print_exc()
            terminal.complain(error)
            sys.exit(error.exit_code)
        except (KeyboardInterrupt, click.Abort):
            sys.exit(_SIGINT_EXIT)
        except BrokenPipeError:
            # Whoever read our output has seen enough; the interpreter must not try to flush.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except OSError as error:
            if verbose >= _VERBOSE:
                traceback.print_exc()
            refused = NotAllowedError if isinstance(error, PermissionError) else StorageError
            where = "" if error.filename is None else f": {error.filename}"
            fault = refused(f"the system failed: {str(error.strerror).lower()}{where}")
            terminal.complain(fault)
            sys.exit(fault.exit_code)
        except Exception as error:
            if verbose >= _VERBOSE:
                raise
            defect = SecimgError(
                f"a defect: {type(error).__name__}", hint="run it again with -vv to see where"
            )
            terminal.complain(defect)
            sys.exit(defect.exit_code)

    return run


_SYSLOG = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}


class _Lines(logging.Formatter):
    """One line an event: with a level prefix for the journal, with the time elsewhere."""

    def format(self, record: logging.LogRecord) -> str:
        text = display(record.getMessage())
        if "JOURNAL_STREAM" in os.environ:
            return f"<{_SYSLOG.get(record.levelno, 2)}>{text}"
        return f"{self.formatTime(record, '%H:%M:%S')} {record.levelname.lower()}: {text}"


def start_log(verbose: int, *, level: int = logging.INFO) -> None:
    """Send the package's log to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines())
    wanted = logging.DEBUG if verbose else level
    for name, threshold in (("secimg_watch", wanted), ("watchdog", logging.WARNING)):
        package = logging.getLogger(name)
        package.handlers[:] = [handler]
        package.setLevel(threshold)
        package.propagate = False
