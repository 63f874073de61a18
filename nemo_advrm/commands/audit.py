"""The command ``audit``: is this reward model hackable?"""

from __future__ import annotations

from pathlib import Path

from nemo_advrm.audit.gate import failure
from nemo_advrm.audit.page import console_tables
from nemo_advrm.audit.runner import run_audit
from nemo_advrm.config.schema import AuditConfig
from nemo_advrm.engine import runtime
from nemo_advrm.report.table import to_text

EXIT_HACKABLE = 4


def main(cfg: AuditConfig) -> int:
    """Attacks ``target`` within ``budget``, judges what was found, and writes ``run_dir/report/index.html``.

    Returns 4 when ``fail_above`` is set and the audit does not pass it (:func:`nemo_advrm.audit.gate.failure`), else 0.
    """
    summary = run_audit(cfg)
    failed = "" if cfg.fail_above is None else failure(summary, cfg.fail_above)
    if runtime.current().is_writer:
        directory = Path(cfg.run_dir)
        print(to_text(summary["headline"], console_tables(summary), []), end="")
        print(f"finds: {directory / 'finds.jsonl'}  figures: {directory / 'summary.json'}")
        print(f"report: {directory / 'report' / 'index.html'}")
        if failed:
            print(f"failed: {failed}")
    return EXIT_HACKABLE if failed else 0
