"""Preference pairs of the embedded language: two responses to a prompt, ordered by gold reward, some labels flipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, Protocol

from nemo_advrm.rewards.base import as_scores


class ScoresResponses(Protocol):
    """What the labelling needs of the gold reward."""

    def score(
        self, prompts: Sequence[Sequence[Mapping[str, str]]], responses: Sequence[str], ended: Sequence[bool]
    ) -> list[float]:
        """One reward per response."""


def gold_labelled_pairs(
    prompts: Sequence[Sequence[Mapping[str, str]]],
    responses_per_prompt: Sequence[tuple[str, str]],
    gold: ScoresResponses,
    flip_probability: float,
    seed: int,
    ended_per_prompt: Sequence[tuple[bool, bool]] | None = None,
) -> list[dict[str, Any]]:
    """Rows {"prompt", "chosen", "rejected", "gold_chosen", "gold_rejected", "flipped"}, in the order of the prompts.

    responses_per_prompt: two responses to each prompt. Identical responses and ties in gold make no row: they have no
        better side. A response without words makes none either: preference data must not hold empty answers.
    flip_probability: chance that a row is written the wrong way round; then "flipped" is True and
        gold_chosen < gold_rejected.
    seed: decides the flips. The flip of a prompt does not depend on which other prompts make a row.
    ended_per_prompt: whether the responses emitted the end token; all of them if None, which is right for the text of a
        pair, since `encode_response` ends every text.
    """
    rng = Random(f"synthetic label flips {seed}")
    flips = [rng.random() < flip_probability for _ in prompts]
    ended_per_prompt = [(True, True)] * len(prompts) if ended_per_prompt is None else ended_per_prompt
    # Side by side, so that a reward source that works in batches sees one batch.
    scores = gold.score(
        [prompt for prompt in prompts for _ in range(2)],
        [response for pair in responses_per_prompt for response in pair],
        [ended for pair in ended_per_prompt for ended in pair],
    )
    as_scores("gold", scores, 2 * len(prompts))  # a NaN is no tie, and would choose a side

    rows = []
    score_pairs = zip(scores[::2], scores[1::2], strict=True)
    for prompt, responses, pair_scores, flipped in zip(prompts, responses_per_prompt, score_pairs, flips, strict=True):
        if responses[0] == responses[1] or not all(responses) or pair_scores[0] == pair_scores[1]:
            continue
        chosen = int((pair_scores[1] > pair_scores[0]) != flipped)
        rows.append(
            {
                "prompt": [dict(message) for message in prompt],
                "chosen": responses[chosen],
                "rejected": responses[1 - chosen],
                "gold_chosen": pair_scores[chosen],
                "gold_rejected": pair_scores[1 - chosen],
                "flipped": flipped,
            }
        )
    return rows
