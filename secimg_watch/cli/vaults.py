"""Commands that read a vault: ``vault list``, ``show``, ``restore``, ``verify``."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import click

from secimg_watch.catalog import Catalog, Entry, collision_name
from secimg_watch.cli import terminal
from secimg_watch.cli.app import (
    PATH,
    App,
    guarded,
    names_path,
    pass_app,
    with_identity,
    with_json,
)
from secimg_watch.errors import CannotCreateError, NoInputError, SecimgError, UsageError
from secimg_watch.names import display
from secimg_watch.quantities import format_size
from secimg_watch.records import Label
from secimg_watch.restore import Destination

if TYPE_CHECKING:
    from secimg_watch.container import Meta
    from secimg_watch.records import ObjectId

_VAULT = click.option(
    "--vault",
    "vault_name",
    metavar="NAME",
    help="Only this vault. With --identity also the path of one, and no policy is needed.",
)


@click.group()
def vault() -> None:
    """Look into vaults and get pictures back."""


@dataclass(frozen=True, slots=True)
class _Filter:
    name: str | None
    folder: str | None
    format: str | None
    since: datetime | None
    until: datetime | None

    def takes(self, meta: Meta) -> bool:
        name, folder = os.fsdecode(meta.name), os.fsdecode(meta.folder)
        when = datetime.fromtimestamp(meta.ingested_ns / 1e9, UTC)
        return (
            (self.name is None or fnmatchcase(name, self.name))
            and (self.folder is None or self.folder in {folder, meta.source})
            and (self.format is None or meta.format.lower() == self.format.lower())
            and (self.since is None or when >= self.since.astimezone(UTC))
            and (self.until is None or when < self.until.astimezone(UTC))
        )


@vault.command("list")
@_VAULT
@click.option("--name", help="Only names that match this pattern.")
@click.option("--folder", help="Only this watched folder, or this sub-folder of one.")
@click.option("--format", "image_format", help="Only this format, e.g. JPEG.")
@click.option("--since", type=click.DateTime(), help="Only sealed at this time or later.")
@click.option("--until", type=click.DateTime(), help="Only sealed before this time.")
@with_identity
@with_json
@pass_app
@guarded
def vault_list(
    app: App,
    vault_name: str | None,
    name: str | None,
    folder: str | None,
    image_format: str | None,
    since: datetime | None,
    until: datetime | None,
) -> int:
    """List the sealed pictures. Only headers are read, never the pictures themselves."""
    wanted = _Filter(name, folder, image_format, since, until)
    entries = [e for c in app.catalogs(vault_name).values() for e in c.entries()]
    good = [e for e in entries if e.meta is not None and wanted.takes(e.meta)]
    good.sort(key=lambda e: e.meta.ingested_ns if e.meta else 0)
    bad = [e for e in entries if e.meta is None]
    if app.json:
        terminal.emit([_fields(e) for e in (*good, *bad)])
    else:
        columns = ("object", "sealed", "format", "pixels", "size", "folder", "name")
        terminal.table(columns, (_cells(e.object_id, e.meta) for e in good if e.meta))
    for entry in bad:
        terminal.note(f"secimg-watch: object {entry.object_id}: {entry.error}")
    return 1 if bad else 0


def _cells(object_id: ObjectId, meta: Meta) -> tuple[str, ...]:
    pixels = f"{meta.width}x{meta.height}" if meta.width else "-"
    shown = (meta.format, "" if meta.label == Label.IMAGE else meta.label)
    kind = " ".join(word for word in shown if word)
    folder, name = os.fsdecode(meta.folder), os.fsdecode(meta.name)
    return (
        object_id[:12],
        _when(meta.ingested_ns),
        kind,
        pixels,
        format_size(meta.size),
        folder,
        name,
    )


def _when(nanoseconds: int) -> str:
    return datetime.fromtimestamp(nanoseconds // 10**9).astimezone().isoformat(" ", "seconds")


def _fields(entry: Entry) -> dict[str, object]:
    meta = entry.meta
    if meta is None:
        return {"object": entry.object_id, "error": str(entry.error)}
    return {
        "object": entry.object_id,
        "name": display(os.fsdecode(meta.name)),
        "folder": display(os.fsdecode(meta.folder)),
        "source": display(meta.source),
        "size": meta.size,
        "format": meta.format,
        "width": meta.width,
        "height": meta.height,
        "label": meta.label,
        "mode": f"{meta.mode:o}",
        "modified_ns": meta.mtime_ns,
        "sealed_ns": meta.ingested_ns,
        "proof": meta.proof,
        "tool": meta.tool,
    }


@vault.command("show")
@click.argument("object_id", metavar="OBJECT")
@click.option(
    "--preview",
    type=PATH,
    help="Write the preview to this file.",
)
@_VAULT
@with_identity
@with_json
@pass_app
@guarded
def vault_show(app: App, object_id: str, preview: Path | None, vault_name: str | None) -> None:
    """Show everything that is recorded about one picture."""
    catalog, found = _find(app, object_id, vault_name)
    fields = _fields(Entry(found, catalog.meta(found), None))
    if app.json:
        terminal.emit(fields)
    else:
        terminal.details(fields)
    if preview is not None:
        _write_preview(catalog.preview(found), preview)


def _write_preview(data: bytes, path: Path) -> None:
    if not data:
        raise NoInputError("the object has no preview")
    name = os.fsencode(path.name)
    with Destination(path.parent) as place, place.place(b"", name) as file:
        file.write(data)
        file.commit(mode=0o600, mtime_ns=time.time_ns())


def _find(app: App, object_id: str, vault_name: str | None) -> tuple[Catalog, ObjectId]:
    catalogs = app.catalogs(vault_name)
    for catalog in catalogs.values():
        try:
            return catalog, catalog.find(object_id)
        except NoInputError:
            continue
    raise NoInputError(
        f"there is no object {object_id}", hint="see all with: secimg-watch vault list"
    )


@vault.command("restore")
@click.argument("object_ids", nargs=-1, metavar="[OBJECT]...")
@click.option("--all", "everything", is_flag=True, help="Every picture of the vault.")
@click.option("--to", "target", required=True, type=PATH, metavar="DIR")
@click.option("--as", "name", help="Restore one picture under this name, directly in DIR.")
@_VAULT
@with_identity
@with_json
@pass_app
@guarded
def vault_restore(
    app: App,
    object_ids: tuple[str, ...],
    target: Path,
    name: str | None,
    vault_name: str | None,
    *,
    everything: bool,
) -> int:
    """Write pictures back, with their names, sub-folders and times. Nothing is overwritten."""
    if bool(object_ids) == everything:
        raise UsageError("name the objects to restore, or give --all")
    if name is not None and len(object_ids) != 1:
        raise UsageError("--as goes with exactly one object")
    _refuse_protected(app, vault_name, target)
    if everything:
        catalogs = app.catalogs(vault_name).values()
        chosen = [(c, object_id) for c in catalogs for object_id in c.ids()]
    else:
        chosen = [_find(app, each, vault_name) for each in object_ids]
    with Destination(target) as destination:
        restored, errors = _restore_all(chosen, destination, name)
    _tell_restored(app, restored, errors)
    if len(errors) == len(chosen) == 1:
        return errors[0][1].exit_code
    return 1 if errors else 0


def _refuse_protected(app: App, vault_name: str | None, target: Path) -> None:
    into = Path(os.path.realpath(target))
    vaults = [Path(vault_name)] if vault_name is not None and names_path(vault_name) else []
    if not vaults:
        policy = app.policy()
        vaults = [vault.path for vault in policy.vaults.values()]
        for folder in policy.folders:
            if into.is_relative_to(os.path.realpath(folder.path)):
                raise UsageError(
                    f"{target} lies in the watched folder {folder.path}:"
                    " what is restored there would be sealed again",
                    hint="choose another --to DIR",
                )
    for vault in vaults:
        if into.is_relative_to(os.path.realpath(vault)):
            raise UsageError(
                f"{target} lies in the vault {vault}, where nothing lies in clear",
                hint="choose another --to DIR",
            )


def _restore_all(
    chosen: list[tuple[Catalog, ObjectId]], destination: Destination, name: str | None
) -> tuple[dict[ObjectId, str], list[tuple[ObjectId, SecimgError]]]:
    restored: dict[ObjectId, str] = {}
    errors: list[tuple[ObjectId, SecimgError]] = []
    with terminal.progress("restoring", len(chosen)) as show:
        for done, (catalog, object_id) in enumerate(chosen, 1):
            try:
                restored[object_id] = _restore(catalog, object_id, destination, name, restored)
            except SecimgError as error:
                errors.append((object_id, error))
            show(done, None)
    return restored, errors


def _restore(
    catalog: Catalog,
    object_id: ObjectId,
    destination: Destination,
    name: str | None,
    restored: dict[ObjectId, str],
) -> str:
    if name is not None:
        return catalog.restore(object_id, destination, folder=b"", name=os.fsencode(name))
    try:
        return catalog.restore(object_id, destination, folder=None, name=None)
    except CannotCreateError:
        # Producers use names again and again: a second picture of this very run gets its own.
        meta = catalog.meta(object_id)
        taken = os.fsdecode(os.path.join(meta.folder, meta.name))
        if taken not in restored.values():
            raise
        other = collision_name(meta.name, object_id)
        return catalog.restore(object_id, destination, folder=None, name=other)


def _tell_restored(
    app: App, restored: dict[ObjectId, str], errors: list[tuple[ObjectId, SecimgError]]
) -> None:
    if app.json:
        terminal.emit(
            {
                "restored": {each: display(path) for each, path in restored.items()},
                "failed": {each: str(error) for each, error in errors},
            }
        )
    else:
        terminal.say(f"{len(restored)} restored, {len(errors)} failed")
    for object_id, error in errors:
        terminal.note(f"secimg-watch: object {object_id}: {error}")
        if error.hint:
            terminal.note(f"  hint: {error.hint}")


@vault.command("verify")
@_VAULT
@with_identity
@with_json
@pass_app
@guarded
def vault_verify(app: App, vault_name: str | None) -> int:
    """Read and authenticate every object whole."""
    chosen = [
        (catalog, object_id)
        for catalog in app.catalogs(vault_name).values()
        for object_id in catalog.ids()
    ]
    errors: dict[ObjectId, SecimgError] = {}
    size = 0
    with terminal.progress("verifying", len(chosen)) as show:
        for done, (catalog, object_id) in enumerate(chosen, 1):
            try:
                size += catalog.verify(object_id)
            except SecimgError as error:
                errors[object_id] = error
            show(done, None)
    good = len(chosen) - len(errors)
    if app.json:
        failed = {object_id: str(error) for object_id, error in errors.items()}
        terminal.emit({"verified": good, "bytes": size, "failed": failed})
    else:
        terminal.say(f"{good} objects verified ({format_size(size)}), {len(errors)} failed")
    for object_id, why in errors.items():
        terminal.note(f"secimg-watch: object {object_id}: {why}")
    return 1 if errors else 0
