"""Looking into a vault, and getting pictures back out of it."""

from __future__ import annotations

import io
import os
import shutil
import sys
import time
from typing import TYPE_CHECKING

import pytest
from cli_runner import (
    HOSTILE,
    INSPECTED,
    Box,
    check_complaint,
    check_harmless,
    contents,
    make_box,
    picture,
)
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the service is for POSIX systems")

NOON_NS = 1_700_000_000_123_456_789
PICTURES = {
    "a.png": picture("red"),
    "b.jpg": picture("blue", "JPEG", (800, 600)),
    "2026/may/a.png": picture("green", "PNG", (30, 20)),
    "2026/c.gif": picture("black", "GIF"),
}
FIELDS = {
    *("object", "name", "folder", "source", "size", "format", "width", "height", "label"),
    *("mode", "modified_ns", "sealed_ns", "proof", "tool"),
}


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Box:
    """A box whose pictures are sealed. Never changed: see `box` for one that may be."""
    box = make_box(tmp_path_factory.mktemp("sealed"), **INSPECTED)
    drop(box, PICTURES)
    return box


@pytest.fixture
def box(sealed: Box, tmp_path: Path) -> Box:
    """The same vault and key in a box of one's own."""
    shutil.copytree(sealed.vault, tmp_path / "vault")
    shutil.copy(sealed.key, tmp_path / "vault.key")
    return Box(tmp_path)


def drop(box: Box, pictures: dict[str, bytes]) -> None:
    """Put pictures into the folder and have them sealed."""
    for name, data in pictures.items():
        path = box.drop / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o640)
        os.utime(path, ns=(NOON_NS, NOON_NS))
    outcome = box("--json", "drain")
    assert (outcome.code, outcome.json()["sealed"]) == (0, len(pictures)), outcome


# -- list and show -------------------------------------------------------------------------------


def names(box: Box, *options: str) -> set[str]:
    listed = box("vault", "list", "--json", *options)
    assert listed.code == 0, listed
    return {os.path.join(each["folder"], each["name"]) for each in listed.json()}


def test_a_listing_has_every_documented_field(sealed: Box) -> None:
    listed = sealed("vault", "list", "--json").json()
    assert len(listed) == len(PICTURES)
    assert all(each.keys() == FIELDS for each in listed)
    [picked] = [each for each in listed if each["name"] == "b.jpg"]
    expected = {
        "folder": "",
        "source": str(sealed.drop),
        "size": len(PICTURES["b.jpg"]),
        "format": "JPEG",
        "width": 800,
        "height": 600,
        "label": "image",
        "mode": "640",
        "modified_ns": NOON_NS,
    }
    assert expected.items() <= picked.items()
    assert abs(picked["sealed_ns"] / 1e9 - time.time()) < 3600


def test_a_listing_for_people_has_one_row_a_picture(sealed: Box) -> None:
    outcome = sealed("vault", "list", "--name", "b.jpg")
    assert (outcome.code, outcome.err) == (0, "")
    row = outcome.row()
    assert row["pixels"] == "800x600"
    assert row["format"] == "JPEG"
    assert sealed.object_named("b.jpg").startswith(row["object"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], set(PICTURES)),
        (["--vault", "main"], set(PICTURES)),
        (["--name", "a.*"], {"a.png", "2026/may/a.png"}),
        (["--name", "A.*"], set()),
        (["--folder", "2026"], {"2026/c.gif"}),
        (["--format", "png"], {"a.png", "2026/may/a.png"}),
        (["--format", "png", "--folder", "2026/may"], {"2026/may/a.png"}),
        (["--since", "2020-01-01"], set(PICTURES)),
        (["--since", "2999-01-01"], set()),
        (["--until", "2020-01-01"], set()),
        (["--since", "2020-01-01", "--until", "2999-01-01T12:00:00"], set(PICTURES)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else f"{len(value)} found",
)
def test_a_listing_is_narrowed_by_its_options(
    sealed: Box, options: list[str], expected: set[str]
) -> None:
    assert names(sealed, *options) == expected


def test_a_watched_folder_lists_all_that_came_from_it(sealed: Box) -> None:
    assert names(sealed, "--folder", str(sealed.drop)) == set(PICTURES)


def test_a_vault_that_the_policy_does_not_have_is_64(sealed: Box) -> None:
    sentence = check_complaint(sealed("vault", "list", "--vault", "other"), 64)
    assert "main" in sentence


def test_a_vault_that_is_not_there_is_66_and_is_not_made(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.make_key()
    outcome = box("vault", "list")
    check_complaint(outcome, 66)
    assert "secimg-watch key init" in outcome.err
    assert not box.vault.exists()


def test_one_picture_is_shown_by_the_beginning_of_its_id(sealed: Box) -> None:
    object_id = sealed.object_named("b.jpg")
    shown = sealed("vault", "show", object_id[:12].upper(), "--json")
    assert shown.code == 0
    [listed] = sealed("vault", "list", "--json", "--name", "b.jpg").json()
    assert shown.json() == listed
    lines = dict(
        line.split(maxsplit=1)
        for line in sealed("vault", "show", object_id).out.splitlines()
        if len(line.split(maxsplit=1)) == 2
    )
    assert lines["name"] == "b.jpg"
    assert lines["object"] == object_id


@pytest.mark.parametrize("object_id", ["00000000000000000000000000000000", "nonsense", HOSTILE])
@pytest.mark.parametrize("command", [["show"], ["restore", "--to", "out"]], ids=" ".join)
def test_an_object_that_is_not_there_is_66(
    sealed: Box, tmp_path: Path, command: list[str], object_id: str
) -> None:
    outcome = sealed("vault", *command, object_id, cwd=tmp_path)
    check_complaint(outcome, 66)
    assert "secimg-watch vault list" in outcome.err


def test_an_id_that_several_objects_begin_with_is_64(sealed: Box) -> None:
    check_complaint(sealed("vault", "show", ""), 64)


def test_the_preview_is_written_as_a_jpeg_for_the_owner_alone(sealed: Box, tmp_path: Path) -> None:
    object_id = sealed.object_named("b.jpg")
    path = tmp_path / "small.jpg"
    outcome = sealed("vault", "show", object_id, "--preview", path)
    assert outcome.code == 0
    assert path.stat().st_mode & 0o777 == 0o600
    with Image.open(io.BytesIO(path.read_bytes())) as preview:
        assert preview.format == "JPEG"
        assert preview.size == (256, 192)
    before = path.read_bytes()
    check_complaint(sealed("vault", "show", object_id, "--preview", path), 73)
    assert path.read_bytes() == before


def test_an_object_without_a_preview_has_none_to_write(tmp_path: Path) -> None:
    box = make_box(tmp_path, preview=0)
    drop(box, {"a.png": PICTURES["a.png"]})
    object_id = box.object_named("a.png")
    check_complaint(box("vault", "show", object_id, "--preview", tmp_path / "p.jpg"), 66)
    assert not (tmp_path / "p.jpg").exists()


# -- restore -------------------------------------------------------------------------------------


def test_all_pictures_come_back_with_their_names_times_and_modes(
    sealed: Box, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    outcome = sealed("vault", "restore", "--all", "--to", out)
    assert (outcome.code, outcome.out) == (0, "4 restored, 0 failed\n")
    assert contents(out) == PICTURES
    for name in PICTURES:
        status = (out / name).stat()
        assert status.st_mtime_ns == NOON_NS
        assert status.st_mode & 0o777 == 0o640 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def test_a_restore_says_in_json_where_everything_went(sealed: Box, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = sealed("vault", "restore", "--all", "--to", out, "--json")
    assert outcome.code == 0
    result = outcome.json()
    assert result.keys() == {"restored", "failed"}
    assert result["failed"] == {}
    assert sorted(result["restored"].values()) == sorted(PICTURES)
    assert {path.stem for path in sealed.objects()} == set(result["restored"])


def test_chosen_pictures_come_back_alone(sealed: Box, tmp_path: Path) -> None:
    out = tmp_path / "out"
    chosen = [sealed.object_named(name) for name in ("b.jpg", "c.gif")]
    assert sealed("vault", "restore", *chosen, "--to", out).code == 0
    assert contents(out) == {name: PICTURES[name] for name in ("b.jpg", "2026/c.gif")}


def test_one_picture_comes_back_under_another_name(sealed: Box, tmp_path: Path) -> None:
    out = tmp_path / "out"
    object_id = sealed.object_named("c.gif")
    assert sealed("vault", "restore", object_id, "--to", out, "--as", "new.gif").code == 0
    assert contents(out) == {"new.gif": PICTURES["2026/c.gif"]}


@pytest.mark.parametrize("name", ["../up.gif", "sub/new.gif", "/abs.gif", "..", ""])
def test_another_name_cannot_lead_out_of_the_directory(
    sealed: Box, tmp_path: Path, name: str
) -> None:
    object_id = sealed.object_named("c.gif")
    outcome = sealed("vault", "restore", object_id, "--to", tmp_path / "out", "--as", name)
    assert outcome.code == 73
    assert "Traceback" not in outcome.err
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    "words",
    [[], ["--all", "0123"], ["--all", "--as", "x"], ["01", "02", "--as", "x"]],
    ids=" ".join,
)
def test_a_restore_of_nothing_or_of_too_much_is_64(
    sealed: Box, tmp_path: Path, words: list[str]
) -> None:
    check_complaint(sealed("vault", "restore", *words, "--to", tmp_path / "out"), 64)
    assert not (tmp_path / "out").exists()


def test_two_pictures_of_one_name_both_come_back(box: Box, tmp_path: Path) -> None:
    first = PICTURES["a.png"]
    second = picture("yellow")
    drop(box, {"a.png": second})
    out = tmp_path / "out"
    outcome = box("vault", "restore", "--all", "--to", out, "--json")
    assert outcome.code == 0
    restored = outcome.json()["restored"]
    assert len(restored) == 5
    assert contents(out).keys() == set(restored.values())
    [other] = restored.values() - PICTURES.keys()
    [object_id] = [each for each, path in restored.items() if path == other]
    assert other == f"a~{object_id[:8]}.png"
    assert {(out / "a.png").read_bytes(), (out / other).read_bytes()} == {first, second}


@pytest.mark.parametrize("kind", ["file", "directory", "link", "dangling link"])
def test_what_lies_there_already_is_refused_and_untouched(
    sealed: Box, tmp_path: Path, kind: str
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    out.mkdir()
    other.write_bytes(b"other")
    taken = out / "b.jpg"
    if kind == "file":
        taken.write_bytes(b"mine")
    elif kind == "directory":
        taken.mkdir()
    else:
        taken.symlink_to(other if kind == "link" else tmp_path / "nothing")
    outcome = sealed("vault", "restore", sealed.object_named("b.jpg"), "--to", out)
    assert (outcome.code, outcome.out) == (73, "0 restored, 1 failed\n")
    assert "exists already" in outcome.err
    assert os.listdir(out) == ["b.jpg"]
    assert kind != "file" or taken.read_bytes() == b"mine"
    assert kind == "file" or taken.is_symlink() == kind.endswith("link")
    assert other.read_bytes() == b"other"
    assert not (tmp_path / "nothing").exists()


def test_a_second_restore_of_everything_changes_nothing(sealed: Box, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert sealed("vault", "restore", "--all", "--to", out).code == 0
    outcome = sealed("vault", "restore", "--all", "--to", out)
    assert (outcome.code, outcome.out) == (1, "0 restored, 4 failed\n")
    assert contents(out) == PICTURES


def test_a_directory_that_cannot_be_made_is_73(sealed: Box, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    for target in (tmp_path / "file", tmp_path / "absent/out", tmp_path / HOSTILE / "out"):
        check_complaint(sealed("vault", "restore", "--all", "--to", target), 73)
    assert contents(tmp_path) == {"file": b"mine"}


def test_a_directory_below_a_link_is_used(sealed: Box, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert sealed("vault", "restore", "--all", "--to", tmp_path / "link/out").code == 0
    assert contents(tmp_path / "real/out") == PICTURES


def test_a_sub_folder_that_is_a_link_is_not_followed(sealed: Box, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (out / "2026").symlink_to(elsewhere)
    outcome = sealed("vault", "restore", "--all", "--to", out)
    assert (outcome.code, outcome.out) == (1, "2 restored, 2 failed\n")
    assert contents(elsewhere) == {}


# -- damage --------------------------------------------------------------------------------------


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut in the header": lambda data: data[:100],
    "cut by one byte": lambda data: data[:-1],
    "emptied": lambda _data: b"",
    "flipped at its end": lambda data: flip(data, len(data) - 1),
    "flipped in its header": lambda data: flip(data, 200),
    "with something behind it": lambda data: data + b"\0",
    "no object at all": lambda _data: PICTURES["a.png"],
}


def damage(box: Box, name: str, how: str) -> str:
    """Damage the object of that name; its id."""
    object_id = box.object_named(name)
    path = box.vault / "objects" / object_id[:2] / f"{object_id}.simg"
    path.chmod(0o600)
    path.write_bytes(DAMAGES[how](path.read_bytes()))
    return object_id


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_object_alone_is_65_and_leaves_no_file(
    box: Box, tmp_path: Path, how: str
) -> None:
    object_id = damage(box, "b.jpg", how)
    out = tmp_path / "out"
    outcome = box("vault", "restore", object_id, "--to", out)
    assert (outcome.code, outcome.out) == (65, "0 restored, 1 failed\n")
    assert object_id in outcome.err
    assert contents(out) == {}


def test_beside_a_damaged_object_all_others_come_back_and_it_is_named(
    box: Box, tmp_path: Path
) -> None:
    object_id = damage(box, "b.jpg", "flipped at its end")
    out = tmp_path / "out"
    outcome = box("vault", "restore", "--all", "--to", out, "--json")
    assert outcome.code == 1
    assert contents(out) == {name: PICTURES[name] for name in PICTURES if name != "b.jpg"}
    assert outcome.json()["failed"].keys() == {object_id}
    assert object_id in outcome.err


def test_an_object_of_another_vault_with_the_same_key_is_65(box: Box, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    other = Box(tmp_path / "second")
    shutil.copy(box.key, other.key)
    other.make_vault()
    drop(other, {"foreign.png": picture("pink")})
    refuse_foreign(box, other.objects()[0], tmp_path)


def test_an_object_of_another_vault_with_another_key_is_65(box: Box, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    other = make_box(tmp_path / "second")
    drop(other, {"foreign.png": picture("pink")})
    refuse_foreign(box, other.objects()[0], tmp_path)


def refuse_foreign(box: Box, foreign: Path, tmp_path: Path) -> None:
    planted = box.vault / "objects" / foreign.stem[:2] / foreign.name
    shutil.copy(foreign, planted)
    out = tmp_path / "out"
    assert box("vault", "restore", foreign.stem, "--to", out).code == 65
    assert contents(out) == {}
    assert box("vault", "restore", "--all", "--to", out).code == 1
    assert contents(out) == PICTURES
    verified = box("vault", "verify", "--json")
    assert verified.json()["failed"].keys() == {foreign.stem}


def test_an_object_under_the_name_of_another_is_refused(box: Box, tmp_path: Path) -> None:
    paths = {
        name: box.vault / "objects" / object_id[:2] / f"{object_id}.simg"
        for name in ("b.jpg", "c.gif")
        for object_id in [box.object_named(name)]
    }
    paths["c.gif"].replace(paths["b.jpg"])
    out = tmp_path / "out"
    assert box("vault", "restore", paths["b.jpg"].stem, "--to", out).code == 65
    assert contents(out) == {}


def test_a_damaged_object_is_named_beside_the_listing_of_the_others(box: Box) -> None:
    object_id = damage(box, "b.jpg", "cut in the header")
    outcome = box("vault", "list", "--json")
    assert outcome.code == 1
    good, bad = outcome.json()[:-1], outcome.json()[-1]
    assert len(good) == 3
    assert bad.keys() == {"object", "error"}
    assert bad["object"] == object_id
    assert object_id in outcome.err
    check_complaint(box("vault", "show", object_id), 65)


# -- verify --------------------------------------------------------------------------------------


def test_a_whole_vault_verifies(sealed: Box) -> None:
    outcome = sealed("vault", "verify", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    size = sum(map(len, PICTURES.values()))
    assert outcome.json() == {"verified": 4, "bytes": size, "failed": {}}
    assert sealed("vault", "verify").out.startswith("4 objects verified (")


def test_exactly_the_damaged_objects_are_found(box: Box) -> None:
    damaged = {
        damage(box, "b.jpg", "flipped at its end"),
        damage(box, "c.gif", "cut by one byte"),
    }
    outcome = box("vault", "verify", "--json")
    assert outcome.code == 1
    result = outcome.json()
    assert result.keys() == {"verified", "bytes", "failed"}
    assert result["verified"] == 2
    assert result["failed"].keys() == damaged
    assert all(object_id in outcome.err for object_id in damaged)


def test_a_vault_is_not_changed_by_looking_at_it(box: Box, tmp_path: Path) -> None:
    before = contents(box.vault)
    for words in (["list"], ["verify"], ["restore", "--all", "--to", str(tmp_path / "out")]):
        assert box("vault", *words).code == 0
    assert contents(box.vault) == before


# -- names ---------------------------------------------------------------------------------------


def test_hostile_names_are_escaped_wherever_they_are_shown(box: Box, tmp_path: Path) -> None:
    latin = os.fsdecode(b"latin-\xe9.png")
    hostile = {f"{HOSTILE}/{HOSTILE}.png": picture("pink"), latin: picture("gold")}
    drop(box, hostile)
    for words in ("list", "list --json", "verify", "restore --all --to out --json"):
        outcome = box("vault", *words.split(), cwd=tmp_path)
        assert outcome.code == 0, outcome
        check_harmless(outcome)
    for path in box.objects():
        check_harmless(box("vault", "show", path.stem))
    outcome = box("vault", "restore", "--all", "--to", "out", cwd=tmp_path)
    assert outcome.code == 1
    check_harmless(outcome)
    assert contents(tmp_path / "out") == PICTURES | hostile
