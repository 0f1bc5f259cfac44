"""What becomes of an inspected file, by the policy alone."""

from __future__ import annotations

import itertools

import pytest

from secimg_watch.disposition import Disposition, disposition, is_indifferent
from secimg_watch.policy import Folder
from secimg_watch.records import Inspection, Label

ACTIONS = ("leave", "quarantine", "encrypt")
BOTH = list(itertools.product(ACTIONS, ACTIONS))
HOW = {
    "leave": Disposition.LEAVE,
    "quarantine": Disposition.QUARANTINE,
    "encrypt": Disposition.SEAL,
}
JPEG = Inspection(Label.IMAGE, "JPEG", 4, 3)
BROKEN = Inspection(Label.UNDECODABLE, "JPEG", detail="truncated file")
TEXT = Inspection(Label.NOT_IMAGE)
UNKNOWN = Inspection(Label.UNINSPECTED, detail="the decoder crashed")


def folder(**keys: object) -> Folder:
    return Folder.model_validate({"path": "/srv/scans", "vault": "main", **keys})


def test_by_default_pictures_are_sealed_broken_ones_too_and_the_rest_is_left() -> None:
    policy = folder()
    assert [disposition(policy, each) for each in (JPEG, BROKEN, UNKNOWN, TEXT)] == [
        Disposition.SEAL,
        Disposition.SEAL,
        Disposition.SEAL,
        Disposition.LEAVE,
    ]


@pytest.mark.parametrize("action", ACTIONS)
def test_the_policy_decides_about_what_is_no_image(action: str) -> None:
    policy = folder(not_image=action)
    assert disposition(policy, TEXT) is HOW[action]
    assert disposition(policy, JPEG) is Disposition.SEAL


@pytest.mark.parametrize("action", ACTIONS)
def test_the_policy_decides_about_what_does_not_decode(action: str) -> None:
    policy = folder(undecodable=action)
    assert disposition(policy, BROKEN) is HOW[action]
    assert disposition(policy, JPEG) is Disposition.SEAL


@pytest.mark.parametrize("action", ACTIONS)
def test_a_format_that_is_not_listed_counts_as_no_image(action: str) -> None:
    policy = folder(formats=["PNG", "TIFF"], not_image=action, undecodable="quarantine")
    assert disposition(policy, JPEG) is HOW[action]
    assert disposition(policy, BROKEN) is HOW[action]
    assert disposition(policy, Inspection(Label.IMAGE, "PNG")) is Disposition.SEAL


@pytest.mark.parametrize(("not_image", "undecodable"), BOTH)
def test_what_could_not_be_inspected_is_always_sealed(not_image: str, undecodable: str) -> None:
    for formats in ("any", ["PNG"]):
        policy = folder(not_image=not_image, undecodable=undecodable, formats=formats)
        assert disposition(policy, UNKNOWN) is Disposition.SEAL


@pytest.mark.parametrize(("not_image", "undecodable"), BOTH)
@pytest.mark.parametrize("preview", [0, 256])
def test_no_decoder_is_asked_only_where_its_answer_changes_nothing(
    not_image: str, undecodable: str, preview: int
) -> None:
    policy = folder(not_image=not_image, undecodable=undecodable, preview=preview)
    indifferent = (not_image, undecodable, preview) == ("encrypt", "encrypt", 0)
    assert is_indifferent(policy) is indifferent


def test_where_no_decoder_is_asked_everything_is_sealed_in_every_format() -> None:
    policy = folder(not_image="encrypt", undecodable="encrypt", preview=0, formats=["PNG"])
    assert is_indifferent(policy)
    for inspection in (JPEG, BROKEN, TEXT, UNKNOWN):
        assert disposition(policy, inspection) is Disposition.SEAL
