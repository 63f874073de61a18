"""What the ensemble says of ordinary SFT responses: the yardstick by which a response counts as unusual.

Every prompt has its own mean T_k(x), because prompts differ in how well they can be answered; the spread s_k is one
number per member over all prompts, because n responses of one prompt are too few for a spread of their own. Z(U), the
standardised disagreement, instead uses the distribution of U over all SFT responses of all prompts together: U is
already a difference of two scores of the same prompt, so what makes a prompt easy or hard has cancelled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_advrm.errors import RewardSourceError
from nemo_advrm.objectives.uncertainty import disagreement

# A spread below this fraction of the scores themselves is arithmetic noise, not an opinion.
RELATIVE_NOISE = 1e-6


@dataclass(frozen=True)
class ReferenceStatistics:
    """Statistics of n SFT responses for each of P prompts under K members.

    prompt_mean_PK: T_k(x). std_K: s_k, the std of R_k - T_k(x) over all P * n responses. disagreement_mean and
    disagreement_std: of U over the same responses, for the target that `fit_reference` was given. All stds divide by
    the count.
    """

    prompt_mean_PK: Tensor
    std_K: Tensor
    disagreement_mean: float
    disagreement_std: float


@torch.no_grad()
def fit_reference(scores_PNK: Tensor, target: int = 0) -> ReferenceStatistics:
    """Statistics from the scores [P, n, K] of n SFT responses per prompt, with U seen from member `target`.

    Raises RewardSourceError if n < 2, if a score is not finite, if a member does not tell the responses of a prompt
    apart, or if two members agree so exactly that U never varies; ConfigError unless K > 1.
    """
    prompts, samples, members = scores_PNK.shape
    if prompts < 1 or samples < 2:
        raise RewardSourceError(
            f"reference statistics need at least 2 SFT responses for 1 prompt, not {samples} for {prompts}"
        )
    for k in range(members):
        if not scores_PNK[:, :, k].isfinite().all():
            raise RewardSourceError(f"reward model {k + 1} gave a NaN or infinite score to an SFT response")
    scores64_PNK = scores_PNK.double()
    prompt_mean_PK = scores64_PNK.mean(1)
    std_K = (scores64_PNK - prompt_mean_PK[:, None]).square().mean((0, 1)).sqrt()
    _require_spread(std_K, RELATIVE_NOISE * scores64_PNK.square().mean((0, 1)).sqrt())
    u_S = disagreement(scores64_PNK.reshape(-1, members), target)
    u_mean, u_std = u_S.mean().item(), u_S.std(correction=0).item()
    _require_disagreement(u_std, RELATIVE_NOISE * scores64_PNK.square().mean().sqrt().item())
    return ReferenceStatistics(prompt_mean_PK.to(scores_PNK.dtype), std_K.to(scores_PNK.dtype), u_mean, u_std)


def z_scores(scores_BK: Tensor, prompt_mean_BK: Tensor, std_K: Tensor) -> Tensor:
    """z_k = (R_k - T_k(x)) / s_k, [B, K], with row b of `prompt_mean_BK` holding T_k of the prompt of response b.

    Raises RewardSourceError naming the member whose std is 0 or not finite.
    """
    _require_spread(std_K, torch.zeros_like(std_K))
    return (scores_BK - prompt_mean_BK) / std_K


def disagreement_z(scores_BK: Tensor, mean: float, std: float, target: int = 0) -> Tensor:
    """Z(U) = (U - mean) / std, [B], with the mean and std of U over the SFT responses of all prompts.

    `target` must be the one the statistics were fitted for. Raises RewardSourceError if the std is 0 or not finite.
    """
    _require_disagreement(std, 0.0)
    return (disagreement(scores_BK, target) - mean) / std


def _require_spread(std_K: Tensor, noise_K: Tensor) -> None:
    for k, (std, noise) in enumerate(zip(std_K.tolist(), noise_K.tolist(), strict=True)):
        if not noise < std < float("inf"):
            raise RewardSourceError(
                f"reward model {k + 1} has a spread of {std:g} over the SFT responses of a prompt, so its scores cannot"
                " be standardised: all of them get the same score (untrained, collapsed, or the responses are equal)"
            )


def _require_disagreement(std: float, noise: float) -> None:
    if not noise < std < float("inf"):
        raise RewardSourceError(
            f"the reward models' disagreement has a spread of {std:g} over the SFT responses, so it cannot be"
            " standardised: the members are copies of each other (give them different seeds or data)"
        )
