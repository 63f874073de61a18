"""Samples next tokens from logits with temperature, top-k and top-p, by inverse transform of given uniform numbers.

One uniform number decides one token, so a sample depends only on its logits and its number: not on other rows, on rows
that left the batch, or on the parallel layout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters; the schema (``rl.*``) has their limits.

    Attributes:
        max_new_tokens: longest response, including its stop token.
        stop_tokens: ids that end a response.
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens with at least this total probability.
    """

    max_new_tokens: int
    stop_tokens: tuple[int, ...]
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def pick(logits_BV: Tensor, uniforms_B: Tensor, sampling: Sampling) -> Tensor:
    """[B, V] logits and [B] numbers in [0, 1) -> [B] int64 token ids."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    probs_BV = torch.softmax(logits_BV.float() / sampling.temperature, dim=-1)
    tokens_BV = None
    if sampling.top_k or sampling.top_p < 1:
        kept = min(sampling.top_k or probs_BV.size(-1), probs_BV.size(-1))
        probs_BV, tokens_BV = probs_BV.topk(kept, dim=-1)
        if sampling.top_p < 1:
            probs_BV = probs_BV / probs_BV.sum(-1, keepdim=True)
            before = probs_BV.cumsum(-1) - probs_BV
            probs_BV = probs_BV.masked_fill(before >= sampling.top_p, 0.0)
    cumulative_BV = probs_BV.cumsum(-1)
    wanted_B1 = uniforms_B[:, None] * cumulative_BV[:, -1:]
    index_B1 = torch.searchsorted(cumulative_BV, wanted_B1, right=True)
    # rounding can yield the index after the last token with nonzero probability
    after_last_B1 = (probs_BV > 0).flip(-1).view(torch.uint8).argmax(-1, keepdim=True)
    last_B1 = probs_BV.size(-1) - 1 - after_last_B1
    index_B1 = torch.minimum(index_B1, last_B1)
    picked = index_B1 if tokens_BV is None else tokens_BV.gather(-1, index_B1)
    return picked.squeeze(-1)
