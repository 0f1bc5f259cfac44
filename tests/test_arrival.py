"""Pictures arrive in every way that producers have, and end up sealed, whole, and gone."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from daemon import LINUX, NOON_NS, STAGING, Site, picture, place, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(not LINUX, reason="the service is Linux's")

KINDS = ("JPEG", "PNG", "TIFF", "GIF", "WEBP")
Expected = dict[bytes, tuple[bytes, int]]


def made(folder: Path, count: int = 10) -> Expected:
    """Make finished pictures in a folder nobody watches."""
    expected: Expected = {}
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        path = folder / f"img {number}.{kind.lower()}"
        path.write_bytes(picture(kind))
        os.utime(path, ns=(NOON_NS, NOON_NS + number))
        expected[os.fsencode(path.name)] = (path.read_bytes(), NOON_NS + number)
    return expected


def by_copy(source: Path, drop: Path) -> bytes:
    subprocess.run(["cp", "-p", *source.iterdir(), drop], check=True)
    return b""


def by_move_from_another_file_system(source: Path, drop: Path) -> bytes:
    memory = Path("/dev/shm")
    elsewhere = memory if os.access(memory, os.W_OK) else source.parent
    with tempfile.TemporaryDirectory(dir=elsewhere) as there:
        for file in source.iterdir():
            shutil.copy2(file, there)
        subprocess.run(["mv", *Path(there).iterdir(), drop], check=True)
    return b""


def by_rename(source: Path, drop: Path) -> bytes:
    for file in source.iterdir():
        part = drop / f"{file.name}.part"
        shutil.copy2(file, part)
        part.rename(drop / file.name)
    return b""


def into_a_new_sub_folder(source: Path, drop: Path) -> bytes:
    (drop / "2026" / "may").mkdir(parents=True)
    for file in source.iterdir():
        shutil.copy2(file, drop / "2026" / "may")
    return b"2026/may/"


def as_a_whole_folder(source: Path, drop: Path) -> bytes:
    (source / "deep").mkdir()
    for file in list(source.glob("*.*")):
        file.rename(source / "deep" / file.name)
    source.rename(drop / "moved in")
    return b"moved in/deep/"


WAYS = [
    by_copy,
    by_move_from_another_file_system,
    by_rename,
    into_a_new_sub_folder,
    as_a_whole_folder,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("when", ["before", "while"])
def test_pictures_come_back_as_they_arrived(
    site: Site, tmp_path: Path, way: Callable[[Path, Path], bytes], when: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    expected = made(source)
    if when == "while":
        site.start()
    folder = way(source, site.drop)
    if when == "before":
        site.start()
    site.wait_until_clear()
    assert len(site.objects()) == len(expected)
    restored = {
        path: (file.read_bytes(), file.stat().st_mtime_ns)
        for path, file in site.restored_files().items()
    }
    assert restored == {folder + name: each for name, each in expected.items()}
    listed = site.listed()
    assert {entry["name"] for entry in listed} == {name.decode() for name in expected}
    assert {entry["folder"] for entry in listed} == {folder.decode().rstrip("/")}
    assert {entry["format"] for entry in listed} == set(KINDS)
    assert {entry["width"] for entry in listed} == {24}
    assert site.temporaries() == []


def test_a_slow_writer_is_waited_for(site: Site) -> None:
    site.folder["settle"] = "100ms"
    daemon = site.start()
    content = picture("PNG", padding=300_000)
    path = site.drop / "slow.png"
    with path.open("wb") as file:
        for offset in range(0, len(content), 100_000):
            file.write(content[offset : offset + 100_000])
            file.flush()
            time.sleep(0.3)  # a pause longer than the folder's settle time
            assert path.exists()
        assert site.why(path)["verdict"] == "waiting"
    site.wait_until_clear()
    assert daemon.stop() == 0
    assert site.restored() == {b"slow.png": content}
    assert [entry["proof"] for entry in site.listed()] == ["lease"]


def test_a_copy_that_is_still_growing_is_never_sealed_in_part(site: Site) -> None:
    site.start()
    contents = {f"{n}.jpg".encode(): picture(padding=20_000) for n in range(20)}
    for name, content in contents.items():
        with open(os.path.join(os.fsencode(site.drop), name), "wb", buffering=0) as file:
            file.writelines(
                content[offset : offset + 1000] for offset in range(0, len(content), 1000)
            )
    site.wait_until_clear()
    assert site.restored() == contents


NAMES = [
    b"\xff\xfe not utf-8.jpg",
    b"new\nline.jpg",
    b"\x1b[31mred.jpg",
    b"-rf",
    b" ",
    b"\xe2\x80\xaeright to left.jpg",
    "ümlaut.jpg".encode(),
    b"x" * 251 + b".jpg",
    b"\xc3" * 255,
    b"back\\slash.jpg",
    b"%s{0}$HOME`id`.jpg",
]


@pytest.mark.parametrize("when", ["before", "while"])
def test_any_name_that_a_file_can_have_comes_back(site: Site, when: str) -> None:
    if when == "while":
        site.start()
    expected = {}
    top = os.fsencode(site.drop)
    for name in NAMES:
        folder = name if len(name) < 255 else b"deep"
        os.makedirs(os.path.join(top, folder), exist_ok=True)
        content = picture()
        for relative in (os.path.join(folder, name), name + b"2" if len(name) < 254 else name):
            with open(os.path.join(top, relative), "wb") as file:
                file.write(content)
            expected[relative] = content
    if when == "before":
        site.start()
    site.wait_until_clear()
    assert site.restored() == expected
    assert len(site.listed()) == len(expected)


def test_no_name_of_a_picture_is_logged(site: Site) -> None:
    daemon = site.start()
    place(site.drop / "passport of somebody.jpg", picture())
    (site.drop / "notes of somebody.txt").write_text("no picture")
    site.wait_for_objects(1)
    wait_until(lambda: site.plaintexts() == [b"notes of somebody.txt"], "the picture to go")
    assert daemon.stop() == 0
    assert "sealed object" in daemon.log()
    assert "somebody" not in daemon.log()
    assert "somebody" not in (site.state / "status.json").read_text()


@pytest.mark.parametrize("when", ["before", "while"])
def test_what_is_no_plain_file_is_passed_over_and_counted(
    site: Site, tmp_path: Path, when: str
) -> None:
    outside = tmp_path / "outside.jpg"
    outside.write_bytes(picture())
    linked = tmp_path / "linked.jpg"
    linked.write_bytes(picture())
    daemon = site.start() if when == "while" else None
    (site.drop / "link.jpg").symlink_to(outside)
    (site.drop / "dangling.jpg").symlink_to("nowhere")
    (site.drop / "hard.jpg").hardlink_to(linked)
    (site.drop / "folder.png").mkdir()
    subprocess.run(["mkfifo", site.drop / "fifo.jpg"], check=True)
    family: int = getattr(socket, "AF_UNIX", 0)
    with socket.socket(family, socket.SOCK_STREAM) as server:
        (site.top / "s").symlink_to(site.drop)  # an address has at most 107 bytes
        server.bind(os.path.relpath(site.top / "s" / "sock.jpg"))
    before = site.plaintexts()
    assert len(before) == 5
    place(site.drop / "real.jpg", picture())
    if daemon is None:
        daemon = site.start()
    site.wait_for_objects(1)
    wait_until(lambda: site.plaintexts() == before, "the real one to go")
    daemon.send("USR1")
    daemon.wait_for_log("it is a FIFO, socket or device")
    assert daemon.stop() == 0
    assert site.plaintexts() == before
    assert (site.drop / "folder.png").is_dir()
    assert (site.drop / "hard.jpg").read_bytes() == linked.read_bytes()
    assert outside.exists()
    assert site.status()["passed"] == {"symlink": 2, "hard_link": 1, "special": 2}
    assert list(site.restored()) == [b"real.jpg"]


def test_a_hard_link_is_taken_once_its_other_name_is_gone(site: Site, tmp_path: Path) -> None:
    other = tmp_path / "other.jpg"
    content = place(other, picture())
    (site.drop / "a.jpg").hardlink_to(other)
    daemon = site.start()
    daemon.wait_for_log("more than one name")
    other.unlink()
    daemon.send("USR1")
    site.wait_until_clear()
    assert site.restored() == {b"a.jpg": content}


def test_an_empty_file_is_left_alone_for_its_producer_to_fill(site: Site) -> None:
    (site.drop / "empty.jpg").touch()
    daemon = site.start()
    place(site.drop / "real.jpg", picture())
    site.wait_for_objects(1)
    wait_until(lambda: site.plaintexts() == [b"empty.jpg"], "the real one to go")
    content = picture()
    (site.drop / "empty.jpg").write_bytes(content)
    site.wait_until_clear()
    assert daemon.stop() == 0
    assert site.restored()[b"empty.jpg"] == content


def test_a_file_that_is_no_picture_is_left_where_it_is(site: Site) -> None:
    (site.drop / "note.txt").write_text("dear diary")
    daemon = site.start()
    place(site.drop / "real.jpg", picture())
    site.wait_for_objects(1)
    wait_until(lambda: site.why(site.drop / "note.txt")["verdict"] == "left", "a verdict")
    assert daemon.stop() == 0
    assert site.plaintexts() == [b"note.txt"]
    assert (site.drop / "note.txt").read_text() == "dear diary"
    assert site.status()["left"] == 1


def test_a_file_that_is_no_picture_becomes_one_when_it_is_written_again(site: Site) -> None:
    path = site.drop / "later.jpg"
    path.write_text("not yet")
    site.start()
    wait_until(lambda: site.why(path)["verdict"] == "left", "a verdict")
    content = picture()
    path.write_bytes(content)
    site.wait_until_clear()
    assert site.restored() == {b"later.jpg": content}


def test_a_file_that_is_no_picture_is_quarantined_where_the_policy_says_so(site: Site) -> None:
    site.folder["not_image"] = "quarantine"
    (site.drop / "sub").mkdir()
    (site.drop / "sub" / "note.txt").write_text("dear diary")
    daemon = site.start()
    [name] = wait_until(
        lambda: [n for n in site.plaintexts() if n.startswith(b"%s/quarantine" % STAGING.encode())],
        "quarantine",
    )
    assert name.endswith(b"/sub/note.txt")
    assert Path(site.drop, os.fsdecode(name)).read_text() == "dear diary"
    assert daemon.stop() == 0
    assert site.status()["quarantined"] == 1
    assert site.objects() == []
    [job] = site.ask("jobs", "quarantine")
    assert "not an image" in job["reason"]


def test_a_file_that_is_no_picture_is_sealed_where_the_policy_says_so(site: Site) -> None:
    site.folder["not_image"] = "encrypt"
    (site.drop / "note.txt").write_text("dear diary")
    site.start()
    site.wait_until_clear()
    assert site.restored() == {b"note.txt": b"dear diary"}
    assert [entry["label"] for entry in site.listed()] == ["not-image"]


def test_a_broken_picture_is_sealed_too(site: Site) -> None:
    whole = picture("PNG", side=64)
    content = place(site.drop / "half.png", whole[: len(whole) // 2])
    site.start()
    site.wait_until_clear()
    assert site.restored() == {b"half.png": content}


def test_a_picture_that_is_kept_is_sealed_once(site: Site) -> None:
    site.folder["after"] = "keep"
    contents = {b"kept.jpg": place(site.drop / "kept.jpg", picture())}
    first = site.start()
    site.wait_for_objects(1)
    first.send("USR1")
    first.wait_for_log("asked for")
    contents[b"second.jpg"] = place(site.drop / "second.jpg", picture())
    site.wait_for_objects(2)
    wait_until(lambda: site.why(site.drop / "second.jpg")["verdict"] == "kept", "a verdict")
    assert first.stop() == 0
    second = site.start()
    contents[b"third.jpg"] = place(site.drop / "third.jpg", picture())
    site.wait_for_objects(3)
    wait_until(lambda: site.why(site.drop / "third.jpg")["verdict"] == "kept", "a verdict")
    assert second.stop() == 0
    assert site.status()["kept"] == 3
    assert {n: (site.drop / os.fsdecode(n)).read_bytes() for n in site.plaintexts()} == contents
    assert site.restored() == contents


def test_a_kept_picture_is_sealed_anew_when_it_changes(site: Site) -> None:
    site.folder["after"] = "keep"
    path = site.drop / "a.jpg"
    first = place(path, picture())
    site.start()
    site.wait_for_objects(1)
    second = place(path, picture())
    site.wait_for_objects(2)
    assert path.read_bytes() == second
    assert set(site.restored().values()) == {first, second}


def test_a_picture_is_moved_on_once_it_is_sealed(site: Site, tmp_path: Path) -> None:
    target = tmp_path / "originals"
    site.folder["after"] = f"move:{target}"
    (site.drop / "sub").mkdir()
    content = place(site.drop / "sub" / "a.jpg", picture(), NOON_NS)
    site.start()
    site.wait_until_clear()
    assert (target / "sub" / "a.jpg").read_bytes() == content
    assert (target / "sub" / "a.jpg").stat().st_mtime_ns == NOON_NS
    assert site.restored() == {b"sub/a.jpg": content}
    second = place(site.drop / "sub" / "a.jpg", picture())
    wait_until(lambda: len(list((target / "sub").iterdir())) == 2, "the second of that name")
    assert {file.read_bytes() for file in (target / "sub").iterdir()} == {content, second}


def test_a_picture_waits_for_its_marker_which_goes_with_it(site: Site) -> None:
    site.folder["proof"] = "sidecar"
    site.start()
    path = site.drop / "a.jpg"
    content = place(path, picture())
    (site.drop / "b.jpg.done").touch()
    contents = {b"a.jpg": content, b"b.jpg": place(site.drop / "b.jpg", picture())}
    site.wait_for_objects(1)
    assert site.why(path)["verdict"] == "waiting"
    assert path.exists()
    (site.drop / "a.jpg.done").touch()
    site.wait_until_clear()
    assert site.restored() == contents
    assert {entry["proof"] for entry in site.listed()} == {"sidecar"}


def test_a_rename_is_proof_enough_where_the_policy_says_so(site: Site) -> None:
    site.folder["proof"] = "rename"
    site.start()
    content = place(site.drop / "a.jpg", picture())
    site.wait_until_clear()
    assert site.restored() == {b"a.jpg": content}
    assert [entry["proof"] for entry in site.listed()] == ["rename"]


def test_a_temporary_name_is_not_touched(site: Site) -> None:
    names = [b"a.jpg.part", b".b.jpg.Xy12zW", b".syncthing.c.jpg.tmp", b"d.jpg.crdownload"]
    for name in names:
        (site.drop / os.fsdecode(name)).write_bytes(picture())
    daemon = site.start()
    place(site.drop / "real.jpg", picture())
    site.wait_for_objects(1)
    wait_until(lambda: site.plaintexts() == sorted(names), "the real one to go")
    assert daemon.stop() == 0
    assert site.status()["passed"] == {"temporary": 4}


def test_a_polled_folder_is_served_as_well(site: Site) -> None:
    site.folder.update(watch="poll", poll="100ms")
    daemon = site.start()
    (site.drop / "sub").mkdir()
    contents = {
        f"sub/{n}.jpg".encode(): place(site.drop / "sub" / f"{n}.jpg", picture()) for n in range(5)
    }
    site.wait_until_clear()
    assert daemon.stop() == 0
    assert site.restored() == contents
    assert site.status()["mode"] == "poll"


def test_patterns_say_what_is_taken(site: Site) -> None:
    site.folder.update(include=["*.jpg", "all/*"], exclude=["private/*", "*-draft.jpg"])
    for folder in ("all", "private"):
        (site.drop / folder).mkdir()
    taken = [b"a.jpg", b"all/b.png", b"all/c.jpg"]
    left = [b"a-draft.jpg", b"all/d-draft.jpg", b"e.png", b"private/f.jpg"]
    daemon = site.start()
    contents = {n: place(site.drop / os.fsdecode(n), picture()) for n in left + taken}
    wait_until(lambda: site.plaintexts() == sorted(left), "only what is left out to be left")
    daemon.send("USR1")
    daemon.wait_for_log("no pattern of 'include' matches it")
    assert daemon.stop() == 0
    assert site.restored() == {name: contents[name] for name in taken}
    assert site.status()["passed"] == {"excluded": 3, "not_included": 1}


def test_a_folder_that_is_not_recursive_leaves_its_sub_folders_alone(site: Site) -> None:
    site.folder["recursive"] = False
    (site.drop / "sub").mkdir()
    place(site.drop / "sub" / "a.jpg", picture())
    site.start()
    content = place(site.drop / "b.jpg", picture())
    wait_until(lambda: site.plaintexts() == [b"sub/a.jpg"], "the other one to go")
    assert site.restored() == {b"b.jpg": content}


def test_only_the_listed_formats_are_taken(site: Site) -> None:
    site.folder["formats"] = ["PNG"]
    content = place(site.drop / "a.png", picture("PNG"))
    place(site.drop / "b.png", picture("JPEG"))
    site.start()
    wait_until(lambda: site.why(site.drop / "b.png")["verdict"] == "left", "a verdict")
    wait_until(lambda: site.plaintexts() == [b"b.png"], "the other one to go")
    assert site.restored() == {b"a.png": content}


def test_a_signal_asks_for_a_scan(site: Site) -> None:
    site.folder.update(watch="poll", poll="1h", rescan="1h")
    daemon = site.start()
    wait_until(lambda: site.status()["health"] == "ok", "the first scan")
    content = place(site.drop / "a.jpg", picture())
    daemon.send("USR1")
    site.wait_until_clear()
    assert site.restored() == {b"a.jpg": content}


def test_another_staging_directory_is_used_where_the_policy_names_one(
    site: Site, tmp_path: Path
) -> None:
    site.folder["staging"] = str(tmp_path / "staging")
    daemon = site.start()
    content = place(site.drop / "a.jpg", picture())
    site.wait_until_clear()
    assert daemon.stop() == 0
    assert os.listdir(site.drop) == []
    assert os.listdir(tmp_path / "staging") == []
    assert site.restored() == {b"a.jpg": content}
