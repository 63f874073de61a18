"""The command ``rlhf``: trains a policy against a reward and tracks the gold reward, if there is one."""

from __future__ import annotations

from pathlib import Path

from nemo_advrm.config.schema import Config
from nemo_advrm.config.validation import check_held_out
from nemo_advrm.data.tokenizers import Tokenizer, build_tokenizer
from nemo_advrm.engine import runtime
from nemo_advrm.errors import ConfigError
from nemo_advrm.models.off_policy import ESS, MEAN_RATIO, PREFIX
from nemo_advrm.rewards.base import RewardSource
from nemo_advrm.rewards.detector_features import FeatureReader
from nemo_advrm.rewards.ensemble import UncertaintyReward
from nemo_advrm.rewards.hybrid import Opened, open_sft_policy
from nemo_advrm.rewards.limits import prompts_with_room
from nemo_advrm.rewards.monitor import KEY as MONITOR_KEY
from nemo_advrm.rewards.monitor import build_monitor, check_members
from nemo_advrm.rewards.sft_responses import sample_sft_scores
from nemo_advrm.rewards.sources import build_gold, load_members, refuse_people
from nemo_advrm.rewards.standardisation import combined, member_statistics, read_responses
from nemo_advrm.rewards.watch_list import watching_detectors
from nemo_advrm.rollouts.base import check_trainable
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
    check_trainable(cfg, "rlhf")
    if cfg.policy_server.policy and not cfg.rl.held_out_prompts:
        raise ConfigError(
            "rl.held_out_prompts=0: policy_server.policy needs some, since only to them the trained policy answers "
            "itself: the reward, gold and kl of the steps are those of what the server writes"
        )
    check_held_out(cfg, "rl.held_out_prompts", cfg.rl.held_out_prompts)
    refuse_people(cfg, "rlhf")
    check_members(cfg, watching_detectors(cfg, len(cfg.ensemble.members)))
    run_dir.start(cfg)
    directory = Path(cfg.run_dir)
    tokenizer = build_tokenizer(cfg.model.tokenizer)
    prompts = encode_prompts(rlhf_prompts(cfg), tokenizer, cfg)
    opened: Opened = {}
    members = load_members(cfg, cfg.ensemble.members, tokenizer, opened)
    prompts = prompts_with_room(prompts, tokenizer.fingerprint, members, cfg)
    run_dir.claim(cfg, directory, "rlhf")
    reward = _reward(cfg, tokenizer, directory, prompts, members, opened)
    metrics = run_rlhf(cfg, tokenizer, directory, prompts, reward, build_gold(cfg, tokenizer), cfg.seed, "rlhf")
    if runtime.current().is_writer:
        served = bool(cfg.policy_server.policy)
        print(_served_lines(metrics) if served else _figures(metrics, ""), f"policy: {directory / 'model'}", sep="\n")
    return 0


def _figures(metrics: dict[str, float], prefix: str) -> str:
    gold = f"  gold {metrics[prefix + 'gold']:.3f}" if prefix + "gold" in metrics else ""
    return f"reward {metrics[prefix + 'proxy']:.3f}{gold}  kl {metrics[prefix + 'kl']:.2f}"


def _served_lines(metrics: dict[str, float]) -> str:
    """What the trained policy reaches; the figures without a prefix are those of what the server wrote."""
    ess, ratio = metrics[ESS], metrics[MEAN_RATIO]
    return (
        f"held-out prompts: {_figures(metrics, 'held_out/')}\n"
        f"estimated from the served policy's responses: {_figures(metrics, PREFIX)} "
        f"(effective sample size {ess:.3f}, mean ratio {ratio:.3g})"
    )


def _reward(
    cfg: Config,
    tokenizer: Tokenizer,
    directory: Path,
    prompts: list[Prompt],
    members: list[RewardSource],
    opened: Opened,
) -> UncertaintyReward:
    """Returns the members as one reward, with the detectors that watch it.

    SFT responses standardise several members (or one, beside a detector's penalty) and fit the detectors. They are
    those of ``ensemble.reference_path``, else responses of the initial policy, which are sampled once into
    ``directory/reference.jsonl``, as in an attack.
    """
    aggregate, coefficient = cfg.ensemble.aggregate, cfg.ensemble.coefficient
    detectors = watching_detectors(cfg, len(members))
    one_too = cfg.rl.detector_penalty > 0
    standardised = cfg.ensemble.standardise and (len(members) > 1 or one_too)
    if not standardised and not detectors:
        return combined(members, aggregate, coefficient, None, directory)
    start = cfg.pretrained_checkpoint.restore_from_path
    sft_policy = open_sft_policy(cfg, tokenizer, start, opened, detectors)
    path, key = Path(cfg.ensemble.reference_path), "ensemble.reference_path"
    if not cfg.ensemble.reference_path:
        path, key = directory / "reference.jsonl", "reference"
        reader = FeatureReader(members, detectors, range(len(members)), sft_policy, MONITOR_KEY)
        seed = derive_seed(cfg.seed, "reference")
        sample_sft_scores(cfg, tokenizer, path, prompts[: cfg.sft_statistics.num_prompts], reader, None, seed)
    sft_responses = read_responses(path, members, key, detectors)
    statistics = member_statistics(sft_responses) if standardised else None
    monitor = build_monitor(cfg, members, sft_responses, detectors, sft_policy)
    return combined(members, aggregate, coefficient, statistics, directory, one_too, monitor)
