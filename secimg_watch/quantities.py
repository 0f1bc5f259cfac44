"""Durations, sizes and reserves as people write them: ``2s``, ``1GiB``, ``2%``.

Every ``parse_*`` function raises ValueError with one lower-case sentence that says what was
wrong and what may be written instead. ``exact_*`` writes what the parser reads back as the
same value; ``format_*`` rounds for people.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise

DURATION_PATTERN = r"^([0-9]{1,11}(?:\.[0-9]{1,3})?) ?(ms|s|m|h|d)$"
SIZE_PATTERN = r"^([0-9]{1,18}(?:\.[0-9]{1,3})?) ?((?:[KkMmGgTt][Ii]?)?[Bb])?$"
SHARE_PATTERN = r"^([0-9]{1,2}(?:\.[0-9]{1,3})?) ?%$"

MAX_DURATION = 366 * 86400.0
"""Seconds. Longer waits overflow the timeouts of some system calls, and are typing errors."""

MAX_SIZE = 2**63 - 1
"""Bytes: what the kernel's signed 64-bit file offset can express."""

_SECOND = 1000  # milliseconds
_MINUTE = 60 * _SECOND
_DURATION_UNITS = {"d": 1440 * _MINUTE, "h": 60 * _MINUTE, "m": _MINUTE, "s": _SECOND, "ms": 1}
_BINARY_UNITS = {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
_DECIMAL_UNITS = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "kB": 10**3, "B": 1}
_SIZE_FACTORS = {unit.lower(): n for unit, n in (_BINARY_UNITS | _DECIMAL_UNITS).items()}
_SHOWN = 40  # characters of a wrong value that a message repeats


@dataclass(frozen=True, slots=True)
class Reserve:
    """Space to keep free: a share of the whole (0 to 1) or a number of bytes; the other is 0."""

    share: float
    bytes: int

    def of(self, total: int) -> int:
        """Return the bytes to keep free on a file system of ``total`` bytes."""
        return max(int(total * self.share), self.bytes)


def parse_duration(text: str) -> float:
    """Read a duration such as ``500ms``, ``2s``, ``5m``, ``1h`` or ``2d`` as seconds.

    The result is a whole number of milliseconds, at most 366 days.

    Raises:
        ValueError: not a number with one of these units, too long, or finer than 1 ms.
    """
    match = re.fullmatch(DURATION_PATTERN, text)
    if match is None:
        raise ValueError(
            f"{_quoted(text)} is not a duration; "
            'write a number and one of ms, s, m, h, d, such as "2s"',
        )
    milliseconds = Decimal(match[1]) * _DURATION_UNITS[match[2]]
    if milliseconds % 1:
        raise ValueError(f"{_quoted(text)} is finer than a millisecond; round it")
    seconds = int(milliseconds) / _SECOND
    if seconds > MAX_DURATION:
        raise ValueError(f'{_quoted(text)} is too long a time; write at most "366d"')
    return seconds


def parse_size(text: str) -> int:
    """Read a size such as ``4096``, ``10MB`` (decimal) or ``1GiB`` (binary) as bytes.

    Upper and lower case mean the same. A fraction is rounded down to a whole byte.

    Raises:
        ValueError: not a number with a known unit, or more than a file can hold.
    """
    match = re.fullmatch(SIZE_PATTERN, text)
    if match is None:
        raise ValueError(
            f"{_quoted(text)} is not a size; write a number and one of "
            'B, kB, MB, GB, TB, KiB, MiB, GiB, TiB, such as "10MB" or "1GiB"',
        )
    size = int(Decimal(match[1]) * _SIZE_FACTORS[(match[2] or "B").lower()])
    if size > MAX_SIZE:
        raise ValueError(f"{_quoted(text)} is more than a file system can hold; write less")
    return size


def parse_share_or_size(text: str) -> Reserve:
    """Read a share of the whole such as ``2%`` (below 100%), or a size as ``parse_size`` does.

    Raises:
        ValueError: neither a share nor a size.
    """
    if "%" not in text:
        return Reserve(0.0, parse_size(text))
    match = re.fullmatch(SHARE_PATTERN, text)
    if match is None:
        raise ValueError(
            f'{_quoted(text)} is not a share; write a number from 0 to below 100 and %, as in "2%"',
        )
    return Reserve(float(match[1]) / 100, 0)


def exact_duration(seconds: float) -> str:
    """Write ``seconds`` (rounded to 1 ms) so that ``parse_duration`` reads the same value."""
    milliseconds = round(seconds * _SECOND)
    if milliseconds == 0:
        return "0s"
    unit = next(unit for unit, factor in _DURATION_UNITS.items() if milliseconds % factor == 0)
    return f"{milliseconds // _DURATION_UNITS[unit]}{unit}"


def exact_size(size: int) -> str:
    """Write ``size`` bytes so that ``parse_size`` reads the same value."""
    for unit, factor in _BINARY_UNITS.items():
        if size and size % factor == 0:
            return f"{size // factor}{unit}"
    return str(size)


def exact_reserve(reserve: Reserve) -> str:
    """Write ``reserve`` so that ``parse_share_or_size`` reads the same value."""
    return f"{reserve.share * 100:g}%" if reserve.share else exact_size(reserve.bytes)


def format_duration(seconds: float) -> str:
    """Write ``seconds`` for people in the two largest units: ``450ms``, ``3.2s``, ``2h 5m``.

    Rounded down. A negative time, as a clock that was set back gives, is shown as 0s.
    """
    milliseconds = max(0, int(seconds * _SECOND))
    if milliseconds == 0:
        return "0s"
    if milliseconds < _SECOND:
        return f"{milliseconds}ms"
    if milliseconds < _MINUTE:
        return f"{milliseconds // 100 / 10:g}s"
    neighbours = pairwise(_DURATION_UNITS.items())
    (unit, factor), (lesser, part) = next(pair for pair in neighbours if milliseconds >= pair[0][1])
    rest = milliseconds % factor // part
    return f"{milliseconds // factor}{unit}" + (f" {rest}{lesser}" if rest else "")


def format_size(size: int) -> str:
    """Write ``size`` bytes for people in the largest binary unit, rounded down: ``1.4 MiB``."""
    for unit, factor in _BINARY_UNITS.items():
        if size >= factor:
            return f"{size * 10 // factor / 10:.1f}".removesuffix(".0") + f" {unit}"
    return f"{size} B"


def _quoted(text: str) -> str:
    # JSON escapes controls and everything that is not ASCII, so that the message stays one line.
    return json.dumps(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
