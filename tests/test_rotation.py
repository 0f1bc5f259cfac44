"""From one key to the next, and to other recipients, by the commands that a person types."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from typing import TYPE_CHECKING, Any

import pytest
from cli_runner import Box, Cli, Outcome, check_complaint, contents, make_box, picture
from daemon import Site, place, wait_until
from daemon import picture as photo
from path_builders import (
    IS_ROOT,
    NO_RESERVE,
    NOBODY,
    can_mount,
    mounted_tmpfs,
    only_on_linux,
)
from rekey_builders import (
    Content,
    a_key,
    a_pair,
    content_of,
    damage,
    die_at_call,
    left_aside,
    put,
    quick_directory,
    sections_of,
    slots_of,
)

from secimg_watch.cli import cli
from secimg_watch.gate import add_key
from secimg_watch.keys import decode_ring, provider_for
from secimg_watch.recipients import format_recipient, identity_file
from secimg_watch.slots import Password, PasswordCache
from secimg_watch.vault import Vault

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from secimg_watch.records import KeyEncryptionKey, ObjectId
    from secimg_watch.slots import Lock

only_on_linux()
assert sys.platform == "linux"

FIRST, ALICE = a_pair()
SECOND, BOB = a_pair()
PASSWORD = Password(b"secret", memory_kib=8192, passes=1, lanes=1)


@pytest.fixture
def box() -> Iterator[Box]:
    with quick_directory() as directory:
        yield make_box(directory)


def ring(box: Box) -> tuple[KeyEncryptionKey, ...]:
    return decode_ring(box.key.read_text().removesuffix("\n"))


def vault_of(box: Box) -> Vault:
    return Vault(box.vault, NO_RESERVE)


def known(vault: Vault) -> set[bytes]:
    return set(vault.info().checks)


def filled(box: Box, count: int = 3, *locks: Lock) -> dict[ObjectId, Content]:
    """Put objects into the vault; gives what is in them."""
    vault = vault_of(box)
    ids = [put(vault, locks or ring(box)[:1], b"picture %d" % n) for n in range(count)]
    return {each: content_of(vault, each, *ring(box), FIRST) for each in ids}


def rotated(box: Box) -> None:
    """What ``key rotate`` does, at once."""
    new = a_key()
    for vault in box.directory.glob("*/vault.json"):
        add_key(Vault(vault.parent, NO_RESERVE), new)
    provider_for("file", "secimg-watch/main", file=box.key).replace((new, *ring(box)))


def all_sections(box: Box) -> dict[str, bytes]:
    vault = vault_of(box)
    return {each: sections_of(vault, each) for each in vault.object_ids()}


def with_recipients(box: Box, *recipients: Any, **more: Any) -> None:
    texts = [format_recipient(each) for each in recipients]
    box.write_policy(more={"recipients": texts, **more})


def identity(box: Box, *private: Any) -> Path:
    path = box.directory / "identity"
    path.write_text("".join(identity_file(each) for each in private))
    path.chmod(0o600)
    return path


def done(outcome: Outcome) -> str:
    """The last line of a run in which nothing failed."""
    assert outcome.code == 0, outcome
    assert outcome.err == "" or outcome.err.startswith("going on behind"), outcome
    return outcome.out.splitlines()[-1]


# -- key rotate --------------------------------------------------------------------------------


def test_after_a_rotation_both_keys_serve_and_the_new_one_seals(box: Box) -> None:
    [(old_id, old)] = filled(box, 1).items()
    [former] = ring(box)
    outcome = box("key", "rotate")
    assert outcome.code == 0
    current, *others = ring(box)
    assert others == [former]
    assert known(vault_of(box)) == {current.key_id, former.key_id}
    assert box.key.stat().st_mode & 0o777 == 0o400
    assert f"new key {current.key_id.hex()}" in outcome.out
    assert f"1 objects still open with key {former.key_id.hex()}" in outcome.out
    assert f"secimg-watch key retire {former.key_id.hex()[:8]}" in outcome.out
    (box.drop / "b.png").write_bytes(picture())
    assert box("drain").code == 0
    [new_id] = set(vault_of(box).object_ids()) - {old_id}
    assert slots_of(vault_of(box), new_id) == [("key", current.key_id)]
    assert slots_of(vault_of(box), old_id) == [("key", former.key_id)]
    assert content_of(vault_of(box), old_id, former) == old
    assert box("vault", "verify").code == 0
    states = {row["key"]: row["state"] for row in box("key", "list", "--json").json()["keys"]}
    assert states == {current.key_id.hex(): "current", former.key_id.hex(): "former"}


def test_no_key_is_shown(box: Box) -> None:
    texts = [box("key", "rotate"), box("key", "list"), box("vault", "rekey")]
    secrets = [word.split(":")[2] for word in box.key.read_text().split()]
    assert len(secrets) == 2
    assert not [s for s in secrets for t in texts if s in t.out + t.err]


def test_a_ninth_key_is_refused_and_nothing_is_changed(box: Box) -> None:
    for _ in range(7):
        rotated(box)
    before = contents(box.directory)
    outcome = box("key", "rotate")
    assert "8 keys" in check_complaint(outcome, 78)
    assert "key retire" in outcome.err
    after = contents(box.directory)
    assert {name: after[name] for name in before} == before
    filled(box, 1, ring(box)[7])
    assert box("vault", "verify").code == 0


@pytest.mark.parametrize("provider", ["command", "auto"])
def test_where_this_program_cannot_store_a_key_all_goes_on_with_the_old_one(
    box: Box, provider: str
) -> None:
    filled(box, 1)
    credentials = box.directory / "credentials"
    credentials.mkdir()
    box.key.rename(credentials / "secimg-watch.main")
    if provider == "command":
        command = ["cat", f"{credentials}/secimg-watch.main"]
        box.write_policy(more={"key": {"provider": "command", "command": command}})
    else:
        box.write_policy(more={"key": {"provider": "auto"}})
        box.cli.environ["CREDENTIALS_DIRECTORY"] = str(credentials)
    before = contents(credentials)
    vaults_keys = known(vault_of(box))
    assert "cannot be written" in check_complaint(box("key", "rotate"), 78)
    assert known(vault_of(box)) == vaults_keys
    assert contents(credentials) == before
    (box.drop / "b.png").write_bytes(picture())
    assert box("drain").code == 0
    assert box("vault", "verify").code == 0
    assert done(box("vault", "rekey")) == "0 of 2 objects changed, 0 failed"


def test_a_policy_without_a_key_has_none_to_rotate(box: Box) -> None:
    with_recipients(box, ALICE, key={"provider": "none"})
    for command in ("key rotate", "key retire 00"):
        check_complaint(box(*command.split()), 78)


@pytest.mark.parametrize("command", ["rotate", "retire"])
def test_whenever_a_change_of_keys_dies_the_vault_opens_and_the_next_one_succeeds(
    box: Box, command: str
) -> None:
    words = ["--policy", str(box.policy), "key", command]
    if command == "retire":
        rotated(box)
        words.append(ring(box)[1].key_id.hex())
    [(object_id, content)] = filled(box, 1).items()
    first = ring(box)

    def change() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            cli.main(words)

    before = contents(box.directory)
    rings = set()
    number = 1
    while die_at_call(number, change):
        now = ring(box)
        rings.add(len(now))
        vault = vault_of(box)
        assert content_of(vault, object_id, *now) == content
        # What is sealed with, the vault knows. After a rotation it may know one more, which
        # nobody has; a key that it still knows is never the one that was thrown away.
        assert now[0].key_id in known(vault)
        assert command == "rotate" or known(vault) <= {key.key_id for key in now}
        number += 1
        for name in ("vault.key", "vault/vault.json"):
            (box.directory / name).unlink()
            (box.directory / name).write_bytes(before[name])
            (box.directory / name).chmod(0o400)
    assert rings == {1, 2}
    assert box("vault", "verify").code == 0
    assert ring(box) == first[:1] if command == "retire" else ring(box)[1:] == first


def test_keys_are_changed_by_one_process_at_a_time(box: Box) -> None:
    # Of two rotations at once, one would take away the other's new key.
    rotated(box)
    former = ring(box)[1].key_id.hex()
    before = contents(box.directory)
    with vault_of(box).replacing():
        for command in ("key rotate", f"key retire {former}"):
            check_complaint(box(*command.split()), 75)
    after = contents(box.directory)
    assert {name: after[name] for name in before} == before
    assert box("key", "retire", former).code == 0


@pytest.mark.parametrize("command", ["rotate", "retire"])
def test_keys_are_not_changed_while_a_vault_is_not_there(box: Box, command: str) -> None:
    # It would miss the new key, or be left without the former one.
    rotated(box)
    former = ring(box)[1].key_id.hex()
    filled(box, 1, ring(box)[1])
    unmounted = box.directory / "unmounted"
    box.vault.rename(unmounted)
    before = contents(box.directory)
    words = ["rotate"] if command == "rotate" else ["retire", former]
    check_complaint(box("key", *words), 66)
    assert contents(box.directory) == before
    assert not box.vault.exists()


# -- key retire --------------------------------------------------------------------------------


def test_a_former_key_is_retired_when_no_object_needs_it(box: Box) -> None:
    before = filled(box)
    [former] = ring(box)
    assert box("key", "rotate").code == 0
    current = ring(box)[0]
    line = box.key.read_text()
    refused = box("key", "retire", former.key_id.hex()[:8])
    sentence = check_complaint(refused, 78)
    assert f"3 objects still open with key {former.key_id.hex()}" in sentence
    assert "vault rekey" in refused.err
    assert box.key.read_text() == line
    assert known(vault_of(box)) == {current.key_id, former.key_id}
    assert done(box("vault", "rekey")) == "3 of 3 objects changed, 0 failed"
    outcome = box("key", "retire", former.key_id.hex()[:8].upper())
    assert (outcome.code, former.key_id.hex() in outcome.out) == (0, True)
    assert ring(box) == (current,)
    assert known(vault_of(box)) == {current.key_id}
    vault = vault_of(box)
    assert {each: content_of(vault, each, current) for each in before} == before
    assert [row["key"] for row in box("key", "list", "--json").json()["keys"]] == [
        current.key_id.hex()
    ]
    assert box("vault", "verify").code == 0
    # The old key, wherever it still is, is not let in any more.
    box.key.unlink()
    box.key.write_text(line.split()[1] + "\n")
    box.key.chmod(0o400)
    check_complaint(box("vault", "verify"), 78)


def test_the_current_key_and_an_unknown_one_are_not_retired(box: Box) -> None:
    [only] = ring(box)
    assert "current" in check_complaint(box("key", "retire", only.key_id.hex()), 64)
    rotated(box)
    current, former = ring(box)
    before = contents(box.directory)
    assert "current" in check_complaint(box("key", "retire", current.key_id.hex()), 64)
    check_complaint(box("key", "retire", "f" * 33), 66)
    check_complaint(box("key", "retire", ""), 64)
    after = contents(box.directory)
    assert {name: after[name] for name in before} == before
    assert ring(box) == (current, former)


def test_no_key_is_retired_while_somebody_seals(box: Box) -> None:
    rotated(box)
    former = ring(box)[1].key_id.hex()
    vault = vault_of(box)
    vault.lock()
    check_complaint(box("key", "retire", former), 75)
    assert len(ring(box)) == 2
    vault.unlock()
    assert box("key", "retire", former).code == 0


def test_no_key_is_retired_while_an_object_does_not_say_what_it_needs(box: Box) -> None:
    [object_id] = filled(box, 1)
    rotated(box)
    former = ring(box)[1].key_id.hex()
    damage(vault_of(box), object_id, 0)
    assert "cannot be read" in check_complaint(box("key", "retire", former), 78)
    assert len(ring(box)) == 2


def test_no_key_is_retired_while_not_all_objects_can_be_listed(box: Box) -> None:
    rotated(box)
    former = ring(box)[1]
    [object_id] = filled(box, 1, former)
    before = ring(box)
    shard = box.vault / "objects" / object_id[:2]
    shard.rename(box.directory / "elsewhere")
    shard.touch()  # what may not be read is told by another word, but only where this is not root
    for words in (["key", "retire", former.key_id.hex()], ["vault", "verify"], ["vault", "rekey"]):
        assert "cannot be listed" in check_complaint(box(*words), 74)
    assert ring(box) == before


def test_a_key_that_this_program_cannot_remove_is_left_to_who_can(box: Box) -> None:
    rotated(box)
    filled(box, 1)
    line = box.key.read_text()
    former = ring(box)[1]
    real = box.directory / "real"
    box.key.rename(real)
    box.write_policy(more={"key": {"provider": "command", "command": ["cat", str(real)]}})
    assert box("vault", "rekey").code == 0
    before = known(vault_of(box))
    refused = box("key", "retire", former.key_id.hex())
    assert "cannot be written" in check_complaint(refused, 78)
    assert known(vault_of(box)) == before
    assert box("vault", "verify").code == 0
    real.chmod(0o600)
    real.write_text(line.split()[0] + "\n")
    assert box("vault", "verify").code == 0


# -- vault rekey -------------------------------------------------------------------------------


def test_a_rekey_brings_every_object_to_the_policy_and_a_second_one_changes_nothing(
    box: Box,
) -> None:
    before = filled(box)
    sections = all_sections(box)
    rotated(box)
    with_recipients(box, ALICE)
    current = ring(box)[0]
    dry = box("vault", "rekey", "--dry-run")
    assert done(dry) == "3 of 3 objects would change, 0 failed"
    assert not (box.vault / "rekey" / "reencrypted").exists()
    outcome = box("vault", "rekey")
    assert done(outcome) == "3 of 3 objects changed, 0 failed"
    assert f"3 objects open with key {current.key_id.hex()}" in outcome.out
    assert f"3 objects open with recipient {ALICE.key_id.hex()}" in outcome.out
    assert all_sections(box) == sections
    vault = vault_of(box)
    for opener in (current, FIRST):
        assert {each: content_of(vault, each, opener) for each in before} == before
    files = {path: path.stat() for path in box.objects()}
    assert done(box("vault", "rekey")) == "0 of 3 objects changed, 0 failed"
    assert {path: path.stat() for path in box.objects()} == files
    assert done(box("vault", "rekey", "--dry-run")) == "0 of 3 objects would change, 0 failed"


@pytest.mark.parametrize("command", ["rekey", "reencrypt"])
def test_a_dry_run_changes_nothing_at_all(box: Box, command: str) -> None:
    filled(box, 2)
    with_recipients(box, ALICE)
    before = contents(box.directory)
    listing = sorted(box.vault.rglob("*"))
    outcome = box("vault", command, "--dry-run", "--json")
    assert outcome.code == 0
    assert (outcome.json()["objects"], outcome.json()["changed"]) == (2, 2)
    assert contents(box.directory) == before
    assert sorted(box.vault.rglob("*")) == listing


def test_a_recipient_comes_and_goes_with_the_policy(box: Box) -> None:
    before = filled(box, 2)
    private = identity(box, FIRST)
    with_recipients(box, ALICE)
    assert box("vault", "verify", "--identity", private).code == 1
    assert done(box("vault", "rekey")) == "2 of 2 objects changed, 0 failed"
    assert box("vault", "verify", "--identity", private).code == 0
    assert box("key", "recovery", "test", "--identity", private).code == 0
    box.write_policy()
    assert done(box("vault", "rekey")) == "2 of 2 objects changed, 0 failed"
    assert box("vault", "verify", "--identity", private).code == 1
    vault = vault_of(box)
    assert {each: content_of(vault, each, *ring(box)) for each in before} == before


def test_the_outcome_as_json_has_the_census_in_it(box: Box) -> None:
    filled(box, 2)
    with_recipients(box, ALICE)
    put(vault_of(box), [*ring(box), PASSWORD], passwords=PasswordCache())
    assert box("vault", "rekey", "--json").json() == {
        "objects": 3,
        "changed": 3,
        "failed": {},
        "census": {
            "main": {
                f"key {ring(box)[0].key_id.hex()}": 3,
                f"recipient {ALICE.key_id.hex()}": 3,
                f"password {PASSWORD.key_id.hex()}": 1,
            }
        },
    }


@pytest.mark.parametrize("command", ["rekey", "reencrypt"])
def test_an_object_that_does_not_open_is_left_alone_and_named(box: Box, command: str) -> None:
    filled(box, 2)
    foreign = put(vault_of(box), [a_key()])
    path = vault_of(box).object_path(foreign)
    before = path.read_bytes()
    rotated(box)
    outcome = box("vault", command)
    assert outcome.code == 1
    assert outcome.out.splitlines()[-1].endswith(", 1 failed")
    assert re.search(rf"object {foreign}: .*none of that is at hand", outcome.err)
    assert path.read_bytes() == before
    for each in set(vault_of(box).object_ids()) - {foreign}:
        assert slots_of(vault_of(box), each) == [("key", ring(box)[0].key_id)]
    assert list(box("vault", command, "--json").json()["failed"]) == [foreign]


def test_a_private_key_opens_what_the_policys_key_does_not(box: Box) -> None:
    before = filled(box, 2, a_key(), ALICE)
    assert box("vault", "rekey").code == 1
    outcome = box("vault", "rekey", "--identity", identity(box, SECOND, FIRST))
    assert done(outcome) == "2 of 2 objects changed, 0 failed"
    vault = vault_of(box)
    assert {each: content_of(vault, each, *ring(box)) for each in before} == before


def test_a_write_only_vault_needs_a_private_key_for_other_keys(tmp_path: Path) -> None:
    box = Box(tmp_path)
    with_recipients(box, ALICE, key={"provider": "none"})
    assert box("key", "init").code == 0
    vault = vault_of(box)
    ids = [put(vault, [ALICE]) for _ in range(2)]
    before = {each: content_of(vault, each, FIRST) for each in ids}
    with_recipients(box, ALICE, BOB, key={"provider": "none"})
    for command in ("rekey", "reencrypt"):
        outcome = box("vault", command)
        assert "write-only" in check_complaint(outcome, 78)
        assert "--identity" in outcome.err
        assert box("vault", command, "--dry-run").code == 0
    private = identity(box, FIRST)
    for command in ("rekey", "reencrypt"):
        assert done(box("vault", command, "--identity", private)).startswith("2 of 2")
        for opener in (FIRST, SECOND):
            assert {each: content_of(vault, each, opener) for each in ids} == before


def test_two_runs_at_once_exclude_each_other(box: Box) -> None:
    filled(box, 1)
    rotated(box)
    half = box.vault / "rekey" / f"{'0' * 32}.simg"
    with vault_of(box).replacing():
        half.write_bytes(b"half an object")
        before = contents(box.vault)
        for command in ("rekey", "reencrypt"):
            check_complaint(box("vault", command), 75)
        assert contents(box.vault) == before
    assert done(box("vault", "rekey")) == "1 of 1 objects changed, 0 failed"
    assert left_aside(vault_of(box)) == []


@pytest.mark.parametrize("command", ["rekey", "reencrypt"])
def test_too_little_space_stops_the_run_and_nothing_is_lost(box: Box, command: str) -> None:
    before = filled(box)
    rotated(box)
    greedy = {"main": {"path": str(box.vault), "min_free": "1000TB"}}
    box.write_policy(more={"vaults": greedy})
    files = {path: path.read_bytes() for path in box.objects()}
    outcome = box("vault", command)
    check_complaint(outcome, 75)
    assert "min_free" in outcome.err
    assert {path: path.read_bytes() for path in box.objects()} == files
    assert left_aside(vault_of(box)) == []
    box.write_policy()
    assert done(box("vault", command)).startswith("3 of 3")
    vault = vault_of(box)
    assert {each: content_of(vault, each, ring(box)[0]) for each in before} == before


@pytest.mark.skipif(not can_mount(), reason="mounting takes root's privileges")
@pytest.mark.parametrize("command", ["rekey", "reencrypt"])
@pytest.mark.parametrize("room", [0, 20_000])
def test_a_full_disk_stops_the_run_and_nothing_is_lost(
    tmp_path: Path, command: str, room: int
) -> None:
    (tmp_path / "vault").mkdir()
    with mounted_tmpfs(tmp_path / "vault", "2m"):
        box = make_box(tmp_path)
        vault = vault_of(box)
        ids = sorted(put(vault, ring(box), os.urandom(n)) for n in (9_000, 9_001, 70_000))
        before = {each: content_of(vault, each, *ring(box)) for each in ids}
        rotated(box)
        filler = tmp_path / "vault" / "filler"
        with filler.open("wb") as file:
            usage = os.statvfs(box.vault)
            file.write(bytes(usage.f_bavail * usage.f_frsize - room))
        check_complaint(box("vault", command), 75)
        assert left_aside(vault) == []
        assert {each: content_of(vault, each, *ring(box)) for each in ids} == before
        filler.unlink()
        assert box("vault", command).code == 0
        assert {each: content_of(vault, each, ring(box)[0]) for each in ids} == before


def test_one_of_several_vaults_is_rekeyed_where_it_is_named(box: Box) -> None:
    vaults = {
        name: {"path": str(box.directory / name), "min_free": "0B"} for name in ("main", "more")
    }
    vaults["main"]["path"] = str(box.vault)
    box.write_policy(more={"vaults": vaults}, vault="main")
    assert box("key", "init").code == 0
    more = Vault(box.directory / "more", NO_RESERVE)
    filled(box, 1)
    object_id = put(more, ring(box))
    rotated(box)
    assert done(box("vault", "rekey", "--vault", "more")).startswith("1 of 1")
    assert slots_of(more, object_id) == [("key", ring(box)[0].key_id)]
    # What the other vault needs is not retired because this one needs it no longer.
    refused = box("key", "retire", ring(box)[1].key_id.hex())
    assert str(box.vault) in check_complaint(refused, 78)
    assert len(known(more)) == len(ring(box)) == 2
    assert done(box("vault", "rekey")) == "1 of 2 objects changed, 0 failed"
    assert box("key", "retire", ring(box)[1].key_id.hex()).code == 0
    check_complaint(box("vault", "rekey", "--vault", "other"), 64)


@pytest.mark.skipif(not IS_ROOT, reason="only root gives files away")
def test_the_services_objects_stay_its_own_when_root_rekeys_them(box: Box) -> None:
    filled(box, 2)
    for path in box.objects():
        os.chown(path, NOBODY, NOBODY)
    for command in (["key", "rotate"], ["vault", "rekey"], ["vault", "reencrypt"]):
        assert box(*command).code == 0
        assert {path.stat().st_uid for path in box.objects()} == {NOBODY}


# -- beside the service ------------------------------------------------------------------------


def test_keys_are_changed_beside_a_service_that_goes_on_sealing(site: Site) -> None:
    daemon = site.start()
    sealed = {f"{n}.jpg".encode(): place(site.drop / f"{n}.jpg", photo()) for n in range(10)}
    site.wait_until_clear()

    cli_of_site = Cli(site.top / "home")

    def ask(*words: str) -> Outcome:
        return cli_of_site("--policy", site.policy_path, *words)

    assert ask("key", "rotate").code == 0
    current, former = decode_ring(site.key.read_text().strip())
    vault = Vault(site.vault, NO_RESERVE)
    for number in range(10, 20):
        sealed[f"{number}.jpg".encode()] = place(site.drop / f"{number}.jpg", photo())
    assert ask("vault", "rekey").code == 0
    site.wait_until_clear()
    check_complaint(ask("key", "retire", former.key_id.hex()), 75)
    seen = len(daemon.notices())
    daemon.send("HUP")
    daemon.wait_for_notice("READY=1", since=seen)
    before = set(vault.object_ids())
    for number in range(20, 30):
        sealed[f"{number}.jpg".encode()] = place(site.drop / f"{number}.jpg", photo())
    assert ask("vault", "reencrypt").code == 0
    site.wait_until_clear()
    wait_until(lambda: len(vault.object_ids()) == 30, "all to be sealed")
    after = set(vault.object_ids()) - before
    assert {key for each in after for key in slots_of(vault, each)} == {("key", current.key_id)}
    assert ask("vault", "rekey").code == 0
    assert daemon.stop() == 0
    assert ask("key", "retire", former.key_id.hex()).code == 0
    assert site.restored() == sealed
    assert site.temporaries() == []
    place(site.drop / "last.jpg", photo())
    site.start()
    site.wait_until_clear()


# -- vault reencrypt ---------------------------------------------------------------------------


def check_sealed_anew(box: Box, before: dict[str, bytes]) -> None:
    """Whether nothing that was sealed is what it was."""
    after = all_sections(box)
    assert after.keys() == before.keys()
    assert [each for each in before if after[each] == before[each]] == []


def test_every_object_is_sealed_anew_and_holds_what_it_did(box: Box) -> None:
    before = filled(box)
    rotated(box)
    with_recipients(box, ALICE)
    sections = all_sections(box)
    outcome = box("vault", "reencrypt")
    assert done(outcome) == "3 of 3 objects sealed anew, 0 failed"
    check_sealed_anew(box, sections)
    vault = vault_of(box)
    for opener in (ring(box)[0], FIRST):
        assert {each: content_of(vault, each, opener) for each in before} == before
    assert os.listdir(box.vault / "rekey") == ["lock"]
    assert box("vault", "verify").code == 0
    # Done to its end, it is done: the next run is another one.
    sections = all_sections(box)
    assert done(box("vault", "reencrypt")) == "3 of 3 objects sealed anew, 0 failed"
    check_sealed_anew(box, sections)


def broken_off(box: Box, more: int = 2) -> tuple[ObjectId, dict[str, bytes]]:
    """A run that left one damaged object behind; gives that, and all objects' sections now."""
    filled(box, more)
    count = len(box.objects())
    damaged = put(vault_of(box), ring(box)[:1])
    damage(vault_of(box), damaged, -1)
    before = vault_of(box).object_path(damaged).read_bytes()
    outcome = box("vault", "reencrypt")
    assert outcome.code == 1
    assert outcome.out.splitlines()[-1] == f"{count} of {count + 1} objects sealed anew, 1 failed"
    assert f"object {damaged}: " in outcome.err
    assert vault_of(box).object_path(damaged).read_bytes() == before
    return damaged, all_sections(box)


def repair(box: Box, damaged: ObjectId) -> None:
    damage(vault_of(box), damaged, -1)


def test_a_run_that_failed_for_an_object_goes_on_with_that_one(box: Box) -> None:
    damaged, sections = broken_off(box)
    outcome = box("vault", "reencrypt")
    assert outcome.code == 1
    assert all_sections(box) == sections
    repair(box, damaged)
    outcome = box("vault", "reencrypt")
    assert outcome.code == 0
    assert "going on behind 2 objects" in outcome.err
    after = all_sections(box)
    assert {each for each in after if after[each] != sections[each]} == {damaged}
    assert box("vault", "verify").code == 0
    assert done(box("vault", "reencrypt")) == "3 of 3 objects sealed anew, 0 failed"


def test_what_was_sealed_since_is_sealed_anew_as_well(box: Box) -> None:
    damaged, sections = broken_off(box)
    more = filled(box, 1)
    sections |= all_sections(box)
    repair(box, damaged)
    assert box("vault", "reencrypt").code == 0
    after = all_sections(box)
    assert {each for each in after if after[each] != sections[each]} == {damaged, *more}


def test_after_another_leak_nothing_is_passed_over(box: Box) -> None:
    damaged, sections = broken_off(box)
    rotated(box)
    repair(box, damaged)
    assert done(box("vault", "reencrypt")) == "3 of 3 objects sealed anew, 0 failed"
    check_sealed_anew(box, sections)


def test_after_another_leak_and_a_rekey_nothing_is_passed_over(box: Box) -> None:
    damaged, _sections = broken_off(box)
    rotated(box)
    repair(box, damaged)
    assert box("vault", "rekey").code == 0
    sections = all_sections(box)
    assert done(box("vault", "reencrypt")) == "3 of 3 objects sealed anew, 0 failed"
    check_sealed_anew(box, sections)


def test_with_another_recipient_nothing_is_passed_over(box: Box) -> None:
    damaged, sections = broken_off(box)
    with_recipients(box, ALICE)
    repair(box, damaged)
    assert done(box("vault", "reencrypt")) == "3 of 3 objects sealed anew, 0 failed"
    check_sealed_anew(box, sections)


def test_an_object_that_came_back_from_a_backup_is_not_passed_over(box: Box) -> None:
    # Its file key is the one that was known to whoever stole the key.
    [object_id] = filled(box, 1)
    path = vault_of(box).object_path(object_id)
    backup = path.read_bytes()
    damaged, sections = broken_off(box, more=1)
    path.unlink()
    path.write_bytes(backup)
    repair(box, damaged)
    old = sections_of(vault_of(box), object_id)
    outcome = box("vault", "reencrypt")
    assert (outcome.code, "behind 1 objects" in outcome.err) == (0, True)
    assert sections_of(vault_of(box), object_id) not in {old, sections[object_id]}


@pytest.mark.parametrize("harm", [b"\xff\xfe garbage \x00\n", b"0123", b"", bytes(4_096)])
def test_a_damaged_journal_costs_no_more_than_doing_it_again(box: Box, harm: bytes) -> None:
    damaged, sections = broken_off(box)
    [journal] = set((box.vault / "rekey").iterdir()) - {box.vault / "rekey" / "lock"}
    journal.write_bytes(harm)
    assert box("vault", "reencrypt").code == 1
    check = all_sections(box)
    assert {each for each in check if check[each] == sections[each]} == {damaged}
    assert box("vault", "reencrypt").code == 1
    assert all_sections(box) == check, "what was noted behind the damage counts"


def test_a_vault_that_is_done_is_done_whatever_becomes_of_another_one(box: Box) -> None:
    vaults = {
        name: {"path": str(box.directory / name), "min_free": "0B"} for name in ("main", "more")
    }
    vaults["main"]["path"] = str(box.vault)
    box.write_policy(more={"vaults": vaults}, vault="main")
    assert box("key", "init").code == 0
    more = Vault(box.directory / "more", NO_RESERVE)
    object_id = put(more, ring(box))
    damaged = put(vault_of(box), ring(box))
    damage(vault_of(box), damaged, -1)
    assert box("vault", "reencrypt").code == 1
    assert os.listdir(more.path / "rekey") == ["lock"]
    before = sections_of(more, object_id)
    assert box("vault", "reencrypt").code == 1
    assert sections_of(more, object_id) != before


def test_the_outcome_of_sealing_anew_is_there_as_json(box: Box) -> None:
    [object_id] = filled(box, 1)
    answer = box("vault", "reencrypt", "--json").json()
    key = f"key {ring(box)[0].key_id.hex()}"
    assert answer == {"objects": 1, "changed": 1, "failed": {}, "census": {"main": {key: 1}}}
    damage(vault_of(box), object_id, -1)
    outcome = box("vault", "reencrypt", "--json")
    assert outcome.code == 1
    assert list(json.loads(outcome.out)["failed"]) == [object_id]
