"""Durations, sizes and reserves: what is read, what is refused, what people are shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secimg_watch.quantities import (
    DURATION_PATTERN,
    MAX_SIZE,
    SIZE_PATTERN,
    Reserve,
    exact_duration,
    exact_reserve,
    exact_size,
    format_duration,
    format_size,
    parse_duration,
    parse_share_or_size,
    parse_size,
)

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2s", 2.0),
        ("0s", 0.0),
        ("500ms", 0.5),
        ("5m", 300.0),
        ("1h", 3600.0),
        ("2d", 172_800.0),
        ("1.5h", 5400.0),
        ("0.001s", 0.001),
        ("2 s", 2.0),
        ("366d", 366 * 86400.0),
    ],
)
def test_durations_are_read_as_seconds(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "2", "s", "-1s", "1e3s", "2S", "2 sconds", "2  s", " 2s", "2s\n", "٢s", "1.s"]
)
def test_what_is_no_duration_is_refused_and_the_units_are_named(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a duration; .* ms, s, m, h, d"):
        parse_duration(text)


def test_a_duration_finer_than_a_millisecond_is_refused() -> None:
    with pytest.raises(ValueError, match="finer than a millisecond"):
        parse_duration("0.5ms")


def test_a_duration_beyond_a_year_is_refused() -> None:
    with pytest.raises(ValueError, match='write at most "366d"'):
        parse_duration("367d")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("7B", 7),
        ("10MB", 10_000_000),
        ("10mb", 10_000_000),
        ("1kB", 1000),
        ("1KiB", 1024),
        ("1GiB", 2**30),
        ("1.5 GiB", 3 * 2**29),
        ("2TiB", 2**41),
        ("1TB", 10**12),
    ],
)
def test_sizes_are_read_as_bytes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1", "1M", "1 PB", "0x10", "1,5GB", "1GiB\n"])
def test_what_is_no_size_is_refused_and_the_units_are_named(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a size; .* KiB, MiB, GiB, TiB"):
        parse_size(text)


def test_a_size_beyond_64_bits_is_refused() -> None:
    assert parse_size(str(10**18 - 1)) == 10**18 - 1
    with pytest.raises(ValueError, match="more than a file system can hold"):
        parse_size("9999999999TB")


def test_a_share_is_kept_free_of_the_whole() -> None:
    reserve = parse_share_or_size("2%")
    assert reserve == Reserve(0.02, 0)
    assert reserve.of(1000) == 20


def test_a_size_is_kept_free_whatever_the_whole_is() -> None:
    reserve = parse_share_or_size("1KiB")
    assert reserve == Reserve(0.0, 1024)
    assert reserve.of(10) == 1024


@pytest.mark.parametrize("text", ["100%", "-1%", "%", "2%%", "2 percent%", "50%\n"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a share"):
        parse_share_or_size(text)


@given(st.integers(0, 366 * 86_400_000))
def test_an_exact_duration_is_read_back_as_the_same_value(milliseconds: int) -> None:
    assert parse_duration(exact_duration(milliseconds / 1000)) == milliseconds / 1000


@given(st.integers(0, 10**18 - 1))
def test_an_exact_size_is_read_back_as_the_same_value(size: int) -> None:
    assert parse_size(exact_size(size)) == size


@given(st.integers(0, 99_999))
def test_an_exact_share_is_read_back_as_the_same_value(thousandths: int) -> None:
    reserve = parse_share_or_size(f"{thousandths / 1000:.3f}%")
    assert parse_share_or_size(exact_reserve(reserve)) == reserve


@given(st.integers(0, 10**18 - 1))
def test_an_exact_reserve_of_bytes_is_read_back_as_the_same_value(size: int) -> None:
    assert parse_share_or_size(exact_reserve(Reserve(0.0, size))) == Reserve(0.0, size)


@given(st.one_of(st.text(), st.from_regex(DURATION_PATTERN), st.from_regex(SIZE_PATTERN)))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    for parse in (parse_duration, parse_size, parse_share_or_size):
        assert _refusal(parse, text).isprintable()


def _refusal(parse: Callable[[str], object], text: str) -> str:
    try:
        parse(text)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (-5.0, "0s"),
        (0.0, "0s"),
        (0.0004, "0s"),
        (0.45, "450ms"),
        (2.0, "2s"),
        (3.27, "3.2s"),
        (59.99, "59.9s"),
        (60.0, "1m"),
        (92.0, "1m 32s"),
        (7500.0, "2h 5m"),
        (86_400.0, "1d"),
        (90_000.0, "1d 1h"),
        (86_460.0, "1d"),
    ],
)
def test_people_see_the_two_largest_units_of_a_duration(seconds: float, shown: str) -> None:
    assert format_duration(seconds) == shown


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (2**20 - 1, "1023.9 KiB"),
        (3 * 2**30, "3 GiB"),
        (MAX_SIZE, "8388607.9 TiB"),
    ],
)
def test_people_see_a_size_in_its_largest_unit(size: int, shown: str) -> None:
    assert format_size(size) == shown


@given(st.integers(0, 2**50))
def test_a_shown_size_is_never_larger_and_less_than_a_tenth_smaller(size: int) -> None:
    shown = parse_size(format_size(size))
    assert shown <= size
    assert size - shown <= size / 10


@given(st.floats(0, 300 * 86400))
def test_a_shown_duration_is_never_longer_than_the_real_one(seconds: float) -> None:
    shown = sum(map(parse_duration, format_duration(seconds).split()))
    assert shown <= seconds
    assert seconds - shown <= max(seconds / 10, 0.001)
