"""When a file is complete: the proofs, and every file's way through the tracker."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from secimg_watch.records import Identity, Proof
from secimg_watch.settle import (
    EMPTY_GRACE,
    QUIET_LOCAL,
    QUIET_REMOTE,
    Evidence,
    Missing,
    ProofRule,
    Tracker,
    judge,
)

NOTHING = Evidence(
    writer=False, leased=False, renamed=False, sidecar=False, quiet=2.0, remote=False
)
SETTLE = 2.0
WALL = 1_700_000_000_000_000_000
FIRST = Identity(dev=1, ino=10, size=100, mtime_ns=5, ctime_ns=5)
GROWN = dataclasses.replace(FIRST, size=200, mtime_ns=6, ctime_ns=6)
EMPTY = dataclasses.replace(FIRST, size=0)


def due(tracker: Tracker, now: float) -> list[str]:
    return [candidate.relpath for candidate in tracker.due(now)]


# -- proofs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("accepted", ProofRule)
def test_a_known_writer_refutes_every_proof(accepted: ProofRule) -> None:
    everything = Evidence(
        writer=True, leased=True, renamed=True, sidecar=True, quiet=1e9, remote=False
    )
    assert judge(accepted, SETTLE, everything) is Missing.WRITER


@pytest.mark.parametrize(
    ("accepted", "evidence", "verdict"),
    [
        (ProofRule.LEASE, {"leased": True}, Proof.LEASE),
        (ProofRule.LEASE, {"renamed": True, "sidecar": True, "quiet": 1e9}, Missing.NO_LEASE),
        (ProofRule.RENAME, {}, Proof.RENAME),
        (ProofRule.RENAME, {"leased": True}, Proof.RENAME),
        (ProofRule.SIDECAR, {"sidecar": True}, Proof.SIDECAR),
        (ProofRule.SIDECAR, {"leased": True, "renamed": True, "quiet": 1e9}, Missing.NO_SIDECAR),
        (ProofRule.QUIET, {}, Proof.QUIET),
        (ProofRule.QUIET, {"leased": True}, Proof.QUIET),
        (ProofRule.AUTO, {"leased": True, "renamed": True, "quiet": 1e9}, Proof.LEASE),
        (ProofRule.AUTO, {"renamed": True, "quiet": 1e9}, Proof.RENAME),
        (ProofRule.AUTO, {"sidecar": True}, Missing.NOT_QUIET),
        (ProofRule.AUTO, {}, Missing.NOT_QUIET),
    ],
)
def test_each_rule_asks_for_its_own_evidence(
    accepted: ProofRule, evidence: dict[str, bool | float], verdict: Proof | Missing
) -> None:
    given = Evidence(**{**dataclasses.asdict(NOTHING), **evidence})
    assert judge(accepted, SETTLE, given) is verdict


@pytest.mark.parametrize(
    ("settle", "remote", "enough"),
    [
        (SETTLE, False, QUIET_LOCAL),
        (SETTLE, True, QUIET_REMOTE),
        (QUIET_LOCAL + 5, False, QUIET_LOCAL + 5),
        (QUIET_REMOTE + 5, True, QUIET_REMOTE + 5),
    ],
)
def test_where_nothing_better_is_known_only_long_quiet_counts(
    settle: float,
    remote: bool,  # noqa: FBT001 - a parameter of the table
    enough: float,
) -> None:
    almost = dataclasses.replace(NOTHING, quiet=enough - 0.1, remote=remote)
    assert judge(ProofRule.AUTO, settle, almost) is Missing.NOT_QUIET
    assert judge(ProofRule.AUTO, settle, dataclasses.replace(almost, quiet=enough)) is Proof.QUIET


def test_a_remote_folder_waits_longer_than_its_attribute_cache() -> None:
    assert QUIET_REMOTE >= QUIET_LOCAL + 60


# -- one file's way ----------------------------------------------------------------------------


def test_a_file_is_due_when_it_did_not_change_for_the_settle_time() -> None:
    tracker = Tracker(SETTLE)
    tracker.observe("a", FIRST, 10.0, WALL)
    assert tracker.next_due() == 12.0
    assert due(tracker, 11.999) == []
    [candidate] = tracker.due(12.5)
    assert (candidate.relpath, candidate.identity) == ("a", FIRST)
    assert (candidate.first_seen_ns, candidate.quiet) == (WALL, 2.5)
    assert not candidate.renamed


def test_seeing_the_same_state_again_does_not_start_over() -> None:
    tracker = Tracker(SETTLE)
    tracker.observe("a", FIRST, 10.0, WALL)
    tracker.observe("a", FIRST, 11.9, WALL + 1)
    assert due(tracker, 12.0) == ["a"]


@pytest.mark.parametrize("changed", ["dev", "ino", "size", "mtime_ns", "ctime_ns"])
def test_a_change_of_any_part_of_the_identity_starts_over(changed: str) -> None:
    tracker = Tracker(SETTLE)
    tracker.observe("a", FIRST, 10.0, WALL)
    tracker.observe("a", dataclasses.replace(FIRST, **{changed: 77}), 11.9, WALL + 9)
    assert due(tracker, 13.8) == []
    [candidate] = tracker.due(13.9)
    assert candidate.first_seen_ns == WALL, "its plaintext lies there since then"


def test_without_a_settle_time_a_file_is_due_at_once() -> None:
    tracker = Tracker(0.0)
    tracker.observe("a", FIRST, 10.0, WALL)
    assert due(tracker, 10.0) == ["a"]


def test_an_empty_file_is_left_alone_for_longer() -> None:
    tracker = Tracker(SETTLE)
    tracker.observe("a", EMPTY, 10.0, WALL)
    assert due(tracker, 10.0 + EMPTY_GRACE - 0.1) == []
    assert due(tracker, 10.0 + EMPTY_GRACE) == ["a"]


def test_a_file_that_is_no_longer_empty_waits_no_longer_than_others() -> None:
    tracker = Tracker(SETTLE)
    tracker.observe("a", EMPTY, 10.0, WALL)
    tracker.observe("a", FIRST, 11.0, WALL)
    assert due(tracker, 13.0) == ["a"]


def test_a_settle_time_above_the_grace_holds_for_empty_files_too() -> None:
    tracker = Tracker(EMPTY_GRACE + 40)
    tracker.observe("a", EMPTY, 0.0, WALL)
    assert tracker.next_due() == EMPTY_GRACE + 40


def test_files_are_due_oldest_first() -> None:
    tracker = Tracker(SETTLE)
    for age, name in enumerate(["new", "middle", "old"]):
        tracker.observe(name, dataclasses.replace(FIRST, ino=age), 10.0, WALL - age)
    assert due(tracker, 12.0) == ["old", "middle", "new"]


def test_what_the_queue_knows_is_not_listed_again() -> None:
    tracker = Tracker(SETTLE)
    tracker.observe("a", FIRST, 10.0, WALL)
    tracker.hand_over("a")
    tracker.observe("a", FIRST, 20.0, WALL)
    assert due(tracker, 1e6) == []
    assert tracker.next_due() is None
    assert tracker.waiting() == 0


def test_a_file_that_changes_after_it_was_queued_is_a_new_arrival() -> None:
    tracker = Tracker(SETTLE)
    tracker.observe("a", FIRST, 10.0, WALL)
    tracker.hand_over("a")
    tracker.observe("a", GROWN, 20.0, WALL + 7)
    [candidate] = tracker.due(22.0)
    assert candidate.identity == GROWN
    assert candidate.first_seen_ns == WALL + 7


def test_a_missing_proof_is_asked_for_at_growing_intervals_of_at_most_ten_seconds() -> None:
    tracker = Tracker(SETTLE)
    tracker.observe("a", FIRST, 0.0, WALL)
    now, waits = SETTLE, []
    for _ in range(8):
        tracker.postpone("a", Missing.WRITER, now)
        later = tracker.next_due()
        assert later is not None
        waits.append(later - now)
        now = later
    assert waits == [0.5, 1, 2, 4, 8, 10, 10, 10]
    assert tracker.unready() == ["a"]
    assert tracker.waiting() == 1


def test_an_event_on_a_file_that_lacks_its_proof_has_it_looked_at_now() -> None:
    tracker = Tracker(SETTLE)
    tracker.observe("a", FIRST, 0.0, WALL)
    for _ in range(5):
        tracker.postpone("a", Missing.WRITER, 10.0)
    assert due(tracker, 11.0) == []
    tracker.observe("a", FIRST, 11.0, WALL)
    assert due(tracker, 11.0) == ["a"]


def test_a_change_forgets_that_a_proof_was_missing() -> None:
    tracker = Tracker(SETTLE)
    tracker.observe("a", FIRST, 0.0, WALL)
    tracker.postpone("a", Missing.WRITER, 2.0)
    tracker.observe("a", GROWN, 3.0, WALL)
    assert tracker.unready() == []
    assert due(tracker, 4.9) == []


@pytest.mark.parametrize("step", ["postpone", "hand_over"])
@pytest.mark.parametrize("known", ["never seen", "forgotten", "vanished"])
def test_what_is_not_there_can_neither_be_postponed_nor_handed_over(step: str, known: str) -> None:
    tracker = Tracker(SETTLE)
    if known != "never seen":
        tracker.observe("a", FIRST, 0.0, WALL)
    if known == "forgotten":
        tracker.forget("a")
    elif known == "vanished":
        tracker.retain(set())
    steps = {
        "postpone": lambda: tracker.postpone("a", Missing.WRITER, 1.0),
        "hand_over": lambda: tracker.hand_over("a"),
    }
    with pytest.raises(KeyError):
        steps[step]()


def test_forgetting_what_is_not_known_is_harmless() -> None:
    tracker = Tracker(SETTLE)
    tracker.forget("a")
    assert tracker.waiting() == 0


# -- renames -----------------------------------------------------------------------------------


def test_a_rename_into_place_is_remembered() -> None:
    tracker = Tracker(SETTLE)
    tracker.observe("a", FIRST, 0.0, WALL, renamed=True)
    tracker.observe("a", FIRST, 1.0, WALL)
    assert tracker.due(2.0)[0].renamed


def test_a_rename_that_is_heard_of_after_the_scan_counts_too() -> None:
    tracker = Tracker(SETTLE)
    tracker.observe("a", FIRST, 0.0, WALL)
    tracker.observe("a", FIRST, 1.0, WALL, renamed=True)
    assert tracker.due(2.0)[0].renamed


def test_a_write_after_the_rename_takes_the_proof_away() -> None:
    tracker = Tracker(SETTLE)
    tracker.observe("a", FIRST, 0.0, WALL, renamed=True)
    tracker.observe("a", GROWN, 1.0, WALL)
    assert not tracker.due(3.0)[0].renamed


def test_a_temporary_file_under_its_final_name_was_renamed_although_no_event_said_so() -> None:
    tracker = Tracker(SETTLE)
    tracker.observe_temporary(".a.jpg.part", FIRST)
    tracker.observe("a.jpg", dataclasses.replace(FIRST, ctime_ns=99), 0.0, WALL)
    assert tracker.due(2.0)[0].renamed


def test_another_inode_under_that_name_was_not_renamed() -> None:
    tracker = Tracker(SETTLE)
    tracker.observe_temporary("a.part", FIRST)
    tracker.observe("a", dataclasses.replace(FIRST, ino=11), 0.0, WALL)
    tracker.observe("b", dataclasses.replace(FIRST, dev=2), 0.0, WALL)
    assert [candidate.renamed for candidate in tracker.due(2.0)] == [False, False]


def test_a_temporary_file_that_is_gone_vouches_for_no_later_file_with_its_inode() -> None:
    tracker = Tracker(SETTLE)
    tracker.observe_temporary("a.part", FIRST)
    tracker.retain(set())
    tracker.observe("b", FIRST, 0.0, WALL)
    assert not tracker.due(2.0)[0].renamed


# -- a scan's view -----------------------------------------------------------------------------


def test_a_scan_forgets_what_is_gone_and_counts_what_was_never_taken() -> None:
    tracker = Tracker(SETTLE)
    for number, name in enumerate(["stays", "vanished", "sealed"]):
        tracker.observe(name, dataclasses.replace(FIRST, ino=number), 0.0, WALL)
    tracker.hand_over("sealed")
    assert tracker.retain({"stays"}) == 1
    assert due(tracker, 2.0) == ["stays"]
    assert tracker.retain({"stays"}) == 0


def test_a_temporary_file_that_is_still_there_is_remembered() -> None:
    tracker = Tracker(SETTLE)
    tracker.observe_temporary("a.part", FIRST)
    tracker.retain({"a.part"})
    tracker.observe("a", FIRST, 0.0, WALL)
    assert tracker.due(2.0)[0].renamed


def test_a_temporary_file_vouches_once_as_its_inode_may_be_given_away_again() -> None:
    tracker = Tracker(SETTLE)
    tracker.observe_temporary("a.part", FIRST)
    tracker.observe("a", FIRST, 0.0, WALL)
    tracker.hand_over("a")
    tracker.observe("b", GROWN, 5.0, WALL)
    assert not tracker.due(7.0)[0].renamed


def test_a_file_that_vanished_and_came_back_settles_anew() -> None:
    tracker = Tracker(SETTLE)
    tracker.observe("a", FIRST, 0.0, WALL)
    tracker.hand_over("a")
    tracker.retain(set())
    tracker.observe("a", FIRST, 10.0, WALL + 5)
    assert due(tracker, 11.0) == []
    assert tracker.due(12.0)[0].first_seen_ns == WALL + 5


# -- any order of events -----------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "c"])
_inodes = itertools.count(1)


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens, no file is listed before its time, and none is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.tracker = Tracker(SETTLE)
        self.now = 0.0
        self.identity: dict[str, Identity] = {}
        self.changed: dict[str, float] = {}
        self.handed: set[str] = set()
        self.postponed: set[str] = set()

    @rule(seconds=st.sampled_from([0.25, 0.5, 1.75, 2.0, 11.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(name=NAMES, size=st.sampled_from([0, 1, 100]), renamed=st.booleans())
    def a_file_changes(self, name: str, size: int, *, renamed: bool) -> None:
        identity = Identity(1, next(_inodes), size, 0, 0)
        self.tracker.observe(name, identity, self.now, WALL, renamed=renamed)
        self.identity[name] = identity
        self.changed[name] = self.now
        self.handed.discard(name)
        self.postponed.discard(name)

    @precondition(lambda self: self.identity)
    @rule(data=st.data(), renamed=st.booleans())
    def a_file_is_seen_again(self, data: st.DataObject, *, renamed: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.identity)))
        self.tracker.observe(name, self.identity[name], self.now, WALL, renamed=renamed)

    @precondition(lambda self: self.tracker.due(self.now))
    @rule(data=st.data())
    def a_proof_is_missing(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(due(self.tracker, self.now)))
        self.tracker.postpone(name, Missing.WRITER, self.now)
        self.postponed.add(name)

    @precondition(lambda self: self.tracker.due(self.now))
    @rule(data=st.data())
    def a_file_is_queued(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(due(self.tracker, self.now)))
        self.tracker.hand_over(name)
        self.handed.add(name)

    @rule(name=NAMES)
    def a_file_goes(self, name: str) -> None:
        self.tracker.forget(name)
        self.identity.pop(name, None)
        self.handed.discard(name)
        self.postponed.discard(name)

    def wait(self, name: str) -> float:
        return max(SETTLE, EMPTY_GRACE) if self.identity[name].size == 0 else SETTLE

    @invariant()
    def nothing_is_due_before_it_settled(self) -> None:
        for candidate in self.tracker.due(self.now):
            name = candidate.relpath
            assert name not in self.handed
            assert candidate.identity == self.identity[name]
            assert candidate.quiet == self.now - self.changed[name]
            assert candidate.quiet >= self.wait(name)

    @invariant()
    def everything_that_settled_is_due_unless_its_proof_is_awaited(self) -> None:
        listed = set(due(self.tracker, self.now))
        for name in self.identity.keys() - self.handed - self.postponed:
            if self.changed[name] + self.wait(name) <= self.now:
                assert name in listed

    @invariant()
    def the_next_time_is_told(self) -> None:
        following = self.tracker.next_due()
        assert bool(due(self.tracker, self.now)) == (
            following is not None and following <= self.now
        )
        sizes = [self.identity[name].size for name in self.identity.keys() - self.handed]
        assert self.tracker.waiting() == sum(size > 0 for size in sizes)
        assert self.tracker.empty() == sizes.count(0)
        waiting = {name for name in self.postponed - self.handed if self.identity[name].size}
        assert set(self.tracker.unready()) == waiting


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
