"""A judge that refuses some responses: what an audit makes of it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from audit_toys import LOVED
from reward_members import save_megatron
from torch import Tensor

from nemo_advrm import cli
from nemo_advrm.audit import panel, setup
from nemo_advrm.audit.finds import FoundAnswer, _pair
from nemo_advrm.audit.success import Successes, of_rows, ordinary_rates
from nemo_advrm.audit.summary import _counterpart
from nemo_advrm.audit.verdicts import Verdicts
from nemo_advrm.audit.weaknesses import Answer
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.errors import RewardSourceError
from nemo_advrm.rollouts.types import Rollouts
from nemo_advrm.synthetic.gold import gold_scores

TOYS = "python:audit_toys"


class Refuser:
    """The gold reward, which does not judge responses that have a word."""

    name = "refuser"

    def __init__(self, word: str) -> None:
        self.word = word
        self.asked = 0

    def score_answered(self, rollouts: Rollouts) -> Tensor:
        self.asked += len(rollouts)
        golds = gold_scores(rollouts.prompts, rollouts.responses, rollouts.ended)
        refused = [self.word in text.split() for text in rollouts.responses]
        return torch.tensor([math.nan if no else gold for no, gold in zip(refused, golds, strict=True)])

    def score(self, rollouts: Rollouts) -> Tensor:
        raise AssertionError("an audit asks for the answers that there are")

    def cost_line(self) -> str:
        return ""


def _split(gold_PN: Tensor) -> panel.Split:
    scores_PNK = torch.zeros(*gold_PN.shape, 1)
    sft = SFTScores([()] * len(gold_PN), [["a"] * gold_PN.size(1)] * len(gold_PN), scores_PNK, None)
    asked_N = torch.ones(gold_PN.numel(), dtype=torch.bool)
    return panel.Split("training", [], sft).with_verdicts(Verdicts(gold_PN.flatten(), asked_N))


def test_refusals_do_not_make_strict_success_easier() -> None:
    """One response in two is refused. Means in their place would make the spread 1.9 times too small."""
    nan = math.nan
    split = _split(torch.tensor([[1.0, nan, 3.0, nan], [nan, 0.0, nan, 2.0]]))
    # the variance of a response is (1 + 1 + 1 + 1) / 2, beside a mean of two 3: -1.96 lies 3.395 below the mean
    rows = [{"prompt_id": 0, "z": [1.0], "disagreement_z": 0.0}] * 3
    found = of_rows(rows, torch.tensor([2 - 3.3, 2 - 3.5, nan]), split, 1.96, underrates=False)
    assert found.strict_N is not None and found.strict_N.tolist() == [False, True, False]
    assert found.standard_N is not None and found.standard_N.tolist() == [True, True, False]


def test_the_only_judged_response_to_a_prompt_is_no_trial_of_the_null() -> None:
    nan = math.nan
    split = _split(torch.tensor([[1.0, 3.0, nan], [nan, 5.0, nan]]))
    found = Successes(*[torch.tensor([True, False, True, False, False, False])] * 3)
    strict = ordinary_rates(found, split)["strict"]
    assert (strict["rate"], strict["trials"]) == (1 / 2, 1)


def test_nothing_succeeds_on_a_prompt_whose_ordinary_responses_were_all_refused() -> None:
    split = _split(torch.tensor([[1.0, 2.0, 3.0], [math.nan] * 3, [0.0, 4.0, 2.0]]))
    rows = [{"prompt_id": 1, "z": [1.0], "disagreement_z": 0.0}]
    for underrates, gold in ((False, -9.0), (True, 9.0)):
        found = of_rows(rows, torch.tensor([gold]), split, 1.96, underrates)
        assert found.standard_N is not None and found.strict_N is not None
        assert not found.standard_N.any() and not found.strict_N.any()


def test_an_ordinary_response_without_a_score_is_no_pair_and_no_example() -> None:
    split = _split(torch.tensor([[0.0, math.nan, 1.0], [1.0, 2.0, 3.0]]))
    assert [split.own_gold(0, i) for i in range(3)] == [0.0, None, 1.0]
    # the third was cut off: of those that ended the mean, 0.5, would be the best
    sft = dataclasses.replace(split.sft, ended_PN=[[True, True, False], [True] * 3])
    split = dataclasses.replace(split, sft=sft)
    row = {"response": "b", "scores": (0.0,), "z": (2.0,), "disagreement_z": 2.0, "step": 0}
    answer = Answer("p", "b", True)
    found = FoundAnswer("probes", 0, split, 0, row, 2.0, -1.0, -2.0, True, False, answer)
    chosen = _pair(_Panel(), found)  # type: ignore[arg-type]
    assert [(pair.provenance.chosen_gold, pair.provenance.rejected_gold) for pair in chosen] == [(0.0, -1.0)]
    assert _counterpart(split, 0, 0) == 2


class _Panel:
    names = ("target",)

    def columns(self, target: int) -> list[int]:
        return [target]


def test_a_judge_that_refuses_most_is_an_error() -> None:
    with pytest.raises(RewardSourceError, match="no score to 3 of 4 ordinary responses to the training prompts"):
        _split(torch.tensor([[1.0, math.nan], [math.nan, math.nan]]))
    with pytest.raises(RewardSourceError, match="no score to 2 of 4"):  # no two to one prompt, so no spread
        _split(torch.tensor([[1.0, math.nan], [math.nan, 2.0]]))


def test_refused_finds_are_no_success_and_are_not_asked_again(
    single: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = save_megatron(tmp_path / "policy" / "model", head="lm")
    judge = Refuser(LOVED)
    monkeypatch.setattr(setup, "build_gold", lambda *_: judge)
    run = tmp_path / "run"
    words = [
        "audit",
        f"run_dir={run}",
        f"policy={policy}",
        "prompts=synthetic",
        f"target={TOYS}:loves_a_word",
        "judge=synthetic",
        f"attacks=[{TOYS}:Tricks]",
        "budget=90",
        "num_prompts=12",
        "num_held_out=0",
        "max_new_tokens=32",
        "accelerator=cpu",
        f"also=[rl.rollout_engine={TOYS}:Writer]",
    ]
    assert cli.main(words) == 0
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    (judged,) = (run / "attacks/Tricks").glob("*/judged_training.jsonl")
    rows = [json.loads(line) for line in judged.read_text().splitlines()]
    refused = [row for row in rows if row["score"] is None]
    assert refused and all(LOVED in row["response"].split() for row in refused)
    assert summary["unjudged"]["missing"] >= len(refused)
    assert summary["unjudged"]["asked"] == judge.asked
    (cell,) = summary["attacks"][0]["cells"].values()
    assert cell["training"]["strict"]["rate"] == 0.0  # all that this model overrates was refused
    assert (
        f"gave {summary['unjudged']['missing']} of {judge.asked} responses no score"
        in (run / "report/index.html").read_text()
    )
    assert cli.main(words) == 0
    assert judge.asked == summary["unjudged"]["asked"]
