"""What the audit log says of a machine's life, what it never says, and the commands about it."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from cli_runner import INSPECTED, Box, check_complaint, check_harmless, picture
from daemon import Site, place, wait_until
from daemon import picture as noise
from path_builders import only_on_linux

from secimg_watch import audit
from secimg_watch.audit import HEAD_NAME, LOG_NAME, Audit, Event
from secimg_watch.errors import DiskFullError
from secimg_watch.jobs import Jobs
from secimg_watch.keys import decode_ring
from secimg_watch.policy import load_policy
from secimg_watch.recipients import format_recipient, generate_identity, identity_file, recipient_of
from secimg_watch.records import KeySet
from secimg_watch.service import Service

only_on_linux()
assert sys.platform == "linux"

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from secimg_watch.report import Report

OPERATIONS: Final = Path(__file__).parent.parent / "docs" / "operations.md"
OWNER = generate_identity()
ODD: Final = (
    "Zwölfter-Personalausweis",
    "quixotic_7f3a",
    "Müller\n\x1b[31m",
    "kyrgyzstan-passport",
)
BROKEN: Final = picture("red", "PNG", (400, 400))[:300]
Said = dict[str, Any]


def shown(box: Box, *words: str) -> list[Said]:
    """The entries as a program gets them."""
    outcome = box("audit", "show", "--json", *words)
    assert outcome.code == 0, outcome
    entries: list[Said] = outcome.json()
    return entries


def log_of(box: Box) -> bytes:
    return (box.state / LOG_NAME).read_bytes()


@dataclass
class Life:
    """A machine that has done everything once: what it was given, and what its log says."""

    box: Box
    names: list[bytes] = field(default_factory=list)
    pictures: list[bytes] = field(default_factory=list)
    rings: list[str] = field(default_factory=list)
    said: list[Said] = field(default_factory=list)

    def drop(self, *names: str, content: bytes | None = None) -> None:
        for name in names:
            path = self.box.drop / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self.pictures.append(content or os.urandom(3000))
            path.write_bytes(self.pictures[-1])
            self.names += [os.fsencode(part) for part in path.relative_to(self.box.drop).parts]

    def do(self, *words: str | Path, code: int = 0) -> str:
        outcome = self.box(*words)
        assert outcome.code == code, outcome
        if self.box.key.exists():
            self.rings.append(self.box.key.read_text())
        return outcome.out

    def events(self, *kinds: str) -> list[Said]:
        return [entry for entry in self.said if not kinds or entry["event"] in kinds]


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    directory = tmp_path_factory.mktemp("life")
    recovery = directory / "recovery.key"
    recovery.write_text(identity_file(OWNER))
    more = {"recipients": [format_recipient(recipient_of(OWNER))]}
    box = Box(directory, more=more)
    life = Life(box)
    life.do("key", "init")
    life.do("key", "recovery", "confirm", "--identity", recovery)
    life.drop(f"{ODD[0]}.jpg", f"{ODD[1]}/2026/{ODD[2]}.png")
    life.do("drain")
    former = decode_ring(box.key.read_text().strip())
    box.write_policy(more=more, after="keep")
    life.drop(f"{ODD[3]}.jpg")
    life.do("drain")
    (box.drop / f"{ODD[3]}.jpg").unlink()
    aside = directory / "aside"
    box.write_policy(more=more, after=f"move:{aside}")
    life.drop(f"{ODD[1]}/moved.jpg")
    life.do("drain")
    shutil.rmtree(aside)
    box.write_policy(more=more, **INSPECTED, undecodable="quarantine")
    life.drop(f"{ODD[1]}/left.txt", content=b"no picture at all, and of no interest")
    life.drop(f"{ODD[0]}-broken.png", content=BROKEN)
    life.do("drain", code=1)
    life.do("key", "rotate")
    life.do("vault", "rekey")
    life.do("vault", "reencrypt")
    # A service that was not reloaded goes on with the former key until it is stopped.
    late = Audit(box.state, KeySet(former, (recipient_of(OWNER),)))
    late.append([Event("stopped")], durable=True)
    late.close()
    life.do("key", "retire", former[0].key_id.hex())
    life.said = shown(box)
    yield life
    shutil.rmtree(directory, ignore_errors=True)


# -- what it says --------------------------------------------------------------------------------


def test_everything_is_on_record(life: Life) -> None:
    kinds = [entry["event"] for entry in life.said]
    assert kinds[:4] == ["epoch", "key made", "recovery confirmed", "started"]
    assert set(kinds) == {
        *("epoch", "started", "stopped", "sealed", "deleted", "kept", "moved", "left"),
        *("quarantined", "key made", "key rotated", "key retired", "recovery confirmed"),
        *("objects rekeyed", "objects sealed anew"),
    }
    assert [entry["n"] for entry in life.said] == list(range(1, len(kinds) + 1))
    assert (kinds.count("started"), kinds.count("stopped")) == (4, 5)


def test_what_is_sealed_is_an_object_of_the_vault_with_its_size_and_proof(life: Life) -> None:
    sealed = life.events("sealed")
    assert {entry["object"] for entry in sealed} == {path.stem for path in life.box.objects()}
    vault = life.box._vault().info().vault_id.hex()
    for entry in sealed:
        assert (entry["vault"], entry["folder"]) == (vault, str(life.box.drop))
        assert (entry["size"], entry["proof"]) == (3000, "lease")
        assert entry["seen"] <= entry["time"]


def test_a_picture_is_on_record_as_sealed_before_it_is_as_gone(life: Life) -> None:
    sealed = {entry["object"]: entry["n"] for entry in life.events("sealed")}
    ends = life.events("deleted", "kept", "moved")
    assert sorted(entry["object"] for entry in ends) == sorted(sealed)
    assert [entry["event"] for entry in ends] == ["deleted", "deleted", "kept", "moved"]
    for entry in ends:
        assert sealed[entry["object"]] < entry["n"]


def test_what_was_not_taken_is_there_with_its_reason(life: Life) -> None:
    [left], [quarantined] = life.events("left"), life.events("quarantined")
    assert left["reason"] == "not an image; the policy leaves it in the folder"
    assert "an image that does not decode" in quarantined["reason"]
    assert left["folder"] == quarantined["folder"] == str(life.box.drop)


def test_keys_are_named_by_their_ids(life: Life) -> None:
    [made], [rotated], [retired] = map(life.events, ("key made", "key rotated", "key retired"))
    assert made["key"] == retired["key"]
    assert [rotated["key"]] == [
        key.key_id.hex() for key in decode_ring(life.box.key.read_text().strip())
    ]
    [confirmed] = life.events("recovery confirmed")
    assert confirmed["recipient"] == OWNER.key_id.hex()
    [rekeyed], [anew] = life.events("objects rekeyed"), life.events("objects sealed anew")
    assert rekeyed["changed"] == anew["changed"] == 4


def forms(secret: bytes) -> Iterator[bytes]:
    """What a secret may look like in a file."""
    yield secret
    yield json.dumps(secret.decode("utf-8", "surrogateescape"))[1:-1].encode()
    yield secret.hex().encode()
    yield base64.b64encode(secret).rstrip(b"=")[:-1]


def test_no_name_no_picture_and_no_key_is_ever_in_it(life: Life) -> None:
    keys = [key.key for ring in life.rings for key in decode_ring(ring.strip())]
    secrets = [name for name in life.names if len(name) > 4] + [OWNER.seed, *keys]
    secrets += [os.fsencode(name) for name in ODD]
    secrets += [data[at : at + 12] for data in life.pictures for at in range(0, 300, 40)]
    assert len(secrets) > 30
    data = log_of(life.box) + (life.box.state / HEAD_NAME).read_bytes()
    found = [secret for secret in secrets if any(form in data for form in forms(secret) if form)]
    assert found == []
    assert all(any(form in name for form in forms(b"7f3a")) for name in [b"quixotic_7f3a"])


def test_the_documentation_has_every_event_and_what_it_says(life: Life) -> None:
    table = re.search(
        r"<!-- audit events -->\n(.*?)<!-- /audit events -->", OPERATIONS.read_text(), re.DOTALL
    )
    assert table, "docs/operations.md has no table of events"
    rows = re.findall(r"^\| `([a-z ]+)` \| (.*?) \|", table[1], re.MULTILINE)
    documented = {what: set(re.findall(r"`(\w+)`", fields)) for what, fields in rows}
    for entry in life.said:
        said = set(entry) - {"n", "time", "event"}
        assert said <= documented[entry["event"]], entry["event"]
    source = "".join(path.read_text() for path in Path(audit.__file__).parent.rglob("*.py"))
    for what in documented:
        assert f'"{what}"' in source, what


# -- the commands --------------------------------------------------------------------------------


def test_checking_counts_and_names_the_last_entry(life: Life) -> None:
    outcome = life.box("audit", "verify")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert "4 sealed" in lines
    assert re.fullmatch(rf"{len(life.said)} entries, \S+Z to \S+Z: as it was written", lines[-2])
    last = json.loads(log_of(life.box).splitlines()[-1])["mac"]
    assert lines[-1] == f"last entry {last}"
    found = life.box("audit", "verify", "--json").json()
    assert (found["entries"], found["faults"], found["mac"]) == (len(life.said), [], last)
    assert found["events"]["sealed"] == 4


def test_a_listing_can_be_narrowed_down(life: Life) -> None:
    one = life.events("sealed")[1]["object"]
    events = [entry["event"] for entry in shown(life.box, "--object", one[:9].upper())]
    assert events == ["sealed", "deleted"]
    assert {entry["event"] for entry in shown(life.box, "--event", "key made")} == {"key made"}
    assert shown(life.box, "--last", "2") == life.said[-2:]
    assert shown(life.box, "--event", "sealed", "--last", "1") == life.events("sealed")[-1:]
    assert shown(life.box, "--object", "zz") == []
    assert life.box("audit", "show", "--last", "0").code == 64


def test_a_listing_for_people_has_one_line_an_entry_without_wrapped_keys(life: Life) -> None:
    outcome = life.box("audit", "show")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert len(lines) == len(life.said)
    assert max(map(len, lines)) < 400
    number, time, event, *said = lines[-1].split(" ")
    assert (number, time) == (str(life.said[-1]["n"]), life.said[-1]["time"])
    assert f"key={life.events('key made')[0]['key']}" in said
    assert event == "key"


@pytest.fixture
def copy(life: Life, tmp_path: Path) -> Box:
    """The same machine's log and key, to do something to."""
    box = Box(tmp_path)
    shutil.copytree(life.box.state, box.state)
    shutil.copy(life.box.key, box.key)
    return box


def test_a_log_that_was_changed_is_65(copy: Box) -> None:
    log = copy.state / LOG_NAME
    log.write_bytes(log_of(copy).replace(b'"event":"left"', b'"event":"lost"'))
    outcome = copy("audit", "verify")
    assert outcome.code == 65
    assert re.search(r"^secimg-watch: entry \d+ was changed$", outcome.err, re.MULTILINE)
    assert "NOT as it was written" in outcome.out
    found = copy("audit", "verify", "--json")
    assert found.code == 65
    assert len(found.json()["faults"]) == 1
    assert copy("audit", "show").code == 0


def test_a_log_that_is_not_there_is_66(copy: Box) -> None:
    (copy.state / LOG_NAME).unlink()
    for command in ("verify", "show"):
        assert "there is no audit log" in check_complaint(copy("audit", command), 66)


def test_a_key_that_is_not_there_is_78_and_showing_needs_none(copy: Box) -> None:
    copy.key.unlink()
    check_complaint(copy("audit", "verify"), 78)
    assert copy("audit", "show").code == 0


def test_another_key_proves_nothing(copy: Box) -> None:
    copy.key.unlink()
    copy.make_key()
    outcome = copy("audit", "verify")
    assert outcome.code == 65
    assert "no key at hand opens the entries" in outcome.err


def test_with_the_key_lost_the_recovery_key_opens_what_it_can(copy: Box) -> None:
    copy.key.unlink()
    file = copy.directory / "recovery.key"
    file.write_text(identity_file(OWNER))
    outcome = copy("audit", "verify", "--identity", file)
    assert outcome.code == 0, outcome
    assert "without the key" in outcome.err
    assert "whoever has a recipient's public key" in outcome.err


def test_what_was_planted_is_shown_harmlessly(copy: Box) -> None:
    said = '"event":"\\u001b[31m\\n","x":"\\ud800\\u202e","object":"' + "\\ud800" * 3 + '"'
    line = f'{{"n":1,"time":"\\u0007",{said},"mac":"{"0" * 64}"}}\n'
    with (copy.state / LOG_NAME).open("a") as log:
        log.write(line)
    for words in (("show",), ("show", "--json"), ("verify",), ("verify", "--json")):
        outcome = copy("audit", *words)
        assert outcome.code == 0, outcome
        check_harmless(outcome)


def test_a_write_only_machines_log_is_for_the_private_key(tmp_path: Path) -> None:
    recipients = [format_recipient(recipient_of(OWNER))]
    box = Box(tmp_path, more={"key": {"provider": "none"}, "recipients": recipients})
    assert box("key", "init").code == 0
    for number in range(2):
        (box.drop / f"{number}.jpg").write_bytes(os.urandom(500))
        assert box("drain").code == 0
    assert "write-only" in check_complaint(box("audit", "verify"), 78)
    file = tmp_path / "recovery.key"
    file.write_text(identity_file(OWNER))
    outcome = box("audit", "verify", "--identity", file)
    assert outcome.code == 0, outcome
    assert "2 deleted" in outcome.out.splitlines()
    assert [entry["event"] for entry in shown(box)].count("epoch") == 2
    file.write_text(identity_file(generate_identity()))
    assert box("audit", "verify", "--identity", file).code == 65


# -- a log that cannot be written ----------------------------------------------------------------


@pytest.fixture
def box(tmp_path: Path) -> Box:
    box = Box(tmp_path)
    assert box("key", "init").code == 0
    for name in ("a.jpg", "b.jpg"):
        (box.drop / name).write_bytes(os.urandom(500))
    return box


def drained(box: Box) -> Report:
    """Take everything that is ready, in this process."""
    service = Service(load_policy(box.policy), native=False)
    service.open()
    try:
        service.drain(lambda _done, _of: None)
        return service.report(running=False)
    finally:
        service.stop()
        service.close()


def refuse(monkeypatch: pytest.MonkeyPatch, *kinds: str) -> None:
    """From now on nothing of these kinds can be put on record."""
    real = Audit.append

    def append(self: Audit, events: Sequence[Event], *, durable: bool) -> None:
        if any(event.what in kinds for event in events):
            raise DiskFullError("the audit log cannot be written: No space left on device")
        real(self, events, durable=durable)

    monkeypatch.setattr(Audit, "append", append)


def test_nothing_is_deleted_that_is_not_on_record_as_sealed(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, "sealed")
    [folder] = drained(box).folders
    assert folder.health == "paused"
    assert "the audit log cannot be written: No space left" in folder.reason
    assert len(box.objects()) == len(list(box.drop.rglob("*.jpg"))) == 2
    monkeypatch.undo()
    assert [folder.sealed for folder in drained(box).folders] == [2]
    assert len(box.objects()) == 2
    assert list(box.drop.rglob("*.jpg")) == []
    said = [entry["event"] for entry in shown(box)]
    assert (said.count("sealed"), said.count("deleted")) == (2, 2)
    assert box("audit", "verify").code == 0


def test_a_deletion_that_could_not_be_put_on_record_is_put_there_later(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, "deleted", "gone")
    [folder] = drained(box).folders
    assert (folder.health, folder.sealed) == ("paused", 0)
    assert list(box.drop.rglob("*.jpg")) == []
    monkeypatch.undo()
    assert [folder.sealed for folder in drained(box).folders] == [2]
    said = [entry["event"] for entry in shown(box)]
    assert (said.count("sealed"), said.count("deleted"), said.count("gone")) == (2, 0, 2)


@pytest.mark.parametrize("kind", ["left", "quarantined"])
def test_what_is_not_taken_waits_with_no_attempt_counted(
    box: Box, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    not_image = {"left": "leave", "quarantined": "quarantine"}[kind]
    box.write_policy(preview=0, not_image=not_image)
    refuse(monkeypatch, kind)
    [folder] = drained(box).folders
    assert (folder.health, folder.left, folder.quarantined) == ("paused", 0, 0)
    queue = Jobs(box.state / "queue.sqlite")
    assert {(row.state, row.attempts) for row in queue.rows()} == {("queued", 0)}
    queue.close()
    assert sorted(os.listdir(box.drop))[-2:] == ["a.jpg", "b.jpg"]
    monkeypatch.undo()
    [folder] = drained(box).folders
    assert folder.left + folder.quarantined == 2


def test_what_is_given_up_waits_until_that_can_be_said(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    box.write_policy(more={"limits": {"attempts": 1}})
    refuse(monkeypatch, "quarantined")

    def broken(*_args: object, **_kwargs: object) -> None:
        raise ValueError

    monkeypatch.setattr("secimg_watch.pipeline.seal", broken)
    [folder] = drained(box).folders
    assert (folder.health, folder.quarantined) == ("paused", 0)
    queue = Jobs(box.state / "queue.sqlite")
    assert {(row.state, row.attempts) for row in queue.rows()} == {("queued", 0)}
    queue.close()


def test_a_picture_that_may_not_be_deleted_is_on_record(box: Box) -> None:
    if os.stat("/dev/shm").st_dev == box.drop.stat().st_dev:
        pytest.skip("there is no second file system")
    elsewhere = Path("/dev/shm") / f"secimg-watch-{os.getpid()}"
    try:
        box.write_policy(after=f"move:{elsewhere}")
        assert [folder.undeletable for folder in drained(box).folders] == [2]
    finally:
        shutil.rmtree(elsewhere, ignore_errors=True)
    refused = shown(box, "--event", "not deleted")
    assert {entry["object"] for entry in refused} == {path.stem for path in box.objects()}
    assert {entry["reason"] for entry in refused} == {os.strerror(18)}


def test_a_drain_without_a_log_takes_nothing_and_says_why(box: Box) -> None:
    (box.state / LOG_NAME).rename(box.state / "aside")
    (box.state / LOG_NAME).mkdir()
    sentence = check_complaint(box("drain"), 75)
    assert sentence == "the audit log cannot be written: Is a directory"
    assert box.objects() == []
    assert sorted(os.listdir(box.drop)) == ["a.jpg", "b.jpg"]


def test_the_service_waits_for_its_log_and_goes_on_by_itself(site: Site) -> None:
    site.make_vaults()
    log, aside = site.state / LOG_NAME, site.state / "aside"

    def take_away() -> None:
        log.rename(aside)
        log.mkdir()

    def give_back() -> None:
        log.rmdir()
        aside.rename(log)

    def waits() -> bool:
        report = site.state / "status.json"
        return report.exists() and "audit log cannot be written" in report.read_text()

    take_away()
    place(site.drop / "a.jpg", noise())
    daemon = site.launch()
    daemon.wait_for_notice("READY=1")
    wait_until(waits, "the reason in the status")
    assert site.objects() == []
    give_back()
    site.wait_until_clear()
    take_away()
    place(site.drop / "b.jpg", noise())
    wait_until(waits, "the reason in the status")
    assert len(site.plaintexts()) == 1
    give_back()
    site.wait_until_clear()
    wait_until(lambda: site.status()["health"] == "ok", "the end of the pause")
    assert daemon.stop() == 0
    assert site.ask("audit", "verify")["faults"] == []
    assert len(site.restored()) == 2


def test_a_key_command_that_cannot_be_put_on_record_says_so(box: Box) -> None:
    (box.state / LOG_NAME).unlink()
    (box.state / LOG_NAME).mkdir()
    assert "audit log cannot be written" in check_complaint(box("key", "rotate"), 75)
