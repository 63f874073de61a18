"""The command ``best_of_n``: proxy and gold of the response that a reward likes best of n; nothing is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_advrm.config.schema import Config
from nemo_advrm.data import inputs
from nemo_advrm.data.tokenizers import Tokenizer, build_tokenizer
from nemo_advrm.engine import runtime
from nemo_advrm.engine.builders import build_policy
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.errors import ConfigError
from nemo_advrm.evaluation.best_of_n_sampling import SAMPLES, best_of_n_prompts, curve_of_reward, sample_best_of_n
from nemo_advrm.rewards.limits import prompts_with_room
from nemo_advrm.rewards.sources import build_gold, load_members, refuse_people
from nemo_advrm.rewards.standardisation import combined, read_statistics
from nemo_advrm.rollouts.run_prompts import encode_prompts
from nemo_advrm.rollouts.types import Prompt
from nemo_advrm.run_directory import run_dir


def main(cfg: Config) -> int:
    """Scores samples of the policy ``pretrained_checkpoint.restore_from_path``, or those of ``best_of_n.samples_path``.

    The reward is that of ``ensemble.members``, combined by ``ensemble.aggregate``.
    """
    given = cfg.best_of_n.samples_path
    if not cfg.ensemble.members:
        raise ConfigError("ensemble.members must name at least one reward model")
    if not given and not cfg.pretrained_checkpoint.restore_from_path:
        raise ConfigError(
            "pretrained_checkpoint.restore_from_path is not set: name the policy to sample, or set "
            "best_of_n.samples_path to the samples of an earlier run"
        )
    several = len(cfg.ensemble.members) > 1 and cfg.ensemble.standardise
    if several and not cfg.ensemble.reference_path:
        raise ConfigError(
            "ensemble.reference_path is not set: several members are standardised by SFT responses; name the "
            "reference.jsonl of an attack on them, or set ensemble.standardise=false"
        )
    refuse_people(cfg, "best_of_n")
    run_dir.start(cfg)
    directory = Path(cfg.run_dir)
    tokenizer = build_tokenizer(cfg.model.tokenizer)
    members = load_members(cfg, cfg.ensemble.members, tokenizer)
    prompts = [] if given else prompts_with_room(_own_prompts(cfg, tokenizer), tokenizer.fingerprint, members, cfg)
    run_dir.claim(cfg, directory, "best_of_n")
    statistics = None
    if several:
        statistics = read_statistics(Path(cfg.ensemble.reference_path), members, "ensemble.reference_path")
    reward = combined(members, cfg.ensemble.aggregate, cfg.ensemble.coefficient, statistics, directory)
    home = directory / "best_of_n"
    samples = Path(given) if given else home / SAMPLES
    if not given and not run_on_rank_zero(samples.exists):
        policy = build_policy(cfg, tokenizer, cfg.pretrained_checkpoint.restore_from_path, 0, trainable=False)
        sample_best_of_n(cfg, tokenizer, samples, policy, prompts, build_gold(cfg, tokenizer))
    curve = curve_of_reward(cfg, tokenizer, home / f"{cfg.best_of_n.name}.json", samples, reward)
    if runtime.current().is_writer:
        print("\n".join(_table(curve)))
        print(f"curve: {home / cfg.best_of_n.name}.json  samples: {samples}")
    return 0


def _own_prompts(cfg: Config, tokenizer: Tokenizer) -> list[Prompt]:
    """Returns the held-out prompts, or the prompts configured for RLHF, because this command trains on none."""
    if cfg.data.held_out_prompts_path or not (cfg.data.prompts_path or cfg.data.train_path):
        return best_of_n_prompts(cfg, tokenizer, [])
    return encode_prompts(inputs.prompts(cfg)[: cfg.best_of_n.prompts], tokenizer, cfg)


def _table(curve: dict[str, Any]) -> list[str]:
    """Returns the curve as lines of a table."""
    lines = ["     n  KL (nats)    proxy     gold"]
    for n, kl, proxy, gold in zip(curve["n"], curve["kl"], curve["proxy"], curve["gold"], strict=True):
        lines.append(f"{n:6d}  {kl:9.2f}  {proxy:7.2f}  " + ("      –" if gold is None else f"{gold:7.2f}"))
    return lines
