"""The command ``train_rm``: trains a reward model on preference pairs and prints its accuracy on held-out pairs."""

from __future__ import annotations

from pathlib import Path

from nemo_advrm.config.schema import Config
from nemo_advrm.data.mismatch import mismatch_line
from nemo_advrm.data.tokenizers import Tokenizer, build_tokenizer
from nemo_advrm.engine import runtime
from nemo_advrm.errors import ConfigError
from nemo_advrm.run_directory import run_dir
from nemo_advrm.seeds import derive_seed
from nemo_advrm.training.prepared_data import preference_data
from nemo_advrm.training.reward_model_training import (
    EncodedPreferences,
    keep_back,
    rows_of_member,
    train_reward_model,
)
from nemo_advrm.training.shared_trunk_rows import rows_of_heads


def main(cfg: Config) -> int:
    """Trains a reward model, or members that share a trunk or a base, into ``run_dir``; prints loss and accuracy on
    held-out pairs."""
    directory = Path(cfg.run_dir)
    if cfg.ensemble.share == "lora" and not cfg.pretrained_checkpoint.restore_from_path:
        raise ConfigError("ensemble.share=lora: needs weights to adapt: set pretrained_checkpoint.restore_from_path")
    run_dir.start(cfg)
    tokenizer = build_tokenizer(cfg.model.tokenizer)
    data = preference_data(cfg, tokenizer)
    run_dir.claim(cfg, directory, "train_rm")
    if cfg.ensemble.share == "lora":
        for k in range(1, cfg.ensemble.size + 1):
            seed = derive_seed(cfg.seed, "rm", k)  # as in a pipeline
            _train(cfg, tokenizer, directory / f"rm_{k}", rows_of_member(cfg, data, seed), seed, f"rm_{k}")
        return 0
    data = keep_back(cfg, data)
    if cfg.ensemble.share == "trunk":
        data = rows_of_heads([data] * cfg.ensemble.size, cfg.seed, cfg.ensemble.bootstrap)
    _train(cfg, tokenizer, directory, data, cfg.seed, "train_rm")
    return 0


def _train(cfg: Config, tokenizer: Tokenizer, directory: Path, data: EncodedPreferences, seed: int, title: str) -> None:
    start = cfg.pretrained_checkpoint.restore_from_path
    metrics = train_reward_model(cfg, tokenizer, directory, data, seed, title, restore_from=start)
    if runtime.current().is_writer:
        print(
            f"validation: accuracy {metrics['val/accuracy']:.3f}  loss {metrics['val/loss']:.4f}  "
            f"margin {metrics['val/margin']:.3f}  ({len(data.validation)} pairs)\n"
            f"{mismatch_line(metrics.get('val/mismatch_accuracy'), len(data.mismatched), data.no_mismatch)}\n"
            f"{_hybrid_line(metrics)}{_heads_lines(metrics)}reward model: {directory / 'model'}"
        )


def _heads_lines(metrics: dict[str, float]) -> str:
    """Returns a line for each member of a shared trunk, of several."""
    heads = [int(key.rpartition("_")[2]) for key in metrics if key.startswith("val/accuracy_head_")]
    lines = []
    for k in sorted(heads) if len(heads) > 1 else ():
        on_mismatched = _on_mismatched(metrics.get(f"val/mismatch_accuracy_head_{k}"))
        lines.append(f"member ?head={k}: accuracy {metrics[f'val/accuracy_head_{k}']:.3f}{on_mismatched}\n")
    return "".join(lines)


def _hybrid_line(metrics: dict[str, float]) -> str:
    if "val/hybrid_accuracy" not in metrics:
        return ""
    on_mismatched = _on_mismatched(metrics.get("val/hybrid_mismatch_accuracy"))
    return f"with reference features: accuracy {metrics['val/hybrid_accuracy']:.3f}{on_mismatched}\n"


def _on_mismatched(accuracy: float | None) -> str:
    return "" if accuracy is None else f"  mismatched prompts {accuracy:.3f}"
