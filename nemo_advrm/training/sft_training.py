"""Fine-tunes a policy on rows of a prompt and a response."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from nemo_advrm.config.schema import Config
from nemo_advrm.data import inputs
from nemo_advrm.data.parallel_encoding import Workers, encode_each
from nemo_advrm.data.row_lengths import RowLengths
from nemo_advrm.data.sft_rows import SftRow
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine.microbatches import EncodedResponse
from nemo_advrm.errors import ConfigError
from nemo_advrm.models.language_model import SupervisedModel
from nemo_advrm.seeds import derive_seed
from nemo_advrm.training.run_training import fit, read_result, write_result


def sft_rows(
    cfg: Config,
    tell: inputs.Tell = inputs.print_line,
    keep: Callable[[Iterator[SftRow]], Sequence[SftRow]] = list,
) -> Sequence[SftRow]:
    """Returns rows of prompt and response: the embedded corpus, rows of a file, or the chosen sides of its pairs.

    Rows of a file stay where ``keep`` puts them.

    Raises ConfigError when ``data.train_path`` is not set.
    """
    if cfg.pipeline.gold == "synthetic" and not cfg.data.train_path:
        from nemo_advrm.synthetic.corpus import sft_corpus

        corpus = sft_corpus(cfg.synthetic.sft_rows, derive_seed(cfg.seed, "corpus"), cfg.synthetic.sft_flourished)
        return [SftRow(*row, f"corpus: row {i}") for i, row in enumerate(corpus, start=1)]
    if not cfg.data.train_path:
        raise ConfigError("data.train_path is not set: name a file of prompts and responses, or of preference pairs")
    return inputs.sft(cfg, tell, keep)


def encode_responses(
    cfg: Config,
    tokenizer: Tokenizer,
    rows: Sequence[SftRow],
    tell: inputs.Tell = inputs.print_line,
    keep: Callable[[Iterable[EncodedResponse]], Sequence[EncodedResponse]] = list,
    workers: Workers | None = None,
) -> Sequence[EncodedResponse]:
    """Encodes rows, which ``keep`` puts where they stay, by several processes if there are ``workers``.

    ``data.on_overlong`` decides about rows longer than the context, ``data.on_bad_row`` about rows that the chat
    template refuses. Raises DataError for such a row by default, and when no row is left.
    """
    limit = cfg.model.encoder_seq_length
    advice = "raise model.encoder_seq_length, or set data.on_overlong=skip or data.on_overlong=truncate_prompt"
    lengths = RowLengths(cfg.data.on_overlong, cfg.data.on_bad_row, advice)
    encoded = keep(encode_each(rows, partial(_encode_response, limit), tokenizer, lengths, workers))
    counts = lengths.finish(len(encoded), f"{cfg.data.train_path or 'corpus'}: holds no rows")
    inputs.print_encoding_counts("rows", counts, tell)
    return encoded


def _encode_response(limit: int, row: SftRow, tokenizer: Tokenizer, lengths: RowLengths) -> EncodedResponse | None:
    parts = lengths.encode(row.source, partial(_prompt_and_answer, row, tokenizer))
    if parts is None:
        return None
    head, answer = parts
    length = len(head) + len(answer)
    told = f"{row.source}: the row has {length} tokens, the limit is model.encoder_seq_length={limit}"
    cut = lengths.tokens_to_cut(length, limit, len(head) - 1, told)
    return None if cut is None else EncodedResponse(head[cut:] + answer, len(head) - cut)


def _prompt_and_answer(row: SftRow, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    answer = tokenizer.encode_response(row.response) if row.ended else tokenizer.encode(row.response)
    return tokenizer.encode_prompt(row.prompt), answer


def train_sft(cfg: Config, tokenizer: Tokenizer, directory: Path, rows: Sequence[EncodedResponse]) -> dict[str, float]:
    """Trains into ``directory/model`` and returns the last step's metrics; a finished training is not repeated."""
    finished = read_result(directory, "train/loss")
    if finished is not None:
        return finished
    module = SupervisedModel(
        cfg, tokenizer, rows, cfg.pretrained_checkpoint.restore_from_path, derive_seed(cfg.seed, "sft")
    )
    fit(module, cfg, directory, "sft")
    write_result(directory, module, module.step_metrics)
    return module.step_metrics
