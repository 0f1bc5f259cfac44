"""``why PATH``: the verdict, and the reason for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from cli_runner import HOSTILE, INSPECTED, PATIENCE, Box, check_harmless, make_box, picture

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

assert sys.platform != "win32"  # what is tested here does not exist there

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="leases are Linux's")

_WRITER = """\
import sys
with open(sys.argv[1], "wb") as file:
    file.write(b"half a picture")
    file.flush()
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return make_box(
        tmp_path, **INSPECTED, exclude=["private/*"], include=["*.png", "*.txt", "*.part"]
    )


@pytest.fixture
def writing(box: Box) -> Iterator[Path]:
    """A file in the folder that another process has open for writing."""
    path = box.drop / "a.png"
    command: list[str | Path] = [sys.executable, "-c", _WRITER, path]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        yield path
        process.kill()
        process.wait(PATIENCE)


def why(box: Box, path: str | Path, cwd: Path | None = None) -> tuple[str, str]:
    """Verdict and reason."""
    outcome = box("why", path, "--json", cwd=cwd)
    assert outcome.code == 0, outcome
    answer = outcome.json()
    assert answer.keys() == {"path", "verdict", "reason", "object_id"}
    return answer["verdict"], answer["reason"]


def test_text_and_json_say_the_same(box: Box) -> None:
    verdict, reason = why(box, box.drop / "never.png")
    assert box("why", box.drop / "never.png").out == f"{verdict}: {reason}\n"


def test_a_file_being_written_is_waited_for(box: Box, writing: Path) -> None:
    assert why(box, writing) == ("waiting", "some process still has it open for writing")


def test_a_complete_file_that_nobody_took_yet_is_settling(box: Box) -> None:
    (box.drop / "a.png").write_bytes(picture())
    verdict, reason = why(box, box.drop / "a.png")
    assert verdict == "settling"
    assert "unchanged" in reason


def test_an_empty_file_is_given_time(box: Box) -> None:
    (box.drop / "a.png").touch()
    verdict, reason = why(box, box.drop / "a.png")
    assert verdict == "settling"
    assert "empty" in reason


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a.png.part", "its name is one that producers use while they write"),
        ("private/a.png", "a pattern of 'exclude' matches it"),
        ("a.bmp", "no pattern of 'include' matches it"),
        (
            "._a.png",
            "its name belongs to the system or to a synchroniser, not to a picture",
        ),
    ],
)
def test_a_name_that_is_passed_over_is_ignored(box: Box, name: str, reason: str) -> None:
    (box.drop / name).parent.mkdir(exist_ok=True)
    (box.drop / name).write_bytes(picture())
    assert why(box, box.drop / name) == ("ignored", reason)


def test_a_link_is_ignored_and_not_followed(box: Box) -> None:
    (box.drop / "target.png").write_bytes(picture())
    (box.drop / "link.png").symlink_to("target.png")
    assert why(box, box.drop / "link.png") == (
        "ignored",
        "it is a symbolic link; links are never followed",
    )


def test_a_file_with_two_names_is_ignored(box: Box) -> None:
    (box.drop / "a.png").write_bytes(picture())
    os.link(box.drop / "a.png", box.drop / "b.png")
    for name in ("a.png", "b.png"):
        verdict, reason = why(box, box.drop / name)
        assert verdict == "ignored"
        assert "more than one name" in reason


def test_a_fifo_is_ignored_and_not_opened(box: Box) -> None:
    os.mkfifo(box.drop / "a.png")
    assert why(box, box.drop / "a.png") == ("ignored", "it is a FIFO, socket or device")


def test_a_directory_is_not_taken_for_a_file_that_is_gone(box: Box) -> None:
    (box.drop / "sub").mkdir()
    assert why(box, box.drop / "sub") == ("ignored", "it is a directory")


def test_what_lies_elsewhere_is_outside(box: Box, tmp_path: Path) -> None:
    (tmp_path / "drop-2").mkdir()
    (tmp_path / "drop-2/a.png").write_bytes(picture())
    for path in (tmp_path / "drop-2/a.png", tmp_path / "drop/../a.png", box.policy):
        assert why(box, path) == ("outside", "it lies in no watched folder")


def test_what_never_was_is_absent(box: Box) -> None:
    assert why(box, box.drop / "never.png") == (
        "absent",
        "there is no such file, and none was sealed under that name",
    )


def test_a_sealed_picture_leads_to_its_newest_object(box: Box) -> None:
    for colour in ("red", "blue"):
        (box.drop / "a.png").write_bytes(picture(colour))
        assert box("drain").code == 0
    listed = box("vault", "list", "--json").json()
    newest = max(listed, key=lambda each: each["sealed_ns"])["object"]
    assert why(box, box.drop / "a.png") == ("sealed", f"it was sealed as object {newest}")
    assert box("why", box.drop / "a.png", "--json").json()["object_id"] == newest
    # A new file of that name is another one.
    (box.drop / "a.png").write_bytes(picture("green"))
    assert why(box, box.drop / "a.png")[0] == "settling"


def test_a_file_that_is_no_picture_is_left(box: Box) -> None:
    (box.drop / "a.txt").write_text("no picture")
    assert box("drain").code == 0
    verdict, reason = why(box, box.drop / "a.txt")
    assert verdict == "left"
    assert "not an image" in reason
    assert "leaves it" in reason


def test_a_file_that_was_set_aside_is_quarantined(tmp_path: Path) -> None:
    box = make_box(tmp_path, not_image="quarantine")
    (box.drop / "a.txt").write_text("no picture")
    assert box("drain").code == 1
    verdict, reason = why(box, box.drop / "a.txt")
    assert verdict == "quarantined"
    assert "not an image" in reason


def test_a_picture_that_the_policy_keeps_is_kept(tmp_path: Path) -> None:
    box = make_box(tmp_path, after="keep")
    (box.drop / "a.png").write_bytes(picture())
    assert box("drain").code == 0
    assert why(box, box.drop / "a.png") == ("kept", "sealed; the policy keeps the plaintext")


def test_a_picture_without_room_in_the_vault_is_queued(tmp_path: Path) -> None:
    full = {"vaults": {"main": {"path": str(tmp_path / "vault"), "min_free": "1000TB"}}}
    box = make_box(tmp_path, more=full)
    (box.drop / "a.png").write_bytes(picture())
    assert box("drain").code == 75
    verdict, reason = why(box, box.drop / "a.png")
    assert verdict == "queued"
    assert "too little free space" in reason


def test_a_missing_marker_is_what_is_waited_for(tmp_path: Path) -> None:
    box = make_box(tmp_path, proof="sidecar", sidecar=".ok")
    (box.drop / "a.png").write_bytes(picture())
    assert why(box, box.drop / "a.png") == (
        "waiting",
        "the producer's marker file is not there yet",
    )
    (box.drop / "a.png.ok").touch()
    assert why(box, box.drop / "a.png")[0] == "settling"
    assert why(box, box.drop / "a.png.ok") == ("ignored", "it is a producer's marker file")


def test_a_relative_path_and_a_linked_folder_lead_to_the_same_answer(
    box: Box, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to("drop")
    (box.drop / "a.txt").write_text("no picture")
    assert box("drain").code == 0
    expected = why(box, box.drop / "a.txt")
    assert expected[0] == "left"
    ways = ((box.drop, "a.txt"), (tmp_path, "drop/../drop/a.txt"), (tmp_path, "link/a.txt"))
    for where, path in ways:
        assert why(box, path, cwd=where) == expected


def test_a_folder_that_the_policy_names_by_a_link_is_known_by_both_names(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("drop")
    box = make_box(tmp_path, path=str(tmp_path / "link"), **INSPECTED)
    (box.drop / "a.txt").write_text("no picture")
    assert box("drain").code == 0
    for folder in ("link", "drop"):
        assert why(box, tmp_path / folder / "a.txt")[0] == "left"


def test_it_answers_where_there_is_neither_a_queue_nor_a_folder(box: Box) -> None:
    assert not box.state.exists()
    assert why(box, box.drop / "a.png")[0] == "absent"
    shutil.rmtree(box.drop)
    assert why(box, box.drop / "a.png")[0] == "absent"
    assert not box.state.exists()


def test_a_hostile_name_harms_no_terminal(box: Box) -> None:
    (box.drop / HOSTILE).write_bytes(picture())
    for words in (["why"], ["--json", "why"]):
        outcome = box(*words, box.drop / HOSTILE)
        assert outcome.code == 0
        check_harmless(outcome)
