"""The queue at the command line: listing it, and giving set-aside jobs another try."""

from __future__ import annotations

import os
import sys
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

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the service is for POSIX systems")

FIELDS = {"object", "state", "attempts", "folder", "name", "size", "reason", "not_before"}


@pytest.fixture
def box(tmp_path: Path) -> Box:
    """A box that sets aside what is no picture: two text files are in quarantine."""
    box = make_box(tmp_path, not_image="quarantine")
    (box.drop / "sub").mkdir()
    (box.drop / "a.txt").write_text("no picture")
    (box.drop / "sub/b.txt").write_text("none either")
    outcome = box("--json", "drain")
    assert (outcome.code, outcome.json()["failed"]) == (1, 2), outcome
    return box


def listed(box: Box, *words: str) -> dict[str, dict[str, object]]:
    """The jobs by name."""
    outcome = box("jobs", *words, "--json")
    assert outcome.code == 0, outcome
    return {row["name"]: row for row in outcome.json()}


def test_a_queue_that_is_not_there_yet_is_an_empty_one(tmp_path: Path) -> None:
    box = make_box(tmp_path, **INSPECTED)
    assert box("jobs", "list", "--json").json() == []
    assert box("jobs", "quarantine", "--json").json() == []
    assert box("jobs", "retry", "--all").out == "0 queued again\n"
    assert not box.state.exists()


def test_what_was_set_aside_is_listed_with_its_reason(box: Box) -> None:
    rows = listed(box, "quarantine")
    assert rows.keys() == {"a.txt", "sub/b.txt"}
    assert all(row.keys() == FIELDS for row in rows.values())
    row = rows["a.txt"]
    assert row["state"] == "quarantined"
    assert row["folder"] == str(box.drop)
    assert row["size"] == len("no picture")
    assert row["attempts"] == 1
    assert "not an image" in str(row["reason"])
    assert listed(box, "list") == rows


def test_a_listing_for_people_has_one_row_a_job(box: Box) -> None:
    outcome = box("jobs", "quarantine")
    heads, *rows = outcome.out.splitlines()
    assert heads.split("\t") == ["object", "state", "attempts", "folder", "name", "reason"]
    assert sorted(row.split("\t")[4] for row in rows) == ["a.txt", "sub/b.txt"]


def test_a_listing_is_narrowed_to_one_state(box: Box) -> None:
    assert listed(box, "list", "--state", "queued") == {}
    assert len(listed(box, "list", "--state", "quarantined")) == 2


def test_what_was_set_aside_lies_in_the_staging_directory(box: Box) -> None:
    object_id = listed(box, "quarantine")["sub/b.txt"]["object"]
    held = contents(box.drop)
    assert held[f".secimg-watch/quarantine/{object_id}/sub/b.txt"] == b"none either"
    assert len(held) == 2


def test_a_retried_job_goes_through_once_its_cause_is_gone(box: Box) -> None:
    object_id = str(listed(box, "quarantine")["sub/b.txt"]["object"])
    box.write_policy(not_image="encrypt")
    assert box("jobs", "retry", object_id[:12]).out == "1 queued again\n"
    row = listed(box, "list")["sub/b.txt"]
    assert (row["state"], row["attempts"], row["reason"]) == ("queued", 0, "")
    assert listed(box, "quarantine").keys() == {"a.txt"}
    outcome = box("--json", "drain")
    assert outcome.json()["sealed"] == 1
    assert [path.stem for path in box.objects()] == [object_id]
    restored = box("vault", "restore", object_id, "--to", box.directory / "out")
    assert restored.code == 0
    assert contents(box.directory / "out") == {"sub/b.txt": b"none either"}


def test_all_can_be_retried_at_once(box: Box) -> None:
    box.write_policy(not_image="encrypt")
    assert box("jobs", "retry", "--all").out == "2 queued again\n"
    outcome = box("--json", "drain")
    assert (outcome.code, outcome.json()["sealed"]) == (0, 2)
    assert contents(box.drop) == {}
    assert box("jobs", "list", "--json").json() == []


def test_a_job_whose_cause_remains_is_set_aside_again(box: Box) -> None:
    before = contents(box.drop)
    assert box("jobs", "retry", "--all").out == "2 queued again\n"
    assert box("drain").code == 1
    assert len(listed(box, "quarantine")) == 2
    assert contents(box.drop) == before


def test_an_unknown_job_is_1_and_nothing_happens(box: Box) -> None:
    before = listed(box, "list")
    outcome = box("jobs", "retry", "0" * 32)
    assert (outcome.code, outcome.out) == (1, "0 queued again\n")
    assert listed(box, "list") == before


@pytest.mark.parametrize("words", [[], ["--all", "0123"]], ids=["nothing", "both"])
def test_a_retry_of_nothing_or_of_both_is_64(box: Box, words: list[str]) -> None:
    check_complaint(box("jobs", "retry", *words), 64)
    assert len(listed(box, "quarantine")) == 2


def test_an_empty_object_id_does_not_stand_for_all(box: Box) -> None:
    assert box("jobs", "retry", "").code != 0
    assert len(listed(box, "quarantine")) == 2


def test_a_file_that_was_left_can_be_looked_at_again(tmp_path: Path) -> None:
    box = make_box(tmp_path, **INSPECTED)
    (box.drop / "a.txt").write_text("left where it is")
    assert box("drain").code == 0
    [row] = listed(box, "list").values()
    assert row["state"] == "left"
    assert box("jobs", "retry", str(row["object"])).out == "1 queued again\n"
    assert box("drain").code == 0
    assert listed(box, "list")["a.txt"]["state"] == "left"


def test_a_kept_picture_cannot_be_retried(tmp_path: Path) -> None:
    box = make_box(tmp_path, after="keep")
    (box.drop / "a.png").write_bytes(picture())
    assert box("drain").code == 0
    [row] = listed(box, "list").values()
    assert row["state"] == "kept"
    outcome = box("jobs", "retry", str(row["object"]))
    assert (outcome.code, outcome.out) == (1, "0 queued again\n")
    assert listed(box, "list")["a.png"]["state"] == "kept"


def test_hostile_names_are_shown_escaped(tmp_path: Path) -> None:
    box = make_box(tmp_path, **INSPECTED)
    (box.drop / HOSTILE).write_bytes(b"no picture")
    (box.drop / os.fsdecode(b"latin-\xe9")).write_bytes(b"no picture")
    assert box("drain").code == 0
    table = box("jobs", "list")
    check_harmless(table)
    assert len(table.out.splitlines()) == 3
    assert "latin-\\xe9" in table.out
