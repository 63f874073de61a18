"""KL estimators."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_advrm.errors import ConfigError
from nemo_advrm.objectives.kl import KL_ESTIMATORS, per_token_kl, response_kl

LOG_PROBS = torch.tensor([[-1.0, -2.0, -3.0]])
REF = torch.tensor([[-1.5, -1.0, math.nan]])
MASK = torch.tensor([[1, 1, 0]])


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("k1", [0.5, -1.0]),
        ("abs", [0.5, 1.0]),
        ("k2", [0.125, 0.5]),
        ("k3", [math.exp(-0.5) - 1 + 0.5, math.exp(1.0) - 1 - 1.0]),
    ],
)
def test_estimators_by_hand(estimator: str, expected: list[float]) -> None:
    torch.testing.assert_close(per_token_kl(LOG_PROBS, REF, MASK, estimator), torch.tensor([[*expected, 0.0]]))
    mean = response_kl(LOG_PROBS, REF, MASK, estimator)
    total = response_kl(LOG_PROBS, REF, MASK, estimator, reduce="sum")
    torch.testing.assert_close(mean, torch.tensor([sum(expected) / 2]))
    torch.testing.assert_close(total, torch.tensor([sum(expected)]))


def test_k1_and_k3_are_unbiased() -> None:
    policy, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    exact = (policy * (policy / reference).log()).sum()
    for estimator in ("k1", "k3"):
        per_outcome = per_token_kl(policy.log()[None], reference.log()[None], torch.ones(1, 3), estimator)[0]
        torch.testing.assert_close((policy * per_outcome).sum(), exact)


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_masked_and_extreme_tokens_stay_finite(estimator: str) -> None:
    log_probs = torch.tensor([[-1e4, -math.inf], [math.nan, -math.inf]], requires_grad=True)
    kl = response_kl(log_probs, torch.zeros(2, 2), torch.tensor([[1, 0], [0, 0]]), estimator)
    kl.sum().backward()
    assert kl.isfinite().all() and kl[1] == 0
    assert log_probs.grad is not None and log_probs.grad.isfinite().all() and (log_probs.grad[1] == 0).all()


def test_unknown_names_are_errors() -> None:
    with pytest.raises(ConfigError, match="did you mean 'abs'"):
        per_token_kl(LOG_PROBS, REF, MASK, "absolute")
    with pytest.raises(ConfigError, match="did you mean 'mean'"):
        response_kl(LOG_PROBS, REF, MASK, "k1", reduce="means")
