"""Texts that an attack writes itself, as responses that reward models can score."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from nemo_advrm.attacks.base import AttackInputs, Budget
from nemo_advrm.data.tokenizers import Tokenizer, round_trips
from nemo_advrm.engine import runtime
from nemo_advrm.errors import DataError
from nemo_advrm.rewards.limits import places_that_fit
from nemo_advrm.rollouts.types import Prompt, Rollouts
from nemo_advrm.seeds import derive_seed

T = TypeVar("T")


@dataclass(frozen=True)
class Draft:
    """A response that an attack proposes.

    Attributes:
        origin: how it was made, in a word or two; it is recorded with the response.
    """

    prompt: Prompt
    text: str
    origin: str = ""


def as_rollouts(drafts: Sequence[Draft], tokenizer: Tokenizer) -> Rollouts:
    """Returns drafts as finished responses, encoded with the policy's ``tokenizer``."""
    return Rollouts(
        prompts=[draft.prompt.messages for draft in drafts],
        responses=[draft.text for draft in drafts],
        ended=[True] * len(drafts),
        prompt_tokens=[draft.prompt.tokens for draft in drafts],
        response_tokens=[tokenizer.encode_response(draft.text) for draft in drafts],
        prompt_index=[draft.prompt.index for draft in drafts],
        fingerprint=tokenizer.fingerprint,
        origins=[draft.origin for draft in drafts],
    )


def cut(text: str, tokenizer: Tokenizer, tokens: int) -> str:
    """Returns ``text``, without its end where it has more than ``tokens`` tokens; raises what the tokenizer raises."""
    ids = tokenizer.encode(text)
    return text if len(ids) <= tokens else tokenizer.decode(ids[:tokens])


def usable(drafts: Iterable[Draft], inputs: AttackInputs) -> Iterator[Draft]:
    """Yields the drafts, cut to ``rl.max_new_tokens``, that a user could send and every member takes.

    Others are left out: text that the policy's tokenizer refuses or changes (a find of it could not become a pair), and
    conversations that are too long for a member.
    """
    tokenizer, longest = inputs.tokenizer, inputs.cfg.rl.max_new_tokens - 1  # the end token needs a place
    for draft in drafts:
        try:
            text = cut(draft.text, tokenizer, longest)
        except (DataError, UnicodeEncodeError):
            continue
        if not round_trips(text, tokenizer):
            continue
        kept = Draft(draft.prompt, text, draft.origin)
        row = as_rollouts([kept], tokenizer)
        if all(places_that_fit(member, row) for member in inputs.members):
            yield kept


def turns(inputs: AttackInputs, per_prompt: int) -> Iterator[tuple[Prompt, int]]:
    """Yields every prompt with the numbers 0 to ``per_prompt`` - 1: all prompts, in random order, with 0 first."""
    order = list(inputs.prompts)
    random.Random(derive_seed(inputs.seed, "turns")).shuffle(order)
    return ((prompt, number) for number in range(per_prompt) for prompt in order)


def shares(items: Iterable[T], budget: Budget) -> Iterator[list[tuple[int, T]]]:
    """Yields this data-parallel rank's share of each ``budget.samples_per_step`` items, with their places in all.

    Every rank passes the same items, so that all make the same number of steps. A share may be empty.
    """
    rt, places = runtime.current(), enumerate(items)
    while step := list(islice(places, budget.samples_per_step)):
        yield step[rt.dp_slice(len(step))]


def on_any_rank(flag: bool) -> bool:
    """Returns whether ``flag`` is true on a data-parallel rank: scoring is collective, so no rank may end alone."""
    return any(runtime.current().gather_data_parallel(flag))
