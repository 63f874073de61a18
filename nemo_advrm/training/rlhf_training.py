"""Trains a policy against a reward by RLHF and tracks the gold reward, if there is one."""

from __future__ import annotations

from pathlib import Path

from nemo_advrm.config.schema import Config
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.models.policy import PolicyModel
from nemo_advrm.rewards.base import RewardSource
from nemo_advrm.rewards.ensemble import PolicyReward
from nemo_advrm.rewards.limits import prompts_with_room
from nemo_advrm.rollouts.run_prompts import encode_prompts, held_out_prompts
from nemo_advrm.rollouts.types import Prompt
from nemo_advrm.seeds import derive_seed
from nemo_advrm.training.callbacks.held_out import HeldOutEvaluation
from nemo_advrm.training.callbacks.rollout_records import OveroptimizationTracker
from nemo_advrm.training.callbacks.served_policy import served_policy_watch
from nemo_advrm.training.run_training import fit, read_result, write_result


def run_rlhf(
    cfg: Config,
    tokenizer: Tokenizer,
    directory: Path,
    prompts: list[Prompt],
    reward: PolicyReward,
    gold: RewardSource | None,
    seed: int,
    title: str,
) -> dict[str, float]:
    """Trains into ``directory/model`` and returns the last step's metrics; a finished training is not repeated."""
    finished = read_result(directory, "proxy", "kl")
    if finished is not None:
        return finished
    module = PolicyModel(
        cfg, tokenizer, prompts, reward, cfg.pretrained_checkpoint.restore_from_path, derive_seed(seed, "rlhf")
    )
    tracker = OveroptimizationTracker(directory / "samples.jsonl", gold, cfg.rl.evaluation_every, cfg.rl.log_samples)
    held_out = _held_out(cfg, tokenizer, prompts, reward, gold)
    fit(module, cfg, directory, title, [*served_policy_watch(module), *held_out, tracker], first_step=0)
    write_result(directory, module, module.step_metrics)
    return module.step_metrics


def _held_out(
    cfg: Config, tokenizer: Tokenizer, prompts: list[Prompt], reward: PolicyReward, gold: RewardSource | None
) -> list[HeldOutEvaluation]:
    """Returns the callback that evaluates on held-out prompts, if configured; it does not depend on RLHF's seed."""
    if not cfg.rl.held_out_prompts:
        return []
    kept = held_out_prompts(cfg, cfg.rl.held_out_prompts, [prompt.messages for prompt in prompts])
    encoded = encode_prompts(kept, tokenizer, cfg)
    encoded = prompts_with_room(encoded, tokenizer.fingerprint, getattr(reward, "sources", ()), cfg)
    return [HeldOutEvaluation(encoded, cfg.rl.held_out_every, gold, derive_seed(cfg.seed, "held-out sampling"))]
