"""What each step of a pipeline does: it reads what earlier steps have left in the run's directory, and leaves its own.

:class:`Inputs` are the rows and prompts that they read, encoded once in a process.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
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
from nemo_advrm.data import inputs
from nemo_advrm.data.jsonl import write_jsonl_atomic
from nemo_advrm.data.preferences import load_preferences
from nemo_advrm.data.tokenizers import build_tokenizer
from nemo_advrm.engine import runtime
from nemo_advrm.engine.builders import build_policy
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.engine.microbatches import EncodedResponse
from nemo_advrm.evaluation.best_of_n_sampling import SAMPLES, best_of_n_prompts, curve_of_reward, sample_best_of_n
from nemo_advrm.evaluation.room import measure_room
from nemo_advrm.objectives.sft_statistics import MemberStatistics, fit_members
from nemo_advrm.pipeline import branches
from nemo_advrm.pipeline.dag import Step, labels_by_gold, order
from nemo_advrm.pipeline.state import RunState
from nemo_advrm.rewards.base import RewardSource, checked_scores
from nemo_advrm.rewards.ensemble import UncertaintyReward
from nemo_advrm.rewards.sft_responses import read_rollouts, read_sft_scores, write_sft_scores
from nemo_advrm.rewards.sources import build_gold, load_members
from nemo_advrm.rewards.standardisation import combined
from nemo_advrm.rollouts.run_prompts import attack_prompts, encode_prompts, rlhf_prompts
from nemo_advrm.rollouts.sample import sample
from nemo_advrm.rollouts.types import Prompt, Rollouts
from nemo_advrm.seeds import derive_seed
from nemo_advrm.training.reward_model_training import (
    EncodedPreferences,
    bootstrap,
    encode_rows,
    keep_back,
    retrain_warm,
    train_reward_model,
)
from nemo_advrm.training.rlhf_training import run_rlhf
from nemo_advrm.training.sft_training import encode_responses, sft_rows, train_sft


class Inputs:
    """Rows and prompts of a run."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.tokenizer = build_tokenizer(cfg.model.tokenizer)

    def check(self) -> None:
        """Read and encode them: what is wrong with them is told before anything starts."""
        if not labels_by_gold(self.cfg):
            self._shared_preferences  # noqa: B018
        self.prompts  # noqa: B018
        self.rlhf_prompts  # noqa: B018
        if self.cfg.pipeline.sft:
            self.sft_rows  # noqa: B018

    @cached_property
    def prompts(self) -> list[Prompt]:
        """Of the reference and the attack."""
        cfg = for_stage(self.cfg, "attack")
        return encode_prompts(attack_prompts(cfg), self.tokenizer, cfg)

    @cached_property
    def rlhf_prompts(self) -> list[Prompt]:
        cfg = for_stage(self.cfg, "rlhf")
        return encode_prompts(rlhf_prompts(cfg), self.tokenizer, cfg)

    @cached_property
    def sft_rows(self) -> list[EncodedResponse]:
        cfg = for_stage(self.cfg, "sft")
        return encode_responses(cfg, self.tokenizer, sft_rows(cfg))

    def preferences(self, member: int) -> EncodedPreferences:
        """What a member, from 1, trains on: the data files', which are all members', or its own annotators' pairs."""
        if not labels_by_gold(self.cfg):
            return self._shared_preferences
        home = Path(self.cfg.run_dir) / "preferences"
        parts = [load_preferences(home / f"{part}.jsonl").rows for part in (f"train_{member}", "validation")]
        return encode_rows(for_stage(self.cfg, "train_rm"), self.tokenizer, *parts)

    @cached_property
    def _shared_preferences(self) -> EncodedPreferences:
        cfg = for_stage(self.cfg, "train_rm")
        return encode_rows(cfg, self.tokenizer, *inputs.training_and_validation_pairs(cfg))


class Steps:
    """The steps of one run."""

    def __init__(self, cfg: Config, state: RunState, found: Inputs) -> None:
        self.cfg = cfg
        self.state = state
        self.inputs = found
        self.directory = Path(cfg.run_dir)
        self.tokenizer = found.tokenizer
        self.gold = build_gold(cfg, self.tokenizer)

    def do(self, step: Step) -> None:
        """Do the work of one step."""
        work: dict[str, Callable[[Step], None]] = {
            "sft": self._sft,
            "preferences": self._annotate_preferences,
            "train_rm": self._train_member,
            "reference": self._reference,
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
        if step.member > 1:  # the same rows in another order, from other weights
            cfg = replace(cfg, seed=derive_seed(cfg.seed, "trunk", step.member))
        train_sft(cfg, self.tokenizer, self.directory / step.name, self.inputs.sft_rows)

    def _annotate_preferences(self, step: Step) -> None:
        """Pairs that annotators have labelled, each member's by its own, and pairs labelled by gold to validate on."""
        from nemo_advrm.synthetic.annotated_pairs import annotated_pairs, favourites_of

        options, members = self.cfg.synthetic, self.cfg.ensemble.size
        home = self.directory / step.name
        seed = derive_seed(self.cfg.seed, "preferences", "validation")
        rows = annotated_pairs(options.validation_pairs, seed, options, held_out=True)
        run_on_rank_zero(write_jsonl_atomic, home / "validation.jsonl", rows)
        for k in range(1, members + 1):
            seed = derive_seed(self.cfg.seed, "preferences", k)
            rows = annotated_pairs(options.preference_pairs, seed, options, favourites_of(k, members))
            run_on_rank_zero(write_jsonl_atomic, home / f"train_{k}.jsonl", rows)

    def _train_member(self, step: Step) -> None:
        """A member has the same seed in all rounds and branches: what differs between them are its pairs alone."""
        cfg = for_stage(self.cfg, "train_rm")
        seed = derive_seed(self.cfg.seed, "rm", step.member)
        cfg.reward_model.feature_policy = cfg.reward_model.feature_policy or self._policy_path
        data = self.inputs.preferences(step.member)
        data = bootstrap(data, derive_seed(seed, "bootstrap")) if cfg.ensemble.bootstrap else keep_back(cfg, data)
        pairs = self._pairs_before(step)
        directory = self.directory / step.name
        if step.round and cfg.augmentation.warm_steps:
            before = branches.member_step(self.cfg, step.branch, step.round - 1, step.member)
            previous = str(self.directory / before / "model")
            retrain_warm(cfg, self.tokenizer, directory, data, seed, step.name, previous, pairs)
            return
        cfg.augmentation.pairs_path = ",".join(filter(None, [cfg.augmentation.pairs_path, *map(str, pairs)]))
        trunk = self._policy_path
        if self.cfg.pipeline.sft:
            trunk = str(self.directory / branches.trunk_step(self.cfg, step.branch, step.member) / "model")
        train_reward_model(cfg, self.tokenizer, directory, data, seed, step.name, trunk)

    def _pairs_before(self, step: Step) -> list[Path]:
        """The pair stores of the branch's earlier rounds."""
        kind = branches.all_branches(self.cfg)[step.branch].pairs
        if kind == "none":
            return []
        name = RANDOM_PAIRS if kind == "random" else "pairs.jsonl"
        return [self._home(step.branch, number) / name for number in range(step.round)]

    def _reference(self, step: Step) -> None:
        cfg = for_stage(self.cfg, "attack")
        count = cfg.sft_statistics.samples_per_prompt
        if (step.round, step.branch) == (0, branches.MAIN):
            seed = derive_seed(self.cfg.seed, "reference")
            rollouts = sample(cfg, self.tokenizer, self._policy(), self.inputs.prompts, count, seed)
        else:  # the same responses, scored by these members
            rollouts = self._sft_responses()
        write_sft_scores(
            self._home(step.branch, step.round) / "reference.jsonl", rollouts, count, self._attacked(step), self.gold
        )

    def _attack(self, step: Step) -> None:
        cfg = self._attack_settings(step)
        cfg.pretrained_checkpoint.restore_from_path = self._policy_path
        home = self._home(step.branch, step.round)
        attack = AttackRun(
            cfg,
            self.tokenizer,
            home / "attack",
            self.inputs.prompts,
            self._attacked(step),
            run_on_rank_zero(read_sft_scores, home / "reference.jsonl", self.inputs.prompts),
            self.gold,
            derive_seed(self.cfg.seed, "attack", step.round),
        )
        attack.train(*step.adversary)

    def _join_attacks(self, step: Step) -> None:
        join_attacks(self._attack_settings(step), self.directory / step.name)

    def _select(self, step: Step) -> None:
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
        """The control of selection: as many pairs as the main rounds selected, the rejected side drawn at random."""
        home = self._home(step.branch, step.round)
        wanted = self.state.detail(f"{branches.home(branches.MAIN, step.round)}/select", "selected")
        seed = derive_seed(self.cfg.seed, "select", step.round)
        cfg = self._attack_settings(step)
        counts = run_on_rank_zero(lambda: random_pairs(cfg, home, int(wanted or 0), seed, step.round))
        self.state.set_detail(step.name, **counts)

    def _attack_settings(self, step: Step) -> Config:
        """The configuration of a branch's attacks."""
        cfg = for_stage(self.cfg, "attack")
        coefficient = branches.all_branches(self.cfg)[step.branch].coefficient
        if coefficient is not None:
            cfg.adversarial.coefficient = coefficient
        return cfg

    def _rlhf(self, step: Step) -> None:
        cfg, arm = for_stage(self.cfg, "rlhf"), self.cfg.pipeline.rlhf[step.arm]
        cfg.pretrained_checkpoint.restore_from_path = self._policy_path
        if arm.kl is not None:
            cfg.rl.kl.coefficient = arm.kl
        home = self.directory / step.name
        reward = self._reward(arm, home)
        # the runs of the same number meet the same prompts and random numbers in every arm
        seed = self.cfg.seed if step.seed == 1 else derive_seed(self.cfg.seed, "rlhf run", step.seed)
        run_rlhf(cfg, self.tokenizer, home, self.inputs.rlhf_prompts, reward, self.gold, seed, step.name)

    def _reward(self, arm: RLHFRunConfig, home: Path) -> UncertaintyReward:
        members = self._members_of(arm)
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
        """Of responses of the arm's final policies to RLHF's first prompts."""
        cfg = for_stage(self.cfg, "rlhf")
        members = self._members(branches.MAIN, 0, self._plain(cfg.pipeline.rlhf[step.arm]))
        prompts = self.inputs.rlhf_prompts[: cfg.sft_statistics.num_prompts]
        names = [each.name for each in order(self.cfg) if each.kind == "rlhf" and each.arm == step.arm]
        runs = []
        for name in names:
            policy = build_policy(cfg, self.tokenizer, str(self.directory / name / "model"), 0, trainable=False)
            runs.append(sample(cfg, self.tokenizer, policy, prompts, 1, derive_seed(cfg.seed, "room")))
        found = {"arm": step.arm, "runs": names, **measure_room(runs, members, self._statistics(members))}
        path = self.directory / "room.json"
        run_on_rank_zero(lambda: files.write_text(path, json.dumps(found, indent=1) + "\n"))
        self.state.set_detail(step.name, runs=names)

    def _members_of(self, arm: RLHFRunConfig) -> list[RewardSource]:
        """The members an arm's reward is made of; a branch whose rounds ended early gives those of its last one."""
        last = branches.last_round(self.cfg, arm.branch, self.state.detail)
        number = min(branches.arm_round(self.cfg, arm), last)
        count = self.cfg.ensemble.size if arm.reward == "ensemble" else 1
        return self._members(arm.branch, number, self._plain(arm), count)

    def _plain(self, arm: RLHFRunConfig) -> list[int]:
        """The members that an arm takes without their reference features: none or all."""
        return [] if arm.reference_features else list(range(1, self.cfg.ensemble.size + 1))

    def _statistics(self, members: list[RewardSource]) -> MemberStatistics:
        """By what members are standardised: their scores of the SFT responses of round 0."""
        rollouts = self._sft_responses()
        return fit_members(torch.stack([checked_scores(member, rollouts) for member in members], -1))

    # what the steps share

    def _home(self, branch: str, number: int) -> Path:
        """Where a round's reference, attack and pairs are."""
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

    def _attacked(self, step: Step) -> list[RewardSource]:
        """The members of a round as its attack sees them."""
        return self._members(step.branch, step.round, branches.all_branches(self.cfg)[step.branch].plain_members)

    def _members(self, branch: str, number: int, plain: list[int], count: int | None = None) -> list[RewardSource]:
        """The first ``count`` members of a round (None: all); those of ``plain`` without reference features."""
        paths = [str(self.directory / name / "model") for name in branches.member_steps(self.cfg, branch, number)]
        if self.cfg.reward_model.reference_features:
            off = "?reference_features=off"
            paths = [f"{path}{off}" if k in plain else path for k, path in enumerate(paths[:count], 1)]
        return load_members(for_stage(self.cfg, "train_rm"), paths[:count], self.tokenizer)
