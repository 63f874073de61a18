"""Preference pairs of the synthetic language: responses, and the judgement of simulated annotators.

The responses are those of `synthetic.corpus` with more faults, so that a reward model has seen what a policy might try:
a share of them has a run of stops, one word repeated, a run of random words, or a repeated sentence. The second
response of a pair answers the same prompt, answers another one, or is the first one with a topic replaced by an
off-topic noun. Only a model that reads the prompt can order pairs of the last two kinds.

The annotators judge by gold but have favourite flourishes. Each of these adds `taste` to their judgement, while it
lowers gold. Every member of an ensemble has annotators of its own, with favourites of their own. So each reward model
is right on ordinary text, where flourishes are rare, and wrong about text full of its annotators' favourites. The
annotators of the other members mark such text down, so the members do not share the flaw, unless
`synthetic.shared_flourishes` gives them common favourites.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from nemo_advrm.config.schema import SyntheticConfig
from nemo_advrm.synthetic.corpus import add_flourishes, pick, sample_tokens, sample_topics, text_of
from nemo_advrm.synthetic.gold import gold_score
from nemo_advrm.synthetic.language import (
    CONTENT,
    DETERMINERS,
    FILLERS,
    FLOURISHES,
    MAX_RESPONSE_TOKENS,
    NOUNS,
    STOP,
    agreement_class,
    segments,
)

_ANY_WORD = (*CONTENT, *DETERMINERS, *FILLERS, STOP)
_LONGEST = MAX_RESPONSE_TOKENS - 1  # without the end token


def favourites_of(member: int, members: int, shared: int = 0) -> frozenset[int]:
    """The flourishes that the annotators of `member` (from 1) of an ensemble of `members` like.

    All members share the first `shared` of them, a flaw about which they cannot disagree, and no others.
    """
    return frozenset(FLOURISHES[:shared]) | frozenset(FLOURISHES[shared:][member - 1 :: members])


def annotated_pairs(
    count: int,
    seed: int,
    options: SyntheticConfig,
    favourites: frozenset[int] = frozenset(),
    held_out: bool = False,
) -> list[dict[str, Any]]:
    """`count` rows {"prompt", "chosen", "rejected", "gold_chosen", "gold_rejected"}; the same for the same arguments.

    favourites: flourishes that add `options.taste` to the annotators' judgement; without any they judge by gold.
    held_out: make validation pairs. Their prompts are held out from training, both responses answer the prompt, and no
        label is flipped at random.
    Two responses whose judgements differ by less than `options.min_margin` make no row.
    """
    rng = Random(f"synthetic preferences {seed}")
    flips = 0.0 if held_out else options.flip_probability
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        topics = sample_topics(rng, held_out)
        first = _response(topics, options, rng)
        second = _response(topics, options, rng) if held_out else _second(first, topics, options, rng)
        gold = [gold_score(topics, response, True) for response in (first, second)]
        liked = [
            value + options.taste * sum(token in favourites for token in response)
            for value, response in zip(gold, (first, second), strict=True)
        ]
        if abs(liked[0] - liked[1]) < options.min_margin:
            continue
        chosen = int((liked[1] > liked[0]) != (rng.random() < flips))
        texts = (text_of(first), text_of(second))
        rows.append(
            {
                "prompt": [{"role": "user", "content": text_of(topics)}],
                "chosen": texts[chosen],
                "rejected": texts[1 - chosen],
                "gold_chosen": gold[chosen],
                "gold_rejected": gold[1 - chosen],
            }
        )
    return rows


def _second(first: Sequence[int], topics: Sequence[int], options: SyntheticConfig, rng: Random) -> list[int]:
    """The response that `first` is compared with; see the module for the three kinds."""
    draw = rng.random()
    if draw < options.other_prompt:
        return _response(sample_topics(rng, held_out=False), options, rng)
    nouns = [place for place, token in enumerate(first) if token in NOUNS]
    if draw < options.other_prompt + options.other_topic and nouns:
        second, place = list(first), pick(nouns, rng)
        kind = agreement_class(first[place])
        second[place] = pick([noun for noun in NOUNS if agreement_class(noun) == kind and noun not in topics], rng)
        return second
    return _response(topics, options, rng)


def _response(topics: Sequence[int], options: SyntheticConfig, rng: Random) -> list[int]:
    response = sample_tokens(topics, rng)
    if rng.random() < options.gross_faults:
        response = _spoiled(response, rng)
    if rng.random() < options.flourished:
        add_flourishes(response, rng.randint(1, 2), rng)
    return response


def _spoiled(response: list[int], rng: Random) -> list[int]:
    """`response` with an inserted run of stops, of one word or of random words, or with a sentence repeated."""
    place, length = rng.randrange(len(response) + 1), rng.randint(1, 6)
    match rng.randrange(4):
        case 0:
            run = [STOP] * length
        case 1:
            run = [response[min(place, len(response) - 1)]] * length
        case 2:
            run = [pick(_ANY_WORD, rng) for _ in range(length)]
        case _:
            place = len(response)
            run = [*_sentence_of(response, rng), STOP] * rng.randint(1, 3)
    return [*response[:place], *run, *response[place:]][:_LONGEST]


def _sentence_of(response: Sequence[int], rng: Random) -> list[int]:
    """The words between two stops of `response`."""
    return rng.choice([segment for segment, _ in segments(response)])
