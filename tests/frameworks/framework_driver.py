"""Runs jobs in a framework's environment: ``framework_driver.py JOBS.json ANSWERS.json``; see conftest.py."""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    name, jobs = json.loads(Path(sys.argv[1]).read_text())
    module = importlib.import_module(name)
    answers: dict[str, Any] = dict.fromkeys(jobs)
    errors = []
    for job, arguments in jobs.items():
        try:
            answers[job] = getattr(module, job)(**arguments)
        except Exception:
            errors.append(f"{job}: {traceback.format_exc()}")
    Path(sys.argv[2]).write_text(json.dumps([answers, errors]))
