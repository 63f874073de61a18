"""Estimates of KL(pi || pi_0) from the log-probabilities of tokens that pi sampled.

The estimators follow Schulman (2020), "Approximating KL Divergence", with x = log pi - log pi_0 in nats:
k1 = x (unbiased, either sign), abs = |x| (Adv-RM's choice: never rewards a token for being unlikely), k2 = x^2 / 2,
k3 = exp(-x) - 1 + x (unbiased, never negative).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_advrm.nearest_name import unknown_name
from nemo_advrm.objectives.losses import MAX_LOG_RATIO
from nemo_advrm.objectives.masked import masked_mean, masked_sum, zero_masked
from nemo_advrm.objectives.spread import rounding

KL_ESTIMATORS = ("k1", "abs", "k2", "k3")
KL_REDUCTIONS = ("mean", "sum")


def per_token_kl(log_probs_BT: Tensor, ref_log_probs_BT: Tensor, mask_BT: Tensor, estimator: str) -> Tensor:
    """Estimate of each token in nats, [B, T], 0 where masked.

    In k3, -x is limited to 20 before the exponential, so that one token with pi near 0 does not make the sum infinite.
    Raises ConfigError for an unknown estimator.
    """
    log_ratio_BT = _log_ratio(log_probs_BT, ref_log_probs_BT, mask_BT, estimator)
    if estimator == "k1":
        return log_ratio_BT
    if estimator == "abs":
        return log_ratio_BT.abs()
    if estimator == "k2":
        return log_ratio_BT.square() / 2
    return (-log_ratio_BT).clamp(max=MAX_LOG_RATIO).expm1() + log_ratio_BT


def kl_noise(
    log_probs_BT: Tensor, ref_log_probs_BT: Tensor, mask_BT: Tensor, estimator: str, dtype: torch.dtype
) -> Tensor:
    """The rounding error of `per_token_kl`, in nats, [B, T], 0 where masked.

    A log-probability computed in `dtype` has the rounding error of its own size, and of at least 1 nat, since it is a
    logit minus a normaliser. So two models with equal weights have a KL of this size. Raises like `per_token_kl`.
    """
    log_ratio_BT = _log_ratio(log_probs_BT, ref_log_probs_BT, mask_BT, estimator)
    sizes_BT = zero_masked(2 + log_probs_BT.abs() + ref_log_probs_BT.abs(), mask_BT)
    noise_BT = rounding(dtype) * sizes_BT
    if estimator in ("k1", "abs"):
        return noise_BT
    slope_BT = log_ratio_BT if estimator == "k2" else (-log_ratio_BT).clamp(max=MAX_LOG_RATIO).expm1()
    return (slope_BT.abs() + noise_BT) * noise_BT


def _log_ratio(log_probs_BT: Tensor, ref_log_probs_BT: Tensor, mask_BT: Tensor, estimator: str) -> Tensor:
    if estimator not in KL_ESTIMATORS:
        raise unknown_name("KL estimator", estimator, KL_ESTIMATORS)
    return zero_masked(log_probs_BT, mask_BT) - zero_masked(ref_log_probs_BT, mask_BT)


def response_kl(
    log_probs_BT: Tensor, ref_log_probs_BT: Tensor, mask_BT: Tensor, estimator: str, reduce: str = "mean"
) -> Tensor:
    """Estimate of each response in nats, [B]: the "mean" or the "sum" over its kept tokens; 0 for an empty response.

    The mean is the penalty of the reward: it does not grow with length. The sum with "k1" is the KL of curves of reward
    against sqrt(KL). Raises ConfigError for an unknown name.
    """
    if reduce not in KL_REDUCTIONS:
        raise unknown_name("KL reduction", reduce, KL_REDUCTIONS)
    kl_BT = per_token_kl(log_probs_BT, ref_log_probs_BT, mask_BT, estimator)
    return (masked_mean if reduce == "mean" else masked_sum)(kl_BT, mask_BT, dim=-1)
