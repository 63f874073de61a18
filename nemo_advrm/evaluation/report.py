"""The report of an evaluation: its tables as text, and all of it as JSON in ``run_dir/evaluation.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_advrm import files
from nemo_advrm.config.schema import Config
from nemo_advrm.errors import ConfigError
from nemo_advrm.evaluation.figures import Estimate, differences, estimates
from nemo_advrm.evaluation.model_figures import ModelScores, benchmark_figures, pair_figures
from nemo_advrm.evaluation.rows import EvaluationRows, sampling_seed
from nemo_advrm.objectives.calibration import BINS, reliability
from nemo_advrm.objectives.intervals import resample_counts

FILE = "evaluation.json"
ABSENT = "–"

Estimates = Mapping[str, Estimate]


@dataclass(frozen=True)
class ModelReport:
    """Figures of one model: of the pairs, of a benchmark's table (None for other rows), and its calibration by bin."""

    name: str
    pairs: int
    figures: Estimates
    table: Estimates | None
    calibration: list[dict[str, float]]


@dataclass(frozen=True)
class Comparison:
    """Figures of a model less those of the baseline, on the pairs that both scored."""

    name: str
    baseline: str
    pairs: int
    figures: Estimates
    table: Estimates | None


@dataclass(frozen=True)
class Report:
    """All figures of an evaluation."""

    rows: EvaluationRows
    models: list[ModelReport]
    comparisons: list[Comparison]


def evaluate(models: Sequence[ModelScores], rows: EvaluationRows, cfg: Config) -> Report:
    """Computes all figures with their intervals; with ``evaluate.compare`` also those of every model less the first."""
    samples_BU = resample_counts(rows.strata_U, cfg.evaluate.draws, sampling_seed(cfg))
    reports = [_model(model, rows, samples_BU) for model in models]
    others = models[1:] if cfg.evaluate.compare else ()
    return Report(rows, reports, [_comparison(models[0], other, rows, samples_BU) for other in others])


def _model(model: ModelScores, rows: EvaluationRows, samples_BU: Tensor) -> ModelReport:
    table = benchmark_figures(model, rows)
    better_N, worse_N = model.pair_scores(rows).chunk(2)
    bins = zip(*(values.tolist() for values in reliability(better_N - worse_N)), strict=True)
    calibration = [
        {
            "from": 0.5 + i / (2 * BINS),
            "to": 0.5 + (i + 1) / (2 * BINS),
            "pairs": pairs,
            "confidence": mean,
            "accuracy": right,
        }
        for i, (pairs, mean, right) in enumerate(bins)
        if pairs
    ]
    return ModelReport(
        model.name,
        len(better_N),
        estimates(pair_figures(model, rows), samples_BU),
        None if table is None else estimates(table, samples_BU),
        calibration,
    )


def _comparison(baseline: ModelScores, model: ModelScores, rows: EvaluationRows, samples_BU: Tensor) -> Comparison:
    before, after = baseline.restricted_to(model), model.restricted_to(baseline)
    first, second = benchmark_figures(before, rows), benchmark_figures(after, rows)
    return Comparison(
        model.name,
        baseline.name,
        len(before.kept_pairs(rows)),
        differences(pair_figures(before, rows), pair_figures(after, rows), samples_BU),
        None if first is None or second is None else differences(first, second, samples_BU),
    )


def lines(report: Report) -> list[str]:
    """Returns the printed tables: figures of every data set, those of a benchmark, the calibration of each model."""
    told = ["", *_table("figures of all pairs, with 95 % intervals", report, "figures", "pairs")]
    if report.rows.benchmark is not None:
        told += ["", *_table(f"{report.rows.benchmark.title}, as its authors compute it", report, "table", "rows")]
    for model in report.models:
        told += [
            "",
            f"calibration of {_short(model.name)}: how often it is right at each confidence, sigmoid(|margin|)",
        ]
        cells = [["confidence", "pairs", "mean", "accuracy"]]
        for of_bin in model.calibration:
            interval = f"{of_bin['from']:.2f} to {of_bin['to']:.2f}"
            values = f"{of_bin['pairs']:.0f}", f"{of_bin['confidence']:.3f}", f"{of_bin['accuracy']:.3f}"
            cells.append([interval, *values])
        told += _aligned(cells)
    for one in report.comparisons:
        fewest = min(model.pairs for model in report.models if model.name in (one.name, one.baseline))
        if one.pairs < fewest:
            told.append(
                f"{_short(one.name)} and {_short(one.baseline)} are compared on the {one.pairs} pairs both scored"
            )
    return told


def _table(title: str, report: Report, part: str, unit: str) -> list[str]:
    """Returns the lines of one table: a row for each figure, a column for each model and each difference."""
    models = [(model, getattr(model, part)) for model in report.models]
    compared = [(one, getattr(one, part)) for one in report.comparisons]
    names = list(dict.fromkeys(name for _, found in (*models, *compared) for name in found or ()))
    cells = [[title, *(_short(model.name) for model, _ in models), unit]]
    cells[0] += [f"{_short(one.name)} less {_short(one.baseline)}" for one, _ in compared]
    for name in names:
        row = [name, *(_figure((found or {}).get(name)) for _, found in models)]
        count = next((found[name].count for _, found in models if found and name in found), None)
        row += ["" if count is None else str(count)]
        cells.append(row + [_figure((found or {}).get(name), sign="+") for _, found in compared])
    return _aligned(cells)


def _figure(estimate: Estimate | None, sign: str = "") -> str:
    if estimate is None or estimate.value is None:
        return ABSENT
    text = f"{estimate.value:{sign}.4f}"
    return text if estimate.low is None else f"{text} [{estimate.low:.4f}, {estimate.high:.4f}]"


def _aligned(cells: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    told = []
    for row in cells:
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        told.append("  ".join([row[0].ljust(widths[0]), *rest]).rstrip())
    return told


def _short(name: str) -> str:
    """Returns R_1 of "R_1 (runs/rm/model)"."""
    return name.partition(" (")[0]


def write(report: Report, cfg: Config, path: str) -> Path:
    """Writes ``run_dir/evaluation.json`` in place of an earlier one, and returns its path. Raises ConfigError."""
    rows = report.rows
    found: dict[str, Any] = {
        "data": path,
        "benchmark": None if rows.benchmark is None else rows.benchmark.name,
        "prompts": len(rows.strata_U),
        "draws": cfg.evaluate.draws,
        "seed": cfg.seed,
        "models": [
            {**vars(model), "figures": _plain(model.figures), "table": _plain(model.table)} for model in report.models
        ],
        "comparisons": [
            {**vars(one), "figures": _plain(one.figures), "table": _plain(one.table)} for one in report.comparisons
        ],
    }
    target = Path(cfg.run_dir) / FILE
    try:
        files.write_text(target, json.dumps(found, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise ConfigError(f"run_dir={cfg.run_dir}: {FILE} cannot be written there: {error.strerror or error}") from None
    return target


def _plain(found: Estimates | None) -> dict[str, Any] | None:
    return None if found is None else {name.strip(): asdict(estimate) for name, estimate in found.items()}
