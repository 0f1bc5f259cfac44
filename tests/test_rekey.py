"""Other keys for objects that are there: the content stays, and no object is ever missing."""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from path_builders import (
    IS_ROOT,
    NO_RESERVE,
    NOBODY,
    can_mount,
    mounted_tmpfs,
    only_on_linux,
    open_descriptors,
    ordinary_folder,
    without_privileges,
)
from rekey_builders import (
    PREVIEW,
    Content,
    a_key,
    a_pair,
    a_vault,
    content_of,
    damage,
    die_at_call,
    header_of,
    left_aside,
    meta_for,
    put,
    quick_directory,
    sections_of,
    slots_of,
)

from secimg_watch.container import pack_meta
from secimg_watch.errors import (
    AlreadyRunningError,
    DiskFullError,
    KeyMismatchError,
    NoInputError,
    NotAllowedError,
    NotReadyError,
    SecimgError,
    StorageError,
    TamperedError,
    UsageError,
)
from secimg_watch.gate import add_key
from secimg_watch.quantities import Reserve
from secimg_watch.records import KeySet, ObjectId
from secimg_watch.rekey import Journal, Rekeyer, take_census
from secimg_watch.seal import open_object, seal_packed
from secimg_watch.slots import Password, PasswordCache
from secimg_watch.vault import Vault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

only_on_linux()
assert sys.platform == "linux"

OLD, NEW = a_key(), a_key()
FIRST, ALICE = a_pair()
SECOND, BOB = a_pair()
PASSWORD = Password(b"secret", memory_kib=8192, passes=1, lanes=1)
SPARE = Password(b"spare", memory_kib=8192, passes=1, lanes=1)
PASSWORDS = PasswordCache()
EVERYTHING = (OLD, NEW, FIRST, SECOND, PASSWORD)
RING = KeySet((NEW, OLD))
EDGES = [0, 1, 16_384, 65_536, 131_071, 131_072, 131_073, 300_000]
UNKNOWN_TAG = 700


@pytest.fixture
def vault() -> Iterator[Vault]:
    with quick_directory() as directory:
        made = a_vault(directory / "vault", OLD)
        add_key(made, NEW)
        yield made


def rekeyed(vault: Vault, object_id: ObjectId, rekeyer: Rekeyer) -> bool:
    with vault.replacing():
        return rekeyer.rekey(object_id)


def reencrypted(vault: Vault, object_id: ObjectId, rekeyer: Rekeyer) -> None:
    with vault.replacing():
        rekeyer.reencrypt(object_id)


def raw(vault: Vault, object_id: ObjectId) -> bytes:
    return vault.object_path(object_id).read_bytes()


def check_refused(
    vault: Vault, object_id: ObjectId, act: Callable[[], object], fault: type[SecimgError]
) -> None:
    """What is refused leaves the very same file, and nothing beside it."""
    before, inode = raw(vault, object_id), vault.object_path(object_id).stat().st_ino
    descriptors = open_descriptors()
    with pytest.raises(fault):
        act()
    assert raw(vault, object_id) == before
    assert vault.object_path(object_id).stat().st_ino == inode
    assert left_aside(vault) == []
    assert open_descriptors() <= descriptors


# -- counting ----------------------------------------------------------------------------------


def test_a_census_counts_the_slots_of_every_kind_and_names_what_it_cannot_read(
    vault: Vault,
) -> None:
    put(vault, [OLD])
    put(vault, [OLD, ALICE])
    put(vault, [NEW, ALICE, BOB, PASSWORD], passwords=PASSWORDS)
    broken = put(vault, [OLD])
    damage(vault, broken, 0)
    census = take_census(vault)
    assert census.objects == 3
    assert dict(census.slots) == {
        ("key", OLD.key_id): 2,
        ("key", NEW.key_id): 1,
        ("recipient", ALICE.key_id): 2,
        ("recipient", BOB.key_id): 1,
        ("password", PASSWORD.key_id): 1,
    }
    assert list(census.unreadable) == [broken]
    assert isinstance(census.unreadable[broken], TamperedError)


def test_a_census_of_an_empty_vault_and_of_none(vault: Vault, tmp_path: Path) -> None:
    assert (take_census(vault).objects, len(take_census(vault).slots)) == (0, 0)
    with pytest.raises(NoInputError):
        take_census(Vault(tmp_path / "nowhere", NO_RESERVE))


def test_an_object_that_is_cut_within_its_header_is_not_counted(vault: Vault) -> None:
    object_id = put(vault, [OLD])
    vault.object_path(object_id).chmod(0o600)
    os.truncate(vault.object_path(object_id), 100)
    assert list(take_census(vault).unreadable) == [object_id]


# -- giving other keys -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("has", "shall"),
    [
        pytest.param([OLD], KeySet((NEW, OLD)), id="another key"),
        pytest.param([OLD], KeySet((OLD,), (ALICE,)), id="one more recipient"),
        pytest.param([OLD, ALICE], KeySet((OLD,)), id="one recipient less"),
        pytest.param([OLD, ALICE], KeySet((OLD,), (BOB,)), id="another recipient"),
        pytest.param([OLD, ALICE], KeySet((NEW, OLD), (ALICE,)), id="another key, one stays"),
        pytest.param([OLD, NEW], KeySet((NEW,)), id="a key less"),
        pytest.param([ALICE, OLD, BOB], KeySet((NEW, OLD), (BOB,)), id="something of everything"),
        pytest.param([OLD, ALICE], KeySet((), (ALICE, BOB)), id="no key any more"),
        pytest.param([ALICE], KeySet((NEW,), (ALICE,)), id="a key for the first time"),
    ],
)
def test_an_object_gets_the_slots_that_it_shall_have_and_keeps_its_content(
    vault: Vault, has: list[Any], shall: KeySet
) -> None:
    object_id = put(vault, has, b"picture" * 5_000)
    before = content_of(vault, object_id, *EVERYTHING)
    sections = sections_of(vault, object_id)
    rekeyer = Rekeyer(vault, shall, [FIRST] if OLD not in shall.ring else [])
    assert rekeyer.is_due(object_id)
    assert rekeyed(vault, object_id, rekeyer)
    wanted = [("key", key.key_id) for key in shall.ring[:1]]
    wanted += [("recipient", each.key_id) for each in shall.recipients]
    assert slots_of(vault, object_id) == sorted(wanted)
    assert sections_of(vault, object_id) == sections
    ids = {key_id for _, key_id in wanted}
    for opener in (OLD, NEW, FIRST, SECOND):
        if opener.key_id in ids:
            assert content_of(vault, object_id, opener) == before
        else:
            with pytest.raises(KeyMismatchError):
                content_of(vault, object_id, opener)


def test_a_second_time_nothing_is_touched(vault: Vault) -> None:
    object_id = put(vault, [OLD, BOB])
    rekeyer = Rekeyer(vault, KeySet((NEW, OLD), (ALICE,)))
    assert rekeyed(vault, object_id, rekeyer)
    status = vault.object_path(object_id).stat()
    assert not rekeyer.is_due(object_id)
    assert not rekeyed(vault, object_id, rekeyer)
    assert vault.object_path(object_id).stat() == status


def test_the_slots_of_passwords_stay_as_they_are(vault: Vault) -> None:
    object_id = put(vault, [PASSWORD, OLD, SPARE], passwords=PASSWORDS)
    kept = [slot for slot in header_of(vault, object_id).slots if slot.key_id != OLD.key_id]
    before = content_of(vault, object_id, OLD)
    assert rekeyed(vault, object_id, Rekeyer(vault, KeySet((NEW, OLD), (ALICE,))))
    assert [s for s in header_of(vault, object_id).slots if s in kept] == kept
    for opener in (NEW, FIRST, PASSWORD, SPARE):
        assert content_of(vault, object_id, opener) == before


def test_a_password_opens_an_object_that_no_key_does(vault: Vault) -> None:
    object_id = put(vault, [PASSWORD], passwords=PASSWORDS)
    rekeyer = Rekeyer(vault, RING, [PASSWORD])
    assert rekeyed(vault, object_id, rekeyer)
    assert content_of(vault, object_id, NEW) == content_of(vault, object_id, PASSWORD)


def test_an_object_that_nothing_at_hand_opens_is_left_alone(vault: Vault) -> None:
    object_id = put(vault, [a_key(), BOB])
    rekeyer = Rekeyer(vault, KeySet((NEW, OLD), (ALICE,)), [FIRST])
    assert rekeyer.is_due(object_id)
    check_refused(vault, object_id, lambda: rekeyed(vault, object_id, rekeyer), KeyMismatchError)


def test_more_slots_than_an_object_can_have_are_refused(vault: Vault) -> None:
    six = tuple(a_pair()[1] for _ in range(6))
    object_id = put(vault, [OLD, PASSWORD, SPARE], passwords=PASSWORDS)
    rekeyer = Rekeyer(vault, KeySet((NEW, OLD), six))
    check_refused(vault, object_id, lambda: rekeyed(vault, object_id, rekeyer), UsageError)
    assert rekeyed(vault, object_id, Rekeyer(vault, KeySet((NEW, OLD), six[:5])))
    assert len(header_of(vault, object_id).slots) == 8


def test_an_object_never_ends_up_with_no_slot_at_all(vault: Vault) -> None:
    object_id = put(vault, [OLD])
    nobody = Rekeyer(vault, KeySet(()), [OLD])
    check_refused(vault, object_id, lambda: rekeyed(vault, object_id, nobody), UsageError)


@pytest.mark.parametrize("harm", ["body", "preview", "META", "cut", "more"])
def test_a_damaged_object_is_copied_with_its_damage(vault: Vault, harm: str) -> None:
    object_id = put(vault, [OLD], b"picture" * 5_000)
    path = vault.object_path(object_id)
    start = len(header_of(vault, object_id).pack())
    core = header_of(vault, object_id).core
    path.chmod(0o600)
    if harm == "cut":
        os.truncate(path, start + 10)
    elif harm == "more":
        with path.open("ab") as file:
            file.write(b"more")
    else:
        places = {"body": -1, "preview": start + core.meta_len, "META": start}
        damage(vault, object_id, places[harm])
    sections = sections_of(vault, object_id)
    assert rekeyed(vault, object_id, Rekeyer(vault, RING))
    assert sections_of(vault, object_id) == sections
    assert slots_of(vault, object_id) == [("key", NEW.key_id)]


@pytest.mark.parametrize("place", [0, 20, 60, 90, 191])
def test_an_object_whose_header_is_damaged_is_left_alone(vault: Vault, place: int) -> None:
    object_id = put(vault, [OLD])
    damage(vault, object_id, place)
    rekeyer = Rekeyer(vault, RING)
    with vault.replacing(), pytest.raises((TamperedError, KeyMismatchError)):
        rekeyer.rekey(object_id)
    check_refused(vault, object_id, lambda: reencrypted(vault, object_id, rekeyer), SecimgError)


def test_a_slot_that_somebody_else_put_in_is_not_taken_over(vault: Vault) -> None:
    # Its slots alone do not tell; the header's MAC does.
    object_id, other = put(vault, [OLD, ALICE]), put(vault, [NEW])
    header = header_of(vault, object_id)
    slots = (*header.slots, *header_of(vault, other).slots)
    path = vault.object_path(object_id)
    data = replace(header, slots=slots).pack() + sections_of(vault, object_id)
    path.chmod(0o600)
    path.write_bytes(data)
    rekeyer = Rekeyer(vault, RING)
    check_refused(vault, object_id, lambda: rekeyed(vault, object_id, rekeyer), TamperedError)


def test_an_object_of_another_vault_or_under_anothers_name_is_left_alone(vault: Vault) -> None:
    stranger = put(vault, [OLD], vault_id=b"w" * 16)
    moved = ObjectId("0" * 32)
    vault.object_path(put(vault, [OLD])).rename(vault.object_path(moved))
    rekeyer = Rekeyer(vault, RING)
    for object_id in (stranger, moved):
        for act in (rekeyed, reencrypted):
            check_refused(
                vault,
                object_id,
                lambda act=act, object_id=object_id: act(vault, object_id, rekeyer),  # type: ignore[misc]
                TamperedError,
            )


def test_an_object_that_is_not_there_is_none(vault: Vault) -> None:
    rekeyer = Rekeyer(vault, RING)
    for act in (rekeyed, reencrypted):
        with pytest.raises(NoInputError):
            act(vault, ObjectId("0" * 32), rekeyer)


def test_what_takes_the_keys_of_another_vault_is_refused_at_once(
    vault: Vault, tmp_path: Path
) -> None:
    with pytest.raises(KeyMismatchError):
        Rekeyer(vault, KeySet((a_key(), OLD)))
    with pytest.raises(KeyMismatchError):
        Rekeyer(vault, KeySet((replace(NEW, key=bytes(32)), OLD)))
    with pytest.raises(NoInputError):
        Rekeyer(Vault(tmp_path / "nowhere", NO_RESERVE), RING)


@pytest.mark.parametrize("act", [rekeyed, reencrypted])
def test_a_write_only_vaults_objects_are_opened_with_a_private_key(
    tmp_path: Path, act: Callable[..., object]
) -> None:
    vault = a_vault(tmp_path / "vault")
    object_id = put(vault, [ALICE])
    before = content_of(vault, object_id, FIRST)
    shall = KeySet((), (BOB,))
    blind = Rekeyer(vault, shall)
    check_refused(vault, object_id, lambda: act(vault, object_id, blind), KeyMismatchError)
    act(vault, object_id, Rekeyer(vault, shall, [FIRST]))
    assert slots_of(vault, object_id) == [("recipient", BOB.key_id)]
    assert content_of(vault, object_id, SECOND) == before


@pytest.mark.parametrize("act", [rekeyed, reencrypted])
def test_an_object_is_as_private_as_before_and_nothing_stays_open(
    vault: Vault, act: Callable[..., object]
) -> None:
    object_id = put(vault, [OLD])
    rekeyer = Rekeyer(vault, RING)
    before = open_descriptors()
    act(vault, object_id, rekeyer)
    assert stat.S_IMODE(vault.object_path(object_id).stat().st_mode) == 0o400
    assert left_aside(vault) == []
    assert open_descriptors() <= before


@pytest.mark.skipif(not IS_ROOT, reason="only root gives files away")
@pytest.mark.parametrize("act", [rekeyed, reencrypted])
def test_an_object_that_root_replaces_still_belongs_to_whom_it_did(
    vault: Vault, act: Callable[..., object]
) -> None:
    object_id = put(vault, [OLD])
    path = vault.object_path(object_id)
    path.chmod(0o440)
    os.chown(path, NOBODY, NOBODY)
    act(vault, object_id, Rekeyer(vault, RING))
    status = path.stat()
    assert (status.st_uid, status.st_gid) == (NOBODY, NOBODY)
    assert stat.S_IMODE(status.st_mode) == 0o440


def test_every_read_of_an_object_that_is_being_replaced_finds_it_whole(vault: Vault) -> None:
    object_id = put(vault, [OLD], b"picture" * 3_000)
    before = content_of(vault, object_id, OLD)
    ended = threading.Event()
    seen: list[Content] = []

    def keep_reading() -> None:
        while not ended.is_set():
            seen.append(content_of(vault, object_id, OLD, NEW))

    reader = threading.Thread(target=keep_reading)
    reader.start()
    try:
        with vault.replacing():
            for _ in range(20):
                Rekeyer(vault, KeySet((NEW, OLD))).rekey(object_id)
                Rekeyer(vault, KeySet((OLD, NEW))).rekey(object_id)
                Rekeyer(vault, KeySet((OLD, NEW))).reencrypt(object_id)
    finally:
        ended.set()
        reader.join()
    assert seen
    assert all(each == before for each in seen)


# -- sealing anew ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", EDGES)
@pytest.mark.parametrize("preview", [PREVIEW, b""])
def test_an_object_that_is_sealed_anew_holds_the_same_under_another_file_key(
    vault: Vault, size: int, preview: bytes
) -> None:
    object_id = put(vault, [OLD, BOB], os.urandom(size), preview=preview)
    before = content_of(vault, object_id, OLD)
    header, sections = header_of(vault, object_id), sections_of(vault, object_id)
    reencrypted(vault, object_id, Rekeyer(vault, KeySet((NEW, OLD), (ALICE,))))
    assert content_of(vault, object_id, NEW) == before
    assert content_of(vault, object_id, FIRST) == before
    after = sections_of(vault, object_id)
    assert slots_of(vault, object_id) == sorted([("key", NEW.key_id), ("recipient", ALICE.key_id)])
    # Whoever kept the old header, and the old key with it, has nothing that opens what is new.
    for head, rest, opener in (
        (header, after, OLD),
        (header_of(vault, object_id), sections, NEW),
    ):
        with pytest.raises(TamperedError):
            open_object(io.BytesIO(head.pack() + rest), [opener])


def test_fields_that_this_version_does_not_know_are_kept(vault: Vault) -> None:
    known = pack_meta(meta_for(9)).rstrip(b"\0")
    more = UNKNOWN_TAG.to_bytes(2, "big") + (5).to_bytes(4, "big") + b"later"
    packed = (known + more).ljust(1_024, b"\0")
    object_id = put(vault, [OLD], packed_meta=packed)
    reencrypted(vault, object_id, Rekeyer(vault, RING))
    assert content_of(vault, object_id, NEW) == Content(packed, PREVIEW, b"a picture")


def test_a_password_of_an_object_does_not_open_it_after_it_was_sealed_anew(vault: Vault) -> None:
    object_id = put(vault, [OLD, PASSWORD], passwords=PASSWORDS)
    reencrypted(vault, object_id, Rekeyer(vault, RING))
    assert slots_of(vault, object_id) == [("key", NEW.key_id)]


@pytest.mark.parametrize("harm", ["MAC", "META", "preview", "body", "end", "cut", "more"])
def test_a_damaged_object_is_not_sealed_anew(vault: Vault, harm: str) -> None:
    object_id = put(vault, [OLD], b"picture" * 30_000)
    header = header_of(vault, object_id)
    start = len(header.pack())
    behind = start + header.core.meta_len
    path = vault.object_path(object_id)
    places = {"MAC": start - 1, "META": start, "preview": behind}
    places |= {"body": behind + header.core.preview_len + 70_000, "end": -1}
    path.chmod(0o600)
    if harm == "cut":
        os.truncate(path, path.stat().st_size - 1)
    elif harm == "more":
        with path.open("ab") as file:
            file.write(b"m")
    else:
        damage(vault, object_id, places[harm])
    rekeyer = Rekeyer(vault, RING)
    check_refused(vault, object_id, lambda: reencrypted(vault, object_id, rekeyer), TamperedError)


# -- when replacing fails ----------------------------------------------------------------------


def corrupting(fault: str) -> Callable[[int, Any], None]:
    """A way of writing that goes wrong as disks and memory do."""

    def write(fd: int, pieces: Iterator[memoryview]) -> None:
        data = bytearray(b"".join(bytes(piece) for piece in pieces))
        if fault == "first":
            data[90] ^= 1
        elif fault == "last":
            data[-1] ^= 1
        elif fault == "short":
            del data[-1:]
        else:
            data += b"\0"
        os.write(fd, data)

    return write


@pytest.mark.parametrize("fault", ["first", "last", "short", "long"])
@pytest.mark.parametrize("act", [rekeyed, reencrypted])
def test_what_was_written_wrongly_never_replaces_an_object(
    vault: Vault, monkeypatch: pytest.MonkeyPatch, act: Callable[..., object], fault: str
) -> None:
    object_id = put(vault, [OLD])
    rekeyer = Rekeyer(vault, RING)
    monkeypatch.setattr("secimg_watch.rekey.write_pieces", corrupting(fault))
    check_refused(vault, object_id, lambda: act(vault, object_id, rekeyer), TamperedError)


@pytest.mark.parametrize("fault", ["one bit", "less", "more", "nothing"])
def test_a_copy_that_differs_never_replaces_an_object(
    vault: Vault, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    object_id = put(vault, [OLD], b"picture" * 300_000)

    def copy(source: int, start: int, target: int) -> None:
        data = bytearray(os.pread(source, 1 << 30, start))
        if fault == "one bit":
            data[-2] ^= 4
        changed = {"less": data[:-1], "more": data + b"\0", "nothing": bytearray()}
        os.write(target, changed.get(fault, data))

    monkeypatch.setattr("secimg_watch.kernel.copy_from", copy)
    rekeyer = Rekeyer(vault, RING)
    check_refused(vault, object_id, lambda: rekeyed(vault, object_id, rekeyer), TamperedError)


@pytest.mark.parametrize("fault", ["body", "preview", "META", "key"])
def test_a_new_object_that_opens_and_holds_something_else_never_replaces_the_old_one(
    vault: Vault, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    object_id = put(vault, [OLD])

    def seal(**given: Any) -> object:
        if fault == "body":
            given["read"] = io.BytesIO(b"another 1").readinto
        elif fault == "preview":
            given["preview"] = b"another"
        elif fault == "META":
            given["packed_meta"] = pack_meta(meta_for(9, b"b.jpg"))
        else:
            given["locks"] = [BOB]
        return seal_packed(**given)

    monkeypatch.setattr("secimg_watch.rekey.seal_packed", seal)
    rekeyer = Rekeyer(vault, RING)
    refusal = KeyMismatchError if fault == "key" else TamperedError
    check_refused(vault, object_id, lambda: reencrypted(vault, object_id, rekeyer), refusal)


@pytest.mark.parametrize("act", [rekeyed, reencrypted])
@pytest.mark.parametrize(
    ("code", "fault"),
    [(errno.ENOSPC, DiskFullError), (errno.EDQUOT, DiskFullError), (errno.EIO, StorageError)],
)
@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_system_that_fails_leaves_the_old_object(
    vault: Vault,
    monkeypatch: pytest.MonkeyPatch,
    act: Callable[..., object],
    call: str,
    code: int,
    fault: type[SecimgError],
) -> None:
    object_id = put(vault, [OLD])
    rekeyer = Rekeyer(vault, RING)

    def fail(*_args: object, **_more: object) -> None:
        raise OSError(code, os.strerror(code))

    def failing() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            if call == "rename":
                patch.setattr(os, "replace", fail)
            act(vault, object_id, rekeyer)

    refusal = fault if call == "fsync" else StorageError
    check_refused(vault, object_id, failing, refusal)


def test_the_reserve_stays_free_for_a_second_copy_too(vault: Vault) -> None:
    object_id = put(vault, [OLD])
    greedy = Vault(vault.path, Reserve(0.0, 1 << 62))
    for act in (Rekeyer(greedy, RING).rekey, Rekeyer(greedy, RING).reencrypt):
        with greedy.replacing():
            check_refused(vault, object_id, lambda act=act: act(object_id), DiskFullError)  # type: ignore[misc]


@pytest.mark.skipif(not can_mount(), reason="mounting takes root's privileges")
@pytest.mark.parametrize("foreseen", [True, False])
@pytest.mark.parametrize("act", [rekeyed, reencrypted])
def test_a_full_disk_leaves_the_old_object(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    act: Callable[..., object],
    foreseen: bool,  # noqa: FBT001 - a parameter
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    with mounted_tmpfs(small, "2m"):
        vault = a_vault(small / "vault", OLD)
        add_key(vault, NEW)
        large = put(vault, [OLD], os.urandom(600_000))
        with vault.replacing():
            pass
        (small / "filler").write_bytes(bytes(1_000_000))
        rekeyer = Rekeyer(vault, RING)
        with monkeypatch.context() as patch:
            if not foreseen:
                patch.setattr("secimg_watch.kernel.free_space", lambda _path: (1 << 40, 1 << 40))
            check_refused(vault, large, lambda: act(vault, large, rekeyer), DiskFullError)
        (small / "filler").unlink()
        act(vault, large, rekeyer)
        assert slots_of(vault, large) == [("key", NEW.key_id)]


def test_a_journal_that_cannot_be_written_stops_the_run(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    with vault.replacing(), Journal(vault, RING) as journal, monkeypatch.context() as patch:
        full = open("/dev/full", "wb", buffering=0)  # noqa: SIM115 - the journal's file from here
        patch.setattr(journal, "_file", full)
        with pytest.raises(NotReadyError, match="No space left"):
            journal.add(ObjectId("0" * 32), bytes(32))
        full.close()


# -- dying at every step -----------------------------------------------------------------------


@pytest.mark.parametrize("act", ["rekey", "reencrypt"])
def test_whenever_the_process_dies_the_object_is_there_and_opens(vault: Vault, act: str) -> None:
    object_id = put(vault, [OLD], b"picture" * 20_000)
    before = content_of(vault, object_id, OLD)
    backup = raw(vault, object_id)
    states = set()
    number = 1
    rekeyer = Rekeyer(vault, RING)

    def work() -> None:
        with vault.replacing():
            getattr(rekeyer, act)(object_id)

    while die_at_call(number, work):
        [(_, key_id)] = slots_of(vault, object_id)
        opener = NEW if key_id == NEW.key_id else OLD
        assert content_of(vault, object_id, opener) == before
        states.add((opener is NEW, bool(left_aside(vault))))
        path = vault.object_path(object_id)
        path.chmod(0o600)
        path.write_bytes(backup)
        number += 1
    assert content_of(vault, object_id, NEW) == before
    assert left_aside(vault) == []
    assert states == {(False, False), (False, True), (True, False)}


# -- alone -------------------------------------------------------------------------------------


def test_one_process_at_a_time_replaces_objects(vault: Vault) -> None:
    other = Vault(vault.path, NO_RESERVE)
    with vault.replacing():
        with pytest.raises(AlreadyRunningError), other.replacing():
            pass
        vault.lock()  # whoever seals is not kept from it
        vault.unlock()
    with other.replacing():
        pass


def test_what_an_earlier_run_left_unfinished_goes_and_nothing_else(vault: Vault) -> None:
    object_id = put(vault, [OLD])
    with vault.replacing():
        pass
    aside = vault.path / "rekey"
    (aside / f"{object_id}.simg").write_bytes(b"half an object")
    (aside / f"{object_id}.simg").chmod(0o400)
    (aside / "notes").write_bytes(b"")
    with vault.replacing():
        assert left_aside(vault) == []
    assert sorted(os.listdir(aside)) == ["lock", "notes"]
    assert stat.S_IMODE(aside.stat().st_mode) == 0o700
    assert vault.has(object_id)


def test_whoever_is_refused_removes_nothing_of_the_one_at_work(vault: Vault) -> None:
    with vault.replacing():
        half = vault.path / "rekey" / f"{'0' * 32}.simg"
        half.write_bytes(b"half an object")
        with pytest.raises(AlreadyRunningError), Vault(vault.path, NO_RESERVE).replacing():
            pass
        assert half.exists()


def test_the_place_is_free_again_after_an_error(vault: Vault) -> None:
    with pytest.raises(RuntimeError), vault.replacing():
        raise RuntimeError
    with vault.replacing():
        pass


def test_a_vault_that_may_not_be_written_says_so() -> None:
    with ordinary_folder() as folder, without_privileges():
        vault = a_vault(folder / "vault", OLD)
        vault.path.chmod(0o500)
        with pytest.raises(NotAllowedError), vault.replacing():
            pass
        vault.path.chmod(0o700)


@pytest.mark.skipif(not can_mount(), reason="mounting takes root's privileges")
def test_a_vault_that_has_no_room_for_its_lock_is_full(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    with mounted_tmpfs(small, "2m,nr_inodes=270"):
        vault = a_vault(small / "vault", OLD)
        for number in range(270):
            try:
                (small / str(number)).touch()
            except OSError:
                break
        with pytest.raises(DiskFullError), vault.replacing():
            pass
