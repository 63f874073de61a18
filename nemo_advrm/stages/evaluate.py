"""Stage ``evaluate``: accuracy of a trained reward model on preference pairs."""

from __future__ import annotations

from pathlib import Path

from nemo_advrm.data.encoding import encode_pairs
from nemo_advrm.data.preferences import load_preferences
from nemo_advrm.data.tokenizers import build_tokenizer
from nemo_advrm.errors import ConfigError
from nemo_advrm.megatron import runtime
from nemo_advrm.models.reward_model import build_reward_model
from nemo_advrm.models.scoring import score_sequences
from nemo_advrm.schema import Config
from nemo_advrm.stages import session


def main(cfg: Config) -> int:
    """Score ``data.validation_path`` (or ``data.train_path``) with the reward model in
    ``pretrained_checkpoint.restore_from_path`` and print accuracy and margin."""
    path = cfg.data.validation_path or cfg.data.train_path
    if not path:
        raise ConfigError("data.validation_path is not set: name a file of preference pairs")
    if not cfg.pretrained_checkpoint.restore_from_path:
        raise ConfigError("pretrained_checkpoint.restore_from_path is not set: name a reward model")
    session.start(cfg)
    tokenizer = build_tokenizer(cfg.model.tokenizer)
    report = load_preferences(path, format=cfg.data.format, on_bad_row=cfg.data.on_bad_row)
    pairs, _ = encode_pairs(report.rows, tokenizer, cfg.model.encoder_seq_length, cfg.data.on_overlong)
    model = build_reward_model(cfg, tokenizer, str(Path(cfg.pretrained_checkpoint.restore_from_path)), 0, False)
    scores = score_sequences(model, [p.chosen for p in pairs] + [p.rejected for p in pairs], tokenizer.pad_id)
    chosen, rejected = (scores.mean(-1) if scores.ndim > 1 else scores).chunk(2)
    right = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
    if runtime.current().is_writer:
        print(report.summary())
        print(f"accuracy {right.mean():.4f}  margin {(chosen - rejected).mean():.4f}  ({len(pairs)} pairs)")
    return 0
