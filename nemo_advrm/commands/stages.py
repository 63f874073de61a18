"""The command ``stages``: lists the steps of a pipeline, for job schedulers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from nemo_advrm.config.schema import Config
from nemo_advrm.pipeline.dag import added_since, is_skipped, of_run
from nemo_advrm.pipeline.hybrids import lacks_features


def main(cfg: Config) -> int:
    """Prints a line per step, separated by tabs: name, kind, complete, skipped or todo, and the names it waits for."""
    directory = Path(cfg.run_dir)
    state = _read_state(directory / "state.json")

    def detail(name: str, key: str) -> Any:
        return state.get(name, {}).get(key)

    report = directory / "report" / "index.html"
    reported = bool(state) and report.exists() and _written_at(report) >= _written_at(directory / "state.json")
    run, steps = of_run(cfg)
    for step in steps:
        if is_skipped(run, step, detail):
            status = "skipped"
        elif added_since(step, detail) or lacks_features(run, step, detail):
            status = "todo"
        elif detail(step.name, "status") == "complete" or (step.kind == "report" and reported):
            status = "complete"
        else:
            status = "todo"
        print(step.name, step.kind, status, ",".join(step.after) or "-", sep="\t")
    return 0


def _written_at(path: Path) -> float:
    return path.stat().st_mtime


def _read_state(path: Path) -> dict[str, dict[str, Any]]:
    from nemo_advrm.pipeline.state import read_state
    from nemo_advrm.run_directory import run_files

    if not path.exists():
        if run_files.products(path.parent):
            print(f"{path} is missing: every step is listed as todo", file=sys.stderr)
        return {}

    stages: dict[str, dict[str, Any]] = read_state(path)["stages"]
    return stages
