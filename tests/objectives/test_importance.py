"""Truncated importance ratios and the effective sample size, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_advrm.errors import ConfigError
from nemo_advrm.objectives.importance import effective_share, log_ratios, mean_ratio, truncated_weights, weighted_mean

LOG2, LOG3 = math.log(2), math.log(3)
MASK = torch.tensor([[True, True, False], [True, False, False]])
OURS = torch.tensor([[-1.0, -2.0, float("nan")], [-3.0, float("inf"), 0.0]])
THEIRS = torch.tensor([[-1.0 - LOG3, -2.0 + LOG2, 7.0], [-3.0 + LOG3, float("nan"), 0.0]])


def test_ratios_are_of_each_token_or_of_its_response_and_padding_counts_for_nothing() -> None:
    of_tokens = torch.tensor([[LOG3, -LOG2, 0], [-LOG3, 0, 0]])
    torch.testing.assert_close(log_ratios(OURS, THEIRS, MASK, "token"), of_tokens)
    of_responses = torch.tensor([[LOG3 - LOG2, LOG3 - LOG2, 0], [-LOG3, 0, 0]])
    torch.testing.assert_close(log_ratios(OURS, THEIRS, MASK, "response"), of_responses)
    with pytest.raises(ConfigError, match="unit of importance ratios"):
        log_ratios(OURS, THEIRS, MASK, "sequence")


def test_weights_are_cut_above_and_not_below() -> None:
    logs = torch.tensor([LOG3, LOG2, 0.0, -LOG3, 1e4, -1e4])
    torch.testing.assert_close(truncated_weights(logs, 2.0), torch.tensor([2.0, 2.0, 1.0, 1 / 3, 2.0, 0.0]))


@pytest.mark.parametrize(
    ("ratios", "share"),
    [([1, 1, 1], 1), ([5, 5], 1), ([1, 3], 0.8), ([1, 0], 0.5), ([1, 2, 3, 4], 100 / 120), ([], 1)],
)
def test_the_effective_sample_size_is_kishs(ratios: list[float], share: float) -> None:
    assert effective_share(torch.tensor(ratios, dtype=torch.float32).log()) == pytest.approx(share)
    # no scale overflows
    assert effective_share(torch.tensor(ratios, dtype=torch.float32).log() + 900) == pytest.approx(share, rel=1e-3)


def test_the_mean_ratio_sees_what_all_ratios_have_in_common() -> None:
    assert mean_ratio(torch.tensor([1.0, 3.0, 0.5]).log()) == pytest.approx(1.5)
    equal = torch.full((64,), -9.2)
    assert effective_share(equal) == pytest.approx(1) and mean_ratio(equal) == pytest.approx(math.exp(-9.2))
    assert mean_ratio(torch.zeros(0)) == 1 and math.isfinite(mean_ratio(torch.tensor([900.0])))


def test_a_mean_under_the_trained_policy_is_that_of_the_ratios() -> None:
    assert weighted_mean(torch.tensor([1.0, 5.0]), torch.tensor([1.0, 3.0]).log()) == pytest.approx(4)
    assert weighted_mean(torch.tensor([1.0, 5.0]), torch.tensor([900.0, 900.0])) == pytest.approx(3)
    assert weighted_mean(torch.zeros(0), torch.zeros(0)) == 0
