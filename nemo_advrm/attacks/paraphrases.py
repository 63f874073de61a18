"""Rewritten responses by an instructed language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nemo_advrm.config.schema import Config
from nemo_advrm.data.messages import Message
from nemo_advrm.engine.sampling import Sampling
from nemo_advrm.errors import ConfigError
from nemo_advrm.rewards.sample_rows import prompt_text
from nemo_advrm.rollouts.language_model import LanguageModel
from nemo_advrm.rollouts.types import Prompt
from nemo_advrm.seeds import derive_seed


@dataclass(frozen=True)
class Request:
    """What a language model is asked for: ``instruction`` says how the ``answer`` to ``prompt`` is to be rewritten.

    Attributes:
        seed: of the random numbers of this rewriting alone.
    """

    prompt: Prompt
    answer: str
    instruction: str
    seed: int

    @property
    def message(self) -> Message:
        question = prompt_text(self.prompt.messages)
        return Message(role="user", content=f"{self.instruction}\n\nQuestion:\n{question}\n\nAnswer:\n{self.answer}")


def is_instructed(lm: LanguageModel) -> bool:
    """Returns whether a model follows instructions as far as its tokenizer tells: it has a chat template."""
    return bool(getattr(lm.tokenizer, "has_template", False))


def check_instructed(lm: LanguageModel, attack: str) -> None:
    """Raises ConfigError for a model without a chat template: it would go on writing instead of rewriting."""
    if not is_instructed(lm):
        raise ConfigError(
            f"adversarial.attack={attack} needs an instructed language model, and {lm.name} has no chat template: name "
            "one by adversarial.lm=hf:DIR"
        )


def rewritten(requests: Sequence[Request], lm: LanguageModel, cfg: Config) -> list[str | None]:
    """Returns the rewritten answer of each request, sampled with ``rl.temperature``, ``rl.top_k`` and ``rl.top_p``.

    None for a request that leaves no room in the model's context, and for an answer that was cut off or is blank. All
    ranks of a model replica call with the same requests, and all replicas equally often.
    """
    rl, tokenizer = cfg.rl, lm.tokenizer
    sampling = Sampling(rl.max_new_tokens, (tokenizer.eos_id,), rl.temperature, rl.top_k, rl.top_p)
    rows = [tokenizer.encode_prompt((request.message,)) for request in requests]
    places = [i for i, row in enumerate(rows) if len(row) + rl.max_new_tokens <= lm.context]
    numbers_NT = torch.zeros(len(places), rl.max_new_tokens)
    for row_T, i in zip(numbers_NT, places, strict=True):
        draw = torch.Generator().manual_seed(derive_seed(requests[i].seed, "rewritten"))
        row_T.copy_(torch.rand(rl.max_new_tokens, generator=draw))
    made = lm.generate([rows[i] for i in places], sampling, numbers_NT)
    answers: list[str | None] = [None] * len(requests)
    for i, tokens, ended in zip(places, made.responses, made.ended, strict=True):
        answers[i] = (tokenizer.decode_response(tokens).strip() or None) if ended else None
    return answers
