"""Which names and kinds of file a folder takes: rules over names and modes alone."""

from __future__ import annotations

import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secimg_watch.selection import STAGING_NAME, Passed, Selection, passes_over_kind

EVERYTHING = Selection()
ODD_NAMES = [
    "a\nb.jpg",
    "a\udcff.jpg",
    "ü" * 127,
    "[x].jpg",
    "*",
    "-",
    " ",
    "a\\b.jpg",
    "...",
    ".x",
]
COMPONENT = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12
).filter(lambda name: name not in {".", ".."})


@pytest.mark.parametrize("name", ["a.jpg", "A.JPG", "scan 1.tiff", "noextension", *ODD_NAMES])
@pytest.mark.parametrize("folder", ["", "2026/", "2026/11/"])
def test_everything_is_taken_by_default(folder: str, name: str) -> None:
    assert EVERYTHING.passes_over(folder + name) is None


@pytest.mark.parametrize(
    ("relpath", "why"),
    [
        ("a.jpg.part", Passed.TEMPORARY),
        (".a.jpg.Xy12Zz", Passed.TEMPORARY),
        ("2026/.syncthing.a.jpg.tmp", Passed.TEMPORARY),
        (".~tmp~/a.jpg", Passed.TEMPORARY),
        ("album.download/a.jpg", Passed.TEMPORARY),
        ("Thumbs.db", Passed.SYSTEM),
        ("2026/.DS_Store", Passed.SYSTEM),
        (".stversions/a.jpg", Passed.SYSTEM),
        ("._a.jpg", Passed.SYSTEM),
        ("lost+found/#123", Passed.SYSTEM),
    ],
)
def test_temporary_and_system_names_are_never_taken(relpath: str, why: Passed) -> None:
    assert EVERYTHING.passes_over(relpath) is why
    assert Selection(include=(relpath,)).passes_over(relpath) is why


def test_nothing_in_the_staging_directory_is_taken() -> None:
    inside = f"{STAGING_NAME}/0123/a.jpg"
    assert EVERYTHING.passes_over(inside) is Passed.STAGING
    assert Selection(recursive=False).passes_over(inside) is Passed.STAGING


def test_nothing_in_a_staging_directory_of_another_name_is_taken_nor_in_the_default_one() -> None:
    selection = Selection(staging="work/hold")
    assert selection.passes_over("work/hold/0123/a.jpg") is Passed.STAGING
    assert selection.passes_over(f"{STAGING_NAME}/0123/a.jpg") is Passed.STAGING
    assert selection.passes_over("work/holding/a.jpg") is None
    assert selection.passes_over("work/a.jpg") is None


@pytest.mark.parametrize(
    ("include", "exclude", "relpath", "why"),
    [
        (("*.jpg",), (), "a.jpg", None),
        (("*.jpg",), (), "deep/er/a.jpg", None),
        (("*.jpg",), (), "a.JPG", Passed.NOT_INCLUDED),
        (("*.jpg",), (), "a.png", Passed.NOT_INCLUDED),
        (("*.jpg", "*.png"), (), "a.png", None),
        (("in/*",), (), "in/a.png", None),
        (("in/*",), (), "in/deep/a.png", None),
        (("in/*",), (), "out/a.png", Passed.NOT_INCLUDED),
        (("[0-9]*",), (), "7.png", None),
        (("?.png",), (), "77.png", Passed.NOT_INCLUDED),
        (("*",), ("*.txt",), "notes.txt", Passed.EXCLUDED),
        (("*",), ("old/*",), "old/a.jpg", Passed.EXCLUDED),
        (("*",), ("old/*",), "new/a.jpg", None),
        (("*.jpg",), ("*.jpg",), "a.jpg", Passed.EXCLUDED),
        (("*",), ("a\nb*",), "a\nb.jpg", Passed.EXCLUDED),
        (("*\udcff*",), (), "x\udcff.jpg", None),
    ],
)
def test_patterns_look_at_the_name_and_at_the_path(
    include: tuple[str, ...], exclude: tuple[str, ...], relpath: str, why: Passed | None
) -> None:
    assert Selection(include=include, exclude=exclude).passes_over(relpath) is why


def test_a_folder_that_is_not_recursive_takes_its_own_files_only() -> None:
    flat = Selection(recursive=False)
    assert flat.passes_over("a.jpg") is None
    assert flat.passes_over("sub/a.jpg") is Passed.DEEPER
    assert not flat.enters("sub")


def test_a_marker_file_is_passed_over_where_the_folder_uses_markers() -> None:
    assert Selection(sidecar=".done").passes_over("a.jpg.done") is Passed.SIDECAR
    assert EVERYTHING.passes_over("a.jpg.done") is None


def test_directories_of_the_system_and_our_own_are_not_entered() -> None:
    for ours in (STAGING_NAME, "work/hold"):
        assert not Selection(staging="work/hold").enters(ours)
    for theirs in ("lost+found", "a/.stversions", "@eaDir"):
        assert not EVERYTHING.enters(theirs)
    for entered in ("2026", "2026/11", "work", ".hidden", f"deep/{STAGING_NAME}"):
        assert EVERYTHING.enters(entered)


def test_temporary_directories_are_entered_so_that_their_files_are_counted() -> None:
    assert EVERYTHING.enters(".~tmp~")


@pytest.mark.parametrize(
    ("kind", "links", "why"),
    [
        (stat.S_IFREG, 1, None),
        (stat.S_IFREG | 0o4755, 1, None),
        (stat.S_IFREG, 0, None),
        (stat.S_IFREG, 2, Passed.HARD_LINK),
        (stat.S_IFLNK, 1, Passed.SYMLINK),
        (stat.S_IFLNK, 2, Passed.SYMLINK),
        (stat.S_IFDIR, 5, Passed.DIRECTORY),
        (stat.S_IFIFO, 1, Passed.SPECIAL),
        (stat.S_IFSOCK, 1, Passed.SPECIAL),
        (stat.S_IFCHR, 1, Passed.SPECIAL),
        (stat.S_IFBLK, 1, Passed.SPECIAL),
    ],
)
def test_only_regular_files_with_one_name_are_taken(
    kind: int, links: int, why: Passed | None
) -> None:
    assert passes_over_kind(kind, links) is why


@given(st.lists(COMPONENT, min_size=1, max_size=4), st.lists(COMPONENT, max_size=3))
def test_a_file_is_taken_only_if_every_directory_above_it_is_entered(
    components: list[str], exclude: list[str]
) -> None:
    selection = Selection(exclude=tuple(exclude))
    if selection.passes_over("/".join(components)) is None:
        for depth in range(1, len(components)):
            assert selection.enters("/".join(components[:depth]))


@given(st.lists(COMPONENT, min_size=1, max_size=3), st.lists(COMPONENT, max_size=3))
def test_leaving_more_out_never_takes_more_in(components: list[str], exclude: list[str]) -> None:
    relpath = "/".join(components)
    if EVERYTHING.passes_over(relpath) is not None:
        assert Selection(exclude=tuple(exclude)).passes_over(relpath) is not None
