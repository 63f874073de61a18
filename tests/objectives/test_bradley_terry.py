"""The weights of a linear Bradley-Terry model."""

from __future__ import annotations

import pytest
import torch

from nemo_advrm.objectives.bradley_terry import L2, fit_weights


def test_the_weights_that_drew_the_preferences_are_found() -> None:
    draw = torch.Generator().manual_seed(0)
    truth_F = torch.tensor([1.5, -0.02, 0.0])
    features_NF = torch.randn(20000, 3, generator=draw) * torch.tensor([1.0, 60.0, 4.0])
    won_N = torch.rand(20000, generator=draw) < torch.sigmoid(features_NF @ truth_F)
    differences_NF = torch.where(won_N[:, None], features_NF, -features_NF)
    fitted_F = fit_weights(differences_NF, l2=0.0).float()
    torch.testing.assert_close(fitted_F, truth_F, rtol=0.06, atol=0.006)
    # with the default penalty a little smaller, none by more than a few percent
    assert ((fit_weights(differences_NF).float() - truth_F).abs() <= 0.1 * truth_F.abs() + 0.006).all()


def test_one_feature_has_the_weight_that_can_be_computed_by_hand() -> None:
    # 3 of 4 pairs are right by 2: log(3) = 2 w
    differences_N1 = torch.tensor([[2.0], [2.0], [2.0], [-2.0]])
    assert fit_weights(differences_N1, l2=0.0).item() == pytest.approx(torch.tensor(3.0).log().item() / 2, rel=1e-6)
    weights_N = torch.tensor([1.0, 1.0, 1.0, 3.0])  # as many for as against
    assert fit_weights(differences_N1, weights_N).item() == pytest.approx(0.0, abs=1e-8)


def test_the_unit_of_a_feature_does_not_matter() -> None:
    draw = torch.Generator().manual_seed(1)
    differences_NF = torch.randn(200, 2, generator=draw) + 0.3
    units_F = torch.tensor([1000.0, 0.01])
    apart_F = fit_weights(differences_NF * units_F)
    torch.testing.assert_close(apart_F * units_F, fit_weights(differences_NF), rtol=1e-4, atol=1e-6)


def test_separable_pairs_have_finite_weights_and_a_constant_feature_none() -> None:
    differences_NF = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.5, 0.0]])
    weights_F = fit_weights(differences_NF)
    assert weights_F[1] == 0 and 0 < weights_F[0] < 1 / L2
