"""The package as a library: the classic calls, as the documentation writes them."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from PIL import Image

import secimg_watch
from secimg_watch import (
    NotAnImageError,
    SecimgError,
    TamperedError,
    bytes_to_image,
    decrypt_image,
    encrypt_image,
    generate_key,
    image_to_bytes,
)

if TYPE_CHECKING:
    from pathlib import Path

PARTS = {"data": 0, "tag": 1, "iv": 2, "salt": 3}
FAST = 100_000
HEAVY = {
    *("PIL", "click", "cryptography", "keyring", "pydantic", "rich"),
    *("sqlite3", "watchdog", "yaml"),
}


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``example.png`` in the working directory."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGBA", (60, 40), "#80402010").save("example.png")
    return tmp_path / "example.png"


def test_the_documented_example_runs_as_it_stands(example: Path) -> None:
    password = "correct horse battery staple"
    image_data = image_to_bytes("example.png")
    encrypted_data, tag, iv, salt = encrypt_image(image_data, password)
    decrypted = decrypt_image(encrypted_data, tag, iv, salt, password)
    bytes_to_image(decrypted, "out.png")
    assert (example.parent / "out.png").read_bytes() == example.read_bytes()
    assert (len(salt), len(iv), len(tag)) == (16, 12, 16)
    assert encrypted_data != image_data


def test_a_key_is_derived_with_the_documented_call() -> None:
    salt = os.urandom(16)
    key = generate_key("password", salt, iterations=FAST)
    assert len(key) == 32
    assert key == generate_key("password", salt, iterations=FAST)
    assert key != generate_key("password", os.urandom(16), iterations=FAST)
    assert key != generate_key("password", salt, iterations=FAST + 1)


@pytest.mark.parametrize("part", PARTS)
def test_a_flipped_bit_in_any_part_is_noticed(example: Path, part: str) -> None:
    parts = list(encrypt_image(image_to_bytes(example), "secret", iterations=FAST))
    changed = bytearray(parts[PARTS[part]])
    changed[len(changed) // 2] ^= 0x10
    parts[PARTS[part]] = bytes(changed)
    encrypted_data, tag, iv, salt = parts
    with pytest.raises(TamperedError):
        decrypt_image(encrypted_data, tag, iv, salt, "secret", iterations=FAST)


def test_a_wrong_password_is_noticed(example: Path) -> None:
    parts = encrypt_image(image_to_bytes(example), "secret", iterations=FAST)
    with pytest.raises(TamperedError):
        decrypt_image(*parts, "Secret", iterations=FAST)


def test_what_is_no_image_is_refused_on_both_ways(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(NotAnImageError):
        image_to_bytes(tmp_path / "a.png")
    with pytest.raises(NotAnImageError):
        bytes_to_image(b"no picture", tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_every_error_is_one_that_a_caller_can_catch() -> None:
    assert issubclass(TamperedError, SecimgError)
    assert issubclass(NotAnImageError, SecimgError)


def test_every_public_name_is_there_and_no_other_is() -> None:
    for name in secimg_watch.__all__:
        assert getattr(secimg_watch, name) is not None
    with pytest.raises(AttributeError, match="no_such_call"):
        _ = secimg_watch.no_such_call


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that are loaded in a new interpreter after a statement."""
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = loaded_by("import secimg_watch") - loaded_by("pass")
    assert "secimg_watch" in loaded
    assert not loaded & HEAVY


def test_encrypting_loads_no_decoder_and_no_service() -> None:
    loaded = loaded_by("from secimg_watch import encrypt_image") - loaded_by("pass")
    assert "cryptography" in loaded
    assert not loaded & (HEAVY - {"cryptography"})
