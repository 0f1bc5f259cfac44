"""The audit log as bytes: what is done to it without its key shows, and a crash is no fault."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from secimg_watch.chain import (
    EPOCH,
    FIRST,
    HEAD_SIZE,
    MAX_FAULTS,
    MAX_LINE,
    TORN,
    Debris,
    End,
    Epoch,
    Head,
    check,
    follow,
    parse_entry,
    write_entry,
)
from secimg_watch.errors import KeyMismatchError, TamperedError
from secimg_watch.keys import generate
from secimg_watch.recipients import generate_identity, recipient_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from secimg_watch.chain import Entry, Findings
    from secimg_watch.slots import Lock, Opener

OLD, NEW, STRANGER = generate(), generate(), generate()
OWNER = generate_identity()
OWNERS_LOCK = recipient_of(OWNER)
TIME: Final = "2026-11-23T22:54:36.123Z"


@dataclass
class Book:
    """A log in memory, written as the service writes one. ``covered``: bytes up to the head's."""

    data: bytes = b""
    head: bytes = b""
    covered: int = 0
    end: End = field(default_factory=End)

    def begin(self, *locks: Lock, link: bool = True) -> None:
        """Begin an epoch, as who can open the one before, or as who cannot."""
        epoch = Epoch.begin(locks)
        former = self.end.epoch if link else None
        said = epoch.fields(former)
        if former is None and self.head:
            said["head"] = self.head.decode()
        self._write(EPOCH, said, epoch)

    def say(self, event: str = "sealed", **fields: str | int) -> None:
        """Write an entry."""
        assert self.end.epoch is not None
        self._write(event, fields, self.end.epoch)

    def _write(self, event: str, fields: dict[str, str | int], epoch: Epoch) -> None:
        end = self.end
        line, mac = write_entry(end.number + 1, TIME, event, fields, epoch=epoch, previous=end.mac)
        self.data += line
        epoch_at = end.size if event == EPOCH else end.epoch_at
        self.end = End(end.number + 1, mac, len(self.data), epoch, epoch_at)

    def tear(self, torn: bytes) -> None:
        """What a crash left behind the last entry, and the entry that says so."""
        debris = Debris()
        debris.add(torn + b"\n")
        self.data += torn + b"\n"
        self.end = replace(self.end, size=len(self.data))
        self.say(TORN, **debris.fields(0))

    def sync(self) -> None:
        """Write the head."""
        end = self.end
        assert end.epoch is not None
        self.head = Head(end.number, end.mac, end.size, end.epoch_at).sealed(end.epoch).pack()
        self.covered = len(self.data)

    def lines(self) -> list[bytes]:
        return self.data.splitlines(keepends=True)


def checked(
    data: bytes,
    head: bytes | None,
    keys: Sequence[Opener] = (NEW, OLD),
    identities: Sequence[Opener] = (),
) -> Findings:
    return check(lambda: data.splitlines(keepends=True), head, keys, identities)


def small_book(entries: int = 5) -> Book:
    book = Book()
    book.begin(OLD)
    for number in range(entries - 1):
        book.say(object=f"{number:032x}")
    book.sync()
    return book


STEPS: Final[dict[str, Callable[[Book], None]]] = {
    "say": lambda book: book.say(object="0" * 32),
    "say something else": lambda book: book.say("deleted", reason="ö\n\x7f\ud800"),
    "sync": Book.sync,
    "rotate": lambda book: book.begin(NEW, OLD),
    "recipient": lambda book: book.begin(NEW, OWNERS_LOCK),
    "tear": lambda book: book.tear(b'{"n":3,"time":"2026'),
    "tear binary": lambda book: book.tear(bytes(range(256))),
}


@st.composite
def books(draw: st.DrawFn) -> Book:
    """A log of several epochs, synced here and there."""
    book = small_book(3)
    for step in draw(st.lists(st.sampled_from(sorted(STEPS)), max_size=6)):
        STEPS[step](book)
    if draw(st.booleans()):
        book.sync()
    return book


@st.composite
def write_only_books(draw: st.DrawFn) -> Book:
    """A log of a machine without a key: each process begins an epoch, and forgets its key."""
    book = Book()
    for _ in range(draw(st.integers(1, 3))):
        book.begin(OWNERS_LOCK, link=False)
        book.say("started")
        book.sync()
        for _ in range(draw(st.integers(0, 3))):
            book.say()
    return book


# -- as it was written ---------------------------------------------------------------------------


@given(books())
@settings(max_examples=40, deadline=None)
def test_a_log_as_it_was_written_has_no_fault(book: Book) -> None:
    found = checked(book.data, book.head)
    assert found.faults == []
    assert (found.entries, found.mac) == (book.end.number, book.end.mac.hex())
    assert sum(found.events.values()) == book.end.number
    assert len(found.notes) == found.events.get(TORN, 0)


@given(write_only_books())
@settings(max_examples=15, deadline=None)
def test_a_log_of_a_write_only_machine_opens_with_the_private_key(book: Book) -> None:
    found = checked(book.data, book.head, (), (OWNER,))
    assert (found.faults, found.entries) == ([], book.end.number)
    assert "public key" in " ".join(found.notes)


@given(books())
@settings(max_examples=15, deadline=None)
def test_who_opens_the_last_epoch_opens_those_before(book: Book) -> None:
    book.begin(NEW)
    book.sync()
    assert checked(book.data, book.head, (NEW,)).faults == []


def test_what_an_entry_says_comes_back() -> None:
    book = small_book(1)
    assert book.end.epoch is not None
    said: dict[str, str | int] = {"reason": 'a "b"\n\\ \u202e', "size": 7}
    line, mac = write_entry(2, TIME, "left", said, epoch=book.end.epoch, previous=book.end.mac)
    entry = parse_entry(line)
    assert entry is not None
    assert (entry.number, entry.time, entry.event, entry.mac) == (2, TIME, "left", mac)
    assert entry.fields == said
    assert line == entry.body + b',"mac":"' + mac.hex().encode() + b'"}\n'
    assert line.isascii()
    assert line.count(b"\n") == 1


def test_a_head_has_always_the_same_length() -> None:
    epoch = Epoch.begin((OLD,))
    heads = [Head(n, bytes(32), n * 300, n).sealed(epoch) for n in (0, 1, 10**12)]
    assert {len(head.pack()) for head in heads} == {HEAD_SIZE}
    assert [Head.parse(head.pack()) for head in heads] == heads
    assert all(head.is_of(epoch) for head in heads)
    assert not any(head.is_of(Epoch.begin((OLD,))) for head in heads)


def test_the_keys_of_an_epoch_are_not_shown() -> None:
    epoch = Epoch.begin((OLD,))
    assert epoch.root.hex() not in repr(epoch)
    assert repr(epoch.root) not in repr(epoch)
    assert repr(epoch._mac_key) not in repr(epoch)


# -- what is done to it without the key ----------------------------------------------------------


def flip(data: bytes, draw: st.DrawFn) -> bytes:
    at = draw(st.integers(0, len(data) - 1))
    return data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]


def remove(data: bytes, draw: st.DrawFn) -> bytes:
    lines = data.splitlines(keepends=True)
    at = draw(st.integers(0, len(lines) - 1))
    return b"".join(lines[:at] + lines[draw(st.integers(at + 1, len(lines))) :])


def swap(data: bytes, draw: st.DrawFn) -> bytes:
    lines = data.splitlines(keepends=True)
    one, other = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
    lines[one], lines[other] = lines[other], lines[one]
    return b"".join(lines)


def put_in(data: bytes, draw: st.DrawFn) -> bytes:
    lines = data.splitlines(keepends=True)
    made = st.one_of(
        st.sampled_from(lines),
        st.binary(max_size=20).map(lambda junk: junk + b"\n"),
        st.builds(forged, st.integers(1, 10), st.sampled_from(["sealed", EPOCH, TORN])),
        st.builds(a_strangers_epoch, st.integers(1, 10)),
    )
    lines.insert(draw(st.integers(0, len(lines))), draw(made))
    return b"".join(lines)


def cut(data: bytes, draw: st.DrawFn) -> bytes:
    return data[: draw(st.integers(0, len(data)))]


def forged(number: int, event: str, mac: str = "0" * 64) -> bytes:
    said = {"n": number, "time": TIME, "event": event, "bytes": 7, "mac": mac}
    return json.dumps(said, separators=(",", ":")).encode() + b"\n"


def a_strangers_epoch(number: int) -> bytes:
    epoch = Epoch.begin((STRANGER,))
    return write_entry(number, TIME, EPOCH, epoch.fields(None), epoch=epoch, previous=bytes(32))[0]


ATTACKS: Final = (flip, remove, swap, put_in, cut)


@st.composite
def attacked(draw: st.DrawFn, logs: st.SearchStrategy[Book]) -> tuple[Book, bytes]:
    """A log, and what somebody without a key made of it."""
    book = draw(logs)
    data = book.data
    for attack in draw(st.lists(st.sampled_from(ATTACKS), min_size=1, max_size=2)):
        data = attack(data, draw) if data else data
    return book, data


@given(attacked(books()))
@settings(max_examples=200, deadline=None)
def test_no_byte_that_a_head_covers_can_be_changed(attacked: tuple[Book, bytes]) -> None:
    book, data = attacked
    assume(data[: book.covered] != book.data[: book.covered])
    assert checked(data, book.head).faults


@given(attacked(write_only_books()))
@settings(max_examples=60, deadline=None)
def test_nor_can_one_of_a_write_only_machine(attacked: tuple[Book, bytes]) -> None:
    book, data = attacked
    assume(data[: book.covered] != book.data[: book.covered])
    assert checked(data, book.head, (), (OWNER,)).faults


@given(books(), st.data())
@settings(max_examples=60, deadline=None)
def test_a_head_cannot_be_changed_either(book: Book, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, HEAD_SIZE - 1))
    bit = data.draw(st.integers(1, 255))
    changed = book.head[:at] + bytes([book.head[at] ^ bit]) + book.head[at + 1 :]
    for head in (changed, book.head[:at], b"", None):
        assert checked(book.data, head).faults


@given(books())
@settings(max_examples=20, deadline=None)
def test_an_older_head_is_one_that_lags(book: Book) -> None:
    older = book.head
    book.say()
    book.sync()
    assert checked(book.data, older).faults == []


@pytest.mark.parametrize(
    ("attack", "fault"),
    [
        (
            lambda lines: [*lines[:2], lines[2].replace(b"object", b"objecT"), *lines[3:]],
            "entry 3 was changed",
        ),
        (lambda lines: [*lines[:2], *lines[3:]], "entry 3 is missing, and entry 4 is not proved"),
        (
            lambda lines: [*lines[:2], lines[3], lines[2], lines[4]],
            "bytes that do not belong",
        ),
        (lambda lines: [*lines[:3], lines[2], *lines[3:]], "bytes that do not belong"),
        (lambda lines: [*lines[:3], b"\n", *lines[3:]], "behind entry 3 there are 1 bytes"),
        (lambda lines: lines[:4], "entry 4 is the last, and a head names entry 5"),
        (lambda lines: lines[1:], "entry 1 is missing"),
        (lambda _lines: [], "entry 0 is the last, and a head names entry 5"),
    ],
    ids=["changed", "removed", "moved", "doubled", "empty line", "cut", "beheaded", "emptied"],
)
def test_a_fault_says_what_happened_and_where(
    attack: Callable[[list[bytes]], list[bytes]], fault: str
) -> None:
    book = small_book()
    found = checked(b"".join(attack(book.lines())), book.head)
    assert fault in " ".join(found.faults)


def test_behind_a_fault_the_rest_is_checked_as_before() -> None:
    book = small_book(12)
    lines = book.lines()
    for at in (3, 7):
        lines[at] = lines[at].replace(b"object", b"objecT")
    found = checked(b"".join(lines), book.head)
    assert found.faults == ["entry 4 was changed", "entry 8 was changed"]
    assert found.entries == 12


def test_entries_of_another_log_under_the_same_key_do_not_fit() -> None:
    one, other = small_book(), small_book()
    for at in range(5):
        lines = one.lines()
        lines[at] = other.lines()[at]
        assert checked(b"".join(lines), one.head).faults
    assert checked(one.data, other.head).faults


def test_a_log_that_begins_no_epoch_is_none() -> None:
    data = b"".join(forged(number, "sealed", f"{number:064x}") for number in range(1, 9))
    head = Head(8, (8).to_bytes(32, "big"), len(data), 0, bytes(32)).pack()
    assert checked(data, head).faults


def test_an_epoch_that_nobody_opens_is_a_fault_and_so_is_what_follows_in_its_name() -> None:
    book = Book()
    book.begin(STRANGER)
    for _ in range(3):
        book.say()
    book.sync()
    found = checked(book.data, book.head)
    assert found.faults == ["no key at hand opens the entries from 1 on"]
    assert checked(book.data, book.head, (STRANGER,)).faults == []
    gap = b"".join(line for line in book.lines() if b'"n":2,' not in line)
    assert "entry 2 is missing" in " ".join(checked(gap, book.head).faults)


def test_where_there_is_a_key_nothing_counts_that_a_public_key_was_enough_for() -> None:
    book = Book()
    book.begin(OWNERS_LOCK)
    book.say()
    book.sync()
    assert checked(book.data, book.head, (), (OWNER,)).faults == []
    [fault] = checked(book.data, book.head, (NEW,), (OWNER,)).faults
    assert "open with a private key alone" in fault


def test_a_slot_for_the_key_that_does_not_open_is_not_made_good_by_a_private_key() -> None:
    epoch = Epoch.begin((OLD, OWNERS_LOCK))
    slots = (
        replace(epoch.header.slots[0], wrap=epoch.header.slots[1].wrap),
        *epoch.header.slots[1:],
    )
    header = replace(epoch.header, slots=slots)
    said = {"header": base64.b64encode(header.pack()).decode(), "former": ""}
    line, mac = write_entry(1, TIME, EPOCH, said, epoch=epoch, previous=bytes(32))
    head = Head(1, mac, len(line), 0).sealed(epoch).pack()
    assert checked(line, head, (OLD,), (OWNER,)).faults


def test_an_object_of_a_vault_begins_no_epoch() -> None:
    epoch = Epoch.begin((OLD,))
    core = replace(epoch.header.core, vault_id=b"v" * 16)
    packed = replace(epoch.header, core=core).pack()
    with pytest.raises(TamperedError, match="something else"):
        Epoch.open({"header": base64.b64encode(packed).decode()}, (OLD,))
    with pytest.raises(KeyMismatchError):
        Epoch.open(epoch.fields(None), (NEW,))


def test_a_former_key_goes_with_the_header_that_it_was_wrapped_beside() -> None:
    one, other = Epoch.begin((OLD,)), Epoch.begin((OLD,))
    later = Epoch.begin((NEW,))
    said = later.fields(one)
    before = later.former(said, one.fields(None))
    assert before is not None
    assert before.root == one.root
    with pytest.raises(TamperedError):
        later.former(said, other.fields(None))


def test_very_many_faults_are_counted() -> None:
    lines = small_book(MAX_FAULTS * 2 + 30).lines()
    for at in range(2, len(lines), 2):
        lines[at] = lines[at].replace(b"object", b"objecT")
    found = checked(b"".join(lines), None)
    assert len(found.faults) == MAX_FAULTS
    assert found.more_faults > 0


# -- a writer who could not check the head -------------------------------------------------------


def test_a_head_that_was_passed_on_has_to_be_met() -> None:
    book = Book()
    for _ in range(2):
        book.begin(OWNERS_LOCK, link=False)
        for _ in range(4):
            book.say()
        book.sync()
    assert checked(book.data, book.head, (), (OWNER,)).faults == []
    # A machine that cannot open its own log believes what it is shown, and hands it over.
    cut_short = Book(b"".join(book.lines()[:3]), head=small_book().head)
    last = parse_entry(book.lines()[2])
    assert last is not None
    for head in (book.head, b"", cut_short.head):
        forged_on = Book(cut_short.data, head)
        forged_on.end = End(3, last.mac, len(cut_short.data))
        forged_on.begin(OWNERS_LOCK, link=False)
        forged_on.say()
        forged_on.sync()
        assert checked(forged_on.data, forged_on.head, (), (OWNER,)).faults


def test_an_epoch_that_was_cut_short_needs_its_own_head() -> None:
    book = Book()
    heads = []
    for _ in range(2):
        book.begin(OWNERS_LOCK, link=False)
        for _ in range(FIRST + 2):
            book.say()
        book.sync()
        heads.append(book.head)
    kept = book.lines()[:-1]
    last = parse_entry(kept[-1])
    assert last is not None
    again = Book(b"".join(kept), heads[0])
    again.end = End(last.number, last.mac, len(again.data))
    again.begin(OWNERS_LOCK, link=False)
    again.sync()
    [fault] = checked(again.data, again.head, (), (OWNER,)).faults
    assert "does not say where the epoch before ended" in fault


# -- what a crash leaves -------------------------------------------------------------------------


@st.composite
def crashed(draw: st.DrawFn, logs: st.SearchStrategy[Book]) -> tuple[Book, bytes]:
    """A log, and what is left of it where a crash takes any part of what was not synced."""
    book = draw(logs)
    data = bytearray(book.data)
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(book.covered, len(data)))
        end = draw(st.integers(start, len(data)))
        data[start:end] = bytes(end - start)
    return book, bytes(data[: draw(st.integers(book.covered, len(data)))])


@given(crashed(books()))
@settings(max_examples=100, deadline=None)
def test_what_a_crash_leaves_behind_the_head_is_no_fault(crashed: tuple[Book, bytes]) -> None:
    book, data = crashed
    assert checked(data, book.head).faults == []


@given(crashed(books()))
@settings(max_examples=100, deadline=None)
def test_nor_is_it_once_the_next_entry_accounts_for_it(crashed: tuple[Book, bytes]) -> None:
    book, data = crashed
    head = Head.parse(book.head)
    assert head is not None

    def opened(entry: Entry) -> Epoch:
        return Epoch.open(entry.fields, (NEW, OLD))

    entry = parse_entry(data[head.epoch : data.index(b"\n", head.epoch) + 1])
    assert entry is not None
    known = End(head.number, head.mac, head.end, opened(entry), head.epoch)
    end, debris = follow(data[head.end :].splitlines(keepends=True), known, opened)
    assert end.size + debris.size == len(data)
    after = Book(data, end=replace(end, size=len(data)))
    if debris.size:
        newline = b"" if debris.ends else b"\n"
        debris.add(newline)
        after.data += newline
        after.say(TORN, **debris.fields(0))
    after.say("started")
    after.sync()
    found = checked(after.data, after.head)
    assert found.faults == []
    assert (found.mac, bool(found.notes)) == (after.end.mac.hex(), TORN in found.events)


def test_an_entry_may_not_account_for_debris_that_was_put_there_later() -> None:
    book = small_book()
    book.tear(b"torn")
    book.sync()
    assert checked(book.data, book.head).faults == []
    assert checked(book.data.replace(b"torn\n", b"tron\n"), book.head).faults
    assert checked(book.data.replace(b"torn\n", b""), book.head).faults


def test_what_is_lost_is_said_by_the_one_who_noticed() -> None:
    for lost, words in ((3, "lost before entry 6: 3"), (None, "nobody knows how many")):
        book = small_book()
        book.say(TORN, **Debris().fields(lost))
        book.sync()
        assert words in " ".join(checked(book.data, book.head).faults)


# -- whatever is read ----------------------------------------------------------------------------

ODD: Final[tuple[object, ...]] = (
    *(None, True, -1, 1.5, float("inf"), float("nan"), 10**20, "", "AAAA", "0" * 64),
    *("\ud800", "\0", "x" * 5000, [], [[1]], {}, {"n": 1}),
)


@st.composite
def hostile_lines(draw: st.DrawFn) -> bytes:
    """A line that is nearly an entry."""
    names = st.sampled_from(
        ["n", "time", "event", "mac", "header", "former", "head", "bytes", "sha256", "lost", "x"]
    )
    event = draw(st.sampled_from([EPOCH, TORN, "sealed"]))
    members = [("n", draw(st.integers(0, 4))), ("time", TIME), ("event", event)]
    members += draw(st.lists(st.tuples(names, st.sampled_from(ODD)), max_size=4))
    said = ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in members)
    mac = draw(st.sampled_from(["0" * 64, "f" * 64, "F" * 64, "0" * 63]))
    return f'{{{said},"mac":"{mac}"}}\n'.encode(errors="surrogatepass")


@given(st.binary() | hostile_lines())
@example(b'{"n":1,"time":"","event":"e","n":"x","mac":"' + b"0" * 64 + b'"}\n')
@example(b'{"n":1,"time":"","event":"e","n":1e999,"mac":"' + b"0" * 64 + b'"}\n')
@example(b'{"n":1,"time":"","event":"e","n":' + b"1" * 5000 + b',"mac":"' + b"0" * 64 + b'"}\n')
@example(b'{"n":1,"time":"","x":' + b"[" * 60_000 + b',"mac":"' + b"0" * 64 + b'"}\n')
@example(b'{"n":1,"time":"\xff","event":"e","mac":"' + b"0" * 64 + b'"}\n')
@settings(max_examples=200, deadline=None)
def test_any_line_is_an_entry_or_none(line: bytes) -> None:
    entry = parse_entry(line)
    if entry is not None:
        assert isinstance(entry.number, int)
        assert not isinstance(entry.number, bool)
        assert isinstance(entry.time, str)
        assert isinstance(entry.event, str)
        assert len(entry.mac) == 32


def test_a_line_without_end_or_of_no_end_is_no_entry() -> None:
    line = small_book(1).lines()[0]
    assert parse_entry(line) is not None
    assert parse_entry(line[:-1]) is None
    assert parse_entry(line[:-1] + b"\r\n") is None
    assert parse_entry(line.replace(b"epoch", b"epoch" + b" " * MAX_LINE)) is None


@given(st.binary(max_size=200) | st.text("0123456789abcdef \n", max_size=200).map(str.encode))
@settings(max_examples=50, deadline=None)
def test_any_head_is_one_or_none(data: bytes) -> None:
    assert Head.parse(data) is None


@given(st.lists(st.binary(max_size=30) | hostile_lines(), max_size=5), st.integers(0, 3))
@example([b'{"n":2,"time":"","event":"epoch","head":"\\ud800","mac":"' + b"0" * 64 + b'"}\n'], 1)
@settings(max_examples=150, deadline=None)
def test_checking_comes_to_an_end_whatever_is_in_a_log(planted: list[bytes], at: int) -> None:
    book = small_book(3)
    lines = book.lines()
    data = b"".join([*lines[:at], *planted, *lines[at:]])
    found = checked(data, book.head, (NEW, OLD), (OWNER,))
    assert found.entries >= 0
    assert found.faults or data.startswith(book.data)


def test_a_log_that_is_exchanged_while_it_is_checked_is_not_believed() -> None:
    book = small_book()
    last = book.end.mac.hex()
    lines = [a_strangers_epoch(1), *(forged(n, "sealed") for n in (2, 3, 4))]
    looks = [book.data, b"".join(lines) + forged(5, "sealed", last)]
    found = check(lambda: looks.pop(0).splitlines(keepends=True), book.head, (OLD,))
    assert found.faults
