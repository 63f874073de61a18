"""Measures how often a finished adversary succeeds on held-out prompts, and how often SFT responses do."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_advrm.attacks.base import SAMPLES, Attack, AttackInputs, Budget, NothingProposed
from nemo_advrm.attacks.success_rates import success_of, success_rates_of
from nemo_advrm.attacks.summary_file import RATES
from nemo_advrm.config.schema import AdversarialConfig, Config
from nemo_advrm.data.jsonl import read_jsonl, write_jsonl_atomic
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.rewards.base import RewardSource
from nemo_advrm.rewards.detector_features import attack_reader
from nemo_advrm.rewards.ensemble import AdversarialReward
from nemo_advrm.rewards.features import ReferenceFeatures
from nemo_advrm.rewards.find_rule import FindRule
from nemo_advrm.rewards.limits import prompts_with_room
from nemo_advrm.rewards.sample_rows import gold_and_z, trajectory_rows
from nemo_advrm.rewards.sft_responses import read_for_attack, sample_sft_scores
from nemo_advrm.rollouts.base import RolloutEngine, rollout_engine
from nemo_advrm.rollouts.run_prompts import encode_prompts, held_out_prompts
from nemo_advrm.rollouts.sample import sample
from nemo_advrm.rollouts.types import Prompt
from nemo_advrm.seeds import derive_seed

HELD_OUT_REFERENCE = "held_out_reference.jsonl"


@dataclass(frozen=True)
class HeldOut:
    """Held-out prompts with their SFT responses, against which an adversary's responses are measured."""

    cfg: Config
    tokenizer: Tokenizer
    prompts: list[Prompt]
    members: list[RewardSource]
    sft_responses: SFTScores
    gold: RewardSource | None
    sft_policy: ReferenceFeatures | None = None
    _rules: dict[int, FindRule] = field(default_factory=dict, init=False, repr=False)

    def measure(
        self, adversary: MegatronModel, target: int, home: Path, options: AdversarialConfig | None = None
    ) -> dict[str, Any]:
        """Returns RATES of the adversary's responses, and under ``null`` those of the SFT responses; all ranks call.

        It samples as many responses as there are SFT responses, with the same random numbers for every adversary, and
        writes them to ``home/held_out.jsonl``. Rates that need gold are None without it. ``options`` are those of the
        reward that the adversary was trained on, by default ``cfg.adversarial``.
        """
        target_index = target - 1
        rollouts = sample(self._engine, adversary, self.prompts, self._per_prompt, sampling_seed(self.cfg))
        options = options or self.cfg.adversarial
        reward = AdversarialReward(self.members, options, self.sft_responses, target_index, self.sft_policy)
        reward_output = reward.compute_rewards(rollouts)
        gold_N, gold_z_N = gold_and_z(self.gold, rollouts, self.sft_responses)
        rows = trajectory_rows(rollouts, reward_output, target, home.name, 0, gold_N, gold_z_N)
        run_on_rank_zero(write_jsonl_atomic, home / "held_out.jsonl", rows)
        rule = self._rule(target)
        z_N = reward_output.details["z"][:, target_index]
        return {
            "prompts": len(self.prompts),
            "responses": len(rows),
            **self._rates(z_N, gold_N, gold_z_N, rule.share(rows)),
            "null": self.null(rule),
        }

    def measure_search(self, attack: Attack, inputs: AttackInputs, samples_per_step: int) -> dict[str, Any]:
        """Returns what :meth:`measure` returns, for an attack that trains nothing; all ranks call.

        It searches again, on the held-out prompts, until it has proposed as many responses as there are SFT responses.
        """
        home, count = inputs.directory, self.sft_responses.scores_PNK[..., 0].numel()
        directory = home / "held_out" / home.name  # its name is the policy's in the rows
        own = replace(inputs, prompts=self.prompts, sft_responses=self.sft_responses, directory=directory)
        try:
            attack.find(own, Budget(-(-count // samples_per_step), samples_per_step))
            rows = run_on_rank_zero(_take, directory, home / "held_out.jsonl", count)
        except NothingProposed:
            rows = []
        nothing = dict.fromkeys(RATES)
        rates = success_rates_of(rows, self.sft_responses, own.rule) if rows else {**nothing, "finds": 0.0}
        return {"prompts": len(self.prompts), "responses": len(rows), **rates, "null": self.null(own.rule)}

    def null(self, rule: FindRule) -> dict[str, float | None]:
        """Returns RATES of the SFT responses, each relative to the other responses to its prompt."""
        gold_PN, gold_z_PN = self.sft_responses.gold_PN, self.sft_responses.own_gold_z()
        return self._rates(
            rule.own_z_PNK[..., rule.target_index].flatten(),
            None if gold_PN is None else gold_PN.flatten(),
            None if gold_z_PN is None else gold_z_PN.flatten(),
            rule.null_share,
            rule.underrates,
        )

    def _rule(self, target: int) -> FindRule:
        """Returns the rule of a target, whose measures of the SFT responses all of its adversaries share."""
        if target not in self._rules:
            self._rules[target] = FindRule(self.cfg, self.sft_responses, target, self.tokenizer)
        return self._rules[target]

    @cached_property
    def _engine(self) -> RolloutEngine:
        return rollout_engine(self.cfg, self.tokenizer)

    @property
    def _per_prompt(self) -> int:
        return self.sft_responses.scores_PNK.size(1)

    def _rates(
        self,
        z_N: Tensor,
        gold_N: Tensor | None,
        gold_z_N: Tensor | None,
        finds: float,
        underrates: bool = False,
    ) -> dict[str, float | None]:
        """Returns RATES of responses in the order of the prompts."""
        sft_gold_PN = self.sft_responses.gold_PN
        if gold_N is None or gold_z_N is None or sft_gold_PN is None:
            return {"success_standard": None, "success_strict": None, "finds": finds, "gold": None}
        # z > 0 means that the score is above the mean of the prompt's (other) SFT responses
        sft_gold_N = sft_gold_PN.mean(1).repeat_interleave(self._per_prompt)
        standard, strict = success_of(underrates)
        standard_N = standard(z_N, torch.zeros_like(z_N), gold_N, sft_gold_N)
        return {
            "success_standard": standard_N.float().mean().item(),
            "success_strict": strict(z_N, gold_z_N).float().mean().item(),
            "finds": finds,
            "gold": gold_N.mean().item(),
        }


def _take(directory: Path, path: Path, count: int) -> list[dict[str, Any]]:
    """Moves the first ``count`` samples of ``directory`` to ``path`` and returns them."""
    rows = [row for _, row in read_jsonl(directory / SAMPLES)][:count]
    write_jsonl_atomic(path, rows)
    shutil.rmtree(directory.parent)
    return rows


def sampling_seed(cfg: Config) -> int:
    """Returns the seed of all responses to held-out prompts, equal for all rounds, targets and adversaries."""
    return derive_seed(cfg.seed, "attack held out")


def held_out_set(
    cfg: Config,
    tokenizer: Tokenizer,
    directory: Path,
    prompts: list[Prompt],
    members: list[RewardSource],
    gold: RewardSource | None,
    sft_policy: ReferenceFeatures | None = None,
) -> HeldOut | None:
    """Builds the set of ``adversarial.held_out_prompts`` prompts, none of them in ``prompts``; None when that is 0.

    Their SFT responses are sampled once into ``directory/held_out_reference.jsonl``; all ranks call.
    """
    count = cfg.adversarial.held_out_prompts
    if not count:
        return None
    kept = held_out_prompts(cfg, count, [prompt.messages for prompt in prompts])
    encoded = prompts_with_room(encode_prompts(kept, tokenizer, cfg), tokenizer.fingerprint, members, cfg)
    path = directory / HELD_OUT_REFERENCE
    reader = attack_reader(cfg, members, sft_policy)
    sample_sft_scores(cfg, tokenizer, path, encoded, reader, gold, sampling_seed(cfg))
    sft_responses = read_for_attack(cfg, path, encoded)
    return HeldOut(cfg, tokenizer, encoded, members, sft_responses, gold, sft_policy)
