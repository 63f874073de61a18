"""A slow judge and a budget in minutes: what is asked, what waits, and that the same command goes on."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from audit_toys import LOVED
from reward_members import save_megatron
from torch import Tensor

from nemo_advrm import cli
from nemo_advrm.audit import runner, setup
from nemo_advrm.audit.finds import Judged, _best_first
from nemo_advrm.audit.panel import Split, texts
from nemo_advrm.audit.success import Successes, best_of_ordinary, ordinary_rates
from nemo_advrm.audit.time_spent import RESERVE, JudgeTime
from nemo_advrm.audit.verdicts import Verdicts, stored_verdicts
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.errors import RewardSourceError
from nemo_advrm.rollouts.types import Prompt, Rollouts
from nemo_advrm.synthetic.gold import gold_scores

TOYS = "python:audit_toys"
MESSAGES = ({"role": "user", "content": "q"},)


class SlowJudge:
    """The gold reward; each answer moves the clock on by ``seconds``."""

    name = "slow"

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.now = 0.0
        self.asked: list[str] = []

    def clock(self) -> float:
        return self.now

    def score(self, rollouts: Rollouts) -> Tensor:
        self.now += self.seconds * len(rollouts)
        self.asked += rollouts.responses
        if not rollouts.prompts[0]:
            return torch.tensor([float(text) for text in rollouts.responses])
        return torch.tensor(gold_scores(rollouts.prompts, rollouts.responses, rollouts.ended))


def _numbers(count: int) -> Rollouts:
    return texts([()] * count, [str(i) for i in range(count)], [True] * count)


def test_questions_end_with_their_time_and_go_on_in_the_next_turn(tmp_path: Path) -> None:
    judge = SlowJudge(seconds=1.0)
    judged = functools.partial(stored_verdicts, tmp_path / "judged.jsonl", judge, _numbers(40), False)
    time = JudgeTime(tmp_path, 30.0, judge.clock)
    time.turn(spent=10.0, parts=2.0)  # 10 s are left for this turn
    found = judged(time, list(reversed(range(40))))
    # 1, 2, then a quarter of the 7 that are left, again and again
    assert judge.asked == [str(i) for i in reversed(range(30, 40))]
    assert found.asked_N.tolist() == [False] * 30 + [True] * 10
    assert found.gold_N[30:].tolist() == list(range(30, 40)) and found.gold_N[:30].isnan().all()
    assert (time.seconds, time.questions, time.each) == (10.0, 10, 1.0)
    again = JudgeTime(tmp_path, 30.0, judge.clock)  # another call of the same command
    again.turn(spent=10.0, parts=1.0)  # 30 - 10 - 10
    found = judged(again, list(range(40)))
    assert judge.asked[10:] == [str(i) for i in range(10)]
    assert int(found.asked_N.sum()) == 20


def test_every_call_may_judge_for_the_reserve_when_the_time_is_over(tmp_path: Path) -> None:
    judge = SlowJudge(seconds=1.0)
    for call in range(1, 3):
        time = JudgeTime(tmp_path, 40.0, judge.clock)
        time.turn(spent=100.0, parts=2.0)
        found = stored_verdicts(tmp_path / "a.jsonl", judge, _numbers(20), False, time, range(20))
        assert int(found.asked_N.sum()) == call * RESERVE * 40 / 2
        time.turn(spent=100.0, parts=1.0)  # the rest of the reserve
        found = stored_verdicts(tmp_path / "b.jsonl", judge, _numbers(20), False, time, range(20))
        assert int(found.asked_N.sum()) == call * RESERVE * 40 / 2


def test_a_search_and_its_judge_share_one_part_of_the_time(tmp_path: Path) -> None:
    time = JudgeTime(tmp_path, 100.0, lambda: 0.0)
    time.turn(spent=30.0, parts=4.0, search=10.0)  # 80 s before the search, 20 s for each of four, 10 s of them used
    assert time._left == pytest.approx(10.0)
    time.turn(spent=30.0, parts=4.0, search=40.0)  # it used more than its part: the judge has its part of the reserve
    assert time._left == pytest.approx(15.0 / 4)


def test_a_fast_judge_is_asked_everything(tmp_path: Path) -> None:
    judge = SlowJudge(seconds=0.0)
    time = JudgeTime(tmp_path, 1.0, judge.clock)
    time.turn(spent=0.0, parts=1.0)
    found = stored_verdicts(tmp_path / "judged.jsonl", judge, _numbers(1000), False, time, range(1000))
    assert found.asked_N.all()
    rows = [json.loads(line) for line in (tmp_path / "judged.jsonl").read_text().splitlines()]
    assert rows[7] == {"response": "7", "score": 7.0}


def _split(gold_PN: Tensor, asked_PN: Tensor) -> Split:
    prompts, count = gold_PN.shape
    scores_PNK = torch.arange(count).float().repeat(prompts, 1)[..., None]
    sft = SFTScores([MESSAGES] * prompts, [["a"] * count] * prompts, scores_PNK, None)
    split = Split("training", [Prompt(p, MESSAGES, [1]) for p in range(prompts)], sft)
    return split.with_verdicts(Verdicts(gold_PN.flatten(), asked_PN.flatten()))


def test_what_was_not_asked_is_no_trial() -> None:
    nan = float("nan")
    gold_PN = torch.tensor([[1.0, 2.0, nan], [3.0, 1.0, 2.0], [nan] * 3, [nan, nan, nan]])
    asked_PN = torch.tensor([[True, True, False], [True] * 3, [False] * 3, [True] * 3])
    split = _split(gold_PN, asked_PN)
    rows = [{"prompt_id": p, "response": "b", "rank": 0} for p in (0, 1, 2)]
    yes_N, gold_N = torch.tensor([True, True, False]), torch.tensor([0.0, 0.0, 0.0])
    success = Successes(yes_N, yes_N, yes_N)

    def judged(*asked: bool) -> Judged:
        return Judged(_RESULT, split, rows, gold_N, torch.tensor(asked), success)

    def trials(*asked: bool) -> list[bool]:
        first = judged(*asked).first()
        assert first.strict_N is not None
        return first.strict_N.tolist()

    assert trials(True, True, True) == [True, True, False]  # the third prompt has nothing to compare with
    assert trials(True, False, True) == [True, False]
    assert trials(False, False, False) == [False]  # that to which it submitted nothing
    assert judged(True, False, True).unknown_prompts == {1, 2} and len(judged(True, False, True).best) == 3
    assert _best_first([*rows, {"prompt_id": 1, "rank": 1}], split) == [0, 1, 3, 2]
    ordinary = ordinary_rates(Successes(*[torch.tensor([True, False, True] * 4)] * 3), split)["strict"]
    assert (ordinary["rate"], ordinary["trials"]) == (3 / 5, 2)
    best = best_of_ordinary(Successes(*[torch.tensor([True, False, True] * 4)] * 3), split, 0).strict_N
    assert best is not None and len(best) == 2  # the third response, to the second and the fourth prompt


_RESULT: Any = None


def test_a_judge_too_slow_for_the_ordinary_responses_is_an_error_that_says_how_to_go_on() -> None:
    gold_PN, asked_PN = torch.full((4, 2), float("nan")), torch.zeros(4, 2, dtype=torch.bool)
    gold_PN[0, 0], asked_PN[0, 0] = 1.0, True
    with pytest.raises(RewardSourceError, match=r"asked about 1 of 8 ordinary .* the same command goes on"):
        _split(gold_PN, asked_PN)


def _slow_audit(
    monkeypatch: pytest.MonkeyPatch, home: Path, target: str, budget: str, responses: int
) -> tuple[SlowJudge, list[str]]:
    """A judge that takes an hour for an answer, and the words of an audit in which all else takes no time."""
    judge = SlowJudge(seconds=3600.0)
    monkeypatch.setattr(setup, "build_gold", lambda *_: judge)
    monkeypatch.setattr(setup, "JudgeTime", functools.partial(JudgeTime, clock=judge.clock))
    monkeypatch.setattr(runner, "samples_for", lambda *_: 36)
    return judge, [
        "audit",
        f"run_dir={home / 'run'}",
        f"policy={save_megatron(home / 'policy' / 'model', head='lm')}",
        "prompts=synthetic",
        f"target={TOYS}:{target}",
        "judge=synthetic",
        f"attacks=[{TOYS}:Tricks]",
        f"budget={budget}",
        "num_prompts=12",
        "num_held_out=0",
        "max_new_tokens=32",
        f"responses_per_prompt={responses}",
        "accelerator=cpu",
        f"also=[rl.rollout_engine={TOYS}:Writer]",
    ]


def test_an_audit_with_a_slow_judge_says_what_it_did_not_judge_and_goes_on(
    single: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The budget is 100 hours, of which everything but the judge takes nothing."""
    judge, words = _slow_audit(monkeypatch, tmp_path, "loves_a_word", "100h", 8)
    run = tmp_path / "run"
    assert cli.main([*words, "--fail-above", "0.05"]) == 4
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    assert judge.now <= 100 * 3600 + 3600
    assert summary["unjudged"]["asked"] == len(judge.asked) < 101
    assert summary["unjudged"]["waiting"] > 0
    (cell,) = summary["attacks"][0]["cells"].values()
    assert cell["training"]["strict"]["trials"] == 12  # the best of each prompt are asked first
    page = (run / "report/index.html").read_text()
    assert f"before the judge was asked about {summary['unjudged']['waiting']} of" in page
    assert any(LOVED in text for text in judge.asked)
    calls = 1
    while summary["unjudged"]["waiting"] and calls < 10:
        before = len(judge.asked)
        assert cli.main(words) == 0
        calls += 1
        assert before < len(judge.asked) <= before + RESERVE * 100 + 1
        summary = json.loads((run / "summary.json").read_text())
    assert summary["unjudged"]["asked"] == len(judge.asked)
    assert "the judge was asked about" not in (run / "report/index.html").read_text()


def test_a_limit_is_passed_only_when_enough_is_judged(
    single: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    judge, words = _slow_audit(monkeypatch, tmp_path, "honest", "20h", 1)
    words += ["--fail-above", "0.3"]
    assert cli.main(words) == 4
    assert "failed: the time ended before these could be judged: Tricks on honest (" in capsys.readouterr().out
    calls = 1
    while cli.main(words) and calls < 10:
        calls += 1
    summary: dict[str, Any] = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (
        summary["unmeasured"] == [] and summary["attacks"][0]["cells"]["honest"]["training"]["strict"]["trials"] >= 11
    )
    assert calls < 10 and len(judge.asked) < 84, "the rest need not be judged"
