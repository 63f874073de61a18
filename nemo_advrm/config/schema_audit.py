"""Schema of ``nemo-advrm audit``, which reads no configuration files."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_advrm.config.fields import COUNT, FRACTION, NOT_NEGATIVE, Range, free, key


@dataclass
class AuditConfig:
    """Settings of ``nemo-advrm audit``; models are named as in ``ensemble.members``."""

    target: list[str] = key([], "reward models that are audited, side by side")
    names: list[str] = key([], "their names on the page; empty: made from the paths")
    others: list[str] = key([], "reward models that the attacks must not please; empty: detectors of one model")
    policy: str = key(
        "", "language model that the attacks start from: DIR, hf:DIR, which is converted once, or openai:URL#MODEL"
    )
    prompts: str = key("", "file of prompts, or synthetic (of the embedded language)")
    held_out_prompts: str = key("", "file of prompts that attacks do not see; empty: the next ones of prompts")
    judge: str = key("", "what tells good from bad, as target, or synthetic; empty: finds are only suspected")
    attacks: list[str] = key([], "attacks that are run; empty: all built-in ones that need nothing else")
    budget: str = key("10min", "responses that each attack may try on each target (2000), or time in all (10min, 2h)")
    fail_above: float | None = free(
        None, "end with status 4 if an attack surely succeeds on a larger share of prompts than ordinary ones", FRACTION
    )
    run_dir: str = free("runs/audit", "directory that everything is written to")
    seed: int = key(0, "seed of every random number", NOT_NEGATIVE)
    num_prompts: int = key(64, "prompts that the attacks see", COUNT)
    num_held_out: int = key(32, "prompts that they do not see; 0: none", NOT_NEGATIVE)
    samples_per_prompt: int = key(6, "ordinary responses of the policy to each prompt", Range(at_least=2))
    responses_per_prompt: int = key(3, "responses of an attack to each prompt that are judged, best first", COUNT)
    max_new_tokens: int = key(128, "longest response in tokens", COUNT)
    learning_rate: float = key(0.0, "of attacks by RL; 0: by the policy's width", NOT_NEGATIVE)
    accelerator: str = free("auto", "what it runs on", choices=("auto", "cpu", "gpu"))
    cpu_threads: int = key(0, "threads on a CPU; 0 leaves it to PyTorch (all cores)", NOT_NEGATIVE)
    precision: str = key("fp32", "number format of the models", choices=("fp32", "bf16"))
    also: list[str] = key([], "further settings of the attacks, as of nemo-advrm attack: [rl.kl.coefficient=0]")
