"""What goes wrong with drop folders, row by row: the rows of docs/scenarios.md without a test
elsewhere, and the table itself.

Most of it runs the service within this process, so that a test can reach into it and no
interpreter has to start.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import functools
import os
import re
import sqlite3
import struct
import subprocess
import sys
import threading
import unicodedata
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import daemon
import pytest
from daemon import STAGING, Site, files_below, picture, place, wait_until
from path_builders import (
    PICTURE,
    can_mount,
    desk_in,
    mounted_tmpfs,
    only_on_linux,
    ordinary_folder,
    without_privileges,
)

from secimg_watch import kernel, monitor, pipeline, service, settle
from secimg_watch.erase import erase
from secimg_watch.jobs import Jobs
from secimg_watch.monitor import Monitor
from secimg_watch.policy import load_policy
from secimg_watch.records import Arrival, FolderKey, Identity, Proof, Settled
from secimg_watch.scan import scan
from secimg_watch.service import Service

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from secimg_watch.report import FolderReport
    from secimg_watch.watcher import Listener

only_on_linux()
assert sys.platform == "linux"

TESTS: Final = Path(__file__).parent
PAGE: Final = TESTS.parent / "docs" / "scenarios.md"
UNINSPECTED: Final = {"preview": 0, "not_image": "encrypt", "undecodable": "encrypt"}
"""No decoder is asked anything, so none has to be started."""


@contextlib.contextmanager
def serving(site: Site, *, native: bool = True) -> Iterator[Service]:
    """Run the service in this process; who lets it wait for a key has to call ``tend``."""
    if (site.vault / "vault.json").exists():
        site.write_policy()
    else:
        site.make_vaults()
    running = Service(load_policy(site.policy_path), native=native)
    running.open()
    try:
        running.tend()
        running.start()
        yield running
    finally:
        running.stop()
        running.close()


def folder_of(running: Service) -> FolderReport:
    return running.report(running=True).folders[0]


def wait_for_health(running: Service, health: str, reason: str = "") -> None:
    def is_so() -> bool:
        now = folder_of(running)
        return now.health == health and reason in now.reason

    wait_until(is_so, f"{health}: {reason}")


def drain(site: Site) -> FolderReport:
    """Take everything that is ready, and say how the folder is doing then."""
    with serving(site, native=False) as running:
        wait_until(running.is_idle, "everything that is ready to be done")
        return folder_of(running)


@pytest.fixture
def plain(site: Site) -> Site:
    """Give a site whose pictures are sealed without being looked at."""
    site.folder.update(UNINSPECTED)
    return site


# -- the table ---------------------------------------------------------------------------------


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


ROWS: Final = [
    cells(line) for line in PAGE.read_text().splitlines() if re.match(r"\| \w+ \|", line)
]


def named_in(row: list[str]) -> list[str]:
    return re.findall(r"`tests/(test_\w+\.py::test_\w+)`", row[3])


@functools.cache
def defined() -> set[str]:
    return {
        f"{path.name}::{node.name}"
        for path in TESTS.glob("test_*.py")
        for node in ast.parse(path.read_bytes()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_the_table_has_forty_rows_and_some_more() -> None:
    assert [row[0] for row in ROWS] == [*map(str, range(1, 41)), "A", "B", "C", "D"]
    assert {len(row) for row in ROWS} == {4}


def test_every_test_that_the_table_names_exists() -> None:
    named = {test for row in ROWS for test in named_in(row)}
    assert len(named) > 40
    assert named <= defined(), sorted(named - defined())


def test_every_row_has_a_test_or_says_why_there_is_none() -> None:
    for row in ROWS:
        assert named_in(row) or row[3].startswith("none:"), row[0]


def test_every_test_of_this_file_stands_in_the_table() -> None:
    here = {name for name in defined() if name.startswith(Path(__file__).name)}
    named = {test for row in ROWS for test in named_in(row)}
    about_the_table = {name for name in here if "table" in name or "every_row" in name}
    assert here - about_the_table <= named


# -- one drain of many odd files ---------------------------------------------------------------

FIRST_SECOND_NS: Final = -1_000_000_000  # a second before 1970
FAR_FUTURE_NS: Final = 4_102_444_800_000_000_000  # 2100
TWINS: Final = ("Scan.jpg", "scan.jpg", "SCAN.JPG")
COMPOSED: Final = unicodedata.normalize("NFC", "e\u0301t\u00e9.jpg")
DECOMPOSED: Final = unicodedata.normalize("NFD", COMPOSED)
ODD_NAMES: Final = (*TWINS, COMPOSED, DECOMPOSED, "...", "..a.jpg", "-- .jpg", "a:b*?.jpg")


def bomb(side: int) -> bytes:
    """Make a small PNG file that decodes to black pixels, ``side`` times ``side`` of them."""
    data = b"\x89PNG\r\n\x1a\n"
    ihdr = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    lines = zlib.compress(bytes((side // 8 + 1) * side), 9)
    for kind, body in ((b"IHDR", ihdr), (b"IDAT", lines), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + kind + body
        data += struct.pack(">I", zlib.crc32(kind + body))
    return data


@dataclass(frozen=True)
class Odd:
    """What was dropped, what came back, and what the vault says of it."""

    dropped: dict[str, bytes]
    whole: bytes  # the second upload of "cut.jpg"
    files: dict[str, Path]
    listed: dict[str, list[dict[str, Any]]]  # by name

    def restored(self, name: str) -> bytes:
        return self.files[name].read_bytes()


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Odd:
    site = Site(tmp_path_factory.mktemp("odd"))
    whole = picture(side=64)
    zero_tail = picture("BMP", side=64)
    dropped = {
        "cut.jpg": whole[: len(whole) // 2],
        "zero tail.bmp": zero_tail[: len(zero_tail) // 2] + bytes(len(zero_tail) // 2),
        "copy 1.jpg": whole,
        "copy 2.jpg": whole,
        "old.jpg": picture(),
        "future.jpg": picture(),
        "bomb.png": bomb(12_000),
        **{name: picture() for name in ODD_NAMES},
    }
    for name, content in dropped.items():
        (site.drop / name).write_bytes(content)
    os.utime(site.drop / "old.jpg", ns=(FIRST_SECOND_NS, FIRST_SECOND_NS))
    os.utime(site.drop / "future.jpg", ns=(FAR_FUTURE_NS, FAR_FUTURE_NS))
    drain(site)
    (site.drop / "cut.jpg").write_bytes(whole)
    drain(site)
    assert site.plaintexts() == []
    listed: dict[str, list[dict[str, Any]]] = {}
    for entry in site.listed():
        listed.setdefault(entry["name"], []).append(entry)
    files = {os.fsdecode(name): path for name, path in site.restored_files().items()}
    return Odd(dropped, whole, files, listed)


def test_a_file_whose_second_half_is_zeros_is_sealed_as_it_is(odd: Odd) -> None:
    assert odd.restored("zero tail.bmp") == odd.dropped["zero tail.bmp"]
    assert [entry["label"] for entry in odd.listed["zero tail.bmp"]] == ["image"]


def test_a_broken_upload_and_the_whole_one_after_it_are_two_objects(odd: Odd) -> None:
    entries = sorted(odd.listed["cut.jpg"], key=lambda entry: entry["sealed_ns"])
    assert [entry["label"] for entry in entries] == ["undecodable", "image"]
    assert [entry["size"] for entry in entries] == [len(odd.dropped["cut.jpg"]), len(odd.whole)]
    contents = {path.read_bytes() for name, path in odd.files.items() if name.startswith("cut")}
    assert contents == {odd.dropped["cut.jpg"], odd.whole}


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_that_differ_in_little_come_back_each_with_its_picture(odd: Odd, name: str) -> None:
    assert odd.restored(name) == odd.dropped[name]
    assert len(odd.listed[name]) == 1


def test_the_same_content_under_two_names_is_sealed_twice(odd: Odd) -> None:
    entries = [entry for n in (1, 2) for entry in odd.listed[f"copy {n}.jpg"]]
    assert len({entry["object"] for entry in entries}) == 2
    assert odd.restored("copy 1.jpg") == odd.restored("copy 2.jpg") == odd.whole


@pytest.mark.parametrize(("name", "ns"), [("old", FIRST_SECOND_NS), ("future", FAR_FUTURE_NS)])
def test_a_time_before_1970_or_in_the_future_delays_nothing_and_comes_back(
    odd: Odd, name: str, ns: int
) -> None:
    assert odd.restored(f"{name}.jpg") == odd.dropped[f"{name}.jpg"]
    assert odd.files[f"{name}.jpg"].stat().st_mtime_ns == ns
    assert [entry["modified_ns"] for entry in odd.listed[f"{name}.jpg"]] == [ns]


def test_a_decompression_bomb_is_sealed_without_being_decoded(odd: Odd) -> None:
    assert len(odd.dropped["bomb.png"]) < 100_000
    assert odd.restored("bomb.png") == odd.dropped["bomb.png"]
    [entry] = odd.listed["bomb.png"]
    assert (entry["label"], entry["format"]) == ("undecodable", "PNG")
    assert (entry["width"], entry["height"]) == (12_000, 12_000)


# -- still being written, or empty -------------------------------------------------------------


def test_space_that_is_set_aside_for_a_file_is_no_picture_yet(plain: Site) -> None:
    content = picture(padding=100_000)
    path = plain.drop / "large.jpg"
    with serving(plain) as running:
        with path.open("wb", buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, len(content))
            running.rescan()
            wait_until(lambda: folder_of(running).unready == 1, "the file to be seen")
            file.write(content[:50_000])
            assert plain.why(path)["reason"] == "some process still has it open for writing"
            assert running.jobs.rows() == []
            file.write(content[50_000:])
        plain.wait_until_clear()
    assert plain.restored() == {b"large.jpg": content}


def test_what_is_not_complete_after_an_hour_is_named(
    plain: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "_OVERDUE", 0.2)
    plain.folder["rescan"] = "1s"
    with serving(plain) as running:
        with (plain.drop / "a.jpg").open("wb", buffering=0) as file:
            file.write(b"whole")
            wait_for_health(running, "degraded", "1 files are not complete")
            assert folder_of(running).unready == 1
        plain.wait_until_clear()
        wait_for_health(running, "ok")
        (plain.drop / "b.jpg.part").write_bytes(b"half")
        wait_for_health(running, "degraded", "1 files are not complete")
        (plain.drop / "b.jpg.part").unlink()
        wait_for_health(running, "ok")
    assert plain.restored() == {b"a.jpg": b"whole"}


@pytest.mark.parametrize("not_image", ["leave", "quarantine", "encrypt"])
def test_a_file_that_stays_empty_is_judged_like_any_other_that_is_no_picture(
    site: Site, monkeypatch: pytest.MonkeyPatch, not_image: str
) -> None:
    monkeypatch.setattr(settle, "EMPTY_GRACE", 0.0)
    site.folder["not_image"] = not_image
    (site.drop / "empty.jpg").touch()
    report = drain(site)
    where = {name.rpartition(b"/")[0].split(b"/")[:2][-1] for name in site.plaintexts()}
    if not_image == "leave":
        assert (report.left, where) == (1, {b""})
    elif not_image == "quarantine":
        assert (report.quarantined, where) == (1, {b"quarantine"})
    else:
        assert (report.sealed, where) == (1, set())
        assert site.restored() == {b"empty.jpg": b""}


def test_the_directories_of_a_producer_stay(plain: Site) -> None:
    (plain.drop / "2026" / "may").mkdir(parents=True)
    content = place(plain.drop / "2026" / "may" / "a.jpg", picture())
    drain(plain)
    assert plain.restored() == {b"2026/may/a.jpg": content}
    assert os.listdir(plain.drop / "2026" / "may") == []


# -- what the kernel does not tell -------------------------------------------------------------


def may_make_namespaces() -> bool:
    command = ["unshare", "--user", "--map-root-user", "cat", "/proc/sys/user/max_inotify_watches"]
    try:
        return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0
    except OSError:
        return False


in_a_namespace = pytest.mark.skipif(
    not may_make_namespaces(), reason="the limit is set in a user namespace"
)


def limit_daemons(monkeypatch: pytest.MonkeyPatch, what: str, count: int) -> None:
    """Have every daemon of this test run under a limit of its own."""
    script = f'echo {count} > /proc/sys/user/{what} && exec "$@"'
    prefix = ("unshare", "--user", "--map-root-user", "sh", "-c", script, "sh")
    monkeypatch.setattr(daemon, "_TIED", (*prefix, *daemon._TIED))


@in_a_namespace
def test_sub_folders_that_are_not_watched_are_polled_and_the_remedy_is_named(
    plain: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_daemons(monkeypatch, "max_inotify_watches", 4)
    plain.folder.update(poll="200ms", rescan="1h")
    for number in range(6):
        (plain.drop / f"{number}").mkdir()
    plain.start()
    wait_until(lambda: plain.status()["health"] == "degraded", "the gap to be noticed")
    reason = plain.status()["reason"]
    assert "3 sub-folders cannot be watched" in reason
    assert "raise fs.inotify.max_user_watches" in reason
    contents = {
        f"{n}/a.jpg".encode(): place(plain.drop / f"{n}" / "a.jpg", picture()) for n in range(6)
    }
    plain.wait_until_clear()
    assert plain.restored() == contents


@in_a_namespace
@pytest.mark.parametrize(
    ("what", "few"), [("max_inotify_watches", 4), ("max_inotify_instances", 0)]
)
def test_once_a_limit_is_raised_the_folder_is_heard_again(
    plain: Site, monkeypatch: pytest.MonkeyPatch, what: str, few: int
) -> None:
    limit_daemons(monkeypatch, what, few)
    plain.folder.update(poll="200ms", rescan="1s")
    for number in range(6):
        (plain.drop / f"{number}").mkdir()
    started = plain.start()
    wait_until(lambda: plain.status()["health"] == "degraded", "the gap to be noticed")
    assert f"raise fs.inotify.{what.replace('inotify', 'user')}" in plain.status()["reason"]
    enter = ["nsenter", "--user", "--preserve-credentials", "-t", str(started.process.pid)]
    subprocess.run([*enter, "sh", "-c", f"echo 99 > /proc/sys/user/{what}"], check=True)
    wait_until(lambda: plain.status()["health"] == "ok", "the folder to be watched again")
    assert plain.status()["mode"] == "native"
    contents = {b"5/a.jpg": place(plain.drop / "5" / "a.jpg", picture())}
    plain.wait_until_clear()
    assert plain.restored() == contents


@in_a_namespace
def test_a_folder_for_which_there_is_no_watcher_left_is_polled(
    plain: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_daemons(monkeypatch, "max_inotify_instances", 0)
    plain.folder.update(poll="200ms", rescan="1h")
    plain.start()
    wait_until(lambda: plain.status()["health"] == "degraded", "the lack to be noticed")
    assert "polling instead" in plain.status()["reason"]
    assert plain.status()["mode"] == "poll"
    content = place(plain.drop / "a.jpg", picture())
    plain.wait_until_clear()
    assert plain.restored() == {b"a.jpg": content}


def test_a_watch_whose_thread_died_is_made_anew(plain: Site) -> None:
    plain.folder["rescan"] = "1h"
    with serving(plain) as running:
        wait_for_health(running, "ok")
        watches: dict[FolderKey, Any] = running._watcher._watches  # type: ignore[union-attr]
        [(key, watch)] = watches.items()
        watch.observer.stop()
        wait_until(lambda: watches.get(key, watch) is not watch, "another watch")
        content = place(plain.drop / "a.jpg", picture())
        plain.wait_until_clear()
    assert plain.restored() == {b"a.jpg": content}


class Deaf:
    """A watcher that is alive and never says anything by itself."""

    listeners: ClassVar[list[Listener]] = []

    def watch(self, _folder: FolderKey, _root: str, listener: Listener, **_how: bool) -> None:
        self.listeners[:] = [listener]

    def unwatch(self, _folder: FolderKey) -> None:
        """Stop hearing nothing."""

    def unwatched(self, _folder: FolderKey) -> tuple[int, str]:
        return 0, ""

    def is_alive(self, _folder: FolderKey) -> bool:
        return True

    def close(self) -> None:
        """Nothing was opened."""


def test_what_no_event_told_of_is_found_by_the_next_scan(
    plain: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "native_watcher", Deaf)
    plain.folder["rescan"] = "1s"
    with serving(plain) as running:
        wait_for_health(running, "ok")
        content = place(plain.drop / "a.jpg", picture())
        plain.wait_until_clear()
        assert folder_of(running).mode == "native"
    assert plain.restored() == {b"a.jpg": content}


def test_of_a_new_directory_its_own_event_is_enough(
    plain: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "native_watcher", Deaf)
    plain.folder["rescan"] = "1h"
    with serving(plain) as running:
        wait_for_health(running, "ok")
        (plain.top / "tree" / "deep").mkdir(parents=True)
        content = place(plain.top / "tree" / "deep" / "a.jpg", picture())
        (plain.top / "tree").rename(plain.drop / "tree")
        [listener] = Deaf.listeners
        listener.hint("tree", directory=True, renamed=True)
        plain.wait_until_clear()
    assert plain.restored() == {b"tree/deep/a.jpg": content}


@contextlib.contextmanager
def bound(source: Path, target: Path) -> Iterator[None]:
    subprocess.run(["mount", "--bind", source, target], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", target], check=True)


@pytest.mark.skipif(not can_mount(), reason="mounting takes root's privileges")
def test_a_file_system_that_is_away_is_named_and_what_was_kept_there_is_not_sealed_again(
    plain: Site,
) -> None:
    plain.folder.update(after="keep", rescan="1s")
    disk = plain.top / "disk"
    disk.mkdir()
    with mounted_tmpfs(disk, "1m"), contextlib.ExitStack() as hands:
        (disk / "drop").mkdir()
        with bound(disk / "drop", plain.drop):
            running = hands.enter_context(serving(plain))
            for number in range(3):
                place(plain.drop / f"{number}.jpg", picture())
            with (disk / "drop" / "open.jpg").open("wb", buffering=0) as writer:
                writer.write(b"half")
                wait_until(lambda: folder_of(running).kept == 3, "three kept pictures")
                wait_until(lambda: folder_of(running).unready == 1, "one that is not complete")
                subprocess.run(["umount", "--lazy", plain.drop], check=True)
                wait_for_health(running, "degraded", "not mounted")
                place(plain.drop / "meanwhile.jpg", picture())
                wait_until(lambda: folder_of(running).kept == 4, "a picture below the mount point")
                subprocess.run(["mount", "--bind", disk / "drop", plain.drop], check=True)
                wait_for_health(running, "ok")
                wait_until(lambda: folder_of(running).unready == 1, "the scan")
                writer.write(b"whole")
            wait_until(lambda: folder_of(running).kept == 5, "the last one")
            assert folder_of(running).vanished == 0
    assert len(plain.objects()) == 5


def test_what_was_kept_is_known_by_all_but_the_number_of_its_device(plain: Site) -> None:
    plain.folder["after"] = "keep"
    contents = {b"a.jpg": place(plain.drop / "a.jpg", picture())}
    contents[b"b.jpg"] = place(plain.drop / "b.jpg", picture())
    assert drain(plain).kept == 2
    with contextlib.closing(sqlite3.connect(plain.state / "queue.sqlite")) as database:
        assert database.execute("UPDATE job SET dev = dev + 1").rowcount == 2
        database.commit()
    (plain.drop / "b.jpg").unlink()
    assert (drain(plain).kept, drain(plain).kept) == (2, 1)
    assert plain.restored() == contents
    assert len(plain.objects()) == 2


WITH_A_DEFECT: Final = """
import sys
from secimg_watch.jobs import Jobs
from secimg_watch.monitor import Monitor
def fail(monitor, root):
    raise SystemExit
Monitor._look_again = fail
sys.argv = ["secimg-watch", "--policy", sys.argv[1], "run"]
from secimg_watch.cli import main
main()
"""


def test_the_process_ends_where_one_of_its_threads_has(plain: Site) -> None:
    plain.make_vaults()
    command = [sys.executable, "-c", WITH_A_DEFECT, str(plain.policy_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 75
    assert f"a thread of the service died: folder {plain.drop}" in done.stderr


# -- what becomes of the folder ----------------------------------------------------------------


@pytest.mark.skipif(not can_mount(), reason="mounting takes root's privileges")
def test_whatever_is_mounted_at_the_path_is_watched_and_what_lies_below_waits(plain: Site) -> None:
    plain.folder["rescan"] = "1h"
    below = plain.drop / "below.jpg.part"
    contents = {b"below.jpg": picture(), b"above.jpg": picture()}
    below.write_bytes(contents[b"below.jpg"])
    with serving(plain) as running:
        wait_until(lambda: folder_of(running).temporary == 1, "the first scan")
        with mounted_tmpfs(plain.drop, "1m"):
            place(plain.drop / "above.jpg", contents[b"above.jpg"])
            plain.wait_for_objects(1)
            plain.wait_until_clear()
            assert folder_of(running).temporary == 0
        assert plain.plaintexts() == [b"below.jpg.part"]
        wait_until(lambda: folder_of(running).temporary == 1, "the first one to be watched again")
        below.rename(plain.drop / "below.jpg")
        plain.wait_until_clear()
        wait_until(lambda: folder_of(running).sealed == 2, "both to be counted")
        assert folder_of(running).vanished == 0
    assert plain.restored() == contents


def test_a_folder_behind_a_link_is_heard_and_a_link_that_is_turned_is_noticed(plain: Site) -> None:
    link, other = plain.top / "link", plain.top / "other"
    other.mkdir()
    link.symlink_to("drop")
    plain.folder.update(path=str(link), rescan="1h")
    with serving(plain) as running:
        wait_for_health(running, "ok")
        contents = {b"a.jpg": place(plain.drop / "a.jpg", picture())}
        plain.wait_until_clear()
        (plain.top / "turned").symlink_to("other")
        (plain.top / "turned").rename(link)
        contents[b"b.jpg"] = place(other / "b.jpg", picture())
        plain.wait_until_clear(other)
    assert plain.restored() == contents


def test_a_folder_on_a_network_file_system_is_polled(
    plain: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "file_system_type", lambda _path: "nfs4")
    plain.folder["poll"] = "100ms"
    with serving(plain) as running:
        wait_for_health(running, "ok")
        content = place(plain.drop / "a.jpg", picture())
        plain.wait_until_clear()
        assert folder_of(running).mode == "poll"
    assert plain.restored() == {b"a.jpg": content}


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EHOSTDOWN])
def test_a_share_that_stops_answering_is_gone_until_it_answers(
    plain: Site, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    plain.folder.update(watch="poll", poll="100ms")
    with serving(plain) as running:
        wait_for_health(running, "ok")
        with monkeypatch.context() as patch:
            patch.setattr(monitor, "scan", failing(code))
            wait_for_health(running, "gone", "the folder does not answer")
            content = place(plain.drop / "a.jpg", picture())
        plain.wait_until_clear()
        wait_for_health(running, "ok")
        assert folder_of(running).vanished == 0
    assert plain.restored() == {b"a.jpg": content}


def failing(code: int) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO])
def test_a_share_that_fails_in_the_middle_of_a_picture_pauses_and_burns_no_attempt(
    plain: Site, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(service, "_FIRST_PAUSE", 0.02)
    with serving(plain) as running:
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "hold", failing(code))
            content = place(plain.drop / "a.jpg", picture())
            wait_for_health(running, "paused", os.strerror(code))
            [(pause_of, first)] = running._paused.items()
            wait_until(lambda: running._paused[pause_of].length > first.length, "a longer one")
            assert [row.attempts for row in running.jobs.rows()] <= [1]
        plain.wait_until_clear()
        wait_for_health(running, "ok")
    assert plain.restored() == {b"a.jpg": content}


# -- full disks --------------------------------------------------------------------------------


def test_a_full_vault_pauses_all_folders_that_use_it_and_no_other(plain: Site) -> None:
    plain.policy["vaults"]["full"] = {"path": str(plain.top / "full"), "min_free": "1000TB"}
    for name in ("scans", "photos"):
        (plain.top / name).mkdir()
        folder = {**plain.folder, "path": str(plain.top / name), "vault": "full"}
        plain.policy["folders"].append(folder)
    with serving(plain) as running:
        content = place(plain.top / "scans" / "a.jpg", picture())

        def healths() -> list[str]:
            return [folder.health for folder in running.report(running=True).folders]

        wait_until(lambda: healths() == ["ok", "paused", "paused"], "the pause")
        place(plain.drop / "b.jpg", picture())
        plain.wait_until_clear()
        assert running.jobs.states(FolderKey(str(plain.top / "scans"))) == {"queued": 1}
    [path] = files_below(plain.top / "scans").values()
    assert path.read_bytes() == content


@pytest.mark.skipif(not can_mount(), reason="mounting takes root's privileges")
def test_where_the_queue_has_no_room_the_process_ends_and_a_later_one_goes_on(plain: Site) -> None:
    disk = plain.top / "disk"
    disk.mkdir()
    plain.state, plain.vault = disk / "state", disk / "vault"
    plain.policy["state"] = str(plain.state)
    plain.policy["vaults"]["main"] = {"path": str(plain.vault), "min_free": "2%"}
    with mounted_tmpfs(disk, "8m"):
        started = plain.start()
        with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        content = place(plain.drop / "a.jpg", picture())
        assert started.ended() == 75
        assert "the queue cannot be used" in started.log()
        assert (plain.drop / "a.jpg").read_bytes() == content
        (disk / "filler").unlink()
        plain.start()
        plain.wait_until_clear()
        assert plain.restored() == {b"a.jpg": content}
        assert plain.daemons[-1].stop() == 0


def test_a_picture_whose_claim_has_no_room_is_sealed_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with desk_in(tmp_path) as desk:
        path = desk.drop()
        job = desk.job()
        monkeypatch.setattr(os, "mkdir", failing(errno.ENOSPC))
        committed = desk.committed(job)
        monkeypatch.undo()
        assert committed.verified.staged.claimed.in_place
        assert path.exists()
        erase([desk.erasure(committed)])
        assert not path.exists()
        assert desk.opened(job.object_id) == PICTURE


# -- keys, kills, and other services -----------------------------------------------------------


def test_without_its_key_the_service_watches_and_queues(
    plain: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_KEY_RETRY", 0.05)
    plain.make_vaults()
    locked = plain.key.rename(plain.top / "locked")
    plain.policy["key"] = {"provider": "command", "command": ["cat", str(plain.key)]}
    with serving(plain) as running:
        contents = {f"{n}.jpg".encode(): place(plain.drop / f"{n}.jpg", picture()) for n in "ab"}
        wait_until(lambda: folder_of(running).queued == 2, "the queue")
        running.tend()
        assert running.report(running=True).summary().startswith("waiting for key: ")
        assert plain.plaintexts() == sorted(contents)
        assert [row.attempts for row in running.jobs.rows()] == [0, 0]
        locked.rename(plain.key)

        def cleared() -> bool:
            running.tend()
            return plain.plaintexts() == []

        wait_until(cleared, "the key to be found")
    assert plain.restored() == contents


def test_each_step_is_durable_before_the_next_one_relies_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[str, str]] = []
    sync, unlink, rename = os.fsync, os.unlink, kernel.rename_noreplace

    def note(step: str, path: str) -> None:
        steps.append((step, os.path.relpath(path, tmp_path)))

    def noted_sync(fd: int) -> None:
        sync(fd)
        note("sync", os.readlink(f"/proc/self/fd/{fd}"))

    def noted_unlink(path: str, *, dir_fd: int | None = None) -> None:
        unlink(path, dir_fd=dir_fd)
        parent = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        note("unlink", os.path.join(parent, path))

    def noted_rename(source: str, target: str, *, source_dir: int, target_dir: int) -> None:
        rename(source, target, source_dir=source_dir, target_dir=target_dir)
        note("rename", os.path.join(os.readlink(f"/proc/self/fd/{target_dir}"), target))

    with desk_in(tmp_path) as desk:
        desk.drop()
        job = desk.job()
        monkeypatch.setattr(os, "fsync", noted_sync)
        monkeypatch.setattr(os, "unlink", noted_unlink)
        monkeypatch.setattr(kernel, "rename_noreplace", noted_rename)
        erase([desk.erasure(desk.committed(job))])
        monkeypatch.undo()
        shard, name = f"vault/objects/{job.object_id[:2]}", f"{job.object_id}.simg"
        assert steps == [
            ("sync", f"vault/tmp/{name}"),
            ("rename", f"{shard}/{name}"),
            ("sync", shard),
            ("unlink", f"drop/{STAGING}/{job.object_id}/a.jpg"),
            ("sync", f"drop/{STAGING}"),
        ]
        assert desk.opened(job.object_id) == PICTURE


def test_a_second_service_on_one_folder_waits_until_the_first_one_is_gone(plain: Site) -> None:
    other = Site(plain.top / "other")
    other.folder.update(UNINSPECTED, path=str(plain.drop))
    with contextlib.ExitStack() as hands:
        with serving(plain) as first:
            wait_for_health(first, "ok")
            second = hands.enter_context(serving(other))
            wait_for_health(second, "gone", "another secimg-watch works on this folder")
            contents = {place(plain.drop / f"{number}.jpg", picture()) for number in range(20)}
            plain.wait_until_clear()
        assert set(plain.restored().values()) == contents
        assert other.objects() == []
        wait_for_health(second, "ok")
        content = place(plain.drop / "last.jpg", picture())
        plain.wait_until_clear()
    assert other.restored() == {b"last.jpg": content}


def test_a_command_that_writes_to_the_queue_meanwhile_makes_no_job_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = FolderKey("/srv/scans")
    path = tmp_path / "queue.sqlite"
    with contextlib.closing(Jobs(path)) as jobs, contextlib.closing(Jobs(path)) as command:
        follow = jobs._follow_device
        writing = threading.Thread(target=command.count, args=(key, "vanished"))

        def follow_and_be_disturbed(row: Any) -> None:
            follow(row)
            writing.start()
            writing.join(0.3)  # it waits its turn, or has had it

        monkeypatch.setattr(jobs, "_follow_device", follow_and_be_disturbed)
        arrival = Arrival(key, "a.jpg", Identity(1, 2, 3, 4, 5), 1)
        assert jobs.admit([Settled(arrival, Proof.LEASE)]) == 1
        writing.join()
        assert jobs.counters(key) == {"vanished": 1}


# -- what cannot be deleted or read ------------------------------------------------------------


@pytest.fixture
def ordinary(plain: Site) -> Iterator[Site]:
    """Give a site of a user without privileges, whoever runs the tests."""
    drain(plain)  # loads every module, also where that user could not
    with ordinary_folder() as top, without_privileges():
        site = Site(top)
        site.folder.update(UNINSPECTED)
        yield site
        site.drop.chmod(0o700)


def test_a_plaintext_that_cannot_be_deleted_is_sealed_once_and_named(ordinary: Site) -> None:
    content = place(ordinary.drop / "a.jpg", picture())
    ordinary.drop.chmod(0o500)
    for _ in range(3):
        report = drain(ordinary)
        assert (report.undeletable, report.sealed) == (1, 1)
        assert ordinary.plaintexts() == [b"a.jpg"]
    assert ordinary.why(ordinary.drop / "a.jpg")["verdict"] == "undeletable"
    assert ordinary.restored() == {b"a.jpg": content}
    assert len(ordinary.objects()) == 1


def test_a_file_that_may_not_be_read_is_named_and_taken_once_it_may(ordinary: Site) -> None:
    ordinary.policy["limits"] = {"attempts": 1}
    ordinary.folder["proof"] = "quiet"
    path = ordinary.drop / "a.jpg"
    content = place(path, picture())
    path.chmod(0)
    assert drain(ordinary).quarantined == 1
    answer = ordinary.why(path)
    assert answer["verdict"] == "quarantined"
    assert "Permission denied" in answer["reason"]
    assert ordinary.plaintexts() == [b"a.jpg"]
    path.chmod(0o600)
    assert drain(ordinary).sealed == 1
    assert ordinary.restored() == {b"a.jpg": content}


def test_a_file_that_is_seen_anew_while_it_is_taken_burns_no_attempt(tmp_path: Path) -> None:
    key = FolderKey("/srv/scans")
    before = Identity(1, 2, 3, 4, 5)
    with contextlib.closing(Jobs(tmp_path / "queue.sqlite")) as jobs:
        jobs.admit([Settled(Arrival(key, "a.jpg", before, 1), Proof.LEASE)])
        taken = jobs.take(lambda: [key], 0.0)
        assert taken is not None
        after = replace(before, ctime_ns=6)
        jobs.admit([Settled(Arrival(key, "a.jpg", after, 1), Proof.LEASE)])
        jobs.drop(taken, "changed")
        again = jobs.take(lambda: [key], 0.0)
        assert again is not None
        assert (again.identity, again.attempts) == (after, 1)


# -- very many, and the end --------------------------------------------------------------------


def test_the_service_is_ready_before_its_first_scan_is_through(
    plain: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def slow(*arguments: Any) -> Iterator[Any]:
        assert go_on.wait(60)
        return scan(*arguments)

    monkeypatch.setattr(monitor, "scan", slow)
    content = place(plain.drop / "a.jpg", picture())
    with serving(plain) as running:
        assert folder_of(running).sealed == 0
        go_on.set()
        plain.wait_until_clear()
    assert plain.restored() == {b"a.jpg": content}


def test_a_large_backlog_is_queued_in_one_transaction(
    plain: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain.write_policy()
    plain.state.mkdir()
    [policy] = load_policy(plain.policy_path).folders
    with contextlib.ExitStack() as hands:
        for number in range(5_000):
            (plain.drop / f"{number}.jpg").write_bytes(b"x")
        jobs = Jobs(plain.state / "queue.sqlite")
        hands.callback(jobs.close)
        batches: list[int] = []
        admit = jobs.admit
        monkeypatch.setattr(jobs, "admit", lambda batch: batches.append(admit(batch)))
        watching = Monitor(policy, jobs, None, attach=lambda _: None, log_names=False)
        watching.start()
        hands.callback(watching.join)
        hands.callback(watching.stop)
        wait_until(lambda: jobs.pending() == 5_000, "all to be queued")
    assert batches == [5_000]


def test_more_hints_than_can_be_followed_become_one_scan(plain: Site) -> None:
    plain.write_policy()
    plain.state.mkdir()
    [policy] = load_policy(plain.policy_path).folders
    with contextlib.ExitStack() as hands:
        jobs = Jobs(plain.state / "queue.sqlite")
        hands.callback(jobs.close)
        waiting = Monitor(policy, jobs, None, attach=lambda _: None, log_names=False)
        for number in range(monitor._HINTS + 1):
            waiting.hint(f"{number}.jpg", directory=False, renamed=False)
    assert len(waiting._hints) == 1
    assert len(waiting._doubts) == 1


def test_a_stop_lets_go_of_a_picture_that_would_take_too_long(
    plain: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_STOP", 0.0)
    part = plain.drop / "huge.part"
    with part.open("wb") as file:
        file.truncate(2_000_000_000)
    with serving(plain):
        part.rename(plain.drop / "huge.jpg")
        wait_until(lambda: any(map(os.path.getsize, tmp(plain))), "some of it to be written")
    assert (plain.objects(), tmp(plain)) == ([], [])
    [path] = files_below(plain.drop).values()
    assert path.stat().st_size == 2_000_000_000
    with contextlib.closing(Jobs(plain.state / "queue.sqlite")) as jobs:
        assert [(row.state, row.attempts) for row in jobs.rows()] == [("queued", 0)]


def tmp(site: Site) -> list[Path]:
    return sorted((site.vault / "tmp").iterdir())
