"""The audit log on disk: who may write at once, what a crash leaves, and what is believed."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from path_builders import IS_ROOT, NOBODY, can_mount, mounted_tmpfs, only_on_linux
from rekey_builders import die_at_call, quick_directory

from secimg_watch import audit, chain, kernel
from secimg_watch.audit import HEAD_NAME, LOG_NAME, Audit, Event, timestamp, verify_log
from secimg_watch.errors import DiskFullError, NoInputError, NotReadyError
from secimg_watch.keys import generate
from secimg_watch.recipients import generate_identity, recipient_of
from secimg_watch.records import KeySet

only_on_linux()
assert sys.platform == "linux"

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from secimg_watch.chain import Findings

KEY, NEW, STRANGER = generate(), generate(), generate()
OWNER = generate_identity()
KEYS = KeySet((KEY,), (recipient_of(OWNER),))
WRITE_ONLY = KeySet((), (recipient_of(OWNER),))
STARTED: Final = Event("started", {"version": "1"})
SECOND_PROCESS: Final = """
import sys
from pathlib import Path
from secimg_watch.audit import Audit, Event
from secimg_watch.records import KeyEncryptionKey, KeySet
key = KeyEncryptionKey(*map(bytes.fromhex, sys.argv[2:4]))
log = Audit(Path(sys.argv[1]), KeySet((key,)))
for number in range(int(sys.argv[4])):
    log.append([Event("second", {"number": number})], durable=number % 3 == 0)
log.close()
"""


@pytest.fixture
def state() -> Iterator[Path]:
    with quick_directory() as place:
        yield place / "state"


@contextlib.contextmanager
def opened(state: Path, keys: KeySet = KEYS) -> Iterator[Audit]:
    log = Audit(state, keys)
    try:
        yield log
    finally:
        log.close()


def run(state: Path, *numbers: int, keys: KeySet = KEYS, durable: bool = True) -> None:
    """A process that starts, says some things, and ends."""
    with opened(state, keys) as log:
        log.append([STARTED], durable=True)
        for number in numbers:
            log.append([Event("sealed", {"object": f"{number:032x}"})], durable=durable)


def verified(state: Path) -> Findings:
    return verify_log(state, (KEY, NEW))


def log_of(state: Path) -> bytes:
    return (state / LOG_NAME).read_bytes()


def lines_of(state: Path) -> list[bytes]:
    return log_of(state).splitlines(keepends=True)


def head_of(state: Path) -> bytes:
    return (state / HEAD_NAME).read_bytes()


def put(state: Path, data: bytes, head: bytes | None) -> None:
    """Lay out a log and its head, as somebody may who can write there."""
    (state / LOG_NAME).write_bytes(data)
    if head is None:
        (state / HEAD_NAME).unlink(missing_ok=True)
    else:
        (state / HEAD_NAME).write_bytes(head)


# -- writing -------------------------------------------------------------------------------------


def test_the_files_are_their_owners_alone(state: Path) -> None:
    run(state, 1)
    for name in (LOG_NAME, HEAD_NAME):
        assert stat.S_IMODE((state / name).stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700


@pytest.mark.skipif(not IS_ROOT, reason="only root can give files away")
def test_what_an_administrator_begins_belongs_to_the_services_user(state: Path) -> None:
    state.mkdir(mode=0o700)
    os.chown(state, NOBODY, NOBODY)
    run(state, 1)
    for name in (LOG_NAME, HEAD_NAME):
        assert (state / name).stat().st_uid == NOBODY


@pytest.mark.skipif(not IS_ROOT, reason="only root can give files away")
@pytest.mark.parametrize("name", [LOG_NAME, HEAD_NAME])
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_no_file_of_roots_is_given_away_or_written_through_a_link(
    state: Path, name: str, link: Callable[[Path, Path], None]
) -> None:
    state.mkdir(mode=0o700)
    os.chown(state, NOBODY, NOBODY)
    precious = state.parent / "shadow"
    precious.write_bytes(b"")
    link(precious, state / name)
    with pytest.raises(NotReadyError, match="the audit log cannot be written"):
        Audit(state, KEYS)
    assert precious.read_bytes() == b""
    assert precious.stat().st_uid == 0


@pytest.mark.skipif(not IS_ROOT, reason="only root can give files away")
def test_a_file_with_something_in_it_keeps_its_owner(state: Path) -> None:
    run(state, 1)
    os.chown(state, NOBODY, NOBODY)
    run(state, 2)
    assert (state / LOG_NAME).stat().st_uid == 0


def test_a_pipe_in_its_place_is_refused_at_once(state: Path) -> None:
    state.mkdir()
    os.mkfifo(state / LOG_NAME)
    with pytest.raises(NotReadyError, match="is not a file of its own"):
        Audit(state, KEYS)


def test_nothing_is_written_for_nothing(state: Path) -> None:
    with opened(state) as log:
        log.append([], durable=True)
        log.flush()
    assert log_of(state) == b""


def test_the_first_entry_begins_an_epoch_and_the_head_names_the_last(state: Path) -> None:
    run(state, 1, 2)
    events = [entry.event for entry in audit.events_of(lines_of(state))]
    assert events == ["epoch", "started", "sealed", "sealed"]
    head = chain.Head.parse(head_of(state))
    assert head is not None
    assert (head.number, head.end, head.epoch) == (4, len(log_of(state)), 0)
    assert verified(state).faults == []


def test_a_later_process_goes_on_where_the_one_before_was(state: Path) -> None:
    run(state, 1)
    before = log_of(state)
    run(state, 2)
    assert log_of(state).startswith(before)
    found = verified(state)
    assert (found.faults, found.events) == ([], {"epoch": 1, "started": 2, "sealed": 2})


def test_the_head_lags_behind_what_is_not_synced_and_catches_up(state: Path) -> None:
    with opened(state) as log:
        log.append([STARTED], durable=True)
        before = head_of(state)
        log.append([Event("deleted")], durable=False)
        assert head_of(state) == before
        assert verified(state).faults == []
        log.flush()
        assert head_of(state) != before
        log.append([Event("deleted")], durable=False)
    head = chain.Head.parse(head_of(state))
    assert head is not None
    assert head.number == 4


def test_the_order_is_log_then_head(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def spy(module: object, name: str) -> None:
        real = getattr(module, name)

        def called(*args: object) -> object:
            calls.append(name)
            return real(*args)

        monkeypatch.setattr(module, name, called)

    with opened(state) as log:
        log.append([STARTED], durable=True)
        spy(kernel, "write_all")
        spy(os, "fsync")
        spy(kernel, "write_at")
        log.append([Event("sealed")], durable=True)
    assert calls[:3] == ["write_all", "fsync", "write_at"]


def test_threads_may_write_at_once(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = kernel.write_all

    def slowly(fd: int, data: bytes) -> None:
        time.sleep(0)  # lets another thread in, if there is nothing to keep it out
        real(fd, data)

    monkeypatch.setattr(kernel, "write_all", slowly)
    with opened(state) as log:

        def write(who: int) -> None:
            for number in range(20):
                said: dict[str, str | int] = {"who": who, "number": number}
                log.append([Event("said", said)] * 2, durable=number % 5 == 0)

        threads = [threading.Thread(target=write, args=(who,)) for who in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = verified(state)
    assert (found.faults, found.events["said"]) == ([], 160)
    said = [entry for entry in audit.events_of(lines_of(state)) if entry.event == "said"]
    for who in range(4):
        numbers = [entry.fields["number"] for entry in said if entry.fields["who"] == who]
        assert numbers == sorted(numbers)


def test_processes_may_write_at_once(state: Path) -> None:
    words = [sys.executable, "-c", SECOND_PROCESS, str(state), KEY.key_id.hex(), KEY.key.hex()]
    with opened(state, KeySet((KEY,))) as log, subprocess.Popen([*words, "60"]) as other:
        number = 0
        while other.poll() is None:
            log.append([Event("first", {"number": number})], durable=number % 3 == 0)
            number += 1
            time.sleep(0.001)
    assert other.returncode == 0
    found = verified(state)
    assert (found.faults, found.notes) == ([], [])
    assert (found.events["first"], found.events["second"]) == (number, 60)
    assert found.events["epoch"] == 1


def test_a_process_that_holds_the_lock_for_long_is_not_waited_for(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "_PATIENCE", 0.01)
    with opened(state) as log, opened(state) as other:
        log.append([STARTED], durable=True)
        busy = pytest.raises(NotReadyError, match="another process holds its lock")
        with kernel.locked(other._log, 1.0), busy:
            log.append([Event("sealed")], durable=True)
        log.append([Event("sealed")], durable=True)
    assert verified(state).faults == []


def test_a_closed_log_writes_nowhere(state: Path) -> None:
    log = Audit(state, KEYS)
    log.append([STARTED], durable=True)
    log.close()
    others = [(state / name).open("wb", buffering=0) for name in ("a", "b", "c")]
    with pytest.raises(NotReadyError):
        log.append([STARTED], durable=True)
    log.close()
    for other in others:
        other.close()
    assert {path.stat().st_size for path in map(state.joinpath, "abc")} == {0}


def test_moments_are_shown_in_utc_to_the_millisecond() -> None:
    assert timestamp(1_763_938_476_123_999_999) == "2025-11-23T22:54:36.123Z"
    assert timestamp(0) == "1970-01-01T00:00:00.000Z"


def test_a_clock_that_was_set_back_does_no_harm(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(state, 1)
    monkeypatch.setattr(time, "time_ns", lambda: 5_000_000_000)
    run(state, 2)
    found = verified(state)
    assert found.faults == []
    assert found.last == "1970-01-01T00:00:05.000Z"


# -- keys that change ----------------------------------------------------------------------------


def test_a_service_that_knows_only_the_former_key_goes_on_and_nothing_is_lost_by_it(
    state: Path,
) -> None:
    ring = [KEY]
    for _ in range(3):  # three rotations by the book, each with a reload and a retirement
        before, new = tuple(ring), generate()
        with opened(state, KeySet(before)) as service:
            service.append([STARTED], durable=True)
            run(state, keys=KeySet((new, *before)))  # key rotate
            service.append([Event("sealed")], durable=True)
            service.append([Event("stopped")], durable=True)
        with opened(state, KeySet((new, *before))) as service:
            service.append([STARTED], durable=True)
            run(state, keys=KeySet((new, *before)))  # vault rekey
            service.append([Event("stopped")], durable=True)
        run(state, keys=KeySet((new, *before)))  # key retire
        ring = [new]
        run(state, keys=KeySet((new,)))
        found = verify_log(state, ring)
        assert found.faults == []
    assert found.events["sealed"] == 3


def test_a_new_recipient_opens_what_comes_after(state: Path) -> None:
    run(state, 1, keys=KeySet((KEY,)))
    run(state, 2, keys=KEYS)
    assert verify_log(state, (KEY,)).faults == []
    assert verify_log(state, (), (OWNER,)).faults == []  # by the former key in the new epoch
    assert verify_log(state, (KEY,)).events["epoch"] == 2


def test_who_is_no_recipient_and_has_no_key_proves_nothing(state: Path) -> None:
    run(state, 1)
    for keys, identities in (((STRANGER,), ()), ((), ()), ((), (generate_identity(),))):
        faults = verify_log(state, keys, identities).faults
        assert faults[0].startswith("no key at hand opens the entries from 1 on")


def test_a_write_only_machine_begins_an_epoch_at_each_start_and_forgets_its_key(
    state: Path,
) -> None:
    for number in range(3):
        run(state, number, keys=WRITE_ONLY)
    found = verify_log(state, (), (OWNER,))
    assert (found.faults, found.events["epoch"]) == ([], 3)
    with opened(state, WRITE_ONLY) as log:
        log.append([STARTED], durable=True)
        run(state, 7, keys=WRITE_ONLY)  # a command, beside it
        log.append([Event("sealed")], durable=True)
    found = verify_log(state, (), (OWNER,))
    assert (found.faults, found.events["epoch"]) == ([], 6)


def test_a_machine_may_become_write_only_and_be_given_a_key_again(state: Path) -> None:
    run(state, 1)
    run(state, 2, keys=WRITE_ONLY)
    assert verify_log(state, (), (OWNER,)).faults == []
    run(state, 3)
    faults = verify_log(state, (KEY,), (OWNER,)).faults
    assert all("open with a private key alone" in fault for fault in faults)
    assert len(faults) == 1


# -- what a crash leaves -------------------------------------------------------------------------


def test_a_line_torn_at_any_byte_is_accounted_for(state: Path) -> None:
    run(state, 1)
    whole, head = log_of(state), head_of(state)
    with opened(state) as log:
        log.append([STARTED], durable=False)
        line = log_of(state)[len(whole) :]
    for cut in range(len(line) + 1):
        put(state, whole + line[:cut], head)
        assert verified(state).faults == []
        run(state)
        found = verified(state)
        assert found.faults == []
        assert len(found.notes) == (0 < cut < len(line))
        assert found.events["started"] == 2 + (cut == len(line))


@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 900)), max_size=3), st.data())
@settings(max_examples=40, deadline=None)
def test_any_part_of_what_was_not_synced_may_be_gone(
    holes: list[tuple[int, int]], data: st.DataObject
) -> None:
    with quick_directory() as place:
        state = place / "state"
        with opened(state) as log:
            log.append([STARTED], durable=True)
            covered = len(log_of(state))
            head = head_of(state)
            for number in range(12):
                log.append([Event("deleted", {"object": f"{number:032x}"})], durable=False)
            left = bytearray(log_of(state))
        for start, size in holes:
            end = min(len(left), covered + start + size)
            left[covered + start : end] = bytes(max(0, end - covered - start))
        left = left[: data.draw(st.integers(covered, len(left)))]
        put(state, bytes(left), head)
        assert verified(state).faults == []
        run(state, 1)
        run(state, 2)
        assert verified(state).faults == []


def test_it_may_be_killed_at_any_call(state: Path) -> None:
    run(state, 1)
    number = 0
    killed = True
    while killed:
        number += 1
        killed = die_at_call(number, lambda: run(state, 2, 3))
        assert verified(state).faults == []
    run(state, 4)
    found = verified(state)
    assert (found.faults, found.notes) == ([], [])
    assert found.events["sealed"] > 4
    assert number > 8


def test_it_may_be_killed_at_any_call_of_the_very_first_start(state: Path) -> None:
    number = 0
    killed = True
    while killed:
        number += 1
        shutil.rmtree(state, ignore_errors=True)
        killed = die_at_call(number, lambda: run(state, 1))
        run(state, 2)
        found = verified(state)
        assert (found.faults, found.notes) == ([], []), number
    assert number > 8


def test_it_may_be_killed_while_it_says_what_a_crash_left(state: Path) -> None:
    run(state, 1)
    torn, head = log_of(state) + b'{"n":4,"ti', head_of(state)
    for keys in (KEYS, KeySet((NEW, KEY))):  # one of them begins an epoch there
        number = 0
        killed = True
        while killed:
            number += 1
            put(state, torn, head)
            killed = die_at_call(number, functools.partial(run, state, 2, keys=keys))
            run(state, 3, keys=keys)
            found = verified(state)
            assert (found.faults, len(found.notes)) == ([], 1), number


# -- a disk that is full -------------------------------------------------------------------------


def test_a_full_disk_is_said_and_ends_without_a_trace(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = kernel.write_all
    rooms = [0, 5, 60, 0]

    def write_all(fd: int, data: bytes) -> None:
        real(fd, data[: rooms.pop()])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with opened(state) as log:
        log.append([STARTED], durable=True)
        monkeypatch.setattr(kernel, "write_all", write_all)
        while rooms:
            with pytest.raises(DiskFullError, match="cannot be written: No space left"):
                log.append([Event("sealed")], durable=True)
            assert verified(state).faults == []
        monkeypatch.undo()
        log.append([Event("sealed")], durable=True)
    found = verified(state)
    assert (found.faults, found.events["sealed"]) == ([], 1)
    assert found.notes == ["a crash left a torn line before entry 3"]


def test_a_disk_that_is_full_for_real(tmp_path: Path) -> None:
    if not can_mount():
        pytest.skip("only root can mount")
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted_tmpfs(disk, "64k"):
        state = disk / "state"
        with opened(state) as log:
            log.append([STARTED], durable=True)
            filler = disk / "filler"
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            full = [Event("sealed", {"reason": "x" * 1000})] * 70
            with pytest.raises(DiskFullError):
                log.append(full, durable=True)
            assert verified(state).faults == []
            filler.unlink()
            log.append([Event("deleted")], durable=True)
        found = verified(state)
        assert (found.faults, found.events["deleted"]) == ([], 1)


def test_a_file_that_may_not_grow_is_no_signal(state: Path) -> None:
    run(state, 1)
    size = len(log_of(state))
    child = (
        "import resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size + 50}, {size + 50}))\n" + SECOND_PROCESS
    )
    words = [sys.executable, "-c", child, str(state), KEY.key_id.hex(), KEY.key.hex(), "1"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "NotReadyError: the audit log cannot be written: File too large" in done.stderr
    run(state, 2)
    found = verified(state)
    assert (found.faults, len(found.notes)) == ([], 1)


# -- a log or a head that is not what it was -----------------------------------------------------

HEADS: Final[dict[str, Callable[[bytes], bytes | None]]] = {
    "lost": lambda _head: None,
    "emptied": lambda _head: b"",
    "zeros": lambda head: bytes(len(head)),
    "garbage": lambda head: os.urandom(len(head)),
    "cut": lambda head: head[:100],
    "changed": lambda head: b"%015d" % 3 + head[15:],
    "forged": lambda head: head[:-65] + b"0" * 64 + b"\n",
}


@pytest.mark.parametrize("how", HEADS)
def test_a_head_that_is_not_what_it_was_is_a_fault_for_good(state: Path, how: str) -> None:
    run(state, 1, 2)
    put(state, log_of(state), HEADS[how](head_of(state)))
    assert verified(state).faults
    run(state, 3)
    found = verified(state)
    assert found.faults == ["entries were lost before entry 5: nobody knows how many"]
    assert found.events["sealed"] == 3
    run(state, 4)
    assert verified(state).faults == found.faults


def test_what_stands_behind_a_head_does_not_matter(state: Path) -> None:
    run(state, 1)
    put(state, log_of(state), head_of(state) + b"junk")
    assert verified(state).faults == []
    run(state, 2)
    assert verified(state).faults == []


def test_an_older_head_is_gone_on_from(state: Path) -> None:
    run(state, 1)
    older = head_of(state)
    run(state, 2, 3)
    put(state, log_of(state), older)
    assert verified(state).faults == []
    run(state, 4)
    found = verified(state)
    assert (found.faults, found.events["sealed"]) == ([], 4)


def test_a_head_from_another_life_of_the_same_log_is_a_fault(state: Path) -> None:
    run(state, 1)
    before = log_of(state), head_of(state)
    run(state, 2)
    other = head_of(state)
    put(state, *before)
    run(state, 3)
    assert verified(state).faults == []  # which is what nobody can see on this machine
    put(state, log_of(state), other)
    assert verified(state).faults == ["entry 5 is not the one that a head names"]


def test_a_log_that_was_removed_is_a_fault_for_good(state: Path) -> None:
    run(state, 1)
    (state / LOG_NAME).unlink()
    with pytest.raises(NoInputError, match="there is no audit log"):
        verified(state)
    run(state, 2)
    assert verified(state).faults == ["entries were lost before entry 1: nobody knows how many"]


def test_a_log_in_another_logs_place_is_a_fault(state: Path) -> None:
    other = state.parent / "other"
    run(state, 1)
    run(other, 2, 3)
    shutil.copy(other / LOG_NAME, state / LOG_NAME)
    assert verified(state).faults
    run(state, 4)
    assert verified(state).faults


def test_a_log_that_was_cut_says_how_many_entries_are_gone(state: Path) -> None:
    run(state, *range(5))
    lines = lines_of(state)
    put(state, b"".join(lines[:4]), head_of(state))
    assert verified(state).faults == ["entry 4 is the last, and a head names entry 7"]
    run(state)
    assert verified(state).faults == ["entries were lost before entry 5: 3"]


def planted_epoch(number: int, previous: bytes, lock: object = STRANGER) -> tuple[bytes, bytes]:
    """The first line of an epoch that anybody can make, and its MAC."""
    epoch = chain.Epoch.begin([lock])  # type: ignore[list-item]
    fields = epoch.fields(None)
    return chain.write_entry(number, "t", chain.EPOCH, fields, epoch=epoch, previous=previous)


def mac_of(line: bytes) -> bytes:
    entry = chain.parse_entry(line)
    assert entry is not None
    return entry.mac


def test_a_log_without_an_epoch_is_not_taken_for_one(state: Path) -> None:
    run(state, 1)
    lines = [b'{"n":%d,"time":"t","event":"sealed","mac":"%064x"}\n' % (n, n) for n in range(1, 9)]
    data = b"".join(lines)
    put(state, data, chain.Head(8, mac_of(lines[7]), len(data), 0, bytes(32)).pack())
    assert verified(state).faults
    run(state, 2)
    assert verified(state).faults


@pytest.mark.parametrize("epoch_at", [0, 7, 10**12])
def test_a_cut_log_with_a_head_to_match_is_not_believed(state: Path, epoch_at: int) -> None:
    run(state, *range(8))
    kept = lines_of(state)[:5]
    data = b"".join(kept)
    put(state, data, chain.Head(5, mac_of(kept[4]), len(data), epoch_at, bytes(32)).pack())
    assert verified(state).faults
    run(state, 9)
    assert verified(state).faults
    run(state, 10)
    assert verified(state).faults


@pytest.mark.parametrize("is_removed", [True, False])
@pytest.mark.parametrize("lock", [STRANGER, recipient_of(OWNER)], ids=["key", "public key"])
@pytest.mark.parametrize("number", [6, 99])
def test_an_epoch_that_anybody_can_begin_vouches_for_nothing(
    state: Path, number: int, lock: object, *, is_removed: bool
) -> None:
    run(state, *range(8))
    kept = lines_of(state)[:5]
    planted, mac = planted_epoch(number, mac_of(kept[4]), lock)
    data = b"".join(kept)
    last = (6, mac) if number == 6 else (5, mac_of(kept[4]))
    head = chain.Head(*last, len(data) + len(planted), len(data), bytes(32))
    put(state, data + planted, head.pack())
    assert verified(state).faults
    run(state, 9)
    if is_removed:  # when it has served
        (state / LOG_NAME).write_bytes(log_of(state).replace(planted, b""))
        run(state, 10)
    assert verified(state).faults
    assert verify_log(state, (KEY,), (OWNER,)).faults


def test_a_whole_log_forged_with_a_public_key_is_no_proof_where_there_is_a_key(
    state: Path,
) -> None:
    run(state, keys=WRITE_ONLY)
    for keys, identities in (((KEY,), ()), ((KEY,), (OWNER,))):
        assert verify_log(state, keys, identities).faults
    run(state, 1)
    for keys, identities in (((KEY,), ()), ((KEY,), (OWNER,))):
        assert verify_log(state, keys, identities).faults


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_no_restart_makes_a_change_good(data: st.DataObject) -> None:
    with quick_directory() as place:
        state = place / "state"
        run(state, *range(4))
        lines, head = lines_of(state), head_of(state)
        # Cut back to what a first start writes, with no head, it is as if all was removed.
        at = data.draw(st.integers(chain.FIRST + 1, 4))
        changed = [*lines[:at], lines[at].replace(b"object", b"objecT"), *lines[at + 1 :]]
        made = data.draw(
            st.sampled_from([changed, lines[:at] + lines[at + 1 :], lines[:at], lines[at:]])
        )
        new_head = HEADS[data.draw(st.sampled_from(sorted(HEADS)))](head)
        put(state, b"".join(made), data.draw(st.sampled_from([head, new_head])))
        for number in range(data.draw(st.integers(1, 2))):
            run(state, number)
        if data.draw(st.booleans()):  # and then what could give it away is taken out again
            kept = [line for line in lines_of(state) if b'"lost"' not in line]
            (state / LOG_NAME).write_bytes(b"".join(kept))
        assert verified(state).faults


@pytest.mark.parametrize("size", [1, 200_000])
@pytest.mark.parametrize("kind", ["binary", "zeros", "lines", "hostile"])
def test_garbage_behind_the_last_entry_stops_nothing(state: Path, kind: str, size: int) -> None:
    run(state, 1)
    hostile = b'{"n":1,"time":"","event":"epoch","n":"x","mac":"' + b"0" * 64 + b'"}\n'
    piece = {"binary": os.urandom(97), "zeros": bytes(64), "lines": b"\n", "hostile": hostile}
    garbage = (piece[kind] * (size // len(piece[kind]) + 1))[:size]
    put(state, log_of(state) + garbage, head_of(state))
    run(state, 2)
    found = verified(state)
    assert (found.faults, found.events["sealed"]) == ([], 2)


@pytest.mark.parametrize("number", [b"9" * 15, b"1" + b"0" * 14])
def test_a_number_that_leaves_no_room_for_the_next_is_not_taken_up(
    state: Path, number: bytes
) -> None:
    run(state, 1)
    planted = b'{"n":%s,"time":"t","event":"x","mac":"%064x"}\n' % (number, 0)
    put(state, log_of(state) + planted, b"")
    run(state, 2)
    run(state, 3)
    found = verified(state)
    assert found.faults == ["entries were lost before entry 4: nobody knows how many"]
    assert found.events["sealed"] == 3


def test_a_log_without_a_usable_head_is_not_read_from_its_beginning(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(state, 1)
    first, *rest = lines_of(state)
    put(state, first + b"".join(rest) * 10_000, b"")
    looks = 0
    real = chain.parse_entry

    def counting(line: bytes) -> chain.Entry | None:
        nonlocal looks
        looks += 1
        return real(line)

    monkeypatch.setattr(chain, "parse_entry", counting)
    run(state, 2)
    assert looks < 3 * chain.MAX_LINE / len(rest[0])


# -- a log that is changed while it is written ---------------------------------------------------


def test_a_log_that_is_put_back_under_the_writers_hands_is_noticed(state: Path) -> None:
    with opened(state) as log:
        log.append([STARTED], durable=True)
        before = log_of(state), head_of(state)
        for _ in range(5):
            log.append([Event("sealed")], durable=True)
        put(state, *before)
        log.append([Event("sealed")], durable=True)
    assert verified(state).faults == ["entries were lost before entry 3: 5"]


@pytest.mark.parametrize("names", [(LOG_NAME,), (HEAD_NAME,), (LOG_NAME, HEAD_NAME)])
def test_files_that_are_moved_away_while_it_runs_are_made_anew(
    state: Path, names: tuple[str, ...]
) -> None:
    with opened(state) as log:
        log.append([STARTED], durable=True)
        for name in names:
            (state / name).rename(state / f"{name}.1")
        log.append([Event("sealed")], durable=True)
        log.append([Event("sealed")], durable=True)
    assert log_of(state).count(b'"sealed"') == 2
    found = verified(state)
    cut = LOG_NAME in names
    assert found.faults == (["entries were lost before entry 1: 2"] if cut else [])


def test_a_directory_in_its_place_is_a_fault_until_it_is_gone(state: Path) -> None:
    with opened(state) as log:
        log.append([STARTED], durable=True)
        (state / LOG_NAME).rename(state / "aside")
        (state / LOG_NAME).mkdir()
        for _ in range(2):
            with pytest.raises(NotReadyError, match="cannot be written: Is a directory"):
                log.append([Event("sealed")], durable=True)
        (state / LOG_NAME).rmdir()
        (state / "aside").rename(state / LOG_NAME)
        log.append([Event("sealed")], durable=True)
    found = verified(state)
    assert (found.faults, found.events["sealed"]) == ([], 1)


def test_what_is_appended_by_others_is_accounted_for(state: Path) -> None:
    with opened(state) as log:
        log.append([STARTED], durable=True)
        with (state / LOG_NAME).open("ab") as file:
            file.write(b"echo was here")
        log.append([Event("sealed")], durable=True)
    found = verified(state)
    assert (found.faults, len(found.notes)) == ([], 1)


@pytest.mark.parametrize("keys", [KEYS, WRITE_ONLY], ids=["key", "write-only"])
def test_a_last_line_that_looks_like_a_beginning_makes_no_cut_good(
    state: Path, keys: KeySet
) -> None:
    run(state, *range(8), keys=keys)
    planted = b'{"n":1,"time":"t","event":"x","mac":"%064x"}\n' % 0
    put(state, b"".join(lines_of(state)[:5]) + planted, None)
    for number in range(40):
        run(state, number, keys=keys)
    assert verify_log(state, keys.ring, (OWNER,)).faults


@pytest.mark.parametrize("keys", [KEYS, WRITE_ONLY], ids=["key", "write-only"])
def test_a_head_in_the_name_of_a_key_that_nobody_has_makes_no_cut_good(
    state: Path, keys: KeySet
) -> None:
    run(state, *range(8), keys=keys)
    data = b"".join(lines_of(state)[:5])
    planted, _ = planted_epoch(7, chain.START)
    # In the middle of a line, so that nobody who reads lines ever meets that epoch.
    put(
        state, data + b"x" + planted, chain.Head(0, chain.START, 0, len(data) + 1, bytes(32)).pack()
    )
    for number in range(3):
        run(state, number, keys=keys)
    assert verify_log(state, keys.ring, (OWNER,)).faults


@pytest.mark.parametrize("fill", [b"", b"\0", b"x"])
def test_of_the_very_first_head_a_power_cut_may_leave_anything(state: Path, fill: bytes) -> None:
    run(state)
    put(state, log_of(state), fill * chain.HEAD_SIZE)
    run(state, 1)
    assert verified(state).faults == []
