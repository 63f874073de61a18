"""Fine-tunes a policy on rows of a prompt and a response."""

from __future__ import annotations

from pathlib import Path

from nemo_advrm.config.schema import Config
from nemo_advrm.data import inputs
from nemo_advrm.data.jsonl import BadRow
from nemo_advrm.data.loading import raise_or_count
from nemo_advrm.data.sft_rows import SftRow
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine.microbatches import EncodedResponse
from nemo_advrm.errors import ConfigError, DataError
from nemo_advrm.models.language_model import SupervisedModel
from nemo_advrm.seeds import derive_seed
from nemo_advrm.training.run_training import fit, read_result, write_result


def sft_rows(cfg: Config) -> list[SftRow]:
    """Returns rows of prompt and response: the embedded corpus, rows of a file, or the chosen sides of its pairs.

    Raises ConfigError when ``data.train_path`` is not set.
    """
    if cfg.pipeline.gold == "synthetic" and not cfg.data.train_path:
        from nemo_advrm.synthetic.corpus import sft_corpus

        corpus = sft_corpus(cfg.synthetic.sft_rows, derive_seed(cfg.seed, "corpus"), cfg.synthetic.sft_flourished)
        return [SftRow(*row, f"corpus: row {i}") for i, row in enumerate(corpus, start=1)]
    if not cfg.data.train_path:
        raise ConfigError("data.train_path is not set: name a file of prompts and responses, or of preference pairs")
    return inputs.sft(cfg)


def encode_responses(cfg: Config, tokenizer: Tokenizer, rows: list[SftRow]) -> list[EncodedResponse]:
    """Encodes rows.

    ``data.on_overlong`` decides about rows longer than the context, ``data.on_bad_row`` about rows that the chat
    template refuses. Raises DataError for such a row by default, and when no row is left.
    """
    encoded = []
    refused: list[BadRow] = []
    counts = {"overlong": 0, "truncated": 0}
    limit, choice = cfg.model.encoder_seq_length, cfg.data.on_overlong
    for row in rows:
        try:
            head = tokenizer.encode_prompt(row.prompt)
            answer = tokenizer.encode_response(row.response) if row.ended else tokenizer.encode(row.response)
        except DataError as error:
            refused.append(BadRow(row.source, "refused", str(error)))
            continue
        if len(head) + len(answer) > limit:
            room = limit - len(answer)
            if choice == "error":
                raise DataError(
                    f"{row.source}: the row has {len(head) + len(answer)} tokens, the limit is "
                    f"model.encoder_seq_length={limit} (data.on_overlong=skip leaves such rows out)"
                )
            if choice == "skip" or room < 1:
                counts["overlong"] += 1
                continue
            counts["truncated"] += 1
            head = head[len(head) - room :]
        encoded.append(EncodedResponse(head + answer, len(head)))
    if refused:
        raise_or_count(refused, usable=len(rows) - len(refused), on_bad_row=cfg.data.on_bad_row, path="")
    inputs.print_encoding_counts("rows", {**counts, "refused": len(refused)})
    if not encoded:
        raise DataError(f"{cfg.data.train_path or 'corpus'}: all rows are longer than model.encoder_seq_length={limit}")
    return encoded


def train_sft(cfg: Config, tokenizer: Tokenizer, directory: Path, rows: list[EncodedResponse]) -> dict[str, float]:
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
