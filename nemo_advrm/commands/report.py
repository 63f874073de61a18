"""Stage ``report``: writes ``report/`` of a run directory, or of several runs together, and prints its tables."""

from __future__ import annotations

import os
from pathlib import Path

from nemo_advrm.config.schema import Config
from nemo_advrm.errors import ConfigError
from nemo_advrm.report import render_summary, write_report
from nemo_advrm.report.table import as_text


def main(cfg: Config) -> int:
    """Write the report of the run in ``run_dir``, or of those in ``report.runs`` together.

    Several runs are reported in ``report/`` of the directory that they have in common. Raises :class:`ConfigError`
    when there is no run.
    """
    runs = [Path(run) for run in cfg.report.runs or [cfg.run_dir]]
    for run in runs:
        if not (run / "state.json").is_file():
            key = "report.runs" if cfg.report.runs else "run_dir"
            raise ConfigError(f"{key}={run}: no state.json there, so no run to report on")
    if len(runs) == 1:
        page = write_report(runs[0])
        print(render_summary(runs[0]))
    else:
        from nemo_advrm.report.joined import joined_tables, write_joined

        home = Path(os.path.commonpath([run.resolve().parent for run in runs]))
        page, summary = write_joined(runs, home / "report")
        print(as_text(summary["headline"], joined_tables(summary), summary["notes"]))
    print(f"report: {page}")
    return 0
