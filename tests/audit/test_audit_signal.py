"""A signal during a search ends the audit at once, and the same command does the rest."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from reward_members import save_megatron

from nemo_advrm import cli
from nemo_advrm.audit.counting import Counted
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.errors import EXIT_PREEMPTED


def test_a_stopped_search_starts_over(
    single: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        f"policy={save_megatron(tmp_path / 'policy', head='lm')}",
        "target=python:audit_toys:loves_a_word",
        "judge=synthetic",
        "attacks=python:audit_toys:Tricks",
        "prompts=synthetic",
        "budget=48",
        "num_prompts=8",
        "num_held_out=0",
        "max_new_tokens=32",
        "accelerator=cpu",
        "also=rl.rollout_engine=python:audit_toys:Writer",
        f"run_dir={tmp_path / 'run'}",
    ]
    plain = Counted.score

    def signalled(self: Counted, rollouts: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, rollouts)  # type: ignore[arg-type]

    monkeypatch.setattr(Counted, "score", signalled)
    assert cli.main(["audit", *words]) == EXIT_PREEMPTED
    assert "during a search" in capsys.readouterr().err
    assert not (tmp_path / "run" / "attacks" / "Tricks" / "loves_a_word" / "summary.json").exists()
    monkeypatch.undo()
    assert cli.main(["audit", *words]) == 0
    assert (tmp_path / "run" / "report" / "index.html").exists()
