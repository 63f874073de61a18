"""Checks the values of a configuration: limits and choices of the schema, and keys that do not go together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from nemo_advrm.config.keys import ANY_NAME, all_keys
from nemo_advrm.config.schema import Config, JudgeConfig, ModelConfig
from nemo_advrm.endpoints import parse_endpoint
from nemo_advrm.errors import ConfigError
from nemo_advrm.nearest_name import nearest_name
from nemo_advrm.registry import ATTACKS, DETECTORS, PREFERENCE_LOSSES, ROLLOUT_ENGINES


def _values(node: Any, parts: list[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every place that a pattern of keys names; the elements of a list one by one."""
    if not parts:
        elements = node if isinstance(node, list) else [node]
        yield from ((prefix, element) for element in elements)
        return
    names = list(node) if parts[0] == ANY_NAME else [parts[0]]
    for name in names:
        child = node[name] if isinstance(node, dict) else getattr(node, name)
        yield from _values(child, parts[1:], f"{prefix}.{name}".lstrip("."))


def _check_architecture(model: ModelConfig) -> None:
    """Raise ConfigError for keys that are allowed alone, but not together."""
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


def _check_adapters(model: ModelConfig) -> None:
    targets = model.lora.targets
    if not targets or len(set(targets)) < len(targets):
        raise ConfigError(f"model.lora.targets={targets}: must name at least one layer, and each once")


def _check_experts(model: ModelConfig) -> None:
    experts, chosen = model.num_moe_experts, model.moe_router_topk
    if not experts:
        return
    if chosen > experts:
        raise ConfigError(f"model.moe_router_topk={chosen}: there are only model.num_moe_experts={experts}")
    if chosen == 1 and model.moe_norm_topk_prob:
        raise ConfigError("model.moe_router_topk=1: needs model.moe_norm_topk_prob=false, or its weight is always 1")
    if model.peft == "lora":
        raise ConfigError(f"model.peft=lora: experts have no adapters (model.num_moe_experts={experts})")
    if model.bias:
        raise ConfigError(f"model.bias=true: experts have no biases (model.num_moe_experts={experts})")


def _check_features(cfg: Config) -> None:
    names = cfg.reward_model.reference_features
    if len(set(names)) < len(names):
        raise ConfigError(f"reward_model.reference_features={names}: names a feature twice")
    if names and cfg.reward_model.loss == "regression":
        raise ConfigError("reward_model.loss=regression: reference_features are weighed on pairs, against one score")


def _check_share(cfg: Config) -> None:
    """Raise ConfigError for what members that share a base or a trunk cannot have."""
    if cfg.ensemble.share == "none":
        return
    key = f"ensemble.share={cfg.ensemble.share}"
    if cfg.ensemble.own_trunk:
        raise ConfigError(f"{key}: ensemble.own_trunk=true gives each member a trunk of its own")
    if cfg.ensemble.share == "lora":
        if cfg.model.num_moe_experts:
            raise ConfigError(f"{key}: experts have no adapters (model.num_moe_experts={cfg.model.num_moe_experts})")
        return
    if cfg.reward_model.loss == "regression":
        raise ConfigError(f"{key}: each member has one output, reward_model.loss=regression has one for each label")
    if cfg.reward_model.reference_features:
        raise ConfigError(f"{key}: reward_model.reference_features are not fitted to heads of one trunk; set it to []")


def _check_augmentation(cfg: Config) -> None:
    if cfg.augmentation.method == "rrm" and cfg.reward_model.loss == "regression":
        raise ConfigError("reward_model.loss=regression: the pairs of augmentation.method=rrm have no labels to learn")


def _check_scoring_deadline(cfg: Config) -> None:
    """The other ranks wait for a server's start and its answers in a collective, so its limits must end first."""
    limit = 60 * cfg.trainer.timeout_minutes
    servers = [text for text in [*cfg.ensemble.members, cfg.pipeline.gold] if "://" in text]
    for section, used in (
        ("remote", any(not text.startswith("openai:") for text in servers)),
        ("judge", any(text.startswith("openai:") for text in servers)),
        ("policy_server", cfg.rl.rollout_engine == "openai"),
    ):
        for key in ("deadline_seconds", "connect_seconds"):
            seconds = getattr(getattr(cfg, section), key)
            if used and seconds >= limit:
                raise ConfigError(
                    f"{section}.{key}={seconds:g}: must be less than trainer.timeout_minutes={limit / 60:g} "
                    f"({limit:g} seconds): the other processes wait that long for the answers"
                )


def _check_served_policy(cfg: Config) -> None:
    """Raise ConfigError for a policy that is to learn from a served one, and cannot."""
    served, start = cfg.policy_server.policy, cfg.pretrained_checkpoint.restore_from_path
    if not served:
        return
    if cfg.rl.rollout_engine != "openai":
        raise ConfigError(f"policy_server.policy={served}: is asked by rl.rollout_engine=openai alone")
    if not served.startswith("openai:"):
        raise ConfigError(f"policy_server.policy={served}: must be openai:URL#MODEL")
    parse_endpoint(served.removeprefix("openai:"), served, "policy_server.policy", "policy_server.key_variable")
    if start.startswith(("openai:", "hf:")):
        raise ConfigError(
            f"pretrained_checkpoint.restore_from_path={start}: must be the local copy of policy_server.policy, which "
            "is trained (nemo-advrm convert from=hf makes it)"
        )
    if cfg.rl.algorithm == "ppo":
        raise ConfigError(
            "rl.algorithm=ppo: its critic would learn the value of what the served policy does next; policy_server."
            "policy needs rloo, reinforce or grpo"
        )
    least, responses = cfg.policy_server.min_ess, cfg.rl.prompts_per_step * cfg.rl.group_size
    if cfg.policy_server.importance == "response" and least and responses * least <= 1:
        raise ConfigError(
            f"policy_server.min_ess={least:g}: an effective sample size is at least one of the {responses} responses "
            "of a step, which is not below it: policy_server.importance=response needs more (rl.prompts_per_step x "
            "rl.group_size), or min_ess=0, which never ends a training"
        )


def check_key_variable(section: str, variable: str) -> None:
    """Raise ConfigError, which does not show it, for a ``key_variable`` that is no name of an environment variable."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        # what stands there may be the key itself, which neither a message nor config.yaml may show
        raise ConfigError(
            f"{section}.key_variable must be the name of an environment variable, not the key itself (what it is now "
            "is not shown here)"
        )


def check_judge(options: JudgeConfig) -> None:
    """Raise ConfigError for settings of a judge that contradict each other, or that hold its key."""
    check_key_variable("judge", options.key_variable)
    if options.lowest >= options.highest:
        raise ConfigError(f"judge.lowest={options.lowest}: must be below judge.highest={options.highest}")


def samples_prompts(cfg: Config) -> bool:
    """Whether prompts are sampled from the embedded language (as many as are wanted) instead of read from files."""
    return cfg.pipeline.gold == "synthetic" and not cfg.data.prompts_path and not cfg.data.train_path


def check_held_out(cfg: Config, key: str, count: int) -> None:
    """Raise :class:`ConfigError` when ``key`` asks for held-out prompts and no file or generator provides them.

    Called by the commands that use them, since the settings of other commands do no harm.
    """
    if count and not cfg.data.held_out_prompts_path and not samples_prompts(cfg):
        raise ConfigError(
            f"{key}={count}: needs data.held_out_prompts_path, a file of prompts that training does not have"
        )


def check_fields(cfg: Any) -> None:
    """Raise :class:`ConfigError` that names the key when a value is not one of its choices or outside its limits.

    ``cfg`` is an object of any class of the schema.
    """
    root: Any = type(cfg)
    for pattern, key in all_keys(root).items():
        limits, choices = key.about.limits, key.about.choices
        if limits is None and not choices:
            continue
        for name, value in _values(cfg, pattern.split(".")):
            if choices and value not in choices:
                shown = ", ".join(choice or '""' for choice in choices)
                near = nearest_name(value, list(choices)) or list(choices)[-1]
                raise ConfigError(f"{name}={value}: did you mean {near}? choices: {shown}")
            if limits is not None and value is not None and value not in limits:  # None: the schema's own "not set"
                raise ConfigError(f"{name}={value}: must be {limits}")


def check_values(cfg: Config) -> None:
    """Raise :class:`ConfigError` that names the key of a value that is not allowed, alone or beside others."""
    check_fields(cfg)
    PREFERENCE_LOSSES.check(cfg.reward_model.loss)
    DETECTORS.check(cfg.adversarial.detector)
    DETECTORS.check(cfg.rl.penalty_detector, "rl.penalty_detector")
    for name in cfg.detector.monitors:
        if name != "auto":
            DETECTORS.check(name, "detector.monitors")
    ATTACKS.check(cfg.adversarial.attack)
    ROLLOUT_ENGINES.check(cfg.rl.rollout_engine)
    _check_architecture(cfg.model)
    _check_adapters(cfg.model)
    _check_experts(cfg.model)
    _check_features(cfg)
    _check_share(cfg)
    _check_augmentation(cfg)
    _check_scoring_deadline(cfg)
    _check_served_policy(cfg)
    check_judge(cfg.judge)
    check_key_variable("policy_server", cfg.policy_server.key_variable)
    if len(cfg.model.optim.betas) != 2:
        raise ConfigError(f"model.optim.betas={cfg.model.optim.betas}: must be two numbers")
    if not cfg.adversarial.target_members:
        raise ConfigError("adversarial.target_members=[]: names no member to attack")
    if cfg.rl.algorithm in ("rloo", "grpo") and cfg.rl.group_size < 2:
        raise ConfigError(f"rl.group_size={cfg.rl.group_size}: rl.algorithm={cfg.rl.algorithm} needs at least 2")
    tokenizer = cfg.model.tokenizer
    if tokenizer not in ("byte", "synthetic") and not tokenizer.startswith("hf:"):
        raise ConfigError(f"model.tokenizer={tokenizer}: must be byte, synthetic or hf:DIR")
