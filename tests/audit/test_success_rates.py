"""Which responses count as a success, and which an attack submits, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_advrm.audit.attack_stage import AttackResult
from nemo_advrm.audit.comparisons import count_comparisons, worst_of
from nemo_advrm.audit.finds import Judged
from nemo_advrm.audit.panel import Split
from nemo_advrm.audit.success import Successes, best_of_ordinary, of_ordinary, rate, submitted, successes
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.objectives.proportions import z_together
from nemo_advrm.rollouts.types import Prompt

MESSAGES = ({"role": "user", "content": "q"},)


def _split(scores: list[list[list[float]]], gold: list[list[float]] | None) -> Split:
    table = torch.tensor(scores)
    prompts, count, _ = table.shape
    responses = [[f"r{p}{i}" for i in range(count)] for p in range(prompts)]
    sft = SFTScores([MESSAGES] * prompts, responses, table, None)
    gold_PN = None if gold is None else torch.tensor(gold)
    return Split("training", [Prompt(p, MESSAGES, [1]) for p in range(prompts)], sft, gold_PN)


def test_liked_and_bad() -> None:
    z = torch.tensor([1.0, 1.0, -1.0, 0.5])
    gold, gold_z = torch.tensor([2.0, 4.0, 2.0, 0.0]), torch.tensor([-1.0, 1.0, -1.0, -3.0])
    mean = torch.full((4,), 3.0)
    found = successes(z, torch.tensor([3.0, 0.0, 3.0, 1.0]), gold, gold_z, mean, 1.96)
    assert found.standard_N is not None and found.standard_N.tolist() == [True, False, False, True]
    assert found.strict_N is not None and found.strict_N.tolist() == [False, False, False, True]
    assert found.suspected_N.tolist() == [True, False, False, False]
    assert found.main_N is found.standard_N


def test_good_and_scored_low() -> None:
    z = torch.tensor([-3.0, -1.0, -3.0, 2.0])
    gold, gold_z, mean = torch.tensor([4.0, 4.0, 2.0, 4.0]), torch.tensor([0.5, 0.5, -0.5, 0.5]), torch.full((4,), 3.0)
    found = successes(z, torch.zeros(4), gold, gold_z, mean, 1.96, underrates=True)
    assert found.standard_N is not None and found.standard_N.tolist() == [True, True, False, False]
    assert found.strict_N is not None and found.strict_N.tolist() == [True, False, False, False]
    assert found.suspected_N.tolist() == [True, False, True, False]


def test_without_a_judge_nothing_is_a_success() -> None:
    found = successes(torch.ones(2), torch.full((2,), 2.0), None, None, None, 1.96)
    assert found.standard_N is None and found.strict_N is None
    assert found.main_N.tolist() == [True, True]


def test_an_attack_submits_what_it_values_most() -> None:
    split = _split([[[0.0], [1.0]], [[0.0], [1.0]]], None)
    rows = [
        {"prompt_id": 0, "response": "a", "z": [1.0], "reward": 0.5, "step": 0},
        {"prompt_id": 0, "response": "b", "z": [0.5], "reward": 2.0, "step": 1},
        {"prompt_id": 0, "response": "b", "z": [0.5], "reward": 2.0, "step": 2},  # again
        {"prompt_id": 0, "response": "r01", "z": [9.0], "reward": 9.0, "step": 0},  # an ordinary response
        {"prompt_id": 0, "response": "c", "z": [0.1], "reward": 0.1, "step": 0},
        {"prompt_id": 1, "response": "b", "z": [-1.0], "reward": -4.0, "step": 0},
    ]
    taken = submitted(rows, split, 2, underrates=False)
    found = [(row["prompt_id"], row["response"], row["rank"]) for row in taken]
    assert found == [(0, "b", 0), (0, "a", 1), (1, "b", 0)]
    low = submitted(rows, split, 1, underrates=True)
    assert [(row["prompt_id"], row["response"]) for row in low] == [(0, "c"), (1, "b")]


def test_ordinary_responses_are_the_null() -> None:
    """Model and judge agree on prompt 0 and are opposed on prompt 1."""
    scores = [[[0.0], [1.0], [2.0]], [[0.0], [1.0], [2.0]]]
    split = _split(scores, [[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])
    found = of_ordinary(split, [0], "python:audit_detectors:Scores", 1.0)
    assert found.standard_N is not None and found.standard_N.tolist() == [False] * 5 + [True]
    best = best_of_ordinary(found, split, 0)
    assert best.standard_N is not None and best.standard_N.tolist() == [False, True]
    null = rate(found.standard_N, trials=2)
    assert null is not None and null["rate"] == pytest.approx(1 / 6)
    assert null["trials"] == 2 and null["high"] - null["low"] > 0.6


def test_good_ordinary_responses_that_are_scored_low_are_the_null_of_attacks_that_underrate() -> None:
    scores = [[[0.0], [1.0], [2.0]], [[0.0], [1.0], [2.0]]]
    split = _split(scores, [[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])
    found = of_ordinary(split, [0], "python:audit_detectors:Scores", 1.0, underrates=True)
    assert found.standard_N is not None and found.standard_N.tolist() == [False] * 3 + [True, False, False]
    worst = best_of_ordinary(found, split, 0, underrates=True)
    assert worst.standard_N is not None and worst.standard_N.tolist() == [False, True]


def test_a_prompt_without_a_response_is_a_trial_without_success() -> None:
    split = _split([[[0.0], [1.0]]] * 3, [[0.0, 1.0]] * 3)
    rows = [{"prompt_id": p, "response": "a", "rank": rank} for p, rank in ((0, 0), (0, 1), (2, 0))]
    standard, strict = torch.tensor([True, False, True]), torch.tensor([False, True, True])
    result = AttackResult("probes", 0, {}, 0.0, 3, False)
    first = Judged(result, split, rows, None, None, Successes(standard, strict, standard)).first()
    assert first.standard_N is not None and first.standard_N.tolist() == [True, False, True]
    assert first.strict_N is not None and first.strict_N.tolist() == [False, False, True]
    nothing = torch.zeros(0, dtype=torch.bool)
    assert rate(Judged(result, split, [], None, None, Successes(nothing, nothing, nothing)).first().standard_N) is None


def compared(underrates: bool, measure: str, comparisons: int = 1) -> dict[str, Any] | None:
    """The worst of one attack that succeeds on 9 of 10 prompts; ordinary responses do on 1, and are scored low on 8."""

    def share(value: float) -> dict[str, Any]:
        return {"training": {measure: {"rate": value, "low": value - 0.1, "high": value + 0.1, "trials": 10}}}

    usual = {"ordinary": share(0.1), "best_of_ordinary": share(0.1), "ordinary_underrated": share(0.8)}
    attack = {"attack": "a", "underrates": underrates, "cells": {"rm": {"responses": 9, "seconds": 1.0} | share(0.9)}}
    z = z_together(comparisons)
    return worst_of("rm", [attack], [measure], usual | {"worst_of_ordinary": share(0.2)}, z)


def test_an_attack_is_compared_with_the_null_of_its_direction() -> None:
    for underrates, null in ((False, 0.1), (True, 0.8)):
        found = compared(underrates, "strict")
        assert found is not None and found["null"] == null
    assert compared(False, "suspected") is not None
    assert compared(True, "suspected") is None, "without a judge nobody says that the responses are good"


def test_the_excess_allows_for_all_comparisons() -> None:
    """Of 9 of 10 against 1 of 10 Wilson's ends are 0.59585 and 0.40415; for 40 comparisons 0.40003 and 0.59997."""
    alone, together = compared(False, "strict"), compared(False, "strict", comparisons=40)
    assert alone is not None and alone["excess"] == pytest.approx(0.8 - 2**0.5 * (0.9 - 0.59585), abs=1e-4)
    assert together is not None and together["excess"] == pytest.approx(0.8 - 2**0.5 * (0.9 - 0.40003), abs=1e-4)
    assert (together["low"], together["high"]) == (0.8, 1.0), "the interval of the table stays that of one rate"


def test_every_rate_that_a_verdict_may_take_is_a_comparison() -> None:
    rate = {"rate": 0.5, "low": 0.4, "high": 0.6, "trials": 10}
    both = {"strict": rate, "standard": rate, "suspected": rate}
    cell = {"responses": 9, "seconds": 1.0, "training": both, "held_out": {**both, "strict": None}}
    attacks = [
        {"attack": "a", "underrates": False, "cells": {"one": cell, "two": cell}},
        {"attack": "b", "underrates": True, "cells": {"one": cell}},
    ]
    assert count_comparisons(attacks, ["strict", "standard"]) == 9
    assert count_comparisons(attacks, ["suspected"]) == 4  # none of good responses, which nobody has judged


def test_no_responses_have_no_rate() -> None:
    assert rate(torch.zeros(0, dtype=torch.bool)) is None
    assert rate(None) is None
