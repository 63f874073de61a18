"""The report of a run, made from its files alone: report/{index.html,*.png,summary.json} and tables for the console."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nemo_advrm.files import write_text
from nemo_advrm.report.collect import collect
from nemo_advrm.report.joined import join_runs
from nemo_advrm.report.records import Run
from nemo_advrm.report.summary import summarise
from nemo_advrm.report.table import Table, to_text
from nemo_advrm.report.tables import joined_tables, tables

__all__ = ["Report", "write_joined", "write_report"]


class Report(NamedTuple):
    """A written report: the path of its index.html, and what it holds."""

    page: Path
    summary: dict[str, Any]
    tables: list[Table]

    def text(self, terminal: bool | None = None) -> str:
        """The headline, tables and notes for the console; see `table.to_text`."""
        return to_text(self.summary["headline"], self.tables, self.summary["notes"], terminal)


def write_report(run_dir: Path) -> Report:
    """Write RUN_DIR/report/ from the files of the run.

    The report names the parts that the run lacks. Raises DataError if `run_dir` is not a directory.
    """
    run = collect(Path(run_dir))
    summary = summarise(run)
    return _write(run, summary, tables(summary), run.directory / "report")


def write_joined(run_dirs: Sequence[Path], directory: Path) -> Report:
    """Write the report of several runs together into `directory`. Raises DataError as `join_runs` does."""
    summary = join_runs(run_dirs)
    return _write(None, summary, joined_tables(summary), directory)


def _write(run: Run | None, summary: dict[str, Any], shown: list[Table], directory: Path) -> Report:
    # matplotlib takes about a second to import
    from nemo_advrm.report.figures import draw_figures
    from nemo_advrm.report.page import render_page

    directory.mkdir(parents=True, exist_ok=True)
    figures = draw_figures(run, summary, directory)
    text = json.dumps(summary, indent=2, allow_nan=False, ensure_ascii=False)
    write_text(directory / "summary.json", f"{text}\n")
    write_text(directory / "index.html", render_page(run, summary, shown, figures))
    return Report(directory / "index.html", summary, shown)
