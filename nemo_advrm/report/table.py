"""A table of a report, and tables as text for the console (rich on a terminal, plain when piped)."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """Cells are text, the first column names the row; `caption` explains the columns to a reader."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str


def as_text(headline: str, tables: Sequence[Table], notes: Sequence[str], terminal: bool | None = None) -> str:
    """The closing text of a report: with rich's rules and bold on a terminal, aligned plain text otherwise.

    terminal: None asks standard output.
    """
    if terminal is None:
        terminal = sys.stdout.isatty()
    return (_rich if terminal else _plain)(headline, tables, notes)


def _plain(headline: str, tables: Sequence[Table], notes: Sequence[str]) -> str:
    blocks = [headline]
    for table in tables:
        widths = [max(len(row[index]) for row in (table.columns, *table.rows)) for index in range(len(table.columns))]
        lines = [_aligned(row, widths) for row in (table.columns, *table.rows)]
        lines.insert(1, "  ".join("-" * width for width in widths))
        blocks.append("\n".join([table.title, *lines]))
    if notes:
        blocks.append("\n".join(["Notes", *(f"- {note}" for note in notes)]))
    return "\n\n".join(blocks) + "\n"


def _aligned(row: tuple[str, ...], widths: list[int]) -> str:
    cells = [
        cell.ljust(width) if index == 0 else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def _rich(headline: str, tables: Sequence[Table], notes: Sequence[str]) -> str:
    stream = io.StringIO()
    # The width is asked of the real terminal, since the stream has none.
    console = Console(file=stream, force_terminal=True, width=Console().width, highlight=False)
    console.print(f"[bold]{escape(headline)}[/bold]")
    for table in tables:
        drawn = RichTable(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for index, column in enumerate(table.columns):
            drawn.add_column(column, justify="left" if index == 0 else "right")
        for row in table.rows:
            drawn.add_row(*(escape(cell) for cell in row))
        console.print(drawn)
    for note in notes:
        console.print(f"[dim]- {escape(note)}[/dim]")
    return stream.getvalue()
