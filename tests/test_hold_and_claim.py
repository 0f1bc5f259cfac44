"""Taking a file in hand and moving it out of reach, while others do their worst to it."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from path_builders import (
    IS_ROOT,
    NOBODY,
    PICTURE,
    Desk,
    can_mount,
    desk_in,
    mounted_tmpfs,
    new_id,
    only_on_linux,
    open_descriptors,
    open_for_writing,
    ordinary_folder,
    tree,
    without_privileges,
)

from secimg_watch.claim import claim, remove_marker, set_aside, take_back
from secimg_watch.errors import ChangedInHandError, FolderGoneError, NotAllowedError
from secimg_watch.hold import hold, refuse_if_changed
from secimg_watch.records import Identity, Job, Proof
from secimg_watch.roots import QUARANTINE_NAME, Root
from secimg_watch.selection import STAGING_NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

only_on_linux()
assert sys.platform == "linux"

STRANGER = b"somebody else's file"


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with desk_in(tmp_path) as made:
        yield made


@pytest.fixture
def ordinary_desk() -> Iterator[Desk]:
    """A desk of a user without privileges, whose rights stay given up during the test."""
    with ordinary_folder() as directory, without_privileges(), desk_in(directory) as made:
        yield made
        made.folder.chmod(0o700)


def replace(path: Path, content: bytes = STRANGER) -> Path:
    """Put another file under a name; gives where the old one lies now."""
    aside = path.with_name("aside")
    path.rename(aside)
    path.write_bytes(content)
    return aside


# -- in hand -----------------------------------------------------------------------------------


def test_a_file_in_hand_is_known_by_what_was_read_through_its_descriptor(desk: Desk) -> None:
    path = desk.drop("sub/a.jpg")
    path.chmod(0o640)
    held = desk.held(desk.job("sub/a.jpg"))
    assert held.identity == Identity.of(path.stat())
    assert held.mode == path.stat().st_mode
    assert (held.name, held.leased, held.claimed) == ("a.jpg", True, False)
    assert os.fstat(held.parent).st_ino == path.parent.stat().st_ino
    refuse_if_changed(held, held.identity)


def test_everything_is_given_back_afterwards(desk: Desk) -> None:
    path = desk.drop("sub/a.jpg")
    job = desk.job("sub/a.jpg")
    before = open_descriptors()
    desk.claimed(job)
    assert open_descriptors() - before
    desk.let_go()
    assert open_descriptors() <= before
    desk.staged_path(job).rename(path)
    assert open_for_writing(path) == ""


@pytest.mark.parametrize("how", ["absent", "sub-folder absent"])
def test_a_file_that_is_gone_is_told_apart(desk: Desk, how: str) -> None:
    path = desk.drop("sub/a.jpg")
    job = desk.job("sub/a.jpg")
    path.unlink()
    if how == "sub-folder absent":
        path.parent.rmdir()
    before = open_descriptors()
    with ExitStack() as hands, pytest.raises(FileNotFoundError):
        hold(job, desk.root, hands)
    assert open_descriptors() <= before


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def rewrite(path: Path) -> None:
    times = path.stat()
    path.write_bytes(PICTURE[::-1])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def swap(path: Path) -> None:
    replace(path, PICTURE)


def link(path: Path) -> None:
    os.link(path, path.with_name("second.jpg"))


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def truncate(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("meddle", [append, rewrite, swap, link, fifo, truncate])
def test_a_file_that_is_not_as_it_settled_is_not_taken(
    desk: Desk, meddle: Callable[[Path], None]
) -> None:
    path = desk.drop()
    job = desk.job()
    meddle(path)
    left = tree(desk.folder)
    with pytest.raises(ChangedInHandError):
        desk.held(job)
    assert tree(desk.folder) == left


def test_a_file_that_is_open_for_writing_is_not_taken(desk: Desk) -> None:
    path = desk.drop()
    job = desk.job()
    with path.open("r+b"), pytest.raises(ChangedInHandError, match="opened for writing"):
        desk.held(job)


def test_a_name_that_became_a_link_is_not_followed(desk: Desk, tmp_path: Path) -> None:
    path = desk.drop()
    job = desk.job()
    path.rename(tmp_path / "elsewhere.jpg")
    path.symlink_to(tmp_path / "elsewhere.jpg")
    with pytest.raises(ChangedInHandError, match="replaced by something else"):
        desk.held(job)


def test_a_sub_folder_that_became_a_link_is_not_followed(desk: Desk, tmp_path: Path) -> None:
    path = desk.drop("sub/a.jpg")
    job = desk.job("sub/a.jpg")
    path.parent.rename(tmp_path / "elsewhere")
    path.parent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ChangedInHandError, match="folder above"):
        desk.held(job)
    assert (tmp_path / "elsewhere/a.jpg").read_bytes() == PICTURE


def test_the_folder_is_followed_by_its_descriptor_when_it_is_renamed(
    desk: Desk, tmp_path: Path
) -> None:
    desk.drop()
    job = desk.job()
    desk.folder.rename(tmp_path / "renamed")
    desk.folder.mkdir()
    desk.drop("a.jpg", STRANGER)
    claimed = desk.claimed(job)
    assert os.pread(claimed.inspected.held.fd, 99, 0) == PICTURE
    assert (tmp_path / "drop/a.jpg").read_bytes() == STRANGER


def test_a_claimed_file_is_ours_whatever_happened_to_it(desk: Desk) -> None:
    desk.drop()
    job = desk.job()
    desk.claimed(job)
    desk.let_go()
    append(desk.staged_path(job))
    held = desk.held(job)
    assert held.claimed
    assert held.identity.size == len(PICTURE) + 4


def test_a_claimed_file_with_a_second_name_is_not_taken(desk: Desk) -> None:
    desk.drop()
    job = desk.job()
    desk.claimed(job)
    desk.let_go()
    os.link(desk.staged_path(job), desk.folder / "second.jpg")
    with pytest.raises(NotAllowedError, match="more than one name"):
        desk.held(job)


def test_somebody_who_opens_the_file_for_writing_is_noticed(desk: Desk) -> None:
    path = desk.drop()
    held = desk.held(desk.job())
    refuse_if_changed(held, held.identity)
    assert open_for_writing(path) == "refused"
    with pytest.raises(ChangedInHandError, match="for writing"):
        refuse_if_changed(held, held.identity)


def test_somebody_who_reads_the_file_disturbs_nothing(desk: Desk) -> None:
    path = desk.drop()
    held = desk.held(desk.job())
    path.read_bytes()
    refuse_if_changed(held, held.identity)


def test_a_change_of_rights_in_hand_is_noticed(desk: Desk) -> None:
    path = desk.drop()
    held = desk.held(desk.job())
    path.chmod(0o600 if stat.S_IMODE(path.stat().st_mode) != 0o600 else 0o640)
    with pytest.raises(ChangedInHandError, match="changed"):
        refuse_if_changed(held, held.identity)


# -- claimed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("relpath", ["a.jpg", "2026/11/a.jpg", "a\nb\udcff.jpg", "s/" + "x" * 255])
def test_a_claim_moves_the_file_and_keeps_its_sub_folder_and_name(desk: Desk, relpath: str) -> None:
    path = desk.drop(relpath)
    inode = path.stat().st_ino
    job = desk.job(relpath)
    claimed = desk.claimed(job)
    assert not path.exists()
    lies = desk.staged_path(job)
    assert lies.read_bytes() == PICTURE
    name = os.path.basename(relpath)
    assert (lies.stat().st_ino, claimed.name, claimed.in_place) == (inode, name, False)
    assert claimed.identity == Identity.of(lies.stat())
    assert Identity.of(os.stat(claimed.name, dir_fd=claimed.parent)) == claimed.identity
    refuse_if_changed(claimed.inspected.held, claimed.identity)


def test_nobody_else_can_look_into_a_claim(desk: Desk) -> None:
    desk.drop("sub/a.jpg")
    job = desk.job("sub/a.jpg")
    desk.claimed(job)
    for directory in (desk.root.staging_path, *desk.staged_path(job).parents[:2]):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_a_claim_is_found_again_by_its_id_alone(desk: Desk) -> None:
    desk.drop("sub/a.jpg")
    job = desk.job("sub/a.jpg")
    assert not desk.root.has_staged(job.object_id)
    first = desk.claimed(job)
    desk.let_go()
    assert desk.root.has_staged(job.object_id)
    again = desk.claimed(job)
    assert (again.name, again.identity, again.in_place) == (first.name, first.identity, False)
    assert again.inspected.held.claimed


def test_where_the_plaintext_is_kept_nothing_is_moved(desk: Desk) -> None:
    path = desk.drop()
    claimed = desk.claimed(desk.job(), move=False)
    assert claimed.in_place
    assert claimed.identity == Identity.of(path.stat())
    assert desk.root.entries() == []


def test_a_stranger_under_the_name_gets_it_back_untouched(desk: Desk) -> None:
    path = desk.drop("sub/a.jpg")
    inspected = desk.inspected(desk.job("sub/a.jpg"))
    aside = replace(path)
    stranger = path.stat().st_ino
    with pytest.raises(ChangedInHandError, match="replaced"):
        claim(inspected, desk.root, desk.hands, move=True)
    assert path.read_bytes() == STRANGER
    assert path.stat().st_ino == stranger
    assert aside.read_bytes() == PICTURE
    assert not desk.root.has_staged(inspected.held.job.object_id)


def test_a_stranger_is_not_given_back_over_a_file_that_came_meanwhile(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = desk.drop("sub/a.jpg")
    inspected = desk.inspected(desk.job("sub/a.jpg"))
    replace(path)
    rename = os.rename

    def moved(source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        monkeypatch.undo()
        rename(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        path.write_bytes(b"a third file")

    monkeypatch.setattr(os, "rename", moved)
    with pytest.raises(ChangedInHandError, match="replaced"):
        claim(inspected, desk.root, desk.hands, move=True)
    assert path.read_bytes() == b"a third file"
    object_id = inspected.held.job.object_id
    assert (desk.root.staging_path / object_id / "sub/a.jpg").read_bytes() == STRANGER


def test_giving_a_stranger_back_leaves_no_directories(desk: Desk) -> None:
    path = desk.drop("sub/a.jpg")
    inspected = desk.inspected(desk.job("sub/a.jpg"))
    replace(path)
    with pytest.raises(ChangedInHandError):
        claim(inspected, desk.root, desk.hands, move=True)
    assert desk.root.entries() == []


def test_a_name_that_was_swapped_for_a_link_does_not_move_what_it_points_to(
    desk: Desk, tmp_path: Path
) -> None:
    path = desk.drop()
    inspected = desk.inspected(desk.job())
    (tmp_path / "private.jpg").write_bytes(STRANGER)
    path.rename(tmp_path / "aside.jpg")
    path.symlink_to(tmp_path / "private.jpg")
    with pytest.raises(ChangedInHandError):
        claim(inspected, desk.root, desk.hands, move=True)
    assert (tmp_path / "private.jpg").read_bytes() == STRANGER
    assert path.is_symlink()


def test_a_file_that_vanished_in_hand_is_not_claimed(desk: Desk) -> None:
    path = desk.drop("sub/a.jpg")
    inspected = desk.inspected(desk.job("sub/a.jpg"))
    path.unlink()
    with pytest.raises(FileNotFoundError):
        claim(inspected, desk.root, desk.hands, move=True)
    assert desk.root.entries() == []


@pytest.mark.parametrize("move", [True, False], ids=["moved", "in place"])
def test_somebody_who_opens_the_file_for_writing_ends_the_claim(
    desk: Desk,
    move: bool,  # noqa: FBT001 - a parameter of the table
) -> None:
    path = desk.drop()
    inspected = desk.inspected(desk.job())
    assert open_for_writing(path) == "refused"
    with pytest.raises(ChangedInHandError):
        claim(inspected, desk.root, desk.hands, move=move)
    job = inspected.held.job
    assert (desk.staged_path(job) if move else path).read_bytes() == PICTURE


# -- where it cannot be moved ------------------------------------------------------------------


def test_in_a_folder_that_is_read_only_the_file_is_sealed_where_it_lies(
    ordinary_desk: Desk,
) -> None:
    path = ordinary_desk.drop()
    ordinary_desk.folder.chmod(0o500)
    claimed = ordinary_desk.claimed(ordinary_desk.job())
    assert claimed.in_place
    assert path.read_bytes() == PICTURE
    assert ordinary_desk.root.entries() == []


def test_a_read_only_folder_without_staging_directory_says_so() -> None:
    with ordinary_folder() as folder, without_privileges():
        (folder / "a.jpg").write_bytes(PICTURE)
        folder.chmod(0o500)
        root = Root(folder, None)
        folder.chmod(0o700)
        assert root.staging is None
        assert "Permission denied" in root.why_no_staging
        assert root.entries() == []


@pytest.mark.skipif(not IS_ROOT, reason="only root can make files of two users")
def test_a_foreign_file_in_a_sticky_folder_is_sealed_where_it_lies() -> None:
    with ordinary_folder() as directory:
        with without_privileges():
            desk = Desk(directory)
        path = desk.drop("sub/a.jpg")
        os.chown(desk.folder / "sub", 1, 1)
        (desk.folder / "sub").chmod(0o1777)
        os.chown(path, 1, 1)
        path.chmod(0o644)
        with without_privileges():
            claimed = desk.claimed(desk.job("sub/a.jpg"))
            assert claimed.in_place
            assert not claimed.inspected.held.leased, "a lease takes the owner, or a privilege"
            assert desk.root.entries() == []
            desk.let_go()
        assert path.read_bytes() == PICTURE


@pytest.mark.skipif(not can_mount(), reason="mounting takes root's privileges")
def test_a_file_on_another_file_system_below_the_folder_is_sealed_where_it_lies(
    desk: Desk,
) -> None:
    mounted = desk.folder / "mounted"
    mounted.mkdir()
    with mounted_tmpfs(mounted, "1m"):
        path = desk.drop("mounted/a.jpg")
        assert desk.claimed(desk.job("mounted/a.jpg")).in_place
        assert path.read_bytes() == PICTURE
        assert desk.root.entries() == []
        desk.let_go()


def deep_job(desk: Desk, length: int) -> Job:
    """A job for a file whose relative path has that many characters."""
    folder = "d" * 250
    levels = (length - 10) // (len(folder) + 1)
    parent = os.dup(desk.root.fd)
    for _ in range(levels):
        os.mkdir(folder, dir_fd=parent)
        child = os.open(folder, os.O_RDONLY | os.O_DIRECTORY, dir_fd=parent)
        os.close(parent)
        parent = child
    name = "a" * (length - levels * (len(folder) + 1))
    fd = os.open(name, os.O_CREAT | os.O_WRONLY, dir_fd=parent)
    os.write(fd, PICTURE)
    identity = Identity.of(os.fstat(fd))
    os.close(fd)
    os.close(parent)
    relpath = "/".join([folder] * levels + [name])
    return Job(new_id(), desk.key, relpath, identity, Proof.LEASE, 1, 0)


@pytest.mark.parametrize("beyond", [-16, 600])
def test_a_path_too_long_for_the_staging_directory_is_sealed_where_it_lies(
    desk: Desk, beyond: int
) -> None:
    job = deep_job(desk, os.pathconf(desk.folder, "PC_PATH_MAX") + beyond)
    claimed = desk.claimed(job)
    assert claimed.in_place
    assert os.pread(claimed.inspected.held.fd, 99, 0) == PICTURE
    shutil.rmtree(desk.folder / job.relpath.split("/")[0])


@pytest.mark.parametrize("beyond", [-16, 600])
def test_a_claim_that_fails_half_way_leaves_no_directories(desk: Desk, beyond: int) -> None:
    job = deep_job(desk, os.pathconf(desk.folder, "PC_PATH_MAX") + beyond)
    desk.claimed(job)
    shutil.rmtree(desk.folder / job.relpath.split("/")[0])
    assert desk.root.entries() == []


# -- the staging directory ---------------------------------------------------------------------


def test_a_folder_that_is_not_there_is_gone(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for absent in ("nowhere", "file"):
        with pytest.raises(FolderGoneError):
            Root(tmp_path / absent, None)


def test_a_folder_behind_a_link_is_opened_once_and_for_all(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to("real")
    root = Root(tmp_path / "link", None)
    assert root.is_current()
    (tmp_path / "link").unlink()
    assert not root.is_current()
    (tmp_path / "link").symlink_to("other")
    assert not root.is_current()
    assert os.fstat(root.fd).st_ino == (tmp_path / "real").stat().st_ino


def test_a_staging_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    foreign = Path("/usr")
    if IS_ROOT:
        foreign = tmp_path / STAGING_NAME
        foreign.mkdir()
        os.chown(foreign, NOBODY, NOBODY)
    with pytest.raises(NotAllowedError, match="another user"):
        Root(tmp_path, foreign)


def test_a_staging_directory_that_is_a_link_is_not_used(tmp_path: Path) -> None:
    folder, private = tmp_path / "drop", tmp_path / "private"
    folder.mkdir()
    private.mkdir(mode=0o755)
    (folder / STAGING_NAME).symlink_to(private)
    root = Root(folder, None)
    assert root.staging is None
    assert root.why_no_staging.startswith("no staging directory")
    assert stat.S_IMODE(private.stat().st_mode) == 0o755
    desk = Desk(tmp_path)
    with desk.hands:
        desk.drop()
        assert desk.claimed(desk.job()).in_place
    assert list(private.iterdir()) == []


def test_a_staging_directory_that_others_may_enter_is_closed_to_them(tmp_path: Path) -> None:
    staging = tmp_path / STAGING_NAME
    staging.mkdir()
    staging.chmod(0o777)
    Root(tmp_path, None)
    assert stat.S_IMODE(staging.stat().st_mode) == 0o700


def test_a_staging_directory_of_another_name_is_used(tmp_path: Path) -> None:
    desk = Desk(tmp_path, staging=tmp_path / "hold")
    with desk.hands:
        desk.drop("sub/a.jpg")
        job = desk.job("sub/a.jpg")
        assert not desk.claimed(job).in_place
    assert (tmp_path / "hold" / job.object_id / "sub/a.jpg").read_bytes() == PICTURE
    assert not (desk.folder / STAGING_NAME).exists()


def test_a_staging_directory_on_another_file_system_is_not_used(tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system that can be written")
    with tempfile.TemporaryDirectory(dir=memory) as elsewhere:
        root = Root(tmp_path, Path(elsewhere))
        assert root.staging is None
        assert "another file system" in root.why_no_staging


# -- markers -----------------------------------------------------------------------------------


def test_a_marker_is_removed_and_nothing_else(desk: Desk, tmp_path: Path) -> None:
    desk.drop("sub/a.jpg")
    desk.drop("sub/a.jpg.done", b"")
    remove_marker(desk.root, "sub/a.jpg.done")
    assert tree(desk.folder) == [STAGING_NAME, "sub/a.jpg"]
    remove_marker(desk.root, "sub/a.jpg.done")
    remove_marker(desk.root, "nowhere/a.jpg.done")


def test_a_marker_that_is_no_regular_file_stays(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "private").write_bytes(STRANGER)
    (desk.folder / "a.done").symlink_to(tmp_path / "private")
    (desk.folder / "b.done").mkdir()
    remove_marker(desk.root, "a.done")
    remove_marker(desk.root, "b.done")
    assert tree(desk.folder) == [STAGING_NAME, "a.done", "b.done"]
    assert (tmp_path / "private").read_bytes() == STRANGER


# -- quarantine --------------------------------------------------------------------------------


def in_quarantine(desk: Desk) -> list[str]:
    directory = desk.root.staging_path / QUARANTINE_NAME
    return tree(directory) if directory.exists() else []


def test_a_file_in_the_folder_is_set_aside_under_its_id_and_name(desk: Desk) -> None:
    path = desk.drop("sub/a.jpg")
    held = desk.held(desk.job("sub/a.jpg"))
    assert set_aside(held.job, held, desk.root)
    assert in_quarantine(desk) == [f"{held.job.object_id}/sub/a.jpg"]
    assert not path.exists()
    assert not desk.root.has_staged(held.job.object_id)


def test_a_claimed_file_is_set_aside_also_when_it_cannot_be_opened(desk: Desk) -> None:
    desk.drop()
    job = desk.job()
    desk.claimed(job)
    desk.let_go()
    assert set_aside(job, None, desk.root)
    assert in_quarantine(desk) == [f"{job.object_id}/a.jpg"]


def test_what_is_not_in_hand_stays_where_it_is(desk: Desk) -> None:
    path = desk.drop()
    assert not set_aside(desk.job(), None, desk.root)
    assert path.read_bytes() == PICTURE
    assert in_quarantine(desk) == []


def test_without_a_staging_directory_nothing_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "drop").mkdir()
    (tmp_path / "drop" / STAGING_NAME).symlink_to(tmp_path)
    with desk_in(tmp_path) as desk:
        path = desk.drop()
        held = desk.held(desk.job())
        assert not set_aside(held.job, held, desk.root)
        assert path.read_bytes() == PICTURE


def test_a_stranger_under_the_name_is_not_set_aside(desk: Desk) -> None:
    path = desk.drop()
    held = desk.held(desk.job())
    replace(path)
    assert not set_aside(held.job, held, desk.root)
    assert path.read_bytes() == STRANGER
    assert in_quarantine(desk) == []


def test_a_quarantined_file_comes_back_among_the_claimed_ones(desk: Desk) -> None:
    desk.drop("sub/a.jpg")
    held = desk.held(desk.job("sub/a.jpg"))
    set_aside(held.job, held, desk.root)
    desk.let_go()
    assert desk.root.staging is not None
    assert take_back(held.job.object_id, desk.root.staging)
    assert in_quarantine(desk) == []
    again = desk.claimed(held.job)
    assert os.pread(again.inspected.held.fd, 99, 0) == PICTURE


def test_what_is_not_in_quarantine_cannot_be_taken_back(desk: Desk) -> None:
    assert desk.root.staging is not None
    assert not take_back(new_id(), desk.root.staging)
