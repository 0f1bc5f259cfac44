"""A slice of the fuzzing campaign: what is read writes back, and all else is refused."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
import tracemalloc
from pathlib import Path
from random import Random
from typing import Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent / "campaigns"))  # where the campaigns lie

import fuzz_container
from fuzz_container import (
    IDENTITY,
    KINDS,
    LOCKS,
    MEMORY_CAPS,
    MEMORY_PER_BYTE,
    META,
    NAMES,
    OPENERS,
    TARGETS,
    CostsOnly,
    Parts,
    Tally,
    Violation,
    padded,
    records,
    sealed,
    whole,
)

from secimg_watch import container, recipients
from secimg_watch.container import Argon2idSlot, Meta, Wrap

CAMPAIGN: Final = Path(fuzz_container.__file__)
GUIDED_SECONDS: Final = 20
SEEDS: Final = {name: sorted(target.seeds()) for name, target in TARGETS.items()}

hundreds = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def seeds(name: str) -> st.SearchStrategy[bytes]:
    return st.sampled_from(SEEDS[name])


def edits() -> st.SearchStrategy[list[tuple[int, int, bytes]]]:
    """Places, how many bytes go there, and what comes instead."""
    return st.lists(
        st.tuples(st.integers(0, 3_000), st.integers(0, 40), st.binary(max_size=40)), max_size=4
    )


def edited(data: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for place, length, new in changes:
        at = place % (len(data) + 1)
        data = data[:at] + new + data[at + length :]
    return data


def rows() -> st.SearchStrategy[list[bytes]]:
    """Records of META: mostly those that have to be there, some of them changed."""
    genuine = records(container.pack_meta(META))
    numbers = st.integers(0, 2**16 - 1)
    foreign = st.builds(
        lambda tag, value: tag.to_bytes(2, "big") + len(value).to_bytes(4, "big") + value,
        st.one_of(numbers, st.integers(1, 20)),
        st.binary(max_size=80),
    )
    extra = st.lists(foreign, max_size=2)
    return st.one_of(
        extra.map(lambda more: sorted(genuine + more, key=lambda row: row[:2])),
        st.lists(st.one_of(st.sampled_from(genuine), foreign), max_size=16),
        st.permutations(genuine),
    )


def metas() -> st.SearchStrategy[bytes]:
    plain = st.builds(edited, seeds("meta"), edits())
    sizes = st.integers(0, 40_000).map(fuzz_container.whole_meta)
    return st.one_of(plain, rows().map(padded), sizes)


def parts() -> st.SearchStrategy[Parts]:
    """Objects whose parts need not fit together, and are sealed all the same."""
    return st.builds(
        Parts,
        locks=st.lists(st.sampled_from(LOCKS), min_size=1, max_size=3, unique_by=id).map(tuple),
        meta=st.one_of(metas().filter(lambda meta: 1_024 <= len(meta) <= 65_536)),
        preview=st.binary(max_size=60),
        body=st.one_of(st.just(bytes(300)), st.integers(0, 40_000).map(bytes)),
    )


@hundreds
@given(seeds("header"), edits())
def test_what_reads_as_a_header_packs_to_the_same_bytes(
    data: bytes, changes: list[tuple[int, int, bytes]]
) -> None:
    fuzz_container.check_header(edited(data, changes))


def test_every_flipped_bit_of_a_header_shows_in_what_it_packs_to() -> None:
    for locks in (LOCKS[:2], LOCKS[1:3], LOCKS[4:]):
        data = sealed(whole(0, locks=locks))
        header = data[: container.parse_prefix(data)]
        for place, bit in itertools.product(range(len(header)), range(8)):
            changed = bytearray(header)
            changed[place] ^= 1 << bit
            fuzz_container.check_header(bytes(changed))


@hundreds
@given(metas())
def test_what_reads_as_metadata_packs_to_the_same_bytes(data: bytes) -> None:
    fuzz_container.check_meta(data)


@hundreds
@given(seeds("object"), edits())
def test_a_changed_object_is_refused_as_promised(
    data: bytes, changes: list[tuple[int, int, bytes]]
) -> None:
    fuzz_container.check_object(edited(data, changes))


@hundreds
@given(parts(), st.integers(0, 255))
def test_two_readers_agree_on_what_is_sealed_in_earnest(parts: Parts, choice: int) -> None:
    data = bytes([choice]) + sealed(parts)
    fuzz_container.check_object(data)
    fuzz_container.check_agreement(data)


@settings(hundreds, max_examples=80)
@given(st.integers(0, 2**64), st.sampled_from(["header", "meta", "object"]))
def test_no_input_makes_a_reader_allocate_beyond_the_caps(seed: int, name: str) -> None:
    rng = Random(seed)
    data = rng.choice(SEEDS[name])
    data = TARGETS[name].change(data, rng, lambda old: fuzz_container.scrambled(old, rng))
    tracemalloc.start()
    try:
        TARGETS[name].check(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= MEMORY_CAPS + MEMORY_PER_BYTE * len(data)


def test_the_longest_sections_are_read_within_the_caps() -> None:
    for data in fuzz_container.heavy_objects():
        tracemalloc.start()
        try:
            fuzz_container.check_object(data)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak <= MEMORY_CAPS + MEMORY_PER_BYTE * len(data)


@hundreds
@given(seeds("text"), edits())
def test_a_changed_text_of_a_key_is_refused_as_promised(
    data: bytes, changes: list[tuple[int, int, bytes]]
) -> None:
    fuzz_container.check_text(edited(data, changes))


@hundreds
@given(st.sampled_from(range(len(KINDS))), st.text(max_size=80))
def test_any_text_is_refused_as_promised(kind: int, text: str) -> None:
    fuzz_container.check_text(bytes([kind]) + text.encode("utf-8", "surrogatepass"))


@hundreds
@given(
    st.integers(0, 57),
    st.sampled_from(
        [" ", "-", "\t", "\u017f", "\u0131", "\xa0", "\x1c", "\r\n", "=", "0", "a", ""]
    ),
)
def test_an_identity_has_one_text_however_it_was_typed(at: int, typed: str) -> None:
    text = recipients.format_identity(IDENTITY)
    for changed in (text[: at + 18] + typed + text[at + 18 :], text[:at] + typed + text[at + 1 :]):
        fuzz_container.check_text(b"\1" + changed.encode())
        fuzz_container.check_text(b"\3" + b"# one\n" + changed.encode())


@hundreds
@given(seeds("vault.json"), edits(), st.integers(0, 2**64))
def test_a_changed_vault_json_is_refused_as_promised(
    data: bytes, changes: list[tuple[int, int, bytes]], seed: int
) -> None:
    rng = Random(seed)
    fuzz_container.check_vault(edited(data, changes))
    fuzz_container.check_vault(
        fuzz_container.changed_vault(data, rng, lambda old: edited(old, changes))
    )


@pytest.mark.parametrize("end", ["\r", "\x0b", "\x0c", "\x1c", "\x1e", "\r\n", "\n"], ids=repr)
def test_a_line_of_an_identity_file_ends_where_the_format_says(end: str) -> None:
    text = recipients.format_identity(IDENTITY)
    file = f"# {text}{end}{text}{end}"
    outcome = fuzz_container.check_text(b"\3" + file.encode())
    assert outcome == ("read: file" if end.endswith("\n") else "refused: file")


def test_every_seed_gets_as_far_as_it_should() -> None:
    furthest = {"header": "read", "meta": "read", "object": "opened", "vault.json": "read"}
    for name, outcome in furthest.items():
        outcomes = [TARGETS[name].check(data) for data in TARGETS[name].seeds()]
        assert outcomes.count(outcome) * 3 >= len(outcomes)
    texts = [TARGETS["text"].check(data) for data in TARGETS["text"].seeds()]
    assert set(texts) == {f"read: {kind}" for kind in KINDS}


def test_every_target_is_reached_by_unguided_inputs(tmp_path: Path) -> None:
    tally = fuzz_container.run_random(200, tmp_path, seed=7)
    assert not tally.violations
    assert tally.agreed > 20
    assert {outcome.partition(":")[0] for outcome in tally.outcomes} == set(NAMES)
    assert {f"object: refused: {step}" for step in ("header", "META", "BODY", "no key")} < set(
        tally.outcomes
    )


def test_a_violation_is_counted_and_its_input_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unable(_data: bytes) -> Meta:
        raise RecursionError("too deep")

    monkeypatch.setattr(container, "parse_meta", unable)
    tally = Tally(tmp_path)
    for _ in range(2):
        tally.run("meta", b"input", weigh=False)
    assert tally.violations == {"meta: RecursionError: too deep": 2}
    (saved,) = tmp_path.iterdir()
    assert saved.read_bytes() == b"input"
    assert "2  violations" in tally.report()


def test_a_derivation_beyond_the_caps_would_be_noticed() -> None:
    wrap = Wrap(bytes(32), bytes(32), bytes(48))
    with pytest.raises(Violation, match="derivation 1"):
        CostsOnly().derive(b"word", Argon2idSlot(bytes(16), 2**21, 1, 1, bytes(32), wrap))
    passwords, cheap = CostsOnly(), Argon2idSlot(bytes(16), 8_192, 1, 1, bytes(32), wrap)
    passwords.derive(b"word", cheap)
    passwords.derive(b"word", cheap)
    with pytest.raises(Violation, match="derivation 3"):
        passwords.derive(b"word", cheap)
    assert any(not openers for openers in OPENERS)


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris, the guided fuzzer, is not there"
)
def test_the_guided_search_finds_nothing_in_its_first_seconds(tmp_path: Path) -> None:
    command = [sys.executable, str(CAMPAIGN), "--seconds", str(GUIDED_SECONDS)]
    done = subprocess.run(
        [*command, "--save", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "         0  violations" in done.stdout
    assert "coverage: cov: " in done.stdout
