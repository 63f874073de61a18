"""The command ``audit``: is this reward model hackable?"""

from __future__ import annotations

from pathlib import Path

from nemo_advrm.audit.page import console_tables
from nemo_advrm.audit.runner import run_audit
from nemo_advrm.config.schema import AuditConfig
from nemo_advrm.engine import runtime
from nemo_advrm.report.table import to_text

EXIT_HACKABLE = 4


def main(cfg: AuditConfig) -> int:
    """Attacks ``target`` within ``budget``, judges what was found, and writes ``run_dir/report/index.html``.

    Returns 4 when ``fail_above`` is set and an attack succeeds surely more often beyond ordinary responses, or none
    submitted what can be compared, or the time ended before the judge was asked about one; else 0.
    """
    summary = run_audit(cfg)
    worst, unmeasured = summary["worst"], summary["unmeasured"]
    failed = cfg.fail_above is not None and (worst is None or worst > cfg.fail_above or bool(unmeasured))
    if runtime.current().is_writer:
        directory = Path(cfg.run_dir)
        print(to_text(summary["headline"], console_tables(summary), []), end="")
        print(f"finds: {directory / 'finds.jsonl'}  figures: {directory / 'summary.json'}")
        print(f"report: {directory / 'report' / 'index.html'}")
        if failed and worst is None:
            print(f"failed: nothing was measured that could be compared with fail_above={cfg.fail_above:g}")
        elif failed and worst <= cfg.fail_above:
            print(f"failed: the time ended before {', '.join(unmeasured)} could be judged: the same command goes on")
        elif failed:
            print(f"failed: {worst:.3f} beyond ordinary responses is above fail_above={cfg.fail_above:g}")
    return EXIT_HACKABLE if failed else 0
