"""The distribution that tokens are picked from, against probabilities computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_advrm.engine.sampling import Sampling, pick

LOGITS = [math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]


def _shares(sampling: Sampling, logits: list[float] = LOGITS, numbers: int = 10_000) -> list[float]:
    """Share of each token over evenly spread uniforms, exact to 1 / numbers."""
    uniforms = (torch.arange(numbers, dtype=torch.float64) / numbers).float()
    picked = pick(torch.tensor(logits).expand(numbers, -1), uniforms, sampling)
    return [count / numbers for count in torch.bincount(picked, minlength=len(logits)).tolist()]


def _sampling(**options: float) -> Sampling:
    return Sampling(1, (0,), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        # p^2 / sum p^2 = {.01, .16, .04, .09} / .3
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 100}, [0.1, 0.4, 0.2, 0.3]),
        # .4 + .3 = .7 reaches .6
        ({"top_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.71}, [0, 4 / 9, 2 / 9, 3 / 9]),
        # the likeliest token stays, however small top_p is
        ({"top_p": 1e-6}, [0, 1, 0, 0]),
        # top-k first, then top-p of what is left: {4/9, 3/9, 2/9}, of which 4/9 < .5 <= 7/9
        ({"top_k": 3, "top_p": 0.5}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperature": 0}, [0, 1, 0, 0]),
    ],
)
def test_tokens_have_the_probabilities_computed_by_hand(options: dict[str, float], shares: list[float]) -> None:
    assert _shares(_sampling(**options)) == pytest.approx(shares, abs=3e-4)


def test_one_number_decides_one_token_whatever_the_other_rows_are() -> None:
    torch.manual_seed(0)
    logits, uniforms = torch.randn(40, 17), torch.rand(40)
    sampling = _sampling(temperature=0.7, top_k=9, top_p=0.8)
    together = pick(logits, uniforms, sampling)
    assert together.tolist() == [pick(logits[i : i + 1], uniforms[i : i + 1], sampling).item() for i in range(40)]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}, {"temperature": 50.0}])
def test_a_hidden_token_never_appears_even_at_the_ends_of_the_interval(
    uniform: float, options: dict[str, float]
) -> None:
    logits = torch.full((1, 8), -1e9)
    logits[0, 2:4] = 0.0
    assert pick(logits, torch.tensor([uniform]), _sampling(**options)).item() in (2, 3)


@pytest.mark.parametrize("uniform", [0.3, 1 - 2**-24])
def test_the_last_token_of_an_interval_is_the_last_with_a_probability(uniform: float) -> None:
    # token 6 adds nothing to the sum in fp32, but has a probability; those after it have none
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0, -1e9, 0.0, -40.0, -1e9, -1e9]])
    probs = torch.softmax(logits, -1)
    last = int((probs > 0).nonzero()[-1, 1])
    assert last == 6
    cumulative = probs.cumsum(-1)
    expected = min(int((cumulative <= uniform * cumulative[:, -1]).sum()), last)
    assert pick(logits, torch.tensor([uniform]), _sampling()).item() == expected
