"""Policy files as YAML: plain data, the place of everything in it, and bounds on both.

What comes out is made of ``dict`` (keys are text), ``list``, ``str``, ``int``, ``float``,
``bool`` and ``None``, resolved as YAML 1.1 does, except that dates stay text. Anchors, aliases
and merge keys (``<<``) work within the bounds. Python objects are never built.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import yaml

from secimg_watch.errors import PolicyError
from secimg_watch.names import display

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

MAX_TEXT = 1_000_000
"""Characters. A policy of a thousand folders has a fifth of that."""

MAX_NODES = 10_000
"""Scalars, lists and mappings, aliases counted as often as they are used: a few lines of
aliases to aliases stand for billions of values otherwise."""

MAX_DEPTH = 50
"""Levels of nesting. A policy has five."""

_MAX_NUMBER = 2**63 - 1
_SHOWN = 60  # characters of the file that a message repeats
_SHOWN_SYNTAX = 200  # the same for the parser's own words
_MAX_DIGITS = 64  # characters of a number: Python refuses, or takes long over, huge ones
_UNICODE_BREAKS = "\x85\u2028\u2029"
_TAG = "tag:yaml.org,2002:"
_TEXT_TAGS = frozenset(_TAG + name for name in ("str", "timestamp", "value", "merge"))

Location: TypeAlias = tuple[str | int, ...]
"""Keys and list indexes from the top of the document to a value."""

Position: TypeAlias = tuple[int, int]
"""Line and column, both counted from 1."""


@dataclass(frozen=True, slots=True, order=True)
class Fault:
    """One thing wrong with a policy file, where it is, and what to do about it."""

    line: int
    column: int
    what: str
    hint: str = ""

    def text(self, filename: str) -> str:
        """Return the fault as ``FILE:LINE:COLUMN: what; hint``."""
        end = f"; {self.hint}" if self.hint else ""
        return f"{display(filename)}:{self.line}:{self.column}: {self.what}{end}"


@dataclass(frozen=True, slots=True)
class Document:
    """A policy file's data, and where each part of it was written.

    ``faults`` are those that leave the rest readable (a duplicate key: the first one counts),
    so that whoever checks the data can report all of them at once.
    """

    data: Any
    faults: tuple[Fault, ...]
    _places: dict[Location, tuple[Position, Position]] = field(repr=False)

    def position(self, path: Location, *, key: bool = False) -> Position:
        """Return where the value at ``path`` begins, or its key; else its nearest parent."""
        while path not in self._places:
            if not path:
                return (1, 1)
            path, key = path[:-1], False
        return self._places[path][0 if key else 1]


def load(text: str, filename: str) -> Document:
    """Read one YAML document. ``filename`` appears in messages only.

    Raises:
        PolicyError: not YAML, several documents, or over the bounds above.
    """
    try:
        return _read(text)
    except _RefusedError as error:
        raise refusal(filename, [error.fault]) from None


def dump(data: Any) -> str:
    """Write plain data (see above) as YAML, keys in their given order."""
    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
    if any(line_break in text for line_break in _UNICODE_BREAKS):
        # The emitter would write these as they are, and they are read back as something else.
        text = yaml.safe_dump(data, sort_keys=False, width=100)
    return text


def refusal(filename: str, faults: Iterable[Fault]) -> PolicyError:
    """Make the error that carries all ``faults``, in the order of the file."""
    texts = tuple(fault.text(filename) for fault in sorted(set(faults)))
    count = "1 fault" if len(texts) == 1 else f"{len(texts)} faults"
    return PolicyError(
        f"the policy {display(filename)} has {count}",
        faults=texts,
        hint="correct the file, then run: secimg-watch check",
    )


class _RefusedError(Exception):
    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.what)
        self.fault = fault


class _Loader(yaml.SafeLoader):
    """Composes nodes, but no deeper and no more of them than the bounds allow.

    The check comes before the composer's own recursion, so that nesting cannot exhaust the
    interpreter's stack.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        self._nodes += 1
        _check_bounds(self._depth, self._nodes, _place(parent.start_mark if parent else None))
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _read(text: str) -> Document:
    if len(text) > MAX_TEXT:
        raise _RefusedError(Fault(1, 1, f"the file is longer than {MAX_TEXT} characters"))
    root = _compose(text)
    if root is None:
        return Document(None, (), {})
    builder = _Builder()
    data = builder.build(root, (), _place(root.start_mark))
    return Document(data, tuple(builder.faults), builder.places)


def _compose(text: str) -> yaml.Node | None:
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        what = f"the character U+{ord(text[error.position]):04X} is not allowed in YAML"
        raise _RefusedError(Fault(line, column, what)) from None
    try:
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        raise _RefusedError(_syntax_fault(error)) from None
    except (ValueError, OverflowError):
        # The scanner passes an escape beyond Unicode, or a huge version number, on to Python.
        line, column = _place(loader.get_mark())
        what = "not valid YAML: a number in an escape or a directive is out of range"
        raise _RefusedError(Fault(line, column, what)) from None
    finally:
        loader.dispose()


def _syntax_fault(error: yaml.MarkedYAMLError) -> Fault:
    line, column = _place(error.problem_mark or error.context_mark)
    parts = [part for part in (error.context, error.problem) if part]
    hint = ""
    if error.problem and "'\\t'" in error.problem:
        hint = "indent with spaces; YAML does not allow tabs there"
    return Fault(line, column, f"not valid YAML: {display(', '.join(parts)[:_SHOWN_SYNTAX])}", hint)


def _place(mark: yaml.Mark | None) -> Position:
    return (mark.line + 1, mark.column + 1) if mark else (1, 1)


def _shown(text: str) -> str:
    return display(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def _check_bounds(depth: int, nodes: int, place: Position) -> None:
    if depth > MAX_DEPTH:
        raise _RefusedError(Fault(*place, f"nested deeper than {MAX_DEPTH} levels"))
    if nodes > MAX_NODES:
        raise _RefusedError(Fault(*place, f"more than {MAX_NODES} values, aliases counted"))


class _Builder:
    """Turns nodes into plain data, and notes the place of every key and value."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.places: dict[Location, tuple[Position, Position]] = {}
        self._nodes = 0
        self._scalars = yaml.constructor.SafeConstructor()

    def build(self, node: yaml.Node, path: Location, key_place: Position) -> Any:
        place = _place(node.start_mark)
        self._nodes += 1
        _check_bounds(len(path) + 1, self._nodes, place)
        self.places[path] = (key_place, place)
        if isinstance(node, yaml.MappingNode):
            self._expect_tag(node, "map")
            return {
                key: self.build(value, (*path, key), _place(key_node.start_mark))
                for key, (key_node, value) in self._pairs(node, 1).items()
            }
        if isinstance(node, yaml.SequenceNode):
            self._expect_tag(node, "seq")
            return [
                self.build(item, (*path, index), _place(item.start_mark))
                for index, item in enumerate(node.value)
            ]
        return self._scalar(node)

    def _pairs(self, node: yaml.MappingNode, depth: int) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """Return a mapping's pairs by key: its own ones, then those it merges in."""
        pairs: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        merged: list[yaml.Node] = []
        for key_node, value in node.value:
            if key_node.tag == _TAG + "merge":
                merged.append(value)
            elif (key := self._key(key_node)) is None:
                continue
            elif key in pairs:
                first = _place(pairs[key][0].start_mark)[0]
                what = f'"{_shown(key)}" is given twice, first on line {first}'
                self._fault(key_node, what, "remove one of the two")
            else:
                pairs[key] = (key_node, value)
        for source in self._merge_sources(merged, depth):
            for key, pair in self._pairs(source, depth + 1).items():
                pairs.setdefault(key, pair)
        return pairs

    def _merge_sources(self, values: list[yaml.Node], depth: int) -> Iterator[yaml.MappingNode]:
        for value in values:
            listed = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for source in listed:
                self._nodes += 1 + len(source.value)
                _check_bounds(depth, self._nodes, _place(source.start_mark))
                if isinstance(source, yaml.MappingNode):
                    yield source
                else:
                    self._fault(source, '"<<" merges mappings only', "name an anchored mapping")

    def _key(self, node: yaml.Node) -> str | None:
        if isinstance(node, yaml.ScalarNode) and node.tag in _TEXT_TAGS:
            return self._text(node)
        written = f" ({_shown(node.value)})" if isinstance(node, yaml.ScalarNode) else ""
        what = f"a key must be text, and YAML reads this one{written} as something else"
        self._fault(node, what, "write it in quotes")
        return None

    def _scalar(self, node: yaml.Node) -> Any:
        reader = {
            _TAG + "int": self._scalars.construct_yaml_int,
            _TAG + "float": self._scalars.construct_yaml_float,
            _TAG + "bool": self._scalars.construct_yaml_bool,
            _TAG + "null": self._scalars.construct_yaml_null,
        }.get(node.tag)
        if reader is None:
            if node.tag not in _TEXT_TAGS:
                self._expect_tag(node, "str")
            return self._text(node)
        try:
            return _bounded(reader, node)
        except (ValueError, KeyError, IndexError, OverflowError):
            what = f"this is no {node.tag.removeprefix(_TAG)} value, or out of range"
            self._fault(node, what, "write it in quotes if text was meant")
            return None

    def _text(self, node: yaml.Node) -> str:
        text: str = node.value
        if text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text):
            return text
        self._fault(node, "the text holds half of a surrogate pair", "write the character itself")
        return text.encode("utf-8", "replace").decode()

    def _expect_tag(self, node: yaml.Node, name: str) -> None:
        if node.tag != _TAG + name:
            what = f"the tag {_shown(node.tag)} has no meaning in a policy"
            self._fault(node, what, "remove the tag")

    def _fault(self, node: yaml.Node, what: str, hint: str) -> None:
        self.faults.append(Fault(*_place(node.start_mark), what, hint))


def _bounded(reader: Callable[[Any], Any], node: yaml.Node) -> Any:
    if len(node.value) > _MAX_DIGITS:
        raise ValueError("too many digits")
    value = reader(node)
    if isinstance(value, int) and abs(value) > _MAX_NUMBER:
        raise ValueError("more than 64 bits")
    return value
