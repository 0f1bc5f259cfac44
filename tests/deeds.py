"""What an adversary can do to a folder, its staging directory, the vault and the state.

Each deed is one of a producer, of somebody who shares the folder, or of an administrator.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from rig import STAGING

assert sys.platform == "linux", "system calls are traced on Linux only"

from adversary import BYSTANDER, HEAD, PIECE, SIZE, STORED, TARGET, Place, VoidError, give

if TYPE_CHECKING:
    from collections.abc import Callable

    from adversary import Adversary


@dataclass(frozen=True)
class Action:
    """One thing that an adversary may do."""

    name: str
    act: Callable[[Adversary], None]
    group: str
    needs: str = ""  # "name", "staged", "tmp", "object": what has to be there
    root: bool = False
    damages: bool = False  # an object, behind the service's back
    prepare: Callable[[Adversary], None] | None = None


ACTIONS: Final[dict[str, Action]] = {}

Step: TypeAlias = tuple[Action, Place]


def action(
    group: str, **options: Any
) -> Callable[[Callable[[Adversary], None]], Callable[[Adversary], None]]:
    def register(act: Callable[[Adversary], None]) -> Callable[[Adversary], None]:
        name = act.__name__.replace("_", " ")
        ACTIONS[name] = Action(name, act, group, **options)
        return act

    return register


# -- the picture in hand


@action("picture")
def replace(a: Adversary) -> None:
    put(a, a.part())


def put(a: Adversary, path: Path) -> None:
    try:
        path.rename(a.target)
    except (FileNotFoundError, NotADirectoryError):
        raise VoidError from None


@action("picture", needs="name")
def replace_with_size_and_times(a: Adversary) -> None:
    """Nothing but inode and time of change tells the new file from the old."""
    status = a.target.stat()
    path = a.part(a.fresh(status.st_size - len(HEAD)))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    put(a, path)


@action("picture", needs="name")
def append(a: Adversary) -> None:
    def write(fd: int) -> None:
        os.write(fd, os.urandom(3_000))
        a.note()
        os.write(fd, os.urandom(20_000))

    a.open_for_writing(a.target, write, os.O_APPEND)


@action("picture", needs="name")
def truncate_and_rewrite(a: Adversary) -> None:
    def write(fd: int) -> None:
        new = a.fresh(SIZE + 5_000)
        a.note()
        os.write(fd, new[:20_000])
        a.note()
        os.write(fd, new[20_000:])

    a.open_for_writing(a.target, write, os.O_TRUNC)


def scribble(fd: int) -> None:
    """Change bytes of the first, the second and the last piece, in one instant each."""
    for offset in (100, PIECE + 100, SIZE - 100):
        os.pwrite(fd, os.urandom(64), offset)


@action("picture", needs="name")
def overwrite(a: Adversary) -> None:
    a.open_for_writing(a.target, lambda fd: all_at_once(a, fd))


def all_at_once(a: Adversary, fd: int) -> None:
    for offset in (100, PIECE + 100, SIZE - 100):
        os.pwrite(fd, os.urandom(64), offset)
        a.note()


@action("picture", needs="name")
def overwrite_and_set_times_back(a: Adversary) -> None:
    status = a.target.stat()

    def write(fd: int) -> None:
        all_at_once(a, fd)
        os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns))

    a.open_for_writing(a.target, write)


@action("picture", needs="name")
def shorten(a: Adversary) -> None:
    a.open_for_writing(a.target, lambda fd: os.ftruncate(fd, SIZE // 2))


@action("picture", needs="name")
def open_and_close(a: Adversary) -> None:
    a.open_for_writing(a.target, lambda _fd: None)


@action("picture", needs="name")
def rename_away(a: Adversary) -> None:
    a.target.rename(a.site.outside / "away.jpg")


@action("picture", needs="name")
def rename_away_and_back(a: Adversary) -> None:
    away = a.target.rename(a.site.outside / "away.jpg")
    away.rename(a.target)


@action("picture", needs="name")
def rename_within(a: Adversary) -> None:
    a.target.rename(a.target.with_name("renamed.jpg"))


@action("picture", needs="name")
def rename_to_temporary(a: Adversary) -> None:
    a.target.rename(a.target.with_name("1.jpg.part"))


@action("picture", needs="name")
def unlink(a: Adversary) -> None:
    a.target.unlink()


@action("picture", needs="name")
def unlink_and_write(a: Adversary) -> None:
    a.target.unlink()
    a.write(a.target, a.fresh())


@action("picture")
def write_under_the_name(a: Adversary) -> None:
    """Where the picture was claimed its name is free: an arrival like any other."""
    if a.target.exists():
        raise VoidError
    a.write(a.target, a.fresh())


@action("picture", needs="name")
def swap_with_bystander(a: Adversary) -> None:
    other = a.site.drop / BYSTANDER
    if not other.exists():
        raise VoidError
    away = other.rename(a.site.outside / "swap.jpg")
    a.target.rename(other)
    away.rename(a.target)


@action("picture", needs="name")
def hard_link_within(a: Adversary) -> None:
    a.target.with_name("second.jpg").hardlink_to(a.target)


@action("picture", needs="name")
def hard_link_outside(a: Adversary) -> None:
    (a.site.outside / "second.jpg").hardlink_to(a.target)


@action("picture", needs="name")
def symlink_to_canary(a: Adversary) -> None:
    a.target.rename(a.site.outside / "away.jpg")
    a.target.symlink_to(a.site.canary / TARGET)
    a.own(a.target)


@action("picture", needs="name")
def directory_in_its_place(a: Adversary) -> None:
    a.target.rename(a.site.outside / "away.jpg")
    a.target.mkdir()
    a.own(a.target)
    a.write(a.target / "inner.jpg", a.fresh())


@action("picture", needs="name")
def fifo_in_its_place(a: Adversary) -> None:
    a.target.rename(a.site.outside / "away.jpg")
    os.mkfifo(a.target)


@action("picture", needs="name")
def chmod_000(a: Adversary) -> None:
    a.target.chmod(0)


@action("picture", needs="name", root=True)
def chown(a: Adversary) -> None:
    os.chown(a.target, 1234, 1234)


@action("picture", needs="name", root=True)
def chown_and_chmod_000(a: Adversary) -> None:
    os.chown(a.target, 1234, 1234)
    a.target.chmod(0)


@action("picture", needs="name")
def utime(a: Adversary) -> None:
    os.utime(a.target, ns=(10**18, 10**18))


def hold_open(a: Adversary) -> None:
    a.kept_open = os.open(a.target, os.O_RDWR)


def through_the_open_descriptor(a: Adversary, write: Callable[[int], None]) -> None:
    if a.kept_open < 0:
        raise VoidError
    write(a.kept_open)
    a.lost_writes += os.fstat(a.kept_open).st_nlink == 0


@action("picture", prepare=hold_open)
def write_to_a_descriptor_kept_open(a: Adversary) -> None:
    through_the_open_descriptor(a, lambda fd: all_at_once(a, fd))


@action("picture", prepare=hold_open)
def append_to_a_descriptor_kept_open_and_close(a: Adversary) -> None:
    def write(fd: int) -> None:
        os.pwrite(fd, os.urandom(9_000), SIZE)

    through_the_open_descriptor(a, write)
    os.close(a.kept_open)
    a.kept_open = -1


def hold_mapped(a: Adversary) -> None:
    hold_open(a)
    a.mapping = mmap.mmap(a.kept_open, 0)
    # Later stores into a page that is dirty already leave the file's times as they are.
    a.mapping[STORED : STORED + 64] = os.urandom(64)
    a.take_stock()


@action("picture", prepare=hold_mapped)
def store_through_a_mapping(a: Adversary) -> None:
    def store(_fd: int) -> None:
        assert a.mapping is not None
        a.mapping_was_used = True
        a.mapping[STORED : STORED + 64] = os.urandom(64)

    through_the_open_descriptor(a, store)


# -- the folder


@action("folder")
def sub_folder_away(a: Adversary) -> None:
    (a.site.drop / "b").rename(a.site.outside / "b")


@action("folder")
def sub_folder_away_and_back(a: Adversary) -> None:
    away = (a.site.drop / "b").rename(a.site.outside / "b")
    away.rename(a.site.drop / "b")


@action("folder")
def sub_folder_renamed(a: Adversary) -> None:
    (a.site.drop / "b").rename(a.site.drop / "c")


@action("folder")
def sub_folder_becomes_link_to_canary(a: Adversary) -> None:
    (a.site.drop / "b").rename(a.site.outside / "b")
    (a.site.drop / "b").symlink_to(a.site.canary / "b")


@action("folder")
def sub_folder_becomes_another(a: Adversary) -> None:
    (a.site.drop / "b").rename(a.site.outside / "b")
    (a.site.drop / "b").mkdir()
    a.own(a.site.drop / "b")
    a.write(a.target, a.fresh())


@action("folder")
def sub_folder_moved_into_staging(a: Adversary) -> None:
    if not a.staging.exists():
        raise VoidError
    (a.site.drop / "b").rename(a.staging / "b")


@action("folder")
def root_becomes_another(a: Adversary) -> None:
    a.site.drop.rename(a.site.outside / "drop")
    a.site.drop.mkdir()
    a.own(a.site.drop)
    a.write(a.site.drop / "new.jpg", a.fresh())


@action("folder")
def root_away_for_now(a: Adversary) -> None:
    away = a.site.drop.rename(a.site.outside / "drop")
    a.repairs.append(lambda: back(away, a.site.drop))


def back(path: Path, target: Path) -> None:
    """Put something back; what lies there meanwhile goes beside it."""
    if target.exists():
        target.rename(target.with_name(f"outside/{os.urandom(4).hex()}"))
    path.rename(target)


@action("folder")
def root_away_and_back(a: Adversary) -> None:
    away = a.site.drop.rename(a.site.outside / "drop")
    away.rename(a.site.drop)


@action("folder")
def root_replaced_for_now(a: Adversary) -> None:
    away = a.site.drop.rename(a.site.outside / "drop")
    a.site.drop.mkdir()
    a.own(a.site.drop)
    a.write(a.site.drop / "new.jpg", a.fresh())

    def merge() -> None:
        for each in list(a.site.drop.iterdir()):
            if each.name != STAGING:
                each.rename(away / each.name)
        a.site.drop.rename(a.site.outside / "other")
        away.rename(a.site.drop)

    a.repairs.append(merge)


def mount(where: Path) -> None:
    call_libc("mount", b"none", os.fsencode(where), b"tmpfs", 0, b"mode=0777")


def unmount(where: Path) -> None:
    call_libc("umount2", os.fsencode(where), 2)


def call_libc(name: str, *arguments: object) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def mount_over(a: Adversary, where: Path, fill: Callable[[], None]) -> None:
    if not has_private_mounts():
        raise VoidError
    below = os.open(where, os.O_PATH)
    seen_in = a.vaults if where == a.site.vault else a.views
    seen_in.append(Path(f"/proc/self/fd/{below}"))
    mount(where)
    fill()

    def undo() -> None:
        for path in list(where.iterdir()):  # what came there would go with the mount
            if path.is_file():
                shutil.copy(path, a.site.outside / path.name)
        unmount(where)
        os.close(below)
        seen_in.pop()

    a.repairs.append(undo)


@action("folder", root=True)
def root_mounted_over(a: Adversary) -> None:
    mount_over(a, a.site.drop, lambda: None)


@action("folder", root=True)
def sub_folder_mounted_over(a: Adversary) -> None:
    if not (a.site.drop / "b").is_dir():
        raise VoidError
    mount_over(a, a.site.drop / "b", lambda: None)


_private: list[bool] = []


def has_private_mounts() -> bool:
    """Whether this process has mounts of its own, which it takes once."""
    if not _private:
        try:
            call_libc("unshare", 0x20000)  # CLONE_NEWNS
            call_libc("mount", b"none", b"/", None, 0x4000 | 1 << 18, None)  # private, all below
            _private.append(True)
        except OSError:
            _private.append(False)
    return _private[0]


@action("folder")
def name_taken_in_the_move_directory(a: Adversary) -> None:
    path = a.site.moved / TARGET
    if not moves_plaintext(a) or path.exists():
        raise VoidError
    path.parent.mkdir(exist_ok=True)
    a.own(path.parent)
    a.write(path, a.fresh())


def moves_plaintext(a: Adversary) -> bool:
    return "move" in str(a.variant.folder.get("after"))


@action("folder")
def move_directory_becomes_link_to_canary(a: Adversary) -> None:
    path = a.site.moved / "b"
    if not moves_plaintext(a) or path.exists():
        raise VoidError
    path.symlink_to(a.site.canary / "b")
    a.repairs.append(path.unlink)


# -- what is the service's own


def flip(a: Adversary, path: Path, offset: int) -> None:
    """Change one byte in place, with the file's times as they were."""
    status = path.stat()
    if not status.st_size:
        raise VoidError
    offset = min(offset, status.st_size - 1) if offset >= 0 else status.st_size + offset
    a.damaged.append((path, offset))
    path.chmod(0o600)
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    path.chmod(stat.S_IMODE(status.st_mode))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@action("own", needs="tmp")
def temporary_object_deleted(a: Adversary) -> None:
    a.temporary().unlink()


@action("own", needs="tmp", damages=True)
def temporary_object_flipped_in_the_header(a: Adversary) -> None:
    flip(a, a.temporary(), 20)


@action("own", needs="tmp", damages=True)
def temporary_object_flipped_at_its_end(a: Adversary) -> None:
    flip(a, a.temporary(), -1)


@action("own", needs="tmp", damages=True)
def temporary_object_cut(a: Adversary) -> None:
    path = a.temporary()
    size = path.stat().st_size // 2
    path.chmod(0o600)
    os.truncate(path, size)
    path.chmod(0o400)
    a.damaged.append((path, size))


@action("own", needs="tmp", damages=True)
def temporary_object_replaced_by_a_valid_one(a: Adversary) -> None:
    path = a.temporary()
    path.unlink()
    path.write_bytes(a.spare)
    own_object(a, path)
    a.damaged.append((path, -1))


def own_object(a: Adversary, path: Path) -> None:
    path.chmod(0o400)
    if a.site.uid is not None:
        give(path, a.site.uid)


@action("own", needs="staged")
def garbage_under_the_final_name(a: Adversary) -> None:
    plant(a, b"not an object")


@action("own", needs="staged")
def another_object_under_the_final_name(a: Adversary) -> None:
    plant(a, a.spare)


def plant(a: Adversary, content: bytes) -> None:
    object_id = a.staged().relative_to(a.staging).parts[0]
    path = a.site.vault / "objects" / object_id[:2] / f"{object_id}.simg"
    if path.exists():
        raise VoidError
    path.write_bytes(content)
    own_object(a, path)
    a.planted.append((path, content))


@action("own", needs="object", damages=True)
def object_flipped(a: Adversary) -> None:
    flip(a, a.final(), -1)


@action("own", needs="object", damages=True)
def object_deleted(a: Adversary) -> None:
    path = a.final()
    path.unlink()
    a.damaged.append((path, -1))


@action("own", needs="object")
def object_hidden_for_now(a: Adversary) -> None:
    path = a.final()
    hidden = a.site.aside / path.relative_to(a.site.top)
    hidden.parent.mkdir(parents=True)
    path.rename(hidden)
    a.repairs.append(lambda: restore(hidden, path))


@action("own", needs="staging")
def staging_deleted(a: Adversary) -> None:
    shutil.rmtree(a.staging)


@action("own", needs="staging")
def staging_away(a: Adversary) -> None:
    a.staging.rename(a.site.outside / "staging")


@action("own", needs="staging")
def staging_away_for_now(a: Adversary) -> None:
    away = a.staging.rename(a.site.outside / "staging")
    a.repairs.append(lambda: restore_staging(a, away))


def restore_staging(a: Adversary, away: Path) -> None:
    if a.staging.exists():
        a.staging.rename(a.site.outside / "staging made anew")
    away.rename(a.staging)


@action("own", needs="staging")
def staging_away_and_back(a: Adversary) -> None:
    away = a.staging.rename(a.site.outside / "staging")
    away.rename(a.staging)


@action("own", needs="staging")
def staging_becomes_a_link(a: Adversary) -> None:
    away = a.staging.rename(a.site.outside / "staging")
    a.staging.symlink_to(a.site.canary)

    def undo() -> None:
        a.staging.unlink()
        restore_staging(a, away)

    a.repairs.append(undo)


@action("own", needs="staged")
def claim_renamed(a: Adversary) -> None:
    parts = a.staged().relative_to(a.staging).parts
    (a.staging / parts[0]).rename(a.staging / os.urandom(16).hex())


@action("own", needs="staged")
def claim_given_back(a: Adversary) -> None:
    if a.target.exists() or not a.target.parent.is_dir():
        raise VoidError
    a.staged().rename(a.target)


@action("own", needs="staged")
def claimed_file_corrupted(a: Adversary) -> None:
    a.open_for_writing(a.staged(), lambda fd: all_at_once(a, fd))


@action("own", needs="staged")
def claimed_file_corrupted_and_times_set_back(a: Adversary) -> None:
    path = a.staged()
    status = path.stat()

    def write(fd: int) -> None:
        all_at_once(a, fd)
        os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns))

    a.open_for_writing(path, write)


@action("own", needs="staged")
def claimed_file_appended_to(a: Adversary) -> None:
    def write(fd: int) -> None:
        os.write(fd, os.urandom(99))

    a.open_for_writing(a.staged(), write, os.O_APPEND)


@action("own", needs="staged")
def claimed_file_cut(a: Adversary) -> None:
    a.open_for_writing(a.staged(), lambda fd: os.ftruncate(fd, SIZE // 3))


@action("own", needs="staged")
def claimed_file_replaced(a: Adversary) -> None:
    a.part().rename(a.staged())


@action("own", needs="staged")
def claimed_file_replaced_with_size_and_times(a: Adversary) -> None:
    path = a.staged()
    status = path.stat()
    part = a.part(a.fresh(status.st_size - len(HEAD)))
    os.utime(part, ns=(status.st_atime_ns, status.st_mtime_ns))
    part.rename(path)


@action("own", needs="staged")
def claimed_file_deleted(a: Adversary) -> None:
    a.staged().unlink()


@action("own", needs="staged")
def claimed_file_linked(a: Adversary) -> None:
    (a.site.outside / "second.jpg").hardlink_to(a.staged())


@action("own", needs="staged")
def claimed_file_becomes_a_link(a: Adversary) -> None:
    path = a.staged()
    path.rename(a.site.outside / "away.jpg")
    path.symlink_to(a.site.canary / TARGET)


@action("own", needs="staged")
def claimed_file_chmod_000(a: Adversary) -> None:
    a.staged().chmod(0)


@action("own", needs="staged")
def stranger_beside_the_claimed_file(a: Adversary) -> None:
    a.write(a.staged().with_name("stranger.jpg"), a.fresh())


@action("state")
def queue_deleted(a: Adversary) -> None:
    for path in queue_files(a):
        path.unlink()


def queue_files(a: Adversary) -> list[Path]:
    found = list(a.site.state.glob("queue.sqlite*"))
    if not found:
        raise VoidError
    return found


@action("state")
def queue_log_deleted(a: Adversary) -> None:
    for path in queue_files(a):
        if path.suffix != ".sqlite":
            path.unlink()


@action("state")
def queue_filled_with_garbage(a: Adversary) -> None:
    for path in queue_files(a):
        if path.suffix == ".sqlite":
            path.write_bytes(os.urandom(8192))


@action("state")
def queue_emptied(a: Adversary) -> None:
    for path in queue_files(a):
        if path.suffix == ".sqlite":
            os.truncate(path, 0)


@action("state")
def state_directory_away(a: Adversary) -> None:
    if not a.site.state.exists():
        raise VoidError
    a.site.state.rename(a.site.aside / "state")
    remake_state(a)


def remake_state(a: Adversary) -> None:
    if a.site.uid is not None:  # its parent is not the service's to write
        a.site.state.mkdir(mode=0o700)
        give(a.site.state, a.site.uid)


@action("state")
def queue_from_before(a: Adversary) -> None:
    """What a restored backup looks like: rows of before, names and numbers that exist again."""
    names = queue_files(a)
    copies = {path: path.read_bytes() for path in names}

    def put_back() -> None:
        for path in a.site.state.glob("queue.sqlite*"):
            path.unlink()
        for path, content in copies.items():
            if not path.name.endswith("-shm"):
                path.write_bytes(content)
                if a.site.uid is not None:
                    give(path, a.site.uid)

    a.repairs.append(put_back)


@action("vault")
def vault_away_for_now(a: Adversary) -> None:
    away = a.site.vault.rename(a.site.aside / "vault")
    a.repairs.append(lambda: put_vault_back(a, away))


def put_vault_back(a: Adversary, away: Path) -> None:
    if a.site.vault.exists():
        a.site.vault.rename(a.site.aside / "vault of meanwhile")
    away.rename(a.site.vault)


@action("vault")
def vault_away_and_back(a: Adversary) -> None:
    away = a.site.vault.rename(a.site.aside / "vault")
    away.rename(a.site.vault)


@action("vault")
def vault_replaced_by_nothing_for_now(a: Adversary) -> None:
    """The directory below an unmounted disk, with all that a careless program would need."""
    away = a.site.vault.rename(a.site.aside / "vault")
    for path in away.rglob("*"):
        if path.is_dir():
            (a.site.vault / path.relative_to(away)).mkdir(parents=True)
    for path in (a.site.vault, *a.site.vault.rglob("*")):
        if a.site.uid is not None:
            give(path, a.site.uid)
    a.repairs.append(lambda: put_vault_back(a, away))


@action("vault", root=True)
def vault_mounted_over_for_now(a: Adversary) -> None:
    mount_over(a, a.site.vault, lambda: None)


@action("vault", damages=True)
def vault_emptied(a: Adversary) -> None:
    """All objects are gone, and so are the directories; the vault file is there."""
    shutil.rmtree(a.site.vault / "objects")
    a.damaged.append((a.site.vault / "objects", -1))

    def remake() -> None:
        for number in range(256):
            path = a.site.vault / "objects" / f"{number:02x}"
            path.mkdir(parents=True, exist_ok=True)
            if a.site.uid is not None:
                give(path, a.site.uid)
                give(path.parent, a.site.uid)

    a.repairs.append(remake)


@action("vault")
def temporary_directory_deleted(a: Adversary) -> None:
    path = a.site.vault / "tmp"
    if not path.exists():
        raise VoidError
    shutil.rmtree(path)


@action("vault")
def vault_file_hidden_for_now(a: Adversary) -> None:
    path = a.site.vault / "vault.json"
    hidden = path.rename(path.with_name("hidden"))
    a.repairs.append(lambda: restore(hidden, path))


def restore(away: Path, path: Path) -> None:
    away.rename(path)
