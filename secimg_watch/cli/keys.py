"""Commands about keys: ``key init``, ``list``, ``rotate``, ``retire``, and ``key recovery``."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import click

from secimg_watch import kernel, keys
from secimg_watch.audit import Event
from secimg_watch.catalog import Catalog
from secimg_watch.cli import terminal
from secimg_watch.cli.app import (
    PATH,
    App,
    guarded,
    pass_app,
    put_on_record,
    refuse_private,
    with_identity,
    with_json,
)
from secimg_watch.errors import (
    CannotCreateError,
    ConfigError,
    KeyMismatchError,
    KeyMissingError,
    NoInputError,
    SecimgError,
    UsageError,
)
from secimg_watch.gate import add_key, admit_keys, confirm_recovery, forget_key
from secimg_watch.recipients import (
    format_identity,
    format_recipient,
    generate_identity,
    identity_file,
    recipient_of,
)
from secimg_watch.rekey import Census, take_census
from secimg_watch.service import key_provider, open_vaults

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from secimg_watch.policy import Policy
    from secimg_watch.records import KeyEncryptionKey, ObjectId, PrivateKey
    from secimg_watch.vault import Vault


@click.group()
def key() -> None:
    """Make, list, rotate and retire keys."""


@key.command("init")
@with_identity
@pass_app
@guarded
def key_init(app: App) -> None:
    """Make a key, store it where the policy says, read it back, and give it to new vaults.

    With the recovery key it also replaces a key that was lost. Then run: secimg-watch vault rekey
    --identity FILE
    """
    policy = app.policy()
    created = ensure_key(policy, app.identities())
    provider = key_provider(policy)
    terminal.say(f"{created}: {provider.description}")
    if provider.warning:
        terminal.note(f"warning: {provider.warning}")


def ensure_key(policy: Policy, identities: tuple[PrivateKey, ...] = ()) -> str:
    """Load the policy's keys or make one, and admit them to every vault; what was done.

    ``identities`` may open what a lost key opened, so that a new one can take its place.
    """
    provider = key_provider(policy)
    created = "key exists already" if policy.key.provider != "none" else "no key"
    try:
        ring = provider.load_ring()
    except KeyMissingError:
        ring = (_new_key(provider, policy, identities),)
        created = "key made"
    for vault in open_vaults(policy).values():
        admit_keys(vault, ring)
    if created == "key made":
        put_on_record(policy, ring, Event(created, {"key": ring[0].key_id.hex()}))
    return created


def _new_key(
    provider: keys.KeyProvider, policy: Policy, identities: tuple[PrivateKey, ...]
) -> KeyEncryptionKey:
    shown = {each.key_id for each in identities} & {each.key_id for each in policy.recipients}
    locked = [v for v in open_vaults(policy).values() if v.exists() and v.info().checks]
    # A new key is of no use to a vault that was made with another one, but to who can rekey it.
    if locked and not shown:
        ids = ", ".join(key_id.hex()[:8] for key_id in locked[0].info().checks)
        raise KeyMissingError(
            f"vault {locked[0].path} was made with key {ids}, which is not stored here",
            hint="bring that key back; or if it is lost, give the recovery key:"
            " secimg-watch key init --identity FILE",
        )
    new = keys.generate()
    for vault in locked:
        add_key(vault, new)
    provider.store(new)
    return provider.load()


# -- listing -------------------------------------------------------------------------------------


@key.command("list")
@with_json
@pass_app
@guarded
def key_list(app: App) -> None:
    """List the keys and recipients that the vaults know, and what is at hand of them."""
    policy = app.policy()
    provider = key_provider(policy)
    try:
        ring = [each.key_id for each in provider.load_ring()]
        state = "at hand" if ring else "write-only"
    except SecimgError as error:
        ring, state = [], str(error)
    rows = [
        row
        for name, vault in open_vaults(policy).items()
        if vault.exists()
        for row in (*_key_rows(name, vault, ring), *_recipient_rows(name, vault, policy))
    ]
    if app.json:
        terminal.emit({"provider": provider.description, "state": state, "keys": rows})
        return
    terminal.say(f"{provider.description}: {state}")
    columns = ("kind", "key", "vault", "state")
    terminal.table(columns, ([str(row[column]) for column in columns] for row in rows))


def _key_rows(name: str, vault: Vault, ring: list[bytes]) -> list[dict[str, object]]:
    def state(key_id: bytes) -> str:
        if key_id not in ring:
            return "not at hand"
        return "current" if ring[0] == key_id else "former"

    return [
        {
            "kind": "key",
            "key": key_id.hex(),
            "vault": name,
            "at_hand": key_id in ring,
            "state": state(key_id),
        }
        for key_id in vault.info().checks
    ]


def _recipient_rows(name: str, vault: Vault, policy: Policy) -> list[dict[str, object]]:
    confirmed = vault.info().recovery
    return [
        {
            "kind": "recipient",
            "key": each.key_id.hex(),
            "vault": name,
            "at_hand": False,
            "state": "confirmed" if each.key_id in confirmed else "not confirmed",
        }
        for each in policy.recipients
    ]


def tell_census(census: Census, former: frozenset[bytes] = frozenset()) -> None:
    """Say how many objects open with which key."""
    for (kind, key_id), count in sorted(census.slots.items()):
        word = "still open" if key_id in former else "open"
        terminal.say(f"{count} objects {word} with {kind} {key_id.hex()}")
    for object_id, error in census.unreadable.items():
        terminal.note(f"secimg-watch: object {object_id}: {error}")


# -- rotation ------------------------------------------------------------------------------------


@key.command("rotate")
@pass_app
@guarded
def key_rotate(app: App) -> None:
    """Make a new key that everything is sealed with from now on; the present one still opens.

    Then reload the service, and bring the objects to the new key with: secimg-watch vault rekey
    """
    policy = app.policy()
    provider = key_provider(policy)
    _refuse_unwritable(provider)
    app.ring(policy)  # where there is none, nothing is touched
    vaults = _all_vaults(policy)
    with _alone(vaults):
        ring = app.ring(policy)
        for vault in vaults:
            admit_keys(vault, ring)
        new = keys.generate()
        keys.encode_ring((new, *ring))  # refused here where there are too many
        # Every vault knows the new key before anything can be sealed with it; a vault that knows
        # one which was then not stored has lost nothing.
        for vault in vaults:
            add_key(vault, new)
        provider.replace((new, *ring))
    put_on_record(policy, (new, *ring), Event("key rotated", {"key": new.key_id.hex()}))
    terminal.say(f"new key {new.key_id.hex()}: {provider.description}")
    for vault in vaults:
        tell_census(take_census(vault), frozenset(each.key_id for each in ring))
    terminal.say("next:")
    terminal.say("  1. back up the new key, beside the former one")
    terminal.say("  2. let the service take it up: systemctl reload secimg-watch")
    terminal.say("  3. secimg-watch vault rekey")
    terminal.say(f"  4. secimg-watch key retire {ring[0].key_id.hex()[:8]}")


@key.command("retire")
@click.argument("key_id", metavar="KEY")
@pass_app
@guarded
def key_retire(app: App, key_id: str) -> None:
    """Forget a former key that no object needs any more. The service must be stopped.

    Only the vaults of this policy are asked: keep a copy where another one may need the key.
    """
    policy = app.policy()
    provider = key_provider(policy)
    _refuse_unwritable(provider)
    app.ring(policy)  # where there is none, nothing is touched
    vaults = _all_vaults(policy)
    with _alone(vaults), contextlib.ExitStack() as locks:
        ring = app.ring(policy)
        retired = _one_key(key_id, ring, vaults)
        if retired == ring[0].key_id:
            raise UsageError(
                f"key {retired.hex()} is the current one",
                hint="make another: secimg-watch key rotate",
            )
        for vault in vaults:
            # A service that still seals with that key would go on doing so after the census.
            vault.lock()
            locks.callback(vault.unlock)
        for vault in vaults:
            _refuse_needed(vault, retired)
            vault.sync_objects()  # or an object that needs it could be back after a power cut
        for vault in vaults:
            forget_key(vault, retired)
        left = tuple(each for each in ring if each.key_id != retired)
        provider.replace(left)
    # With the retired key still at hand: a service may have written with it until it was stopped.
    put_on_record(policy, ring, Event("key retired", {"key": retired.hex()}))
    terminal.say(
        f"key {retired.hex()} is retired; backups of older objects, and vaults"
        " that are not in this policy, may still need it"
    )


def _all_vaults(policy: Policy) -> list[Vault]:
    # All of them, and none is made: one whose disk is not mounted would miss what is changed.
    vaults = list(open_vaults(policy).values())
    for vault in vaults:
        vault.info()
    return vaults


@contextlib.contextmanager
def _alone(vaults: list[Vault]) -> Iterator[None]:
    """Keep everybody else who changes keys away, for as long as a ring is read and replaced."""
    with contextlib.ExitStack() as locks:
        for vault in vaults:
            locks.enter_context(vault.replacing())
        yield


def _refuse_unwritable(provider: keys.KeyProvider) -> None:
    # Before a vault is changed: it would know a key that is stored nowhere.
    if isinstance(provider, keys.Credential | keys.Command):
        raise ConfigError(
            f"{provider.description} cannot be written by this program",
            hint="lay its line into a file, and name that in a temporary policy: provider file",
        )


def _one_key(prefix: str, ring: tuple[KeyEncryptionKey, ...], vaults: list[Vault]) -> bytes:
    known = {each.key_id for each in ring} | {i for vault in vaults for i in vault.info().checks}
    found = [key_id for key_id in known if key_id.hex().startswith(prefix.lower())]
    if not found:
        raise NoInputError(f"there is no key {prefix}", hint="see all with: secimg-watch key list")
    if len(found) > 1:
        raise UsageError(f"{len(found)} keys begin with {prefix}", hint="give more digits")
    return found[0]


def _refuse_needed(vault: Vault, key_id: bytes) -> None:
    census = take_census(vault)
    needed = census.slots[("key", key_id)]
    if needed or census.unreadable:
        what = (
            f"{needed} objects still open with key {key_id.hex()}"
            if needed
            else f"{len(census.unreadable)} objects cannot be read to see what they need"
        )
        raise KeyMismatchError(
            f"{what} in vault {vault.path}; nothing was retired",
            hint="secimg-watch vault rekey" if needed else "secimg-watch vault verify names them",
        )


# -- recovery ------------------------------------------------------------------------------------


@key.group("recovery")
def recovery() -> None:
    """Make, confirm and test a recovery key, which opens a vault when its key is lost."""


@recovery.command("make")
@click.option("--output", type=PATH, metavar="FILE", help="Write the private key to FILE (0600).")
@click.option("--print", "printed", is_flag=True, help="Print the private key instead, once.")
@pass_app
@guarded
def recovery_make(_app: App, output: Path | None, *, printed: bool) -> None:
    """Make a recovery key. Its private part is kept nowhere but where you say."""
    if (output is None) != printed:
        raise UsageError("give --output FILE or --print, and not both")
    identity = generate_identity()
    hand_over(identity, output)
    terminal.say("put this line into the policy, so that every new object can be opened with it:")
    terminal.say(f"recipients: [{format_recipient(recipient_of(identity))}]")
    terminal.say("then prove that you have the private key:")
    where = output if output is not None else "-"
    terminal.say(f"  secimg-watch key recovery confirm --identity {where}")


def hand_over(identity: PrivateKey, path: Path | None) -> None:
    """Write a private key to a new file that only its owner can read, or print it.

    Raises:
        CannotCreateError: the file exists already, or cannot be written.
        UsageError: the file's name is a private key.
    """
    if path is None:
        terminal.say("the private key; it is shown this once and kept nowhere:")
        terminal.say(format_identity(identity))
        return
    refuse_private(path.name)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w", encoding="ascii") as file:
            file.write(identity_file(identity))
            file.flush()
            os.fsync(fd)
        kernel.sync_path(path.parent)
    except FileExistsError:
        raise CannotCreateError(
            f"{path} exists already", hint="it may be the only key of a vault: name another file"
        ) from None
    except OSError as error:
        raise CannotCreateError(f"{path} cannot be written: {error.strerror}") from error


@recovery.command("confirm")
@with_identity
@pass_app
@guarded
def recovery_confirm(app: App) -> None:
    """Prove that you have the private key of a recipient; deletion is refused until then."""
    policy = app.policy()
    known = {each.key_id: each for each in policy.recipients}
    shown = [known[each.key_id] for each in _asked_identities(app) if each.key_id in known]
    if not shown:
        raise ConfigError(
            "that private key is not one of the policy's recipients",
            hint="put its public key under 'recipients': secimg-watch key recovery make tells how",
        )
    ring = key_provider(policy).load_ring()  # where it is not at hand, nothing is touched
    for vault in _all_vaults(policy):
        for recipient in shown:
            confirm_recovery(vault, recipient)
    for recipient in shown:
        confirmed = {"recipient": recipient.key_id.hex()}
        put_on_record(policy, ring, Event("recovery confirmed", confirmed))
        terminal.say(f"confirmed: recipient {recipient.key_id.hex()}")


def _asked_identities(app: App) -> tuple[PrivateKey, ...]:
    identities = app.identities()
    if not identities:
        raise UsageError("there is no private key", hint="give --identity FILE, or - to type it in")
    return identities


@recovery.command("test")
@with_identity
@with_json
@pass_app
@guarded
def recovery_test(app: App) -> int:
    """Open every object with the private key alone, and say how many that brings back."""
    policy = app.policy()
    identities = _asked_identities(app)
    chosen = [
        (catalog, object_id)
        for vault in open_vaults(policy).values()
        for catalog in [Catalog(vault, identities)]
        for object_id in catalog.ids()
    ]
    errors: dict[ObjectId, SecimgError] = {}
    with terminal.progress("opening", len(chosen)) as show:
        for done, (catalog, object_id) in enumerate(chosen, 1):
            try:
                catalog.meta(object_id)
            except SecimgError as error:
                errors[object_id] = error
            show(done, None)
    opened = len(chosen) - len(errors)
    if app.json:
        failed = {object_id: str(error) for object_id, error in errors.items()}
        terminal.emit({"opened": opened, "failed": failed})
    else:
        terminal.say(f"{opened} of {len(chosen)} objects open with the recovery key")
    for object_id, why in errors.items():
        terminal.note(f"secimg-watch: object {object_id}: {why}")
    if errors:
        terminal.note("  hint: secimg-watch vault rekey gives older objects the recovery key")
    return 1 if errors else 0
