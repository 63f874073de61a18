"""The rounds of Adv-RM (Bukharin et al., arXiv 2504.06141): what each step reads, computes and writes.

    sft          fine-tunes the policy that all reward models and adversaries start from
    train_rm     round 0: trains the members of the ensemble on preference pairs
    reference    scores SFT responses by the members                                       -> reference.jsonl
    attack       trains adversaries that a target scores high and the others low           -> attack/
    select       keeps samples on which the members disagree, paired with SFT responses    -> pairs.jsonl
    train_rm     next round: retrains the members with the adversarial pairs of all rounds before
    rlhf         after the last round: trains policies against the plain and the hardened rewards

A step reads files of earlier steps in the run directory and writes its own, so that a stopped run resumes at any step.
:mod:`nemo_advrm.pipeline.dag` orders the steps and :mod:`nemo_advrm.pipeline.runner` runs them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nemo_advrm import files
from nemo_advrm.attacks.pair_selection import (
    RANDOM_PAIRS,
    dropped,
    found_lines,
    random_pairs,
    reason_to_stop,
    select_round,
)
from nemo_advrm.attacks.run import AttackRun, join_attacks
from nemo_advrm.config import for_stage
from nemo_advrm.config.schema import Config, RLHFRunConfig
from nemo_advrm.data.jsonl import write_jsonl_atomic
from nemo_advrm.engine import runtime
from nemo_advrm.engine.builders import build_policy
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.evaluation.best_of_n_sampling import SAMPLES, best_of_n_prompts, curve_of_reward, sample_best_of_n
from nemo_advrm.evaluation.room import measure_room
from nemo_advrm.objectives.sft_statistics import MemberStatistics, fit_members
from nemo_advrm.pipeline import branches
from nemo_advrm.pipeline.dag import Step, order
from nemo_advrm.pipeline.hybrids import check_fitted, hybrid_members
from nemo_advrm.pipeline.run_inputs import Inputs
from nemo_advrm.pipeline.state import RunState
from nemo_advrm.rewards.base import RewardSource, checked_scores
from nemo_advrm.rewards.detector_features import FeatureReader, attack_reader
from nemo_advrm.rewards.ensemble import UncertaintyReward
from nemo_advrm.rewards.features import ReferenceFeatures
from nemo_advrm.rewards.hybrid import Opened, open_sft_policy
from nemo_advrm.rewards.monitor import DISAGREEMENT, build_monitor
from nemo_advrm.rewards.monitor import KEY as MONITOR_KEY
from nemo_advrm.rewards.sample_rows import score_sft_responses
from nemo_advrm.rewards.sft_responses import policy_to_sample, read_for_attack, read_rollouts, write_sft_scores
from nemo_advrm.rewards.sources import build_gold, load_members
from nemo_advrm.rewards.standardisation import combined
from nemo_advrm.rewards.watch_list import watching_detectors
from nemo_advrm.rollouts.base import rollout_engine
from nemo_advrm.rollouts.sample import sample
from nemo_advrm.rollouts.types import Rollouts
from nemo_advrm.seeds import derive_seed
from nemo_advrm.training.reward_model_training import rows_of_member, train_reward_model, warm
from nemo_advrm.training.rlhf_training import run_rlhf
from nemo_advrm.training.sft_training import train_sft
from nemo_advrm.training.shared_trunk_rows import rows_of_heads


class Rounds:
    """The steps of one run.

    Args:
        cfg: configuration of the run, with all branches and arms that the run directory holds.
        state: state of the run, for details that later steps read.
        inputs: encoded rows and prompts.
    """

    def __init__(self, cfg: Config, state: RunState, inputs: Inputs) -> None:
        self.cfg = cfg
        self.state = state
        self.inputs = inputs
        self.directory = Path(cfg.run_dir)
        self.tokenizer = inputs.tokenizer
        self.gold = build_gold(cfg, self.tokenizer)

    def do(self, step: Step) -> None:
        """Does the work of one step."""
        work: dict[str, Callable[[Step], None]] = {
            "sft": self._sft,
            "preferences": self._annotate_preferences,
            "train_rm": self._train_member,
            "reference": self._score_sft_responses,
            "attack": self._attack,
            "join": self._join_attacks,
            "select": self._select,
            "random": self._draw_pairs,
            "rlhf": self._rlhf,
            "samples": self._sample_best_of_n,
            "best_of_n": self._best_of_n,
            "room": self._room,
        }
        work[step.kind](step)

    def _sft(self, step: Step) -> None:
        cfg = for_stage(self.cfg, "sft")
        if step.member > 1:  # a trunk of its own: other weights, and the same rows in another order
            cfg = replace(cfg, seed=derive_seed(cfg.seed, "trunk", step.member))
        train_sft(cfg, self.tokenizer, self.directory / step.name, self.inputs.sft_rows)

    def _annotate_preferences(self, step: Step) -> None:
        """Writes pairs of the embedded language: each member's by its own annotators, validation pairs by gold."""
        from nemo_advrm.synthetic.annotated_pairs import annotated_pairs, favourites_of

        options, members = self.cfg.synthetic, self.cfg.ensemble.size
        shared = options.shared_flourishes
        home = self.directory / step.name
        seed = derive_seed(self.cfg.seed, "preferences", "validation")
        rows = annotated_pairs(options.validation_pairs, seed, options, held_out=True)
        run_on_rank_zero(write_jsonl_atomic, home / "validation.jsonl", rows)
        for k in range(1, members + 1):
            seed = derive_seed(self.cfg.seed, "preferences", k)
            rows = annotated_pairs(options.preference_pairs, seed, options, favourites_of(k, members, shared))
            run_on_rank_zero(write_jsonl_atomic, home / f"train_{k}.jsonl", rows)

    def _train_member(self, step: Step) -> None:
        """Trains a member, or all members of a trunk, on their preference pairs and the adversarial ones of the rounds
        before.

        Its seed is the same in all rounds and branches, so that they differ in their adversarial pairs only.
        """
        cfg = for_stage(self.cfg, "train_rm")
        seed = derive_seed(self.cfg.seed, "rm", step.member)
        cfg.reward_model.feature_policy = cfg.reward_model.feature_policy or self._policy_path
        if cfg.ensemble.share == "trunk":
            parts = [self.inputs.preferences(k) for k in range(1, cfg.ensemble.size + 1)]
            data = rows_of_heads(parts, self.cfg.seed, cfg.ensemble.bootstrap)
        else:
            data = rows_of_member(cfg, self.inputs.preferences(step.member), seed)
        pairs = map(str, self._pairs_before(step))
        cfg.augmentation.pairs_path = ",".join(filter(None, [cfg.augmentation.pairs_path, *pairs]))
        start = self._policy_path
        before = branches.member_step(self.cfg, step.branch, max(step.round - 1, 0), step.member)
        branch = branches.all_branches(self.cfg)[step.branch]
        if step.round and branch.pairs == "rrm":
            # as in the paper, the reward model trained without these pairs says which of them teach something
            plain = f"{self.directory / before / 'model'}?reference_features=off"
            cfg.augmentation.method = "rrm"
            cfg.augmentation.rrm_filter = cfg.augmentation.rrm_filter or plain
            cfg.augmentation.rrm_share = branch.rrm_share or cfg.augmentation.rrm_share
        if step.round and cfg.augmentation.warm_steps:
            cfg = warm(cfg)
            start = str(self.directory / before / "model")
        else:
            if step.member > 1:
                cfg.trainer.max_steps = self.cfg.pipeline.other_member_steps or cfg.trainer.max_steps
            if self.cfg.pipeline.sft:
                start = str(self.directory / branches.trunk_step(self.cfg, step.branch, step.member) / "model")
        hybrid = step.name in hybrid_members(self.cfg)
        home = self.directory / step.name
        train_reward_model(cfg, self.tokenizer, home, data, seed, step.name, start, hybrid=hybrid)

    def _pairs_before(self, step: Step) -> list[Path]:
        """Returns the files of adversarial pairs of the branch's earlier rounds."""
        kind = branches.all_branches(self.cfg)[step.branch].pairs
        if kind in branches.WITHOUT_ATTACK:
            return []
        name = RANDOM_PAIRS if kind == "random" else "pairs.jsonl"
        return [self._home(step.branch, number) / name for number in range(step.round)]

    def _score_sft_responses(self, step: Step) -> None:
        """Samples SFT responses in round 0 of the main rounds and scores them by the members of the step's round."""
        cfg = for_stage(self.cfg, "attack")
        count = cfg.sft_statistics.samples_per_prompt
        members, sft_policy = self._attacked(step)
        if (step.round, step.branch) == (0, branches.MAIN):
            seed = derive_seed(self.cfg.seed, "reference")
            engine = rollout_engine(cfg, self.tokenizer)
            policy = policy_to_sample(cfg, sft_policy) or self._policy()
            rollouts = sample(engine, policy, self.inputs.prompts, count, seed)
        else:
            rollouts = self._sft_responses()
        reader = attack_reader(cfg, members, sft_policy)
        write_sft_scores(self._home(step.branch, step.round) / "reference.jsonl", rollouts, count, reader, self.gold)

    def _attack(self, step: Step) -> None:
        """Trains one adversary against one target."""
        cfg = self._attack_settings(step)
        cfg.pretrained_checkpoint.restore_from_path = self._policy_path
        home = self._home(step.branch, step.round)
        members, sft_policy = self._attacked(step)
        prompts, seed = self.inputs.prompts, derive_seed(self.cfg.seed, "attack", step.round)
        sft = read_for_attack(cfg, home / "reference.jsonl", prompts)
        attack = AttackRun(cfg, self.tokenizer, home / "attack", prompts, members, sft, self.gold, seed, sft_policy)
        attack.train(*step.adversary)

    def _join_attacks(self, step: Step) -> None:
        """Joins the samples of all adversaries of a round."""
        join_attacks(self._attack_settings(step), self.directory / step.name)

    def _select(self, step: Step) -> None:
        """Selects the adversarial pairs of a round and decides whether the rounds end with it."""
        cfg, home = self._attack_settings(step), self._home(step.branch, step.round)
        seed = derive_seed(self.cfg.seed, "select", step.round)
        counts = run_on_rank_zero(select_round, cfg, home, step.round, seed)
        stop = run_on_rank_zero(reason_to_stop, cfg, home, counts)
        if runtime.current().is_writer:
            place = branches.home(step.branch, step.round)
            print(f"{place}: {counts['selected']} adversarial pairs  ({dropped(counts)})", flush=True)
            print(*found_lines(counts), sep="\n", flush=True)
        self.state.set_detail(step.name, stop=stop, **counts)

    def _draw_pairs(self, step: Step) -> None:
        """Draws the control of selection: as many pairs as the main rounds selected, with random rejected sides."""
        home = self._home(step.branch, step.round)
        wanted = self.state.detail(f"{branches.home(branches.MAIN, step.round)}/select", "selected")
        seed = derive_seed(self.cfg.seed, "select", step.round)
        cfg = self._attack_settings(step)
        counts = run_on_rank_zero(lambda: random_pairs(cfg, home, int(wanted or 0), seed, step.round))
        self.state.set_detail(step.name, **counts)

    def _attack_settings(self, step: Step) -> Config:
        """Returns the configuration of a branch's attacks."""
        cfg = for_stage(self.cfg, "attack")
        coefficient = branches.all_branches(self.cfg)[step.branch].coefficient
        if coefficient is not None:
            cfg.adversarial.coefficient = coefficient
        return cfg

    def _rlhf(self, step: Step) -> None:
        """Trains a policy against the reward of an arm (an entry of ``pipeline.rlhf``)."""
        cfg, arm = for_stage(self.cfg, "rlhf"), self.cfg.pipeline.rlhf[step.arm]
        cfg.pretrained_checkpoint.restore_from_path = self._policy_path
        if arm.kl is not None:
            cfg.rl.kl.coefficient = arm.kl
        cfg.rl.detector_penalty = branches.detector_penalty(self.cfg, arm)
        home = self.directory / step.name
        reward = self._watched_reward(cfg, arm, home)
        # runs of the same number have the same prompts and random numbers in every arm
        seed = self.cfg.seed if step.seed == 1 else derive_seed(self.cfg.seed, "rlhf run", step.seed)
        run_rlhf(cfg, self.tokenizer, home, self.inputs.rlhf_prompts, reward, self.gold, seed, step.name)

    def _watched_reward(self, cfg: Config, arm: RLHFRunConfig, home: Path) -> UncertaintyReward:
        """Returns the reward of an arm with the detectors that watch its RLHF."""
        opened: Opened = {}
        beside = branches.observers(self.cfg, arm)
        everyone = self._members_of(arm, opened, beside)
        count = len(everyone) - beside
        members, observers = everyone[:count], everyone[count:]
        detectors = watching_detectors(cfg, count)
        if DISAGREEMENT in detectors and len(everyone) < 2:
            detectors.remove(DISAGREEMENT)
            run_on_rank_zero(lambda: print(f"{home.name}: no {DISAGREEMENT}: there is one member", flush=True))
        if not detectors:
            return self._reward(arm, home, members)
        sft_policy = open_sft_policy(cfg, self.tokenizer, self._policy_path, opened, detectors)
        reader = FeatureReader(everyone, detectors, range(count), sft_policy, MONITOR_KEY)
        rollouts = self._sft_responses()
        sft_responses, _ = score_sft_responses(rollouts, len(rollouts) // len(self.inputs.prompts), reader)
        statistics = None
        if branches.is_standardised(self.cfg, arm):
            statistics = fit_members(sft_responses.scores_PNK.flatten(0, 1)[:, :count])
        monitor = build_monitor(cfg, members, sft_responses, detectors, sft_policy, observers)
        one_too = arm.standardise or branches.detector_penalty(self.cfg, arm) > 0
        return combined(members, arm.aggregate, arm.coefficient, statistics, home, one_too, monitor)

    def _reward(self, arm: RLHFRunConfig, home: Path, members: list[RewardSource] | None = None) -> UncertaintyReward:
        members = self._members_of(arm) if members is None else members
        statistics = self._statistics(members) if branches.is_standardised(self.cfg, arm) else None
        return combined(members, arm.aggregate, arm.coefficient, statistics, home, one_too=arm.standardise)

    def _sample_best_of_n(self, step: Step) -> None:
        cfg = for_stage(self.cfg, "rlhf")
        prompts = best_of_n_prompts(cfg, self.tokenizer, [prompt.messages for prompt in self.inputs.rlhf_prompts])
        path = self.directory / "best_of_n" / SAMPLES
        sample_best_of_n(cfg, self.tokenizer, path, self._policy(), prompts, self.gold)

    def _best_of_n(self, step: Step) -> None:
        cfg, home = for_stage(self.cfg, "rlhf"), self.directory / step.name
        reward = self._reward(self.cfg.pipeline.rlhf[step.arm], home)
        path = home.with_name(f"{home.name}.json")
        curve_of_reward(cfg, self.tokenizer, path, home.parent / SAMPLES, reward)

    def _room(self, step: Step) -> None:
        """Measures the room for adversarial training on responses of an arm's final policies."""
        cfg = for_stage(self.cfg, "rlhf")
        members = self._members(branches.MAIN, 0, self._plain(cfg.pipeline.rlhf[step.arm]))
        prompts = self.inputs.rlhf_prompts[: cfg.sft_statistics.num_prompts]
        names = [each.name for each in order(self.cfg) if each.kind == "rlhf" and each.arm == step.arm]
        runs, engine, seed = [], rollout_engine(cfg, self.tokenizer), derive_seed(cfg.seed, "room")
        for name in names:
            policy = build_policy(cfg, self.tokenizer, str(self.directory / name / "model"), 0, trainable=False)
            runs.append(sample(engine, policy, prompts, 1, seed))
        found = {"arm": step.arm, "runs": names, **measure_room(runs, members, self._statistics(members))}
        path = self.directory / "room.json"
        run_on_rank_zero(lambda: files.write_text(path, json.dumps(found, indent=1) + "\n"))
        self.state.set_detail(step.name, runs=names)

    def _members_of(self, arm: RLHFRunConfig, opened: Opened | None = None, observers: int = 0) -> list[RewardSource]:
        """Returns the members of an arm's reward, and ``observers`` more of the same round after them.

        They are those of the last round when the branch's rounds ended early.
        """
        last = branches.last_round(self.cfg, arm.branch, self.state.detail)
        number = min(branches.arm_round(self.cfg, arm), last)
        count = (self.cfg.ensemble.size if arm.reward == "ensemble" else 1) + observers
        return self._members(arm.branch, number, self._plain(arm), count, opened)

    def _plain(self, arm: RLHFRunConfig) -> list[int]:
        """Returns the members (from 1) that an arm uses without reference features: none or all."""
        return [] if arm.reference_features else list(range(1, self.cfg.ensemble.size + 1))

    def _statistics(self, members: list[RewardSource]) -> MemberStatistics:
        """Returns the statistics that standardise members: those of their scores of round 0's SFT responses."""
        rollouts = self._sft_responses()
        return fit_members(torch.stack([checked_scores(member, rollouts) for member in members], -1))

    # shared by the steps

    def _home(self, branch: str, number: int) -> Path:
        """Returns the directory of a round's SFT responses, attack and pairs."""
        return self.directory / branches.attack_home(self.cfg, branch, number)

    @property
    def _policy_path(self) -> str:
        if self.cfg.pipeline.sft:
            return str(self.directory / "sft" / "model")
        return self.cfg.pretrained_checkpoint.restore_from_path

    def _policy(self) -> Any:
        return build_policy(self.cfg, self.tokenizer, self._policy_path, 0, trainable=False)

    def _sft_responses(self) -> Rollouts:
        return read_rollouts(self.directory / "round_0" / "reference.jsonl", self.inputs.prompts, self.tokenizer)

    def _attacked(self, step: Step) -> tuple[list[RewardSource], ReferenceFeatures | None]:
        """Returns the members of a round as its attack uses them, and the SFT policy if its detector reads it."""
        opened: Opened = {}
        plain = branches.all_branches(self.cfg)[step.branch].plain_members
        members = self._members(step.branch, step.round, plain, opened=opened)
        return members, open_sft_policy(for_stage(self.cfg, "attack"), self.tokenizer, self._policy_path, opened)

    def _members(
        self, branch: str, number: int, plain: list[int], count: int | None = None, opened: Opened | None = None
    ) -> list[RewardSource]:
        """Loads the first ``count`` members of a round (None: all); those in ``plain`` without reference features."""
        paths = [str(self.directory / model) for model in branches.member_models(self.cfg, branch, number)]
        if self.cfg.reward_model.reference_features:
            hybrids = [Path(path) for k, path in enumerate(paths[:count], 1) if k not in plain]
            run_on_rank_zero(check_fitted, self.directory, hybrids)
            off = "?reference_features=off"
            paths = [f"{path}{off}" if k in plain else path for k, path in enumerate(paths[:count], 1)]
        return load_members(for_stage(self.cfg, "train_rm"), paths[:count], self.tokenizer, opened)
