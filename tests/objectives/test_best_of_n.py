"""The estimator of the best of n against all draws that there are, and against values computed by hand."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from nemo_advrm.errors import DataError
from nemo_advrm.objectives.best_of_n_curve import (
    best_of_n_curve,
    best_of_n_kl,
    best_of_n_measures,
    best_of_n_weights,
    curve_points,
    expected_best,
)


def test_weights_of_four_samples_are_those_of_all_draws() -> None:
    # 6 pairs of 4 ranks: the highest of a pair is rank 2 once, rank 3 twice, rank 4 three times
    assert best_of_n_weights(4, 2).tolist() == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6])
    assert best_of_n_weights(4, 1).tolist() == pytest.approx([0.25] * 4)
    assert best_of_n_weights(4, 4).tolist() == [0, 0, 0, 1]
    assert best_of_n_weights(1, 1).tolist() == [1]


@pytest.mark.parametrize("n", [1, 7, 128, 255, 256])
def test_weights_of_many_samples_are_exact(n: int) -> None:
    weights = best_of_n_weights(256, n)
    exact = [math.comb(rank - 1, n - 1) / math.comb(256, n) for rank in range(1, 257)]
    assert weights.tolist() == pytest.approx(exact, rel=1e-9, abs=1e-300)
    assert weights.sum().item() == pytest.approx(1)


def test_the_expectation_is_the_mean_over_all_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    proxy, gold = torch.randn(3, 6, generator=generator), torch.randn(3, 6, generator=generator)
    for n in range(1, 7):
        for row, value in zip(range(3), expected_best(proxy, gold, n).tolist(), strict=True):
            best = [max(draw, key=lambda i: proxy[row, i].item()) for draw in combinations(range(6), n)]
            assert value == pytest.approx(sum(gold[row, i].item() for i in best) / len(best), abs=1e-6)


def test_equal_proxies_are_equally_likely() -> None:
    # ranks 1 to 3 have one proxy; of 6 pairs rank 4 wins 3, the tied ones share the other 3, whose mean gold is 5
    proxy, gold = torch.tensor([[1.0, 2.0, 1.0, 1.0]]), torch.tensor([[3.0, 9.0, 5.0, 7.0]])
    assert expected_best(proxy, gold, 2).item() == pytest.approx((3 * 9 + 3 * 5) / 6)
    assert expected_best(proxy, gold, 4).item() == 9
    everything_tied = torch.zeros(1, 4)
    for n in range(1, 5):
        assert expected_best(everything_tied, gold, n).item() == pytest.approx(6)


def test_the_order_of_the_samples_does_not_matter() -> None:
    proxy, gold = torch.tensor([[0.0, 0.0, 3.0, 1.0, 0.0]]), torch.tensor([[1.0, 2.0, -4.0, 5.0, 0.0]])
    order = torch.tensor([3, 0, 4, 2, 1])
    for n in range(1, 6):
        assert expected_best(proxy, gold, n) == pytest.approx(expected_best(proxy[:, order], gold[:, order], n).item())


def test_a_curve_holds_means_over_prompts_against_kl() -> None:
    proxy = torch.tensor([[1.0, 2.0], [4.0, 3.0]])
    gold = torch.tensor([[0.0, -1.0], [2.0, 6.0]])
    curve = best_of_n_curve(proxy, gold)
    assert curve["n"] == [1, 2]
    assert curve["kl"] == pytest.approx([0.0, math.log(2) - 0.5])
    assert curve["proxy"] == pytest.approx([2.5, 3.0])
    assert curve["gold"] == pytest.approx([(-0.5 + 4) / 2, (-1 + 2) / 2])
    assert best_of_n_curve(proxy, None)["gold"] == [None, None]
    assert best_of_n_kl(256) == pytest.approx(5.545177 - 255 / 256, abs=1e-6)


def test_points_of_a_curve() -> None:
    assert curve_points(16) == [1, 2, 3, 4, 6, 8, 12, 16]
    assert curve_points(10) == [1, 2, 3, 4, 6, 8, 10]
    assert curve_points(1) == [1]


def test_measures_of_a_curve() -> None:
    # trapezia over 0..1 and 1..3: (1 + 3) / 2 + 2 (3 + 0) / 2 = 5, over a KL of 3
    found = best_of_n_measures([0.0, 1.0, 3.0], [1.0, 3.0, 0.0])
    assert found == {"start": 1.0, "area": pytest.approx(5 / 3), "final": 0.0, "peak": 3.0}
    assert best_of_n_measures([0.0], [2.0]) == {"start": 2.0, "area": 2.0, "final": 2.0, "peak": 2.0}
    assert set(best_of_n_measures([0.0, 1.0], [None, None]).values()) == {None}


@pytest.mark.parametrize(
    ("proxy", "gold", "n", "told"),
    [
        (torch.zeros(1, 2), torch.zeros(1, 2), 3, "best of 3 cannot be taken from 2"),
        (torch.zeros(1, 2), torch.zeros(1, 2), 0, "best of 0"),
        (torch.zeros(1, 2), torch.zeros(2, 1), 1, "every response"),
        (torch.zeros(0, 2), torch.zeros(0, 2), 1, "every response"),
        (torch.tensor([[0.0, math.nan]]), torch.zeros(1, 2), 1, "finite"),
    ],
)
def test_what_gives_no_estimate_is_refused(proxy: torch.Tensor, gold: torch.Tensor, n: int, told: str) -> None:
    with pytest.raises(DataError, match=told):
        expected_best(proxy, gold, n)
