"""What an evaluation scores: answers to prompts, from a file of preference pairs or of a benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_advrm.config.schema import Config
from nemo_advrm.data import inputs
from nemo_advrm.data.columns import Columns
from nemo_advrm.data.jsonl import BadRow
from nemo_advrm.data.loading import each_row, load_rows
from nemo_advrm.data.messages import prompt_key
from nemo_advrm.data.preference_files import Rows, open_rows
from nemo_advrm.data.preference_rows import PreferencePair
from nemo_advrm.errors import ConfigError, DataError
from nemo_advrm.evaluation.benchmarks.base import Benchmark, Item
from nemo_advrm.evaluation.benchmarks.known import benchmark_of
from nemo_advrm.seeds import derive_seed

# columns that name the part of a data set that a row belongs to
SUBSET_COLUMNS = ("subset", "domain", "category")
# values that such a column may have unless evaluate.subset_column names it
MAX_SUBSETS = 50


@dataclass(frozen=True)
class EvaluationRows:
    """Answers to score, two in a row, and the pairs that are compared. A = 2 P answers of P rows, N pairs, U prompts.

    Attributes:
        answers: the rows to score. Answer 2 p is ``chosen`` of row p, answer 2 p + 1 its ``rejected``. A row of a
            benchmark with several answers fills several of them; of an odd number the first one stands there twice.
        pairs_N2: the preferred answer and the other one of each pair.
        sources: file:line of each pair.
        units_N: number of the prompt of each pair: pairs of one prompt are resampled together.
        subsets: subset of each pair, "" without one.
        strata_U: number of the part of a benchmark that each prompt belongs to; 0 for pairs.
        to_mismatch: pairs of which the rejected answer is replaced by the answer to another prompt.
        benchmark, items, item_answers, item_units: the rows of a benchmark, their answers and their units.
    """

    answers: list[PreferencePair]
    pairs_N2: Tensor
    sources: list[str]
    units_N: Tensor
    subsets: list[str]
    strata_U: Tensor
    to_mismatch: list[PreferencePair]
    unit_of_prompt: dict[str, int]
    benchmark: Benchmark | None = None
    items: tuple[Item, ...] = ()
    item_answers: tuple[tuple[int, ...], ...] = ()
    item_units: tuple[int, ...] = ()


def evaluation_rows(cfg: Config) -> EvaluationRows:
    """Read ``data.validation_path`` (or ``data.train_path``): a benchmark that is recognised, else preference pairs.

    Prints one line about the file. Raises DataError as the readers do, and ConfigError when ``evaluate.benchmark``
    names a benchmark whose columns the file does not have.
    """
    path, options = inputs.evaluation_file(cfg)
    benchmark = _recognised(cfg, path, options)
    if benchmark is None:
        return _of_pairs(inputs.evaluation_pairs(cfg), _subsets(cfg, path, options))
    report = load_rows(path, _parser(benchmark), on_bad_row=cfg.data.on_bad_row, **options)
    told = "" if cfg.evaluate.benchmark != "auto" else "; evaluate.benchmark=none reads it as pairs"
    inputs.print_line(f"{report.summary()}; {benchmark.title}{told}")
    if not any(item.pairs for item in report.rows):
        raise DataError(f"{report.path}: no row has a preferred answer: there is nothing to be right about")
    return _of_items(benchmark, list(report.rows))


def _recognised(cfg: Config, path: str, options: dict[str, Any]) -> Benchmark | None:
    wanted = cfg.evaluate.benchmark
    if wanted == "none" or (wanted == "auto" and cfg.data.format != "auto"):
        return None
    opened = open_rows(path, **options)
    first = next((row for _, row in opened.rows if isinstance(row, dict)), None)
    benchmark = benchmark_of(first, wanted)
    if wanted != "auto" and benchmark is not None and not (first and benchmark.matches(first)):
        raise ConfigError(
            f"evaluate.benchmark={wanted}: the first row of {opened.name} has not the columns of {benchmark.title}: "
            f"{benchmark.columns}"
        )
    return benchmark


def _parser(benchmark: Benchmark) -> Callable[[Rows, Columns], Iterable[Item | BadRow]]:
    return lambda rows, columns: each_row(rows, lambda row, source: benchmark.read(_object(row, source), source))


def _object(row: object, source: str) -> dict[str, object]:
    if not isinstance(row, dict):
        raise BadRow(source, "wrong_type", "the row is no object with named columns")
    return row


def _subsets(cfg: Config, path: str, options: dict[str, Any]) -> dict[str, str]:
    """Return the subset of each row by its source, from ``evaluate.subset_column`` or the first known column.

    The file is read a second time for it: pairs do not carry columns that training has no use for.
    """
    wanted = cfg.evaluate.subset_column
    found: dict[str, str] = {}
    column = wanted
    for source, row in open_rows(path, **options).rows:
        if not isinstance(row, dict):
            continue
        column = column or next((name for name in SUBSET_COLUMNS if isinstance(row.get(name), str)), "")
        if not column:
            return {}
        value = row.get(column)
        if isinstance(value, str) and value.strip():
            found[source] = value.strip()
    if wanted and not found:
        raise ConfigError(f"evaluate.subset_column={wanted}: no row of {path} has text in this column")
    if not wanted and len(set(found.values())) > MAX_SUBSETS:  # more likely a title than a subset
        return {}
    return found


def _of_pairs(rows: list[PreferencePair], subset_of: dict[str, str]) -> EvaluationRows:
    subsets = [subset_of.get(row.source, "") for row in rows]
    units: dict[str, int] = {}
    # raw texts have no prompt: each is a unit of its own
    keys = [prompt_key(row.prompt) if row.prompt else f"raw {i}" for i, row in enumerate(rows)]
    own = [units.setdefault(key, len(units)) for key in keys]
    places = torch.arange(2 * len(rows)).reshape(-1, 2)
    # Subsets of pairs are no strata: there may be as many of them as prompts, and nothing would be resampled.
    strata = torch.zeros(len(units), dtype=torch.int64)
    return EvaluationRows(rows, places, [row.source for row in rows], torch.tensor(own), subsets, strata, rows, units)


def _of_items(benchmark: Benchmark, items: list[Item]) -> EvaluationRows:
    answers: list[PreferencePair] = []
    pairs, sources, pair_units, subsets, to_mismatch = [], [], [], [], []
    item_answers, item_units = [], []
    units: dict[str, int] = {}
    prompts: dict[str, int] = {}
    for item in items:
        key = prompt_key(item.prompt)
        unit = units.setdefault(item.unit or key, len(units))
        prompts.setdefault(key, unit)
        first = 2 * len(answers)
        padded = item.answers if len(item.answers) % 2 == 0 else (*item.answers, item.answers[0])
        for i in range(0, len(padded), 2):
            answers.append(PreferencePair(item.prompt, padded[i], padded[i + 1], source=item.source))
        item_answers.append(tuple(range(first, first + len(item.answers))))
        item_units.append(unit)
        for better, worse in item.pairs:
            pairs.append((first + better, first + worse))
            sources.append(item.source)
            pair_units.append(unit)
            subsets.append(item.subset)
        if item.pairs:
            better, worse = item.pairs[0]
            to_mismatch.append(
                PreferencePair(item.prompt, item.answers[better], item.answers[worse], source=item.source)
            )
    strata = _strata(item_units, [item.subset for item in items], len(units))
    return EvaluationRows(
        answers,
        torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
        sources,
        torch.tensor(pair_units, dtype=torch.int64),
        subsets,
        strata,
        to_mismatch,
        prompts,
        benchmark,
        tuple(items),
        tuple(item_answers),
        tuple(item_units),
    )


def _strata(units: list[int], subsets: list[str], count: int) -> Tensor:
    """Return the number of the subset of each unit, [U]: that of its first row."""
    numbers: dict[str, int] = {}
    strata_U = torch.full((count,), -1)
    for unit, subset in zip(units, subsets, strict=True):
        if strata_U[unit] < 0:
            strata_U[unit] = numbers.setdefault(subset, len(numbers))
    return strata_U


def sampling_seed(cfg: Config) -> int:
    """Return the seed of the bootstrap samples: the same for all models of an evaluation."""
    return derive_seed(cfg.seed, "evaluate")
