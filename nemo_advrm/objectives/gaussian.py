"""Mahalanobis distance from a sample whose covariance is shrunk, because it may have more dimensions than points."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_advrm.errors import RewardSourceError


@dataclass(frozen=True)
class Gaussian:
    """mean_D, and factor_DD: the lower Cholesky factor of the covariance, or of another matrix that takes its place."""

    mean_D: Tensor
    factor_DD: Tensor


def ledoit_wolf(centred_SD: Tensor) -> Tensor:
    """Covariance of S centred points, shrunk towards a multiple of the identity, [D, D].

    `(1 - rho) C + rho m I` with C the sample covariance, m = tr(C) / D, and the rho that minimises the expected squared
    error, estimated from the sample: the error of C over its distance from m I. Source: Ledoit and Wolf 2004, "A
    well-conditioned estimator for large-dimensional covariance matrices".
    """
    points, width = centred_SD.shape
    covariance_DD = centred_SD.T @ centred_SD / points
    squares = covariance_DD.square().sum()
    scale = covariance_DD.trace() / width
    distance = squares - width * scale.square()
    error = (centred_SD.square().sum(-1).square().mean() - squares) / points
    rho = (error / distance).clamp(0, 1) if distance > 0 else torch.ones_like(error)
    shrunk_DD = (1 - rho) * covariance_DD
    shrunk_DD.diagonal().add_(rho * scale)
    return shrunk_DD


def fit_gaussian(points_SD: Tensor) -> Gaussian:
    """Mean and covariance (`ledoit_wolf`) of S points; compute in fp64.

    Needs 8 D^2 bytes a matrix, and D^3 / 3 operations for the factor. Raises RewardSourceError when the points are too
    few or too equal: their covariance is singular.
    """
    mean_D = points_SD.mean(0)
    factor_DD, failed = torch.linalg.cholesky_ex(ledoit_wolf(points_SD - mean_D))
    if failed:
        raise RewardSourceError(
            f"the covariance of {points_SD.shape[0]} points in {points_SD.shape[1]} dimensions is singular: they are "
            "too few or too equal (raise sft_statistics.num_prompts)"
        )
    return Gaussian(mean_D, factor_DD)


def mahalanobis(points_ND: Tensor, gaussian: Gaussian) -> Tensor:
    """Distance from the mean in standard deviations of each direction, [N]: sqrt((x - mean)^T C^-1 (x - mean))."""
    away_DN = (points_ND - gaussian.mean_D).T
    return torch.linalg.solve_triangular(gaussian.factor_DD, away_DN, upper=False).norm(dim=0)
