"""What a disk may hold after the power failed: a model of file systems, without any of them.

A log of what was done to files and directories goes in; out come the trees of files that may be
found after a crash at any moment. What counts as promised, in all variants:

* fsync or fdatasync of a file makes its content and length durable as they were when the call
  began. Before that each sector is as it was at some moment since the last sync, each for itself,
  or where the file grew holds zeros or anything; and the length is any that it had since.
* fsync of a directory makes durable all that was done to the names in it until the call began.
* A change of one name is atomic, a rename over another file included: the name leads to the old
  file, to the new one, or nowhere, as it did at some moment; changes of one name keep their order.
* That a directory was made becomes durable before what is done in it does by itself, and that it
  was removed after that. What a sync asks for is durable without: see below.
* A new file comes with its mode. Later changes of mode, owner and times are not modelled: they
  count as durable at once.

What is *not* promised is what the variants differ in:

``ORDERED``  All changes of names in a file system become durable in the order they were made, so a
             crash keeps a prefix; an fsync keeps at least all up to the last change that concerns
             its file or directory. Content keeps no order with names. So it is with XFS, and with
             ext4 also under ``data=writeback``; Dave Chinner says the same of btrfs and f2fs
             (linux-kernel, 2018-09-14, "metadata operation reordering regards to crash"), and
             calls it strictly ordered metadata.
``WEAK``     Changes of different names reorder freely, also in one directory. An fsync makes
             durable what fsync(2) says and no more: neither the name of the file, or of the
             directory, nor anything in other directories. So a directory that was made, filled and
             synced may be gone with all that is in it until the one above it was synced as well.
             But a rename happens as a whole, with both of its names. Names reorder on ext2 and,
             by its log of what was synced, on btrfs (Pillai et al., OSDI 2014, "All file systems
             are not created equal"); a rename that came in parts there counted as a defect (Mohan
             et al., OSDI 2018, "Finding crash-consistency bugs with bounded black-box testing").
``NAMED``    As ``WEAK``, but an fsync also makes durable the name of what was synced and of all
             directories above it: what btrfs promises beyond POSIX.
``HALVES``   As ``WEAK``, but a rename between two directories is two changes, as on ext2: what was
             moved may be found under both names, or under none. No program that renames can do
             right by that; it is here to be reported.

A disk that lies about its cache, a sector that turns bad, and a file system's own defects are not
modelled.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
    from random import Random

BLOCK: Final = 4096
SECTOR: Final = 512
GARBAGE: Final = b"\xa5\x5a"
"""What blocks hold that nobody wrote: what somebody else had there before."""

T = TypeVar("T")

Node: TypeAlias = int
Slot: TypeAlias = tuple[Node, str]
"""A name in a directory."""


@dataclass(frozen=True, slots=True)
class Model:
    """What a file system promises; see above."""

    name: str
    in_order: bool = False
    whole_renames: bool = True
    syncs_names: bool = False


ORDERED: Final = Model("ordered", in_order=True)
WEAK: Final = Model("weak")
NAMED: Final = Model("named", syncs_names=True)
HALVES: Final = Model("halves", whole_renames=False)
MODELS: Final = {model.name: model for model in (ORDERED, WEAK, NAMED, HALVES)}


@dataclass(frozen=True, slots=True)
class Change:
    """What a call did to names: where each leads from then on, ``None`` for nowhere."""

    what: str
    leads: tuple[tuple[Slot, Node | None], ...]
    made: Node | None = None  # a directory that was made
    removed: Node | None = None  # a directory that was removed


@dataclass(frozen=True, slots=True)
class Write:
    """What a file holds from then on."""

    node: Node
    content: bytes


@dataclass(frozen=True, slots=True)
class Sync:
    """A sync that has returned. Events from ``began`` on may have come too late for it."""

    node: Node
    began: int
    path: str
    above: frozenset[Node]  # the directories that it lay in, the root left out


Event: TypeAlias = Change | Write | Sync


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or, without content, a directory of a tree."""

    node: Node
    mode: int
    content: bytes | None


Tree: TypeAlias = dict[str, Entry]
"""Paths without a leading slash; the root is ""."""


@dataclass(frozen=True, slots=True)
class State:
    """One thing that a disk may hold: which changes of names took place, and contents."""

    point: int  # crashed after so many events
    leads: tuple[tuple[tuple[Slot, Node | None], ...], ...]  # of the changes, in order
    contents: Mapping[Node, bytes]  # of files that were ever written to
    missing: tuple[int, ...] = ()  # changes that took place and did not last, by their place


@dataclass(frozen=True, slots=True)
class _Unit:
    """What happens to names as a whole or not at all."""

    at: int
    leads: tuple[tuple[Slot, Node | None], ...]
    after: frozenset[int]  # units that it cannot be without
    inside: frozenset[int]  # units that made the directories that it happens in
    needs: frozenset[int]  # all of both, and what those need, and so on


@dataclass(frozen=True, slots=True)
class Effort:
    """How many of the states of one moment are listed; all where there are few."""

    namings: int = 128
    """Sets of changes of names that are listed whole; where there are more, a choice."""
    sample: int = 32
    """Random sets of changes, and random mixtures of contents."""
    contents: int = 12
    """Contents of one file."""


@dataclass(slots=True)
class Disk:
    """A directory tree, and the log of what was done to it. Node 0 is its root.

    What is laid out by `place` is durable from the beginning.
    """

    modes: dict[Node, int] = field(default_factory=lambda: {0: 0o700})
    files: dict[Node, bytes] = field(default_factory=dict)
    """What each file holds now."""
    slots: dict[Slot, Node] = field(default_factory=dict)
    """Where each name leads now."""
    events: list[Event] = field(default_factory=list)
    _base_files: dict[Node, bytes] = field(default_factory=dict)
    _base_slots: dict[Slot, Node] = field(default_factory=dict)
    _units: dict[str, list[_Unit]] = field(default_factory=dict)
    _by_sync: dict[tuple[str, int], frozenset[int]] = field(default_factory=dict)
    _moving: set[Slot] = field(default_factory=set)
    _fixed: set[Node] = field(default_factory=set)

    # -- what is done to it ------------------------------------------------------------------

    def place(self, slot: Slot, mode: int, content: bytes | None = None) -> Node:
        """Lay out a file, or without content a directory, before anything happens."""
        assert not self.events
        node = self._new(mode, content)
        self.slots[slot] = self._base_slots[slot] = node
        if content is not None:
            self._base_files[node] = content
        return node

    def _new(self, mode: int, content: bytes | None) -> Node:
        node = len(self.modes)
        self.modes[node] = mode
        if content is not None:
            self.files[node] = content
        return node

    def is_directory(self, node: Node) -> bool:
        return node not in self.files

    def create(self, slot: Slot, mode: int) -> Node:
        node = self.unnamed(mode)
        self._change("create", {slot: node})
        return node

    def unnamed(self, mode: int) -> Node:
        """Make a file that has no name yet."""
        node = self._new(mode, b"")
        self._base_files[node] = b""
        return node

    def mkdir(self, slot: Slot, mode: int) -> Node:
        node = self._new(mode, None)
        self._change("mkdir", {slot: node}, made=node)
        return node

    def link(self, slot: Slot, node: Node) -> None:
        self._change("link", {slot: node})

    def unlink(self, slot: Slot) -> None:
        self._change("unlink", {slot: None})

    def rmdir(self, slot: Slot) -> None:
        self._change("rmdir", {slot: None}, removed=self.slots[slot])

    def rename(self, source: Slot, target: Slot) -> None:
        node = self.slots[source]
        over = self.slots.get(target)
        removed = over if over is not None and self.is_directory(over) else None
        if source != target and node != over:
            self._change("rename", {target: node, source: None}, removed=removed)

    def write(self, node: Node, content: bytes) -> None:
        """Say what a file holds from now on."""
        if self.files[node] != content:
            self.files[node] = content
            self.events.append(Write(node, content))

    def sync(self, node: Node, began: int | None = None) -> None:
        """A sync returned that began when there were ``began`` events; now, where not said."""
        when = len(self.events) if began is None else began
        self.events.append(Sync(node, when, self.path_of(node), self._above(node)))

    def _above(self, node: Node) -> frozenset[Node]:
        parents = {leads: parent for (parent, _), leads in self.slots.items()}
        found = set()
        while node := parents.get(node, 0):
            found.add(node)
        return frozenset(found)

    def _change(
        self,
        what: str,
        leads: Mapping[Slot, Node | None],
        *,
        made: Node | None = None,
        removed: Node | None = None,
    ) -> None:
        for slot, node in leads.items():
            if node is None:
                del self.slots[slot]
            else:
                self.slots[slot] = node
        shown = " <- ".join(self._shown(slot) for slot in leads)
        change = Change(f"{what} {shown}", tuple(leads.items()), made, removed)
        self.events.append(change)
        self._units.clear()
        self._by_sync.clear()
        self._moving.clear()

    def path_of(self, node: Node) -> str:
        """A path that leads to a node now, or else one that did last."""
        if node == 0:
            return ""
        now = [slot for slot, leads in self.slots.items() if leads == node]
        once = [slot for change in self._changes() for slot, leads in change.leads if leads == node]
        slots = now or once
        return self._shown(slots[-1]) if slots else "a file without a name"

    def _changes(self) -> list[Change]:
        return [event for event in self.events if isinstance(event, Change)]

    def _shown(self, slot: Slot) -> str:
        above = self.path_of(slot[0])
        return f"{above}/{slot[1]}" if above else slot[1]

    def syncs(self) -> list[int]:
        """Where in the log the syncs are."""
        return [at for at, event in enumerate(self.events) if isinstance(event, Sync)]

    # -- what is left of it ------------------------------------------------------------------

    def units(self, model: Model) -> list[_Unit]:
        """All changes of names, in order, with what each cannot be without."""
        if model.name not in self._units:
            self._units[model.name] = list(self._find_units(model))
        return self._units[model.name]

    def _find_units(self, model: Model) -> Iterator[_Unit]:
        number = 0
        of_slot: dict[Slot, int] = {}
        needs: list[frozenset[int]] = []
        inside: dict[Node, set[int]] = {}
        made: dict[Node, int] = {}
        for at, event in enumerate(self.events):
            if not isinstance(event, Change):
                continue
            parents = {slot[0] for slot, _ in event.leads}
            whole = model.whole_renames or len(parents) == 1
            for leads in [event.leads] if whole else [(each,) for each in event.leads]:
                after = {number - 1} if model.in_order and number else set()
                if event.removed is not None:
                    after |= inside.get(event.removed, set())
                for slot, _ in leads:
                    after |= {of_slot[slot]} if slot in of_slot else set()
                    of_slot[slot] = number
                    inside.setdefault(slot[0], set()).add(number)
                within = frozenset(made[slot[0]] for slot, _ in leads if slot[0] in made)
                direct = after | within
                needs.append(frozenset(direct).union(*(needs[each] for each in direct)))
                yield _Unit(at, leads, frozenset(after), within, needs[-1])
                if event.made is not None:
                    made[event.made] = number
                number += 1

    def durable(
        self, point: int, model: Model, without: frozenset[int] = frozenset()
    ) -> frozenset[int]:
        """Which units outlive a crash after ``point`` events.

        ``without``: syncs, by their place in the log, that are to count for nothing.
        """
        wanted: set[int] = set()
        for at, event in enumerate(self.events[:point]):
            if isinstance(event, Sync) and at not in without:
                wanted |= self._forced(at, event, model)
        return frozenset(wanted)

    def _forced(self, at: int, sync: Sync, model: Model) -> frozenset[int]:
        """The changes of names that a sync makes durable."""
        if (model.name, at) not in self._by_sync:
            units = self.units(model)
            early = itertools.takewhile(lambda each: each[1].at < sync.began, enumerate(units))
            wanted = [number for number, unit in early if _concerns(unit, sync, model)]
            inside = model.in_order or model.syncs_names
            self._by_sync[model.name, at] = _closed(wanted, units, inside=inside)
        return self._by_sync[model.name, at]

    def contents_of(
        self, node: Node, point: int, without: frozenset[int] = frozenset()
    ) -> list[bytes]:
        """What a file held from its last sync on, oldest first."""
        held = [(-1, self._base_files[node])]
        synced = -1
        for at, event in enumerate(self.events[:point]):
            if isinstance(event, Write) and event.node == node:
                held.append((at, event.content))
            elif isinstance(event, Sync) and event.node == node and at not in without:
                synced = max(synced, *(place for place, _ in held if place < event.began), -1)
        return [content for place, content in held if place >= synced]

    def states(
        self,
        point: int,
        model: Model,
        random: Random,
        effort: Effort,
        without: frozenset[int] = frozenset(),
    ) -> Iterator[State]:
        """What the disk may hold after a crash behind ``point`` events."""
        units = self.units(model)
        durable = self.durable(point, model, without)
        pending = [
            number for number, unit in enumerate(units) if unit.at < point and number not in durable
        ]
        namings = list(_ideals(pending, units, random, effort))
        settled, dirty = self._written(point, random, effort, without)
        new = settled | {node: choices[-1] for node, choices in dirty.items()}
        old = settled | {node: choices[0] for node, choices in dirty.items()}

        def state(naming: frozenset[int], contents: Mapping[Node, bytes]) -> State:
            leads = tuple(units[number].leads for number in sorted(durable | naming))
            missing = tuple(units[number].at for number in pending if number not in naming)
            return State(point, leads, contents, missing)

        for naming in namings:
            yield state(naming, new)
            if dirty:
                yield state(naming, old)
        for node, choices in dirty.items():
            for content in choices[1:-1]:
                yield state(namings[-1], new | {node: content})
                yield state(random.choice(namings), random.choice([new, old]) | {node: content})
        for _ in range(effort.sample if dirty else 0):
            mixed = {node: random.choice(choices) for node, choices in dirty.items()}
            yield state(random.choice(namings), settled | mixed)

    def needs(self, sync: int, state: State, model: Model) -> bool:
        """Whether a state can only be where that sync, by its place in the log, did not happen."""
        durable = {self.units(model)[number].at for number in self.durable(state.point, model)}
        event = self.events[sync]
        assert isinstance(event, Sync)
        content = state.contents.get(event.node)
        lasting = content is None or content in self.contents_of(event.node, state.point)
        return not lasting or not durable.isdisjoint(state.missing)

    def _written(
        self, point: int, random: Random, effort: Effort, without: frozenset[int]
    ) -> tuple[dict[Node, bytes], dict[Node, list[bytes]]]:
        """Contents of files: those that are certain, and choices, the oldest first, for others."""
        settled: dict[Node, bytes] = {}
        dirty: dict[Node, list[bytes]] = {}
        written = {event.node for event in self.events[:point] if isinstance(event, Write)}
        for node in sorted(written):
            held = self.contents_of(node, point, without)
            if len(held) == 1:
                settled[node] = held[0]
            else:
                dirty[node] = _torn(held, random, effort.contents)
        return settled, dirty

    def tree(self, state: State) -> Tree:
        """The files and directories that can be reached in a state."""
        self._prepare()
        below: dict[Node, dict[str, Node]] = {}
        for slot, node in self._named(state).items():
            if node is not None:
                below.setdefault(slot[0], {})[slot[1]] = node
        for (parent, name), node in self._base_slots.items():
            if (parent, name) not in self._moving:
                below.setdefault(parent, {})[name] = node
        found: Tree = {}
        waiting = [("", 0)]
        while waiting:
            path, node = waiting.pop()
            found[path] = Entry(node, self.modes[node], self._content(node, state))
            for name, each in below.get(node, {}).items():
                waiting.append((f"{path}/{name}" if path else name, each))
        return found

    def key(self, state: State) -> Hashable:
        """The same for states that nobody can tell apart; much cheaper than their trees."""
        self._prepare()
        named = self._named(state)
        leading: dict[Node, list[Node]] = {}
        for (parent, _), node in named.items():
            if node is not None:
                leading.setdefault(node, []).append(parent)

        reached = dict.fromkeys(self._fixed, True)

        def is_reached(node: Node) -> bool:
            if node not in reached:
                reached[node] = any(map(is_reached, leading.get(node, ())))
            return reached[node]

        names = frozenset(
            (slot, node) for slot, node in named.items() if node is not None and is_reached(slot[0])
        )
        contents = frozenset(
            (node, content) for node, content in state.contents.items() if is_reached(node)
        )
        return names, contents

    def _named(self, state: State) -> dict[Slot, Node | None]:
        """Where the names lead that anything happens to."""
        named = {slot: self._base_slots.get(slot) for slot in self._moving}
        for leads in state.leads:
            named.update(leads)
        return named

    def _prepare(self) -> None:
        """Find out which names anything happens to, and what lies elsewhere."""
        if not self._moving:
            self._moving = {slot for change in self._changes() for slot, _ in change.leads}
            self._fixed = {0}
            for slot, node in self._base_slots.items():  # what lies above comes first
                if slot[0] in self._fixed and slot not in self._moving:
                    self._fixed.add(node)

    def _content(self, node: Node, state: State) -> bytes | None:
        content = state.contents.get(node)
        return self._base_files.get(node) if content is None else content

    def now(self) -> State:
        """What the files look like while the power is on."""
        leads = tuple(change.leads for change in self._changes())
        return State(len(self.events), leads, dict(self.files))


def _concerns(unit: _Unit, sync: Sync, model: Model) -> bool:
    """Whether a sync has to make a change of names durable."""
    inside = any(slot[0] == sync.node for slot, _ in unit.leads)
    targets = {node for _, node in unit.leads}
    own = sync.node in targets and (model.in_order or model.syncs_names)
    above = model.syncs_names and not targets.isdisjoint(sync.above)
    return inside or own or above


def _closed(wanted: Iterable[int], units: list[_Unit], *, inside: bool) -> frozenset[int]:
    """These units and all that they cannot be without.

    ``inside``: the making of the directories that they happen in as well.
    """
    found: set[int] = set()
    waiting = list(wanted)
    while waiting:
        number = waiting.pop()
        if number not in found:
            found.add(number)
            waiting.extend(units[number].after)
            waiting.extend(units[number].inside if inside else ())
    return frozenset(found)


def _ideals(
    pending: list[int], units: list[_Unit], random: Random, effort: Effort
) -> list[frozenset[int]]:
    """The sets of pending units that hold all that their own cannot be without; all of them last.

    Where there are too many: none, each alone, each missing, each two missing, every prefix, and
    random ones.
    """
    every = frozenset(pending)
    found: dict[frozenset[int], None] = {frozenset(): None}
    for number in pending:
        needed = units[number].needs & every
        found |= {each | {number}: None for each in found if needed <= each}
        if len(found) > effort.namings:
            found = dict.fromkeys(_some_ideals(pending, units, random, effort))
            break
    found.pop(every, None)
    return [*found, every]


def _some_ideals(
    pending: list[int], units: list[_Unit], random: Random, effort: Effort
) -> Iterator[frozenset[int]]:
    every = frozenset(pending)

    def without(missing: Iterable[int]) -> frozenset[int]:
        gone = set(missing)
        for number in pending:
            if units[number].needs & gone:
                gone.add(number)
        return every - gone

    yield frozenset()
    for place in sorted(_some(list(range(len(pending))), random, effort.namings // 4)):
        number = pending[place]
        yield (units[number].needs | {number}) & every
        yield without([number])
        yield frozenset(pending[:place])
    few = _some(pending, random, effort.namings // 4)
    yield from map(without, _some(list(itertools.combinations(few, 2)), random, effort.namings))
    for _ in range(effort.sample):
        likely = random.choice([0.2, 0.5, 0.8])
        yield without([number for number in pending if random.random() > likely])


def _torn(held: list[bytes], random: Random, limit: int) -> list[bytes]:
    """Contents that a file may have that held these, one after another; the oldest one first."""
    old, new = held[0], held[-1]
    shortest, longest = min(map(len, held)), max(map(len, held))
    blocks = range(0, longest, BLOCK)
    # A file may have grown by whole blocks when the power failed.
    sizes = {*map(len, held), *(size for size in blocks if shortest < size)}
    recipes: list[tuple[Sequence[bytes], int, bytes, int]] = []
    for fill in (b"\0", GARBAGE):
        recipes.append(([old] * len(blocks), len(new), fill, BLOCK))  # grown, and nothing else
        for place in range(len(blocks)):
            for most, one in ((new, old), (old, new)):
                sources = [most] * len(blocks)
                sources[place] = one
                recipes.append((sources, len(new), fill, BLOCK))
    recipes += [([new] * len(blocks), size, b"\0", BLOCK) for size in sorted(sizes)]
    for _ in range(limit):
        # Whatever unit a device writes at once, down to a sector.
        unit = random.choice([SECTOR, BLOCK])
        sources = random.choices(held, k=-(-longest // unit))
        recipes.append(
            (sources, random.choice(sorted(sizes)), random.choice([b"\0", GARBAGE]), unit)
        )
    made = held[1:-1] + [_assembled(*recipe) for recipe in _some(recipes, random, 2 * limit)]
    others = list(dict.fromkeys(each for each in made if each not in {old, new}))
    return [old, *_some(others, random, limit), new]


def _some(things: list[T], random: Random, limit: int) -> list[T]:
    return things if len(things) <= limit else random.sample(things, limit)


def _assembled(sources: Sequence[bytes], size: int, fill: bytes, unit: int) -> bytes:
    """A file of that size, each unit of it from another source; what a source lacks is filled."""
    pieces = []
    for place, source in enumerate(sources):
        piece = source[place * unit : (place + 1) * unit]
        pieces.append(piece + (fill * unit)[: unit - len(piece)])
    return b"".join(pieces)[:size]
