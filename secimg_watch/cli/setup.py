"""Commands that set things up: ``quickstart``, ``init``, ``check``, ``key``."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from secimg_watch import keys, policyfile
from secimg_watch.cli import terminal
from secimg_watch.cli.app import (
    PATH,
    App,
    guarded,
    pass_app,
    start_log,
    user_policy,
    with_json,
)
from secimg_watch.cli.running import Daemon
from secimg_watch.errors import (
    CannotCreateError,
    InsecureKeyError,
    KeyMissingError,
    KeyUnavailableError,
    PolicyError,
    SecimgError,
    UsageError,
)
from secimg_watch.gate import admit_key
from secimg_watch.policy import load_policy, parse_policy
from secimg_watch.quantities import format_duration
from secimg_watch.service import key_provider, open_vaults
from secimg_watch.surroundings import check_paths

if TYPE_CHECKING:
    from secimg_watch.policy import Policy
    from secimg_watch.records import KeyEncryptionKey

# -- quickstart and init -------------------------------------------------------------------------


@click.command()
@click.argument("directory", metavar="DIR", default="secimg", type=PATH)
@click.option("--setup-only", is_flag=True, help="Make everything, but do not run.")
@pass_app
@guarded
def quickstart(app: App, directory: Path, *, setup_only: bool) -> None:
    """Make a folder, a vault, a policy and a key in DIR, and run.

    Drop pictures into DIR/drop. Running it again in the same DIR goes on with what is there.
    """
    directory = _absolute(directory)
    path = directory / "policy.yaml"
    if not path.exists():
        _make_quickstart(directory, path)
    policy = load_policy(path)
    provider = key_provider(policy)
    for vault in open_vaults(policy).values():
        admit_key(vault, provider.load())
    _tell_next_steps(directory, path, provider)
    if not setup_only:
        start_log(app.verbose)
        with terminal.live() as show:
            Daemon(path, policy, show).run()


def _make_quickstart(directory: Path, path: Path) -> None:
    _make_directory(directory)
    for name in ("drop", "vault", "state"):
        _make_directory(directory / name)
    key = _quickstart_key(directory)
    _write_policy(
        path,
        {
            "version": 1,
            "state": str(directory / "state"),
            "vaults": {"main": {"path": str(directory / "vault")}},
            "key": key,
            "folders": [{"path": str(directory / "drop"), "vault": "main"}],
        },
    )


def _quickstart_key(directory: Path) -> dict[str, str]:
    """A key in the desktop's keyring where that can be used now, else in a file of this user."""
    name = f"secimg-watch/quickstart-{secrets.token_hex(4)}"
    try:
        keys.provider_for("keyring", name).store(keys.generate())
    except (KeyUnavailableError, InsecureKeyError, KeyMissingError) as error:
        terminal.note(f"no keyring can be used here: {error}")
    else:
        return {"provider": "keyring", "name": name}
    file = directory / "vault.key"
    if not file.exists():
        keys.provider_for("file", name, file=file).store(keys.generate())
    return {"provider": "file", "file": str(file)}


def _tell_next_steps(directory: Path, path: Path, provider: keys.KeyProvider) -> None:
    shown = _quoted(path)
    terminal.say(f"policy  {path}")
    terminal.say(f"key     {provider.description}")
    if provider.warning:
        terminal.note(f"warning: {provider.warning}")
    command = _command()
    terminal.say("next:")
    terminal.say(f"  1. copy pictures into {_quoted(directory / 'drop')}")
    terminal.say(f"  2. {command} --policy {shown} vault list")
    terminal.say(f"  3. {command} --policy {shown} vault restore --all --to restored")


def _command() -> str:
    """How this very program can be called again from here."""
    called = Path(sys.argv[0])
    if called.name != "secimg-watch":
        return f"{_quoted(Path(sys.executable))} -m secimg_watch"
    found = shutil.which("secimg-watch")
    in_path = found is not None and Path(found).resolve() == called.resolve()
    return "secimg-watch" if in_path else _quoted(called)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


@click.command()
@click.option("--folder", "folders", multiple=True, help="A folder to watch (repeatable).")
@click.option("--vault", help="Where the sealed pictures go.")
@click.option("--state", help="Where queue and status are kept.")
@click.option(
    "--provider",
    type=click.Choice(["auto", "keyring", "credential", "command", "file"]),
    default="auto",
    show_default=True,
    help="Where the key is kept.",
)
@click.option("--key-file", help="The file, with --provider file.")
@click.option("--output", type=PATH, help="The policy file to write.")
@pass_app
@guarded
def init(
    app: App,
    folders: tuple[str, ...],
    vault: str | None,
    state: str | None,
    provider: str,
    key_file: str | None,
    output: Path | None,
) -> None:
    """Make a policy and a key, step by step. What is not given is asked for."""
    path = _absolute(output or app.policy_path or _default_policy())
    if path.exists():
        raise CannotCreateError(f"{path} exists already", hint="edit it, or name another --output")
    data = _init_data(folders, vault, state, path)
    data["key"] = {"provider": provider}
    if provider == "file":
        data["key"]["file"] = str(_absolute(Path(key_file or _ask("Key file", "--key-file"))))
    policy = parse_policy(policyfile.dump(data), str(path))
    _make_directory(path.parent)
    for directory in (*(f.path for f in policy.folders), policy.state):
        _make_directory(directory)
    created = _ensure_key(policy)
    _write_policy(path, data)
    terminal.say(f"policy  {path}")
    terminal.say(f"key     {key_provider(policy).description} ({created})")
    terminal.say(f"next:   {_command()} --policy {_quoted(path)} run")


def _default_policy() -> Path:
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    return Path("/etc/secimg-watch/policy.yaml") if is_root else user_policy()


def _init_data(
    folders: tuple[str, ...], vault: str | None, state: str | None, path: Path
) -> dict[str, Any]:
    watched = folders or (_ask("Folder to watch", "--folder"),)
    into = vault or _ask("Vault directory", "--vault")
    kept = state or str(path.parent / "state")
    return {
        "version": 1,
        "state": str(_absolute(Path(kept))),
        "vaults": {"main": {"path": str(_absolute(Path(into)))}},
        "folders": [{"path": str(_absolute(Path(f))), "vault": "main"} for f in watched],
    }


def _ask(what: str, option: str) -> str:
    try:
        # Standard output is for the result.
        answer: str = click.prompt(what, err=True)
    except click.Abort:
        if sys.stdin.isatty():
            raise
        raise UsageError(f"nobody answered: {what.lower()}", hint=f"give {option}") from None
    return answer


def _absolute(path: Path) -> Path:
    text = os.path.abspath(os.path.expanduser(path))
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"the path {path} is not valid Unicode, which a policy file must be"
        ) from None
    return Path(text)


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise CannotCreateError(f"{path} cannot be made: {error.strerror}") from error


def _write_policy(path: Path, data: dict[str, Any]) -> None:
    text = policyfile.dump(data)
    parse_policy(text, str(path))
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise CannotCreateError(f"{path} cannot be written: {error.strerror}") from error


# -- check ---------------------------------------------------------------------------------------


@click.command()
@with_json
@pass_app
@guarded
def check(app: App) -> int:
    """Validate the policy and explain what it does."""
    path = app.find_policy()
    try:
        policy = load_policy(path)
    except PolicyError as error:
        if not app.json:
            raise
        terminal.emit({"policy": str(path), "faults": list(error.faults) or [str(error)]})
        return error.exit_code
    faults = check_paths(policy)
    if app.json:
        terminal.emit({"policy": str(path), "faults": faults})
    else:
        _explain_policy(path, policy)
    if faults:
        raise PolicyError(f"{path} cannot be used as it is", faults=tuple(faults))
    return 0


def _explain_policy(path: Path, policy: Policy) -> None:
    terminal.say(f"{path}: the policy is valid")
    terminal.say(f"key: {key_provider(policy).description}")
    for folder in policy.folders:
        vault = policy.vaults[folder.vault].path
        depth = "with its sub-folders" if folder.recursive else "without its sub-folders"
        terminal.say(f"{folder.path} ({depth}) -> {vault}")
        terminal.say(
            f"  taken once unchanged for {format_duration(folder.settle)}, proof {folder.proof};"
            f" then {folder.after}"
        )
        terminal.say(
            f"  no image: {folder.not_image}; undecodable image: {folder.undecodable};"
            f" preview: {folder.preview} px"
        )


# -- keys ----------------------------------------------------------------------------------------


@click.group()
def key() -> None:
    """Make and list keys."""


@key.command("init")
@pass_app
@guarded
def key_init(app: App) -> None:
    """Make a key, store it where the policy says, read it back, and give it to new vaults."""
    policy = app.policy()
    created = _ensure_key(policy)
    provider = key_provider(policy)
    terminal.say(f"{created}: {provider.description}")
    if provider.warning:
        terminal.note(f"warning: {provider.warning}")


def _ensure_key(policy: Policy) -> str:
    """Load the policy's key or make one, and admit it to every vault; what was done."""
    provider = key_provider(policy)
    created = "key exists already"
    try:
        loaded = provider.load()
    except KeyMissingError:
        loaded = _new_key(provider, policy)
        created = "key made"
    for vault in open_vaults(policy).values():
        admit_key(vault, loaded)
    return created


def _new_key(provider: keys.KeyProvider, policy: Policy) -> KeyEncryptionKey:
    # A new key is of no use to a vault that was made with another one.
    for vault in open_vaults(policy).values():
        if vault.exists():
            ids = ", ".join(key_id.hex()[:8] for key_id in vault.info().checks)
            raise KeyMissingError(
                f"vault {vault.path} was made with key {ids}, which is not stored here",
                hint="bring that key back; a new one could not open what is in the vault",
            )
    provider.store(keys.generate())
    return provider.load()


@key.command("list")
@with_json
@pass_app
@guarded
def key_list(app: App) -> None:
    """List the keys that the vaults know, and whether they are at hand."""
    policy = app.policy()
    provider = key_provider(policy)
    try:
        at_hand = provider.load().key_id
        state = "at hand"
    except SecimgError as error:
        at_hand, state = b"", str(error)
    rows = [
        {"key": key_id.hex(), "vault": name, "at_hand": key_id == at_hand}
        for name, vault in open_vaults(policy).items()
        if vault.exists()
        for key_id in vault.info().checks
    ]
    if app.json:
        terminal.emit({"provider": provider.description, "state": state, "keys": rows})
        return
    terminal.say(f"{provider.description}: {state}")
    terminal.table(
        ("key", "vault", "at hand"),
        ((r["key"], r["vault"], "yes" if r["at_hand"] else "no") for r in rows),
    )
