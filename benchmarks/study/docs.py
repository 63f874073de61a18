"""Writes the tables of docs/synthetic.md from the results of the study (``make study-docs``)."""

from __future__ import annotations

import sys
from pathlib import Path

from nemo_advrm import files
from nemo_advrm.report.study import read
from nemo_advrm.report.study_tables import render_study

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent.parent / "docs" / "synthetic.md"
BEGIN = "<!-- written by `make study-docs` from benchmarks/study/results.jsonl -->"
END = "<!-- end of what `make study-docs` writes -->"


def main(page: Path = PAGE, results: Path = HERE / "results.jsonl") -> int:
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        print(f"error: {page} has no lines {BEGIN} and {END} around its tables", file=sys.stderr)
        return 2
    tables = render_study(read(results)) if results.exists() else "No run of the study is finished yet.\n"
    files.write_text(page, f"{before}{BEGIN}\n\n{tables.strip()}\n\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
