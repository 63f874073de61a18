"""Log-probabilities and entropy of vocabulary-parallel logits, differentiable, in one pass or in chunks of tokens.

A [tokens, vocabulary] tensor is the largest of a step: with fp32 copies for the softmax and its gradient, 8192 tokens
of a vocabulary of 128k take 4 GB each. Beyond ``model.logits_chunk_size`` logits are therefore not made before their
log-probabilities are wanted (:class:`DeferredLogits`). Then each chunk of tokens goes through output layer and softmax
by itself, and leaves only its hidden states for the backward pass, which makes its logits again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nemo_advrm.engine.context import SplitLogits


@dataclass(frozen=True)
class DeferredLogits:
    """The logits of N tokens, of which only a chunk is made at a time.

    Attributes:
        hidden_NH: hidden states that the output layer reads.
        logits_of: [n, H] -> [n, V / tp]; tensor-parallel ranks call it together.
        rows: tokens per chunk.
    """

    hidden_NH: Tensor
    logits_of: Callable[[Tensor], Tensor]
    rows: int

    @property
    def device(self) -> torch.device:
        """Megatron's schedules ask for it in models with experts."""
        return self.hidden_NH.device

    def map(self, function: Callable[..., Any], targets_N: Tensor) -> Tensor:
        """``function(logits_nV, targets_n)`` -> [K, n] of every chunk, together [K, N]."""

        def of_chunk(hidden_nH: Tensor, targets_n: Tensor) -> Tensor:
            return function(self.logits_of(hidden_nH), targets_n)  # type: ignore[no-any-return]

        chunks = zip(self.hidden_NH.split(self.rows), targets_N.split(self.rows), strict=True)
        # the output layer has no dropout, so no random state has to be kept
        parts = [checkpoint(of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
        return torch.cat(parts, 1)


def _sum_over_vocabulary(value: Tensor, op: Any = None) -> Tensor:
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        dist.all_reduce(value, op=op or dist.ReduceOp.SUM, group=parallel_state.get_tensor_model_parallel_group())
    return value


class _LogProbs(torch.autograd.Function):
    """Log-probabilities and, if wanted, entropies, [1 or 2, N]."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, with_entropy: bool) -> Tensor:
        logits_NV = logits_NV.float()
        part = logits_NV.size(-1)
        start = parallel_state.get_tensor_model_parallel_rank() * part
        peak_N = _sum_over_vocabulary(logits_NV.amax(-1), dist.ReduceOp.MAX)
        log_probs_NV = logits_NV - peak_N[:, None]
        log_sum_N = _sum_over_vocabulary(log_probs_NV.exp().sum(-1)).log()
        log_probs_NV -= log_sum_N[:, None]
        elsewhere_N = (targets_N < start) | (targets_N >= start + part)
        local_N = (targets_N - start).masked_fill(elsewhere_N, 0)
        picked_N = log_probs_NV.gather(-1, local_N[:, None]).squeeze(-1).masked_fill(elsewhere_N, 0.0)
        results = [_sum_over_vocabulary(picked_N)]
        if with_entropy:
            results.append(-_sum_over_vocabulary(log_probs_NV.exp().mul_(log_probs_NV).sum(-1)))
        ctx.save_for_backward(log_probs_NV, local_N, elsewhere_N, *results[1:])
        return torch.stack(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        log_probs_NV, local_N, elsewhere_N, *entropies = ctx.saved_tensors
        grad_log_prob_N = grads[0][0]
        # d log p_t / dz = onehot - p ;  d H / dz = -p (log p + H)
        if entropies:
            weight_NV = (log_probs_NV + entropies[0][:, None]).mul_(grads[0][1][:, None]).add_(grad_log_prob_N[:, None])
            grad_NV = log_probs_NV.exp().mul_(weight_NV).neg_()
        else:
            grad_NV = log_probs_NV.exp().mul_(-grad_log_prob_N[:, None])
        grad_NV.scatter_add_(-1, local_N[:, None], grad_log_prob_N.masked_fill(elsewhere_N, 0.0)[:, None])
        return grad_NV, None, None


Logits: TypeAlias = Tensor | SplitLogits | DeferredLogits


def log_probs(logits_NV: Logits, targets_N: Tensor, temperature: float = 1.0) -> Tensor:
    """What :func:`log_probs_and_entropy` returns first, without the time and memory that the entropy takes."""
    return token_values(logits_NV, targets_N, temperature, with_entropy=False)[0]


def log_probs_and_entropy(logits_NV: Logits, targets_N: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at the targets, and the entropy of that distribution.

    Args:
        logits_NV: [N, V / tp], this rank's part of the (padded) vocabulary; under context parallelism
            :class:`SplitLogits`; :class:`DeferredLogits` are made chunk by chunk, with equal results.
        targets_N: [N] int64 token ids.

    Returns:
        log_probs_N in nats and entropy_N in nats, fp32, the same on all tensor- and context-parallel ranks.
    """
    log_probs_N, entropy_N = token_values(logits_NV, targets_N, temperature, with_entropy=True)
    return log_probs_N, entropy_N


def token_values(logits_NV: Logits, targets_N: Tensor, temperature: float, with_entropy: bool) -> Tensor:
    """Log-probabilities and, if wanted, entropies, [1 or 2, N]; see :func:`log_probs_and_entropy`."""

    def of(logits_NV: Logits, targets_N: Tensor) -> Tensor:
        return token_values(logits_NV, targets_N, temperature, with_entropy)

    if isinstance(logits_NV, SplitLogits):
        return logits_NV.whole(of(logits_NV.own_NV, targets_N[logits_NV.own_N]))
    if isinstance(logits_NV, DeferredLogits):
        return logits_NV.map(of, targets_N)
    if temperature != 1.0:
        logits_NV = logits_NV / temperature
    return _LogProbs.apply(logits_NV, targets_N, with_entropy)  # type: ignore[no-any-return]
