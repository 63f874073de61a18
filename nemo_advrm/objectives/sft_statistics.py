"""Statistics of the ensemble's scores of SFT responses: they define which scores of a response are unusual.

Every prompt has its own mean T_k(x), because prompts differ in how well they can be answered. The spread s_k is one
number per member over all prompts, because n responses to one prompt are too few for a spread of their own.

All spreads are those of a *fresh* response, one that is not in the sample that was fitted. So a fresh SFT response has
a z of variance 1. The SFT responses of the sample are nearer to the means that they determine; use `own_z_scores` for
them.

Members that are combined into one reward (mean, min, lcb, uwo, entropic, gap) are standardised by one mean and one
spread each over all SFT responses (`MemberStatistics`), because RLHF and servers meet prompts that have no T_k(x).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_advrm.errors import RewardSourceError

# A spread below this fraction of the scores themselves is rounding error.
RELATIVE_NOISE = 1e-6


@dataclass(frozen=True)
class SFTStatistics:
    """Statistics of n SFT responses for each of P prompts under K members.

    prompt_mean_PK: T_k(x). std_K: s_k, the std of R_k - T_k(x) of a fresh response, by `fresh_std`.
    """

    prompt_mean_PK: Tensor
    std_K: Tensor


@dataclass(frozen=True)
class MemberStatistics:
    """Mean and spread of each member's scores over all SFT responses of all prompts, [K] each; std by `fresh_std`."""

    mean_K: Tensor
    std_K: Tensor


def fresh_std(deviations_SK: Tensor, per_mean: int) -> Tensor:
    """Std of the deviation of a fresh response from the mean that it is compared with, [K].

    `deviations_SK` are the deviations of S sampled scores from their means; each mean is over `per_mean` scores. Two
    corrections apply. Fitting S / per_mean means takes as many degrees of freedom, so the squares are divided by
    S - S / per_mean. And each mean has an error of its own, which adds a variance of 1 / per_mean. With P prompts of n
    responses these are P (n - 1) and 1 + 1 / n. Without both, a fresh response would look sqrt((n + 1) / (n - 1)) times
    as unusual as it is: 1.18 times for n = 6, 1.41 times for n = 3.
    """
    samples = deviations_SK.shape[0]
    variance_K = deviations_SK.double().square().sum(0) / (samples - samples // per_mean)
    return (variance_K * (1 + 1 / per_mean)).sqrt()


@torch.no_grad()
def judged_statistics(values_PN: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the judged responses to each prompt, and the std of a fresh response's deviation from it, [P] each.

    NaN marks a response without a judgement: it is left out of its mean, of the squares, and of the degrees of freedom.
    A mean over fewer responses has a larger error, so the std is one number for each prompt; where every response is
    judged it is that of `fresh_std`. The mean is NaN for a prompt without judgements, the std is NaN where no prompt
    has two.
    """
    count_P = (~values_PN.isnan()).sum(1)
    mean_P = values_PN.nanmean(1)
    squares = (values_PN - mean_P[:, None]).double().square().nansum()
    variance = squares / (count_P - 1).clamp(min=0).sum()
    return mean_P, (variance * (1 + 1 / count_P)).sqrt().to(values_PN.dtype)


@torch.no_grad()
def fit_sft_statistics(scores_PNK: Tensor) -> SFTStatistics:
    """Statistics from the scores [P, n, K] of n SFT responses per prompt.

    Raises RewardSourceError if n < 2, if a score is not finite, or if a member gives all responses of each prompt the
    same score.
    """
    prompts, samples, members = scores_PNK.shape
    if prompts < 1 or samples < 2:
        raise RewardSourceError(
            f"SFT statistics need at least 2 SFT responses for 1 prompt, not {samples} for {prompts}"
        )
    _require_finite(scores_PNK.flatten(0, 1))
    scores64_PNK = scores_PNK.double()
    prompt_mean_PK = scores64_PNK.mean(1)
    std_K = fresh_std((scores64_PNK - prompt_mean_PK[:, None]).reshape(-1, members), samples)
    _require_spread(std_K, RELATIVE_NOISE * scores64_PNK.square().mean((0, 1)).sqrt())
    return SFTStatistics(prompt_mean_PK.to(scores_PNK.dtype), std_K.to(scores_PNK.dtype))


def z_scores(scores_BK: Tensor, prompt_mean_BK: Tensor, std_K: Tensor) -> Tensor:
    """z_k = (R_k - T_k(x)) / s_k, [B, K]; row b of `prompt_mean_BK` holds T_k of the prompt of response b.

    For fresh responses, with `SFTStatistics.std_K`. Raises RewardSourceError that names the member whose std is 0 or
    not finite.
    """
    _require_spread(std_K, torch.zeros_like(std_K))
    return (scores_BK - prompt_mean_BK) / std_K


def own_z_scores(scores_PNK: Tensor, statistics: SFTStatistics) -> Tensor:
    """z of the SFT responses that the statistics were fitted to, [P, n, K]: each against the others to its prompt.

    Without response i in T_k(x) the deviation is (R_k - T_k(x)) n / (n - 1). Its std is s sqrt(1 + 1 / (n - 1)), while
    that of a fresh response is s sqrt(1 + 1 / n). These z have mean 0 and variance 1 over the sample.
    """
    samples = scores_PNK.shape[1]
    prompt_mean_PNK = statistics.prompt_mean_PK[:, None].expand_as(scores_PNK)
    z_PNK = z_scores(scores_PNK.flatten(0, 1), prompt_mean_PNK.flatten(0, 1), statistics.std_K)
    return z_PNK.reshape(scores_PNK.shape) * ((samples + 1) / (samples - 1)) ** 0.5


@torch.no_grad()
def fit_members(scores_SK: Tensor) -> MemberStatistics:
    """Mean and spread of each member over S SFT responses of any prompts.

    Raises RewardSourceError for S < 2, a score that is not finite, and a member that gives all the same score.
    """
    if scores_SK.shape[0] < 2:
        raise RewardSourceError(f"members are standardised by at least 2 SFT responses, not {scores_SK.shape[0]}")
    _require_finite(scores_SK)
    scores64_SK = scores_SK.double()
    mean_K = scores64_SK.mean(0)
    std_K = fresh_std(scores64_SK - mean_K, scores_SK.shape[0])
    _require_spread(std_K, RELATIVE_NOISE * scores64_SK.square().mean(0).sqrt())
    return MemberStatistics(mean_K.to(scores_SK.dtype), std_K.to(scores_SK.dtype))


def standardise_members(scores_BK: Tensor, statistics: MemberStatistics) -> Tensor:
    """(R_k - mean_k) / std_k, [B, K]. Members then share offset and scale, which Bradley-Terry leaves free."""
    _require_spread(statistics.std_K, torch.zeros_like(statistics.std_K))
    return (scores_BK - statistics.mean_K) / statistics.std_K


def _require_finite(scores_SK: Tensor) -> None:
    for k, finite in enumerate(scores_SK.isfinite().all(0).tolist()):
        if not finite:
            raise RewardSourceError(f"reward model {k + 1} gave a NaN or infinite score to an SFT response")


def _require_spread(std_K: Tensor, noise_K: Tensor) -> None:
    for k, (std, noise) in enumerate(zip(std_K.tolist(), noise_K.tolist(), strict=True)):
        if not noise < std < float("inf"):
            raise RewardSourceError(
                f"reward model {k + 1} has a spread of {std:g} over SFT responses, so its scores cannot"
                " be standardised: all of them get the same score (untrained, collapsed, or the responses are equal)"
            )
