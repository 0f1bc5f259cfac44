"""The policy: what a valid file means, and what is said about a faulty one."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from secimg_watch.errors import NoInputError, NotAllowedError, PolicyError
from secimg_watch.images import known_formats
from secimg_watch.policy import FORMATS, After, Policy, load_policy, parse_policy
from secimg_watch.policyfile import MAX_DEPTH, MAX_NODES, MAX_TEXT, dump, load
from secimg_watch.quantities import Reserve
from secimg_watch.recipients import (
    format_identity,
    format_recipient,
    parse_identity,
    recipient_of,
)
from secimg_watch.records import PrivateKey
from secimg_watch.surroundings import check_paths

HEAD = """\
version: 1
state: /var/lib/secimg-watch
vaults: {main: {path: /srv/vault}}
"""
MINIMAL = HEAD + "folders: [{path: /srv/scans}]\n"
# Always the same ones: they are part of the names of tests.
IDENTITIES = [parse_identity(format_identity(PrivateKey(b"", bytes([n] * 32)))) for n in range(7)]
PUBLIC = [format_recipient(recipient_of(each)) for each in IDENTITIES]
PRIVATE = format_identity(IDENTITIES[0])

no_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may do everything"
)


def faults_of(text: str) -> list[str]:
    """The faults that a policy text is refused for, without the file's name."""
    with pytest.raises(PolicyError) as caught:
        parse_policy(text, "p.yaml")
    assert all(fault.startswith("p.yaml:") for fault in caught.value.faults)
    return [fault.removeprefix("p.yaml:") for fault in caught.value.faults]


def folder(lines: str) -> str:
    """A policy with one folder that has ``lines`` beside its path, the first one on line 6."""
    body = "".join(f"    {line}\n" for line in lines.splitlines())
    return f"{HEAD}folders:\n  - path: /srv/scans\n{body}"


# -- what a valid file means ---------------------------------------------------------------------


def test_a_minimal_policy_has_the_documented_defaults() -> None:
    policy = parse_policy(MINIMAL, "p.yaml")
    assert policy.model_dump(mode="json") == {
        "version": 1,
        "state": "/var/lib/secimg-watch",
        "log_names": False,
        "vaults": {"main": {"path": "/srv/vault", "min_free": "2%"}},
        "key": {
            "provider": "auto",
            "name": "secimg-watch/main",
            "file": None,
            "command": None,
        },
        "recipients": [],
        "recovery": "required",
        "folders": [
            {
                "path": "/srv/scans",
                "vault": "main",
                "recursive": True,
                "include": ["*"],
                "exclude": [],
                "formats": "any",
                "settle": "2s",
                "proof": "auto",
                "sidecar": ".done",
                "watch": "auto",
                "poll": "10s",
                "rescan": "5m",
                "staging": None,
                "not_image": "leave",
                "undecodable": "encrypt",
                "after": "delete",
                "preview": 256,
            }
        ],
        "verify": "device",
        "workers": "auto",
        "limits": {
            "attempts": 5,
            "decode_seconds": 20,
            "decode_pixels": 89_478_485,
            "decode_memory": "1GiB",
            "decode_file": "512MiB",
        },
    }


def test_values_come_out_in_seconds_bytes_and_paths() -> None:
    policy = parse_policy(
        folder("settle: 500ms\npoll: 1m\nafter: move:/srv/done/\nstaging: /srv/stage")
        + "limits: {decode_memory: 300MB, decode_file: 4096}\n",
        "p.yaml",
    )
    assert policy.folders[0].settle == 0.5
    assert policy.folders[0].poll == 60.0
    assert policy.folders[0].after == After("move", Path("/srv/done"))
    assert policy.folders[0].staging == Path("/srv/stage")
    assert policy.limits.decode_memory == 300_000_000
    assert policy.limits.decode_file == 4096
    assert policy.vaults["main"].min_free == Reserve(0.02, 0)


def test_a_reserve_may_be_a_number_of_bytes_and_plaintext_may_be_kept() -> None:
    text = folder("after: keep").replace("/srv/vault}", "/srv/vault, min_free: 4096}")
    policy = parse_policy(text, "p.yaml")
    assert policy.vaults["main"].min_free == Reserve(0.0, 4096)
    assert policy.folders[0].after == After("keep")


def test_paths_are_normalised() -> None:
    policy = parse_policy(MINIMAL.replace("/srv/scans", "//srv/./scans//"), "p.yaml")
    assert str(policy.folders[0].path) == "/srv/scans"


def test_a_listed_jpeg_includes_the_jpeg_with_two_views() -> None:
    policy = parse_policy(folder("formats: [JPEG, PNG, JPEG]"), "p.yaml")
    assert policy.folders[0].formats == ("JPEG", "PNG", "MPO")


def test_every_format_that_is_ever_recognised_can_be_listed() -> None:
    assert known_formats() <= set(FORMATS)


def test_automatic_workers_are_two_to_four() -> None:
    assert 2 <= parse_policy(MINIMAL, "p.yaml").worker_count <= 4
    assert parse_policy(f"{MINIMAL}workers: 17\n", "p.yaml").worker_count == 17


def test_a_policy_cannot_be_changed_by_mistake() -> None:
    policy = parse_policy(MINIMAL, "p.yaml")
    with pytest.raises(ValidationError, match="frozen"):
        policy.folders[0].after = After("keep")  # type: ignore[misc]


def test_anchors_and_merge_keys_share_what_folders_have_in_common() -> None:
    text = HEAD + (
        "folders:\n"
        "  - &scanner {path: /srv/a, settle: 10s, preview: 0}\n"
        "  - {<<: *scanner, path: /srv/b, preview: 64}\n"
    )
    first, second = parse_policy(text, "p.yaml").folders
    assert (str(first.path), first.settle, first.preview) == ("/srv/a", 10.0, 0)
    assert (str(second.path), second.settle, second.preview) == ("/srv/b", 10.0, 64)


@pytest.mark.parametrize(
    "provider", ["provider: file, file: /k", "provider: command, command: [a]"]
)
def test_a_key_provider_is_given_what_it_needs(provider: str) -> None:
    key = parse_policy(f"{MINIMAL}key: {{{provider}}}\n", "p.yaml").key
    assert (key.file, key.command) in {(Path("/k"), None), (None, ("a",))}


def test_recipients_are_read_in_their_order_and_written_back() -> None:
    text = MINIMAL + "recipients:\n" + "".join(f"  - {each}\n" for each in PUBLIC[:6])
    policy = parse_policy(text, "p.yaml")
    assert policy.recipients == tuple(recipient_of(each) for each in IDENTITIES[:6])
    assert parse_policy(dump(policy.model_dump(mode="json")), "p.yaml") == policy


def test_a_vault_without_a_key_needs_a_recipient_and_nothing_else() -> None:
    head = f"{MINIMAL}key: {{provider: none}}\n"
    for recipients in ("", "recipients: []\n", "recovery: declined\n"):
        [fault] = faults_of(head + recipients)
        assert fault.startswith("5:17: key.provider: with none, nobody could open")
        assert fault.endswith('; add "recipients: [...]", or another provider')
    policy = parse_policy(f"{head}recipients: [{PUBLIC[0]}]\n", "p.yaml")
    assert (policy.key.provider, len(policy.recipients)) == ("none", 1)


def test_a_private_key_in_a_policy_is_never_repeated() -> None:
    tail = PRIVATE.partition(":")[2]
    for text in (f"recipients: [{PRIVATE}]\n", f"recipients: [{PRIVATE.lower()}]\n"):
        [fault] = faults_of(MINIMAL + text)
        assert tail[:8].lower() not in fault.lower()


def test_the_vaults_whose_plaintext_is_deleted_are_known() -> None:
    text = HEAD.replace("}}", "}, b: {path: /b}, c: {path: /c}}") + (
        "folders:\n"
        "  - {path: /srv/1, vault: main, after: keep}\n"
        "  - {path: /srv/2, vault: b, after: 'move:/srv/done'}\n"
        "  - {path: /srv/3, vault: c}\n"
        "  - {path: /srv/4, vault: c, after: keep}\n"
    )
    assert parse_policy(text, "p.yaml").deleting_vaults == {"c"}


# -- one fault each, with its place --------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ("setle: 3s", '6:5: unknown key "setle" in folders[0]; did you mean "settle"?'),
        ("verify: cached", '6:5: unknown key "verify" in folders[0]; "verify" belongs under the'),
        ("settle: 2 sconds", '6:13: folders[0].settle: "2 sconds" is not a duration; write a'),
        ("settle: 2", '6:13: folders[0].settle: 2 has no unit; write "2s" for seconds'),
        ("settle: true", '6:13: folders[0].settle: must be a duration, such as "2s"'),
        ("settle: 1:30", '6:13: folders[0].settle: 90 has no unit; write "90s" for seconds'),
        ("poll: 99ms", "6:11: folders[0].poll: must be at least 100ms"),
        ("rescan: 0s", "6:13: folders[0].rescan: must be at least 1s"),
        ('recursive: "yes"', "6:16: folders[0].recursive: must be true or false"),
        ("recursive: 1", "6:16: folders[0].recursive: must be true or false"),
        ("include: []", "6:14: folders[0].include: must not be empty, since nothing would be"),
        ("include: '*'", "6:14: folders[0].include: must be a list of patterns, such as"),
        ("include: [1]", "6:14: folders[0].include: must hold patterns of text, none of them"),
        ('exclude: [""]', "6:14: folders[0].exclude: must hold patterns of text, none of them"),
        ("exclude: [/srv/x]", '6:14: folders[0].exclude: the pattern "/srv/x" can never match;'),
        ("exclude: [cache/]", '6:14: folders[0].exclude: the pattern "cache/" can never match;'),
        ("formats: [JPG]", '6:14: folders[0].formats: "JPG" is no known format; did you mean'),
        ("formats: [jpeg]", '6:14: folders[0].formats: "jpeg" is no known format; did you mean'),
        ("formats: [any]", '6:14: folders[0].formats: "any" is no known format; write any alone,'),
        ("formats: [Q#7]", '6:14: folders[0].formats: "Q#7" is no known format; the JSON schema'),
        ("formats: []", "6:14: folders[0].formats: must be any, or a list of formats such as"),
        ("proof: leases", "6:12: folders[0].proof: must be one of auto, lease, rename, sidecar,"),
        ("watch: off", "6:12: folders[0].watch: must be one of auto, native, poll"),
        ("sidecar: a/b", "6:14: folders[0].sidecar: must be the end of a file name such as"),
        ("sidecar: ''", "6:14: folders[0].sidecar: must be the end of a file name such as"),
        ("not_image: delete", "6:16: folders[0].not_image: must be one of leave, quarantine,"),
        ("undecodable: drop", "6:18: folders[0].undecodable: must be one of encrypt, quarantine,"),
        ("after: shred", "6:12: folders[0].after: must be delete, keep or move:DIR, such as"),
        ("after: move:done", "6:12: folders[0].after: must be an absolute path; write it out in"),
        ("preview: 1025", "6:14: folders[0].preview: must be at most 1024"),
        ("preview: -1", "6:14: folders[0].preview: must be at least 0"),
        ("preview: 1.5", "6:14: folders[0].preview: must be a whole number"),
        ("vault: mian", '6:12: folders[0].vault: there is no vault "mian"; did you mean "main"?'),
        ("vault: other", '6:12: folders[0].vault: there is no vault "other"; known: main'),
        ("vault: null", "6:12: folders[0].vault: must be text"),
        ("settle: 1s\nsettle: 2s", '7:5: "settle" is given twice, first on line 6; remove one of'),
        ("on: 1", "6:5: a key must be text, and YAML reads this one (on) as something else;"),
        ("sidecar: !done x", "6:14: the tag !done has no meaning in a policy; remove the tag"),
    ],
)  # fmt: skip
def test_a_fault_in_a_folder_is_reported_where_it_is(lines: str, fault: str) -> None:
    (found,) = faults_of(folder(lines))
    assert found.startswith(fault)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("pathes: 1", '5:1: unknown key "pathes"; known here: version, state, log_names, vaults,'),
        ("settle: 2s", '5:1: unknown key "settle"; "settle" belongs under folders'),
        ("path: /srv/x", '5:1: unknown key "path"; "path" belongs under vaults or folders'),
        ("log_names: 1", "5:12: log_names: must be true or false"),
        ("recipients: 7", '5:13: recipients: must be a list of public keys; write "recipients: ['),
        ("recipients: [age1abc]", "5:13: recipients: entry 1: this is not the text of a recipient"),
        ("recipients: [[]]", "5:13: recipients: entry 1: this is not the text of a recipient's"),
        (f"recipients: [{PUBLIC[0]}, {PUBLIC[0]}]", "5:13: recipients: entry 2 is there twice;"),
        (f"recipients: [{PUBLIC[0]}, {PUBLIC[1][:-1]}]", "5:13: recipients: entry 2: this is not"),
        (f"recipients: [{PRIVATE}]", "5:13: recipients: entry 1: this is a private key, and a"),
        (f"recipients: [{', '.join(PUBLIC)}]", "5:13: recipients: must hold at most 6 public"),
        ("recovery: decline", "5:11: recovery: must be one of required, declined; did you mean"),
        ("recovery: false", "5:11: recovery: must be one of required, declined"),
        ("key: {provider: none}", "5:17: key.provider: with none, nobody could open what is sea"),
        ("key: {provider: none, file: /k}", "5:23: key.file: has no effect with the provider non"),
        ("verify: disk", "5:9: verify: must be one of device, cached"),
        ("workers: 0", "5:10: workers: must be auto, or a whole number from 1 to 64"),
        ("workers: true", "5:10: workers: must be auto, or a whole number from 1 to 64"),
        ("limits: {attempts: 101}", "5:20: limits.attempts: must be at most 100"),
        ("limits: {decode_seconds: 0}", "5:26: limits.decode_seconds: must be at least 1"),
        ("limits: {decode_pixels: 1e3}", "5:25: limits.decode_pixels: must be a whole number"),
        ("limits: {decode_memory: 1MB}", "5:25: limits.decode_memory: must be at least 64MiB"),
        ("limits: {decode_file: -1}", '5:23: limits.decode_file: must be a size, such as "10MB"'),
        ("limits: 3", "5:9: limits: must be a mapping of keys to values"),
        ("key: {provider: keyrings}", "5:17: key.provider: must be one of auto, keyring,"),
        ("key: {name: main}", "5:13: key.name: must be SERVICE/USERNAME, such as"),
        ("key: {name: a/b/c}", "5:13: key.name: must be SERVICE/USERNAME, such as"),
        ("key: {provider: file}", "5:17: key.provider: file needs the key file beside it; add"),
        ("key: {provider: command}", "5:17: key.provider: command needs the key command beside"),
        ("key: {file: /k}", "5:7: key.file: has no effect with the provider auto; remove it, or"),
        ("key: {provider: file, file: k}", "5:29: key.file: must be an absolute path; write it"),
        ("key: {provider: command, command: pass show}", "5:35: key.command: must be a list of"),
        ("key: {provider: command, command: []}", "5:35: key.command: must be a list of words,"),
        ('"a\\u202eb": 1', r'5:1: unknown key "a\u202eb"; known here: version, state, log_names,'),
        ('state2: "\\ud800"', "5:9: the text holds half of a surrogate pair; write the character"),
    ],
)  # fmt: skip
def test_a_fault_elsewhere_is_reported_where_it_is(line: str, fault: str) -> None:
    assert any(found.startswith(fault) for found in faults_of(f"{MINIMAL}{line}\n"))


@pytest.mark.parametrize(
    ("lines", "hint"),
    [
        ("verify: cached", '"verify" belongs under the top level'),
        ("settle: 2 sconds", 'write a number and one of ms, s, m, h, d, such as "2s"'),
        ("include: []", 'write ["*"]'),
        ("include: [1]", "quote them"),
        ("exclude: [/x]", "patterns are relative to the folder: remove what leads it"),
        ("exclude: [cache/]", 'write "cache/*" for what is in that directory'),
        ("formats: [JPG]", 'did you mean "JPEG"?'),
        ("formats: [heic]", 'did you mean "HEIF"?'),
        ("formats: [any]", "write any alone, without a list"),
        ("formats: [Q#7]", "the JSON schema lists all of them"),
        ("proof: leases", 'did you mean "lease"?'),
        ("after: move:done", "write it out in full, beginning with /"),
        ("staging: ~/x", "write the path out in full, beginning with /"),
        ("vault: other", "known: main"),
        ("on: 1", "write it in quotes"),
    ],
)
def test_a_fault_ends_with_its_remedy(lines: str, hint: str) -> None:
    (found,) = faults_of(folder(lines))
    assert found.endswith(f"; {hint}")


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("srv/x", "must be an absolute path; write it out in full, beginning with /"),
        ("~/x", "must not begin with ~, since a service has no home directory; write the path"),
        ("/srv/../x", "must not contain ..; write the directory it leads to"),
        ('"/srv/\\0"', "must not contain a NUL character"),
        ('""', 'must be an absolute path, such as "/srv/scans"'),
        ("7", 'must be an absolute path, such as "/srv/scans"'),
    ],
)  # fmt: skip
def test_a_path_must_say_by_itself_where_it_leads(path: str, fault: str) -> None:
    text = MINIMAL.replace("state: /var/lib/secimg-watch", f"state: {path}")
    (found,) = faults_of(text)
    assert found.startswith(f"2:8: state: {fault}")


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("", ["1:1: the policy: must be a mapping of keys to values"]),
        ("- a\n", ["1:1: the policy: must be a mapping of keys to values"]),
        (
            "log_names: true\n",
            [
                '1:1: the key "folders" is missing; add "folders: [{path: /srv/scans}]"',
                '1:1: the key "state" is missing; add "state: /var/lib/secimg-watch"',
                '1:1: the key "vaults" is missing; add "vaults: {main: {path: /srv/vault}}"',
                '1:1: the key "version" is missing; add "version: 1"',
            ],
        ),
        (
            "version: 2\nstate: /s\nvaults: {}\nfolders: []\n",
            [
                "1:10: version: must be 1, the only version of the policy format; write 1",
                "3:9: vaults: must not be empty",
                "4:10: folders: must not be empty",
            ],
        ),
        (
            "version: true\nstate: /s\nvaults: []\nfolders: {}\n",
            [
                "1:10: version: must be 1, the only version of the policy format; write 1",
                "3:9: vaults: must not be empty",
                "4:10: folders: must not be empty",
            ],
        ),
        (
            "version: 1\nstate: /s\nvaults: {main: {}}\nfolders: [{}, 3]\n",
            [
                '3:16: the key "path" is missing in vaults.main; add "path: /DIRECTORY"',
                '4:11: the key "path" is missing in folders[0]; add "path: /DIRECTORY"',
                "4:15: folders[1]: must be a mapping of keys to values",
            ],
        ),
        (
            HEAD.replace("main: {path", "a b: {min_free: 200%, path") + "folders: [{path: /f}]\n",
            [
                '3:10: vaults: "a b" is no name for a vault; write up to 64 letters, digits,',
                '3:26: vaults.a b.min_free: "200%" is not a share; write a number from 0 to',
            ],
        ),
        (
            HEAD.replace("main:", "a: {path: /w}, b:") + "folders: [{path: /f}]\n",
            ["4:11: folders[0]: does not say which vault to seal into; add"],
        ),
    ],
)  # fmt: skip
def test_missing_and_empty_parts_are_named(text: str, faults: list[str]) -> None:
    found = faults_of(text)
    assert len(found) == len(faults)
    assert all(map(str.startswith, found, faults))


def test_all_faults_are_reported_at_once_in_the_order_of_the_file() -> None:
    text = (
        "version: 1\n"
        "state: srv\n"
        "vaults: {main: {path: /srv/scans/vault, min_free: lots}}\n"
        "key: {provider: file}\n"
        "folders:\n"
        "  - path: /srv/scans\n"
        "    setle: 2s\n"
        "    after: move:/srv/scans/done\n"
        "  - path: /srv/scans/deep\n"
        "    path: /srv/other\n"
        "workers: many\n"
    )
    places = [fault.split(": ")[0] for fault in faults_of(text)]
    assert places == ["2:8", "3:23", "3:51", "4:17", "7:5", "8:12", "9:11", "10:5", "11:10"]


def test_the_error_counts_the_faults_and_says_what_to_do() -> None:
    with pytest.raises(PolicyError, match=r"^the policy p\.yaml has 2 faults$") as caught:
        parse_policy(f"{MINIMAL}x1: 1\nx2: 2\n", "p.yaml")
    assert caught.value.hint == "correct the file, then run: secimg-watch check"
    with pytest.raises(PolicyError, match=r"has 1 fault$"):
        parse_policy(f"{MINIMAL}x1: 1\n", "p.yaml")


def test_the_words_of_a_key_command_are_never_repeated() -> None:
    text = f"{MINIMAL}key: {{provider: command, command: [print, 4711, hunter2]}}\n"
    assert not any("hunter2" in fault or "4711" in fault for fault in faults_of(text))


# -- places that must not overlap ----------------------------------------------------------------


def two_folders(first: str, second: str) -> str:
    return f"{HEAD}folders:\n  - {{{first}}}\n  - {{{second}}}\n"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            two_folders("path: /srv/a", "path: /srv/a/"),
            "6:12: folders[1].path: the folder /srv/a is also the folder /srv/a of line 5; remove",
        ),
        (
            two_folders("path: /srv/a", "path: /srv/a/b"),
            "6:12: folders[1].path: the folder /srv/a/b lies inside the folder /srv/a of line 5;",
        ),
        (
            two_folders("path: /srv/a/b", "path: /srv/a"),
            "5:12: folders[0].path: the folder /srv/a/b lies inside the folder /srv/a of line 6;",
        ),
        (
            MINIMAL.replace("/srv/vault", "/srv/scans/vault"),
            "3:23: vaults.main.path: the vault /srv/scans/vault lies inside the folder /srv/scans",
        ),
        (
            MINIMAL.replace("/srv/scans", "/srv/vault/in"),
            "4:18: folders[0].path: the folder /srv/vault/in lies inside the vault /srv/vault of",
        ),
        (
            MINIMAL.replace("/srv/scans", "/srv/vault"),
            "4:18: folders[0].path: the folder /srv/vault is also the vault /srv/vault of line 3;",
        ),
        (
            MINIMAL.replace("/var/lib/secimg-watch", "/srv/scans/.state"),
            "2:8: state: the state directory /srv/scans/.state lies inside the folder /srv/scans",
        ),
        (
            HEAD.replace("main", "a: {path: /srv}, b") + "folders: [{path: /f, vault: a}]\n",
            "3:37: vaults.b.path: the vault /srv/vault lies inside the vault /srv of line 3;",
        ),
        (
            two_folders("path: /srv/a, staging: /srv/b/s", "path: /srv/b"),
            "5:29: folders[0].staging: the staging directory /srv/b/s lies inside the folder",
        ),
        (
            two_folders("path: /srv/a, staging: /srv/s", "path: /srv/b, staging: /srv/s"),
            "6:29: folders[1].staging: the staging directory /srv/s is also the staging directory",
        ),
        (
            two_folders("path: /srv/a, staging: /srv/a", "path: /srv/b"),
            "5:29: folders[0].staging: the staging directory /srv/a is also the folder /srv/a of",
        ),
        (
            two_folders("path: /srv/a, after: 'move:/srv/b/done'", "path: /srv/b"),
            "5:27: folders[0].after: the move target /srv/b/done lies inside the folder /srv/b of",
        ),
        (
            folder("after: move:/srv/vault"),
            "6:12: folders[0].after: the move target /srv/vault is also the vault /srv/vault of",
        ),
    ],
)  # fmt: skip
def test_places_that_overlap_are_refused(text: str, fault: str) -> None:
    (found,) = faults_of(text)
    assert found.startswith(fault)


def test_nothing_can_lie_beside_a_folder_that_is_the_whole_system() -> None:
    found = faults_of(MINIMAL.replace("/srv/scans", "/"))
    assert [fault.partition(" lies inside the folder / of line 4")[0] for fault in found] == [
        "2:8: state: the state directory /var/lib/secimg-watch",
        "3:23: vaults.main.path: the vault /srv/vault",
    ]


@pytest.mark.parametrize(
    "text",
    [
        two_folders("path: /srv/a", "path: /srv/ab"),
        two_folders("path: /srv/a, after: 'move:/srv/d'", "path: /srv/b, after: 'move:/srv/d'"),
        folder("staging: /srv/scans/.stage"),
        folder("staging: /var/lib/secimg-watch/staging"),
        MINIMAL.replace("/srv/vault", "/var/lib/secimg-watch/vault"),
    ],
)
def test_places_that_only_look_alike_or_belong_together_are_allowed(text: str) -> None:
    assert isinstance(parse_policy(text, "p.yaml"), Policy)


def test_an_overlap_through_a_symbolic_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "drop").mkdir()
    (tmp_path / "link").symlink_to("drop")
    text = (
        f"version: 1\nstate: {tmp_path}/state\n"
        f"vaults: {{main: {{path: {tmp_path}/link/vault}}}}\n"
        f"folders:\n  - path: {tmp_path}/drop\n"
    )
    (found,) = faults_of(text)
    assert found.startswith(f"3:23: vaults.main.path: the vault {tmp_path}/link/vault lies inside")
    assert f"the folder {tmp_path}/drop of line 5, through a symbolic link; " in found


# -- files and YAML ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a: [1, 2\n", "2:1: not valid YAML: while parsing a flow sequence, expected ',' or ']',"),
        ("a: 1\n\tb: 2\n", "2:1: not valid YAML: while scanning for the next token, found"),
        ("a: 1\n--- \nb: 2\n", "2:1: not valid YAML: expected a single document in the stream,"),
        ("a: *b\n", "1:4: not valid YAML: found undefined alias 'b'"),
        ("a: 1\nb: \x07\n", "2:4: the character U+0007 is not allowed in YAML"),
        ('a: "\\UFFFFFFFF"\n', "1:7: not valid YAML: a number in an escape or a directive is out"),
        ("a: &a [*a]\n", f"1:4: nested deeper than {MAX_DEPTH} levels"),
        ("a: &a {<<: *a}\n", f"1:4: nested deeper than {MAX_DEPTH} levels"),
        ("[" * 200, f"1:{MAX_DEPTH}: nested deeper than {MAX_DEPTH} levels"),
        (f"[{'0,' * MAX_NODES}]", f"1:1: more than {MAX_NODES} values, aliases counted"),
        (" " * (MAX_TEXT + 1), f"1:1: the file is longer than {MAX_TEXT} characters"),
    ],
)  # fmt: skip
def test_what_is_not_bounded_yaml_is_refused_where_it_breaks(text: str, fault: str) -> None:
    (found,) = faults_of(text)
    assert found.startswith(fault)


def test_aliases_cannot_stand_for_billions_of_values() -> None:
    levels = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 10)]
    (fault,) = faults_of("\n".join(["l0: &l0 [x]", *levels]))
    assert fault.endswith(f"more than {MAX_NODES} values, aliases counted")


@pytest.mark.parametrize(
    "scalar",
    ["!!int x", "!!int ''", "!!float x", "!!bool x", f"0x{'f' * 70}", f"{2**63}", "190:20:30e9"],
)
def test_numbers_that_are_none_are_faults_or_text(scalar: str) -> None:
    document = load(f"a: {scalar}", "p.yaml")
    assert document.faults or document.data == {"a": scalar}


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.getcwd []", "!!set {a}", "!!binary aGk="]
)
def test_no_tag_builds_anything_but_plain_data(tag: str) -> None:
    document = load(f"a: {tag}", "p.yaml")
    assert "has no meaning in a policy" in document.faults[0].what


def test_values_keep_their_yaml_types_and_dates_stay_text() -> None:
    text = "[0s, 7, 1.5, yes, ~, 2026-11-23, 2026-99-99, =, '7', .5]"
    assert load(text, "p.yaml").data == [
        "0s", 7, 1.5, True, None, "2026-11-23", "2026-99-99", "=", "7", 0.5,
    ]  # fmt: skip


def test_positions_are_those_of_values_keys_and_nearest_parents() -> None:
    document = load("a:\n  - b: 1\n    c: {d: 2}\n", "p.yaml")
    assert document.position(("a", 0, "c", "d")) == (3, 12)
    assert document.position(("a", 0, "c", "d"), key=True) == (3, 9)
    assert document.position(("a", 0, "x", "y")) == (2, 5)
    assert document.position(("x",)) == (1, 1)
    assert load("", "p.yaml").position(("x",)) == (1, 1)


def test_a_policy_is_read_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(MINIMAL)
    assert load_policy(path) == parse_policy(MINIMAL, "p.yaml")


def test_a_missing_policy_file_is_no_input(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "absent", tmp_path, tmp_path / "file" / "policy.yaml"):
        with pytest.raises(NoInputError, match="there is no policy file") as caught:
            load_policy(path)
        assert "--policy" in caught.value.hint


@no_root
def test_an_unreadable_policy_file_is_not_allowed(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.touch(mode=0)
    with pytest.raises(NotAllowedError, match="may not be read"):
        load_policy(path)


def test_a_policy_file_must_be_utf8_and_the_place_is_named(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_bytes("ä: 1\nü: ".encode() + b"\xe4\n")
    with pytest.raises(PolicyError) as caught:
        load_policy(path)
    assert caught.value.faults == (f"{path}:2:4: the file is not UTF-8 text; save it as UTF-8",)


def test_a_strange_file_name_cannot_forge_a_message() -> None:
    with pytest.raises(PolicyError) as caught:
        parse_policy("", "a\nb.yaml")
    assert caught.value.faults[0].startswith(r"a\x0ab.yaml:1:1: ")
    assert "\n" not in str(caught.value)


# -- the directories on disk ---------------------------------------------------------------------


ABSENT = "does not exist; create it, or correct its path in the policy"
NO_DIRECTORY = "is not a directory; correct its path in the policy"
UNUSABLE = "may not be used by this account; change its owner or its mode"


def policy_in(tmp_path: Path, extra: str = "") -> Policy:
    """A policy whose places all lie below ``tmp_path``; ``extra`` goes into its folder."""
    text = (
        f"version: 1\nstate: {tmp_path}/a/b/state\n"
        f"vaults: {{main: {{path: {tmp_path}/vault}}}}\n"
        f"folders:\n  - path: {tmp_path}/drop\n{extra}"
    )
    return parse_policy(text, "p.yaml")


def test_usable_paths_have_no_faults_and_nothing_is_created(tmp_path: Path) -> None:
    (tmp_path / "drop").mkdir()
    assert check_paths(policy_in(tmp_path, f"    staging: {tmp_path}/stage\n")) == []
    assert os.listdir(tmp_path) == ["drop"]


def test_a_missing_folder_and_move_target_are_found(tmp_path: Path) -> None:
    policy = policy_in(tmp_path, f"    after: move:{tmp_path}/done\n")
    assert check_paths(policy) == [
        f"the folder {tmp_path}/drop {ABSENT}",
        f"the move target {tmp_path}/done {ABSENT}",
    ]


def test_files_where_directories_should_be_are_found(tmp_path: Path) -> None:
    for name in ("drop", "vault", "a"):
        (tmp_path / name).touch()
    assert check_paths(policy_in(tmp_path)) == [
        f"the folder {tmp_path}/drop {NO_DIRECTORY}",
        f'the vault "main" {tmp_path}/vault {NO_DIRECTORY}',
        f"the nearest existing parent of the state directory {tmp_path}/a {NO_DIRECTORY}",
    ]


def test_a_vault_whose_parent_is_missing_is_found(tmp_path: Path) -> None:
    (tmp_path / "drop").mkdir()
    text = MINIMAL.replace("/var/lib", str(tmp_path)).replace("/srv/scans", f"{tmp_path}/drop")
    policy = parse_policy(text.replace("/srv/vault", f"{tmp_path}/gone/vault"), "p.yaml")
    assert check_paths(policy) == [
        f'the parent directory of the vault "main" {tmp_path}/gone {ABSENT}'
    ]


@no_root
def test_directories_without_the_needed_rights_are_found(tmp_path: Path) -> None:
    (tmp_path / "drop").mkdir(mode=0o500)
    (tmp_path / "vault").mkdir(mode=0o500)
    (tmp_path / "a").mkdir(mode=0o500)
    assert check_paths(policy_in(tmp_path)) == [
        f"the folder {tmp_path}/drop {UNUSABLE}",
        f'the vault "main" {tmp_path}/vault {UNUSABLE}',
        f"the nearest existing parent of the state directory {tmp_path}/a {UNUSABLE}",
    ]
    kept = check_paths(policy_in(tmp_path, "    after: keep\n"))
    assert f"the folder {tmp_path}/drop {UNUSABLE}" not in kept


def test_staging_on_another_file_system_is_found(tmp_path: Path) -> None:
    other = Path("/dev/shm")
    if not os.access(other, os.W_OK) or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system at /dev/shm")
    (tmp_path / "drop").mkdir()
    (fault,) = check_paths(policy_in(tmp_path, f"    staging: {other}/secimg-watch-test\n"))
    assert "lies on another file system than the folder" in fault


# -- whatever the file holds ---------------------------------------------------------------------

KEYS = st.sampled_from(
    [
        *Policy.model_fields,
        *("path", "min_free", "provider", "name", "file", "command", "vault", "main", "[key]"),
        *("settle", "formats", "after", "staging", "include", "decode_memory"),
    ]
)
TOKENS = st.sampled_from(
    [
        *("a: ", "- ", "[", "]", "{", "}", "\n", "  ", "&a ", "*a", "<<: ", "!!int ", "!!bool "),
        *("! ", "!x ", "1", "0x", "1:30", '"\\ud800"', '"\\UFFFFFFFF"', "%YAML 1.1\n", "---\n"),
        *("? ", ": ", "|", "> ", "'", '"', "\t", "#", "~", "=", "\x85", "\0", "\ufeff"),
        *("1e999", ".nan", ","),
    ]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=8),
    st.sampled_from(["/a", "/a/b", "~/c", "any", "2s", "2%", "move:/a", "main", "file", "*"]),
)
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(), inner, max_size=5)
    ),
    max_leaves=20,
)
PARTS = st.sampled_from(
    [(), ("version",), ("state",), ("vaults",), ("vaults", "main"), ("vaults", "main", "path")]
    + [
        ("key",),
        ("recipients",),
        ("recovery",),
        ("folders",),
        ("folders", 0),
        ("workers",),
        ("limits",),
    ]
    + [("folders", 0, key) for key in ("path", "include", "formats", "settle", "after", "staging")]
    + [("key", key) for key in ("provider", "name", "file", "command")]
)
FUZZ = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])


def refusals(text: str) -> tuple[str, ...]:
    """The faults of a text, none where it is a policy; another exception fails the test."""
    try:
        parse_policy(text, "p.yaml")
    except PolicyError as error:
        return error.faults or ("refused without a fault",)
    return ()


def all_have_places(faults: tuple[str, ...]) -> bool:
    """Whether each fault is one line that begins with file, line and column."""
    place = re.compile(r"p\.yaml:[1-9][0-9]*:[1-9][0-9]*: .")
    return all(place.match(fault) and len(fault.splitlines()) == 1 for fault in faults)


def with_part(tree: Any, path: tuple[str | int, ...], part: Any) -> Any:
    """A copy of a tree of plain data with one part of it replaced."""
    if not path:
        return part
    if isinstance(tree, list):
        return [with_part(tree[0], path[1:], part)]
    return tree | {path[0]: with_part(tree.get(path[0]), path[1:], part)}


@FUZZ
@given(st.text() | st.lists(TOKENS).map("".join))
def test_any_text_is_a_policy_or_is_refused_with_places(text: str) -> None:
    assert all_have_places(refusals(text))


@FUZZ
@given(TREES)
def test_any_yaml_is_a_policy_or_is_refused_with_places(tree: Any) -> None:
    assert all_have_places(refusals(dump(tree)))


@FUZZ
@given(PARTS, TREES)
def test_a_policy_with_any_part_replaced_is_one_or_is_refused(
    path: tuple[str | int, ...], part: Any
) -> None:
    whole = parse_policy(MINIMAL, "p.yaml").model_dump(mode="json")
    assert all_have_places(refusals(dump(with_part(whole, path, part))))


@FUZZ
@given(TREES)
def test_dumped_data_is_loaded_as_it_was(tree: Any) -> None:
    document = load(dump(tree), "p.yaml")
    assert document.faults or document.data == tree


@FUZZ
@given(
    settle=st.integers(0, 10**9).map(lambda n: f"{n}ms"),
    decode_file=st.integers(0, 10**15),
    share=st.integers(0, 99_999).map(lambda n: f"{n / 1000:.3f}%"),
    formats=st.just("any") | st.lists(st.sampled_from(FORMATS), min_size=1),
)
def test_a_written_policy_is_read_back_as_the_same_one(
    settle: str, decode_file: int, share: str, formats: Any
) -> None:
    data = {
        "version": 1,
        "state": "/s",
        "vaults": {"main": {"path": "/v", "min_free": share}},
        "folders": [{"path": "/f", "settle": settle, "formats": formats, "after": "move:/d"}],
        "limits": {"decode_file": decode_file},
    }
    policy = parse_policy(dump(data), "p.yaml")
    assert parse_policy(dump(policy.model_dump(mode="json")), "p.yaml") == policy
