"""Prompts and responses as they pass between rollout engines, rewards and training; needs no Megatron-Core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from nemo_advrm.data.messages import Message


@dataclass
class Rollouts:
    """Responses to prompts, as text and as the tokens of the policy that wrote them.

    Attributes:
        prompts: chat messages up to where the response begins.
        responses: response texts.
        ended: False where the length limit cut the response off.
        prompt_tokens, response_tokens: the policy's token ids; a response that ended holds its end token.
        prompt_index: place of the prompt in the run's prompt list (reference statistics are looked up by it).
        fingerprint: of the policy's tokenizer.
        rendered: the responses are whole conversations that a chat template has written out, and the prompts are empty.
        tokens_only: the tokens are what is scored, by sources whose tokenizer has ``fingerprint``. Else it is the text.
    """

    prompts: list[tuple[Message, ...]]
    responses: list[str]
    ended: list[bool]
    prompt_tokens: list[list[int]]
    response_tokens: list[list[int]]
    prompt_index: list[int]
    fingerprint: str
    rendered: bool = False
    tokens_only: bool = False

    def __len__(self) -> int:
        return len(self.responses)

    def select(self, places: Sequence[int]) -> Rollouts:
        """The rollouts at ``places``, in that order."""
        rows = {f.name: getattr(self, f.name) for f in fields(self)}
        chosen: dict[str, Any] = {k: [v[i] for i in places] for k, v in rows.items() if isinstance(v, list)}
        return replace(self, **chosen)


@dataclass(frozen=True)
class Prompt:
    """A prompt of the run, encoded; ``index`` is its place in the run's prompt list."""

    index: int
    messages: tuple[Message, ...]
    tokens: list[int]
