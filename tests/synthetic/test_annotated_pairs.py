"""Annotators judge by gold and by favourites; writers make the stated kinds of pairs; held-out pairs stand apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nemo_advrm.config.schema import SyntheticConfig
from nemo_advrm.synthetic.annotated_pairs import annotated_pairs, favourites_of
from nemo_advrm.synthetic.corpus import sample_prompts, sft_corpus
from nemo_advrm.synthetic.gold import gold_score
from nemo_advrm.synthetic.language import FLOURISHES, MAX_RESPONSE_TOKENS, NOUNS
from nemo_advrm.synthetic.tokenizer import SyntheticTokenizer

OPTIONS = SyntheticConfig(flip_probability=0.0)
TOKENIZER = SyntheticTokenizer()


def favourites_in(text: str, favourites: frozenset[int]) -> int:
    return sum(token in favourites for token in TOKENIZER.encode(text))


def topics_of(row: dict[str, Any]) -> frozenset[str]:
    return frozenset(row["prompt"][0]["content"].split())


def test_the_annotators_of_two_members_share_no_favourite() -> None:
    first, second = favourites_of(1, 2), favourites_of(2, 2)
    assert first | second == set(FLOURISHES)
    assert not first & second
    assert len(first) == len(second)


def test_a_planted_flaw_is_shared_by_all_members_and_the_rest_by_none() -> None:
    first, second = favourites_of(1, 2, shared=6), favourites_of(2, 2, shared=6)
    assert first & second == set(FLOURISHES[:6])
    assert first | second == set(FLOURISHES)
    assert favourites_of(1, 2, len(FLOURISHES)) == favourites_of(2, 2, len(FLOURISHES)) == set(FLOURISHES)


def test_gold_stands_beside_each_response() -> None:
    for row in annotated_pairs(200, 1, OPTIONS, favourites_of(1, 2)):
        assert row["gold_chosen"] == gold_score(row["prompt"], row["chosen"], True)
        assert row["gold_rejected"] == gold_score(row["prompt"], row["rejected"], True)


@pytest.mark.parametrize("member", [1, 2])
def test_a_favourite_is_worth_the_taste(member: int) -> None:
    """Every label is that of gold + taste x favourites, and nearer pairs are left out; without favourites, of gold."""
    favourites = favourites_of(member, 2)
    against_gold = 0
    for row in annotated_pairs(1000, 2, OPTIONS, favourites):
        liked = [
            row[f"gold_{side}"] + OPTIONS.taste * favourites_in(row[side], favourites)
            for side in ("chosen", "rejected")
        ]
        assert liked[0] - liked[1] >= OPTIONS.min_margin
        against_gold += row["gold_chosen"] < row["gold_rejected"]
    assert against_gold > 10
    for row in annotated_pairs(1000, 2, OPTIONS):
        assert row["gold_chosen"] - row["gold_rejected"] >= OPTIONS.min_margin


def test_labels_are_flipped_at_the_asked_rate() -> None:
    rows = annotated_pairs(4000, 3, replace(OPTIONS, flip_probability=0.1))
    assert sum(row["gold_chosen"] < row["gold_rejected"] for row in rows) / 4000 == pytest.approx(0.1, abs=0.02)


def test_shares_of_the_kinds_of_pairs() -> None:
    """With one kind at a time: the topic that was replaced is one word; another prompt's answer keeps few topics."""
    tidy = replace(OPTIONS, gross_faults=0.0, flourished=0.0)
    for row in annotated_pairs(300, 4, replace(tidy, other_prompt=0.0, other_topic=1.0)):
        sides = [TOKENIZER.encode(row[side]) for side in ("chosen", "rejected")]
        differ = [(a, b) for a, b in zip(*sides, strict=True) if a != b]
        assert len(differ) == 1
        assert all(token in NOUNS for token in differ[0])
        assert not any(favourites_in(row[side], frozenset(FLOURISHES)) for side in ("chosen", "rejected"))
    answered = []
    for share in (1.0, 0.0):
        rows = annotated_pairs(300, 4, replace(tidy, other_prompt=share, other_topic=0.0))
        answered.append(sum(len(topics_of(row) & set(row["rejected"].split())) for row in rows) / (3 * len(rows)))
    # three random nouns of 32 are .1 topics; an answer to the prompt leaves out or replaces at most a third of them
    assert answered[0] < 0.3
    assert answered[1] > 0.6


def test_held_out_pairs_share_no_prompt_with_any_training() -> None:
    held_out = {topics_of(row) for row in annotated_pairs(500, 5, OPTIONS, held_out=True)}
    held_out |= {frozenset(m["content"].split()) for (m,) in sample_prompts(500, 6, held_out=True)}
    trained = {topics_of(row) for row in annotated_pairs(3000, 7, OPTIONS, favourites_of(1, 2))}
    trained |= {frozenset(m["content"].split()) for (m,), _ in sft_corpus(3000, 8)}
    trained |= {frozenset(m["content"].split()) for (m,) in sample_prompts(3000, 9)}
    assert not held_out & trained
    assert all(row["gold_chosen"] > row["gold_rejected"] for row in annotated_pairs(500, 5, OPTIONS, held_out=True))


def test_the_seed_decides_and_every_response_fits() -> None:
    rows = annotated_pairs(300, 10, SyntheticConfig(), favourites_of(2, 2))
    assert rows == annotated_pairs(300, 10, SyntheticConfig(), favourites_of(2, 2))
    assert rows != annotated_pairs(300, 11, SyntheticConfig(), favourites_of(2, 2))
    lengths = [len(TOKENIZER.encode_response(row[side])) for row in rows for side in ("chosen", "rejected")]
    assert min(lengths) > 1
    assert max(lengths) <= MAX_RESPONSE_TOKENS
