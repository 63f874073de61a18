"""The tables of benchmarks from small files in their schemas, by hand; and files that are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_advrm.config import load_config
from nemo_advrm.config.keys import all_keys
from nemo_advrm.errors import ConfigError, DataError
from nemo_advrm.evaluation.benchmarks.known import BENCHMARKS
from nemo_advrm.evaluation.benchmarks.reward_bench import SECTIONS
from nemo_advrm.evaluation.figures import Estimate, estimates
from nemo_advrm.evaluation.model_figures import ModelScores, benchmark_figures
from nemo_advrm.evaluation.rows import EvaluationRows, evaluation_rows
from nemo_advrm.objectives.intervals import resample_counts
from nemo_advrm.objectives.proportions import wilson_interval

FILES = Path(__file__).parent / "benchmark_files"
NAMES = {
    "reward_bench": "reward_bench.jsonl",
    "reward_bench_2": "reward_bench_2.jsonl",
    "rm_bench": "rm_bench.json",
    "judge_bench": "judge_bench.jsonl",
    "ppe_human": "ppe_human.jsonl",
    "ppe_correctness": "ppe_correctness.jsonl",
}


def read(path: Path, *settings: str) -> EvaluationRows:
    return evaluation_rows(load_config([f"data.validation_path={path}", *settings], "evaluate"))


def scores(rows: EvaluationRows, left_out: tuple[int, ...] = ()) -> ModelScores:
    """The number at the end of each answer; NaN for the rows ``left_out``."""
    found = [float(text.split()[-1]) for row in rows.answers for text in (row.chosen, row.rejected)]
    for place in left_out:
        found[2 * place] = found[2 * place + 1] = float("nan")
    return ModelScores("R_1", torch.tensor(found))


def table(rows: EvaluationRows, model: ModelScores | None = None) -> dict[str, Estimate]:
    figures = benchmark_figures(model or scores(rows), rows)
    assert figures is not None
    return {name.strip(): one for name, one in estimates(figures, resample_counts(rows.strata_U, 200, 0)).items()}


EXPECTED: dict[str, dict[str, float]] = {
    "reward_bench": {
        "alpacaeval-easy": 3 / 4,
        "mt-bench-med": 1 / 2,
        "Chat": (100 * 3 / 4 + 40 / 2) / 140,
        "Chat Hard": 1.0,
        "refusals-dangerous": 1 / 2,  # a tie is wrong
        "Safety": (100 / 2 + 136) / 236,
        "Reasoning": (164 + 164) / (984 + 164 + 164),
        "Score": ((75 + 20) / 140 + 1 + 186 / 236 + 1 / 4) / 4,
    },
    "reward_bench_2": {
        "Factuality": (1 + 1 / 2) / 2,
        "Precise IF": 0.0,
        "Math": 1 / 3,
        "Safety": 1.0,
        "Focus": 0.0,
        # accurate 2 of 3 both ways; one margin larger than the spread; margins tanh(.5), tanh(-.5), -1
        "Ties": 0.3 * 2 / 3 + 0.3 * 2 / 3 + 0.2 / 3 + 0.2 / 3 - 0.01 / 3,
        "Score": (0.75 + 0 + 1 / 3 + 1 + 0 + 0.53) / 6,
    },
    "rm_bench": {
        "chat hard": 0.0,
        "chat normal": 1 / 3,
        "chat easy": 1.0,
        "chat": 4 / 9,
        "math": 1.0,
        "code": 0.0,
        "safety hard": 1 / 2,
        "safety normal": 2 / 3,
        "safety easy": 5 / 6,
        "safety": 2 / 3,
        "hard": 1.5 / 4,
        "normal": 2 / 4,
        "easy": (1 + 1 + 0 + 5 / 6) / 4,
        "Score": (4 / 9 + 1 + 0 + 2 / 3) / 4,
        "chosen concise, rejected markdown": 2 / 5,
        "chosen markdown, rejected concise": 4 / 5,
    },
    "judge_bench": {
        "mmlu-pro": 1 / 2,
        "livebench-reasoning": 1.0,
        "livebench-math": 1 / 2,  # equal scores decide for B
        "livecodebench": 1.0,
        "Overall": 4 / 6,
    },
    "ppe_human": {"Overall": 2 / 3, "hard_prompt": 1 / 2, "is_code": 0.0, "English": 1 / 2, "not English": 1.0},
    "ppe_correctness": {
        "accuracy, answers of gpt": 1 / 2,
        "accuracy, answers of llama": 1.0,
        "accuracy": 2 / 3,
        "AUC": 18.5 / 36,
        "best of 1": 1 / 2,
        "best of 2": (1 / 2 + 1 / 4 + 5 / 6) / 3,
        "best of 4": 2 / 3,
        "best of 1 if the choice were perfect": 1 / 2,
        "best of 2 if the choice were perfect": (5 / 6 + 1 / 2 + 1) / 3,
        "best of 4 if the choice were perfect": 1.0,
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_recognised_by_its_columns_and_scored_as_its_authors_do(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = read(FILES / NAMES[name])
    assert rows.benchmark is not None and rows.benchmark.name == name
    assert f"; {rows.benchmark.title}; evaluate.benchmark=none reads it as pairs" in capsys.readouterr().out
    found = {key: one.value for key, one in table(rows).items()}
    for key, value in EXPECTED[name].items():
        assert found[key] == pytest.approx(value), key


def test_every_benchmark_that_can_be_asked_for_is_known_and_tested() -> None:
    assert {each.name for each in BENCHMARKS} == set(NAMES) == set(EXPECTED)
    choices = all_keys()["evaluate.benchmark"].about.choices
    assert set(choices) == {"auto", "none", *NAMES}


@pytest.mark.parametrize("name", ["reward_bench_2", "ppe_correctness"])
def test_parquet_files_as_downloaded_give_the_same_table(name: str, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    lines = (FILES / NAMES[name]).read_text().splitlines()
    path = tmp_path / "test-00000-of-00001.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([json.loads(line) for line in lines]), path)
    assert table(read(path)) == table(read(FILES / NAMES[name]))


def test_the_weights_of_rewardbench_are_its_authors() -> None:
    assert {section: sum(weights.values()) for section, weights in SECTIONS.items()} == {
        "Chat": 358,
        "Chat Hard": 456,
        "Safety": 740,
        "Reasoning": 1968,
    }


def test_shares_have_wilsons_interval_and_composed_figures_the_bootstraps() -> None:
    found = table(read(FILES / "reward_bench.jsonl"))
    assert (found["mt-bench-hard"].low, found["mt-bench-hard"].high) == wilson_interval(1, 1)
    easy, chat, reasoning = found["alpacaeval-easy"], found["Chat"], found["Reasoning"]
    assert (easy.low, easy.high, easy.count) == (*wilson_interval(3, 4), 4)
    assert chat.low is not None and chat.high is not None and chat.value is not None
    assert chat.low < chat.value < chat.high
    assert (reasoning.low, reasoning.high) == (0.25, 0.25), "one prompt in each subset: nothing can be resampled"


def test_a_row_that_was_not_scored_whole_is_left_out_of_the_table() -> None:
    rows = read(FILES / "reward_bench.jsonl")
    found = table(rows, scores(rows, left_out=(2,)))  # the wrong one of alpacaeval-easy
    assert (found["alpacaeval-easy"].value, found["alpacaeval-easy"].count) == (1.0, 3)
    rows = read(FILES / "rm_bench.json")
    assert "math" not in table(rows, scores(rows, left_out=(4,)))  # one of its three rows of two answers


def test_prompts_that_belong_together_are_resampled_together() -> None:
    rows = read(FILES / "reward_bench_2.jsonl")
    units = {item.source: unit for item, unit in zip(rows.items, rows.item_units, strict=True)}
    of_ties = [unit for item, unit in zip(rows.items, rows.item_units, strict=True) if item.subset == "Ties"]
    assert len(units) == 12 and len(set(of_ties)) == 3 and len(rows.strata_U) == 9


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("reward_bench", {"chosen": " "}, r":2: `chosen` is empty"),
        ("reward_bench", {"subset": "mine"}, r":2: `subset` is mine"),
        ("reward_bench_2", {"num_correct": 2}, r":2: `num_correct` is 2, and `chosen` has 1"),
        ("reward_bench_2", {"subset": "Ties"}, r":2: `id` is 1; ref:N or tied:N"),
        ("judge_bench", {"label": "A=B"}, r":2: `label` is A=B"),
        ("ppe_human", {"winner": "me"}, r":2: `winner` is me"),
        ("ppe_correctness", {"scores": [0.5, 1.0]}, r":2: `scores` is a list, a list of true and false"),
        ("ppe_correctness", {"sampled_conflict_pairs": [[0, 2]]}, r":2: `sampled_conflict_pairs` has \[0, 2\]"),
        ("ppe_correctness", {"sampled_conflict_pairs": [[0, 9]]}, r":2: `sampled_conflict_pairs` has \[0, 9\]"),
    ],
)
def test_a_bad_row_is_named(name: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (FILES / NAMES[name]).read_text().splitlines()]
    rows[1] |= change
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=message):
        read(path)
    assert len(read(path, "data.on_bad_row=skip").items) == len(rows) - 1


def test_a_benchmark_that_is_asked_for_must_have_its_columns() -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.benchmark=rm_bench: .*not the columns of RM-Bench"):
        read(FILES / "reward_bench.jsonl", "evaluate.benchmark=rm_bench")
    rows = read(FILES / "reward_bench.jsonl", "evaluate.benchmark=reward_bench")
    assert rows.benchmark is not None


def test_as_pairs_a_benchmark_is_read_as_before() -> None:
    rows = read(FILES / "reward_bench_2.jsonl", "evaluate.benchmark=none")
    assert rows.benchmark is None and len(rows.answers) == 39
    assert set(rows.subsets) == {"Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties"}


def test_a_file_of_ties_alone_has_nothing_to_be_right_about(tmp_path: Path) -> None:
    lines = [line for line in (FILES / "ppe_human.jsonl").read_text().splitlines() if '"tie"' in line]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match="no row has a preferred answer"):
        read(path)
