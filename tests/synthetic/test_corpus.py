"""The corpus follows its recipe: reproducible, within length, faultless at quality 1, with the stated rates."""

from __future__ import annotations

import statistics
from random import Random

import pytest
from synthetic_text import sample_response

from nemo_advrm.synthetic.corpus import Prompt, sample_prompts, sft_corpus
from nemo_advrm.synthetic.gold import gold_scores
from nemo_advrm.synthetic.language import FILLERS, FLOURISHES, NOUNS, STOP, is_well_formed, kinds, segments
from nemo_advrm.synthetic.tokenizer import SyntheticTokenizer

TOKENIZER = SyntheticTokenizer()


@pytest.fixture(scope="module")
def corpus() -> list[tuple[Prompt, str]]:
    return sft_corpus(6000, seed=0)


def test_prompts_are_three_distinct_nouns() -> None:
    prompts = sample_prompts(500, seed=1)
    for (message,) in prompts:
        topics = TOKENIZER.encode(message["content"])
        assert message["role"] == "user"
        assert len(set(topics)) == 3
        assert set(topics) <= set(NOUNS)
    assert {token for (message,) in prompts for token in TOKENIZER.encode(message["content"])} == set(NOUNS)


def test_seed_decides_everything() -> None:
    assert sample_prompts(50, 7) == sample_prompts(50, 7) != sample_prompts(50, 8)
    assert sft_corpus(50, 7) == sft_corpus(50, 7) != sft_corpus(50, 8)
    assert sft_corpus(60, 7)[:50] == sft_corpus(50, 7)


def test_a_known_sample_does_not_drift() -> None:
    (prompt,) = sample_prompts(1, 0)
    assert prompt == ({"role": "user", "content": "merchant teacher sailor"},)
    assert sample_response(prompt, Random(0), quality=0.5) == (
        "this pale sailor falls together . this er teacher dreams . this pale merchant falls alone ."
    )


def test_full_quality_makes_no_error() -> None:
    rng = Random(0)
    for prompt in sample_prompts(200, seed=2):
        tokens = TOKENIZER.encode(sample_response(prompt, rng, quality=1.0))
        parts = list(segments(tokens))
        assert all(closed and is_well_formed(segment) for segment, closed in parts)
        topics = {token for token in TOKENIZER.encode_prompt(prompt) if token in NOUNS}
        assert len(parts) == 3
        assert {token for token in tokens if token in NOUNS} == topics


def test_every_response_fits_and_is_not_empty(corpus: list[tuple[Prompt, str]]) -> None:
    lengths = [len(TOKENIZER.encode_response(response)) for _, response in corpus]
    assert min(lengths) > 3  # a sentence and its end
    assert max(lengths) == 32
    rng = Random(1)
    worst = [sample_response(prompt, rng, quality=0.0) for prompt, _ in corpus[:2000]]
    assert all(1 < len(TOKENIZER.encode_response(response)) <= 32 for response in worst)


def test_gold_of_the_corpus(corpus: list[tuple[Prompt, str]]) -> None:
    gold = gold_scores([p for p, _ in corpus], [r for _, r in corpus], [True] * len(corpus))
    assert statistics.mean(gold) == pytest.approx(1.88, abs=0.15)
    assert statistics.stdev(gold) == pytest.approx(3.60, abs=0.15)


def test_gold_rises_with_quality() -> None:
    prompts, rng = sample_prompts(500, seed=4), Random(4)
    means = []
    for quality in (0.0, 0.25, 0.5, 0.75, 1.0):
        responses = [sample_response(prompt, rng, quality) for prompt in prompts]
        means.append(statistics.mean(gold_scores(prompts, responses, [True] * len(prompts))))
    assert means == sorted(means)
    assert means[0] < 0.0
    assert means[-1] > 7.0


def test_rates_of_the_grammar(corpus: list[tuple[Prompt, str]]) -> None:
    tokens = [token for _, response in corpus for token in TOKENIZER.encode(response)]
    letters = kinds(tokens)
    sentences = letters.count("D")  # each sentence has one determiner
    # means over q ~ U(0, 1), so E[e] = 1/2; longer sentences are dropped at the limit a little more often
    assert letters.count("A") / sentences == pytest.approx(0.1 + 0.6 * 0.5, abs=0.03)
    assert letters.count("R") / sentences == pytest.approx(0.1 + 0.5 * 0.5, abs=0.03)
    assert letters.count(".") / sentences == pytest.approx(1 - 0.35 * 0.5, abs=0.02)
    assert letters.count("F") / sentences == pytest.approx(0.25 * 0.5, abs=0.02)
    assert letters.count("N") == letters.count("V") == sentences
    assert set(FLOURISHES) <= set(tokens)
    assert set(FILLERS) <= set(tokens)
    # At error e a sentence agrees twice, has no filler and has its stop with (1-.35e)^3 (1-.25e); unless it is the
    # first, the sentence before must have had its stop too.
    sentences_in = [[t for t in TOKENIZER.encode(r) if t not in FLOURISHES] for _, r in corpus]
    formed = sum(is_well_formed(s) for r in sentences_in for s, closed in segments(r) if closed)
    grid = [(index + 0.5) / 1000 for index in range(1000)]
    alone = statistics.mean((1 - 0.35 * e) ** 3 * (1 - 0.25 * e) for e in grid)
    after_another = statistics.mean((1 - 0.35 * e) ** 4 * (1 - 0.25 * e) for e in grid)
    assert after_another < formed / sentences < alone
    assert STOP in tokens
