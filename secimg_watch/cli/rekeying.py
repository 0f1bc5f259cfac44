"""Commands that change the keys of a vault's objects: ``vault rekey`` and ``vault reencrypt``."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import click

from secimg_watch.audit import Event
from secimg_watch.cli import terminal
from secimg_watch.cli.app import App, guarded, pass_app, put_on_record, with_identity, with_json
from secimg_watch.cli.keys import tell_census
from secimg_watch.errors import KeyMissingError, NotReadyError, SecimgError
from secimg_watch.gate import require_recovery
from secimg_watch.records import KeySet, ObjectId
from secimg_watch.rekey import Journal, Rekeyer, take_census
from secimg_watch.service import key_provider

if TYPE_CHECKING:
    from collections.abc import Callable

    from secimg_watch.vault import Vault

_VAULT = click.option("--vault", "vault_name", metavar="NAME", help="Only this vault.")
_DRY_RUN = click.option("--dry-run", is_flag=True, help="Only say what would be done.")


@click.command("rekey")
@_VAULT
@_DRY_RUN
@with_identity
@with_json
@pass_app
@guarded
def vault_rekey(app: App, vault_name: str | None, *, dry_run: bool) -> int:
    """Give every object the slots of the policy's key and recipients, and take all others away.

    The sealed pictures are copied as they are. It can be broken off and run again at any time,
    and beside the service.
    """
    run = _Run(app, dry_run=dry_run)
    for name, each in app.vaults(app.policy(), vault_name).items():
        with contextlib.nullcontext() if dry_run else each.replacing():
            rekeyer = run.rekeyer(name, each)
            run.over(name, each.object_ids(), rekeyer.is_due if dry_run else rekeyer.rekey)
            run.put_on_record(name, "objects rekeyed")
        run.census(name, each)
    return run.tell("would change" if dry_run else "changed")


@click.command("reencrypt")
@_VAULT
@_DRY_RUN
@with_identity
@with_json
@pass_app
@guarded
def vault_reencrypt(app: App, vault_name: str | None, *, dry_run: bool) -> int:
    """Seal every object anew, for the case that a key was stolen: rotate the key before.

    Each object is read, sealed with a fresh file key, read back and compared before the old one
    goes. It can be broken off and run again, and goes on where it was.
    """
    run = _Run(app, dry_run=dry_run)
    for name, each in app.vaults(app.policy(), vault_name).items():
        if dry_run:
            run.rekeyer(name, each)
            run.over(name, each.object_ids(), lambda _object_id: True)
        else:
            with each.replacing():
                run.reencrypt(name, each)
                run.put_on_record(name, "objects sealed anew")
        run.census(name, each)
    return run.tell("would be sealed anew" if dry_run else "sealed anew")


def _done(rekeyer: Rekeyer, journal: Journal, object_id: ObjectId) -> bool:
    try:
        return journal.has(object_id, rekeyer.mac(object_id))
    except SecimgError:
        return False  # doing it will say why


def _reencrypting(rekeyer: Rekeyer, journal: Journal) -> Callable[[ObjectId], bool]:
    def act(object_id: ObjectId) -> bool:
        rekeyer.reencrypt(object_id)
        journal.add(object_id, rekeyer.mac(object_id))
        return True

    return act


class _Run:
    """One run over vaults: what was changed, what failed, and what there is afterwards."""

    def __init__(self, app: App, *, dry_run: bool) -> None:
        self._app = app
        self._dry_run = dry_run
        self._policy = policy = app.policy()
        self._identities = app.identities()
        self.keys = KeySet(key_provider(policy).load_ring(), policy.recipients)
        if not self.keys.ring and not self._identities and not dry_run:
            raise KeyMissingError(
                "a write-only vault cannot open its objects to give them other keys",
                hint="give --identity FILE",
            )
        self._seen = 0
        self._changed = 0
        self._recorded = 0
        self.failed: dict[ObjectId, SecimgError] = {}
        self._census: dict[str, dict[str, int]] = {}

    def rekeyer(self, name: str, each: Vault) -> Rekeyer:
        # What is taken away may be the only thing that is known to open the objects.
        careful = not self.keys.ring or name in self._policy.deleting_vaults
        if careful and self._policy.recovery == "required" and not self._dry_run:
            require_recovery(each, each.info(), self.keys.recipients)
        return Rekeyer(each, self.keys, self._identities)

    def reencrypt(self, name: str, each: Vault) -> None:
        """Seal all objects of a vault anew, behind what an earlier run has done."""
        rekeyer = self.rekeyer(name, each)
        with Journal(each, self.keys) as journal:
            ids = each.object_ids()
            left = [object_id for object_id in ids if not _done(rekeyer, journal, object_id)]
            if behind := len(ids) - len(left):
                terminal.note(f"going on behind {behind} objects of an earlier run")
            if self.over(name, left, _reencrypting(rekeyer, journal)):
                journal.finish()

    def over(self, name: str, object_ids: list[ObjectId], act: Callable[[ObjectId], bool]) -> bool:
        """Do something with objects of a vault; whether it failed for none of them."""
        with terminal.progress(f"vault {name}", len(object_ids)) as show:
            for done, object_id in enumerate(object_ids, 1):
                try:
                    self._changed += act(object_id)
                except NotReadyError:
                    raise  # a full disk is not one object's fault
                except SecimgError as error:
                    self.failed[object_id] = error
                show(done, None)
        self._seen += len(object_ids)
        return self.failed.keys().isdisjoint(object_ids)

    def put_on_record(self, name: str, what: str) -> None:
        """Say in the audit log what became of a vault's objects."""
        if not self._dry_run:
            changed = self._changed - self._recorded
            self._recorded = self._changed
            fields: dict[str, str | int] = {"vault": name, "changed": changed}
            put_on_record(self._policy, self.keys.ring, Event(what, fields))

    def census(self, name: str, each: Vault) -> None:
        census = take_census(each)
        self._census[name] = {
            f"{kind} {key_id.hex()}": count for (kind, key_id), count in census.slots.items()
        }
        if not self._app.json:
            tell_census(census)

    def tell(self, done: str) -> int:
        failed = {object_id: str(error) for object_id, error in self.failed.items()}
        if self._app.json:
            terminal.emit(
                {
                    "objects": self._seen,
                    "changed": self._changed,
                    "failed": failed,
                    "census": self._census,
                }
            )
        else:
            terminal.say(f"{self._changed} of {self._seen} objects {done}, {len(failed)} failed")
        for object_id, sentence in failed.items():
            terminal.note(f"secimg-watch: object {object_id}: {sentence}")
        return 1 if failed else 0
