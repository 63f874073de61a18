"""The Laplace approximation of a head: curvature against autograd, prior and deviation by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import logsigmoid

from nemo_advrm.errors import RewardSourceError
from nemo_advrm.objectives.gaussian import mahalanobis
from nemo_advrm.objectives.laplace import bradley_terry_hessian, fit_laplace, pair_weights


def test_a_pair_of_equal_scores_has_the_curvature_of_a_coin_by_hand() -> None:
    weights = pair_weights(torch.tensor([0.0, 0.0, 100.0]))
    torch.testing.assert_close(weights, torch.tensor([[0.0, 0.25, 0.0], [0.25, 0.0, 0.0], [0.0, 0.0, 0.0]]))


def test_the_hessian_is_that_of_the_loss_of_all_pairs_whatever_their_labels() -> None:
    draw = torch.Generator().manual_seed(0)
    states_ND = torch.randn(4, 3, generator=draw, dtype=torch.float64)
    head_D = torch.randn(3, generator=draw, dtype=torch.float64)

    def loss(weights_D: torch.Tensor, sign: float) -> torch.Tensor:
        scores_N = states_ND @ weights_D
        pairs = [(i, j) for i in range(4) for j in range(i)]
        return -torch.stack([logsigmoid(sign * (scores_N[i] - scores_N[j])) for i, j in pairs]).sum()

    ours = bradley_terry_hessian(states_ND, states_ND @ head_D)
    for sign in (1.0, -1.0):
        exact = torch.autograd.functional.hessian(lambda w, sign=sign: loss(w, sign), head_D)
        torch.testing.assert_close(ours, exact)


def test_prior_and_deviation_by_hand() -> None:
    # two prompts with two responses each; the second moves along one axis only, with equal scores
    states_SD = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [3.0, 0.0], [-3.0, 0.0]]).double()
    scores_S = torch.tensor([1.0, -1.0, 0.0, 0.0]).double()
    prompts_S = torch.tensor([0, 0, 1, 1])
    prior = (2**2 + 6**2) / (2**2 + 0**2)
    curvature = torch.sigmoid(torch.tensor(2.0).double()) * torch.sigmoid(torch.tensor(-2.0).double())
    first = prior + curvature.item() * 4 + 0.25 * 36
    posterior = fit_laplace(states_SD, scores_S, prompts_S)
    deviation = mahalanobis(torch.tensor([[2.0, 0.0], [0.0, 2.0]]).double(), posterior)
    torch.testing.assert_close(deviation, torch.tensor([2 / first**0.5, 2 / prior**0.5]).double())


def test_the_deviation_has_the_unit_of_the_score_and_none_of_the_states() -> None:
    draw = torch.Generator().manual_seed(1)
    states_SD = torch.randn(60, 5, generator=draw, dtype=torch.float64)
    scores_S, prompts_S = states_SD @ torch.ones(5).double(), torch.arange(60) // 6
    fresh_ND = torch.randn(7, 5, generator=draw, dtype=torch.float64)
    plain = mahalanobis(fresh_ND, fit_laplace(states_SD, scores_S, prompts_S))
    scaled = mahalanobis(10 * fresh_ND, fit_laplace(10 * states_SD, scores_S, prompts_S))
    torch.testing.assert_close(plain, scaled)


def test_directions_in_which_pairs_differ_are_known_and_others_are_not() -> None:
    draw = torch.Generator().manual_seed(2)
    states_SD = torch.randn(300, 6, generator=draw, dtype=torch.float64) * torch.tensor([1, 1, 1, 1, 1, 1e-3]).double()
    posterior = fit_laplace(states_SD, states_SD.sum(-1), torch.arange(300) // 6)
    known, unknown = mahalanobis(posterior.mean_D + torch.eye(6).double()[[0, 5]], posterior).tolist()
    assert unknown > 5 * known


def test_equal_scores_or_single_responses_are_refused() -> None:
    states_SD = torch.randn(6, 2).double()
    for scores_S, prompts_S in ((torch.ones(6), torch.zeros(6)), (torch.randn(6), torch.arange(6))):
        with pytest.raises(RewardSourceError, match="no prompt has two with different scores"):
            fit_laplace(states_SD, scores_S.double(), prompts_S)
