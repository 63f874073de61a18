"""The branches of a pipeline, which harden the members of round 0 in different ways, and their directories."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from nemo_advrm.config.schema import BranchConfig, Config, RLHFRunConfig
from nemo_advrm.errors import ConfigError
from nemo_advrm.rewards.watch_list import DISAGREEMENT, watching_detectors

MAIN = ""  # the name of the main rounds
WITHOUT_ATTACK = ("none", "rrm")  # kinds of pairs that need no attack on the members


def labels_by_gold(cfg: Config) -> bool:
    """Returns whether the preference pairs are those of the embedded language, labelled by simulated annotators."""
    return cfg.pipeline.gold == "synthetic" and not cfg.data.train_path


def all_branches(cfg: Config) -> dict[str, BranchConfig]:
    """Returns the main rounds and every branch of ``pipeline.branches``, by name."""
    main = BranchConfig(rounds=cfg.pipeline.rounds, plain_members=cfg.pipeline.plain_members)
    return {MAIN: main, **cfg.pipeline.branches}


def home(branch: str, number: int) -> str:
    """Returns the directory of a round, relative to the run directory."""
    return f"round_{number}" if branch == MAIN else f"branches/{branch}/round_{number}"


def attack_home(cfg: Config, branch: str, number: int) -> str:
    """Returns the directory of a round's SFT responses, attack and pairs, relative to the run directory.

    A branch that attacks the same members in the same way as the main rounds shares their round 0.
    """
    options, main = all_branches(cfg)[branch], all_branches(cfg)[MAIN]
    is_shared = (
        number == 0
        and options.pairs == "attack"
        and _lambda(cfg, options) == _lambda(cfg, main)
        and set(options.plain_members) == set(main.plain_members)
        and not _own_members(cfg, options)
    )
    return home(MAIN if is_shared else branch, number)


def is_attacked(cfg: Config, branch: str, number: int) -> bool:
    """Returns whether the members of a round score SFT responses, for attacks or random pairs of the branch's own."""
    options = all_branches(cfg)[branch]
    wanted = (number < options.rounds or branch == MAIN) and options.pairs not in WITHOUT_ATTACK
    return wanted and attack_home(cfg, branch, number) == home(branch, number)


def member_step(cfg: Config, branch: str, number: int, member: int) -> str:
    """Returns the name of the step that trains a member of a round, which is also its directory."""
    own = number > 0 or (member > 1 and _own_members(cfg, all_branches(cfg)[branch]))
    name = "rm" if cfg.ensemble.share == "trunk" else f"rm_{member}"
    return f"{home(branch if own else MAIN, number)}/{name}"


def member_steps(cfg: Config, branch: str, number: int) -> tuple[str, ...]:
    """Returns the names of the steps that train all members of a round, R_1 first; one step trains those of a trunk."""
    return tuple(dict.fromkeys(member_step(cfg, branch, number, k) for k in range(1, cfg.ensemble.size + 1)))


def member_models(cfg: Config, branch: str, number: int) -> list[str]:
    """Returns the members of a round as ``ensemble.members`` names them, relative to the run directory; R_1 first."""
    models = [f"{member_step(cfg, branch, number, k)}/model" for k in range(1, cfg.ensemble.size + 1)]
    if cfg.ensemble.share != "trunk":
        return models
    return [f"{model}?head={k}" for k, model in enumerate(models, 1)]


def trunk_step(cfg: Config, branch: str, member: int) -> str:
    """Returns the name of the step that trains the SFT policy a member starts from."""
    own = cfg.ensemble.own_trunk or all_branches(cfg)[branch].own_trunk
    return f"sft_{member}" if own and member > 1 else "sft"


def last_round(cfg: Config, branch: str, detail: Callable[[str, str], Any]) -> int:
    """Returns the last round whose reward models are trained; ``detail(step, key)`` reads ``state.json``."""
    rounds = all_branches(cfg)[branch].rounds
    ended = (n for n in range(rounds) if detail(f"{attack_home(cfg, branch, n)}/select", "stop"))
    return next(ended, rounds)


def arm_round(cfg: Config, arm: RLHFRunConfig) -> int:
    """Returns the round of the members of an arm's reward, as if no round ended its branch early."""
    rounds = all_branches(cfg)[arm.branch].rounds
    if arm.round is not None:
        return arm.round
    return rounds if arm.reward == "hardened" else 0


def is_standardised(cfg: Config, arm: RLHFRunConfig) -> bool:
    """Returns whether an arm's reward combines z-scores, which need the scores of round 0's SFT responses."""
    if arm.standardise:
        return True
    return cfg.ensemble.standardise and (arm.reward == "ensemble" or detector_penalty(cfg, arm) > 0)


def detector_penalty(cfg: Config, arm: RLHFRunConfig) -> float:
    """Returns the weight of the detector's penalty in an arm's RLHF."""
    if arm.detector_penalty is not None:
        return arm.detector_penalty
    # not for_stage, which takes 0.1 s: this is asked for every arm whenever the steps are listed
    weight: float = cfg.stage.rlhf.get("rl", {}).get("detector_penalty", cfg.rl.detector_penalty)
    return weight


def is_watched(cfg: Config, arm: RLHFRunConfig) -> bool:
    """Returns whether detectors watch an arm's RLHF; they are fitted to round 0's SFT responses."""
    return bool(watching_detectors(_rlhf_settings(cfg, arm), cfg.ensemble.size if arm.reward == "ensemble" else 1))


def observers(cfg: Config, arm: RLHFRunConfig) -> int:
    """Returns how many members besides those of the reward are scored: the others, for the disagreement about R_1.

    Other branches than the main rounds may have trained R_1 alone.
    """
    wanted = DISAGREEMENT in watching_detectors(_rlhf_settings(cfg, arm), 1)
    return cfg.ensemble.size - 1 if wanted and arm.reward != "ensemble" and arm.branch == MAIN else 0


def used_members(cfg: Config, arm: RLHFRunConfig, number: int) -> tuple[str, ...]:
    """Returns the training steps of the members of a round that an arm uses: those of its reward, and observers."""
    count = None if arm.reward == "ensemble" else 1 + observers(cfg, arm)
    return member_steps(cfg, arm.branch, number)[:count]


def _rlhf_settings(cfg: Config, arm: RLHFRunConfig) -> Config:
    """Returns ``cfg`` with what an arm's RLHF sets for detectors."""
    own = cfg.stage.rlhf
    return replace(
        cfg,
        detector=replace(cfg.detector, **own.get("detector", {})),
        ensemble=replace(cfg.ensemble, **own.get("ensemble", {})),
        rl=replace(
            cfg.rl,
            detector_penalty=detector_penalty(cfg, arm),
            penalty_detector=own.get("rl", {}).get("penalty_detector", cfg.rl.penalty_detector),
        ),
    )


def check(cfg: Config) -> None:
    """Raises ConfigError for impossible branches and arms."""
    known = all_branches(cfg)
    if cfg.ensemble.own_trunk and not cfg.pipeline.sft:
        raise ConfigError("ensemble.own_trunk=true: needs pipeline.sft=true, which trains the SFT policies")
    if cfg.ensemble.share == "trunk" and cfg.pipeline.other_member_steps:
        raise ConfigError(
            f"pipeline.other_member_steps={cfg.pipeline.other_member_steps}: members on one trunk "
            "(ensemble.share=trunk) are trained together"
        )
    if cfg.ensemble.share == "trunk" and labels_by_gold(cfg) and cfg.augmentation.mode == "append":
        raise ConfigError(
            "augmentation.mode=append: with ensemble.share=trunk and pairs of each member's own, appended pairs would "
            "count less than in members alone: use on_top or mix"
        )
    for name, options in known.items():
        key = f"pipeline.branches.{name}" if name else "pipeline"
        if name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise ConfigError(f"{key}: the name of a branch may have letters, digits, _ . and -")
        if options.own_trunk and not cfg.pipeline.sft:
            raise ConfigError(f"{key}.own_trunk=true: needs pipeline.sft=true, which trains the SFT policies")
        share = cfg.ensemble.share
        if share == "lora" and options.own_trunk:
            raise ConfigError(f"{key}.own_trunk=true: is not possible for members on one base (ensemble.share=lora)")
        if share == "trunk" and (options.own_trunk or options.pairs == "rrm"):
            setting = "own_trunk=true" if options.own_trunk else "pairs=rrm"
            raise ConfigError(f"{key}.{setting}: is not possible for members on one trunk (ensemble.share=trunk)")
        if options.pairs == "rrm" and cfg.reward_model.loss == "regression":
            raise ConfigError(f"{key}.pairs=rrm: its pairs have no labels, which reward_model.loss=regression learns")
        if options.pairs == "random" and options.rounds > cfg.pipeline.rounds:
            raise ConfigError(
                f"{key}.rounds={options.rounds}: random pairs are as many as the main rounds selected, and there are "
                f"only pipeline.rounds={cfg.pipeline.rounds} of these"
            )
        for member in options.plain_members:
            if member > cfg.ensemble.size:
                raise ConfigError(f"{key}.plain_members={options.plain_members}: there is no member {member}")
    if cfg.pipeline.room and cfg.pipeline.room not in cfg.pipeline.rlhf:
        raise ConfigError(f"pipeline.room={cfg.pipeline.room}: is not among pipeline.rlhf")
    for name, arm in cfg.pipeline.rlhf.items():
        key = f"pipeline.rlhf.{name}"
        if arm.branch not in known:
            names = ", ".join(filter(None, known)) or "none"
            raise ConfigError(f"{key}.branch={arm.branch}: is not among pipeline.branches ({names})")
        if arm.round is not None and arm.round > known[arm.branch].rounds:
            raise ConfigError(f"{key}.round={arm.round}: there are {known[arm.branch].rounds} rounds of retraining")


def reward_of(cfg: Config, arm: RLHFRunConfig) -> tuple[Any, ...]:
    """Returns a key that identifies an arm's reward; arms that differ in the KL penalty only have the same key."""
    features = arm.reference_features and bool(cfg.reward_model.reference_features)
    combined = (arm.aggregate, arm.coefficient, is_standardised(cfg, arm)) if arm.reward == "ensemble" else ()
    return (arm.branch, arm_round(cfg, arm), features, *combined)


def _lambda(cfg: Config, options: BranchConfig) -> float:
    return cfg.adversarial.coefficient if options.coefficient is None else options.coefficient


def _own_members(cfg: Config, options: BranchConfig) -> bool:
    return options.own_trunk and not cfg.ensemble.own_trunk
