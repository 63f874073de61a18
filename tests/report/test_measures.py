"""Measures of RLHF curves against values computed by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from nemo_advrm.report.measures import Options, gold_at_kl, measured_curve, measures_of


def measures(rows: list[dict[str, Any]], options: Options | None = None) -> dict[str, Any]:
    curve = measured_curve(rows)
    assert curve is not None
    return measures_of(curve, options or Options())


def _rollouts(gold: list[float]) -> list[dict[str, Any]]:
    return [{"step": step, "gold": value, "proxy": step / 10, "kl": 2.0 * step} for step, value in enumerate(gold)]


def test_measures_of_a_curve_of_every_step_are_plain_means() -> None:
    # 20 steps: the last tenth is two steps, the second half ten
    gold = [1.0] * 8 + [3.0, 5.0] + [2.0] * 5 + [0.0, 0.0, 0.0, -1.0, -2.0]
    found = measures(_rollouts(gold), Options(kl=17.0))
    assert found["source"] == "rollouts" and found["steps"] == 19
    assert found["start"] == 1.0
    assert found["area"] == pytest.approx((8 + 8 + 10 - 3) / 20)
    assert found["second_half"] == pytest.approx((10 - 3) / 10)
    assert found["final"] == pytest.approx(-1.5)
    assert found["peak"] == pytest.approx(4.0)
    # KL 17 lies half way between step 8 (16, gold 3) and step 9 (18, gold 5)
    assert found["gold_at_kl"] == pytest.approx(4.0)
    assert found["kl_final"] == 38.0 and found["proxy_start"] == 0.0 and found["proxy_final"] == 1.9
    # the mean of five falls below .9 for good when (2 + 2 + 0 + 0 + 0) / 5 = .8 is reached
    assert found["stable_steps"] == 17


def test_held_out_gold_counts_where_there_is_any_and_is_interpolated_between_evaluations() -> None:
    rows = _rollouts([9.0] * 8)
    for step, gold, kl in ((0, 1.0, 0.0), (4, 3.0, 8.0), (7, 0.0, 14.0)):
        rows[step] |= {"held_out/gold": gold, "held_out/proxy": 0.5, "held_out/kl": kl}
    found = measures(rows, Options(kl=2.0))
    assert found["source"] == "held_out"
    every_step = [1.0, 1.5, 2.0, 2.5, 3.0, 2.0, 1.0, 0.0]
    assert found["area"] == pytest.approx(sum(every_step) / 8)
    assert found["second_half"] == pytest.approx((3 + 2 + 1 + 0) / 4)
    assert found["final"] == 0.0 and found["peak"] == 3.0
    assert found["gold_at_kl"] == pytest.approx(1.5) and found["kl_final"] == 14.0


def test_evaluations_of_every_third_step_give_the_area_of_a_line() -> None:
    line = [2.0 - 0.25 * step for step in range(13)]
    whole = measures(_rollouts(line))
    sparse = measures([row for row in _rollouts(line) if row["step"] % 3 == 0])
    for name in ("area", "second_half", "final", "peak", "start"):
        assert sparse[name] == pytest.approx(whole[name])


def test_the_kl_that_is_asked_for_must_be_reached() -> None:
    kl, gold = np.array([0.0, 1.0, 4.0, 3.0, 6.0]), np.array([0.0, 2.0, 5.0, 7.0, -1.0])
    assert gold_at_kl(kl, gold, 2.0) == pytest.approx(2 + 3 / 3)
    assert gold_at_kl(kl, gold, 3.5) == pytest.approx(4.5)  # where it is reached first
    assert gold_at_kl(kl, gold, 6.0) == -1.0
    assert gold_at_kl(kl, gold, 6.1) is None
    assert gold_at_kl(kl + 1, gold, 0.5) is None  # the curve begins beyond it
    kl[1] = math.nan
    assert gold_at_kl(kl, gold, 2.0) == pytest.approx(2.5)


def test_a_run_without_gold_has_no_measures_of_it() -> None:
    rows = [{"step": step, "proxy": step, "kl": step} for step in range(3)]
    found = measures(rows)
    names = ("start", "area", "second_half", "final", "peak", "gold_at_kl", "stable_steps")
    assert all(found[name] is None for name in names)
    assert found["kl_final"] == 2 and found["proxy_final"] == 2


def test_gold_of_the_rollouts_is_better_than_none_of_held_out_prompts() -> None:
    rows = [{"step": step, "gold": 1.0, "proxy": 1.0, "kl": 0.0, "held_out/kl": 0.0} for step in range(2)]
    curve = measured_curve(rows)
    assert curve is not None and curve.source == "rollouts"


def test_a_step_that_was_done_again_counts_once() -> None:
    rows = _rollouts([1.0, 5.0]) + _rollouts([1.0, 3.0])[1:]
    assert measures(rows)["area"] == 2.0
