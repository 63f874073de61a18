"""The stage ``rlhf`` on several members: they are standardised by responses of the policy that it starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_members import one_step_of_rl, save_megatron

from nemo_advrm import cli
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.rewards.sft_responses import finished_line


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def settings(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    home = tmp_path_factory.mktemp("rlhf")
    members = [save_megatron(home / "one", seed=3), save_megatron(home / "two", seed=4, num_layers=2)]
    return one_step_of_rl(home, members)


def test_members_are_standardised_by_the_starting_policys_responses(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert cli.main(["rlhf", *settings, f"run_dir={run}", "ensemble.aggregate=lcb", "rl.log_samples=8"]) == 0
    out = capsys.readouterr().out
    assert "reference: 6 SFT responses, " in out
    assert "reward: lcb of 2 members, on standardised scores" in out and "exactly the min" in out
    reference, used = _rows(run / "reference.jsonl"), _rows(run / "standardisation.jsonl")
    assert len(reference) == 2 * 3 and len(used) == 2
    for k, row in enumerate(used):
        scores = [line["scores"][k] for line in reference]
        mean = sum(scores) / 6
        assert row["mean"] == pytest.approx(mean, abs=1e-5)
        variance = sum((s - mean) ** 2 for s in scores) / 5 * 7 / 6
        assert row["std"] == pytest.approx(variance**0.5, rel=1e-4)
    assert "monitor: ensemble_disagreement, threshold " in out and "at most 14.29% of SFT responses" in out  # 1 of 7
    (metrics,), samples = _rows(run / "metrics.jsonl"), _rows(run / "samples.jsonl")
    z = [row["detectors"]["ensemble_disagreement"] for row in samples]
    assert len(z) == 8 and metrics["detector/ensemble_disagreement/z"] == pytest.approx(sum(z) / 8, abs=1e-4)
    assert 0 <= metrics["detector/ensemble_disagreement/beyond"] <= 1
    # a given reference of the same members gives the same statistics, and nothing is sampled
    again = tmp_path / "again"
    given = f"ensemble.reference_path={run / 'reference.jsonl'}"
    assert cli.main(["rlhf", *settings, f"run_dir={again}", given]) == 0
    assert not (again / "reference.jsonl").exists()
    assert [row["std"] for row in _rows(again / "standardisation.jsonl")] == [row["std"] for row in used]


def test_a_detectors_penalty_is_subtracted_and_monitors_are_recorded(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, one = tmp_path / "run", settings[0].partition(",")[0] + "]"
    own = ["detector.monitors=[sft_entropy]", "rl.detector_penalty=0.5", "rl.log_samples=8"]
    penalty = ["rl.penalty_detector=mahalanobis", "rl.apply_unended_penalty=false"]
    assert cli.main(["rlhf", one, *settings[1:], f"run_dir={run}", *own, *penalty]) == 0
    out = capsys.readouterr().out
    assert "reward: less 0.5 times the standardised mahalanobis" in out and "monitor: sft_entropy, threshold" in out
    samples, (metrics,) = _rows(run / "samples.jsonl"), _rows(run / "metrics.jsonl")
    assert {"mahalanobis", "sft_entropy"} == set(samples[0]["detectors"])
    for row in samples:
        assert row["reward"] == pytest.approx(row["proxy"] - 0.5 * row["detectors"]["mahalanobis"], abs=1e-4)
    (used,) = _rows(run / "standardisation.jsonl")  # a single member is brought to the penalty's unit
    assert metrics["proxy"] == pytest.approx((metrics["scores/1"] - used["mean"]) / used["std"], abs=1e-4)
    # the same file of SFT responses fits the same detectors
    again, given = tmp_path / "again", f"ensemble.reference_path={run / 'reference.jsonl'}"
    assert cli.main(["rlhf", one, *settings[1:], f"run_dir={again}", *own, *penalty, given]) == 0
    assert _rows(again / "samples.jsonl") == samples
    # a member that gives scores only is refused before anything is loaded
    server = ["ensemble.members=[http://localhost:1]", *settings[1:], f"run_dir={tmp_path / 'none'}"]
    assert cli.main(["rlhf", *server, "rl.detector_penalty=1"]) == 2
    assert "mahalanobis reads hidden_states of a member, and ensemble.members[0]=http" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    # nor does a file that was written for other detectors serve
    short = ["detector.monitors=[sft_log_prob]", given, f"run_dir={tmp_path / 'short'}"]
    assert cli.main(["rlhf", one, *settings[1:], *short]) == 2
    assert "sft_log_prob reads log_probs of member 1, which reference.jsonl" in capsys.readouterr().err


def test_raw_scores_are_combined_where_that_is_asked_for(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert cli.main(["rlhf", *settings, f"run_dir={run}", "ensemble.standardise=false"]) == 0
    assert "reward: mean of 2 members, on raw scores" in capsys.readouterr().out
    assert not (run / "reference.jsonl").exists() and not (run / "standardisation.jsonl").exists()
    (metrics,) = _rows(run / "metrics.jsonl")
    assert metrics["proxy"] == pytest.approx((metrics["scores/1"] + metrics["scores/2"]) / 2, abs=1e-5)


def test_the_share_of_sft_responses_that_ended_is_told() -> None:
    def line(ended: list[list[bool]]) -> str:
        return finished_line(SFTScores([(), ()], [["a", "b"]] * 2, torch.zeros(2, 2, 2), None, ended))

    most = "reference: 4 SFT responses, 75% of them ended within rl.max_new_tokens"
    assert line([[True, True], [True, False]]) == most
    assert "25% of them ended" in line([[False, False], [True, False]])
    assert "warning: most were cut off" in line([[False, False], [True, False]])
    refused = SFTScores([(), ()], [["", "b"], ["", ""]], torch.zeros(2, 2, 2), None, [[False, True], [False, False]])
    assert "warning: 75% are empty: the endpoint" in finished_line(refused) and "raise" not in finished_line(refused)
