"""One-off commands with a password: ``encrypt`` and ``decrypt``."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from secimg_watch import __version__, kernel
from secimg_watch.cli import terminal
from secimg_watch.cli.app import PATH, App, guarded, pass_app, read_recipient, with_identity
from secimg_watch.container import Meta
from secimg_watch.errors import NoInputError, NotAllowedError, StorageError, UsageError
from secimg_watch.inspector import Inspector, Limits
from secimg_watch.records import Inspection, ObjectId
from secimg_watch.restore import Destination
from secimg_watch.seal import open_object, seal_object
from secimg_watch.sealing import reader
from secimg_watch.slots import Password, encode_password
from secimg_watch.vault import SUFFIX

if TYPE_CHECKING:
    from collections.abc import Iterator

    from secimg_watch.slots import Lock, Opener

_NO_VAULT = bytes(16)  # the vault id of an object that belongs to none
_PASSWORD_MAX = 4096


_password_file = click.option(
    "--password-file",
    type=PATH,
    help="Read the password from the first line of this file instead of asking.",
)
_output = click.option("-o", "--output", type=PATH, help="File to write.")


@click.command()
@click.argument("file", type=PATH)
@_output
@_password_file
@click.option(
    "--kdf",
    type=click.Choice(["argon2id", "pbkdf2"]),
    default="argon2id",
    show_default=True,
    help="How the key is derived from the password.",
)
@click.option(
    "--recipient",
    "recipients",
    multiple=True,
    metavar="KEY|FILE",
    help="Seal to this public key, or the one in FILE, instead of a password (repeatable).",
)
@pass_app
@guarded
def encrypt(
    _app: App,
    file: Path,
    output: Path | None,
    password_file: Path | None,
    kdf: str,
    recipients: tuple[str, ...],
) -> None:
    """Seal one file with a password, into FILE.simg. The file itself stays."""
    target = output or file.with_name(file.name + SUFFIX)
    with _picture(file) as fd:
        locks: list[Lock] = [read_recipient(each) for each in recipients]
        if password_file is not None or not locks:
            secret = _password(password_file, confirm=True)
            locks.append(Password(secret, kdf="pbkdf2" if kdf == "pbkdf2" else "argon2id"))
        status = os.fstat(fd)
        with Inspector(Limits()) as inspector:
            inspection = inspector.inspect(fd, size=status.st_size, preview=0, decode=False)
        sealed = seal_object(
            object_id=ObjectId(os.urandom(16).hex()),
            vault_id=_NO_VAULT,
            locks=locks,
            meta=_meta(file, status, inspection),
            preview=b"",
            read=reader(fd),
        )
        name = os.fsencode(target.name)
        with _directory(target) as place, place.place(b"", name) as written:
            for chunk in sealed.chunks():
                written.write(chunk)
            written.commit(mode=0o600, mtime_ns=time.time_ns())
    terminal.say(f"{target}")


def _directory(file: Path) -> Destination:
    # The person named it: a link in it is meant. Links within it are still not followed.
    return Destination(Path(os.path.realpath(file.parent)))


@contextlib.contextmanager
def _picture(path: Path) -> Iterator[int]:
    try:
        fd = os.open(path, kernel.PICTURE)
    except FileNotFoundError:
        raise NoInputError(f"{path} does not exist") from None
    except PermissionError:
        raise NotAllowedError(f"{path} cannot be read: permission denied") from None
    except OSError as error:
        raise NoInputError(f"{path} cannot be opened: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise NoInputError(f"{path} is not a regular file")
        yield fd
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from error
    finally:
        os.close(fd)


def _meta(path: Path, status: os.stat_result, inspection: Inspection) -> Meta:
    return Meta(
        name=os.fsencode(path.name),
        folder=b"",
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        mode=stat.S_IMODE(status.st_mode),
        format=inspection.format,
        width=inspection.width,
        height=inspection.height,
        label=inspection.label,
        source="",
        proof="",
        ingested_ns=time.time_ns(),
        tool=f"secimg-watch {__version__}",
    )


def _password(file: Path | None, *, confirm: bool) -> bytes:
    if file is None:
        if not sys.stdin.isatty():
            hint = "give --password-file FILE"
            raise UsageError("there is no terminal to ask for the password on", hint=hint)
        return encode_password(
            click.prompt("Password", hide_input=True, confirmation_prompt=confirm)
        )
    try:
        # A link or a pipe is as good as a file here: secrets are often handed over by one.
        with open(file, "rb") as stream:
            line = stream.readline(_PASSWORD_MAX + 2).removesuffix(b"\n").removesuffix(b"\r")
    except PermissionError:
        raise NotAllowedError(f"{file} cannot be read: permission denied") from None
    except OSError as error:
        raise NoInputError(f"{file} cannot be read: {error.strerror}") from error
    if len(line) > _PASSWORD_MAX:
        raise UsageError(f"the password in {file} is longer than {_PASSWORD_MAX} bytes")
    return encode_password(line)


@click.command()
@click.argument("file", type=PATH)
@_output
@_password_file
@with_identity
@pass_app
@guarded
def decrypt(app: App, file: Path, output: Path | None, password_file: Path | None) -> None:
    """Open one sealed file with its password; by default under its old name, beside it."""
    with _picture(file) as fd, open(fd, "rb", buffering=0, closefd=False) as stream:
        openers: list[Opener] = [*app.identities()]
        if password_file is not None or not openers:
            openers.append(Password(_password(password_file, confirm=False)))
        opened = open_object(stream, openers)
        beside = output or file
        name = os.fsencode(output.name) if output else opened.meta.name
        with _directory(beside) as place, place.place(b"", name) as written:
            for piece in opened.body():
                written.write(piece)
            written.commit(mode=opened.meta.mode, mtime_ns=opened.meta.mtime_ns)
    terminal.say(f"{beside.with_name(os.fsdecode(name))}")
