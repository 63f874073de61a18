"""The command ``train_rm``: trains a reward model on preference pairs and prints its accuracy on held-out pairs."""

from __future__ import annotations

from pathlib import Path

from nemo_advrm.config.schema import Config
from nemo_advrm.data.mismatch import mismatch_line
from nemo_advrm.data.tokenizers import build_tokenizer
from nemo_advrm.engine import runtime
from nemo_advrm.run_directory import run_dir
from nemo_advrm.training.prepared_data import preference_data
from nemo_advrm.training.reward_model_training import keep_back, train_reward_model
from nemo_advrm.training.shared_trunk_rows import rows_of_heads


def main(cfg: Config) -> int:
    """Trains a reward model, or members on one trunk, into ``run_dir``; prints loss and accuracy on held-out pairs."""
    directory = Path(cfg.run_dir)
    run_dir.start(cfg)
    tokenizer = build_tokenizer(cfg.model.tokenizer)
    data = keep_back(cfg, preference_data(cfg, tokenizer))
    if cfg.ensemble.share == "trunk":
        data = rows_of_heads([data] * cfg.ensemble.size, cfg.seed, cfg.ensemble.bootstrap)
    run_dir.claim(cfg, directory, "train_rm")
    metrics = train_reward_model(
        cfg,
        tokenizer,
        directory,
        data,
        cfg.seed,
        "train_rm",
        restore_from=cfg.pretrained_checkpoint.restore_from_path,
    )
    if runtime.current().is_writer:
        print(
            f"validation: accuracy {metrics['val/accuracy']:.3f}  loss {metrics['val/loss']:.4f}  "
            f"margin {metrics['val/margin']:.3f}  ({len(data.validation)} pairs)\n"
            f"{mismatch_line(metrics.get('val/mismatch_accuracy'), len(data.mismatched), data.no_mismatch)}\n"
            f"{_hybrid_line(metrics)}{_heads_lines(metrics)}reward model: {directory / 'model'}"
        )
    return 0


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
