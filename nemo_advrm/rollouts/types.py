"""Data types of prompts and responses, shared by rollout engines, rewards and training; needs no Megatron-Core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from nemo_advrm.data.messages import Message


@dataclass
class Rollouts:
    """Responses to prompts, as text and as the tokens of the policy that wrote them.

    Attributes:
        prompts: chat messages before the response.
        responses: response texts.
        ended: False when the length limit cut the response off.
        prompt_tokens, response_tokens: the policy's token ids; a response that ended includes its end token.
        prompt_index: index of the prompt in the run's prompt list, for looking up SFT statistics.
        fingerprint: fingerprint of the policy's tokenizer.
        rendered: the responses are whole conversations rendered by a chat template, and the prompts are empty.
        tokens_only: sources score the tokens, and must have the tokenizer with ``fingerprint``; else they score the
            text.
        log_probs: of the response tokens under a policy elsewhere that wrote them, in nats, NaN where it does not tell
            them; None where no other policy wrote.
        origins: how an attack made each response, in a word or two for its record; None where a policy wrote them.
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
    origins: list[str] | None = None
    log_probs: list[list[float]] | None = None

    def __len__(self) -> int:
        return len(self.responses)

    @classmethod
    def concatenated(cls, parts: Sequence[Rollouts]) -> Rollouts:
        """Returns the rollouts of all parts, which have one tokenizer, in their order."""
        names = parts[0]._columns()
        joined: dict[str, Any] = {name: [row for part in parts for row in getattr(part, name)] for name in names}
        return replace(parts[0], **joined)

    def select(self, places: Sequence[int]) -> Rollouts:
        """Returns the rollouts at the indices ``places``, in that order."""
        chosen: dict[str, Any] = {name: [rows[i] for i in places] for name, rows in self._columns().items()}
        return replace(self, **chosen)

    def _columns(self) -> dict[str, list[Any]]:
        return {name: value for name, value in vars(self).items() if isinstance(value, list)}


@dataclass(frozen=True)
class Prompt:
    """An encoded prompt; ``index`` is its position in the run's prompt list."""

    index: int
    messages: tuple[Message, ...]
    tokens: list[int]
