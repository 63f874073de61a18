"""Pairs are ordered by gold, flipped at the asked rate, reproducible, and free of ties and duplicates."""

from __future__ import annotations

import math
from random import Random

import pytest

from nemo_advrm.errors import RewardSourceError
from nemo_advrm.synthetic.corpus import sample_prompts, sample_response
from nemo_advrm.synthetic.gold import GoldReward
from nemo_advrm.synthetic.preferences import gold_labelled_pairs

PROMPT = ({"role": "user", "content": "river birds teacher"},)
GOOD, BAD = "this river sleeps . these birds sing . this teacher waits .", "um"
GOLD = GoldReward()


@pytest.mark.parametrize("pair", [(GOOD, BAD), (BAD, GOOD)])
def test_the_better_response_is_chosen(pair: tuple[str, str]) -> None:
    (row,) = gold_labelled_pairs([PROMPT], [pair], GOLD, 0.0, seed=0)
    assert row == {
        "prompt": [{"role": "user", "content": "river birds teacher"}],
        "chosen": GOOD,
        "rejected": BAD,
        "gold_chosen": 6.0,
        "gold_rejected": pytest.approx(-0.3 - 0.4 - 0.2 * 9),
        "flipped": False,
    }


@pytest.mark.parametrize("pair", [(GOOD, BAD), (BAD, GOOD)])
def test_a_flipped_row_says_so(pair: tuple[str, str]) -> None:
    (row,) = gold_labelled_pairs([PROMPT], [pair], GOLD, 1.0, seed=0)
    assert (row["chosen"], row["rejected"], row["flipped"]) == (BAD, GOOD, True)
    assert row["gold_chosen"] < row["gold_rejected"] == 6.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, "6", None, True])
def test_gold_that_is_no_number_labels_nothing(bad: object) -> None:
    class Gold:
        def score(self, *_: object) -> list:
            return [1.0, bad]

    with pytest.raises(RewardSourceError, match="gold"):
        gold_labelled_pairs([PROMPT], [(GOOD, BAD)], Gold(), 0.0, seed=0)


def test_identical_tied_and_empty_responses_make_no_row() -> None:
    pairs = [(GOOD, GOOD), ("um", "uh"), (GOOD, "")]
    assert gold_labelled_pairs([PROMPT] * 3, pairs, GOLD, 0.0, seed=0) == []
    assert gold_labelled_pairs([], [], GOLD, 0.5, seed=0) == []


def test_an_unended_response_can_lose_by_its_cut() -> None:
    longer = GOOD + " this garden shines ."  # 5.3 when it ended, GOOD cut: 4.5
    (row,) = gold_labelled_pairs([PROMPT], [(GOOD, longer)], GOLD, 0.0, 0, ended_per_prompt=[(False, True)])
    assert (row["chosen"], row["gold_rejected"]) == (longer, 4.5)


def test_flips_follow_the_seed_and_not_the_other_rows() -> None:
    prompts, rng = sample_prompts(2000, seed=5), Random(5)
    pairs = [(sample_response(prompt, rng), sample_response(prompt, rng)) for prompt in prompts]
    rows = gold_labelled_pairs(prompts, pairs, GOLD, 0.1, seed=1)
    assert rows == gold_labelled_pairs(prompts, pairs, GOLD, 0.1, seed=1)
    assert rows != gold_labelled_pairs(prompts, pairs, GOLD, 0.1, seed=2)
    assert sum(row["flipped"] for row in rows) / len(rows) == pytest.approx(0.1, abs=0.025)
    assert all((row["gold_chosen"] < row["gold_rejected"]) == row["flipped"] for row in rows)
    without_first = gold_labelled_pairs(prompts, [(GOOD, GOOD), *pairs[1:]], GOLD, 0.1, seed=1)
    assert without_first[-500:] == rows[-500:]
