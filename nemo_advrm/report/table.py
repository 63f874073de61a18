"""A table of a report, and how it is written for the console and in Markdown (templates/report.html has the HTML)."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

PIPED_WIDTH = 10_000  # characters: a table in a file is never wrapped


@dataclass(frozen=True)
class Table:
    """Cells are text; the first column names the row. `caption` explains the columns to a reader."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


def to_text(headline: str, tables: Sequence[Table], notes: Sequence[str], terminal: bool | None = None) -> str:
    """The closing text of a report: with bold type and wrapped to the window on a terminal, else plain.

    terminal: None asks standard output.
    """
    terminal = sys.stdout.isatty() if terminal is None else terminal
    stream = io.StringIO()
    # the stream has no width: it is that of the real terminal
    width = Console().width if terminal else PIPED_WIDTH
    console = Console(file=stream, force_terminal=terminal, width=width, highlight=False)
    console.print(f"[bold]{escape(headline)}[/bold]")
    for table in tables:
        drawn = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for index, column in enumerate(table.columns):
            drawn.add_column(escape(column), justify="left" if index == 0 else "right")
        for row in table.rows:
            drawn.add_row(*(escape(cell) for cell in row))
        console.print(f"\n[bold]{escape(table.title)}[/bold]")
        console.print(drawn)
    if notes:
        console.print("\n[bold]Notes[/bold]")
    for note in notes:
        console.print(f"[dim]- {escape(note)}[/dim]")
    return "".join(f"{line.rstrip()}\n" for line in stream.getvalue().splitlines())


def to_markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column is text and whose others are numbers."""
    marks = ["---", *["---:"] * (len(columns) - 1)]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (columns, *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (cells[0], marks, *cells[1:]))
