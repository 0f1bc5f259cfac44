"""Commands that set things up: ``quickstart``, ``init``, ``check``."""

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
from secimg_watch.audit import Event
from secimg_watch.cli import terminal
from secimg_watch.cli.app import (
    PATH,
    App,
    guarded,
    pass_app,
    put_on_record,
    read_identities,
    read_recipient,
    start_log,
    user_policy,
    with_json,
)
from secimg_watch.cli.keys import ensure_key, hand_over
from secimg_watch.cli.running import Daemon
from secimg_watch.errors import (
    CannotCreateError,
    InsecureKeyError,
    KeyMissingError,
    KeyUnavailableError,
    PolicyError,
    UsageError,
)
from secimg_watch.gate import admit_keys, confirm_recovery
from secimg_watch.policy import load_policy, parse_policy
from secimg_watch.quantities import format_duration
from secimg_watch.recipients import (
    format_recipient,
    generate_identity,
    recipient_of,
)
from secimg_watch.service import key_provider, open_vaults
from secimg_watch.surroundings import check_paths

if TYPE_CHECKING:
    from secimg_watch.policy import Policy
    from secimg_watch.records import Recipient

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
    is_new = not path.exists()
    if is_new:
        _make_quickstart(directory, path)
    policy = load_policy(path)
    provider = key_provider(policy)
    ring = provider.load_ring()
    for vault in open_vaults(policy).values():
        admit_keys(vault, ring)
        for recipient in _shown_recovery(directory / "recovery.key", policy):
            if recipient.key_id not in vault.info().recovery:
                confirm_recovery(vault, recipient)
                confirmed = {"recipient": recipient.key_id.hex()}
                put_on_record(policy, ring, Event("recovery confirmed", confirmed))
    if is_new:
        put_on_record(policy, ring, Event("key made", {"key": ring[0].key_id.hex()}))
    _tell_next_steps(directory, path, provider)
    if not setup_only:
        start_log(app.verbose)
        with terminal.live() as show:
            Daemon(path, policy, show).run()


def _shown_recovery(file: Path, policy: Policy) -> list[Recipient]:
    """The policy's recipients whose private key lies where quickstart has put it."""
    shown = {each.key_id for each in read_identities(file)} if file.exists() else set()
    return [each for each in policy.recipients if each.key_id in shown]


def _make_quickstart(directory: Path, path: Path) -> None:
    _make_directory(directory)
    for name in ("drop", "vault", "state"):
        _make_directory(directory / name)
    recovery = _quickstart_recovery(directory / "recovery.key")
    key = _quickstart_key(directory)
    _write_policy(
        path,
        {
            "version": 1,
            "state": str(directory / "state"),
            "vaults": {"main": {"path": str(directory / "vault")}},
            "key": key,
            "recipients": [format_recipient(recovery)],
            "folders": [{"path": str(directory / "drop"), "vault": "main"}],
        },
    )


def _quickstart_recovery(file: Path) -> Recipient:
    if file.exists():  # of a start that was broken off
        return recipient_of(read_identities(file)[0])
    identity = generate_identity()
    hand_over(identity, file)
    return recipient_of(identity)


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
    recovery = directory / "recovery.key"
    if recovery.exists():
        terminal.note(f"move {_quoted(recovery)} off this machine: it opens the vault by itself")
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
    type=click.Choice(["auto", "keyring", "credential", "command", "file", "none"]),
    default="auto",
    show_default=True,
    help="Where the key is kept.",
)
@click.option("--key-file", help="The file, with --provider file.")
@click.option(
    "--recovery",
    metavar="FILE",
    help="Make a recovery key and write its private part to FILE; - prints it once.",
)
@click.option("--no-recovery", is_flag=True, help="Decline: the key is all there is.")
@click.option(
    "--recipient",
    "recipients",
    multiple=True,
    metavar="KEY|FILE",
    help="A public key that is there already, or a file with it (repeatable).",
)
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
    recovery: str | None,
    recipients: tuple[str, ...],
    output: Path | None,
    *,
    no_recovery: bool,
) -> None:
    """Make a policy and a key, step by step. What is not given is asked for."""
    if no_recovery and recovery:
        raise UsageError("--recovery and --no-recovery exclude each other")
    path = _absolute(output or app.policy_path or _default_policy())
    if path.exists():
        raise CannotCreateError(f"{path} exists already", hint="edit it, or name another --output")
    data = _init_data(folders, vault, state, path)
    data["key"] = {"provider": provider}
    if provider == "file":
        data["key"]["file"] = str(_absolute(Path(key_file or _ask("Key file", "--key-file"))))
    known = [read_recipient(each) for each in recipients]
    if not known and not no_recovery:
        recovery = recovery or _ask_recovery()
    if no_recovery or recovery == _NO_RECOVERY:
        data["recovery"], recovery = "declined", None
    _write_init(path, data, known, recovery)


_NO_RECOVERY = "no recovery"


def _ask_recovery() -> str:
    what = f"File for the recovery key (- prints it, '{_NO_RECOVERY}' declines)"
    return _ask(what, "--recovery FILE or --no-recovery")


def _write_init(
    path: Path, data: dict[str, Any], known: list[Recipient], recovery: str | None
) -> None:
    # Before a key is made that belongs to nothing; with no recipient yet, 'none' would be a fault.
    parse_policy(policyfile.dump(data | {"key": {"provider": "auto"}}), str(path))
    identity = None
    if recovery is not None:
        identity = generate_identity()
        known.append(recipient_of(identity))
    if known:
        data["recipients"] = [format_recipient(each) for each in known]
    policy = parse_policy(policyfile.dump(data), str(path))
    _make_directory(path.parent)
    for directory in (*(f.path for f in policy.folders), policy.state):
        _make_directory(directory)
    created = ensure_key(policy)
    if identity is not None:
        hand_over(identity, None if recovery == "-" else _absolute(Path(recovery or "")))
    _write_policy(path, data)
    terminal.say(f"policy  {path}")
    terminal.say(f"key     {key_provider(policy).description} ({created})")
    command = f"{_command()} --policy {_quoted(path)}"
    if known:
        shown = "FILE" if recovery is None else shlex.quote(recovery)
        terminal.say(f"next:   {command} key recovery confirm --identity {shown}")
        terminal.say(f"then:   {command} run")
    else:
        terminal.say(f"next:   {command} run")


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
    for recipient in policy.recipients:
        terminal.say(f"recipient: {recipient.key_id.hex()} can open every new object")
    if policy.recovery == "declined":
        terminal.say("recovery: declined; plaintext is deleted without a proven recovery key")
    elif policy.deleting_vaults:
        terminal.say("recovery: plaintext is deleted only with a confirmed recovery key")
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
