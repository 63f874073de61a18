"""A linear Bradley-Terry model: the weights of a few features that predict which of two responses is preferred."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

# Penalty on the squared weights of the scaled features: small enough to matter only between collinear features.
L2 = 1e-3


def fit_weights(differences_NF: Tensor, weights_N: Tensor | None = None, l2: float = L2) -> Tensor:
    """Weights w of the score x @ w, [F] fp64, that maximise the likelihood `sigmoid(differences_NF @ w)` of the pairs.

    LBFGS minimises the mean of `-log sigmoid(d @ w)` plus `l2 * |v|^2`. v are the weights of the features divided by
    their scale, the root mean square of a feature's differences, so that the penalty does not depend on units. A
    feature that never differs gets the weight 0.

    Args:
        differences_NF: features of the chosen response minus those of the rejected one.
        weights_N: weight of each pair; None weighs all alike.
    """
    differences_NF = differences_NF.double()
    weights_N = torch.ones(len(differences_NF)).double() if weights_N is None else weights_N.double()
    scale_F = differences_NF.square().mean(0).sqrt()
    scaled_NF = differences_NF / torch.where(scale_F > 0, scale_F, 1.0)
    values_F = torch.zeros(differences_NF.size(1), dtype=torch.float64, requires_grad=True)
    options = {"max_iter": 200, "tolerance_grad": 1e-10, "tolerance_change": 1e-14}
    optimizer = torch.optim.LBFGS([values_F], line_search_fn="strong_wolfe", **options)

    def loss() -> Tensor:
        optimizer.zero_grad()
        unlikely = -(logsigmoid(scaled_NF @ values_F) * weights_N).sum() / weights_N.sum()
        total = unlikely + l2 * values_F.square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    return torch.where(scale_F > 0, values_F.detach() / scale_F, 0.0)
