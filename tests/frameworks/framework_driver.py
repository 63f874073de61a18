"""Runs one job in a framework's environment: ``framework_driver.py JOB.json ANSWER.json``; see conftest.py."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    module, job, arguments = json.loads(Path(sys.argv[1]).read_text())
    answer = getattr(importlib.import_module(module), job)(**arguments)
    Path(sys.argv[2]).write_text(json.dumps(answer))
