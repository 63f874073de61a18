"""Stage ``report``: writes ``report/`` of a run directory and prints its table."""

from __future__ import annotations

from pathlib import Path

from nemo_advrm.errors import ConfigError
from nemo_advrm.report import render_summary, write_report
from nemo_advrm.schema import Config


def main(cfg: Config) -> int:
    """Write the report of the run in ``run_dir``; raises :class:`ConfigError` when there is no run."""
    run_dir = Path(cfg.run_dir)
    if not (run_dir / "state.json").is_file():
        raise ConfigError(f"run_dir={cfg.run_dir}: no state.json there, so no run to report on")
    page = write_report(run_dir)
    print(render_summary(run_dir))
    print(f"report: {page}")
    return 0
