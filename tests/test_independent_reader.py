"""The reader that knows nothing but docs/format.md: every vector, and what the package seals."""

from __future__ import annotations

import io
import json
import unicodedata
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from independent_hpke import (
    id_of,
    key_pair,
    public_key_of,
    put_right,
    recipient_id,
    seed_of,
    seeds_in,
)
from independent_reader import FIELDS, Meta, RefusedError, Secrets, expand, read_object

from secimg_watch import container, seal
from secimg_watch.records import KeyEncryptionKey, ObjectId, Recipient
from secimg_watch.slots import Password

if TYPE_CHECKING:
    from collections.abc import Callable

    from secimg_watch.slots import Lock

HOME = Path(__file__).parent / "vectors"
VECTORS = sorted(HOME.glob("*.vec"))
NOTHING = sha256().hexdigest()

Entry = dict[str, str | list[str]]
TEXTS: dict[str, list[Entry]] = json.loads((HOME / "texts.json").read_bytes())

KEY = KeyEncryptionKey(b"k" * 16, bytes(range(32)))
SEED = bytes(range(100, 132))
RECIPIENT = Recipient(recipient_id(SEED), key_pair(SEED)[2])
PASSWORD = Password(b"correct horse", kdf="pbkdf2", iterations=100_000)
BY_NAME = Secrets({KEY.key_id: KEY.key}, {RECIPIENT.key_id: SEED}, None)
SECRETS: dict[Lock, Secrets] = {
    KEY: BY_NAME._replace(seeds={}),
    RECIPIENT: BY_NAME._replace(keys={}),
    PASSWORD: Secrets({}, {}, PASSWORD.secret),
}
OBJECT, VAULT = ObjectId("0123456789abcdef" * 2), b"v" * 16


class Vector(NamedTuple):
    values: dict[str, list[str]]
    data: bytes

    def one(self, name: str) -> str | None:
        (value,) = self.values.get(name, [None])
        return value


def load(path: Path) -> Vector:
    """Read one vector by the rules of vectors/README.md."""
    head, _, data = path.read_bytes().partition(b"\n\n")
    values: dict[str, list[str]] = {}
    for line in head.decode("ascii").split("\n"):
        name, _, value = line.partition(": ")
        values.setdefault(name, []).append(value)
    return Vector(values, data)


def secrets_of(vector: Vector) -> Secrets:
    pairs = [value.split(":") for value in vector.values.get("key", [])]
    keys = {bytes.fromhex(key_id): bytes.fromhex(key) for key_id, key in pairs}
    seeds = [seed_of(text) for text in vector.values.get("identity", [])]
    password = vector.one("password")
    if password is not None:
        password = unicodedata.normalize("NFC", unquote_to_bytes(password).decode())
    return Secrets(
        keys=keys,
        seeds={recipient_id(seed): seed for seed in seeds},
        password=None if password is None else password.encode(),
    )


def expected_meta(vector: Vector) -> Meta:
    meta: Meta = {}
    for name in FIELDS.values():
        (text,) = vector.values[name]
        raw = unquote_to_bytes(text)
        if name in {"size", "mtime_ns", "mode", "width", "height", "ingested_ns"}:
            meta[name] = int(text)
        else:
            meta[name] = raw if name in {"name", "folder", "source"} else raw.decode("ascii")
    return meta


def attempt(vector: Vector) -> tuple[Meta, bytes | None, bytes] | RefusedError:
    object_id, vault_id = vector.one("expect-object"), vector.one("expect-vault")
    try:
        return read_object(
            vector.data,
            secrets_of(vector),
            None if object_id is None else bytes.fromhex(object_id),
            None if vault_id is None else bytes.fromhex(vault_id),
        )
    except RefusedError as failure:
        return failure


def test_there_are_vectors_of_every_outcome() -> None:
    outcomes = {load(path).one("expect") for path in VECTORS}
    assert outcomes == {"opened", "malformed", "mismatch", "no-key", "header", "content"}


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_the_text_alone_leads_to_what_the_vector_says(path: Path) -> None:
    vector = load(path)
    result = attempt(vector)
    if isinstance(result, RefusedError):
        assert result.outcome == vector.one("expect")
        # This reader holds nothing back, and so stands at the last of what may be released.
        ends = range(0, len(result.released) + 1, 16_384)
        released = [sha256(result.released[:end]).hexdigest() for end in ends]
        assert released == vector.values.get("released-sha256", [NOTHING])
    else:
        meta, preview, payload = result
        assert vector.one("expect") == "opened"
        assert meta == expected_meta(vector)
        assert sha256(preview or b"").hexdigest() == vector.one("preview-sha256")
        assert sha256(payload).hexdigest() == vector.one("body-sha256")


# -- what the package seals --------------------------------------------------------------------


def sealed(body: bytes, preview: bytes, locks: list[Lock]) -> bytes:
    meta = container.Meta(
        name=b"caf\xe9.jpg",
        folder=b"2026/harbour",
        size=len(body),
        mtime_ns=-1,
        mode=0o640,
        format="JPEG",
        width=4_032,
        height=3_024,
        label="image",
        source="/srv/camera",
        proof="closed after writing",
        ingested_ns=1_767_225_601_000_000_001,
        tool="secimg-watch",
    )
    found = seal.seal_object(
        object_id=OBJECT,
        vault_id=VAULT,
        locks=locks,
        meta=meta,
        preview=preview,
        read=io.BytesIO(body).readinto,
    )
    return b"".join(bytes(piece) for piece in found.chunks())


def check_sealed(body: bytes, preview: bytes, locks: list[Lock]) -> None:
    """Check that each lock alone opens what was sealed with all of them."""
    data = sealed(body, preview, locks)
    for lock in locks:
        found = read_object(data, SECRETS[lock], bytes.fromhex(str(OBJECT)), VAULT)
        meta, opened_preview, opened_body = found
        assert (opened_preview or b"", sha256(opened_body).digest()) == (
            preview,
            sha256(body).digest(),
        )
        assert meta == {
            "name": b"caf\xe9.jpg",
            "folder": b"2026/harbour",
            "size": len(body),
            "mtime_ns": -1,
            "mode": 0o640,
            "format": "JPEG",
            "width": 4_032,
            "height": 3_024,
            "label": "image",
            "source": b"/srv/camera",
            "proof": "closed after writing",
            "ingested_ns": 1_767_225_601_000_000_001,
            "tool": "secimg-watch",
        }


SIZES = st.integers(0, 40_000)


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, st.sampled_from([[KEY], [RECIPIENT], [KEY, RECIPIENT], [RECIPIENT, KEY]]))
@example(0, 0, [KEY])
@example(16_383, 16_384, [KEY])
@example(16_384, 16_383, [RECIPIENT])
@example(16_385, 32_768, [KEY])
@example(32_768, 1, [KEY])
def test_what_the_package_seals_opens_by_the_text_alone(
    size: int, preview_size: int, locks: list[Lock]
) -> None:
    noise = (KEY.key * 1_251)[:40_001]
    check_sealed(noise[:size], noise[1 : preview_size + 1], locks)


def test_what_the_package_seals_with_a_password_opens_by_the_text_alone() -> None:
    check_sealed(b"the bytes of a picture", b"", [PASSWORD])


def test_numbers_of_chunks_past_one_byte_open_by_the_text_alone() -> None:
    body = b"".join(number.to_bytes(4, "big") for number in range(257 * 4_096)) + b"12345"
    assert len(body) == 257 * 16_384 + 5
    check_sealed(body, b"", [KEY])


# -- texts -------------------------------------------------------------------------------------


def accepted(kind: str, read: Callable[[str], object]) -> list[Entry]:
    """Return what is read without an error of the texts that have to be refused."""
    found = []
    for entry in TEXTS[kind]:
        try:
            read(str(entry["text"]))
        except ValueError:
            continue
        found.append(entry)
    return found


def test_texts_lead_to_the_keys_that_are_published_with_them() -> None:
    for entry in TEXTS["recipients"]:
        public = public_key_of(str(entry["text"]))
        assert id_of(public).hex() == entry["recipient-id"]
        assert sha256(public).hexdigest() == entry["public-key-sha256"]
    for entry in TEXTS["identities"]:
        seed = seed_of(str(entry["text"]))
        assert seed.hex() == entry["seed"]
        assert key_pair(seed)[2] == public_key_of(str(entry["recipient"]))
    for entry in TEXTS["typed-identities"]:
        assert put_right(str(entry["text"])) == entry["canonical"]
    for entry in TEXTS["identity-files"]:
        seeds = seeds_in(str(entry["text"]).encode())
        assert [seed.hex() for seed in seeds] == entry["seeds"]


def test_the_text_alone_refuses_what_is_no_key_and_no_file_of_keys() -> None:
    assert accepted("refused-recipients", public_key_of) == []
    assert accepted("refused-identities", lambda text: seed_of(put_right(text))) == []
    assert accepted("refused-identity-files", lambda text: seeds_in(text.encode())) == []
    # Exactly the one form is an identity, before anything is put right.
    assert accepted("refused-identities", seed_of) == []
    assert accepted("typed-identities", seed_of) == []


def test_key_checks_are_derived_as_the_text_says() -> None:
    for entry in TEXTS["key-checks"]:
        names = ("key", "vault-id", "key-id")
        key, vault_id, key_id = (bytes.fromhex(str(entry[name])) for name in names)
        check = expand(key, b"secimg-watch/v1/key-check\0" + vault_id + key_id, 32)
        assert b64encode(check).decode() == entry["check"]
