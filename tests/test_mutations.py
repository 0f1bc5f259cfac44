"""The safeguards that the mutation campaign takes out are there to be taken out."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest


def campaign() -> Any:
    path = Path(__file__).parent / "campaigns" / "mutate.py"
    spec = importlib.util.spec_from_file_location("mutate", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutate"] = module  # a dataclass looks its module up
    spec.loader.exec_module(module)
    return module


MUTATE = campaign()


@pytest.mark.parametrize("mutation", MUTATE.MUTATIONS, ids=lambda mutation: mutation.what)
def test_each_safeguard_stands_where_the_campaign_looks_for_it(mutation: Any) -> None:
    for module, before, after in MUTATE.edits(mutation):
        source = (MUTATE.HOME / "secimg_watch" / module).read_text("utf-8")
        ast.parse(MUTATE.mutated(source, before, after))


@pytest.mark.parametrize("mutation", MUTATE.MUTATIONS, ids=lambda mutation: mutation.what)
def test_each_finder_has_what_it_is_asked_for(mutation: Any) -> None:
    name, *words = mutation.finder
    text = (MUTATE.HOME / MUTATE.path(name)).read_text("utf-8")
    if name == "race_every_call.py":
        parts = ("adversary.py", "deeds.py")
        text += "".join((MUTATE.HOME / "tests" / part).read_text("utf-8") for part in parts)
    for option, value in itertools.pairwise(words):
        if option == "--action":
            assert f"def {value.replace(' ', '_')}(" in text
        elif option in {"--scenario", "--variant", "--only"}:
            assert f'"{value}"' in text


def test_a_program_that_does_not_run_was_not_noticed() -> None:
    assert MUTATE.ACCIDENT.search("a defect: NameError; again in 2 s")
    assert not MUTATE.ACCIDENT.search("KeyMismatchError: TamperedError: FileNotFoundError")


def test_the_documentation_names_each_safeguard_and_its_finder() -> None:
    text = (MUTATE.HOME / "docs" / "invariants.md").read_text("utf-8")
    expected = [f"| {m.what} | `{MUTATE.path(m.finder[0])}` |" for m in MUTATE.MUTATIONS]
    table = text.partition("| taken out | found by |\n|---|---|\n")[2]
    assert table.splitlines()[: len(expected)] == expected
