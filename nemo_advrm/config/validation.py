"""Values that configuration keys may take: one table of choices, one of ranges, and the check that applies them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nemo_advrm.config.keys import ANY_NAME, nearest
from nemo_advrm.config.schema import Config, ModelConfig
from nemo_advrm.data.preference_forms import FORMATS
from nemo_advrm.errors import ConfigError

AGGREGATES = ("mean", "min", "lcb", "uwo", "gap")
REFERENCE_FEATURES = ("log_prob", "prompt_gain")

CHOICES: dict[str, tuple[str, ...]] = {
    "trainer.accelerator": ("auto", "cpu", "gpu"),
    "model.normalization": ("RMSNorm", "LayerNorm", "rmsnorm1p", "layernorm1p"),
    "model.activation": ("swiglu", "geglu", "geglu_tanh", "gelu", "relu", "squared_relu"),
    "model.rope_scaling": ("", "llama3"),
    "model.position_embedding_type": ("rope", "learned_absolute"),
    "model.recompute": ("none", "selective", "full", "block"),
    "model.optim.name": ("adam", "sgd"),
    "model.optim.sched.name": ("CosineAnnealing", "constant"),
    "precision.name": ("fp32", "bf16", "fp8_delayed", "fp8_current", "fp8_blockwise", "mxfp8"),
    "data.format": FORMATS,
    "data.on_bad_row": ("error", "skip"),
    "data.on_overlong": ("error", "skip", "truncate_prompt"),
    "reward_model.loss": ("bt", "margin_bt", "scaled_bt", "regression"),
    "reward_model.reference_features": REFERENCE_FEATURES,
    "ensemble.aggregate": AGGREGATES,
    "serve.reward": ("ensemble", "adversarial"),
    "adversarial.preset": ("paper", "raw"),
    "rl.algorithm": ("rloo", "reinforce", "grpo", "ppo"),
    "rl.kl.estimator": ("abs", "k1", "k2", "k3"),
    "rl.baseline": ("none", "batch_mean"),
    "selection.chosen": ("best", "random", "other"),
    "augmentation.mode": ("append", "mix", "on_top"),
    "pipeline.gold": ("", "synthetic"),
    "plan.stage": ("sft", "train_rm", "attack", "rlhf"),
    "plan.gpu": ("a100_40", "a100_80", "h100", "h200", "b200", "rtx4090"),
    "pipeline.branches.*.pairs": ("attack", "none", "random"),
    "pipeline.rlhf.*.reward": ("r1", "ensemble", "hardened"),
    "pipeline.rlhf.*.aggregate": AGGREGATES,
}


@dataclass(frozen=True)
class Range:
    """An interval of numbers; ``above`` and ``below`` are limits that the value may not touch."""

    at_least: float = -math.inf
    at_most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        return math.isfinite(value) and self.at_least <= value <= self.at_most and self.above < value < self.below

    def __str__(self) -> str:
        names = ("at least", self.at_least), ("above", self.above), ("at most", self.at_most), ("below", self.below)
        return " and ".join(f"{name} {limit:g}" for name, limit in names if math.isfinite(limit)) or "finite"


COUNT = Range(at_least=1)
COUNT_OR_ZERO = Range(at_least=0)
POSITIVE = Range(above=0)
NOT_NEGATIVE = Range(at_least=0)
FRACTION = Range(at_least=0, at_most=1)
BELOW_ONE = Range(at_least=0, below=1)
FINITE = Range()
PORT = Range(at_least=0, at_most=65535)

RANGES: dict[str, Range] = {
    "seed": COUNT_OR_ZERO,
    "trainer.devices": COUNT,
    "trainer.num_nodes": COUNT,
    "trainer.max_steps": Range(at_least=-1),
    "trainer.max_epochs": COUNT,
    "trainer.val_check_interval": COUNT_OR_ZERO,
    "trainer.limit_val_batches": COUNT_OR_ZERO,
    "trainer.log_every_n_steps": COUNT,
    "trainer.gradient_clip_val": NOT_NEGATIVE,
    "trainer.checkpoint_every_n_steps": COUNT_OR_ZERO,
    "trainer.cpu_threads": COUNT_OR_ZERO,
    "trainer.keep_checkpoints": COUNT,
    "trainer.timeout_minutes": POSITIVE,
    "model.num_layers": COUNT,
    "model.hidden_size": COUNT,
    "model.ffn_hidden_size": COUNT_OR_ZERO,
    "model.num_attention_heads": COUNT,
    "model.num_query_groups": COUNT_OR_ZERO,
    "model.kv_channels": COUNT_OR_ZERO,
    "model.layernorm_epsilon": POSITIVE,
    "model.rotary_base": POSITIVE,
    "model.rotary_percent": Range(above=0, at_most=1),
    "model.rope_scaling_factor": Range(at_least=1),
    "model.rope_scaling_low_freq_factor": POSITIVE,
    "model.rope_scaling_high_freq_factor": POSITIVE,
    "model.rope_scaling_original_context": COUNT,
    "model.sliding_window": COUNT_OR_ZERO,
    "model.sliding_window_every": COUNT,
    "model.attention_softcap": NOT_NEGATIVE,
    "model.logit_softcap": NOT_NEGATIVE,
    "model.query_scale": NOT_NEGATIVE,
    "model.embedding_scale": POSITIVE,
    "model.init_method_std": NOT_NEGATIVE,
    "model.hidden_dropout": BELOW_ONE,
    "model.attention_dropout": BELOW_ONE,
    "model.encoder_seq_length": COUNT,
    "model.vocab_size": COUNT_OR_ZERO,
    "model.make_vocab_size_divisible_by": COUNT,
    "model.tensor_model_parallel_size": COUNT,
    "model.pipeline_model_parallel_size": COUNT,
    "model.virtual_pipeline_model_parallel_size": COUNT,
    "model.num_layers_in_first_pipeline_stage": COUNT_OR_ZERO,
    "model.num_layers_in_last_pipeline_stage": COUNT_OR_ZERO,
    "model.context_parallel_size": COUNT,
    "model.recompute_num_layers": COUNT,
    "model.micro_batch_size": COUNT,
    "model.micro_batch_tokens": COUNT,
    "model.global_batch_size": COUNT,
    "model.optim.lr": POSITIVE,
    "model.optim.weight_decay": NOT_NEGATIVE,
    "model.optim.betas": BELOW_ONE,
    "model.optim.eps": POSITIVE,
    "model.optim.sched.warmup_steps": COUNT_OR_ZERO,
    "model.optim.sched.min_lr": NOT_NEGATIVE,
    "precision.bf16_first_last_layers": COUNT_OR_ZERO,
    "data.validation_fraction": Range(above=0, below=1),
    "data.limit_train_rows": COUNT_OR_ZERO,
    "reward_model.centering_coefficient": NOT_NEGATIVE,
    "reward_model.score_l2_coefficient": NOT_NEGATIVE,
    "reward_model.head_init_std": NOT_NEGATIVE,
    "reward_model.num_attributes": COUNT,
    "reward_model.feature_prompts": Range(at_least=2),
    "reward_model.feature_share": Range(above=0, below=1),
    "ensemble.size": COUNT,
    "ensemble.coefficient": NOT_NEGATIVE,
    "remote.timeout_seconds": POSITIVE,
    "remote.deadline_seconds": POSITIVE,
    "remote.connect_seconds": POSITIVE,
    "remote.connections": COUNT,
    "remote.rows_per_request": COUNT,
    "serve.port": PORT,
    "serve.triton_port": PORT,
    "serve.batch_tokens": COUNT,
    "serve.batch_wait_ms": NOT_NEGATIVE,
    "serve.queue_tokens": COUNT,
    "serve.max_samples": COUNT,
    "serve.max_sample_tokens": COUNT_OR_ZERO,
    "serve.max_sample_chars": COUNT,
    "serve.max_body_mib": POSITIVE,
    "serve.max_pending_mib": POSITIVE,
    "serve.max_connections": COUNT,
    "serve.header_seconds": POSITIVE,
    "serve.body_seconds": POSITIVE,
    "serve.idle_seconds": POSITIVE,
    "serve.timeout_seconds": POSITIVE,
    "serve.drain_seconds": NOT_NEGATIVE,
    "sft_statistics.num_prompts": COUNT,
    "sft_statistics.samples_per_prompt": COUNT,
    "adversarial.coefficient": NOT_NEGATIVE,
    "adversarial.penalty": FINITE,
    "adversarial.num_adversaries": COUNT,
    "adversarial.enough": COUNT_OR_ZERO,
    "adversarial.held_out_prompts": COUNT_OR_ZERO,
    "adversarial.raw_penalty": FINITE,
    "adversarial.target_weight": FINITE,
    "adversarial.others_weight": FINITE,
    "adversarial.min_target_score": FINITE,
    "adversarial.target_members": COUNT,
    "rl.max_steps": COUNT,
    "rl.prompts_per_step": COUNT,
    "rl.group_size": COUNT,
    "rl.max_new_tokens": COUNT,
    "rl.temperature": POSITIVE,
    "rl.top_k": COUNT_OR_ZERO,
    "rl.top_p": Range(above=0, at_most=1),
    "rl.kl.coefficient": NOT_NEGATIVE,
    "rl.entropy_coefficient": NOT_NEGATIVE,
    "rl.unended_penalty": FINITE,
    "rl.updates_per_rollout": COUNT,
    "rl.clip_low": BELOW_ONE,
    "rl.clip_high": NOT_NEGATIVE,
    "rl.gamma": FRACTION,
    "rl.gae_lambda": FRACTION,
    "rl.value_clip": NOT_NEGATIVE,
    "rl.critic_lr": POSITIVE,
    "rl.critic_warmup_steps": COUNT_OR_ZERO,
    "rl.evaluation_every": COUNT,
    "rl.held_out_prompts": COUNT_OR_ZERO,
    "rl.held_out_every": COUNT,
    "rl.log_samples": COUNT_OR_ZERO,
    "selection.last_fraction": Range(above=0, at_most=1),
    "selection.threshold_z": FINITE,
    "selection.top_fraction": Range(above=0, at_most=1),
    "selection.per_prompt": COUNT,
    "selection.per_signature": COUNT,
    "selection.max_pairs": COUNT,
    "selection.null_ratio": NOT_NEGATIVE,
    "selection.min_pairs": COUNT_OR_ZERO,
    "augmentation.ratio": BELOW_ONE,
    "augmentation.pairs_per_step": COUNT,
    "augmentation.weight": NOT_NEGATIVE,
    "augmentation.warm_steps": COUNT_OR_ZERO,
    "augmentation.warm_lr": NOT_NEGATIVE,
    "pipeline.rounds": COUNT_OR_ZERO,
    "pipeline.stop_success_rate": FRACTION,
    "pipeline.stable_window": COUNT,
    "pipeline.stable_tolerance": NOT_NEGATIVE,
    "pipeline.plain_members": COUNT,
    "pipeline.branches.*.rounds": COUNT,
    "pipeline.branches.*.coefficient": NOT_NEGATIVE,
    "pipeline.branches.*.plain_members": COUNT,
    "pipeline.rlhf.*.coefficient": NOT_NEGATIVE,
    "pipeline.rlhf.*.round": COUNT_OR_ZERO,
    "pipeline.rlhf.*.kl": NOT_NEGATIVE,
    "pipeline.rlhf.*.seeds": COUNT_OR_ZERO,
    "pipeline.rlhf_seeds": COUNT,
    "synthetic.sft_rows": COUNT,
    "synthetic.preference_pairs": COUNT,
    "synthetic.validation_pairs": COUNT,
    "synthetic.flip_probability": FRACTION,
    "synthetic.min_margin": NOT_NEGATIVE,
    "synthetic.other_prompt": FRACTION,
    "synthetic.other_topic": FRACTION,
    "synthetic.gross_faults": FRACTION,
    "synthetic.flourished": FRACTION,
    "synthetic.sft_flourished": FRACTION,
    "synthetic.taste": NOT_NEGATIVE,
    "synthetic.prompts": COUNT,
    "best_of_n.prompts": COUNT,
    "best_of_n.samples": COUNT,
    "report.kl": POSITIVE,
    "plan.gpus": COUNT_OR_ZERO,
    "plan.efficiency": Range(above=0, at_most=1),
    "plan.reserve_gib": NOT_NEGATIVE,
}


def _values(node: Any, parts: list[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every place that a table key names; the elements of a list one by one."""
    if not parts:
        elements = node if isinstance(node, list) else [node]
        yield from ((prefix, element) for element in elements)
        return
    names = list(node) if parts[0] == ANY_NAME else [parts[0]]
    for name in names:
        child = node[name] if isinstance(node, dict) else getattr(node, name)
        yield from _values(child, parts[1:], f"{prefix}.{name}".lstrip("."))


def _check_architecture(model: ModelConfig) -> None:
    """Keys that are each allowed but do not make a model together."""
    rope = model.position_embedding_type == "rope"
    if not rope and model.rope_scaling:
        raise ConfigError(f"model.rope_scaling={model.rope_scaling}: needs model.position_embedding_type=rope")
    if not rope and model.embedding_scale != 1:
        raise ConfigError(f"model.embedding_scale={model.embedding_scale}: needs model.position_embedding_type=rope")
    rotated = int((model.kv_channels or model.hidden_size // model.num_attention_heads) * model.rotary_percent)
    if rope and (rotated % 2 or not rotated):
        raise ConfigError(
            f"model.rotary_percent={model.rotary_percent}: rotates {rotated} channels of a head, which must be even "
            "and above 0 (model.kv_channels, or model.hidden_size / model.num_attention_heads)"
        )
    low, high = model.rope_scaling_low_freq_factor, model.rope_scaling_high_freq_factor
    if model.rope_scaling and high <= low:
        raise ConfigError(
            f"model.rope_scaling_high_freq_factor={high}: must be above model.rope_scaling_low_freq_factor={low}"
        )
    if model.sliding_window_every > 1 and not model.sliding_window:
        raise ConfigError(f"model.sliding_window_every={model.sliding_window_every}: needs model.sliding_window")


def _check_features(cfg: Config) -> None:
    names = cfg.reward_model.reference_features
    if len(set(names)) < len(names):
        raise ConfigError(f"reward_model.reference_features={names}: names a feature twice")
    if names and cfg.reward_model.loss == "regression":
        raise ConfigError("reward_model.loss=regression: reference_features are weighed on pairs, against one score")


def _check_scoring_deadline(cfg: Config) -> None:
    """The other ranks wait for the scores of a server in a collective, so the server's deadline must end first."""
    limit, deadline = 60 * cfg.trainer.timeout_minutes, cfg.remote.deadline_seconds
    if deadline >= limit and any("://" in member for member in cfg.ensemble.members):
        raise ConfigError(
            f"remote.deadline_seconds={deadline:g}: must be less than trainer.timeout_minutes={limit / 60:g} "
            f"({limit:g} seconds): the other processes wait that long for the scores"
        )


def samples_prompts(cfg: Config) -> bool:
    """Whether prompts are those of the embedded language, of which there are always more, and not those of files."""
    return cfg.pipeline.gold == "synthetic" and not cfg.data.prompts_path and not cfg.data.train_path


def check_held_out(cfg: Config, key: str, count: int) -> None:
    """Raise :class:`ConfigError` when held-out prompts are asked for by ``key`` and there is nowhere to take them from.

    Of the stages that use them: settings of other stages do no harm.
    """
    if count and not cfg.data.held_out_prompts_path and not samples_prompts(cfg):
        raise ConfigError(
            f"{key}={count}: needs data.held_out_prompts_path, a file of prompts that training does not have"
        )


def check_values(cfg: Config) -> None:
    """Raise :class:`ConfigError` that names the key when a value is not one of its choices or out of its range."""
    for pattern, options in CHOICES.items():
        for key, value in _values(cfg, pattern.split(".")):
            if value not in options:
                shown = ", ".join(option or '""' for option in options)
                near = nearest(value, options) or options[-1]
                raise ConfigError(f"{key}={value}: did you mean {near}? choices: {shown}")
    for pattern, allowed in RANGES.items():
        for key, value in _values(cfg, pattern.split(".")):
            if value is not None and value not in allowed:  # None: the schema's own "not set"
                raise ConfigError(f"{key}={value}: must be {allowed}")
    _check_architecture(cfg.model)
    _check_features(cfg)
    _check_scoring_deadline(cfg)
    if len(cfg.model.optim.betas) != 2:
        raise ConfigError(f"model.optim.betas={cfg.model.optim.betas}: must be two numbers")
    if cfg.rl.algorithm in ("rloo", "grpo") and cfg.rl.group_size < 2:
        raise ConfigError(f"rl.group_size={cfg.rl.group_size}: rl.algorithm={cfg.rl.algorithm} needs at least 2")
    tokenizer = cfg.model.tokenizer
    if tokenizer not in ("byte", "synthetic") and not tokenizer.startswith("hf:"):
        raise ConfigError(f"model.tokenizer={tokenizer}: must be byte, synthetic or hf:DIR")
