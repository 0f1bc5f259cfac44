"""The safeguards that the mutation campaign takes out are there to be taken out."""

from __future__ import annotations

import ast
import importlib.util
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
    places = (MUTATE.HOME / "tests", MUTATE.HOME / "tests" / "campaigns")
    assert any((place / mutation.finder[0]).exists() for place in places)
