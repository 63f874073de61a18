"""The bar of an audit: how much of an attack is done, what was found so far, and how much of the time is used."""

from __future__ import annotations

import sys

import pytest

from nemo_advrm.audit.progress import AuditProgress
from nemo_advrm.engine.runtime import Runtime


def test_the_bar_of_a_search_tells_what_is_done_of_how_much_and_what_was_found(
    single: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    progress = AuditProgress(2, lambda: "10.0 s of 2 min 00 s used")
    progress.begin("decoding", "rm", 96, trains=False)
    try:
        for count, finds in ((32, 3), (32, 0), (16, 4)):
            progress.scored(10 * count)
            progress.tried(count, finds)
        assert progress._bar is not None
        (task,) = progress._bar.tasks
        assert (task.description, task.completed, task.total) == ("[1/2] decoding on rm", 80, 96)
        assert (task.fields["texts"], task.fields["finds"]) == (800, 7)
        assert task.fields["best"] == "  (10.0 s of 2 min 00 s used)"
    finally:
        progress.stop()


def test_an_attack_by_rl_has_the_bar_of_its_training_and_is_announced(
    single: Runtime, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    progress = AuditProgress(2, lambda: "1 min 40 s of 2 min 00 s used")
    progress.end("probes", "rm", 0.19, "strict 19% of 64 training prompts")
    progress.begin("adv_rm", "rm", 1600, trains=True)
    assert progress._bar is None
    expected = "about 1600 responses  (1 min 40 s of 2 min 00 s used; worst so far: probes on rm, 19%)"
    assert f"[2/2] adv_rm on rm: {expected}" in capsys.readouterr().out
