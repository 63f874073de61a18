"""Thresholds, shares and alarms by hand, and the stated rate of false alarms on fresh draws."""

from __future__ import annotations

import pytest
import torch

from nemo_advrm.objectives.detection import alarm_step, alarm_threshold, share_beyond


@pytest.mark.parametrize(
    ("rate", "value", "stated"), [(0.1, 9.0, 0.1), (0.2, 8.0, 0.2), (0.5, 5.0, 0.5), (0.15, 9.0, 0.1), (0.01, 9.0, 0.1)]
)
def test_the_threshold_is_a_rank_by_hand(rate: float, value: float, stated: float) -> None:
    found = alarm_threshold(torch.tensor([3.0, 1, 2, 9, 8, 7, 4, 5, 6]), rate)  # nine scores: ranks are tenths
    assert found.value == value and found.false_alarm_rate == pytest.approx(stated)


def test_fresh_scores_of_any_distribution_exceed_it_at_the_stated_rate() -> None:
    draw = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(400):
        sample, fresh = torch.rand(2, 199, generator=draw).log().neg()
        shares.append(share_beyond(fresh, alarm_threshold(sample, 0.05).value))
    assert sum(shares) / len(shares) == pytest.approx(0.05, abs=0.0033)  # 3 standard errors


def test_a_score_at_the_threshold_is_not_beyond_it() -> None:
    assert share_beyond(torch.tensor([1.0, 2.0, 3.0, 4.0]), 3.0) == 0.25


def test_the_alarm_needs_a_whole_window_by_hand() -> None:
    steps, shares = [0, 2, 4, 6, 8, 10], [1.0, 0.0, 0.0, 0.3, 0.0, 0.4]
    assert alarm_step(steps, shares, 0.3, window=3) == 4  # (1 + 0 + 0) / 3
    assert alarm_step(steps[1:], shares[1:], 0.2, window=3) == 10  # 0.1, then 0.1, then 0.7 / 3
    assert alarm_step(steps, shares, 0.5, window=3) is None
    assert alarm_step(steps[:2], shares[:2], 0.0, window=3) is None
