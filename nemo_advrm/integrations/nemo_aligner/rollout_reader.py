"""Converts the batches of NeMo-Aligner's actor to the rollouts that reward sources score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_advrm.data.messages import Message, plain_text
from nemo_advrm.errors import RewardSourceError
from nemo_advrm.rollouts.types import Rollouts

FINGERPRINT = "nemo_aligner actor"


def as_prompt(text: str) -> tuple[Message, ...]:
    """Wrap a prompt of a NeMo-Aligner file, which is text that already contains the actor's template."""
    return (Message(role="user", content=text),)


class RolloutReader:
    """Reads rollout batches of one actor.

    Args:
        tokenizer: NeMo's tokenizer of the actor (``text_to_ids``, ``ids_to_text``, ``eos_id``).
        prompts: prompts of the SFT scores, to which ``prompt_index`` refers; None accepts any prompt.
    """

    def __init__(self, tokenizer: Any, prompts: Sequence[tuple[Message, ...]] | None = None) -> None:
        self.tokenizer = tokenizer
        self._prompts = prompts
        self._index: dict[tuple[int, ...], int] = {}
        for index, prompt in enumerate(prompts or ()):
            self._index.setdefault(self._key(tokenizer.text_to_ids(plain_text(prompt))), index)

    def read(self, batch: Any) -> Rollouts:
        """Read a batch with ``response_tokens`` [B, S], ``response_lengths`` and ``prompt_lengths`` [B].

        ``is_end`` [B] is optional; without it all responses count as ended.

        Raises RewardSourceError for a prompt without SFT scores.
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
        # decoding a response alone may drop its leading space
        return before, whole[len(before) :] if whole.startswith(before) else decode(body)

    def _find(self, prompt: list[int]) -> int:
        if self._prompts is None:
            return 0
        index = self._index.get(self._key(prompt))
        if index is None:
            shown = self.tokenizer.ids_to_text(prompt)[:80]
            raise RewardSourceError(
                f"the prompt {shown!r} has no SFT scores, to which the adversarial reward is relative: sample them "
                "from the files of model.data.data_prefix"
            )
        return index

    def _key(self, prompt: Sequence[int]) -> tuple[int, ...]:
        return tuple(self._without_end(list(prompt)))  # model.data.append_eod adds an end token to a prompt

    def _without_end(self, tokens: list[int]) -> list[int]:
        while tokens and tokens[-1] == self.tokenizer.eos_id:
            tokens = tokens[:-1]
        return tokens
