"""The pairs or SFT rows of a run: tokenised in memory, or once per node into files that later starts open."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

from nemo_advrm.config.schema import Config
from nemo_advrm.data import inputs
from nemo_advrm.data.encoding import EncodedPair
from nemo_advrm.data.parallel_encoding import Workers
from nemo_advrm.data.preference_rows import PreferencePair
from nemo_advrm.data.row_tables import PAIRS, PAIRS_OF_TEXT, SFT_ROWS
from nemo_advrm.data.sft_rows import SftRow
from nemo_advrm.data.stored_rows import Table
from nemo_advrm.data.token_cache import Entry, TokenCache, Writer
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine.collectives import run_on_first_rank_of_node, run_on_rank_zero
from nemo_advrm.engine.microbatches import EncodedResponse
from nemo_advrm.training.reward_model_training import EncodedPreferences, encode_rows
from nemo_advrm.training.sft_training import encode_responses, sft_rows

# of the processes of a node for the one that tokenises, however large the files are
_WAIT = timedelta(hours=12)
_PARTS = ("train", "validation", "mismatched")
_RESPONSES: Table[EncodedResponse] = Table(
    {"tokens": "list:int32", "prompt_length": "int32"},
    lambda row: {"tokens": row.tokens, "prompt_length": row.prompt_length},
    lambda columns: EncodedResponse(**columns),
)
Make = Callable[[Writer, inputs.Tell], dict[str, Any]]
"""(where to write the tables, whom to tell the lines about the data) -> what to note beside the tables."""


def preference_data(cfg: Config, tokenizer: Tokenizer) -> EncodedPreferences:
    """Reads and encodes training and validation pairs; all ranks call. Prints and raises as :func:`encode_rows`."""
    data, options = cfg.data, cfg.reward_model
    entry = _entry(
        _cache(
            cfg,
            tokenizer,
            dict.fromkeys(_PARTS, PAIRS),
            data.validation_path,
            data.validation_split,
            # the rows are the same for all seeds where validation data is named
            None if data.validation_path or data.validation_split else (data.validation_fraction, cfg.seed),
            cfg.trainer.limit_val_batches * cfg.model.global_batch_size,
            options.feature_prompts if options.reference_features else 0,
        ),
        lambda writer, tell: _write_pairs(cfg, tokenizer, writer, tell),
    )
    if entry is None:
        return encode_rows(cfg, tokenizer, *inputs.training_and_validation_pairs(cfg))
    train, validation, mismatched = (entry.rows(name, PAIRS) for name in _PARTS)
    prompts = tuple(map(tuple, entry.notes["prompts"]))
    return EncodedPreferences(train, validation, mismatched, entry.notes["no_mismatch"], prompts=prompts)


def sft_data(cfg: Config, tokenizer: Tokenizer) -> Sequence[EncodedResponse]:
    """Reads and encodes the rows of supervised fine-tuning; all ranks call. Raises as :func:`encode_responses`."""
    entry = _entry(
        _cache(cfg, tokenizer, {"rows": _RESPONSES}),
        lambda writer, tell: _write_responses(cfg, tokenizer, writer, tell),
    )
    return encode_responses(cfg, tokenizer, sft_rows(cfg)) if entry is None else entry.rows("rows", _RESPONSES)


def _cache(cfg: Config, tokenizer: Tokenizer, tables: dict[str, Table[Any]], *settings: Any) -> TokenCache:
    """The place of rows of ``data.train_path``, and of a second file if the first of ``settings`` names one."""
    data = cfg.data
    paths = tuple(path for path in (data.train_path, *settings[:1]) if path)
    reading = (data.train_split, data.format, sorted(data.ignore_columns), data.on_bad_row, data.limit_train_rows)
    encoding = (
        tokenizer.fingerprint,
        getattr(tokenizer, "details", ""),
        cfg.model.encoder_seq_length,
        data.on_overlong,
    )
    return TokenCache(data.cache_dir, paths, tables, (*reading, *encoding, *settings))


def _entry(cache: TokenCache, make: Make) -> Entry | None:
    """The entry of the cache, made by one process of each node; None where the rows are to be kept in memory."""
    if not run_on_rank_zero(lambda: cache.is_used):  # all processes have to agree
        return None
    return run_on_first_rank_of_node(_WAIT, _filled, cache, make)


def _filled(cache: TokenCache, make: Make) -> Entry | None:
    lines: list[str] = []

    def tell(line: str) -> None:
        inputs.print_line(line)
        lines.append(line)

    filled = cache.filled(lambda writer: {**make(writer, tell), "lines": lines})
    if filled is None:
        return None
    entry, made = filled
    for line in () if made else entry.notes["lines"]:
        inputs.print_line(line)
    return entry


def _write_pairs(cfg: Config, tokenizer: Tokenizer, writer: Writer, tell: inputs.Tell) -> dict[str, Any]:
    written = set()

    def keep(name: str, pairs: Iterable[EncodedPair]) -> Sequence[EncodedPair]:
        written.add(name)
        return writer.write(name, PAIRS, pairs)

    def set_aside(role: str, pairs: Iterable[PreferencePair]) -> Sequence[PreferencePair]:
        return writer.set_aside(role, PAIRS_OF_TEXT, pairs)

    pairs = inputs.training_and_validation_pairs(cfg, tell, set_aside)
    made = encode_rows(cfg, tokenizer, *pairs, tell, keep, Workers.of(cfg.model.tokenizer, cfg.data.num_workers))
    for name in set(_PARTS) - written:
        keep(name, [])
    return {"no_mismatch": made.no_mismatch, "prompts": made.prompts}


def _write_responses(cfg: Config, tokenizer: Tokenizer, writer: Writer, tell: inputs.Tell) -> dict[str, Any]:
    def keep(responses: Iterable[EncodedResponse]) -> Sequence[EncodedResponse]:
        return writer.write("rows", _RESPONSES, responses)

    def set_aside(rows: Iterable[SftRow]) -> Sequence[SftRow]:
        return writer.set_aside("texts", SFT_ROWS, rows)

    workers = Workers.of(cfg.model.tokenizer, cfg.data.num_workers)
    encode_responses(cfg, tokenizer, sft_rows(cfg, tell, set_aside), tell, keep, workers)
    return {}
