"""Writes the tables of docs/synthetic.md and the README from the results of the study (``make study-docs``)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from nemo_advrm import files
from nemo_advrm.report.study import Line, read
from nemo_advrm.report.study_tables import render_main_arms, render_study

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PAGES: dict[Path, Callable[[Sequence[Line]], str]] = {
    ROOT / "docs" / "synthetic.md": render_study,
    ROOT / "README.md": render_main_arms,
}
BEGIN = "<!-- written by `make study-docs` from benchmarks/study/results.jsonl -->"
END = "<!-- end of what `make study-docs` writes -->"


def main(results: Path = HERE / "results.jsonl") -> int:
    lines = read(results) if results.exists() else []
    return max(write(page, render(lines)) for page, render in PAGES.items())


def write(page: Path, tables: str) -> int:
    """Replace what stands between the two comments of a page; return 2, after an error message, for one without."""
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        print(f"error: {page} has no lines {BEGIN} and {END} around its tables", file=sys.stderr)
        return 2
    shown = tables.strip() or "No run of the study is finished yet."
    files.write_text(page, f"{before}{BEGIN}\n\n{shown}\n\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
