"""What a reward source is: something that scores responses to prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nemo_advrm.data.messages import Message
from nemo_advrm.errors import RewardSourceError


@dataclass
class Rollouts:
    """Responses to prompts, as text and as the tokens of the policy that wrote them.

    Attributes:
        prompts: chat messages up to where the response begins.
        responses: response texts.
        ended: False where the length limit cut the response off.
        prompt_tokens, response_tokens: the policy's token ids; a response that ended holds its end token.
        prompt_index: place of the prompt in the run's prompt list (reference statistics are looked up by it).
        fingerprint: of the policy's tokenizer; a source with the same one scores the tokens as they are.
        rendered: the responses are whole conversations that a chat template has written out, and the prompts are empty.
    """

    prompts: list[tuple[Message, ...]]
    responses: list[str]
    ended: list[bool]
    prompt_tokens: list[list[int]]
    response_tokens: list[list[int]]
    prompt_index: list[int]
    fingerprint: str
    rendered: bool = False

    def __len__(self) -> int:
        return len(self.responses)


class RewardSource(Protocol):
    """Scores responses. Every rank of a model replica calls with the same rollouts and gets the same scores."""

    name: str

    def score(self, rollouts: Rollouts) -> Tensor:
        """[N] fp32 on the CPU, higher is better."""
        ...


def checked_scores(source: RewardSource, rollouts: Rollouts) -> Tensor:
    """The scores of ``source``; raises RewardSourceError, naming it, for NaN, infinity or a wrong shape."""
    scores = source.score(rollouts)
    if scores.shape != (len(rollouts),):
        raise RewardSourceError(
            f"reward source {source.name} returned scores of shape {tuple(scores.shape)} for {len(rollouts)} responses"
        )
    if not torch.isfinite(scores).all():
        bad = int((~torch.isfinite(scores)).sum())
        raise RewardSourceError(f"reward source {source.name} returned {bad} scores that are NaN or infinite")
    return scores.float().cpu()
