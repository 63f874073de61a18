"""Length limits of reward sources, for training, evaluation, serving and scoring alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from nemo_advrm.config.schema import Config
from nemo_advrm.data.inputs import print_encoding_counts
from nemo_advrm.data.messages import prompt_name
from nemo_advrm.data.row_lengths import RowLengths
from nemo_advrm.rewards.base import RewardSource
from nemo_advrm.rewards.token_sequences import token_sequences
from nemo_advrm.rollouts.types import Prompt, Rollouts


def longest_row(source: Any) -> int:
    """Returns the maximum tokens of a conversation for ``source``; 0 when it has no limit or the limit is unknown.

    A Hugging Face member is limited by its positions or its tokenizer, a Megatron model by model.encoder_seq_length. A
    server checks its own limit.
    """
    return int(getattr(source, "longest", 0)) or int(getattr(source, "context", 0))


def _limit(source: RewardSource) -> tuple[int, Any]:
    """Returns the maximum tokens of a row of ``source`` and the tokenizer that counts them; (0, None) for none."""
    limit, tokenizer = int(getattr(source, "longest", 0)), getattr(source, "tokenizer", None)
    return (0, None) if tokenizer is None else (limit, tokenizer)


def places_that_fit(source: RewardSource, rollouts: Rollouts) -> list[int]:
    """Returns the indices of rollouts that fit ``source`` without truncation; all for a source without a limit."""
    limit, tokenizer = _limit(source)
    if not limit:
        return list(range(len(rollouts)))
    return [i for i, row in enumerate(token_sequences(rollouts, tokenizer)) if len(row) <= limit]


def prompts_with_room(
    prompts: list[Prompt], fingerprint: str, sources: Sequence[RewardSource], cfg: Config
) -> list[Prompt]:
    """Returns the prompts, renumbered, whose responses every source can score; drops some with data.on_overlong=skip.

    Without skip it raises DataError, before anything is sampled, for a prompt that leaves no room for a response:
    ``rl.max_new_tokens`` tokens when the source has the policy's tokenizer (``fingerprint``), else one token.
    """
    kept = prompts
    # a prompt cannot be cut for one member: the members would score different conversations
    on_overlong = "skip" if cfg.data.on_overlong == "skip" else "error"
    for source in sources:
        limit, tokenizer = _limit(source)
        if not limit:
            continue
        same = tokenizer.fingerprint == fingerprint
        needed = cfg.rl.max_new_tokens if same else 1
        room = f"rl.max_new_tokens={needed}" if same else "a response"
        lengths = RowLengths(on_overlong, cfg.data.on_bad_row, "set data.on_overlong=skip to leave such prompts out")
        fitting = []
        for prompt in kept:
            length = len(prompt.tokens) if same else len(tokenizer.encode_prompt(prompt.messages))
            name = prompt_name(prompt.messages, prompt.index + 1)
            told = (
                f"{name}: the prompt has {length} tokens, which leaves no room for {room}: "
                f"reward source {source.name} takes {limit} tokens"
            )
            if lengths.tokens_to_cut(length + needed, limit, 0, told) is not None:
                fitting.append(prompt)
        counts = lengths.finish(len(fitting), "there are no prompts")
        print_encoding_counts(f"prompts for {source.name}", counts)
        kept = fitting
    return [dataclasses.replace(prompt, index=i) for i, prompt in enumerate(kept)]
