"""The command ``rlhf``: trains a policy against a reward and tracks the gold reward, if there is one."""

from __future__ import annotations

from pathlib import Path

from nemo_advrm.config.schema import Config
from nemo_advrm.config.validation import check_held_out
from nemo_advrm.data.tokenizers import Tokenizer, build_tokenizer
from nemo_advrm.engine import runtime
from nemo_advrm.errors import ConfigError
from nemo_advrm.objectives.sft_statistics import MemberStatistics
from nemo_advrm.rewards.base import RewardSource
from nemo_advrm.rewards.detector_features import FeatureReader
from nemo_advrm.rewards.limits import prompts_with_room
from nemo_advrm.rewards.sft_responses import sample_sft_scores
from nemo_advrm.rewards.sources import build_gold, load_members
from nemo_advrm.rewards.standardisation import combined, read_statistics
from nemo_advrm.rollouts.run_prompts import encode_prompts, rlhf_prompts
from nemo_advrm.rollouts.types import Prompt
from nemo_advrm.run_directory import run_dir
from nemo_advrm.seeds import derive_seed
from nemo_advrm.training.rlhf_training import run_rlhf


def main(cfg: Config) -> int:
    """Trains into ``run_dir/model`` against ``ensemble.members`` combined by ``ensemble.aggregate``."""
    if not cfg.ensemble.members:
        raise ConfigError("ensemble.members must name at least one reward model")
    if not cfg.pretrained_checkpoint.restore_from_path:
        raise ConfigError("pretrained_checkpoint.restore_from_path is not set: name the policy RLHF starts from")
    check_held_out(cfg, "rl.held_out_prompts", cfg.rl.held_out_prompts)
    run_dir.start(cfg)
    directory = Path(cfg.run_dir)
    tokenizer = build_tokenizer(cfg.model.tokenizer)
    prompts = encode_prompts(rlhf_prompts(cfg), tokenizer, cfg)
    members = load_members(cfg, cfg.ensemble.members, tokenizer)
    prompts = prompts_with_room(prompts, tokenizer.fingerprint, members, cfg)
    run_dir.claim(cfg, directory, "rlhf")
    statistics = _statistics(cfg, tokenizer, directory, prompts, members)
    reward = combined(members, cfg.ensemble.aggregate, cfg.ensemble.coefficient, statistics, directory)
    metrics = run_rlhf(cfg, tokenizer, directory, prompts, reward, build_gold(cfg, tokenizer), cfg.seed, "rlhf")
    if runtime.current().is_writer:
        gold = f"  gold {metrics['gold']:.3f}" if "gold" in metrics else ""
        print(f"reward {metrics['proxy']:.3f}{gold}  kl {metrics['kl']:.2f}\npolicy: {directory / 'model'}")
    return 0


def _statistics(
    cfg: Config, tokenizer: Tokenizer, directory: Path, prompts: list[Prompt], members: list[RewardSource]
) -> MemberStatistics | None:
    """Returns the statistics that standardise several members, None for one member or raw scores.

    They are those of ``ensemble.reference_path``, else of responses of the initial policy, which are sampled once into
    ``directory/reference.jsonl``, as in an attack.
    """
    if len(members) < 2 or not cfg.ensemble.standardise:
        return None
    if cfg.ensemble.reference_path:
        return read_statistics(Path(cfg.ensemble.reference_path), members, "ensemble.reference_path")
    path = directory / "reference.jsonl"
    seed, reader = derive_seed(cfg.seed, "reference"), FeatureReader(members)
    sample_sft_scores(cfg, tokenizer, path, prompts[: cfg.sft_statistics.num_prompts], reader, None, seed)
    return read_statistics(path, members, "reference")
