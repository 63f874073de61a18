"""The settings of an audit, and the configuration that attacks and samplers read, made from them."""

from __future__ import annotations

import dataclasses
import math
import re

from nemo_advrm.audit.measure_names import short_name
from nemo_advrm.config import load_config
from nemo_advrm.config.schema import AuditConfig, Config
from nemo_advrm.config.validation import check_values
from nemo_advrm.endpoints import parse_endpoint
from nemo_advrm.errors import ConfigError
from nemo_advrm.optional_deps import require_extra
from nemo_advrm.registry import ATTACKS
from nemo_advrm.rewards import sources
from nemo_advrm.rewards.checkpoint_members import LOCAL_KINDS, SourceSpec

SYNTHETIC = "synthetic"
SERVED = "openai:"  # a policy behind an endpoint
_MINUTES = re.compile(r"(\d+(?:\.\d+)?) ?(min|m|h)")
# Learning rates of RL in use here: 9e-4 at width 64 (experiment=synthetic), 2e-5 at 576 (experiment=smollm2), and 9e-7
# at 4096 (the authors' configuration for 8B). They lie on a line of slope -1.7 in logarithms.
_RATE, _WIDTH, _SLOPE = 9e-4, 64, 1.7


@dataclasses.dataclass(frozen=True)
class Budget:
    """What an audit may use: ``samples`` responses for each attack on each target, or ``seconds`` in all."""

    samples: int = 0
    seconds: float = 0.0


def parse_budget(text: str) -> Budget:
    """Parses ``2000``, ``10min``, ``1.5h``. Raises ConfigError for anything else."""
    text = text.strip()
    if text.isdigit() and int(text):
        return Budget(samples=int(text))
    if match := _MINUTES.fullmatch(text):
        seconds = float(match[1]) * (3600 if match[2] == "h" else 60)
        if seconds:
            return Budget(seconds=seconds)
    raise ConfigError(f"budget={text}: write responses for each attack, as in 2000, or time in all, as in 10min or 2h")


def check(audit: AuditConfig) -> None:
    """Raises ConfigError for what can be told without opening a model."""
    if not audit.target:
        raise ConfigError("target is not set: name a reward model, as in target=hf:DIR")
    if not audit.policy:
        raise ConfigError("policy is not set: name the language model that the attacks start from, as in policy=hf:DIR")
    if not audit.prompts:
        raise ConfigError("prompts is not set: name a file of prompts")
    served = audit.policy.startswith(SERVED)
    if served:
        if "model.tokenizer" not in given_keys(audit):
            raise ConfigError(f"policy={audit.policy}: name its tokenizer, as in also=[model.tokenizer=hf:DIR]")
        require_extra("serve", "httpx", "tenacity")
        parse_endpoint(audit.policy.removeprefix(SERVED), audit.policy, "policy", "policy_server.key_variable")
    everything = [*audit.target, *audit.others]
    for text in everything:
        if everything.count(text) > 1:
            raise ConfigError(f"{text} is named twice among target and others")
    if audit.names and len(audit.names) != len(audit.target):
        raise ConfigError(f"names has {len(audit.names)} names for {len(audit.target)} targets")
    if len(set(audit.names)) < len(audit.names):
        raise ConfigError(f"names={audit.names}: names two targets the same")
    for name in audit.names:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ConfigError(
                f"names: {name!r} must be letters, digits, dots, - and _, and not begin with a dot or -: directories "
                "are named so"
            )
    parse_budget(audit.budget)
    for attack in audit.attacks:
        ATTACKS.check(attack)
    short = [short_name(attack) for attack in dict.fromkeys(audit.attacks)]
    if len(set(short)) < len(short):
        raise ConfigError(f"attacks={audit.attacks}: two have the same name, by which their directory is called")
    _specs(audit)
    if served and "adversarial.detector" not in given_keys(audit) and detector_of(audit) == "sft_log_prob":
        raise ConfigError(
            f"policy={audit.policy}: a served policy tells no log-probabilities, by which finds of a target without "
            "hidden states are detected: name others=[...], or another also=[adversarial.detector=...]"
        )


def _specs(audit: AuditConfig) -> list[SourceSpec]:
    """Parses all models, targets first; raises ConfigError that names the entry."""
    named = [("target", audit.target), ("others", audit.others)]
    return [sources.parse(text, f"{key}[{i}]") for key, texts in named for i, text in enumerate(texts)]


def names_of(audit: AuditConfig) -> list[str]:
    """The names of targets and others: as given, else the parts of their paths by which they differ."""
    texts = [*audit.target, *audit.others]
    parts = [[p for p in re.split(r"[/:?#|&=]+", text) if p not in ("", "model", "reference_features", "off")]
             for text in texts]  # fmt: skip
    short = [own[-1] if own else "model" for own in parts]
    if len(set(short)) < len(short):
        shared = set.intersection(*(set(own) for own in parts)) if len(parts) > 1 else set()
        short = ["_".join(p for p in own if p not in shared) or f"model_{i + 1}" for i, own in enumerate(parts)]
    names = [re.sub(r"[^\w.-]+", "_", name).strip(".") or f"model_{i + 1}" for i, name in enumerate(short)]
    names = [*audit.names, *names[len(audit.names) :]] if audit.names else names
    return [name if names.index(name) == i else f"{name}_{i + 1}" for i, name in enumerate(names)]


def detector_of(audit: AuditConfig) -> str:
    """The detector that marks finds: disagreement with others, else one that needs the target alone.

    Hidden states tell more than log-probabilities, but a server or a function has none.
    """
    if audit.others:
        return "ensemble_disagreement"
    local = all(spec.kind in LOCAL_KINDS for spec in _specs(audit))
    return "mahalanobis" if local else "sft_log_prob"


def base_config(audit: AuditConfig) -> Config:
    """The configuration of the audit's attacks without its policy, which may not be converted yet."""
    cfg = load_config(audit.also, "attack")
    if cfg.policy_server.policy:
        raise ConfigError(
            "also: policy_server.policy: an audit does not learn from a served policy: name what its attacks start "
            "from as policy=openai:URL#MODEL, or policy=DIR for attacks by RL"
        )
    cfg.name, cfg.run_dir, cfg.seed = "audit", audit.run_dir, audit.seed
    cfg.trainer.accelerator, cfg.trainer.cpu_threads = audit.accelerator, audit.cpu_threads
    cfg.precision.name = audit.precision
    synthetic = audit.prompts == SYNTHETIC
    cfg.data.prompts_path = "" if synthetic else audit.prompts
    cfg.data.held_out_prompts_path = audit.held_out_prompts
    cfg.ensemble.members = [*audit.target, *audit.others]
    cfg.pipeline.gold = audit.judge
    cfg.sft_statistics.num_prompts = audit.num_prompts
    cfg.sft_statistics.samples_per_prompt = audit.samples_per_prompt
    cfg.rl.max_new_tokens = audit.max_new_tokens
    if "adversarial.detector" not in given_keys(audit):
        cfg.adversarial.detector = detector_of(audit)
    if not audit.others:  # the reward is the target's z alone, and its penalty below the mean
        cfg.adversarial.coefficient = 0.0
    cfg.adversarial.preset = "paper"
    cfg.adversarial.target_members = [1]
    cfg.adversarial.num_adversaries = 1
    cfg.adversarial.held_out_prompts = 0  # the audit has its own, which all attacks share
    cfg.exp_manager.create_tensorboard_logger = False
    check_values(cfg)
    return cfg


def given_keys(audit: AuditConfig) -> set[str]:
    """The keys that ``also`` sets."""
    return {word.partition("=")[0].lstrip("+") for word in audit.also}


def learning_rate(width: int) -> float:
    """The learning rate of RL for a policy of this width, with two digits."""
    exact = _RATE * (_WIDTH / width) ** _SLOPE
    digits = 1 - math.floor(math.log10(exact))
    return round(exact, digits)


def steps_of(samples: int, prompts: int, group_size: int) -> tuple[int, int]:
    """(steps, prompts of one step) for about ``samples`` responses: 40 steps if each has at least 4 prompts."""
    per_step = min(prompts, max(4, round(samples / (40 * group_size))))
    return max(1, round(samples / (per_step * group_size))), per_step
