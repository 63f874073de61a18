"""KL estimators."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_advrm.errors import ConfigError
from nemo_advrm.objectives.kl import KL_ESTIMATORS, kl_noise, per_token_kl, response_kl
from nemo_advrm.objectives.spread import rounding

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


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_the_noise_of_a_kl_covers_what_noise_in_both_log_probs_makes_of_it(estimator: str) -> None:
    draw = torch.Generator().manual_seed(0)
    own = -5 * torch.rand(4, 50, generator=draw)
    other = own + torch.linspace(-2, 2, 50) * torch.tensor([[0.0], [1e-3], [0.1], [1.0]])
    mask = torch.ones(4, 50)
    mask[:, 40:] = 0
    noise = kl_noise(own, other, mask, estimator, torch.bfloat16)
    assert (noise[:, 40:] == 0).all() and (noise[:, :40] > 0).all()
    moved = []
    for seed in range(20):
        signs = [2 * torch.randint(2, own.shape, generator=draw.manual_seed(seed + part)) - 1 for part in (0, 100)]
        shaken = [x + s * rounding(torch.bfloat16) * (1 + x.abs()) for x, s in zip((own, other), signs, strict=True)]
        moved.append(per_token_kl(*shaken, mask, estimator) - per_token_kl(own, other, mask, estimator))
    largest = torch.stack(moved).abs().amax(0)[:, :40]
    assert (largest <= 1.1 * noise[:, :40] + 1e-6).all() and (largest >= 0.4 * noise[:, :40] - 1e-6).all()


def test_the_noise_of_a_kl_by_hand() -> None:
    noise = kl_noise(LOG_PROBS, REF, MASK, "abs", torch.float32)
    torch.testing.assert_close(noise, 2**-20 * torch.tensor([[4.5, 5.0, 0.0]]))
    with pytest.raises(ConfigError, match="KL estimator"):
        kl_noise(LOG_PROBS, REF, MASK, "k9", torch.float32)
