"""What NeMo-Aligner's actor wrote, as the rollouts that reward sources score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_advrm.data.messages import Message
from nemo_advrm.errors import RewardSourceError
from nemo_advrm.rewards.remote import plain_text
from nemo_advrm.rollouts.types import Rollouts

FINGERPRINT = "nemo_aligner actor"


def as_prompt(text: str) -> tuple[Message, ...]:
    """A prompt as NeMo-Aligner's files hold it: text that the actor's template has already been written into."""
    return (Message(role="user", content=text),)


class RolloutReader:
    """Reads rollout batches of one actor.

    Args:
        tokenizer: the actor's, as NeMo builds it (``text_to_ids``, ``ids_to_text``, ``eos_id``).
        prompts: of the reference, by which ``prompt_index`` is known; None takes any prompt.
    """

    def __init__(self, tokenizer: Any, prompts: Sequence[tuple[Message, ...]] | None = None) -> None:
        self.tokenizer = tokenizer
        self._prompts = prompts
        self._index: dict[tuple[int, ...], int] = {}
        for index, prompt in enumerate(prompts or ()):
            self._index.setdefault(self._key(tokenizer.text_to_ids(plain_text(prompt))), index)

    def read(self, batch: Any) -> Rollouts:
        """Rollouts of a batch with ``response_tokens`` [B, S], ``response_lengths``, ``prompt_lengths`` [B] and, where
        the actor says so, ``is_end`` [B].

        Raises RewardSourceError for a prompt that is not one of the reference.
        """
        rows = batch["response_tokens"].tolist()
        ends, starts = batch["response_lengths"].flatten().tolist(), batch["prompt_lengths"].flatten().tolist()
        ended = batch["is_end"].flatten().bool().tolist() if "is_end" in batch else [True] * len(rows)
        prompt_tokens = [row[:start] for row, start in zip(rows, starts, strict=True)]
        response_tokens = [row[start:end] for row, start, end in zip(rows, starts, ends, strict=True)]
        index = [self._find(tokens) for tokens in prompt_tokens]
        texts = [self._texts(*pair) for pair in zip(prompt_tokens, response_tokens, strict=True)]
        return Rollouts(
            prompts=[
                self._prompts[i] if self._prompts is not None else as_prompt(text)
                for i, (text, _) in zip(index, texts, strict=True)
            ],
            responses=[response for _, response in texts],
            ended=ended,
            prompt_tokens=prompt_tokens,
            response_tokens=response_tokens,
            prompt_index=index,
            fingerprint=FINGERPRINT,
        )

    def _texts(self, prompt: list[int], response: list[int]) -> tuple[str, str]:
        decode, body = self.tokenizer.ids_to_text, self._without_end(response)
        before, whole = decode(prompt), decode(prompt + body)
        # decoded alone, a response can lose the space that it begins with
        return before, whole[len(before) :] if whole.startswith(before) else decode(body)

    def _find(self, prompt: list[int]) -> int:
        if self._prompts is None:
            return 0
        index = self._index.get(self._key(prompt))
        if index is None:
            shown = self.tokenizer.ids_to_text(prompt)[:80]
            raise RewardSourceError(
                f"the prompt {shown!r} is not one of the reference, to which the adversarial reward is relative: "
                "sample the reference from the files that model.data.data_prefix names"
            )
        return index

    def _key(self, prompt: Sequence[int]) -> tuple[int, ...]:
        return tuple(self._without_end(list(prompt)))  # model.data.append_eod puts an end token behind a prompt

    def _without_end(self, tokens: list[int]) -> list[int]:
        while tokens and tokens[-1] == self.tokenizer.eos_id:
            tokens = tokens[:-1]
        return tokens
