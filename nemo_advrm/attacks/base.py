"""The interface of an attack: searches for responses that the target scores high and the other members do not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from nemo_advrm.attacks.language_models import LanguageModels
from nemo_advrm.attacks.success_rates import success_rates_of
from nemo_advrm.config.schema import AdversarialConfig, Config
from nemo_advrm.data.jsonl import write_jsonl_atomic
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine import runtime
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.errors import ConfigError
from nemo_advrm.models.trainable import TrainableModel
from nemo_advrm.objectives.adversarial import search_reward
from nemo_advrm.objectives.sft_statistics import z_scores
from nemo_advrm.registry import ATTACKS
from nemo_advrm.rewards.base import RewardSource
from nemo_advrm.rewards.ensemble import AdversarialReward
from nemo_advrm.rewards.features import ReferenceFeatures
from nemo_advrm.rewards.find_rule import Find, FindRule
from nemo_advrm.rewards.sample_rows import gold_and_z, trajectory_rows
from nemo_advrm.rollouts.types import Prompt, Rollouts

SAMPLES = "samples.jsonl"


@dataclass(frozen=True)
class Budget:
    """How long an attack may search.

    Attributes:
        steps: maximum number of steps; RL makes one update per step.
        samples_per_step: responses scored per step, over all data-parallel ranks.
        enough: different finds at which the attack may end; 0: it uses all its steps.
    """

    steps: int
    samples_per_step: int
    enough: int = 0


@dataclass(frozen=True)
class AttackInputs:
    """The inputs of an attack on one target.

    Attributes:
        cfg: configuration of the stage.
        tokenizer: the policy's tokenizer.
        prompts: the prompts of ``sft_responses``, in its order.
        policy: checkpoint of the SFT policy.
        sft_responses: SFT responses to the prompts with their scores, by which the reward is standardised.
        members: the ensemble, R_1 first.
        target: the attacked member, from 1.
        gold: scores the samples for evaluation; None without a gold reward. An attack must not search with it.
        seed: seed of this attack; equal seeds must give equal samples.
        directory: directory of ``samples.jsonl`` and all other files of this attack.
        sft_policy: the loaded SFT policy; None unless the detector reads log-probabilities.
        models: opened language models, shared by all attacks of a command; None: those of this attack alone.
        reward_options: options of the reward; None: ``cfg.adversarial``, by which finds are counted in any case.
        underrates: the attack's, see :class:`Attack`.
        progress: is told after each step of a search how many responses it scored, and how many finds are new.
    """

    cfg: Config
    tokenizer: Tokenizer
    prompts: list[Prompt]
    policy: str
    sft_responses: SFTScores
    members: list[RewardSource]
    target: int
    gold: RewardSource | None
    seed: int
    directory: Path
    sft_policy: ReferenceFeatures | None = None
    models: LanguageModels | None = None
    reward_options: AdversarialConfig | None = None
    underrates: bool = False
    progress: Callable[[int, int], None] | None = None

    @cached_property
    def language_models(self) -> LanguageModels:
        """The SFT policy as a language model, and the model ``adversarial.lm``; each is loaded at its first use."""
        return self.models or LanguageModels(self.cfg, self.tokenizer, self.policy, self.sft_policy)

    @cached_property
    def reward(self) -> AdversarialReward:
        """The adversarial reward, with the detector ``adversarial.detector``."""
        options, target_index = self.reward_options or self.cfg.adversarial, self.target - 1
        return AdversarialReward(self.members, options, self.sft_responses, target_index, self.sft_policy)

    @cached_property
    def rule(self) -> FindRule:
        """The rule by which selection takes samples."""
        return FindRule(self.cfg, self.sft_responses, self.target, self.tokenizer, self.underrates)

    def search_rewards(self, rollouts: Rollouts) -> Tensor:
        """Returns what a search maximises, [N]; all ranks of a model replica call, and all replicas equally often.

        It is :func:`nemo_advrm.objectives.adversarial.search_reward` of the members' z (of -z for an attack that looks
        for good responses scored low). It reads scores alone: no detector and no gold.
        """
        options, (prompt_mean_PK, std_K) = self.reward.options, self._statistics
        coefficient = options.coefficient if options.preset == "paper" else options.others_weight
        scores_NK = self.reward.ensemble.member_scores(rollouts)
        z_NK = z_scores(scores_NK, prompt_mean_PK[rollouts.prompt_index], std_K)
        return search_reward(-z_NK if self.underrates else z_NK, coefficient, options.penalty, self.target - 1)

    @cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        statistics = self.sft_responses.statistics()
        return statistics.prompt_mean_PK, statistics.std_K

    def rows(self, rollouts: Rollouts, step: int) -> list[dict[str, Any]]:
        """Scores responses and returns their rows of ``samples.jsonl``; all ranks of a model replica call."""
        reward_output = self.reward.compute_rewards(rollouts)
        gold = gold_and_z(self.gold, rollouts, self.sft_responses)
        return trajectory_rows(rollouts, reward_output, self.target, self.directory.name, step, *gold)


@dataclass(frozen=True)
class Found:
    """The result of an attack.

    Attributes:
        samples: JSON-lines file with a row of :meth:`AttackInputs.rows` for every response.
        adversary: the trained policy, which is measured on held-out prompts and saved; None without training.
    """

    samples: Path
    adversary: TrainableModel | None = None


class Attack(ABC):
    """Finds bad responses that the target member likes. ``adversarial.attack`` names the one that is used.

    Attributes:
        underrates: it finds good responses that the target scores low instead. The find rule is then another one
            (:class:`nemo_advrm.rewards.find_rule.FindRule`), and a find is the chosen side of its pair.
        trains: it trains a copy of the SFT policy, which must be a Megatron-Core model.
    """

    underrates: ClassVar[bool] = False
    trains: ClassVar[bool] = False

    def reward_options(self, configured: AdversarialConfig) -> AdversarialConfig:
        """Returns the options of the reward that this attack maximises; the find rule keeps the configured ones."""
        return configured

    @abstractmethod
    def find(self, inputs: AttackInputs, budget: Budget) -> Found:
        """Search, and write every response that was scored to ``samples.jsonl``; all ranks call.

        A call in a directory where an earlier call was stopped resumes or starts over.
        """


def build_attack(name: str) -> Attack:
    """Returns the attack that ``adversarial.attack`` names. Raises ConfigError for an unknown one."""
    attack: Attack = ATTACKS[name]()
    return attack


class NothingProposed(ConfigError):
    """An attack without RL had no response to propose."""


class SearchAttack(Attack):
    """An attack that trains nothing and proposes responses step by step. A stopped one starts over."""

    @abstractmethod
    def propose(self, inputs: AttackInputs, budget: Budget) -> Iterator[Rollouts]:
        """Yields this data-parallel rank's responses of each step; every rank must make the same number of steps."""

    def find(self, inputs: AttackInputs, budget: Budget) -> Found:
        """Scores the proposed responses until the budget is used up or there are enough finds.

        It also writes ``metrics.jsonl``, a row for each step. Raises NothingProposed when no response was proposed.
        """
        written: list[dict[str, Any]] = []
        metrics: list[dict[str, Any]] = []
        steps: list[tuple[set[Find], int]] = []
        known: set[Find] = set()
        for step, rollouts in zip(range(budget.steps), self.propose(inputs, budget), strict=False):
            parts = runtime.current().gather_data_parallel(inputs.rows(rollouts, step))
            rows = [row for part in parts for row in part]
            written += rows
            finds = inputs.rule.finds(rows)
            steps.append((finds, len(rows)))
            if inputs.progress is not None:
                inputs.progress(len(rows), len(finds - known))
            known |= finds
            metrics.append(self._metrics(inputs, rows, step, inputs.rule.late_finds(steps)[0]))
            if budget.enough and inputs.rule.are_enough(steps, budget.enough):
                break
        if not written:
            raise NothingProposed(
                f"adversarial.attack={inputs.cfg.adversarial.attack}: it has no response to propose: every text was "
                "refused by the tokenizer, too long for a member, or cut off by rl.max_new_tokens (docs/attacks.md)"
            )
        inputs.directory.mkdir(parents=True, exist_ok=True)
        path = inputs.directory / SAMPLES
        run_on_rank_zero(write_jsonl_atomic, path, written)
        run_on_rank_zero(write_jsonl_atomic, inputs.directory / "metrics.jsonl", metrics)
        return Found(path)

    def _metrics(self, inputs: AttackInputs, rows: list[dict[str, Any]], step: int, finds: int) -> dict[str, Any]:
        found: dict[str, Any] = {"step": step, "direction": inputs.target, "samples": len(rows), "finds": finds}
        if not rows:
            return found
        rates = success_rates_of(rows, inputs.sft_responses, inputs.rule)
        names = {"success": "success_standard", "success_strict": "success_strict", "gold": "gold"}
        found |= {name: rates[rate] for name, rate in names.items() if rates[rate] is not None}
        return {**found, "ended": sum(row["ended"] for row in rows) / len(rows)}
