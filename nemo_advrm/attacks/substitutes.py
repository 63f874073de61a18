"""Words that fit into a gap of a response, by a causal language model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nemo_advrm.engine.microbatches import EncodedResponse
from nemo_advrm.rollouts.language_model import LanguageModel
from nemo_advrm.rollouts.types import Prompt

_ONE_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_MORE = 4  # words that are proposed by the text before the gap, for each that is left by the text after it
_CONTEXT = 8  # words after the gap that are read


@dataclass(frozen=True)
class Gap:
    """The place of one word in a response to ``prompt``: the text ``before`` and ``after`` it."""

    prompt: Prompt
    before: str
    word: str
    after: str


class Substitutes:
    """Proposes ``count`` words for a gap.

    BERT-Attack asks a masked model, which reads both sides of the gap. Here a causal model proposes by the text before,
    and ranks its proposals by the probability that it gives to them and to the next words after the gap. Only words of
    one token are proposed.
    """

    def __init__(self, lm: LanguageModel, count: int) -> None:
        self.lm = lm
        self.count = count

    def of(self, gaps: Sequence[Gap]) -> list[list[str]]:
        """Returns at most ``count`` words for each gap, the likeliest first, none of them the one that was there.

        All ranks of a model replica call with the same gaps, and all replicas equally often.
        """
        tokenizer = self.lm.tokenizer
        prompts = [tokenizer.encode_prompt(gap.prompt.messages) for gap in gaps]
        rows = [prompt + tokenizer.encode(gap.before.rstrip()) for prompt, gap in zip(prompts, gaps, strict=True)]
        rows = [row[-self.lm.context :] for row in rows]
        ids_NK, log_probs_NK = self.lm.next_tokens(rows, _MORE * self.count)
        words = [
            self._words(gap, row[-1:], ids, log_probs)
            for gap, row, ids, log_probs in zip(gaps, rows, ids_NK.tolist(), log_probs_NK.tolist(), strict=True)
        ]
        scored: list[EncodedResponse] = []
        for gap, prompt, proposed in zip(gaps, prompts, words, strict=True):
            after = " ".join(gap.after.split()[:_CONTEXT])
            joint = " " if gap.after[:1].isspace() else ""
            for word in proposed:
                row = prompt + tokenizer.encode(gap.before + word + joint + after)
                kept = row[-self.lm.context :]
                read = len(tokenizer.encode(gap.before.rstrip())) + len(prompt) - (len(row) - len(kept))
                scored.append(EncodedResponse(kept, max(1, min(read, len(kept)))))
        fits = iter(self.lm.log_probs(scored).tolist())
        return [
            [word for _, word in sorted(((-next(fits), word) for word in proposed), key=lambda item: item[0])][
                : self.count
            ]
            for proposed in words
        ]

    def _words(self, gap: Gap, last: list[int], ids: list[int], log_probs: list[float]) -> list[str]:
        """Returns the different whole words among the tokens, with the capital letter of the word that was there."""
        found: dict[str, None] = {}
        for token, log_prob in zip(ids, log_probs, strict=True):
            if log_prob == -torch.inf:
                continue
            text = self._appended(last, token)
            begins = not gap.before or text[:1].isspace() == gap.before[-1:].isspace()  # else it goes on with a word
            word = text.strip()
            if begins and _ONE_WORD.fullmatch(word) and word.casefold() != gap.word.casefold():
                found[word[:1].upper() + word[1:] if gap.word[:1].isupper() else word] = None
        return list(found)

    def _appended(self, last: list[int], token: int) -> str:
        """Returns what a token adds to the text after the token ``last``, with the space before a word."""
        tokenizer = self.lm.tokenizer
        alone, both = tokenizer.decode(last), tokenizer.decode([*last, token])
        return both[len(alone) :] if both.startswith(alone) else tokenizer.decode([token])
