"""The command ``report``: writes ``report/`` of a run directory, or of several runs together, and prints its tables."""

from __future__ import annotations

import os
from pathlib import Path

from nemo_advrm.config.schema import Config
from nemo_advrm.errors import ConfigError
from nemo_advrm.report import write_joined, write_report


def main(cfg: Config) -> int:
    """Write the report of the run in ``run_dir``, or of those in ``report.runs`` together.

    The report of several runs is written to ``report/`` in the directory that contains all of them. Raises
    :class:`ConfigError` if a path is not a run.
    """
    runs = [Path(run) for run in cfg.report.runs or [cfg.run_dir]]
    for run in runs:
        if not (run / "state.json").is_file():
            key = "report.runs" if cfg.report.runs else "run_dir"
            raise ConfigError(f"{key}={run}: has no state.json, so it is not the directory of a run")
    if len(runs) == 1:
        report = write_report(runs[0])
    else:
        common = Path(os.path.commonpath([run.resolve().parent for run in runs]))
        report = write_joined(runs, common / "report")
    print(report.text())
    print(f"report: {report.page}")
    return 0
