"""Mahalanobis distance and the shrunk covariance against values computed by hand."""

from __future__ import annotations

import pytest
import torch

from nemo_advrm.errors import RewardSourceError
from nemo_advrm.objectives.gaussian import Gaussian, fit_gaussian, ledoit_wolf, mahalanobis

CROSS = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]]).double()


def test_the_covariance_is_shrunk_by_hand() -> None:
    # C = diag(1/2, 2), m = 5/4, |C - m I|^2 = 9/8; |x|^4 is 1 1 16 16, mean 17/2, less |C|^2 = 17/4, over 4: 17/16
    rho = (17 / 16) / (9 / 8)
    expected = torch.diag(torch.tensor([rho * 5 / 4 + (1 - rho) / 2, rho * 5 / 4 + (1 - rho) * 2]).double())
    torch.testing.assert_close(ledoit_wolf(CROSS), expected)


def test_a_round_sample_keeps_its_covariance() -> None:
    round_ = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]).double()
    torch.testing.assert_close(ledoit_wolf(round_), 0.5 * torch.eye(2).double())


def test_many_points_are_hardly_shrunk() -> None:
    draw = torch.Generator().manual_seed(0)
    points = torch.randn(20000, 3, generator=draw).double() * torch.tensor([1.0, 2.0, 4.0])
    torch.testing.assert_close(ledoit_wolf(points - points.mean(0)), points.T.cov(correction=0), rtol=0.01, atol=0.01)


def test_the_distance_counts_deviations_by_hand() -> None:
    gaussian = Gaussian(torch.tensor([1.0, 1.0]), torch.tensor([[2.0, 0.0], [1.0, 3.0]]))  # C = [[4, 2], [2, 10]]
    points = torch.tensor([[1.0, 1.0], [3.0, 1.0], [3.0, 2.0]])
    # L^-1 (2, 0) = (1, -1/3), L^-1 (2, 1) = (1, 0)
    torch.testing.assert_close(mahalanobis(points, gaussian), torch.tensor([0.0, (1 + 1 / 9) ** 0.5, 1.0]))


def test_the_distance_of_a_sample_is_what_its_covariance_says() -> None:
    gaussian = fit_gaussian(CROSS + 7)
    inverse = ledoit_wolf(CROSS).inverse()
    torch.testing.assert_close(mahalanobis(CROSS + 7, gaussian), (CROSS @ inverse * CROSS).sum(-1).sqrt())


def test_fewer_points_than_dimensions_have_a_distance_everywhere() -> None:
    draw = torch.Generator().manual_seed(1)
    gaussian = fit_gaussian(torch.randn(10, 50, generator=draw).double())
    distances = mahalanobis(torch.randn(100, 50, generator=draw).double(), gaussian)
    assert distances.isfinite().all() and distances.min() > 1


def test_points_without_a_spread_are_refused() -> None:
    for points in (torch.ones(5, 2), torch.tensor([[0.0, 0.0], [1.0, 1.0]])):
        with pytest.raises(RewardSourceError, match=f"{len(points)} points in 2 dimensions is singular"):
            fit_gaussian(points.double())
