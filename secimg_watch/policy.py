"""The policy: which folders are watched, where their pictures go, and under which conditions.

``parse_policy`` reports every fault of a file at once, each with its line and column: those
of single values (the models' validators), and those between values, which are
looked for in the plain data, so that one kind does not hide the other. Neither needs the
named directories to exist; ``surroundings`` looks at the disk.

The models are frozen. Durations are seconds, sizes bytes, and paths absolute and normalised.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
)
from pydantic.json_schema import GenerateJsonSchema

from secimg_watch.errors import NoInputError, NotAllowedError, StorageError, UsageError
from secimg_watch.names import display
from secimg_watch.policyfile import MAX_TEXT, Document, Fault, Location, load, refusal
from secimg_watch.quantities import (
    DURATION_PATTERN,
    SHARE_PATTERN,
    SIZE_PATTERN,
    Reserve,
    exact_duration,
    exact_reserve,
    exact_size,
    parse_duration,
    parse_share_or_size,
    parse_size,
)
from secimg_watch.recipients import RECIPIENT_PREFIX, format_recipient, parse_recipient
from secimg_watch.records import Recipient

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pydantic_core import ErrorDetails

FORMATS = (
    *("AVIF", "BLP", "BMP", "BUFR", "CUR", "DCX", "DDS", "DIB", "EPS", "FITS", "FLI", "FTEX"),
    *("GBR", "GIF", "GRIB", "HDF5", "HEIF", "ICNS", "ICO", "IM", "IMT", "IPTC", "JPEG"),
    *("JPEG2000", "JXL", "MCIDAS", "MPEG", "MPO", "MSP", "PCD", "PCX", "PIXAR", "PNG", "PPM"),
    *("PSD", "QOI", "RAW", "SGI", "SPIDER", "SUN", "TGA", "TIFF", "WEBP", "WMF", "XBM", "XPM"),
    "XVTHUMB",
)
"""Names that ``formats`` may list: those of Pillow 12 and 13, and HEIF, JXL (JPEG XL), RAW
(camera raw) and EPS, which are recognised by their signature whether or not they can be
decoded."""

MAX_PIXELS = 89_478_485
"""Pillow's ``Image.MAX_IMAGE_PIXELS``: a quarter of a GiB at three bytes a pixel."""

KeyProvider = Literal["auto", "keyring", "credential", "command", "file", "none"]
ProofChoice = Literal["auto", "lease", "rename", "sidecar", "quiet"]
WatchChoice = Literal["auto", "native", "poll"]
NotImageChoice = Literal["leave", "quarantine", "encrypt"]
UndecodableChoice = Literal["encrypt", "quarantine", "leave"]
VerifyChoice = Literal["device", "cached"]
RecoveryChoice = Literal["required", "declined"]

_MIB = 2**20
_MAX_WORKERS = 64
_MAX_RECIPIENTS = 6  # of an object's eight slots; the others are for the key, and for a new one
_MAX_AUTO_WORKERS = 4  # sealing is bound by the disk: more of them only wait for each other
_MIN_AUTO_WORKERS = 2  # one large picture must not hold up the small ones
_MOVE = "move:"
# Both halves become parts of file names where the store is a directory.
_KEY_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}/[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
_SHOWN = 60  # characters of a wrong value that a message repeats


class _RefusedValueError(ValueError):
    """A value that a validator does not accept; ``hint`` is the remedy."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class After:
    """What becomes of the plaintext once its object is committed.

    ``directory`` is where it is moved to, and None unless ``action`` is ``move``.
    """

    action: Literal["delete", "keep", "move"]
    directory: Path | None = None

    def __str__(self) -> str:
        """Return the text that the policy file has for it."""
        return self.action if self.directory is None else f"{_MOVE}{self.directory}"


def _read_version(value: object) -> int:
    # Neither true nor 1.0, both of which are equal to 1 in Python.
    if type(value) is not int or value != 1:
        raise _RefusedValueError("must be 1, the only version of the policy format", "write 1")
    return value


def _read_path(value: object) -> Path:
    if not isinstance(value, str) or not value:
        raise _RefusedValueError('must be an absolute path, such as "/srv/scans"')
    if "\0" in value:
        raise _RefusedValueError("must not contain a NUL character")
    if value.startswith("~"):
        raise _RefusedValueError(
            "must not begin with ~, since a service has no home directory",
            "write the path out in full, beginning with /",
        )
    if not os.path.isabs(value):
        raise _RefusedValueError(
            "must be an absolute path", "write it out in full, beginning with /"
        )
    if ".." in Path(value).parts:
        raise _RefusedValueError("must not contain ..", "write the directory it leads to")
    normal = os.path.normpath(value)
    # POSIX leaves the meaning of exactly two leading slashes open; on Linux it is that of one.
    return Path(normal[1:] if normal.startswith("//") else normal)


def _read_duration(value: object) -> float:
    if isinstance(value, str):
        return parse_duration(value)
    if isinstance(value, int) and not isinstance(value, bool):
        raise _RefusedValueError(f"{value} has no unit", f'write "{value}s" for seconds')
    raise _RefusedValueError('must be a duration, such as "2s"')


def _read_size(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str):
        return parse_size(value)
    raise _RefusedValueError('must be a size, such as "10MB" or "1GiB"')


def _read_reserve(value: object) -> Reserve:
    if isinstance(value, str):
        return parse_share_or_size(value)
    return Reserve(0.0, _read_size(value))


def _read_after(value: object) -> After:
    if value == "delete":
        return After("delete")
    if value == "keep":
        return After("keep")
    if isinstance(value, str) and value.startswith(_MOVE):
        return After("move", _read_path(value.removeprefix(_MOVE)))
    raise _RefusedValueError('must be delete, keep or move:DIR, such as "move:/srv/originals"')


def _read_words(value: object) -> tuple[str, ...]:
    # The words are not repeated in the message: a command line may hold what is not for logs.
    if isinstance(value, list) and value and all(map(_is_word, value)):
        return tuple(value)
    raise _RefusedValueError(
        'must be a list of words, the program first, such as ["pass", "show", "vault-key"]'
    )


def _is_word(value: object) -> bool:
    return isinstance(value, str) and bool(value) and "\0" not in value


def _read_globs(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise _RefusedValueError('must be a list of patterns, such as ["*.jpg", "scans/*"]')
    for glob in value:
        _check_glob(glob)
    return tuple(value)


def _check_filled(value: object) -> object:
    if value in ([], {}):
        raise _RefusedValueError("must not be empty")
    return value


def _check_not_empty(globs: tuple[str, ...]) -> tuple[str, ...]:
    if not globs:
        raise _RefusedValueError("must not be empty, since nothing would be taken", 'write ["*"]')
    return globs


def _check_glob(glob: object) -> None:
    if not isinstance(glob, str) or not glob:
        raise _RefusedValueError("must hold patterns of text, none of them empty", "quote them")
    shown = f'the pattern "{display(glob)}"'
    if glob.startswith(("/", "./", "~/")):
        raise _RefusedValueError(
            f"{shown} can never match", "patterns are relative to the folder: remove what leads it"
        )
    if glob.endswith("/"):
        raise _RefusedValueError(
            f"{shown} can never match", f'write "{display(glob)}*" for what is in that directory'
        )


def _read_formats(value: object) -> tuple[str, ...] | Literal["any"]:
    if value == "any":
        return "any"
    if not isinstance(value, list) or not value:
        raise _RefusedValueError("must be any, or a list of formats such as [JPEG, PNG, TIFF]")
    for name in value:
        if name not in FORMATS:
            raise _RefusedValueError(f'"{_clipped(name)}" is no known format', _format_hint(name))
    # A camera's JPEG with a second view or a gain map in it is what Pillow calls MPO; whoever
    # lists JPEG must not find those left in clear.
    implied = ("MPO",) if "JPEG" in value else ()
    return tuple(dict.fromkeys((*value, *implied)))


def _written_formats(formats: tuple[str, ...] | Literal["any"]) -> str | list[str]:
    return formats if isinstance(formats, str) else list(formats)


def _format_hint(name: object) -> str:
    if name == "any":
        return "write any alone, without a list"
    aliases = {"JPG": "JPEG", "TIF": "TIFF", "HEIC": "HEIF", "JP2": "JPEG2000", "DNG": "RAW"}
    upper = str(name).upper()
    return _suggestion(aliases.get(upper, upper), FORMATS) or "the JSON schema lists all of them"


def _read_workers(value: object) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    if type(value) is int and 1 <= value <= _MAX_WORKERS:
        return value
    raise _RefusedValueError(f"must be auto, or a whole number from 1 to {_MAX_WORKERS}")


def _read_sidecar(value: object) -> str:
    if isinstance(value, str) and value.strip() and not set(value) & {"/", "\0", "*", "?"}:
        return value
    raise _RefusedValueError(
        'must be the end of a file name such as ".done", without slashes and wildcards'
    )


def _read_recipients(value: object) -> tuple[Recipient, ...]:
    if not isinstance(value, list):
        raise _RefusedValueError(
            "must be a list of public keys", f'write "recipients: [{RECIPIENT_PREFIX}...]"'
        )
    if len(value) > _MAX_RECIPIENTS:
        raise _RefusedValueError(f"must hold at most {_MAX_RECIPIENTS} public keys")
    found: dict[bytes, Recipient] = {}
    for place, text in enumerate(value, 1):
        try:
            recipient = parse_recipient(text if isinstance(text, str) else "")
        except UsageError as error:
            raise _RefusedValueError(f"entry {place}: {error}", error.hint) from error
        if recipient.key_id in found:
            raise _RefusedValueError(f"entry {place} is there twice", "remove one of the two")
        found[recipient.key_id] = recipient
    return tuple(found.values())


def _written_recipients(recipients: tuple[Recipient, ...]) -> list[str]:
    return [format_recipient(each) for each in recipients]


def _read_key_name(value: object) -> str:
    if isinstance(value, str) and re.fullmatch(_KEY_NAME, value):
        return value
    raise _RefusedValueError(
        'must be SERVICE/USERNAME, such as "secimg-watch/main"',
        "write letters, digits, dots, dashes and underscores, and one slash",
    )


def _without_default(schema: dict[str, Any]) -> None:
    schema.pop("default")


def _at_least(least: float) -> AfterValidator:
    def check(seconds: float) -> float:
        if seconds < least:
            raise _RefusedValueError(f"must be at least {exact_duration(least)}")
        return seconds

    return AfterValidator(check)


def _at_least_bytes(least: int) -> AfterValidator:
    def check(size: int) -> int:
        if size < least:
            raise _RefusedValueError(f"must be at least {exact_size(least)}")
        return size

    return AfterValidator(check)


_SIZE_SCHEMAS = [{"type": "string", "pattern": SIZE_PATTERN}, {"type": "integer", "minimum": 0}]

AbsolutePath = Annotated[
    Path,
    PlainValidator(_read_path),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string", "pattern": "^/"}),
]
Duration = Annotated[
    float,
    PlainValidator(_read_duration),
    PlainSerializer(exact_duration, return_type=str),
    WithJsonSchema({"type": "string", "pattern": DURATION_PATTERN}),
]
Size = Annotated[
    int,
    PlainValidator(_read_size),
    PlainSerializer(exact_size, return_type=str),
    WithJsonSchema({"anyOf": _SIZE_SCHEMAS}),
]
Globs = Annotated[
    tuple[str, ...],
    PlainValidator(_read_globs),
    PlainSerializer(list, return_type=list[str]),
    WithJsonSchema({"type": "array", "items": {"type": "string", "pattern": "^[^/](.*[^/])?$"}}),
]
VaultName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Vault(_Model):
    """A directory of sealed objects."""

    path: AbsolutePath = Field(description="Absolute path of the vault's directory.")
    min_free: Annotated[
        Reserve,
        PlainValidator(_read_reserve),
        PlainSerializer(exact_reserve, return_type=str),
        WithJsonSchema({"anyOf": [{"type": "string", "pattern": SHARE_PATTERN}, *_SIZE_SCHEMAS]}),
    ] = Field(
        default=Reserve(0.02, 0),
        description="Space of the file system that is left free: a share, or a size.",
    )


class Key(_Model):
    """Where the key-encryption key comes from."""

    provider: KeyProvider = Field(
        default="auto",
        description="auto picks by where the program runs: a systemd credential in a service, "
        "the keyring in a person's session. none: a write-only vault, which only the "
        "recipients can open.",
    )
    name: Annotated[
        str,
        PlainValidator(_read_key_name),
        WithJsonSchema({"type": "string", "pattern": _KEY_NAME}),
    ] = Field(
        default="secimg-watch/main", description="The key's name in its store: SERVICE/USERNAME."
    )
    file: AbsolutePath | None = Field(
        default=None,
        description="The key's file (mode 0400). With the provider file, and only then.",
    )
    command: (
        Annotated[
            tuple[str, ...],
            PlainValidator(_read_words),
            PlainSerializer(list, return_type=list[str]),
            WithJsonSchema(
                {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}}
            ),
        ]
        | None
    ) = Field(
        default=None,
        description="Program and arguments that print the key; no shell is involved. "
        "With the provider command, and only then.",
    )


class Folder(_Model):
    """A watched folder, and what is done with what arrives in it."""

    path: AbsolutePath = Field(description="Absolute path of the folder to watch.")
    vault: str = Field(
        default="",
        description="Name of the vault to seal into. May be left out where there is only one.",
        json_schema_extra=_without_default,
    )
    recursive: bool = Field(default=True, description="Whether directories below are watched.")
    include: Annotated[Globs, AfterValidator(_check_not_empty)] = Field(
        default=("*",),
        description="Patterns of what is taken, matched against the path below the folder and "
        "against the name alone; * matches slashes too. Temporary names are never taken.",
    )
    exclude: Globs = Field(default=(), description="Patterns of what is left, of the same kind.")
    formats: Annotated[
        tuple[str, ...] | Literal["any"],
        PlainValidator(_read_formats),
        PlainSerializer(_written_formats, return_type=str | list[str]),
        WithJsonSchema(
            {
                "anyOf": [
                    {"const": "any"},
                    {"type": "array", "minItems": 1, "items": {"enum": list(FORMATS)}},
                ]
            }
        ),
    ] = Field(
        default="any", description="The picture formats to take: any, or a list. JPEG includes MPO."
    )
    settle: Duration = Field(
        default=2.0, description="Time without a change before a file counts as complete."
    )
    proof: ProofChoice = Field(
        default="auto",
        description="What proves that the producer is done. auto takes the strongest proof there "
        "is; lease: nobody has the file open; rename: it came by a rename; sidecar: a marker "
        "file lies beside it; quiet: it has not changed for long.",
    )
    sidecar: Annotated[
        str,
        PlainValidator(_read_sidecar),
        WithJsonSchema({"type": "string", "pattern": "^[^/*?]+$"}),
    ] = Field(default=".done", description="What a marker file's name adds to the picture's.")
    watch: WatchChoice = Field(
        default="auto", description="native: by events; poll: by scanning, as shares need it."
    )
    poll: Annotated[Duration, _at_least(0.1)] = Field(
        default=10.0, description="Time between two scans where the folder is polled."
    )
    rescan: Annotated[Duration, _at_least(1.0)] = Field(
        default=300.0, description="Time between two scans for what events did not report."
    )
    staging: AbsolutePath | None = Field(
        default=None,
        description="Directory for files in hand, on the folder's file system. By default it is "
        ".secimg-watch within the folder.",
    )
    not_image: NotImageChoice = Field(
        default="leave", description="What is done with a file that is no picture."
    )
    undecodable: UndecodableChoice = Field(
        default="encrypt", description="What is done with a picture that cannot be decoded."
    )
    after: Annotated[
        After,
        PlainValidator(_read_after),
        PlainSerializer(str, return_type=str),
        WithJsonSchema({"type": "string", "pattern": "^(delete|keep|move:/.*)$"}),
    ] = Field(
        default=After("delete"),
        description="What is done with the plaintext once it is sealed and verified.",
    )
    preview: Annotated[int, Field(ge=0, le=1024)] = Field(
        default=256, description="Longest side in pixels of the encrypted preview; 0: none."
    )


class Limits(_Model):
    """Bounds on what one picture may cost."""

    attempts: Annotated[int, Field(ge=1, le=100)] = Field(
        default=5, description="Failures before a picture goes into quarantine."
    )
    decode_seconds: Annotated[int, Field(ge=1, le=600)] = Field(
        default=20, description="Seconds that decoding one picture may take."
    )
    decode_pixels: Annotated[int, Field(ge=1, le=2**32)] = Field(
        default=MAX_PIXELS,
        description="Pixels of the largest picture that is decoded. The default is Pillow's.",
    )
    decode_memory: Annotated[Size, _at_least_bytes(64 * _MIB)] = Field(
        default=1024 * _MIB, description="Memory that decoding one picture may take."
    )
    decode_file: Size = Field(
        default=512 * _MIB, description="Larger files are sealed without being decoded."
    )


class Policy(_Model):
    """A whole policy file. Made by ``load_policy`` and ``parse_policy``, which check it."""

    version: Annotated[
        int, PlainValidator(_read_version), WithJsonSchema({"const": 1, "type": "integer"})
    ] = Field(description="Version of the policy format.")
    state: AbsolutePath = Field(description="Absolute path of the directory for queue and status.")
    log_names: bool = Field(default=False, description="Whether logs may contain file names.")
    vaults: Annotated[dict[VaultName, Vault], BeforeValidator(_check_filled)] = Field(
        description="The vaults by name.",
        json_schema_extra={"minProperties": 1, "additionalProperties": False},
    )
    key: Key = Field(default=Key(), description="Where the key-encryption key comes from.")
    recipients: Annotated[
        tuple[Recipient, ...],
        PlainValidator(_read_recipients),
        PlainSerializer(_written_recipients, return_type=list[str]),
        WithJsonSchema(
            {
                "type": "array",
                "maxItems": _MAX_RECIPIENTS,
                "items": {
                    "type": "string",
                    "pattern": f"^{RECIPIENT_PREFIX}[A-Za-z0-9_-]{{1627}}$",
                },
            }
        ),
    ] = Field(default=(), description="Public keys that can open every new object.")
    recovery: RecoveryChoice = Field(
        default="required",
        description="required: nothing is deleted before the private key of a recipient was "
        "shown; declined: losing the key may lose the pictures, and that is accepted.",
    )
    folders: Annotated[tuple[Folder, ...], Field(strict=False), BeforeValidator(_check_filled)] = (
        Field(description="The watched folders.", json_schema_extra={"minItems": 1})
    )
    verify: VerifyChoice = Field(
        default="device",
        description="device: drop the page cache before an object is read back; cached: do not.",
    )
    workers: Annotated[
        int | Literal["auto"],
        PlainValidator(_read_workers),
        WithJsonSchema(
            {
                "anyOf": [
                    {"const": "auto"},
                    {"type": "integer", "minimum": 1, "maximum": _MAX_WORKERS},
                ]
            }
        ),
    ] = Field(default="auto", description="Pictures sealed at the same time.")
    limits: Limits = Field(default=Limits(), description="Bounds on what one picture may cost.")

    @property
    def deleting_vaults(self) -> frozenset[str]:
        """Names of the vaults for whose folders plaintext is deleted."""
        return frozenset(f.vault for f in self.folders if f.after.action == "delete")

    @property
    def worker_count(self) -> int:
        """Number of pictures sealed at the same time."""
        if self.workers == "auto":
            return max(_MIN_AUTO_WORKERS, min(_MAX_AUTO_WORKERS, os.cpu_count() or 1))
        return self.workers


def schema() -> dict[str, Any]:
    """Return the JSON schema of a policy file, for editors that check while one types."""
    dialect = {"$schema": GenerateJsonSchema.schema_dialect}
    return dialect | Policy.model_json_schema(mode="serialization")


def load_policy(path: Path) -> Policy:
    """Read and check the policy file at ``path``.

    Raises:
        NoInputError: there is no such file.
        NotAllowedError: it may not be read.
        StorageError: the operating system failed the read.
        PolicyError: the file has faults; all of them are listed.
    """
    shown = display(str(path))
    try:
        with path.open("rb") as file:
            # Four bytes are the most that a character takes in UTF-8.
            raw = file.read(4 * MAX_TEXT + 1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise NoInputError(
            f"there is no policy file {shown}",
            hint="name another one with --policy, or make one: secimg-watch init",
        ) from None
    except PermissionError:
        raise NotAllowedError(
            f"the policy file {shown} may not be read", hint="run as its owner, or change its mode"
        ) from None
    except OSError as error:
        raise StorageError(f"the policy file {shown} cannot be read: {error.strerror}") from error
    return parse_policy(_decoded(raw, str(path)), str(path))


def parse_policy(text: str, filename: str) -> Policy:
    """Check a policy file's text. ``filename`` appears in messages only.

    Raises:
        PolicyError: ``faults`` lists every fault as ``FILE:LINE:COLUMN: what; hint``.
    """
    document = load(text, filename)
    data = _with_only_vault(document.data)
    found = list(_findings(data, document))
    policy = None
    try:
        policy = Policy.model_validate(data)
    except ValidationError as error:
        found += [_translated(detail) for detail in error.errors(include_url=False)]
    faults = [*document.faults, *(_fault(document, finding) for finding in found)]
    if policy is None or faults:
        raise refusal(filename, faults)
    return policy


def _decoded(raw: bytes, filename: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode()
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        fault = Fault(line, column, "the file is not UTF-8 text", "save it as UTF-8")
        raise refusal(filename, [fault]) from None


class _Finding(NamedTuple):
    """A fault whose place is still a path into the data."""

    location: Location
    what: str
    hint: str = ""
    at_key: bool = False


class _Place(NamedTuple):
    """A directory that the policy names, as written and with symbolic links resolved."""

    location: Location
    role: str
    path: str
    real: str


_FOLDER = "folder"
_VAULT = "vault"
_STATE = "state directory"
_STAGING = "staging directory"
_TARGET = "move target"


def _fault(document: Document, finding: _Finding) -> Fault:
    line, column = document.position(finding.location, key=finding.at_key)
    return Fault(line, column, finding.what, finding.hint)


def _with_only_vault(data: Any) -> Any:
    """Name the only vault in every folder that names none."""
    vaults = _mapping(data, "vaults")
    if len(vaults) != 1 or not isinstance(data.get("folders"), list):
        return data
    default = {"vault": next(iter(vaults))}
    folders = [default | item if isinstance(item, dict) else item for item in data["folders"]]
    return data | {"folders": folders}


def _findings(data: Any, document: Document) -> Iterator[_Finding]:
    """Find what is wrong between values, in data that may have other faults as well."""
    yield from _key_findings(_mapping(data, "key"))
    if _mapping(data, "key").get("provider") == "none" and not data.get("recipients"):
        what = "key.provider: with none, nobody could open what is sealed to no recipient"
        yield _Finding(("key", "provider"), what, 'add "recipients: [...]", or another provider')
    vaults = _mapping(data, "vaults")
    for index, folder in _folders(data):
        yield from _vault_findings(index, folder, vaults)
    yield from _place_findings(list(_places(data)), document)


def _mapping(data: Any, key: str) -> dict[str, Any]:
    value = data.get(key) if isinstance(data, dict) else None
    return value if isinstance(value, dict) else {}


def _folders(data: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    items = data.get("folders") if isinstance(data, dict) else None
    if isinstance(items, list):
        yield from ((index, item) for index, item in enumerate(items) if isinstance(item, dict))


def _key_findings(key: dict[str, Any]) -> Iterator[_Finding]:
    provider = key.get("provider", "auto")
    if provider not in get_args(KeyProvider):
        return
    for name in ("file", "command"):
        given = key.get(name) is not None
        if given and provider != name:
            what = f"key.{name}: has no effect with the provider {provider}"
            yield _Finding(
                ("key", name), what, f'remove it, or write "provider: {name}"', at_key=True
            )
        if provider == name and not given:
            what = f"key.provider: {name} needs the key {name} beside it"
            yield _Finding(("key", "provider"), what, f'add "{name}: ..."')


def _vault_findings(
    index: int, folder: dict[str, Any], vaults: dict[str, Any]
) -> Iterator[_Finding]:
    name = folder.get("vault")
    known = ", ".join(map(display, vaults))
    if name is None and "vault" not in folder and len(vaults) > 1:
        what = f"folders[{index}]: does not say which vault to seal into"
        yield _Finding(("folders", index), what, f'add "vault: NAME", one of {known}')
    if isinstance(name, str) and vaults and name not in vaults:
        what = f'folders[{index}].vault: there is no vault "{_clipped(name)}"'
        hint = _suggestion(name, list(vaults)) or f"known: {known}"
        yield _Finding(("folders", index, "vault"), what, hint)


def _places(data: Any) -> Iterator[_Place]:
    if isinstance(data, dict):
        yield from _place(("state",), _STATE, data.get("state"))
    for name, vault in _mapping(data, "vaults").items():
        if isinstance(vault, dict):
            yield from _place(("vaults", name, "path"), _VAULT, vault.get("path"))
    for index, folder in _folders(data):
        yield from _place(("folders", index, "path"), _FOLDER, folder.get("path"))
        yield from _place(("folders", index, "staging"), _STAGING, folder.get("staging"))
        after = folder.get("after")
        if isinstance(after, str) and after.startswith(_MOVE):
            yield from _place(("folders", index, "after"), _TARGET, after.removeprefix(_MOVE))


def _place(location: Location, role: str, value: object) -> Iterator[_Place]:
    try:
        path = str(_read_path(value))
    except ValueError:
        return  # the models report it
    yield _Place(location, role, path, os.path.realpath(path))


def _place_findings(places: Sequence[_Place], document: Document) -> Iterator[_Finding]:
    for one, other in combinations(places, 2):
        as_written = _clash(one, other, one.path, other.path)
        found = as_written or _clash(one, other, one.real, other.real)
        if found:
            inner, outer, same = found
            line, _ = document.position(outer.location)
            relation = "is also" if same else "lies inside"
            what = (
                f"{_dotted(inner.location)}: the {inner.role} {display(inner.path)} {relation} "
                f"the {outer.role} {display(outer.path)} of line {line}"
            )
            link = "" if as_written else ", through a symbolic link"
            yield _Finding(inner.location, what + link, _overlap_hint(inner, outer, same=same))


def _clash(
    one: _Place, other: _Place, path: str, other_path: str
) -> tuple[_Place, _Place, bool] | None:
    """Return the inner place, the outer one, and whether they are the same, if that is a fault."""
    same = path == other_path
    if same or _is_inside(other_path, path):
        inner, outer = other, one
    elif _is_inside(path, other_path):
        inner, outer = one, other
    else:
        return None
    return None if _may_overlap(inner, outer, same=same) else (inner, outer, same)


def _is_inside(path: str, directory: str) -> bool:
    return path.startswith(directory.rstrip(os.sep) + os.sep)


def _may_overlap(inner: _Place, outer: _Place, *, same: bool) -> bool:
    if inner.role == outer.role == _TARGET:
        return True
    own = inner.location[:2] == outer.location[:2]
    return not same and (
        outer.role == _STATE or (inner.role == _STAGING and outer.role == _FOLDER and own)
    )


def _overlap_hint(inner: _Place, outer: _Place, *, same: bool) -> str:
    if inner.role == outer.role == _FOLDER:
        return "remove one of the two" if same else "watch only the outer one"
    return "choose a directory outside of it"


_EXAMPLES = {
    "version": "version: 1",
    "state": "state: /var/lib/secimg-watch",
    "vaults": "vaults: {main: {path: /srv/vault}}",
    "folders": "folders: [{path: /srv/scans}]",
    "path": "path: /DIRECTORY",
}
_MODELS: dict[str, type[_Model]] = {
    "": Policy,
    "key": Key,
    "limits": Limits,
    "vaults": Vault,
    "folders": Folder,
}
_SENTENCES = {
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping of keys to values",
    "model_type": "must be a mapping of keys to values",
}


def _translated(detail: ErrorDetails) -> _Finding:
    """Say in the words of a policy file what a validator found."""
    location, kind = detail["loc"], detail["type"]
    if kind == "missing":
        what = f'the key "{location[-1]}" is missing{_within(location[:-1])}'
        return _Finding(location, what, f'add "{_EXAMPLES[str(location[-1])]}"')
    if kind == "extra_forbidden":
        what = f'unknown key "{_clipped(location[-1])}"{_within(location[:-1])}'
        return _Finding(location, what, _key_hint(location), at_key=True)
    if kind == "string_pattern_mismatch":
        what = f'vaults: "{_clipped(location[1])}" is no name for a vault'
        hint = "write up to 64 letters, digits, dots, dashes and underscores"
        return _Finding(location[:2], what, hint, at_key=True)
    what, hint = _sentence(detail)
    return _Finding(location, f"{_dotted(location)}: {what}", hint)


def _sentence(detail: ErrorDetails) -> tuple[str, str]:
    context = detail.get("ctx", {})
    match detail["type"]:
        case "value_error":
            error = context["error"]
            return str(error), getattr(error, "hint", "")
        case "literal_error":
            choices = context["expected"].replace("'", "").replace(" or ", ", ").split(", ")
            return f"must be one of {', '.join(choices)}", _suggestion(detail["input"], choices)
        case "greater_than_equal":
            return f"must be at least {context['ge']}", ""
        case "less_than_equal":
            return f"must be at most {context['le']}", ""
        case kind:
            return _SENTENCES.get(kind, detail["msg"]), ""


def _key_hint(location: Location) -> str:
    """Suggest what an unknown key was meant to be, or where it belongs."""
    key = str(location[-1])
    homes = [
        name or "the top level" for name, model in _MODELS.items() if key in model.model_fields
    ]
    if homes:
        return f'"{key}" belongs under {" or ".join(homes)}'
    known = list(_MODELS[str(location[0]) if len(location) > 1 else ""].model_fields)
    return _suggestion(key, known) or f"known here: {', '.join(known)}"


def _suggestion(word: object, choices: Sequence[str]) -> str:
    close = get_close_matches(str(word), choices, n=1)
    return f'did you mean "{display(close[0])}"?' if close else ""


def _dotted(location: Location) -> str:
    steps = (f"[{step}]" if isinstance(step, int) else f".{_clipped(step)}" for step in location)
    return "".join(steps).removeprefix(".") or "the policy"


def _within(location: Location) -> str:
    return f" in {_dotted(location)}" if location else ""


def _clipped(value: object) -> str:
    text = str(value)
    return display(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
