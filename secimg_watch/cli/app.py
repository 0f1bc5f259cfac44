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
from secimg_watch.service import key_provider, open_vaults

if TYPE_CHECKING:
    from collections.abc import Callable

    from secimg_watch.records import KeyEncryptionKey

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
        raise NoInputError(
            f"there is no policy: looked for {' and '.join(map(str, places))}",
            hint="name one with --policy, or make one with: secimg-watch init",
        )

    def key(self, policy: Policy) -> KeyEncryptionKey:
        """The key that the policy names."""
        return key_provider(policy).load()

    def catalogs(self, policy: Policy, name: str | None) -> dict[str, Catalog]:
        """The vaults of the policy, or the one of that name, opened for reading."""
        vaults = open_vaults(policy)
        if name is not None:
            if name not in vaults:
                raise UsageError(f"the policy has no vault {name}: {', '.join(vaults)}")
            vaults = {name: vaults[name]}
        key = self.key(policy)
        return {each: Catalog(vault, key) for each, vault in vaults.items()}


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
        except KeyboardInterrupt:
            sys.exit(_SIGINT_EXIT)
        except BrokenPipeError:
            # Whoever read our output has seen enough; the interpreter must not try to flush.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except OSError as error:
            if verbose >= _VERBOSE:
                traceback.print_exc()
            refused = NotAllowedError if isinstance(error, PermissionError) else StorageError
            fault = refused(f"the system failed: {str(error.strerror).lower()}: {error.filename}")
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
