"""Stage ``evaluate``: accuracy of reward models of any kind on preference pairs."""

from __future__ import annotations

from nemo_advrm.data.encoding import encode_pairs
from nemo_advrm.data.preferences import PreferencePair, load_preferences
from nemo_advrm.data.tokenizers import build_tokenizer
from nemo_advrm.errors import ConfigError
from nemo_advrm.megatron import runtime
from nemo_advrm.rewards import sources
from nemo_advrm.rewards.base import RewardSource, Rollouts
from nemo_advrm.schema import Config
from nemo_advrm.stages import session


def main(cfg: Config) -> int:
    """Score ``data.validation_path`` (or ``data.train_path``) with each of ``ensemble.members``, else with the reward
    model ``pretrained_checkpoint.restore_from_path``, and print accuracy and margin."""
    path = cfg.data.validation_path or cfg.data.train_path
    if not path:
        raise ConfigError("data.validation_path is not set: name a file of preference pairs")
    if not cfg.ensemble.members and not cfg.pretrained_checkpoint.restore_from_path:
        raise ConfigError("pretrained_checkpoint.restore_from_path is not set: name a reward model")
    cfg = sources.for_scoring(cfg, cfg.ensemble.members or [cfg.pretrained_checkpoint.restore_from_path])
    session.start(cfg)
    report = load_preferences(path, format=cfg.data.format, on_bad_row=cfg.data.on_bad_row)
    members = sources.load_members(cfg, cfg.ensemble.members, build_tokenizer(cfg.model.tokenizer))
    if runtime.current().is_writer:
        print(report.summary())
    for member in members:
        line = _accuracy(member, _rollouts(member, report.rows, cfg))
        if runtime.current().is_writer:
            print(line if len(members) == 1 else f"{member.name}: {line}")
    return 0


def _rollouts(source: RewardSource, rows: list[PreferencePair], cfg: Config) -> Rollouts:
    """All chosen responses, then all rejected ones; as tokens where the source's tokenizer is known here."""
    tokenizer = getattr(source, "tokenizer", None)
    if tokenizer is None:
        texts = [row.chosen for row in rows] + [row.rejected for row in rows]
        return _texts([row.prompt for row in rows] * 2, texts)
    pairs, _ = encode_pairs(rows, tokenizer, cfg.model.encoder_seq_length, cfg.data.on_overlong)
    tokens = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    rollouts = _texts([()] * len(tokens), [""] * len(tokens))
    rollouts.response_tokens, rollouts.fingerprint = tokens, tokenizer.fingerprint
    return rollouts


def _texts(prompts: list, texts: list[str]) -> Rollouts:
    none: list[list[int]] = [[] for _ in texts]
    return Rollouts(prompts, texts, [True] * len(texts), none, none, [0] * len(texts), fingerprint="")


def _accuracy(source: RewardSource, rollouts: Rollouts) -> str:
    scores = source.score(rollouts)
    chosen, rejected = (scores.mean(-1) if scores.ndim > 1 else scores).chunk(2)
    right = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
    return f"accuracy {right.mean():.4f}  margin {(chosen - rejected).mean():.4f}  ({len(chosen)} pairs)"
