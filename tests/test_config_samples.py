"""The policies in ``config/``: each is valid, and says what it promises to say."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from secimg_watch.policy import (
    Folder,
    Key,
    Limits,
    Policy,
    Vault,
    load_policy,
    parse_policy,
    schema,
)
from secimg_watch.recipients import format_recipient, generate_identity, recipient_of

CONFIG = Path(__file__).parent.parent / "config"
SAMPLES = sorted(path.name for path in CONFIG.glob("*.yaml"))
MINIMAL = """\
version: 1
state: /var/lib/secimg-watch
vaults: {main: {path: /srv/vault}}
folders: [{path: /srv/scans}]
"""
PUBLIC = format_recipient(recipient_of(generate_identity()))


def test_the_samples_are_the_documented_ones() -> None:
    assert SAMPLES == [
        "ftp-camera.yaml",
        "office-scanner.yaml",
        "policy.yaml",
        "quickstart.yaml",
        "syncthing-phone.yaml",
    ]


@pytest.mark.parametrize("name", SAMPLES)
def test_every_sample_is_a_valid_policy_that_loses_nothing(name: str) -> None:
    policy = load_policy(CONFIG / name)
    assert {folder.after.action for folder in policy.folders} == {"delete"}
    assert {folder.undecodable for folder in policy.folders} == {"encrypt"}
    assert policy.verify == "device"
    assert policy.recovery == "required"


@pytest.mark.parametrize("name", SAMPLES)
def test_every_sample_names_its_schema_on_the_first_line(name: str) -> None:
    first, *_ = (CONFIG / name).read_text().splitlines()
    assert first == "# yaml-language-server: $schema=policy.schema.json"


def test_the_full_example_gives_every_key() -> None:
    data = yaml.safe_load((CONFIG / "policy.yaml").read_text())
    assert set(data) == set(Policy.model_fields)
    assert set(data["vaults"]["main"]) == set(Vault.model_fields)
    assert set(data["key"]) == set(Key.model_fields)
    assert set(data["folders"][0]) == set(Folder.model_fields)
    assert set(data["limits"]) == set(Limits.model_fields)


def test_the_full_example_gives_the_defaults() -> None:
    assert load_policy(CONFIG / "policy.yaml") == parse_policy(MINIMAL, "minimal.yaml")


def test_the_full_example_explains_every_key_it_gives() -> None:
    lines = (CONFIG / "policy.yaml").read_text().splitlines()
    for above, line in pairwise(lines):
        key = re.match(r" *(?:- )?([a-z_]+):", line)
        if key and key[1] not in {"main", "path", "exclude"}:
            assert above.lstrip().startswith("#"), line


def test_the_full_example_shows_how_recipients_are_listed() -> None:
    text = (CONFIG / "policy.yaml").read_text()
    example = "# recipients:\n#   - secimg-recipient-1:...\n"
    assert example in text
    given = (
        example.replace("# ", "", 1).replace("#  ", "").replace("secimg-recipient-1:...", PUBLIC)
    )
    policy = parse_policy(text.replace("recipients: []\n", given), "policy.yaml")
    assert [format_recipient(each) for each in policy.recipients] == [PUBLIC]


@pytest.mark.parametrize("name", SAMPLES)
def test_every_sample_tells_how_a_recovery_key_is_made(name: str) -> None:
    assert "secimg-watch key recovery make --output FILE" in (CONFIG / name).read_text()


def test_the_profiles_fit_their_producers() -> None:
    scanner = load_policy(CONFIG / "office-scanner.yaml").folders[0]
    assert (scanner.settle, scanner.proof, scanner.not_image) == (10.0, "auto", "leave")
    camera = load_policy(CONFIG / "ftp-camera.yaml").folders[0]
    assert (camera.settle, camera.watch, camera.not_image) == (2.0, "auto", "quarantine")
    phone = load_policy(CONFIG / "syncthing-phone.yaml").folders[0]
    assert (phone.proof, phone.settle) == ("rename", 0.0)
    assert phone.staging is not None
    assert not phone.staging.is_relative_to(phone.path)


def test_the_shipped_schema_is_the_one_of_the_models() -> None:
    assert json.loads((CONFIG / "policy.schema.json").read_text()) == schema()


def test_the_schema_refuses_unknown_keys_everywhere() -> None:
    models = [schema(), *schema()["$defs"].values()]
    assert [model["additionalProperties"] for model in models] == [False] * 5


def test_the_schema_describes_every_key() -> None:
    for model in (schema(), *schema()["$defs"].values()):
        for part in model["properties"].values():
            assert "description" in part or "$ref" in part


def test_the_schema_gives_defaults_as_a_policy_file_writes_them() -> None:
    folder = schema()["$defs"]["Folder"]["properties"]
    assert folder["rescan"]["default"] == "5m"
    assert re.search(folder["rescan"]["pattern"], "5m")
    assert schema()["$defs"]["Vault"]["properties"]["min_free"]["default"] == "2%"
    assert schema()["$defs"]["Limits"]["properties"]["decode_memory"]["default"] == "1GiB"


def test_the_schema_takes_the_text_of_a_public_key_and_nothing_shorter() -> None:
    recipients = schema()["properties"]["recipients"]
    assert recipients["maxItems"] == 6
    assert re.search(recipients["items"]["pattern"], PUBLIC)
    assert not re.search(recipients["items"]["pattern"], PUBLIC[:-1])


def test_the_schema_asks_for_no_more_than_a_minimal_policy_has() -> None:
    required = {
        name: part["required"] for name, part in schema()["$defs"].items() if "required" in part
    }
    assert required == {"Folder": ["path"], "Vault": ["path"]}
    assert schema()["required"] == list(yaml.safe_load(MINIMAL))
