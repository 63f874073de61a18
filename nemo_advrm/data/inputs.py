"""Loads the pairs, prompts and SFT rows that ``data.*`` names, and prints one summary line for each file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from nemo_advrm.config.schema import Config, DataConfig
from nemo_advrm.data.loading import LoadReport
from nemo_advrm.data.messages import Message
from nemo_advrm.data.preferences import PreferencePair, load_preferences
from nemo_advrm.data.prompts import group_digest, load_prompts, validation_places
from nemo_advrm.data.sft_rows import SftRow, load_sft
from nemo_advrm.data.stored_rows import selected
from nemo_advrm.errors import ConfigError, DataError
from nemo_advrm.rank_info import RankInfo

Row = TypeVar("Row")
Tell = Callable[[str], None]
"""Called with each line about the data, which may be empty."""


Keep = Callable[[str, Iterator[PreferencePair]], Sequence[PreferencePair]]
"""(role, pairs as they are read) -> the pairs where they stay."""


def in_memory(role: str, pairs: Iterator[PreferencePair]) -> list[PreferencePair]:
    return list(pairs)


def print_line(line: str) -> None:
    """Print a line on rank 0, unless it is empty."""
    if line and RankInfo.from_environment().rank == 0:
        print(line, flush=True)


def training_and_validation_pairs(
    cfg: Config, tell: Tell = print_line, keep: Keep = in_memory
) -> tuple[Sequence[PreferencePair], Sequence[PreferencePair]]:
    """Return (training, validation) pairs from two files, two splits of a directory, or one file that is split here.

    ``keep`` puts the pairs of a role where they stay while they are read.

    Tells the number of validation pairs whose prompts also occur in the training data.

    Raises ConfigError without ``data.train_path``, DataError when both are the same split of a directory.
    """
    if not cfg.data.train_path:
        raise ConfigError("data.train_path is not set: name a file of preference pairs")
    train = _pairs(cfg, cfg.data.train_path, "train", tell, keep)
    rows = train.rows
    if cfg.data.validation_path or cfg.data.validation_split:
        held_out = _pairs(cfg, cfg.data.validation_path or cfg.data.train_path, "validation", tell, keep)
        validation = held_out.rows
        # a file named for both is deliberate; the same split of a directory is probably a mistake
        if held_out.path == train.path and not Path(train.path).is_file():
            raise DataError(
                f"{train.path}: training and validation are the same rows; choose with data.train_split and "
                "data.validation_split, or leave data.validation_path empty to hold out a part"
            )
        tell(_shared_prompts(rows, validation, held_out.path))
    else:
        held = validation_places(rows, cfg.data.validation_fraction, cfg.seed)
        validation = selected(rows, sorted(held))
        rows = selected(rows, [place for place in range(len(rows)) if place not in held])
    limit = cfg.data.limit_train_rows
    return selected(rows, range(min(limit, len(rows)))) if limit else rows, validation


def evaluation_pairs(cfg: Config) -> list[PreferencePair]:
    """Return the pairs of ``data.validation_path``, or of ``data.train_path`` when it is not set."""
    path, where = evaluation_file(cfg)
    return list(_pairs(cfg, path, where["role"]).rows)


def evaluation_file(cfg: Config) -> tuple[str, dict[str, Any]]:
    """Return the path of :func:`evaluation_pairs`, and its role and split as :func:`open_rows` takes them."""
    data = cfg.data
    held_out = data.validation_path or data.validation_split or not data.train_split
    role = "validation" if held_out else "train"
    return data.validation_path or data.train_path, {"role": role, "split": _split(cfg, role)}


def prompts(cfg: Config) -> list[tuple[Message, ...]]:
    """Return the distinct prompts of ``data.prompts_path``, or of ``data.train_path`` when it is not set."""
    data = cfg.data
    split = data.prompts_split if data.prompts_path else data.prompts_split or data.train_split
    return list(_read(load_prompts, data.prompts_path or data.train_path, data, split=split).rows)


def held_out(cfg: Config) -> list[tuple[Message, ...]]:
    """Return the distinct prompts of ``data.held_out_prompts_path``."""
    return list(_read(load_prompts, cfg.data.held_out_prompts_path, cfg.data).rows)


def sft(
    cfg: Config, tell: Tell = print_line, keep: Callable[[Iterator[SftRow]], Sequence[SftRow]] = list
) -> Sequence[SftRow]:
    """Return prompts and answers of ``data.train_path``, at most ``data.limit_train_rows``; ``keep`` stores them."""
    data = cfg.data
    rows = _read(load_sft, data.train_path, data, tell, format=data.format, split=data.train_split, keep=keep).rows
    return selected(rows, range(min(data.limit_train_rows, len(rows)))) if data.limit_train_rows else rows


def with_unusable_rows_skipped(cfg: Config) -> Config:
    """Return `cfg` with rows that are bad or too long skipped, for pairs made from rows that were already checked."""
    data = replace(cfg.data, on_bad_row="skip")
    if data.on_overlong == "error":
        data.on_overlong = "skip"
    return replace(cfg, data=data)


def print_encoding_counts(what: str, counts: dict[str, int], tell: Tell = print_line) -> None:
    """Tell the counts of an encoding in one line, unless all rows were encoded unchanged."""
    changed = ", ".join(f"{count} {name}" for name, count in counts.items() if name != "encoded" and count)
    tell(f"{what}: {changed}" if changed else "")


def _pairs(
    cfg: Config, path: str, role: str, tell: Tell = print_line, keep: Keep = in_memory
) -> LoadReport[PreferencePair]:
    options = {"format": cfg.data.format, "split": _split(cfg, role), "role": role, "keep": partial(keep, role)}
    return _read(load_preferences, path, cfg.data, tell, **options)


def _split(cfg: Config, role: str) -> str:
    return cfg.data.train_split if role == "train" else cfg.data.validation_split


def _read(
    load: Callable[..., LoadReport[Row]], path: str, data: DataConfig, tell: Tell = print_line, **options: Any
) -> LoadReport[Row]:
    report = load(path, on_bad_row=data.on_bad_row, ignore_columns=data.ignore_columns, **options)
    tell(report.summary())
    return report


def _shared_prompts(train: Iterable[PreferencePair], validation: Sequence[PreferencePair], name: str) -> str:
    known = {group_digest(row) for row in train}
    shared = sum(group_digest(row) in known for row in validation)
    if not shared:
        return ""
    return f"{name}: the prompts of {shared} of {len(validation)} pairs are in the training data too"
