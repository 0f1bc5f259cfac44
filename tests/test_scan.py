"""What a scan finds in a real folder, and what it never follows."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from typing import TYPE_CHECKING

import pytest
from path_builders import only_on_linux, open_descriptors, ordinary_folder, without_privileges

from secimg_watch.records import Identity
from secimg_watch.scan import Found, look, scan
from secimg_watch.selection import STAGING_NAME, Passed, Selection

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

only_on_linux()
assert sys.platform == "linux"

ALL = Selection()
EXACT_NAMES = [
    b"new\nline.jpg",
    b"no\xff\xfeutf8.jpg",
    b"x" * 255,
    "ü.jpg".encode(),
    b"\x1b[31m",
    b" ",
]


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    folder = tmp_path / "drop"
    folder.mkdir()
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


@pytest.fixture
def drop(tmp_path: Path, root: int) -> Path:
    return tmp_path / "drop"


def put(path: Path, content: bytes = b"picture") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def found(root: int, selection: Selection = ALL, below: str = "") -> dict[str, Passed | None]:
    """Scan, with every path and why it is passed over."""
    seen = [(each.relpath, each.passed) for each in scan(root, selection, below)]
    assert len(seen) == len(dict(seen)), "nothing is listed twice"
    return dict(seen)


def test_every_file_is_found_with_its_identity(root: int, drop: Path) -> None:
    path = put(drop / "2026/11/a.jpg")
    [only] = scan(root, ALL)
    assert only == Found("2026/11/a.jpg", Identity.of(path.stat()), None)
    assert look(root, "2026/11/a.jpg", ALL) == only


def test_an_empty_folder_has_nothing(root: int) -> None:
    assert found(root) == {}


def test_each_kind_of_file_is_told_apart(root: int, drop: Path) -> None:
    put(drop / "plain.jpg")
    put(drop / "one.jpg")
    os.link(drop / "one.jpg", drop / "two.jpg")
    (drop / "link.jpg").symlink_to("plain.jpg")
    (drop / "dangling.jpg").symlink_to("nowhere")
    os.mkfifo(drop / "fifo.jpg")
    (drop / "directory.jpg").mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"/proc/self/fd/{root}/socket.jpg")
        expected = {
            "plain.jpg": None,
            "one.jpg": Passed.HARD_LINK,
            "two.jpg": Passed.HARD_LINK,
            "link.jpg": Passed.SYMLINK,
            "dangling.jpg": Passed.SYMLINK,
            "fifo.jpg": Passed.SPECIAL,
            "socket.jpg": Passed.SPECIAL,
        }
        assert found(root) == expected
        for relpath, why in expected.items():
            seen = look(root, relpath, ALL)
            assert seen is not None
            assert seen.passed is why
    assert look(root, "directory.jpg", ALL) is None


def test_files_that_are_passed_over_by_name_are_listed_with_the_reason(
    root: int, drop: Path
) -> None:
    for name in ("a.jpg", "a.jpg.part", "Thumbs.db", "notes.txt", ".~tmp~/b.jpg", "c.done"):
        put(drop / name)
    selection = Selection(exclude=("*.txt",), sidecar=".done")
    assert found(root, selection) == {
        "a.jpg": None,
        "a.jpg.part": Passed.TEMPORARY,
        "Thumbs.db": Passed.SYSTEM,
        "notes.txt": Passed.EXCLUDED,
        ".~tmp~/b.jpg": Passed.TEMPORARY,
        "c.done": Passed.SIDECAR,
    }


def test_a_name_is_passed_over_before_its_kind_is_looked_at(root: int, drop: Path) -> None:
    (drop / "a.part").symlink_to("x")
    assert found(root) == {"a.part": Passed.TEMPORARY}


def test_neither_staging_directory_nor_those_of_the_system_are_entered(
    root: int, drop: Path
) -> None:
    for directory in (STAGING_NAME, "work/hold", ".stversions", "lost+found"):
        put(drop / directory / "a.jpg")
    put(drop / "work/b.jpg")
    assert found(root, Selection(staging="work/hold")) == {"work/b.jpg": None}


def test_a_folder_that_is_not_recursive_is_not_walked(root: int, drop: Path) -> None:
    put(drop / "a.jpg")
    put(drop / "sub/b.jpg")
    assert found(root, Selection(recursive=False)) == {"a.jpg": None}


def test_one_sub_folder_can_be_scanned_alone(root: int, drop: Path) -> None:
    for name in ("a.jpg", "in/b.jpg", "in/deep/c.jpg", "out/d.jpg"):
        put(drop / name)
    assert found(root, ALL, "in") == {"in/b.jpg": None, "in/deep/c.jpg": None}


@pytest.mark.parametrize("name", EXACT_NAMES)
def test_any_name_that_the_system_allows_comes_back_exactly(
    root: int, drop: Path, name: bytes
) -> None:
    folder = os.path.join(os.fsencode(drop), name[:200])
    os.mkdir(folder)
    with open(os.path.join(folder, name), "wb"):
        pass
    [only] = scan(root, ALL)
    assert os.fsencode(only.relpath) == name[:200] + b"/" + name
    assert look(root, only.relpath, ALL) == only


def test_a_tree_deeper_than_any_path_can_name_is_walked(root: int, drop: Path) -> None:
    levels, name = 25, "d" * 200
    parent = os.dup(root)
    for _ in range(levels):
        os.mkdir(name, dir_fd=parent)
        child = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=parent)
        os.close(parent)
        parent = child
    os.close(os.open("a.jpg", os.O_CREAT | os.O_WRONLY, dir_fd=parent))
    os.close(parent)
    deep = "/".join([name] * levels + ["a.jpg"])
    assert len(deep) > os.pathconf(drop, "PC_PATH_MAX")
    assert found(root) == {deep: None}
    assert look(root, deep, ALL) is not None
    shutil.rmtree(drop / name)


# -- what is never followed --------------------------------------------------------------------


def test_a_linked_sub_folder_is_reported_and_not_entered(
    root: int, drop: Path, tmp_path: Path
) -> None:
    put(tmp_path / "private/secret.jpg")
    (drop / "sub").symlink_to(tmp_path / "private")
    assert found(root) == {"sub": Passed.SYMLINK}
    assert look(root, "sub/secret.jpg", ALL) is None
    with pytest.raises(OSError, match="sub"):
        found(root, ALL, "sub")


def test_a_link_anywhere_above_a_file_leads_nowhere(root: int, drop: Path, tmp_path: Path) -> None:
    put(tmp_path / "private/deep/secret.jpg")
    (drop / "sub").mkdir()
    (drop / "sub/link").symlink_to(tmp_path / "private")
    assert look(root, "sub/link/deep/secret.jpg", ALL) is None
    with pytest.raises(OSError, match="link"):
        found(root, ALL, "sub/link/deep")


def test_a_sub_folder_that_is_swapped_for_a_link_in_the_middle_of_a_scan_leads_nowhere(
    root: int, drop: Path, tmp_path: Path
) -> None:
    put(tmp_path / "private/secret.jpg")
    put(drop / "a.jpg")
    put(drop / "sub/b.jpg")
    walk = scan(root, ALL)
    assert next(walk).relpath == "a.jpg"
    (drop / "sub").rename(drop / "moved")
    (drop / "sub").symlink_to(tmp_path / "private")
    assert "secret.jpg" not in "".join(each.relpath for each in walk)


def test_the_parent_directory_cannot_be_reached(root: int, drop: Path, tmp_path: Path) -> None:
    put(drop / "sub/a.jpg")
    put(tmp_path / "outside.jpg")
    assert all(not each.relpath.startswith("..") for each in scan(root, ALL))


# -- what goes away or cannot be read ----------------------------------------------------------


def test_a_sub_folder_that_vanishes_in_the_middle_of_a_scan_is_left_out(
    root: int, drop: Path
) -> None:
    put(drop / "a.jpg")
    put(drop / "sub/b.jpg")
    walk = scan(root, ALL)
    next(walk)
    shutil.rmtree(drop / "sub")
    assert list(walk) == []


def test_what_is_not_there_is_not_seen(root: int, drop: Path) -> None:
    assert look(root, "a.jpg", ALL) is None
    assert look(root, "sub/a.jpg", ALL) is None
    put(drop / "plain")
    assert look(root, "plain/a.jpg", ALL) is None
    with pytest.raises(FileNotFoundError):
        found(root, ALL, "sub")


def test_a_sub_folder_that_may_not_be_read_does_not_hide_the_others() -> None:
    with ordinary_folder() as drop, without_privileges():
        for name in ("open/a.jpg", "shut/b.jpg", "zone/c.jpg"):
            put(drop / name)
        (drop / "shut").chmod(0)
        root = os.open(drop, os.O_RDONLY | os.O_DIRECTORY)
        try:
            assert found(root) == {
                "open/a.jpg": None,
                "shut": Passed.UNREADABLE,
                "zone/c.jpg": None,
            }
            with pytest.raises(PermissionError):
                found(root, ALL, "shut")
        finally:
            os.close(root)
            (drop / "shut").chmod(0o700)


def test_no_descriptor_stays_open_also_when_a_scan_is_broken_off(root: int, drop: Path) -> None:
    for number in range(20):
        put(drop / f"{number}/a.jpg")
    before = open_descriptors()
    list(scan(root, ALL))
    walk = scan(root, ALL)
    next(walk)
    del walk
    look(root, "3/a.jpg", ALL)
    look(root, "3/b.jpg", ALL)
    assert open_descriptors() <= before


def test_looking_at_a_fifo_does_not_wait_for_its_writer(root: int, drop: Path) -> None:
    os.mkfifo(drop / "a.jpg")
    seen = look(root, "a.jpg", ALL)
    assert seen is not None
    assert seen.passed is Passed.SPECIAL
