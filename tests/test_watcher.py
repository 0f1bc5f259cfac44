"""Hints from the kernel's own watcher: what is heard, what is not, and what is said about that."""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from path_builders import (
    PATIENCE,
    only_on_linux,
    open_descriptors,
    ordinary_folder,
    until,
    without_privileges,
)
from watchdog.observers.inotify_c import InotifyConstants

from secimg_watch import watcher as watching
from secimg_watch.records import FolderKey
from secimg_watch.selection import STAGING_NAME

if TYPE_CHECKING:
    from collections.abc import Iterator

only_on_linux()
assert sys.platform == "linux"

InotifyWatcher = watching.InotifyWatcher

KEY = FolderKey("/srv/scans")

# Makes a tree under a limit of its own, in a user namespace of its own.
FEW_WATCHES = """
import sys
from pathlib import Path
with open("/proc/sys/user/max_inotify_watches", "w") as limit:
    limit.write("4")
from secimg_watch.watcher import InotifyWatcher
class Deaf:
    def hint(self, relpath, *, directory, renamed): pass
    def doubt(self, why): pass
root = Path(sys.argv[1])
watcher = InotifyWatcher()
watcher.watch("key", str(root), Deaf(), recursive=True)
refused, why = watcher.unwatched("key")
print(refused, why)
for directory in sorted(root.iterdir())[:6]:
    directory.rmdir()
watcher.unwatch("key")
watcher.watch("key", str(root), Deaf(), recursive=True)
print(*watcher.unwatched("key"))
watcher.close()
"""


class Ear:
    """Keeps every hint and every doubt in the order in which they came."""

    def __init__(self) -> None:
        self._incoming: queue.Queue[tuple[str, bool, bool]] = queue.Queue()
        self.heard: list[tuple[str, bool, bool]] = []
        self.doubts: list[str] = []

    def hint(self, relpath: str, *, directory: bool, renamed: bool) -> None:
        self._incoming.put((relpath, directory, renamed))

    def doubt(self, why: str) -> None:
        self.doubts.append(why)

    def wait_for(self, relpath: str) -> tuple[bool, bool]:
        """Listen until there is a hint for this path; gives ``directory`` and ``renamed``."""
        while True:
            hint = self._incoming.get(timeout=PATIENCE)
            self.heard.append(hint)
            if hint[0] == relpath:
                return hint[1:]


class Stumbling(Ear):
    """Fails on some names."""

    def hint(self, relpath: str, *, directory: bool, renamed: bool) -> None:
        if relpath.startswith("bad"):
            raise RuntimeError("a defect")
        super().hint(relpath, directory=directory, renamed=renamed)


@pytest.fixture
def watcher() -> Iterator[InotifyWatcher]:
    made = InotifyWatcher()
    yield made
    made.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "drop"
    made.mkdir()
    return made


@pytest.fixture
def ear(watcher: InotifyWatcher, folder: Path) -> Ear:
    listening = Ear()
    watcher.watch(KEY, str(folder), listening, recursive=True)
    return listening


# -- what is heard -----------------------------------------------------------------------------


def test_a_file_is_heard_when_it_appears_and_when_its_writer_closes_it(
    ear: Ear, folder: Path
) -> None:
    with (folder / "a.jpg").open("wb") as file:
        assert ear.wait_for("a.jpg") == (False, False)
        file.write(b"picture")
    assert ear.wait_for("a.jpg") == (False, False)


def test_a_file_that_was_there_is_heard_when_its_writer_closes_it(
    watcher: InotifyWatcher, folder: Path
) -> None:
    with (folder / "a.jpg").open("wb"):
        ear = Ear()
        watcher.watch(KEY, str(folder), ear, recursive=True)
    assert ear.wait_for("a.jpg") == (False, False)


def test_a_rename_into_place_is_told_from_a_write(ear: Ear, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"picture")
    (tmp_path / "outside").rename(folder / "a.jpg")
    assert ear.wait_for("a.jpg") == (False, True)
    (folder / "a.jpg").rename(folder / "b.jpg")
    assert ear.wait_for("b.jpg") == (False, True)


def test_a_second_name_is_heard(ear: Ear, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"picture")
    os.link(tmp_path / "outside", folder / "a.jpg")
    assert ear.wait_for("a.jpg") == (False, False)


@pytest.mark.parametrize("name", [b"no\xffutf8.jpg", b"new\nline", "\u00fc".encode(), b"x" * 255])
def test_any_name_is_heard_exactly(ear: Ear, folder: Path, name: bytes) -> None:
    with open(os.path.join(os.fsencode(folder), name), "wb"):
        pass
    ear.wait_for(os.fsdecode(name))


def test_files_in_sub_folders_are_heard_old_and_new(watcher: InotifyWatcher, folder: Path) -> None:
    (folder / "old/er").mkdir(parents=True)
    ear = Ear()
    watcher.watch(KEY, str(folder), ear, recursive=True)
    (folder / "old/er/a.jpg").write_bytes(b"picture")
    ear.wait_for("old/er/a.jpg")
    (folder / "new").mkdir()
    assert ear.wait_for("new") == (True, False)
    (folder / "new/b.jpg").write_bytes(b"picture")
    ear.wait_for("new/b.jpg")


def test_a_tree_that_is_moved_in_is_hinted_at_and_watched_from_then_on(
    ear: Ear, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "outside/deep").mkdir(parents=True)
    (tmp_path / "outside/deep/a.jpg").write_bytes(b"picture")
    (tmp_path / "outside").rename(folder / "in")
    assert ear.wait_for("in") == (True, True)
    (folder / "in/deep/b.jpg").write_bytes(b"picture")
    ear.wait_for("in/deep/b.jpg")


def test_files_in_a_renamed_sub_folder_are_heard_under_the_new_name(
    watcher: InotifyWatcher, folder: Path
) -> None:
    (folder / "before/deep").mkdir(parents=True)
    ear = Ear()
    watcher.watch(KEY, str(folder), ear, recursive=True)
    (folder / "before").rename(folder / "after")
    assert ear.wait_for("after") == (True, True)
    (folder / "after/deep/a.jpg").write_bytes(b"picture")
    ear.wait_for("after/deep/a.jpg")


def test_where_sub_folders_are_not_taken_they_are_not_watched(
    watcher: InotifyWatcher, folder: Path
) -> None:
    (folder / "sub").mkdir()
    ear = Ear()
    watcher.watch(KEY, str(folder), ear, recursive=False)
    (folder / "sub/a.jpg").write_bytes(b"picture")
    (folder / "b.jpg").write_bytes(b"picture")
    ear.wait_for("b.jpg")
    assert "sub/a.jpg" not in [relpath for relpath, _, _ in ear.heard]


def test_each_folder_is_heard_by_its_own_listener(watcher: InotifyWatcher, tmp_path: Path) -> None:
    ears = {}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        ears[name] = Ear()
        watcher.watch(FolderKey(name), str(tmp_path / name), ears[name], recursive=True)
    for name, ear in ears.items():
        (tmp_path / name / f"{name}.jpg").write_bytes(b"picture")
        ear.wait_for(f"{name}.jpg")
    watcher.unwatch(FolderKey("one"))
    (tmp_path / "two/again.jpg").write_bytes(b"picture")
    ears["two"].wait_for("again.jpg")
    assert {relpath for relpath, _, _ in ears["one"].heard} == {"one.jpg"}


# -- what is not heard -------------------------------------------------------------------------


def test_nothing_in_a_staging_directory_is_heard(watcher: InotifyWatcher, folder: Path) -> None:
    (folder / STAGING_NAME / "0123").mkdir(parents=True)
    ear = Ear()
    watcher.watch(KEY, str(folder), ear, recursive=True)
    (folder / STAGING_NAME / "a.jpg").write_bytes(b"picture")
    (folder / STAGING_NAME / "0123/b.jpg").write_bytes(b"picture")
    (folder / STAGING_NAME / "4567").mkdir()
    (folder / STAGING_NAME / "4567/c.jpg").write_bytes(b"picture")
    (folder / "last.jpg").write_bytes(b"picture")
    ear.wait_for("last.jpg")
    assert [relpath for relpath, _, _ in ear.heard if relpath.startswith(STAGING_NAME)] == []
    assert watcher.unwatched(KEY) == (0, ""), "that it is not watched is as it should be"


def test_nothing_in_a_staging_directory_that_is_made_later_is_heard(ear: Ear, folder: Path) -> None:
    (folder / STAGING_NAME).mkdir()
    assert ear.wait_for(STAGING_NAME) == (True, False)
    (folder / STAGING_NAME / "a.jpg").write_bytes(b"picture")
    (folder / "last.jpg").write_bytes(b"picture")
    ear.wait_for("last.jpg")
    assert f"{STAGING_NAME}/a.jpg" not in [relpath for relpath, _, _ in ear.heard]


def test_a_claim_holds_up_no_later_arrival(ear: Ear, watcher: InotifyWatcher, folder: Path) -> None:
    (folder / STAGING_NAME).mkdir()
    (folder / "a.jpg").write_bytes(b"picture")
    ear.wait_for("a.jpg")
    (folder / "a.jpg").rename(folder / STAGING_NAME / "a.jpg")
    (folder / "b.jpg").write_bytes(b"picture")
    ear.wait_for("b.jpg")
    watches = list(watcher._watches[KEY].reader._watch_for_wd.values())
    assert watches
    for watch in watches:
        assert not watch.mask & InotifyConstants.IN_MOVED_FROM
        assert watch.mask & InotifyConstants.IN_MOVED_TO
        assert watch.mask & InotifyConstants.IN_CLOSE_WRITE


def test_nothing_is_heard_after_the_folder_is_unwatched(
    ear: Ear, watcher: InotifyWatcher, folder: Path
) -> None:
    watcher.unwatch(KEY)
    (folder / "a.jpg").write_bytes(b"picture")
    assert ear._incoming.empty()
    assert not watcher.is_alive(KEY)
    assert watcher.unwatched(KEY) == (0, "")
    watcher.unwatch(KEY)


# -- what is said about it ---------------------------------------------------------------------


def test_events_that_the_kernel_dropped_are_a_doubt_and_none_after_it_is_missed(
    ear: Ear, watcher: InotifyWatcher, folder: Path
) -> None:
    length = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if length > 100_000:
        pytest.skip(f"the kernel's queue holds {length} events, which takes too long to fill")
    (folder / "0").write_bytes(b"picture")
    # Meanwhile the reader waits, so that the queue fills up.
    with watcher._watches[KEY].reader._lock:
        for number in range(length + 4096):
            (folder / f"{number % 2}").rename(folder / f"{(number + 1) % 2}")
        (folder / "unheard").mkdir()
    until(lambda: bool(ear.doubts), "the overflow is told")
    # From here on a scan would run: what comes later has to be heard.
    (folder / "after.jpg").write_bytes(b"picture")
    (folder / "unheard/after.jpg").write_bytes(b"picture")
    assert "overflow" in ear.doubts[0]
    assert watcher.is_alive(KEY)
    ear.wait_for("after.jpg")
    ear.wait_for("unheard/after.jpg")


def may_make_namespaces() -> bool:
    command = ["unshare", "--user", "--map-root-user", "cat", "/proc/sys/user/max_inotify_watches"]
    try:
        return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not may_make_namespaces(), reason="the limit is set in a user namespace")
def test_sub_folders_that_the_kernel_refuses_to_watch_are_counted() -> None:
    with ordinary_folder() as folder:
        folder.chmod(0o777)
        for number in range(10):
            (folder / f"{number}").mkdir()
        command = ["unshare", "--user", "--map-root-user", sys.executable, "-c", FEW_WATCHES]
        done = subprocess.run(
            [*command, str(folder)], capture_output=True, text=True, check=False, timeout=PATIENCE
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["7 No space left on device", "1 No space left on device"]


def test_a_sub_folder_that_may_not_be_read_is_counted_as_unwatched(
    watcher: InotifyWatcher,
) -> None:
    with ordinary_folder() as folder, without_privileges():
        (folder / "shut").mkdir(mode=0)
        (folder / "open").mkdir()
        watcher.watch(KEY, str(folder), Ear(), recursive=True)
        counts = [watcher.unwatched(KEY)]
        (folder / "shut").rmdir()
        counts.append(watcher.unwatched(KEY))
        watcher.close()
    assert counts == [(1, "Permission denied"), (0, "")]


def test_a_folder_that_is_not_there_cannot_be_watched_and_leaves_nothing_running(
    watcher: InotifyWatcher, tmp_path: Path
) -> None:
    threads, before = threading.active_count(), open_descriptors()
    with pytest.raises(FileNotFoundError):
        watcher.watch(KEY, str(tmp_path / "nowhere"), Ear(), recursive=True)
    assert threading.active_count() == threads
    assert open_descriptors() <= before
    assert not watcher.is_alive(KEY)


def test_a_folder_that_may_not_be_read_cannot_be_watched(watcher: InotifyWatcher) -> None:
    with ordinary_folder() as folder, without_privileges():
        folder.chmod(0o300)
        try:
            with pytest.raises(PermissionError):
                watcher.watch(KEY, str(folder), Ear(), recursive=True)
        finally:
            folder.chmod(0o700)
            watcher.close()


def test_a_watched_folder_is_alive(ear: Ear, watcher: InotifyWatcher) -> None:
    assert watcher.is_alive(KEY)
    assert not watcher.is_alive(FolderKey("/nowhere"))


@pytest.mark.parametrize("thread", ["reader", "observer"])
def test_a_thread_that_died_is_noticed(ear: Ear, watcher: InotifyWatcher, thread: str) -> None:
    watch = watcher._watches[KEY]
    dying = {"reader": watch.reader, "observer": watch.observer}[thread]
    dying.stop()
    dying.join(PATIENCE)
    assert not watcher.is_alive(KEY)


def test_a_listener_that_fails_does_not_end_the_hearing(
    watcher: InotifyWatcher, folder: Path
) -> None:
    ear = Stumbling()
    watcher.watch(KEY, str(folder), ear, recursive=True)
    (folder / "bad.jpg").write_bytes(b"picture")
    (folder / "good.jpg").write_bytes(b"picture")
    ear.wait_for("good.jpg")
    assert ear.doubts
    assert watcher.is_alive(KEY)


def test_closing_ends_every_thread_and_gives_back_every_descriptor(tmp_path: Path) -> None:
    threads, before = set(threading.enumerate()), open_descriptors()
    watcher = InotifyWatcher()
    for number in range(4):
        folder = tmp_path / f"{number}"
        (folder / "sub").mkdir(parents=True)
        watcher.watch(FolderKey(f"{number}"), str(folder), Ear(), recursive=True)
    assert set(threading.enumerate()) > threads
    watcher.close()
    until(lambda: set(threading.enumerate()) <= threads, "the watcher's threads end")
    until(lambda: open_descriptors() <= before, "the watcher's descriptors are closed")
    watcher.close()


def test_a_folder_can_be_watched_again_after_it_was_replaced(
    ear: Ear, watcher: InotifyWatcher, folder: Path
) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    watcher.unwatch(KEY)
    again = Ear()
    watcher.watch(KEY, str(folder), again, recursive=True)
    (folder / "a.jpg").write_bytes(b"picture")
    again.wait_for("a.jpg")
