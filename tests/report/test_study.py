"""A study's lines: written, read back, joined, and the tables that docs are made of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_advrm.errors import DataError
from nemo_advrm.report.study import Line, against_baseline, arms, join, missed_gates, read, write_line
from nemo_advrm.report.study_tables import render_main_arms, render_study


def _line(arm: str, seed: int, rlhf_seed: int, area: float, **more: Any) -> Line:
    measures = {"area": area, "final": area - 1, "start": 0.5, "stable_steps": 7 if area < 0 else None}
    baseline = "" if arm == "plain" else "plain"
    return Line("study", "rlhf", seed, arm, rlhf_seed, 0.02, baseline, measures, **more)


def _study() -> list[Line]:
    plain = {(0, 1): 0.0, (0, 2): 2.0, (1, 1): 1.0, (1, 2): 1.0, (2, 1): -1.0, (2, 2): -1.0}
    hardened = {key: value + 1 + 0.25 * key[0] for key, value in plain.items()}
    lines = [_line("plain", *key, value, cpu_seconds=10.0, flops=1e12) for key, value in plain.items()]
    origin = {"cpu_seconds": 20.0, "commit": "abc", "hardware": "2 cores"}
    lines += [_line("adv_rm", *key, value, **origin) for key, value in hardened.items()]
    lines.append(Line("study", "gates", 0, measures={"accuracy/1": 0.87, "met": True}))
    lines.append(Line("study", "gates", 2, measures={"accuracy/1": 0.81, "met": False}))
    return lines


def test_lines_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "results" / "study.jsonl"
    for line in _study():
        write_line(path, line)
    assert read(path) == _study()
    with path.open("a") as file:
        file.write('{"experiment": "st')  # a kill tore a line
    write_line(path, _line("plain", 9, 1, 4.0))
    assert read(path) == [*_study(), _line("plain", 9, 1, 4.0)]


def test_a_run_that_was_done_again_counts_once() -> None:
    first, again = _line("plain", 0, 1, 1.0), _line("plain", 0, 1, 2.0)
    other = replace(first, experiment="other")
    assert join([[first, other], [again]]) == [again, other]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": -1}, "seed=-1: input should be greater than or equal to 0"),
        ({"seed": True}, "seed=true: input should be a valid integer"),
        ({"kind": "sft"}, "kind=\"sft\": input should be 'rlhf', 'best_of_n', 'gates' or 'attacks'"),
        ({"kl": "much"}, 'kl="much": input should be a valid number'),
        ({"kl": -0.1}, "kl=-0.1: input should be greater than or equal to 0"),
        ({"measures": [1]}, r"measures=\[1\]: input should be a valid dictionary"),
        ({"measures": {"area": [1]}}, r"measures.area=\[1\]: value error, a measure is a number, a text or null"),
        ({"area": 1}, "area=1: unexpected keyword argument"),
        ({"experiment": 5}, "experiment=5: input should be a valid string"),
        ({"experiment": ""}, 'experiment="": string should have at least 1 character'),
        ({"arm": ""}, "it lacks arm"),
    ],
)
def test_what_is_no_line_of_a_study_is_named(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    row = {"experiment": "study", "kind": "rlhf", "seed": 0, "arm": "plain"}
    path = tmp_path / "study.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | change) + "\n")
    with pytest.raises(DataError, match=rf"study\.jsonl:2: no line of a study \({told}"):
        read(path)


@pytest.mark.parametrize(("row", "told"), [({"seed": 1}, "it lacks experiment"), ([], r"\[\]: input should be")])
def test_a_row_without_the_keys_of_a_line_is_named(tmp_path: Path, row: Any, told: str) -> None:
    path = tmp_path / "study.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=rf"study\.jsonl:1: no line of a study \({told}"):
        read(path)


def test_an_arm_is_compared_with_its_baseline_by_seed() -> None:
    found = arms(_study(), "study", "rlhf")
    assert list(found) == ["plain", "adv_rm"]
    assert found["plain"].seeds == [0, 1, 2]
    assert found["plain"].mean("area").mean == pytest.approx((1 + 1 - 1) / 3)  # type: ignore[union-attr]
    assert against_baseline(found, "plain", "area") is None
    comparison = against_baseline(found, "adv_rm", "area")
    assert comparison is not None and comparison.differences == [1.0, 1.25, 1.5]
    assert against_baseline(found, "adv_rm", "gold_at_kl") is None  # no run has reached it


def test_tables_hold_every_arm_with_intervals_and_mark_seeds_that_miss_a_gate() -> None:
    lines = _study()
    text = render_study(lines)
    # mean 1.25, standard deviation .25, t of 2 degrees of freedom 4.30265: 1.25 -+ .621
    assert "+1.25 [0.63, 1.87]" in text
    assert "| Hardened reward model (Adv-RM) | 0.02 | 3 x 2 | 1.58 |" in text
    assert "3 of 3 seeds higher): better, in so few seeds that the interval may exclude 0 by luck." in text
    assert missed_gates(lines, "study") == [2]
    assert "Seeds that miss a gate, and stay in all tables: 2." in text
    assert "plain: gold fell below its start for good in 2 of 6 runs, at step 7;" in text
    assert "commit abc" in text and "hardware: 2 cores" in text


def test_a_figure_that_not_all_seeds_have_says_how_many_do() -> None:
    reached = {("plain", 0, 1): 1.0, ("plain", 1, 2): 2.0, ("adv_rm", 0, 1): 3.0, ("adv_rm", 1, 1): 9.0}
    lines = []
    for line in _study():
        value = reached.get((line.arm, line.seed, line.rlhf_seed or 0))
        lines.append(replace(line, measures={**line.measures, "gold_at_kl": value}) if line.arm else line)
    text = render_study(lines)
    assert "| plain | 0.02 | 3 x 2 | 0.33 | – | -0.67 | – | 1.50 (2 of 3 seeds) |" in text
    # the seed that both have, in the same RLHF run
    difference = next(row for row in text.splitlines() if row.startswith("| Hardened reward model (Adv-RM) − plain"))
    assert difference.endswith("| +2.00 (1 of 3 seeds) |")
    assert "(3 of 3 seeds)" not in text


def test_the_short_table_holds_the_main_arms_at_both_penalties() -> None:
    areas = {"r1": 0.0, "adv_rm": 2.0, "steps": 0.5, "r1_kl": 2.0, "adv_rm_kl": 3.0, "hybrid_kl": 2.5}
    lines = [
        Line("study", "rlhf", seed, arm, 1, 2.5 if arm.endswith("_kl") else 0.03, base, {"area": area + 0.5 * seed})
        for arm, area in areas.items()
        for base in ["" if arm in ("r1", "r1_kl") else "r1_kl" if arm.endswith("_kl") else "r1"]
        for seed in range(2 if arm == "hybrid_kl" else 3)
    ]
    gain = "[{0}, {0}], higher in 3 of 3 seeds"
    titles, *rows = render_main_arms(lines).splitlines()
    assert titles.startswith("| reward | KL coefficient 0.03: a stress test, ")
    assert "| KL coefficient 2.5: the best for plain RLHF of seven tried " in titles
    assert rows == [
        "| --- | ---: | ---: |",
        "| plain RM | 0.50 | 2.50 |",
        "| hardened RM | 2.50 | 3.50 |",
        f"| hardened less plain | +2.00 {gain.format('2.00')} | +1.00 {gain.format('1.00')} |",
        "| the same steps without adversarial pairs | 1.00 | – |",
        "| hybrid RM | – | 2.75 (2 of 3 seeds) |",
    ]
    assert render_main_arms([]) == ""


@pytest.mark.parametrize(("count", "told"), [(5, "by luck."), (6, "better, beyond chance.")])
def test_a_difference_is_beyond_chance_from_six_seeds(count: int, told: str) -> None:
    lines = [
        _line(arm, seed, 1, seed + gain) for arm, gain in (("plain", 0.0), ("adv_rm", 1.0)) for seed in range(count)
    ]
    assert told in render_study(lines)


def test_a_difference_that_may_be_chance_is_called_so() -> None:
    noisy = {0: 1.0, 1: -1.2, 2: 0.8}
    lines = [_line("plain", seed, 1, 0.0) for seed in noisy]
    lines += [_line("adv_rm", seed, 1, value) for seed, value in noisy.items()]
    assert "the interval includes 0, so this does not show a difference" in render_study(lines)
    one = [line for line in lines if line.seed == 1]
    assert "1.20 lower than with plain in the one seed that was run" in render_study(one)
    assert render_study([]) == ""
