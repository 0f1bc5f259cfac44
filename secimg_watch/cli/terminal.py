"""How things look on a terminal: tables, progress bars, errors. The only door to rich.

Results go to standard output, everything else to standard error. rich is imported when something
is drawn, so that a daemon never loads it.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING, Any, TextIO

from secimg_watch.names import display

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from secimg_watch.errors import SecimgError
    from secimg_watch.report import Report


def say(text: str) -> None:
    """One line of result. What a terminal would obey, in a name for instance, is escaped."""
    _put(sys.stdout, display(text))


def note(text: str) -> None:
    """One line for the person, not for a program that reads the result; escaped as by `say`."""
    _put(sys.stderr, display(text))


def _put(stream: TextIO, text: str) -> None:
    stream.write(f"{text}\n")
    stream.flush()


def complain(error: SecimgError) -> None:
    """An error as a person should see it: the sentence, all faults there are, and the remedy."""
    note(f"secimg-watch: {error}")
    for fault in getattr(error, "faults", ()):
        note(f"  {fault}")
    if error.hint:
        note(f"  hint: {error.hint}")


def emit(data: Any) -> None:
    """A result as JSON. Names that are not valid text are shown escaped."""
    _put(sys.stdout, json.dumps(data, indent=2, default=str, ensure_ascii=True))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Rows under headings: aligned and coloured on a terminal, tab-separated otherwise."""
    if not sys.stdout.isatty():
        _put(sys.stdout, "\t".join(columns))
        for row in rows:
            _put(sys.stdout, "\t".join(display(str(cell)) for cell in row))
        return
    from rich.console import Console  # noqa: PLC0415 - see the module
    from rich.table import Table  # noqa: PLC0415

    drawn = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        drawn.add_row(*(_plain(display(str(cell))) for cell in row))
    Console().print(drawn)


def _plain(text: str) -> Any:
    from rich.text import Text  # noqa: PLC0415

    return Text(text)  # never read as markup: a name may contain brackets


def details(fields: Mapping[str, object]) -> None:
    """Names and values, one pair a line."""
    width = max(map(len, fields))
    for name, value in fields.items():
        say(f"{name:<{width}}  {display(str(value))}")


@contextlib.contextmanager
def progress(
    what: str, total: int | None = None, *, thread: bool = True
) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar on a terminal, nothing elsewhere.

    Gives a function that takes how many are done, and the total if it changed. Without
    ``thread`` the bar moves with its calls alone, for a process that forks meanwhile.
    """
    if not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), auto_refresh=thread) as bar:
        task = bar.add_task(what, total=total)

        def show(done: int, new_total: int | None) -> None:
            total_now = total if new_total is None else new_total
            bar.update(task, completed=done, total=total_now, refresh=not thread)

        yield show


@contextlib.contextmanager
def live() -> Iterator[Callable[[Report], None]]:
    """A line about the running service that renews itself on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda _report: None
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.status import Status  # noqa: PLC0415

    with Status("starting", console=Console(stderr=True)) as status:
        yield lambda report: status.update(_plain(report.summary()))
