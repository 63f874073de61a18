"""Importance sampling: what another policy wrote, weighted as if the trained one had written it.

The ratio is truncated above, as verl (`rollout_is_threshold`), TRL (`vllm_importance_sampling_cap`) and NeMo RL
(`truncated_importance_sampling_ratio`) do for inference engines with other numerics. Here the other policy never gets
the trained weights, so that the ratios grow without end; how many samples they leave is the effective sample size.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from nemo_advrm.nearest_name import unknown_name
from nemo_advrm.objectives.masked import masked_sum, zero_masked

UNITS = ("token", "response")


def log_ratios(log_probs_BT: Tensor, behaviour_log_probs_BT: Tensor, mask_BT: Tensor, unit: str) -> Tensor:
    """log(pi / mu) of each token, [B, T] in nats, 0 where masked; mu is the policy that wrote.

    With "response" every token has the sum over its response: the ratio is then exact (it allows for the other tokens
    that mu would have been followed by), and its variance grows with the length. Raises ConfigError for another unit.
    """
    if unit not in UNITS:
        raise unknown_name("unit of importance ratios", unit, UNITS)
    ratios_BT = zero_masked(log_probs_BT, mask_BT) - zero_masked(behaviour_log_probs_BT, mask_BT)
    if unit == "token":
        return ratios_BT
    return zero_masked(masked_sum(ratios_BT, mask_BT, -1)[:, None].expand_as(ratios_BT), mask_BT)


def truncated_weights(log_ratios_BT: Tensor, cap: float) -> Tensor:
    """min(pi / mu, cap) of each entry, same shape (Ionides 2008, "Truncated Importance Sampling")."""
    return log_ratios_BT.clamp(max=math.log(cap)).exp()


def effective_share(log_ratios_N: Tensor) -> float:
    """The effective sample size as a share of N, (sum w)^2 / (N sum w^2) (Kish), from log w before truncation.

    1 where all ratios are equal, 1 / N where one outweighs all others; 1 without samples. Example: ratios 1 and 3 give
    16 / (2 * 10) = 0.8.
    """
    if not log_ratios_N.numel():
        return 1.0
    log_ratios_N = log_ratios_N.double()
    log_share = 2 * log_ratios_N.logsumexp(0) - (2 * log_ratios_N).logsumexp(0) - math.log(log_ratios_N.numel())
    return float(log_share.exp())


def mean_ratio(log_ratios_N: Tensor) -> float:
    """Mean of w = pi / mu, from log w before truncation: 1 in expectation under mu; 1 without samples.

    The effective sample size does not see what all ratios have in common: where all are e^-9 it is the whole, though
    next to nothing of these samples is left. A mean below 1 tells that pi has gone where mu did not sample.
    """
    if not log_ratios_N.numel():
        return 1.0
    log_mean = log_ratios_N.double().logsumexp(0) - math.log(log_ratios_N.numel())
    return min(float(log_mean.exp()), sys.float_info.max)


def weighted_mean(values_N: Tensor, log_ratios_N: Tensor) -> float:
    """Mean of `values_N` under pi, estimated from samples of mu: sum w v / sum w; 0 without samples."""
    if not values_N.numel():
        return 0.0
    return float((torch.softmax(log_ratios_N.double(), 0) * values_N.double()).sum())
