"""The steps of a pipeline and their dependencies; the command ``stages`` prints them for job schedulers."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_advrm.attacks.adversary_names import policy_name
from nemo_advrm.config.schema import BranchConfig, Config, RLHFRunConfig
from nemo_advrm.errors import ConfigError
from nemo_advrm.nearest_name import nearest_name
from nemo_advrm.pipeline.branches import (
    MAIN,
    WITHOUT_ATTACK,
    all_branches,
    arm_round,
    attack_home,
    check,
    home,
    is_attacked,
    is_standardised,
    is_watched,
    labels_by_gold,
    last_round,
    member_step,
    member_steps,
    reward_of,
    trunk_step,
    used_members,
)
from nemo_advrm.run_directory import held_arms

# kinds of steps that use no model, for which one process is enough
LIGHT = ("join", "select", "random", "report")


@dataclass(frozen=True)
class Step:
    """One step of the pipeline. ``name`` is its name in ``state.json``, ``after`` names the steps it waits for."""

    name: str
    # sft | preferences | train_rm | reference | attack (one adversary) | join (all adversaries) | select | random |
    # rlhf | samples (of best-of-n) | best_of_n (one reward's curve) | room | report
    kind: str
    after: tuple[str, ...] = ()
    round: int = 0
    member: int = 0  # train_rm and sft: the member, from 1; train_rm of a shared trunk trains all members
    branch: str = MAIN  # a name of pipeline.branches
    adversary: tuple[int, int] = (0, 0)  # attack: the target, from 1, and the adversary's number, from 0
    arm: str = ""  # rlhf, best_of_n and room: a name of pipeline.rlhf
    seed: int = 1  # rlhf: number of the arm's run, from 1


def order(cfg: Config) -> list[Step]:
    """Returns every step, each after those it waits for, as if no round ended early."""
    steps: list[Step] = []
    if cfg.pipeline.sft:
        trunks = {trunk_step(cfg, name, k) for name in all_branches(cfg) for k in range(1, cfg.ensemble.size + 1)}
        steps += [Step(name, "sft", member=int(name.partition("_")[2] or 1)) for name in sorted(trunks)]
    if labels_by_gold(cfg):
        steps.append(Step("preferences", "preferences"))
    for branch, options in all_branches(cfg).items():
        steps += _branch(cfg, branch, options)
    measured = [step.name for step in steps if step.kind == "join" and step.branch == MAIN][-1:]
    runs = [step for arm in cfg.pipeline.rlhf for step in _arm(cfg, arm)]
    runs += [*_best_of_n(cfg), *_room(cfg, runs)]
    return [*steps, *runs, Step("report", "report", (*measured, *(step.name for step in runs)))]


def of_run(cfg: Config) -> tuple[Config, list[Step]]:
    """Returns ``cfg`` with all arms and branches that its run directory holds, and the steps that ``cfg`` asks for.

    Raises ConfigError for impossible branches and arms, and a ``pipeline.until`` that is no step's name.
    """
    run = held_arms.whole(cfg, Path(cfg.run_dir))
    check(run)
    steps = asked(cfg, run)
    return run, until(steps, cfg.pipeline.until) if cfg.pipeline.until else steps


def asked(cfg: Config, whole: Config) -> list[Step]:
    """Returns the steps that ``cfg`` asks for; ``whole`` has all arms and branches that the run directory holds.

    They include the branches of the arms in ``cfg``. The curve of a reward is named after the run's first arm with that
    reward.
    """
    arms = cfg.pipeline.rlhf
    named = {*cfg.pipeline.branches, *(arm.branch for arm in arms.values())}
    parts = {name: options for name, options in whole.pipeline.branches.items() if name in named}
    own = {step.name for step in order(replace(cfg, pipeline=replace(cfg.pipeline, branches=parts)))}
    rewards = {reward_of(whole, arm) for arm in arms.values()}

    def is_asked(step: Step) -> bool:
        if step.kind == "best_of_n":
            return reward_of(whole, whole.pipeline.rlhf[step.arm]) in rewards
        if step.kind == "room":
            return step.arm in arms
        return step.name in own

    steps = [step for step in order(whole) if is_asked(step)]
    names = {step.name for step in steps}
    return [replace(step, after=tuple(name for name in step.after if name in names)) for step in steps]


def _branch(cfg: Config, branch: str, options: BranchConfig) -> list[Step]:
    """Returns the steps of a branch that it does not share with the main rounds, which end with an attack."""
    steps = []
    for number in range(options.rounds + 1):
        members = member_steps(cfg, branch, number)
        for k, name in enumerate(members, 1):
            if name.startswith(f"{home(branch, number)}/") and (k == 1 or _are_all_used(cfg, branch, number)):
                steps.append(Step(name, "train_rm", _before_training(cfg, branch, number, k), number, k, branch))
        if not is_attacked(cfg, branch, number):
            continue
        place = home(branch, number)
        # the main rounds sample the responses in round 0, which all others score
        needed = members if (number, branch) == (0, MAIN) else (*members, "round_0/reference")
        responses = Step(f"{place}/reference", "reference", needed, number, 0, branch)
        steps.append(responses)
        if options.pairs == "random":
            as_many = f"{attack_home(cfg, MAIN, number)}/select"
            steps.append(Step(f"{place}/select", "random", (responses.name, as_many), number, 0, branch))
            continue
        adversaries = [
            Step(f"{place}/attack/{policy_name(k, i)}", "attack", (responses.name,), number, 0, branch, (k, i))
            for k in cfg.adversarial.target_members
            for i in range(cfg.adversarial.num_adversaries)
        ]
        steps += adversaries
        names = tuple(step.name for step in adversaries)
        steps.append(Step(f"{place}/attack", "join", names, number, 0, branch))
        if number < options.rounds:
            steps.append(Step(f"{place}/select", "select", (f"{place}/attack",), number, 0, branch))
    return steps


def _are_all_used(cfg: Config, branch: str, number: int) -> bool:
    """Returns whether all members of a round are used, in an attack or combined by an arm, and not R_1 alone."""
    combine = (arm for arm in cfg.pipeline.rlhf.values() if arm.reward == "ensemble" and arm.branch == branch)
    return (
        branch == MAIN
        or number < all_branches(cfg)[branch].rounds
        or any(arm_round(cfg, arm) == number for arm in combine)
    )


def _before_training(cfg: Config, branch: str, number: int, member: int) -> tuple[str, ...]:
    """Returns the steps that the training of a member waits for: its pairs, and the model it starts from."""
    if number and all_branches(cfg)[branch].pairs in WITHOUT_ATTACK:
        return (member_step(cfg, branch, number - 1, member),)
    if number:
        return (f"{attack_home(cfg, branch, number - 1)}/select",)
    pairs = ("preferences",) if labels_by_gold(cfg) else ()
    return (*pairs, trunk_step(cfg, branch, member)) if cfg.pipeline.sft else pairs


def _arm(cfg: Config, name: str) -> list[Step]:
    arm = cfg.pipeline.rlhf[name]
    needed = _before_arm(cfg, arm)
    runs = arm.seeds or cfg.pipeline.rlhf_seeds
    names = [f"rlhf/{name}"] if runs == 1 else [f"rlhf/{name}/seed_{i}" for i in range(1, runs + 1)]
    return [Step(each, "rlhf", needed, branch=arm.branch, arm=name, seed=i) for i, each in enumerate(names, 1)]


def _before_arm(cfg: Config, arm: RLHFRunConfig) -> tuple[str, ...]:
    """Returns the steps that an arm's reward waits for."""
    needed = used_members(cfg, arm, arm_round(cfg, arm))
    # the members are standardised, and detectors fitted, by round 0's SFT responses
    return (*needed, "round_0/reference") if is_standardised(cfg, arm) or is_watched(cfg, arm) else needed


def _best_of_n(cfg: Config) -> list[Step]:
    """Returns the steps of best-of-n: the samples, and a curve for every reward, named after the first arm with it."""
    if not cfg.pipeline.best_of_n:
        return []
    arms: dict[Any, tuple[str, RLHFRunConfig]] = {}
    for name, arm in cfg.pipeline.rlhf.items():
        arms.setdefault(reward_of(cfg, arm), (name, arm))
    curves = [
        Step(f"best_of_n/{name}", "best_of_n", ("best_of_n", *_before_arm(cfg, arm)), branch=arm.branch, arm=name)
        for name, arm in arms.values()
    ]
    return [Step("best_of_n", "samples", ("sft",) if cfg.pipeline.sft else ()), *curves]


def _room(cfg: Config, runs: list[Step]) -> list[Step]:
    name = cfg.pipeline.room
    if not name:
        return []
    finished = [step.name for step in runs if step.kind == "rlhf" and step.arm == name]
    return [Step("room", "room", (*finished, *member_steps(cfg, MAIN, 0), "round_0/reference"), arm=name)]


def most_at_once(steps: list[Step]) -> int:
    """Returns how many steps can run at the same time at most: the widest level of the graph."""
    level: dict[str, int] = {}
    for step in steps:
        level[step.name] = 1 + max((level[name] for name in step.after), default=0)
    return max(Counter(level.values()).values())


def added_since(step: Step, detail: Callable[[str, str], Any]) -> list[str]:
    """Returns the RLHF runs that the step ``room`` was not measured on; empty for other steps, or when not recorded."""
    known = detail(step.name, "runs")
    if step.kind != "room" or not known:
        return []
    return [name for name in step.after if name.startswith("rlhf/") and name not in known]


def find(among: list[Step], name: str) -> Step:
    """Returns the step of that name. Raises ConfigError that names the nearest one when there is none."""
    steps = {step.name: step for step in among}
    if name not in steps:
        raise ConfigError(
            f"pipeline.only={name}: did you mean {nearest_name(name, list(steps))}? stages: {', '.join(steps)}"
        )
    return steps[name]


def until(among: list[Step], pattern: str) -> list[Step]:
    """Returns the steps whose names match ``pattern``, and all that they wait for, in their order.

    Raises ConfigError that names the nearest one when none matches.
    """
    steps = {step.name: step for step in among}
    needed = fnmatch.filter(steps, pattern)
    if not needed:
        raise ConfigError(
            f"pipeline.until={pattern}: did you mean {nearest_name(pattern, list(steps))}? stages: {', '.join(steps)}"
        )
    for name in needed:  # grows while it is read
        needed += [before for before in steps[name].after if before not in needed]
    return [step for step in among if step.name in needed]


def is_skipped(cfg: Config, step: Step, detail: Callable[[str, str], Any]) -> bool:
    """Returns whether a step belongs to a round after the last one; ``detail(step, key)`` reads ``state.json``."""
    return step.round > last_round(cfg, step.branch, detail)
