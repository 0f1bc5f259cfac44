"""The Secret Service of a Linux desktop, read without ever asking anybody anything.

The only module that imports ``secretstorage``, which is there on Linux alone. Every call runs
in a worker thread under a time limit, because D-Bus calls made through ``secretstorage`` have
no reply timeout, and because an unlock prompt that nobody answers blocks its caller for good.
Nothing is cached between calls, so that a session bus or a keyring that appears after the
start is found by the next call.

Items carry the attributes that the ``keyring`` package gives its own, so that
``keyring get SERVICE USERNAME`` finds them.
"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import secretstorage

from secimg_watch.errors import ConfigError, KeyMissingError, KeyUnavailableError, SecimgError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

TIMEOUT = 10.0
"""Seconds that a call may take. A read takes 20 ms, and 130 ms when it starts the service."""

PROMPT_TIMEOUT = 120.0
"""Seconds that a person gets to answer an unlock prompt that was asked for."""

APPLICATION = "Python keyring library"
"""Value of the ``application`` attribute, as the ``keyring`` package sets it."""

_in_hand = threading.Lock()  # one worker at a time: a mute bus cannot pile up threads


def read(service: str, username: str, *, timeout: float = TIMEOUT) -> str:
    """Read the one item of that service and user name, never prompting, within ``timeout`` seconds.

    Raises:
        KeyUnavailableError: no bus, no service, a locked collection, or no answer in time.
        KeyMissingError: there is no such item, and no collection is locked.
        ConfigError: several items match.
    """
    return _within(timeout, lambda connection: _read(connection, service, username))


def write(
    service: str, username: str, value: str, *, interactive: bool = False, timeout: float = TIMEOUT
) -> None:
    """Add an item to the default collection. An item of that name is not looked for.

    Only with ``interactive`` may the desktop show a prompt, to unlock or create the
    collection; ``timeout`` is then 120 s.

    Raises:
        KeyUnavailableError: no bus, no service, no unlocked default collection, the prompt was
            dismissed, or no answer in time.
    """
    limit = PROMPT_TIMEOUT if interactive else timeout

    def work(connection: Any) -> None:
        collection = _default_collection(connection, interactive=interactive)
        attributes = {"service": service, "username": username, "application": APPLICATION}
        label = f"Key {username} of {service}"
        # Not replacing: of two keys written at once both stay, and the reader says so.
        collection.create_item(label, attributes, value.encode("ascii"), replace=False)

    _within(limit, work)


def write_over(service: str, username: str, value: str, *, timeout: float = TIMEOUT) -> None:
    """Give the only item of that name another value, in one call.

    Raises:
        KeyMissingError: there is none.
        KeyUnavailableError, ConfigError: as for ``read``.
    """

    def work(connection: Any) -> None:
        _only_item(connection, service, username).set_secret(value.encode("ascii"))

    _within(timeout, work)


def _require_service(connection: Any) -> None:
    if not secretstorage.check_service_availability(connection):
        raise KeyUnavailableError(
            "no Secret Service runs or can be started on the session bus",
            hint="install and start a keyring, such as gnome-keyring",
        )


def _read(connection: Any, service: str, username: str) -> str:
    item = _only_item(connection, service, username)
    secret: bytes = item.get_secret()
    return secret.decode("ascii", "replace")


def _only_item(connection: Any, service: str, username: str) -> Any:
    wanted = {"service": service, "username": username}
    # The service-wide search lists locked items too; a collection's own search would not.
    items = list(secretstorage.search_items(connection, wanted))
    if not items:
        raise _no_item(connection, service, username)
    if len(items) > 1:
        labels = ", ".join(repr(item.get_label()) for item in items)
        raise ConfigError(
            f"{len(items)} items of the keyring match {service}/{username}",
            hint=f"delete all but the right one (their labels: {labels})",
        )
    [item] = items
    if item.is_locked():
        path = item.item_path.rpartition("/")[0]
        raise _locked(secretstorage.Collection(connection, path).get_label())
    return item


def _no_item(connection: Any, service: str, username: str) -> SecimgError:
    """Say missing only where every collection could be looked into."""
    collections = list(secretstorage.get_all_collections(connection))
    locked = [each.get_label() for each in collections if each.is_locked()]
    if locked:
        return KeyUnavailableError(
            f"no key {service}/{username} was found, and keyring collection {locked[0]!r} "
            "is locked; waiting, will not prompt",
            hint="unlock it; if no key was ever made: secimg-watch key init",
        )
    # GNOME's collection for the session alone has no label.
    labels = [repr(label) for each in collections if (label := each.get_label())]
    return KeyMissingError(
        f"the keyring has no item service={service} username={username} "
        f"in {', '.join(labels) or 'any collection'}",
        hint="secimg-watch key init",
    )


def _locked(label: str) -> KeyUnavailableError:
    return KeyUnavailableError(
        f"keyring collection {label!r} is locked; waiting, will not prompt",
        hint="unlock it, for instance by logging in to the desktop",
    )


def _default_collection(connection: Any, *, interactive: bool) -> secretstorage.Collection:
    try:
        collection = secretstorage.get_collection_by_alias(connection, "default")
    except secretstorage.ItemNotFoundException as error:
        if not interactive:
            raise KeyUnavailableError(
                "the keyring has no default collection, and making one needs a prompt",
                hint="log in to the desktop once, or run in a terminal: secimg-watch key init",
            ) from error
        return secretstorage.create_collection(connection, "Login", "default")
    if collection.is_locked() and interactive:
        collection.unlock(timeout=PROMPT_TIMEOUT)
    if collection.is_locked():
        raise _locked(collection.get_label())
    return collection


class _Conversation(Generic[T]):
    """One piece of work with a connection of its own, in a thread of its own."""

    def __init__(self, work: Callable[[Any], T]) -> None:
        self._work = work
        self._connection: Any = None
        self._done = threading.Event()
        self._result: list[T] = []
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            with closing(secretstorage.dbus_init()) as self._connection:
                _require_service(self._connection)
                self._result.append(self._work(self._connection))
        except Exception as error:  # noqa: BLE001 - handed over whole: result() classifies it
            self._error = error
        finally:
            _in_hand.release()
            self._done.set()

    def result(self, timeout: float) -> T:
        if not self._done.wait(timeout):
            self._hang_up()
            raise _mute()
        if self._error is None:
            return self._result[0]
        if isinstance(self._error, SecimgError):
            raise self._error
        raise KeyUnavailableError(
            f"the keyring cannot be reached: {self._error}",
            hint="run it in the user's session (systemctl --user); "
            "a system service takes its key from a systemd credential",
        ) from self._error

    def _hang_up(self) -> None:
        """End the worker: its pending read returns, and it releases connection and lock."""
        if self._connection is not None:
            # The worker may have closed it a moment ago.
            with suppress(OSError):
                self._connection.sock.shutdown(socket.SHUT_RDWR)


def _within(timeout: float, work: Callable[[Any], T]) -> T:
    deadline = time.monotonic() + timeout
    if not _in_hand.acquire(timeout=timeout):
        raise _mute()
    conversation = _Conversation(work)
    threading.Thread(target=conversation.run, name="secret-service", daemon=True).start()
    return conversation.result(max(0.0, deadline - time.monotonic()))


def _mute() -> KeyUnavailableError:
    return KeyUnavailableError(
        "the keyring does not answer; waiting",
        hint="look for an unanswered password prompt, or restart the keyring",
    )
