"""The command ``sft``: fine-tunes a policy on prompts with responses."""

from __future__ import annotations

from pathlib import Path

from nemo_advrm.config.schema import Config
from nemo_advrm.data.tokenizers import build_tokenizer
from nemo_advrm.engine import runtime
from nemo_advrm.run_directory import run_dir
from nemo_advrm.training.prepared_data import sft_data
from nemo_advrm.training.sft_training import train_sft


def main(cfg: Config) -> int:
    """Fine-tunes a policy into ``run_dir/model``."""
    run_dir.start(cfg)
    tokenizer = build_tokenizer(cfg.model.tokenizer)
    rows = sft_data(cfg, tokenizer)
    directory = Path(cfg.run_dir)
    run_dir.claim(cfg, directory, "sft")
    metrics = train_sft(cfg, tokenizer, directory, rows)
    if runtime.current().is_writer:
        print(f"loss {metrics['train/loss']:.4f}\npolicy: {directory / 'model'}")
    return 0
