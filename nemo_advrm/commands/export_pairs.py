"""The command ``export_pairs``: writes adversarial pairs as the jsonl that NeMo-Aligner trains reward models on."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_advrm.config.schema import ExportPairsConfig
from nemo_advrm.data.jsonl import write_jsonl_atomic
from nemo_advrm.data.messages import plain_text, starts_as_transcript
from nemo_advrm.data.nemo_aligner_rows import (
    EXTRA_ID_END,
    Render,
    Row,
    as_extra_id,
    as_transcript,
    read_nemo_aligner,
    rows_of,
)
from nemo_advrm.data.pair_store import PairStore
from nemo_advrm.data.preference_rows import PreferencePair
from nemo_advrm.data.tokenizers import HFTokenizer, build_tokenizer
from nemo_advrm.errors import ConfigError, DataError

_TEMPLATES: dict[str, tuple[Render, str]] = {
    "transcript": (as_transcript, ""),
    "plain": (plain_text, ""),
    "extra_id": (as_extra_id, EXTRA_ID_END),
}
_Labels = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Exported:
    """Counts of an export: adversarial pairs written, pairs skipped because ``with`` has them, and rows of ``with``."""

    pairs: int
    known: int
    rows: int


def main(cfg: ExportPairsConfig) -> int:
    """Writes one file in this process and prints its counts."""
    done = export_pairs(cfg)
    known = f", without {done.known} that it already has" if done.known else ""
    beside = f" and {done.rows} lines of {cfg.with_}{known}" if cfg.with_ else ""
    print(f"{done.pairs} adversarial pairs{beside}: {cfg.out}")
    return 0


def export_pairs(cfg: ExportPairsConfig) -> Exported:
    """Writes ``out`` atomically and returns the counts.

    Raises:
        ConfigError: a setting is missing or impossible.
        DataError: a file cannot be read, rendered or trained on; names the line.
    """
    labels = _check(cfg)
    render, end = _template(cfg.template)
    if cfg.end:
        end = cfg.end
    pairs = _pairs(cfg.pairs.split(","))
    kept = read_nemo_aligner(cfg.with_, len(labels[0]) if labels else 0) if cfg.with_ else []
    known = {_texts(group) for group in kept}
    new: list[tuple[Row, ...]] = []
    count = 0
    for pair in pairs:
        labelled = replace(pair, chosen_labels=labels[0], rejected_labels=labels[1]) if labels else pair
        both = rows_of(labelled, render, end)
        own: list[tuple[Row, ...]] = [(row,) for row in both] if labels else [both]
        own = [group for group in own if _texts(group) not in known]
        known.update(map(_texts, own))
        new += own
        count += bool(own)
    if kept and new:
        _check_template(cfg, kept[0][0], new[0][0])
    groups = kept + new
    if cfg.shuffle:
        random.Random(cfg.seed).shuffle(groups)
    try:
        write_jsonl_atomic(cfg.out, (row for group in groups for row in group))
    except OSError as error:
        raise ConfigError(f"out={cfg.out} cannot be written: {error.strerror or error}") from error
    return Exported(count, len(pairs) - count, sum(map(len, kept)))


def _check(cfg: ExportPairsConfig) -> _Labels | None:
    """Checks the settings; returns the labels of the chosen and the rejected responses for regression, else None."""
    for key, value in (("pairs", cfg.pairs), ("out", cfg.out)):
        if not value:
            raise ConfigError(f"{key} is not set: nemo-advrm export_pairs pairs=RUN/pairs.jsonl out=FILE.jsonl")
    if Path(cfg.out).exists():
        raise ConfigError(f"out={cfg.out} exists already: choose another file, or remove it")
    given = {key: getattr(cfg, key) for key in ("chosen_label", "rejected_label")}
    if cfg.reward_model_type == "binary_ranking":
        for key, value in given.items():
            if value:
                raise ConfigError(f"{key}={value}: labels are for reward_model_type=regression only")
        return None
    chosen, rejected = (_numbers(key, value) for key, value in given.items())
    if len(chosen) != len(rejected):
        raise ConfigError(
            f"chosen_label has {len(chosen)} numbers, rejected_label {len(rejected)}: set one number per attribute"
        )
    return chosen, rejected


def _numbers(key: str, text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(map(float, text.split(",")))
    except ValueError:
        numbers = ()
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ConfigError(
            f"{key}={text}: regression needs a number for each attribute, as in {key}=4,4,-100 "
            "(-100, model.loss_mask_val, leaves an attribute out)"
        )
    return numbers


def _template(name: str) -> tuple[Render, str]:
    """Returns the function that renders a prompt, and the text that ends a response."""
    if name in _TEMPLATES:
        return _TEMPLATES[name]
    if not name.startswith("hf:"):
        problem = f"template={name}: must be" if name else "template is not set: it must be"
        raise ConfigError(
            f"{problem} transcript, extra_id, hf:DIR (a tokenizer's directory), or plain for prompts that are rendered "
            "already, such as those of an attack in NeMo-Aligner"
        )
    from nemo_advrm.data.nemo_tokenizer import NemoTokenizer

    tokenizer = build_tokenizer(name)
    assert isinstance(tokenizer, HFTokenizer | NemoTokenizer)
    return tokenizer.render_prompt, ""


def _pairs(paths: list[str]) -> list[PreferencePair]:
    """Returns the pairs of all files in order, without repeated ones."""
    first: dict[tuple[str, str], PreferencePair] = {}
    for path in paths:
        try:
            pairs = PairStore(path).preferences_by_key()
        except OSError as error:
            raise DataError(f"pairs={path} cannot be read: {error.strerror or error}") from error
        for key, pair in pairs.items():
            first.setdefault(key, pair)
    if not first:
        raise DataError(f"pairs={','.join(paths)}: there are no pairs")
    return list(first.values())


def _texts(group: tuple[Row, ...]) -> tuple[str, ...]:
    return tuple(row["text"] for row in group)


def _check_template(cfg: ExportPairsConfig, theirs: Row, ours: Row) -> None:
    """Raises ConfigError when the texts of two files begin differently: a reward model would learn that difference."""
    for name, starts in (("transcript", starts_as_transcript), ("extra_id", _starts_as_extra_id)):
        if starts(theirs["text"]) != starts(ours["text"]):
            which = "are not" if starts(ours["text"]) else "are"
            raise ConfigError(
                f"template={cfg.template}: the texts of {cfg.with_} {which} of the template {name}; "
                "both must have the same template"
            )


def _starts_as_extra_id(text: str) -> bool:
    return text.startswith("<extra_id_0>")
