"""Restored files: where they land, what they look like, and what they never touch."""

from __future__ import annotations

import errno
import os
import stat
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secimg_watch import kernel
from secimg_watch.errors import CannotCreateError, DiskFullError, StorageError
from secimg_watch.restore import Destination

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="restoring needs directory descriptors"
)

NOON_NS = 1_700_000_000_123_456_789


def restore(
    directory: Path,
    folder: bytes,
    name: bytes,
    content: bytes = b"picture",
    *,
    mode: int = 0o644,
    mtime_ns: int = NOON_NS,
) -> None:
    with Destination(directory) as destination, destination.place(folder, name) as file:
        file.write(content)
        file.commit(mode=mode, mtime_ns=mtime_ns)


def entries(directory: Path) -> list[bytes]:
    """List every name below a directory, relative to it, without following links."""
    top = os.fsencode(directory)
    return sorted(
        os.path.relpath(os.path.join(parent, name), top)
        for parent, folders, names in os.walk(top)
        for name in folders + names
    )


def test_a_file_appears_with_its_content_and_time(tmp_path: Path) -> None:
    restore(tmp_path / "out", b"2026/may", b"a.png", b"abc")
    restored = tmp_path / "out/2026/may/a.png"
    assert restored.read_bytes() == b"abc"
    assert restored.stat().st_mtime_ns == NOON_NS
    assert entries(tmp_path / "out") == [b"2026", b"2026/may", b"2026/may/a.png"]


def test_directories_are_made_for_the_owner_alone(tmp_path: Path) -> None:
    restore(tmp_path / "out", b"sub", b"a.png")
    for directory in ("out", "out/sub"):
        assert stat.S_IMODE((tmp_path / directory).stat().st_mode) == 0o700


def test_content_is_written_in_any_number_of_pieces(tmp_path: Path) -> None:
    with Destination(tmp_path) as destination, destination.place(b"", b"a") as file:
        file.write(b"")
        file.write(memoryview(b"abcdef")[::1])
        file.write(b"g" * 100_000)
        file.commit(mode=0o600, mtime_ns=NOON_NS)
    assert (tmp_path / "a").read_bytes() == b"abcdef" + b"g" * 100_000


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every file has a name")
def test_a_file_has_no_name_at_all_before_the_commit(tmp_path: Path) -> None:
    with Destination(tmp_path) as destination, destination.place(b"", b"a.png") as file:
        file.write(b"half")
        assert entries(tmp_path) == []
        file.commit(mode=0o600, mtime_ns=NOON_NS)
    assert entries(tmp_path) == [b"a.png"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every file has a name")
def test_a_file_without_a_name_replaces_nothing(tmp_path: Path) -> None:
    with Destination(tmp_path) as destination, destination.place(b"", b"a.png") as file:
        (tmp_path / "a.png").write_bytes(b"mine")
        with pytest.raises(CannotCreateError, match="exists already"):
            file.commit(mode=0o600, mtime_ns=NOON_NS)
    assert (tmp_path / "a.png").read_bytes() == b"mine"


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system where every file has a name."""
    monkeypatch.setattr(kernel, "nameless_file", lambda _directory, _mode: None)


def test_nothing_has_the_final_name_before_the_commit(tmp_path: Path, named: None) -> None:
    with Destination(tmp_path) as destination, destination.place(b"", b"a.png") as file:
        file.write(b"half")
        [temporary] = entries(tmp_path)
        assert temporary != b"a.png"
        assert temporary.endswith(b".part")
        assert stat.S_IMODE((tmp_path / os.fsdecode(temporary)).stat().st_mode) == 0o600


def test_the_temporary_file_goes_when_an_error_ends_the_restore(
    tmp_path: Path, named: None
) -> None:
    def fail_half_way() -> None:
        with Destination(tmp_path) as destination, destination.place(b"sub", b"a.png") as file:
            file.write(b"half")
            raise RuntimeError("authentication failed")

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert entries(tmp_path) == [b"sub"]


def test_discarding_twice_or_after_the_commit_changes_nothing(tmp_path: Path) -> None:
    with Destination(tmp_path) as destination:
        file = destination.place(b"", b"a.png")
        file.commit(mode=0o600, mtime_ns=NOON_NS)
        file.discard()
        file.discard()
    assert entries(tmp_path) == [b"a.png"]


def test_a_file_that_was_discarded_cannot_be_written_or_committed(tmp_path: Path) -> None:
    with Destination(tmp_path) as destination:
        file = destination.place(b"", b"a.png")
        file.discard()
        with pytest.raises(CannotCreateError):
            file.write(b"late")
        with pytest.raises(CannotCreateError):
            file.commit(mode=0o600, mtime_ns=NOON_NS)
    assert entries(tmp_path) == []


HOSTILE = [
    (b"..", b"x"),
    (b"a/../..", b"x"),
    (b"a/./b", b"x"),
    (b"/etc", b"x"),
    (b"/", b"x"),
    (b"a//b", b"x"),
    (b"a/", b"x"),
    (b"a\0b", b"x"),
    (b"a" * 256, b"x"),
    (b"", b""),
    (b"", b"."),
    (b"", b".."),
    (b"", b"../x"),
    (b"", b"/abs"),
    (b"", b"a/b"),
    (b"", b"a\0b"),
    (b"", b"a" * 256),
]


@pytest.mark.parametrize(("folder", "name"), HOSTILE)
def test_a_hostile_name_is_refused_and_leaves_nothing(
    tmp_path: Path, folder: bytes, name: bytes
) -> None:
    with pytest.raises(CannotCreateError, match="refused"):
        restore(tmp_path / "out", folder, name)
    assert entries(tmp_path) == [b"out"]


@pytest.mark.parametrize(
    "name",
    [
        b"line\nbreak",
        b"\xff\xfe not utf-8",
        b"\x1b[31m",
        b"-rf",
        b" ",
        b"a\\b",
        b"...",
        "é".encode(),
        b"a" * 255,
    ],
)
def test_an_odd_but_harmless_name_is_kept_byte_for_byte(tmp_path: Path, name: bytes) -> None:
    restore(tmp_path, name, name)
    assert entries(tmp_path) == [name, name + b"/" + name]


def test_a_message_shows_no_control_characters_of_a_name(tmp_path: Path) -> None:
    restore(tmp_path, b"", b"\x1b[31m\n\xff")
    with pytest.raises(CannotCreateError, match="exists already") as caught:
        restore(tmp_path, b"", b"\x1b[31m\n\xff")
    assert str(caught.value).isprintable()


@given(folder=st.binary(max_size=12), name=st.binary(max_size=8))
def test_no_folder_and_name_lead_out_of_the_directory(folder: bytes, name: bytes) -> None:
    with tempfile.TemporaryDirectory() as top:
        out = Path(top, "out")
        try:
            restore(out, folder, name, b"x")
        except CannotCreateError:
            expected = 0
        else:
            expected = 1
        assert os.listdir(top) == ["out"]
        files = [
            each for each in entries(out) if os.path.isfile(os.path.join(os.fsencode(out), each))
        ]
        assert len(files) == expected


def test_a_sub_folder_that_is_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (out / "link").symlink_to(elsewhere)
    for folder in (b"link", b"link/deeper"):
        with pytest.raises(CannotCreateError, match="link"):
            restore(out, folder, b"a.png")
    assert entries(elsewhere) == []
    assert entries(out) == [b"link"]


def test_a_sub_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(CannotCreateError):
        restore(tmp_path, b"file", b"a.png")
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_destination_that_is_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(CannotCreateError):
        Destination(tmp_path / "link")


def test_a_destination_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CannotCreateError):
        Destination(tmp_path / "file")


def test_a_destination_below_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CannotCreateError):
        Destination(tmp_path / "typo/out")
    assert entries(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "directory", "link", "dangling link"])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_what_has_the_name_already_is_never_replaced(tmp_path: Path, kind: str, when: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    taken = out / "a.png"
    (tmp_path / "other").write_bytes(b"other")

    def take() -> None:
        if kind == "file":
            taken.write_bytes(b"mine")
        elif kind == "directory":
            taken.mkdir()
        else:
            taken.symlink_to("../other" if kind == "link" else "../nothing")

    def attempt() -> None:
        with Destination(out) as destination:
            if when == "before":
                take()
            with destination.place(b"", b"a.png") as file:
                if when == "meanwhile":
                    take()
                file.write(b"restored")
                file.commit(mode=0o644, mtime_ns=NOON_NS)

    with pytest.raises(CannotCreateError, match="exists already"):
        attempt()
    assert entries(out) == [b"a.png"]
    assert kind != "file" or taken.read_bytes() == b"mine"
    assert (tmp_path / "other").read_bytes() == b"other"
    assert not (tmp_path / "nothing").exists()


def test_of_two_restores_at_once_one_wins_and_the_other_is_told(tmp_path: Path) -> None:
    barrier = threading.Barrier(2)
    outcomes: list[str] = []

    def run(content: bytes) -> None:
        with Destination(tmp_path) as destination, destination.place(b"", b"a.png") as file:
            file.write(content)
            barrier.wait(10)
            try:
                file.commit(mode=0o644, mtime_ns=NOON_NS)
            except CannotCreateError:
                outcomes.append("told")
            else:
                outcomes.append(content.decode())

    threads = [threading.Thread(target=run, args=(each,)) for each in (b"one", b"two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    [winner] = set(outcomes) - {"told"}
    assert "told" in outcomes
    assert (tmp_path / "a.png").read_text() == winner
    assert entries(tmp_path) == [b"a.png"]


@pytest.mark.parametrize(
    ("mode", "umask", "expected"),
    [
        (0o644, 0o022, 0o644),
        (0o666, 0o022, 0o644),
        (0o777, 0o077, 0o700),
        (0o6755, 0o000, 0o755),
        (0o1777, 0o000, 0o777),
        (0o000, 0o022, 0o600),
        (0o444, 0o022, 0o644),
        (0o100644, 0o022, 0o644),
    ],
)
def test_modes_keep_permission_bits_less_the_umask_and_stay_the_owners(
    tmp_path: Path, mode: int, umask: int, expected: int
) -> None:
    previous = os.umask(umask)
    try:
        restore(tmp_path, b"", b"a.png", mode=mode)
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "a.png").stat().st_mode) == expected


@pytest.mark.parametrize("moment", [10**30, -(10**30), 2**63, -(2**63), -1, 0])
def test_any_time_is_accepted(tmp_path: Path, moment: int) -> None:
    restore(tmp_path, b"", b"a.png", mtime_ns=moment)
    if abs(moment) <= 1:
        assert (tmp_path / "a.png").stat().st_mtime_ns == moment


def without_links(_source: str, target: str, *, source_dir: int, target_dir: int) -> None:
    """Answer as a file system that knows neither hard links nor renaming without replacing."""
    assert source_dir == target_dir
    raise OSError(errno.EPERM, os.strerror(errno.EPERM), target)


def test_a_file_system_without_links_gets_the_file_too(
    tmp_path: Path, named: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "rename_noreplace", without_links)
    restore(tmp_path, b"", b"a.png", b"abc")
    assert (tmp_path / "a.png").read_bytes() == b"abc"
    assert entries(tmp_path) == [b"a.png"]


def test_a_file_system_without_links_keeps_what_has_the_name(
    tmp_path: Path, named: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "rename_noreplace", without_links)
    with Destination(tmp_path) as destination, destination.place(b"", b"a.png") as file:
        (tmp_path / "a.png").write_bytes(b"mine")
        with pytest.raises(CannotCreateError, match="exists already"):
            file.commit(mode=0o644, mtime_ns=NOON_NS)
    assert (tmp_path / "a.png").read_bytes() == b"mine"
    assert entries(tmp_path) == [b"a.png"]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.ENOSPC, DiskFullError),
        (errno.EDQUOT, DiskFullError),
        (errno.EIO, StorageError),
        (errno.EROFS, CannotCreateError),
    ],
)
def test_a_failing_disk_is_named_and_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, expected: type[Exception]
) -> None:
    def fail(_fd: int) -> None:
        raise OSError(code, os.strerror(code))

    with Destination(tmp_path) as destination, destination.place(b"", b"a.png") as file:
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(expected):
            file.commit(mode=0o644, mtime_ns=NOON_NS)
    assert entries(tmp_path) == []


def test_a_directory_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    if sys.platform != "win32" and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    with Destination(tmp_path) as destination:
        tmp_path.chmod(0o500)
        with pytest.raises(CannotCreateError):
            destination.place(b"", b"a.png")
        tmp_path.chmod(0o700)


@pytest.mark.skipif(sys.platform != "linux", reason="open descriptors are listed on Linux")
def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    restore(tmp_path, b"sub", b"a.png")
    for folder, name in [(b"sub", b"a.png"), (b"sub/a.png", b"x"), (b"..", b"x")]:
        with pytest.raises(CannotCreateError):
            restore(tmp_path, folder, name)
    assert len(os.listdir("/proc/self/fd")) == before
