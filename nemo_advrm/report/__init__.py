"""The report of a run, made from its files alone: report/{index.html,*.png,summary.json} and a console table."""

from __future__ import annotations

import json
from pathlib import Path

from nemo_advrm.files import write_text
from nemo_advrm.report.tables import render_summary

__all__ = ["render_summary", "write_report"]


def write_report(run_dir: Path) -> Path:
    """Write RUN_DIR/report/ from the files of the run and return the path of its index.html.

    Missing parts of the run are named in the report. Raises DataError when `run_dir` is not a directory.
    """
    # Drawing needs matplotlib (about a second to import), the console table does not.
    from nemo_advrm.report.collect import collect
    from nemo_advrm.report.figures import draw_figures
    from nemo_advrm.report.page import render_page
    from nemo_advrm.report.summary import summarise

    run = collect(Path(run_dir))
    summary = summarise(run)
    directory = run.directory / "report"
    directory.mkdir(exist_ok=True)
    figures = draw_figures(run, summary, directory)
    text = json.dumps(summary, indent=2, allow_nan=False, ensure_ascii=False)
    write_text(directory / "summary.json", text + "\n")
    index = directory / "index.html"
    write_text(index, render_page(run, summary, figures))
    return index
