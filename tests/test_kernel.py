"""The calls of the operating system that everything else relies on, made for real."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from path_builders import (
    PATIENCE,
    can_mount,
    mounted_tmpfs,
    only_on_linux,
    open_descriptors,
    open_for_writing,
)

from secimg_watch import kernel
from secimg_watch.kernel import Lease

if TYPE_CHECKING:
    from collections.abc import Iterator

only_on_linux()
assert sys.platform == "linux"

LOCK = """
import sys
from pathlib import Path
from secimg_watch import kernel
print(kernel.lock_exclusively(Path(sys.argv[1])) is not None, flush=True)
sys.stdin.read()
"""

PROTECT = """
import ctypes, resource
from secimg_watch import kernel
kernel.protect_memory()
print(*resource.getrlimit(resource.RLIMIT_CORE), ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "a.jpg"
    made.write_bytes(b"picture")
    return made


@pytest.fixture
def fd(path: Path) -> Iterator[int]:
    opened = os.open(path, kernel.PICTURE)
    yield opened
    os.close(opened)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    opened = os.open(tmp_path, kernel.DIRECTORY)
    yield opened
    os.close(opened)


# -- leases ------------------------------------------------------------------------------------


def test_a_lease_is_granted_on_a_file_that_nobody_writes(fd: int) -> None:
    assert kernel.take_read_lease(fd) is Lease.GRANTED
    assert kernel.lease_intact(fd)


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND])
def test_no_lease_is_granted_while_somebody_has_the_file_open_for_writing(
    path: Path, fd: int, flags: int
) -> None:
    writer = os.open(path, flags)
    assert kernel.take_read_lease(fd) is Lease.WRITER
    assert not kernel.lease_intact(fd)
    os.close(writer)
    assert kernel.take_read_lease(fd) is Lease.GRANTED


def test_other_readers_do_not_matter(path: Path, fd: int) -> None:
    with path.open("rb"):
        assert kernel.take_read_lease(fd) is Lease.GRANTED
        assert path.read_bytes() == b"picture"
        assert kernel.lease_intact(fd)


def test_whoever_opens_for_writing_is_held_off_and_noticed(path: Path, fd: int) -> None:
    kernel.take_read_lease(fd)
    assert open_for_writing(path) == "refused"
    assert not kernel.lease_intact(fd)


def test_truncating_by_name_breaks_the_lease_too(path: Path) -> None:
    fd = os.open(path, kernel.PICTURE)
    kernel.take_read_lease(fd)
    script = "import os, sys; os.truncate(sys.argv[1], 0)"
    command = [sys.executable, "-I", "-S", "-c", script, str(path)]
    with subprocess.Popen(command) as process:
        while kernel.lease_intact(fd):
            assert process.poll() is None
        assert path.read_bytes() == b"picture", "it waits until the lease is given back"
        os.close(fd)
        process.wait(PATIENCE)
    assert path.read_bytes() == b""


def test_a_rename_leaves_the_lease_intact(path: Path, fd: int) -> None:
    kernel.take_read_lease(fd)
    path.rename(path.with_name("b.jpg"))
    assert kernel.lease_intact(fd)


def test_the_lease_goes_with_the_descriptor(path: Path) -> None:
    fd = os.open(path, kernel.PICTURE)
    kernel.take_read_lease(fd)
    os.close(fd)
    assert open_for_writing(path) == ""


def test_what_is_no_regular_file_has_no_leases() -> None:
    reading, writing = os.pipe()
    null = os.open("/dev/null", os.O_RDONLY)
    answers = [kernel.take_read_lease(fd) for fd in (reading, null)]
    for fd in (reading, writing, null):
        os.close(fd)
    assert answers == [Lease.UNAVAILABLE] * 2


# -- reading -----------------------------------------------------------------------------------


def test_reading_at_a_position_does_not_move_the_descriptor(fd: int) -> None:
    buffer = bytearray(4)
    assert kernel.read_at(fd, memoryview(buffer), 3) == 4
    assert bytes(buffer) == b"ture"
    assert kernel.read_at(fd, memoryview(buffer), 5) == 2
    assert kernel.read_at(fd, memoryview(buffer), 7) == 0
    assert os.read(fd, 99) == b"picture"


def test_dropping_the_cache_changes_no_byte(path: Path, fd: int) -> None:
    kernel.drop_cache(fd)
    assert path.read_bytes() == b"picture"


def test_opening_a_picture_follows_no_link_and_waits_for_no_writer(
    path: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(OSError, match="symbolic links") as caught:
        os.open(tmp_path / "link", kernel.PICTURE)
    assert caught.value.errno == errno.ELOOP
    os.mkfifo(tmp_path / "fifo")
    os.close(os.open(tmp_path / "fifo", kernel.PICTURE))


# -- copying -----------------------------------------------------------------------------------

CANNOT_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


def copied(path: Path, start: int, before: bytes = b"head") -> bytes:
    """What stands in a new file after the rest of another one was copied behind its head."""
    source = os.open(path, os.O_RDONLY)
    target = os.open(path.with_name("copy"), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(target, before)
        kernel.copy_from(source, start, target)
        assert os.lseek(source, 0, os.SEEK_CUR) == 0, "the source's own offset stays"
        return os.pread(target, 1 << 30, 0)
    finally:
        os.close(source)
        os.close(target)


@pytest.mark.parametrize("start", [0, 1, 7, 65_536, 300_000 - 1, 300_000, 400_000])
def test_the_rest_of_a_file_is_appended_to_another_one(path: Path, start: int) -> None:
    data = os.urandom(300_000)
    path.write_bytes(data)
    assert copied(path, start) == b"head" + data[start:]


@pytest.mark.parametrize("code", CANNOT_COPY)
@pytest.mark.parametrize("calls", [0, 2])
def test_where_the_kernel_cannot_copy_it_is_read_and_written(
    path: Path, monkeypatch: pytest.MonkeyPatch, code: int, calls: int
) -> None:
    """``calls``: how many calls the kernel does, little at a time, before it refuses."""
    data = os.urandom(200_000)
    path.write_bytes(data)
    really, left = os.copy_file_range, calls

    def copy(source: int, target: int, _count: int, *, offset_src: int) -> int:
        nonlocal left
        if not left:
            raise OSError(code, os.strerror(code))
        left -= 1
        return really(source, target, 1_000, offset_src=offset_src)

    monkeypatch.setattr(os, "copy_file_range", copy)
    assert copied(path, 10) == b"head" + data[10:]
    assert left == 0


def test_a_kernel_that_copies_nothing_and_says_nothing_is_not_believed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_bytes(b"picture" * 20_000)
    monkeypatch.setattr(os, "copy_file_range", lambda *_args, **_more: 0)
    assert copied(path, 7) == b"head" + b"picture" * 19_999


def test_short_writes_are_completed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(70_000)
    path.write_bytes(data)
    really = os.write
    monkeypatch.setattr(os, "copy_file_range", lambda *_args, **_more: 0)
    monkeypatch.setattr(os, "write", lambda fd, part: really(fd, part[:999]))
    assert copied(path, 0) == b"head" + data


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EFBIG])
def test_a_copy_that_fails_for_another_reason_fails(
    path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(*_args: object, **_more: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "copy_file_range", fail)
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        copied(path, 0)
    assert caught.value.errno == code


def test_from_one_file_system_to_another_the_bytes_are_the_same(path: Path) -> None:
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == path.stat().st_dev:
        pytest.skip("there is no second file system that can be written")
    path.write_bytes(b"picture" * 20_000)
    with tempfile.TemporaryFile(dir=memory) as target, path.open("rb") as source:
        kernel.copy_from(source.fileno(), 7, target.fileno())
        assert os.pread(target.fileno(), 1 << 20, 0) == b"picture" * 19_999


# -- names -------------------------------------------------------------------------------------


@pytest.fixture(params=["renameat2", "link and unlink"])
def rename(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, directory: int) -> int:
    """Give the directory; once with the kernel's own call, once as where it is missing."""
    if request.param != "renameat2":
        monkeypatch.setattr(kernel, "_renameat2", lambda *_: False)
    return directory


@pytest.mark.parametrize("name", ["b.jpg", "b\udcff\n.jpg"])
def test_a_file_is_renamed(rename: int, path: Path, name: str) -> None:
    inode = path.stat().st_ino
    kernel.rename_noreplace("a.jpg", name, source_dir=rename, target_dir=rename)
    assert not path.exists()
    assert path.with_name(name).stat().st_ino == inode
    assert path.with_name(name).stat().st_nlink == 1


@pytest.mark.parametrize("kind", ["file", "directory", "link", "dangling link"])
def test_a_name_that_is_taken_is_never_overwritten(rename: int, path: Path, kind: str) -> None:
    target = path.with_name("taken")
    if kind == "file":
        target.write_bytes(b"taken")
    elif kind == "directory":
        target.mkdir()
    else:
        target.symlink_to("a.jpg" if kind == "link" else "nowhere")
    before = os.lstat(target)
    with pytest.raises(FileExistsError):
        kernel.rename_noreplace("a.jpg", "taken", source_dir=rename, target_dir=rename)
    assert path.read_bytes() == b"picture"
    assert os.lstat(target).st_ino == before.st_ino


def test_what_is_not_there_cannot_be_renamed(rename: int) -> None:
    with pytest.raises(FileNotFoundError):
        kernel.rename_noreplace("nowhere", "b", source_dir=rename, target_dir=rename)


def test_a_rename_from_one_directory_to_another(rename: int, path: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    sub = os.open(tmp_path / "sub", kernel.DIRECTORY)
    kernel.rename_noreplace("a.jpg", "b.jpg", source_dir=rename, target_dir=sub)
    os.close(sub)
    assert (tmp_path / "sub/b.jpg").read_bytes() == b"picture"


def test_a_rename_to_another_file_system_fails(rename: int, path: Path) -> None:
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == path.stat().st_dev:
        pytest.skip("there is no second file system that can be written")
    with tempfile.TemporaryDirectory(dir=memory) as elsewhere:
        target = os.open(elsewhere, kernel.DIRECTORY)
        with pytest.raises(OSError, match="cross-device"):
            kernel.rename_noreplace("a.jpg", "b.jpg", source_dir=rename, target_dir=target)
        os.close(target)
    assert path.read_bytes() == b"picture"


# -- directories -------------------------------------------------------------------------------


def test_the_directory_of_a_path_is_opened_and_nothing_else_stays_open(
    directory: int, tmp_path: Path
) -> None:
    (tmp_path / "one/two").mkdir(parents=True)
    before = open_descriptors()
    parent, name = kernel.open_parent(directory, "one/two/a.jpg")
    assert name == "a.jpg"
    assert os.fstat(parent).st_ino == (tmp_path / "one/two").stat().st_ino
    assert len(open_descriptors() - before) == 1
    os.close(parent)
    parent, name = kernel.open_parent(directory, "a.jpg")
    assert (os.fstat(parent).st_ino, name) == (tmp_path.stat().st_ino, "a.jpg")
    os.close(parent)
    assert open_descriptors() <= before


@pytest.mark.parametrize("relpath", ["link/a", "one/link/a", "nowhere/a", "file/a", "one/file/a"])
def test_no_link_is_followed_on_the_way(directory: int, tmp_path: Path, relpath: str) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "real").mkdir()
    for where in (tmp_path, tmp_path / "one"):
        (where / "link").symlink_to(tmp_path / "real")
        (where / "file").write_bytes(b"")
    before = open_descriptors()
    with pytest.raises((NotADirectoryError, FileNotFoundError)):
        kernel.open_parent(directory, relpath)
    assert open_descriptors() <= before


def test_directories_are_synced_also_where_that_cannot_be_done(
    directory: int, tmp_path: Path
) -> None:
    kernel.sync_directory(directory)
    kernel.sync_path(tmp_path)
    reading, writing = os.pipe()
    kernel.sync_directory(reading)
    os.close(reading)
    os.close(writing)
    with pytest.raises(FileNotFoundError):
        kernel.sync_path(tmp_path / "nowhere")


def test_a_path_is_synced_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    kernel.sync_path(tmp_path / "link")


def test_a_directory_is_closed_to_others(directory: int, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    kernel.make_private(directory)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


# -- locks -------------------------------------------------------------------------------------


def test_a_lock_is_held_once_and_goes_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    command = [sys.executable, "-c", LOCK, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"True\n"
        before = open_descriptors()
        assert kernel.lock_exclusively(path) is None
        assert open_descriptors() <= before
        process.kill()
        process.wait(PATIENCE)
    held = kernel.lock_exclusively(path)
    assert held is not None
    assert kernel.lock_exclusively(path) is None
    os.close(held)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_lock_is_not_inherited_by_programs_that_are_started(tmp_path: Path) -> None:
    held = kernel.lock_exclusively(tmp_path / "lock")
    assert held is not None
    assert not os.get_inheritable(held)
    os.close(held)


# -- what the system says ----------------------------------------------------------------------


def test_free_space_is_what_the_system_says(tmp_path: Path) -> None:
    free, total = kernel.free_space(tmp_path)
    assert 0 <= free <= total
    usage = os.statvfs(tmp_path)
    assert total == usage.f_blocks * usage.f_frsize


@pytest.mark.skipif(not can_mount(), reason="mounting takes root's privileges")
def test_a_small_file_systems_space_and_type_are_its_own(tmp_path: Path) -> None:
    where = tmp_path / "with blanks - and a dash"
    where.mkdir()
    with mounted_tmpfs(where, "1m"):
        assert kernel.free_space(where) == (1 << 20, 1 << 20)
        assert kernel.file_system_type(where) == "tmpfs"


def test_file_systems_are_told_apart() -> None:
    assert kernel.file_system_type(Path("/proc")) == "proc"
    with pytest.raises(FileNotFoundError):
        kernel.file_system_type(Path("/nowhere"))


@pytest.mark.parametrize("remote", ["nfs", "nfs4", "cifs", "fuse", "fuse.sshfs", "fuseblk", "9p"])
def test_what_others_can_write_to_counts_as_remote(remote: str) -> None:
    assert kernel.is_remote(remote)


@pytest.mark.parametrize("local", ["ext4", "xfs", "btrfs", "tmpfs", "zfs", "vfat", ""])
def test_what_this_kernel_alone_writes_to_counts_as_local(local: str) -> None:
    assert not kernel.is_remote(local)


def test_the_limit_of_watches_is_the_kernels() -> None:
    limit = Path("/proc/sys/fs/inotify/max_user_watches")
    if not limit.exists():
        pytest.skip("this kernel has no inotify")
    assert kernel.watch_limit() == int(limit.read_text())


def test_a_protected_process_leaves_no_core_dump_and_cannot_be_looked_into() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROTECT], capture_output=True, check=True, timeout=PATIENCE
    )
    assert done.stdout.split() == [b"0", b"0", b"0"]
