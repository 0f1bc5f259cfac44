"""File names: shown safely, recognised as temporary or system ones, checked as components."""

from __future__ import annotations

import os

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from secimg_watch.names import checked_component, display, is_system, is_temporary


@pytest.mark.parametrize(
    "name",
    [
        "holiday.jpg",
        "Müller Straße 7.png",
        "身分証.jpeg",
        "back\\slash",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467.heic",
        "\u0646\u0627\u0645\u0647\u200c\u0647\u0627.tif",
        "e\u0301.png",
    ],
)
def test_ordinary_names_are_shown_as_they_are(name: str) -> None:
    assert display(name) == name


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\nb", r"a\x0ab"),
        ("\x1b[2Jclear", r"\x1b[2Jclear"),
        ("a\0b\x7f", r"a\x00b\x7f"),
        ("c1\x9bm", r"c1\u009bm"),
        ("x\u202egnp.exe", r"x\u202egnp.exe"),
        ("\u2066iso", r"\u2066iso"),
        ("line\u2028para\u2029", r"line\u2028para\u2029"),
        ("zero\u200bwidth\ufeff", r"zero\u200bwidth\ufeff"),
        ("\udcff\udc80.jpg", r"\xff\x80.jpg"),
        ("lone\ud800", r"lone\ud800"),
        ("\uffff\ufdd0", r"\uffff\ufdd0"),
        ("tag\U000e0041", r"tag\U000e0041"),
        ("\U0010ffff", r"\U0010ffff"),
    ],
)
def test_what_could_deceive_a_reader_is_escaped(name: str, shown: str) -> None:
    assert display(name) == shown


@given(st.binary(max_size=255))
@example(bytes(range(256)))
def test_any_bytes_are_shown_as_one_line_that_yaml_and_utf8_carry(name: bytes) -> None:
    shown = display(os.fsdecode(name))
    assert len(shown.splitlines()) <= 1
    assert shown.encode().decode() == shown
    assert yaml.safe_load(yaml.safe_dump({"name": shown}))["name"] == shown
    assert display(shown) == shown


@given(st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs", "M"))))
def test_letters_digits_and_signs_are_never_changed(name: str) -> None:
    assert display(name) == name


@pytest.mark.parametrize(
    "name",
    [
        ".scan.jpg.Ab3dEf",
        ".~tmp~",
        "scan.jpg.part",
        "SCAN.JPG.PART",
        "scan.jpg.partial",
        "scan.jpg.filepart",
        "Unconfirmed 81237.crdownload",
        "scan.jpg.download",
        "scan.tmp",
        "scan.temp",
        "scan.upload",
        ".scan.jpg.swp",
        "~$letter.docx",
        "scan.jpg~",
        ".syncthing.IMG_1.jpg.tmp",
        "~syncthing~IMG_1.jpg.tmp",
        ".pureftpd-upload.5f1.15.1a2b.c",
        ".in.scan.jpg.",
        ".nfs0000000001a2b3c400000001",
        ".goutputstream-A1B2C3",
        ".fuse_hidden0000000100000001",
        ".sftpgo-upload.cq1.scan.jpg",
        ".scan.jpg.~1a2b3c",
        ".pending-1700000000-IMG_1.jpg",
        ".a\nb.Ab3dEf",
    ],
)
def test_producers_temporary_names_are_recognised(name: str) -> None:
    assert is_temporary(name)


@pytest.mark.parametrize(
    "name",
    [
        "scan.jpg",
        "scan.Ab3dEf",
        ".scan.jpg",
        ".scan.jpg.Ab3dE",
        ".scan.jpg.Ab3dEf7",
        ".scan.jpg.Ab3-Ef",
        ".Ab3dEf",
        "part",
        "party.jpg",
        "part.jpg",
        "tmp.png",
        "download.jpeg",
        "in.scan.jpg",
        "nfs.jpg",
        "~scan.jpg",
        "scan.tmp.jpg",
        "IMG_0001.partial.png",
        "",
    ],
)
def test_names_of_finished_pictures_are_not_temporary(name: str) -> None:
    assert not is_temporary(name)


@pytest.mark.parametrize(
    "name",
    [
        ".DS_Store",
        "._scan.jpg",
        "desktop.ini",
        "Desktop.ini",
        "Thumbs.db",
        ".stfolder",
        ".stversions",
        ".stignore",
        "@eaDir",
        ".Spotlight-V100",
        ".Trashes",
        "__MACOSX",
        ".localized",
        "lost+found",
    ],
)
def test_system_names_are_recognised(name: str) -> None:
    assert is_system(name)


@pytest.mark.parametrize("name", ["scan.jpg", "DS_Store", ".hidden.jpg", "eaDir", "_.jpg", ""])
def test_other_names_are_not_system_names(name: str) -> None:
    assert not is_system(name)


@given(st.text())
def test_upper_and_lower_case_are_judged_alike(name: str) -> None:
    lower = name.lower()
    assert is_temporary(name) == is_temporary(lower)
    assert is_system(name) == is_system(lower)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (b"", "empty or stands for a directory"),
        (b".", "empty or stands for a directory"),
        (b"..", "empty or stands for a directory"),
        (b"a/b", "a slash or a NUL"),
        (b"/", "a slash or a NUL"),
        (b"a\0b", "a slash or a NUL"),
        (b"x" * 256, "256 bytes long, 255 is the most"),
    ],
)
def test_a_component_that_could_lead_elsewhere_is_refused(name: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        checked_component(name)


@pytest.mark.parametrize("name", [b"...", b"a\\b", b"x" * 255, b"\xff\xfe", b"new\nline", b"-rf"])
def test_odd_but_harmless_components_are_accepted_byte_for_byte(name: bytes) -> None:
    assert os.fsencode(checked_component(name)) == name


@given(st.binary(max_size=300))
def test_an_accepted_component_never_leaves_its_directory(name: bytes) -> None:
    try:
        component = checked_component(name)
    except ValueError:
        return
    assert os.path.normpath(os.path.join("/vault", component)) == f"/vault/{component}"
    assert os.fsencode(component) == name
