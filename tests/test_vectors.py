"""The vectors of the format: made again byte for byte, and read as they say."""

from __future__ import annotations

import ast
import base64
import hashlib
import io
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, unquote_to_bytes

import make_vectors
import pytest

from secimg_watch import recipients, seal
from secimg_watch.cli.app import read_identities
from secimg_watch.errors import KeyMismatchError, TamperedError, UsageError
from secimg_watch.records import KeyEncryptionKey, ObjectId
from secimg_watch.slots import Password, PasswordCache, encode_password, key_check

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from secimg_watch.container import Meta
    from secimg_watch.records import PrivateKey
    from secimg_watch.slots import Opener

HOME: Final = Path(__file__).parent
VECTORS: Final = HOME / "vectors"
NAMES: Final = sorted(path.name for path in VECTORS.glob("*.vec"))
MADE: Final = [*NAMES, "texts.json"]
OTHER_FILES: Final = {"README.md", "encapsulations.txt", ".gitattributes"}

COUNT: Final = 499
FEWEST: Final = {
    "opened": 80,
    "malformed": 100,
    "mismatch": 8,
    "no-key": 15,
    "header": 75,
    "content": 180,
}

Entry = dict[str, str | list[str]]
TEXTS: Final[dict[str, list[Entry]]] = json.loads((VECTORS / "texts.json").read_bytes())
FEWEST_TEXTS: Final = {
    "recipients": 5,
    "refused-recipients": 36,
    "identities": 5,
    "typed-identities": 15,
    "refused-identities": 60,
    "identity-files": 13,
    "refused-identity-files": 20,
    "key-checks": 6,
}

CHUNK: Final = 16_384
PASSWORDS: Final = PasswordCache()
"""Shared by all tests here, so that each password costs one derivation."""


_identity = cache(recipients.parse_identity)


@dataclass(frozen=True)
class Vector:
    """One file: its head, a list of values for each key, and the object."""

    head: dict[str, list[str]]
    data: bytes

    def one(self, key: str) -> str:
        (value,) = self.head[key]
        return value

    def openers(self) -> list[Opener]:
        found: list[Opener] = []
        for text in self.head.get("key", ()):
            key_id, _, key = text.partition(":")
            found.append(KeyEncryptionKey(bytes.fromhex(key_id), bytes.fromhex(key)))
        typed = [unquote(text, errors="strict") for text in self.head.get("password", ())]
        found.extend(Password(encode_password(text)) for text in typed)
        found.extend(_identity(text) for text in self.head.get("identity", ()))
        return found

    def expected_object(self) -> ObjectId | None:
        return ObjectId(self.one("expect-object")) if "expect-object" in self.head else None

    def expected_vault(self) -> bytes | None:
        return bytes.fromhex(self.one("expect-vault")) if "expect-vault" in self.head else None


@cache
def load(name: str) -> Vector:
    text, _, data = (VECTORS / name).read_bytes().partition(b"\n\n")
    head: dict[str, list[str]] = {}
    for line in text.decode("ascii").split("\n"):
        key, separator, value = line.partition(": ")
        assert separator
        head.setdefault(key, []).append(value)
    return Vector(head, data)


def accepted(kind: str, read: Callable[[str], object]) -> list[str]:
    """Return why they should be refused, of the texts that ``read`` takes nevertheless."""
    found = []
    for entry in TEXTS[kind]:
        try:
            read(str(entry["text"]))
        except UsageError:
            continue
        found.append(str(entry["reason"]))
    return found


def from_file(directory: Path, text: str) -> tuple[PrivateKey, ...]:
    (directory / "identities").write_bytes(text.encode())
    return read_identities(directory / "identities")


@dataclass
class Result:
    """What came of reading a vector."""

    outcome: str
    meta: Meta | None = None
    preview: bytes = b""
    released: bytes = b""


def open_object(vector: Vector, openers: list[Opener]) -> seal.OpenedObject:
    return seal.open_object(
        io.BytesIO(vector.data),
        openers,
        expect=vector.expected_object(),
        vault_id=vector.expected_vault(),
        passwords=PASSWORDS,
    )


def read(vector: Vector) -> Result:
    """Read a vector stage by stage, to learn which one refuses it."""
    try:
        header = seal.read_header(io.BytesIO(vector.data))
    except TamperedError:
        return Result("malformed")
    try:
        open_object(vector, [])
    except TamperedError:
        return Result("mismatch")
    except KeyMismatchError:
        pass  # without a key nothing but structure and ids is looked at
    try:
        seal.open_header(header, vector.openers(), PASSWORDS)
    except KeyMismatchError:
        return Result("no-key")
    except TamperedError:
        return Result("header")
    result = Result("content")
    try:
        for piece in whole(vector, result):
            result.released += piece
    except TamperedError:
        return result
    result.outcome = "opened"
    return result


def whole(vector: Vector, result: Result) -> Iterator[memoryview]:
    """Open a vector as any caller does; META and preview go into ``result``."""
    opened = open_object(vector, vector.openers())
    result.meta = opened.meta
    result.preview = opened.preview()
    yield from opened.body()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def check_meta(vector: Vector, meta: Meta) -> None:
    for name in ("size", "mtime_ns", "mode", "width", "height", "ingested_ns"):
        assert getattr(meta, name) == int(vector.one(name)), name
    for name in ("name", "folder"):
        assert getattr(meta, name) == unquote_to_bytes(vector.one(name)), name
    for name in ("format", "label", "source", "proof", "tool"):
        value = getattr(meta, name).encode("utf-8", "surrogateescape")
        assert value == unquote_to_bytes(vector.one(name)), name


def check(vector: Vector, result: Result) -> None:
    assert result.outcome == vector.one("expect"), vector.one("comment")
    if result.outcome == "opened":
        assert result.meta is not None
        check_meta(vector, result.meta)
        assert sha256(result.preview) == vector.one("preview-sha256")
        assert sha256(result.released) == vector.one("body-sha256")
    elif result.outcome == "content":
        # Whole authentic chunks from the first one on, and not necessarily all of them.
        count, rest = divmod(len(result.released), CHUNK)
        assert rest == 0
        assert sha256(result.released) == vector.head["released-sha256"][count]
    else:
        assert not result.released


def check_error(vector: Vector) -> None:
    """Check that a caller sees one error for every failure, but for a key that is missing."""
    error = KeyMismatchError if vector.one("expect") == "no-key" else TamperedError
    with pytest.raises(error) as caught:
        list(whole(vector, Result("content")))
    assert type(caught.value) is error


@pytest.mark.parametrize("name", NAMES)
def test_a_vector_is_read_as_it_says(name: str) -> None:
    vector = load(name)
    check(vector, read(vector))
    if vector.one("expect") != "opened":
        check_error(vector)


@pytest.mark.parametrize("name", [name for name in NAMES if len(load(name).data) > CHUNK])
def test_what_comes_out_before_a_failure_is_authentic(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In pieces of the size as built, a vector's whole body fits into one, and nothing of it is
    # released before a failure. In small ones it is.
    monkeypatch.setattr(seal, "PIECE", 1_000)
    vector = load(name)
    check(vector, read(vector))


def test_chunks_before_a_damaged_one_are_released(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal, "PIECE", 1_000)
    assert len(read(load("damaged-body-last-chunk.vec")).released) == CHUNK


def test_the_vectors_are_made_again_byte_for_byte(tmp_path: Path) -> None:
    make_vectors.main(str(tmp_path))
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    kept = {name: (VECTORS / name).read_bytes() for name in MADE}
    assert made.keys() == kept.keys()
    assert [name for name in MADE if made[name] != kept[name]] == []
    assert {path.name for path in VECTORS.iterdir()} == {*MADE, *OTHER_FILES}


def test_there_are_vectors_of_every_class() -> None:
    outcomes = [load(name).one("expect") for name in NAMES]
    counts = {outcome: outcomes.count(outcome) for outcome in set(outcomes)}
    assert len(NAMES) == COUNT
    assert counts.keys() == FEWEST.keys()
    assert all(counts[outcome] >= fewest for outcome, fewest in FEWEST.items()), counts


def test_there_are_texts_of_every_kind() -> None:
    assert TEXTS.keys() == FEWEST_TEXTS.keys()
    counts = {kind: len(entries) for kind, entries in TEXTS.items()}
    assert all(counts[kind] >= fewest for kind, fewest in FEWEST_TEXTS.items()), counts
    for entries in TEXTS.values():
        shown = [json.dumps(entry) for entry in entries]
        assert len(set(shown)) == len(shown)


def test_recipients_are_read_and_written_as_published() -> None:
    for entry in TEXTS["recipients"]:
        recipient = recipients.parse_recipient(str(entry["text"]))
        assert recipient.key_id.hex() == entry["recipient-id"]
        assert sha256(recipient.public_key) == entry["public-key-sha256"]
        assert recipients.format_recipient(recipient) == entry["text"]


def test_identities_are_read_and_written_as_published() -> None:
    for entry in TEXTS["identities"]:
        identity = recipients.parse_identity(str(entry["text"]))
        assert identity.seed.hex() == entry["seed"]
        assert recipients.format_identity(identity) == entry["text"]
        recipient = recipients.recipient_of(identity)
        assert recipients.format_recipient(recipient) == entry["recipient"]


def test_identities_are_put_right_as_published() -> None:
    for entry in TEXTS["typed-identities"]:
        identity = recipients.parse_identity(str(entry["text"]))
        assert recipients.format_identity(identity) == entry["canonical"]


def test_identity_files_are_read_as_published(tmp_path: Path) -> None:
    for entry in TEXTS["identity-files"]:
        text = str(entry["text"])
        found = from_file(tmp_path, text)
        assert [identity.seed.hex() for identity in found] == entry["seeds"], entry["comment"]
        assert recipients.parse_identity_file(text) == found


def test_what_is_no_recipient_is_refused() -> None:
    assert accepted("refused-recipients", recipients.parse_recipient) == []


def test_what_is_no_identity_is_refused() -> None:
    assert accepted("refused-identities", recipients.parse_identity) == []


def test_what_is_no_identity_file_is_refused(tmp_path: Path) -> None:
    assert accepted("refused-identity-files", lambda text: from_file(tmp_path, text)) == []
    assert accepted("refused-identity-files", recipients.parse_identity_file) == []


def test_key_checks_are_made_as_published() -> None:
    for entry in TEXTS["key-checks"]:
        names = ("key-id", "key", "vault-id")
        key_id, key, vault_id = (bytes.fromhex(str(entry[name])) for name in names)
        check = key_check(KeyEncryptionKey(key_id, key), vault_id)
        assert base64.b64encode(check).decode() == entry["check"]


@pytest.mark.parametrize("program", ["by_hand.py", "make_vectors.py"])
def test_the_vectors_are_made_without_the_package(program: str) -> None:
    tree = ast.parse((HOME / program).read_bytes())
    names = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    shared = ("secimg_watch", "cryptography.cobblestone", "cryptography.hazmat.primitives.hpke")
    assert not [name for name in names if name.startswith(shared)]
