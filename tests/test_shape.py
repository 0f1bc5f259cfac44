"""The shape of the package: who makes which evidence, who may delete, and how long things get."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

import secimg_watch

if TYPE_CHECKING:
    from collections.abc import Iterator

HOME: Final = Path(secimg_watch.__file__).parent
MODULES: Final = {str(path.relative_to(HOME)): path for path in sorted(HOME.rglob("*.py"))}
TREES: Final = {name: ast.parse(path.read_bytes()) for name, path in MODULES.items()}

# A record is evidence: only the stage that gathers it may make it.
MAKERS: Final = {
    "Held": "hold.py",
    "Claimed": "claim.py",
    "Sealed": "sealing.py",
    "Staged": "vault.py",
    "Verified": "verify.py",
    "Committed": "vault.py",
    "Erased": "erase.py",
}

# Everything that may delete a file, and what it deletes.
DELETES: Final = {
    "erase.py:_take_away": "the plaintext of a committed object",
    "claim.py:remove_marker": "the producer's marker beside a claimed file",
    "vault.py:stage": "what an earlier process left under this object's temporary name",
    "vault.py:discard": "this process's temporary object",
    "vault.py:discard_temporaries": "an earlier process's temporary objects",
    "vault.py:_write": "an object that could not be written whole",
    "vault.py:replacing": "what an earlier process was about to replace objects with",
    "vault.py:replace": "what was not fit to replace an object",
    "vault.py:write_info": "what an earlier process left of a new vault.json",
    "vault.py:_unlink": "for those above",
    "rekey.py:__init__": "the list of a run to other keys",
    "rekey.py:finish": "the list of a run that is finished",
    "kernel.py:rename_noreplace": "the old one of two names of the same file",
    "restore.py:discard": "a restore's temporary file",
    "restore.py:_publish_over_placeholder": "a restore's own placeholder",
    "restore.py:_allowed_by_umask": "a restore's own probe of what the umask allows",
    "images.py:_replace_file": "a temporary file of the classic calls",
    "keys.py:_write": "a temporary key file",
    "keys.py:_remove_left": "an earlier process's temporary key files",
    "erase.py:undo_half_move": "the second name that half a move gave to a claimed file",
    "crashtest.py:crash_test": "the directory that it has made itself",
    "crashtest.py:begin": "what an earlier run left in that directory",
}
DELETING: Final = frozenset({"unlink", "remove", "removedirs", "rmtree", "_unlink"})

LONGEST_FUNCTION: Final = 50
LONGEST_MODULE: Final = 700
LONGER_MODULES: Final = {"policy.py": 900}  # the description of every key of the policy file


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return (node for node in ast.walk(tree) if isinstance(node, kinds))


def called(call: ast.Call) -> str:
    """The name that is called, without what it is looked up in."""
    match call.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def deletes(call: ast.Call) -> bool:
    match call.func:
        case ast.Attribute(value=ast.Name(id=module), attr=name):
            return name in DELETING and (module in {"os", "shutil"} or name == "unlink")
        case ast.Attribute(attr=name):
            return name == "unlink"
        case ast.Name(id=name):
            return name in DELETING
    return False


def test_there_is_something_to_look_at() -> None:
    assert set(MAKERS.values()) <= MODULES.keys()
    assert len(MODULES) > 40


@pytest.mark.parametrize("record", MAKERS)
def test_each_kind_of_evidence_is_made_in_one_place(record: str) -> None:
    makers = {
        name for name, tree in TREES.items() for call in calls(tree) if called(call) == record
    }
    assert makers == {MAKERS[record]}


def test_no_evidence_is_copied_with_other_contents() -> None:
    # What dataclasses.replace makes of a record was not gathered by its stage.
    for name, tree in TREES.items():
        imported = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        if "replace" in imported:
            assert imported.isdisjoint(MAKERS), name


def test_files_are_deleted_in_few_places_and_each_has_its_reason() -> None:
    found = set()
    for name, tree in TREES.items():
        inside = {id(c): f.name for f in functions(tree) for c in calls(f)}
        found |= {f"{name}:{inside.get(id(c), '')}" for c in calls(tree) if deletes(c)}
    assert found == DELETES.keys()


@pytest.mark.parametrize("name", MODULES)
def test_functions_are_short(name: str) -> None:
    long = {
        function.name: lines
        for function in functions(TREES[name])
        if (lines := (function.end_lineno or 0) - function.lineno + 1) > LONGEST_FUNCTION
    }
    assert long == {}


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_short(name: str) -> None:
    lines = len(MODULES[name].read_bytes().splitlines())
    assert lines <= LONGER_MODULES.get(name, LONGEST_MODULE)


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_printed_past_the_command_lines_own_ways(name: str) -> None:
    named = [(c.func, c.lineno) for c in calls(TREES[name])]
    assert [n for f, n in named if isinstance(f, ast.Name) and f.id == "print"] == []


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_left_for_later(name: str) -> None:
    text = MODULES[name].read_text(encoding="utf-8")
    for mark in ("TODO", "FIXME", "HACK", "NotImplementedError"):
        assert mark not in text


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is_for(name: str) -> None:
    assert ast.get_docstring(TREES[name])
