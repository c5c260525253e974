"""The output of commands: for a person on a terminal, for a program through a pipe, or as JSON."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Protocol

import click
from rich import box, filesize
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from engagement.cli.cleaning import printable

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
reveal_option = click.option("--reveal", is_flag=True, help="Show personal data: users, addresses, params, errors.")

NEED_ATTENTION = frozenset(
    {"bad", "failed", "in_doubt", "leases_expired", "held_by_gone_workers", "paused", "unchanged"}
)


def examples(*lines: str) -> str:
    """Return the part of a help page that shows `lines` as they are typed."""
    return "\n".join(("\b", "Examples:", *(f"  {line}" for line in lines)))


def show(
    title: str, facts: Mapping[str, object], *, as_json: bool, justify: Literal["left", "right"] = "right"
) -> None:
    """Print facts: a table for a person, `name=value` lines or JSON for a program."""
    if as_json:
        click.echo(json_of(facts))
    elif sys.stdout.isatty():
        _show_table(title, facts, justify)
    else:
        for name, value in facts.items():
            click.echo(f"{name}={for_program(value)}")


def show_rows(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> None:
    """Print rows: lines with tabs between for a program, a table for a person."""
    if sys.stdout.isatty():
        show_table(rows, dict.fromkeys(columns, for_person))
        return
    click.echo("\t".join(columns))
    for row in rows:
        click.echo("\t".join(str(for_program(row[name])) for name in columns))


def show_table(
    rows: Sequence[Mapping[str, object]],
    columns: Mapping[str, Callable[[str, object], str]],
    *,
    shortened: Collection[str] = (),
) -> None:
    """Print a table for a person. Each column comes with a function that puts its values in words.

    Where the terminal is too narrow, the last column is wrapped, or those named are `shortened` and no other.
    """
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False)
    flexible = shortened or list(columns)[-1:]
    for name in columns:
        table.add_column(_label(name), no_wrap=name not in flexible)
    for row in rows:
        cells = [(row[name] is not None and words_of(name, row[name])) or "" for name, words_of in columns.items()]
        styles = [_COLOURS.get(str(row[name]), "") for name in columns]
        table.add_row(
            *(
                Text(*cell, no_wrap=bool(shortened) or None, overflow="ellipsis")
                for cell in zip(cells, styles, strict=True)
            )
        )
    Console(highlight=False).print(table)


def _show_table(title: str, facts: Mapping[str, object], justify: Literal["left", "right"]) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify=justify, overflow="fold")
    for name, value in facts.items():
        needs_attention = name in NEED_ATTENTION and bool(value)
        style = "bold yellow" if needs_attention else None if value else "dim"
        table.add_row(_label(name), Text(for_person(name, value)), style=style)
    Console().print(table)


# Values --------------------------------------------------------------------------------------------------------------

_COLOURS = {"pending": "yellow", "sending": "yellow", "sent": "green", "failed": "red", "in_doubt": "magenta"}
_COLOURS |= {"delivered": "green", "read": "green", "undeliverable": "red"}


def for_program(value: object) -> Any:
    """Return a value for a program: moments in ISO 8601 and UTC, nothing for None."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    if isinstance(value, Mapping):
        return json_of(value)
    if isinstance(value, str):
        return printable(value)
    return "" if value is None else value


def json_of(value: object) -> str:
    """Return JSON with characters escaped that cannot be printed: a terminal would obey them."""
    written = json.dumps(value, ensure_ascii=False, default=for_program)
    return "".join(character if character.isprintable() else json.dumps(character)[1:-1] for character in written)


def _label(name: str) -> str:
    for unit in ("_seconds", "_bytes"):
        name = name.removesuffix(unit)
    return name.replace("_", " ")


def for_person(name: str, value: object) -> str:
    """Return a value for a person. `name` ends in the unit, if there is one (`table_bytes`)."""
    match value:
        case None:
            shown = "-"
        case datetime():
            shown = f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%SZ}"
        case int() | float() if name.endswith("_seconds"):
            shown = in_words(timedelta(seconds=value))
        case int() if name.endswith("_bytes"):
            shown = filesize.decimal(value)
        case bool():
            shown = "yes" if value else "no"
        case int() if name != "id":
            shown = f"{value:,}"
        case float():
            shown = f"{value:,.1f}"
        case Mapping():
            shown = json_of(value)
        case _:
            shown = printable(str(value))
    return shown


def how_far(_: str, moment: object) -> str:
    """Return the distance of a moment from now: `7h 11m ago`, `in 2d 3h`."""
    assert isinstance(moment, datetime)
    ahead = moment - datetime.now(UTC)
    return f"in {in_words(ahead)}" if ahead > timedelta(0) else f"{in_words(-ahead)} ago"


def in_words(length: timedelta) -> str:
    """Return a duration in its two largest units: `6h 58m`."""
    seconds = int(length.total_seconds())
    parts = (("d", seconds // 86_400), ("h", seconds // 3_600 % 24), ("m", seconds // 60 % 60), ("s", seconds % 60))
    largest = next((place for place, (_, count) in enumerate(parts) if count), len(parts) - 1)
    shown = [f"{count}{unit}" for unit, count in parts[largest : largest + 2] if count]
    return " ".join(shown) or "0s"


# Events ---------------------------------------------------------------------------------------------------------------


@contextmanager
def logging_to_stderr(level: int) -> Iterator[None]:
    """Show our events while the block runs."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("engagement")
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)


# Progress ------------------------------------------------------------------------------------------------------------


class Advance(Protocol):
    """Tells the progress of the work."""

    def __call__(self, completed: float, description: str = "", /) -> None:
        """Show that so much is done."""


@contextmanager
def progress(total: float, description: str, screen: Console) -> Iterator[Advance]:
    """Show a bar on `screen` while work is done, if a person is watching."""
    if not screen.is_terminal:
        yield lambda *_: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=screen, transient=True) as bar:
        task = bar.add_task(description, total=total)

        def advance(completed: float, words: str = "") -> None:
            bar.update(task, completed=completed, description=words or description)

        yield advance
