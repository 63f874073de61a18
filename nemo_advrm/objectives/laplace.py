"""Last-layer Laplace approximation of a reward model: how uncertain its head is about a response.

The score is `w^T h`, h the hidden state that the head reads. The Bradley-Terry loss of a pair with the states h_i, h_j
and the score difference d has the Hessian `sigma(d) sigma(-d) (h_i - h_j) (h_i - h_j)^T` in w. It is exact, because the
score is linear in w, and it does not depend on which side was chosen. So pairs need no label.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_advrm.errors import RewardSourceError
from nemo_advrm.objectives.gaussian import Gaussian


def pair_weights(scores_N: Tensor) -> Tensor:
    """Bradley-Terry curvature of every pair of N responses to one prompt, [N, N], 0 on the diagonal.

    It is sigma(d) sigma(-d), with d the difference of the two scores.
    """
    differences_NN = scores_N[:, None] - scores_N[None]
    weights_NN = differences_NN.sigmoid() * (-differences_NN).sigmoid()
    return weights_NN.fill_diagonal_(0)


def bradley_terry_hessian(states_ND: Tensor, scores_N: Tensor) -> Tensor:
    """Hessian of the Bradley-Terry loss in the head's weights, over all pairs of N responses to a prompt, [D, D].

    It is the sum over i < j of `c_ij (h_i - h_j) (h_i - h_j)^T`, with c of `pair_weights`; computed as
    H^T (diag(C 1) - C) H, which needs no row for each pair.
    """
    weights_NN = pair_weights(scores_N)
    return states_ND.T @ (weights_NN.sum(-1, keepdim=True) * states_ND - weights_NN @ states_ND)


def fit_laplace(states_SD: Tensor, scores_S: Tensor, prompts_S: Tensor) -> Gaussian:
    """Mean of S states, and the lower Cholesky factor of the posterior precision of the head's weights; fp64.

    The precision is `lambda I + the sum of bradley_terry_hessian over the prompts`. The prior precision lambda is that
    with which the prior alone would give the pairs score differences of the size that they have:
    `lambda = sum |h_i - h_j|^2 / sum (r_i - r_j)^2` over the pairs. So it depends on no unit and on no setting.

    With `objectives.gaussian.mahalanobis` it gives sqrt((h - mean)^T precision^-1 (h - mean)), the posterior standard
    deviation of a response's score less that of the mean SFT response. The difference, because pairs do not say
    anything about an offset that all scores share.

    Source: the Laplace approximation of a reward model's weights is Yang et al. 2024 (arXiv 2402.13210); they take the
    weights of LoRA, and the training pairs. The last layer alone is Kristiadi et al. 2020 (arXiv 2002.10118).

    Args:
        prompts_S: number of the prompt that each response answers.

    Raises:
        RewardSourceError: no prompt has two responses with different scores.
    """
    width = states_SD.shape[1]
    precision_DD = torch.zeros(width, width, dtype=states_SD.dtype)
    distances, differences = 0.0, 0.0
    for prompt in prompts_S.unique().tolist():
        states_ND, scores_N = states_SD[prompts_S == prompt], scores_S[prompts_S == prompt]
        precision_DD += bradley_terry_hessian(states_ND, scores_N)
        # the sum over pairs of squared differences is N times that of squared deviations from the mean
        count = len(scores_N)
        distances += count * (states_ND - states_ND.mean(0)).square().sum().item()
        differences += count * (scores_N - scores_N.mean()).square().sum().item()
    if not differences or not distances:
        raise RewardSourceError(
            "laplace compares SFT responses to one prompt, and no prompt has two with different scores and states: it "
            "needs at least 3 to each, since each copy leaves some out (sft_statistics.samples_per_prompt)"
        )
    precision_DD.diagonal().add_(distances / differences)
    return Gaussian(states_SD.mean(0), torch.linalg.cholesky(precision_DD))
