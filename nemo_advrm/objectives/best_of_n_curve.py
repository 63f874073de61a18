"""Best-of-n: the expected value of the best of n responses by a reward, from N samples per prompt, no resampling.

The policy that samples n responses and keeps the one with the highest reward has KL(best of n || policy) =
log n - (n - 1) / n nats (Gao, Schulman & Hilton 2022, arXiv 2210.10760; an upper bound where rewards tie).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_advrm.errors import DataError


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n, in nats per response."""
    return math.log(n) - (n - 1) / n


def curve_points(samples: int) -> list[int]:
    """The values of n of a curve: ``samples``, the powers of two up to it, and the numbers half way between these."""
    points = {1, samples}
    power = 2
    while power <= samples:
        points |= {power, power + power // 2}
        power *= 2
    return sorted(point for point in points if point <= samples)


def best_of_n_weights(samples: int, n: int) -> Tensor:
    """[N] fp64: for each rank, the probability that it is the best of n responses drawn without replacement from N.

    Ranks rise: the i-th lowest of N is the best of a draw if the other n - 1 are among the i - 1 below it, which holds
    in C(i - 1, n - 1) of C(N, n) draws. So the mean over all draws is unbiased for the best of n of the policy itself.
    Raises DataError unless 1 <= n <= N.
    """
    if not 1 <= n <= samples:
        raise DataError(f"the best of {n} cannot be taken from {samples} samples")
    # w_N = n / N, and one rank lower w_(i-1) = w_i (i - n) / (i - 1): factorials would overflow
    weights_N = torch.zeros(samples, dtype=torch.float64)
    weight = n / samples
    for rank in range(samples, n - 1, -1):
        weights_N[rank - 1] = weight
        if rank > 1:
            weight *= (rank - n) / (rank - 1)
    return weights_N


def expected_best(proxy_PN: Tensor, values_PN: Tensor, n: int) -> Tensor:
    """[P] fp64: the expected value of the response with the highest proxy among n.

    Args:
        proxy_PN, values_PN: of N responses to each of P prompts. Responses with equal proxies are equally likely to be
            taken, so each counts with the mean of their values.

    Raises DataError for other shapes, numbers that are not finite, and unless 1 <= n <= N.
    """
    if proxy_PN.shape != values_PN.shape or proxy_PN.dim() != 2 or not proxy_PN.numel():
        raise DataError(
            f"best-of-n needs a proxy and a value of every response, [P, N]: got {tuple(proxy_PN.shape)} and "
            f"{tuple(values_PN.shape)}"
        )
    proxy_PN, values_PN = proxy_PN.double(), values_PN.double()
    if not (proxy_PN.isfinite().all() and values_PN.isfinite().all()):
        raise DataError("best-of-n needs finite proxies and values")
    weights_N = best_of_n_weights(proxy_PN.size(1), n)
    expected = []
    for proxy_N, values_N in zip(proxy_PN, values_PN, strict=True):
        _, group_N, sizes_G = proxy_N.unique(return_inverse=True, return_counts=True)  # groups by rising proxy
        means_G = torch.zeros(len(sizes_G), dtype=torch.float64).index_add_(0, group_N, values_N) / sizes_G
        expected.append(weights_N @ means_G.repeat_interleave(sizes_G))
    return torch.stack(expected)


def best_of_n_curve(proxy_PN: Tensor, gold_PN: Tensor | None) -> dict[str, list[Any]]:
    """Expected proxy and gold of the best of n by the proxy, the mean over prompts, for rising n.

    Returns:
        n, kl (nats per response), proxy and gold, lists of one length; gold holds None without ``gold_PN``.
    """
    points = curve_points(proxy_PN.size(1))
    proxy = [expected_best(proxy_PN, proxy_PN, n).mean().item() for n in points]
    gold: list[float | None] = [None] * len(points)
    if gold_PN is not None:
        gold = [expected_best(proxy_PN, gold_PN, n).mean().item() for n in points]
    return {"n": points, "kl": [best_of_n_kl(n) for n in points], "proxy": proxy, "gold": gold}


def best_of_n_measures(kl: Sequence[float], gold: Sequence[float | None]) -> dict[str, float | None]:
    """The measures of a curve; all None without gold.

    Returns:
        start: gold of one response. area: mean gold over the KL from 0 to that of the largest n, by the trapezoidal
        rule. So the difference of two areas is the area between the curves over that KL. final: gold at the largest n.
        peak: the highest gold.
    """
    known = [value for value in gold if value is not None]
    if not known or len(known) < len(gold):
        return dict.fromkeys(("start", "area", "final", "peak"))
    area = known[0]
    if len(known) > 1:
        area = float(torch.trapezoid(_double(known), _double(kl))) / (kl[-1] - kl[0])
    return {"start": known[0], "area": area, "final": known[-1], "peak": max(known)}


def _double(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
