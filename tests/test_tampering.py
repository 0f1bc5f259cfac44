"""A slice of the tampering campaign: small objects, and what nobody without a key can do."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent / "campaigns"))  # where the campaigns lie

import tamper_object
from tamper_object import IDENTITY, KEK, KINDS, RECIPIENT, Sample, Table, sample

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tamper_object import Change

    from secimg_watch.slots import Lock, Opener

PREVIEW = b"preview"
SEALED_PREVIEW = 56 + len(PREVIEW) + 16


def outcome(changes: Iterator[Change], genuine: Sequence[Sample]) -> tuple[int, int, int]:
    """Try all changes in both ways of reading; return tried, harmless and wrong."""
    table: Table = {}
    tamper_object.try_all(table, "", changes, genuine)
    rows = table.values()
    assert all(row.tried == row.refused + row.harmless + row.wrong for row in rows)
    return (
        sum(row.tried for row in rows),
        sum(row.harmless for row in rows),
        sum(row.wrong for row in rows),
    )


def test_one_flipped_bit_anywhere_is_refused_but_in_a_preview_that_is_passed_over() -> None:
    one = sample(preview=PREVIEW)
    expected = (2 * 8 * len(one.data), 8 * SEALED_PREVIEW, 0)
    assert outcome(tamper_object.flips(one.data), [one]) == expected


def test_a_flipped_bit_in_a_recipients_slot_is_refused() -> None:
    one = sample(locks=[RECIPIENT], opener=IDENTITY)
    flips = itertools.islice(tamper_object.flips(one.data), 56 * 8, (60 + 1_300 + 32) * 8, 7)
    assert outcome(flips, [one]) == (2 * 1_527, 0, 0)


@pytest.mark.parametrize("preview", [b"", PREVIEW], ids=["no preview", "preview"])
def test_an_object_that_is_cut_anywhere_or_goes_on_is_refused(preview: bytes) -> None:
    one, other = sample(preview=preview), sample()
    assert outcome(tamper_object.cuts(one.data), [one]) == (2 * len(one.data), 0, 0)
    assert outcome(tamper_object.extensions(one.data, other.data), [one]) == (2 * 240, 0, 0)


@pytest.mark.parametrize(("kind", "lock", "opener"), KINDS, ids=[kind for kind, *_ in KINDS])
def test_sections_are_neither_moved_nor_dropped_nor_repeated(
    kind: str, lock: Lock, opener: Opener
) -> None:
    one = sample(preview=PREVIEW, locks=[lock], opener=opener)
    tried, harmless, wrong = outcome(tamper_object.moves(one.sections), [one])
    assert (harmless, wrong) == (0, 0), kind
    assert tried > 1_600


@pytest.mark.parametrize(("kind", "lock", "opener"), KINDS, ids=[kind for kind, *_ in KINDS])
@pytest.mark.parametrize("preview", [b"", PREVIEW], ids=["no preview", "preview"])
def test_two_objects_cannot_be_mixed_but_for_a_preview_that_is_passed_over(
    kind: str, lock: Lock, opener: Opener, preview: bytes
) -> None:
    table: Table = {}
    tamper_object.two_objects(table, kind, lock, opener, preview)
    assert not any(row.wrong for row in table.values())
    harmless = {what: row.harmless for (_kind, what), row in table.items() if row.harmless}
    if not preview:
        assert not harmless
        return
    # Under one core each object opens with the other's preview, whatever core is taken.
    assert harmless.pop("mixed: the same key and lengths") == 2
    assert harmless.pop("mixed: encrypted anew under the same core") == 4
    assert all(what.startswith("spliced: ") for what in harmless)


def test_chunks_and_slots_of_two_objects_stay_where_they_are() -> None:
    table: Table = {}
    tamper_object.chunks_and_slots(table)
    assert {what for _title, what in table} == {
        "chunks reordered",
        "chunks dropped",
        "chunks repeated",
        "chunks of two objects",
        "cut beside a chunk's end",
        "slots changed",
    }
    assert all(row.refused == row.tried > 0 for row in table.values())


def test_the_campaign_sees_a_picture_that_is_not_the_right_one() -> None:
    genuine, long = sample(preview=PREVIEW), sample(20_000)
    other = dataclasses.replace(genuine, picture=b"another picture")
    assert tamper_object.verdict(genuine.data, [genuine], ask_preview=False) == "harmless"
    assert tamper_object.verdict(genuine.data, [other], ask_preview=False) == "wrong"
    assert tamper_object.verdict(long.data[:-1], [long], ask_preview=True) == "refused"
    assert tamper_object.verdict(long.data + b"\0", [long], ask_preview=True) == "refused"
    assert tamper_object.verdict(long.data + b"\0", [genuine], ask_preview=True) == "wrong"


def test_the_campaign_reports_every_kind_of_change_in_one_table() -> None:
    table: Table = {}
    one = sample(1)
    tamper_object.try_all(table, "object", itertools.islice(tamper_object.cuts(one.data), 3), [one])
    lines = tamper_object.report(table).splitlines()
    assert lines[0].split() == ["object", "change", "tried", "refused", "harmless", "wrong"]
    assert lines[1].split()[-4:] == ["6", "6", "0", "0"]
    assert lines[2].split() == ["all", "6", "6", "0", "0"]
    assert KEK.key.decode() not in tamper_object.report(table)
