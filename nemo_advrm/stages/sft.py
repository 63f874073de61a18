"""Stage ``sft``: fine-tunes a policy on prompt/response rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_advrm.data.jsonl import BadRow
from nemo_advrm.data.messages import Message
from nemo_advrm.data.preference_files import read_rows
from nemo_advrm.data.preference_rows import parse_row
from nemo_advrm.data.preferences import raise_or_count
from nemo_advrm.data.tokenizers import Tokenizer, build_tokenizer
from nemo_advrm.errors import ConfigError, DataError
from nemo_advrm.megatron import runtime
from nemo_advrm.models.language_model import EncodedResponse, SupervisedModel
from nemo_advrm.models.trainable import derive_seed
from nemo_advrm.schema import Config
from nemo_advrm.stages import session
from nemo_advrm.stages.fit import fit, read_result, write_result

SftRow = tuple[tuple[Message, ...], str]


def main(cfg: Config) -> int:
    """Fine-tune into ``run_dir/model``."""
    session.start(cfg)
    tokenizer = build_tokenizer(cfg.model.tokenizer)
    rows = encode_responses(cfg, tokenizer, sft_rows(cfg))
    directory = Path(cfg.run_dir)
    session.claim(cfg, directory)
    metrics = train_sft(cfg, tokenizer, directory, rows)
    if runtime.current().is_writer:
        print(f"loss {metrics['train/loss']:.4f}\npolicy: {directory / 'model'}")
    return 0


def sft_rows(cfg: Config) -> list[SftRow]:
    """(prompt, response) rows: the embedded corpus, rows with prompt and response, or the chosen side of pairs."""
    if cfg.pipeline.gold == "synthetic" and not cfg.data.train_path:
        from nemo_advrm.synthetic.corpus import sft_corpus

        return sft_corpus(cfg.synthetic.sft_rows, derive_seed(cfg.seed, "corpus"))
    if not cfg.data.train_path:
        raise ConfigError("data.train_path is not set: name a file of prompts and responses, or of preference pairs")
    rows: list[SftRow] = []
    bad: list[BadRow] = []
    for source, row in read_rows(cfg.data.train_path):
        try:
            rows.append(_parse(row, source, cfg.data.format))
        except BadRow as error:
            bad.append(error)
    options = cfg.data
    skipped, _ = raise_or_count(bad, usable=len(rows), on_bad_row=options.on_bad_row, path=options.train_path)
    if skipped and runtime.current().is_writer:
        left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
        print(f"{options.train_path}: {len(rows)} rows, skipped {left_out}", flush=True)
    return rows[: options.limit_train_rows or None]


def _parse(row: Any, source: str, format: str) -> SftRow:
    if isinstance(row, BadRow):
        raise row
    if isinstance(row, dict) and "response" in row:
        # the same checks as for pairs, with the response standing on both sides
        row = {"prompt": row.get("prompt"), "chosen": row["response"], "rejected": f"{row['response']} "}
    pair = parse_row(row, source, format)
    return pair.prompt, pair.chosen


def encode_responses(cfg: Config, tokenizer: Tokenizer, rows: list[SftRow]) -> list[EncodedResponse]:
    """Encode; a sequence longer than the context is treated as ``data.on_overlong`` says (DataError by default)."""
    encoded = []
    limit, choice = cfg.model.encoder_seq_length, cfg.data.on_overlong
    for i, (prompt, response) in enumerate(rows):
        head = tokenizer.encode_prompt(prompt)
        answer = tokenizer.encode_response(response)
        if len(head) + len(answer) > limit:
            room = limit - len(answer)
            if choice == "error":
                raise DataError(
                    f"{cfg.data.train_path or 'corpus'}: row {i + 1} has {len(head) + len(answer)} tokens, the limit "
                    f"is model.encoder_seq_length={limit} (data.on_overlong=skip leaves such rows out)"
                )
            if choice == "skip" or room < 1:
                continue
            head = head[len(head) - room :]
        encoded.append(EncodedResponse(head + answer, len(head)))
    if not encoded:
        raise DataError(f"{cfg.data.train_path or 'corpus'}: all rows are longer than model.encoder_seq_length={limit}")
    return encoded


def train_sft(cfg: Config, tokenizer: Tokenizer, directory: Path, rows: list[EncodedResponse]) -> dict[str, float]:
    """Train into ``directory/model``; returns the last step's metrics. A finished training is not redone."""
    finished = read_result(directory)
    if finished is not None:
        return finished
    module = SupervisedModel(
        cfg, tokenizer, rows, cfg.pretrained_checkpoint.restore_from_path, derive_seed(cfg.seed, "sft")
    )
    fit(module, cfg, directory, "sft")
    write_result(directory, module, module.step_metrics)
    return module.step_metrics
