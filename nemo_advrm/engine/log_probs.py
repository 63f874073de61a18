"""Log-probabilities and entropy of vocabulary-parallel logits, differentiable, in one pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from nemo_advrm.engine.context import SplitLogits


def _sum_over_vocabulary(value: Tensor, op: Any = None) -> Tensor:
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        dist.all_reduce(value, op=op or dist.ReduceOp.SUM, group=parallel_state.get_tensor_model_parallel_group())
    return value


class _LogProbsAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        logits_NV = logits_NV.float()
        part = logits_NV.size(-1)
        start = parallel_state.get_tensor_model_parallel_rank() * part
        peak_N = _sum_over_vocabulary(logits_NV.amax(-1), dist.ReduceOp.MAX)
        log_probs_NV = logits_NV - peak_N[:, None]
        log_sum_N = _sum_over_vocabulary(log_probs_NV.exp().sum(-1)).log()
        log_probs_NV -= log_sum_N[:, None]
        entropy_N = -_sum_over_vocabulary((log_probs_NV.exp() * log_probs_NV).sum(-1))

        elsewhere_N = (targets_N < start) | (targets_N >= start + part)
        local_N = (targets_N - start).masked_fill(elsewhere_N, 0)
        picked_N = log_probs_NV.gather(-1, local_N[:, None]).squeeze(-1).masked_fill(elsewhere_N, 0.0)
        picked_N = _sum_over_vocabulary(picked_N)
        ctx.save_for_backward(log_probs_NV, entropy_N, local_N, elsewhere_N)
        return picked_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad_log_prob_N, grad_entropy_N = grads
        log_probs_NV, entropy_N, local_N, elsewhere_N = ctx.saved_tensors
        # d log p_t / dz = onehot - p ;  d H / dz = -p (log p + H)
        weight_NV = grad_log_prob_N[:, None] + grad_entropy_N[:, None] * (log_probs_NV + entropy_N[:, None])
        grad_NV = -log_probs_NV.exp() * weight_NV
        grad_NV.scatter_add_(-1, local_N[:, None], grad_log_prob_N.masked_fill(elsewhere_N, 0.0)[:, None])
        return grad_NV, None


def log_probs_and_entropy(
    logits_NV: Tensor | SplitLogits, targets_N: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at the targets, and the entropy of that distribution.

    Args:
        logits_NV: [N, V / tp], this rank's part of the (padded) vocabulary; under context parallelism
            :class:`SplitLogits`.
        targets_N: [N] int64 token ids.

    Returns:
        log_probs_N in nats and entropy_N in nats, fp32, the same on all tensor- and context-parallel ranks.
    """
    if isinstance(logits_NV, SplitLogits):
        own = log_probs_and_entropy(logits_NV.own_NV, targets_N[logits_NV.own_N], temperature)
        log_probs_N, entropy_N = logits_NV.whole(torch.stack(own))
        return log_probs_N, entropy_N
    if temperature != 1.0:
        logits_NV = logits_NV / temperature
    return _LogProbsAndEntropy.apply(logits_NV, targets_N)  # type: ignore[no-any-return]
