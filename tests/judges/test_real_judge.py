"""SmolLM2-135M-Instruct as a judge. It is far too small to judge well: tested is that every answer is accounted for."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from fake_judge import chats

from nemo_advrm import cli
from nemo_advrm.config.schema import Config, JudgeConfig
from nemo_advrm.errors import RewardSourceError
from nemo_advrm.rewards.base import answered_scores
from nemo_advrm.rewards.judges.pairwise import pairwise
from nemo_advrm.rewards.judges.scalar import JudgeReward
from nemo_advrm.rewards.sources import build, parse

START_SECONDS = 300.0  # of the endpoint, which undoes the quantisation of the weights first
GOOD = ["The capital of France is Paris.", "Paris.", "It is Paris, a city of two million people."]
BAD = ["the the the the", "Berlin!!!", "I like cheese."]


def judge(endpoint: str, home: Path, **options: object) -> JudgeReward:
    limits = {"connect_seconds": START_SECONDS, "timeout_seconds": 300.0, "max_tokens": 24, "connections": 2}
    cfg = Config(run_dir=str(home), judge=JudgeConfig(**{**limits, **options}))  # type: ignore[arg-type]
    source = build(parse(f"openai:{endpoint}", "audit.judge"), "judge", cfg)
    assert isinstance(source, JudgeReward)
    return source


def test_every_response_has_a_score_on_the_scale_or_is_counted_without(endpoint: str, tmp_path: Path) -> None:
    source, rows = judge(endpoint, tmp_path), chats([*GOOD, *BAD], "What is the capital of France?")
    scores_N = answered_scores(source, rows)
    answered_N, counts = ~scores_N.isnan(), source.judge.counts
    print(scores_N, source.cost_line())
    # this model answers the question that it should judge, and gives no score: which is told, not made up
    assert ((scores_N >= 1) & (scores_N <= 10))[answered_N].all()
    assert counts.questions == 6 and counts.refused + counts.unreadable + counts.too_long == int((~answered_N).sum())
    # tokens as the endpoint counts them: no less than one for eight letters of the question, no more than were allowed
    assert counts.requests >= 6 and counts.without_usage == 0 and counts.prompt_tokens > 6 * 100
    assert 0 < counts.completion_tokens <= 24 * counts.requests

    again = judge(endpoint, tmp_path)
    torch.testing.assert_close(answered_scores(again, rows), scores_N, equal_nan=True)
    assert again.judge.counts.requests == 0 and again.judge.counts.cached == counts.requests


def test_comparisons_in_both_orders_are_accounted_for(endpoint: str, tmp_path: Path) -> None:
    source, prompt = judge(endpoint, tmp_path), "What is the capital of France?"
    found = pairwise(source).compare(chats(GOOD, prompt), chats(BAD, prompt))
    print(found.line(), source.cost_line(), sep="\n")
    assert found.wins + found.ties + found.losses + found.unanswered == 3 and source.judge.counts.questions == 6
    assert found.bias is not None and found.bias.choices <= 6
    assert found.bias.choices == 0 or 0 <= found.bias.first <= 1
    swapped = pairwise(source).compare(chats(BAD, prompt), chats(GOOD, prompt))
    torch.testing.assert_close(swapped.verdicts_N, -found.verdicts_N, equal_nan=True)
    assert math.isclose(swapped.bias.first, found.bias.first) if found.bias.choices and swapped.bias else True


def test_a_model_that_the_endpoint_does_not_serve_is_named(endpoint: str, tmp_path: Path) -> None:
    url = endpoint.partition("#")[0]
    with pytest.raises(RewardSourceError, match=r"refused the request: status 4\d\d .*other/model"):
        judge(f"{url}#other/model", tmp_path).score(chats(GOOD[:1]))


def test_evaluate_judges_by_it(endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "What is the capital of France?", "chosen": GOOD[0], "rejected": BAD[0]}]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"run_dir={tmp_path}", f"data.validation_path={pairs}", "evaluate.mismatch=false"]
    words += ["trainer.accelerator=cpu"]
    limits = [f"judge.connect_seconds={START_SECONDS}", "judge.max_tokens=24", "judge.on_no_answer=lowest"]
    assert cli.main(["evaluate", f"ensemble.members=[openai:{endpoint}]", *words, *limits]) == 0
    out = capsys.readouterr().out
    assert "(1 pairs)" in out and ": 2 questions, " in out
