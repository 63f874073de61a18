"""The models of an audit side by side, with the policy's ordinary responses scored by all of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_advrm.audit.counting import Counted
from nemo_advrm.audit.time_spent import JudgeTime, spent_seconds
from nemo_advrm.audit.verdicts import Verdicts, stored_verdicts
from nemo_advrm.audit.weaknesses import Answer
from nemo_advrm.config.schema import AuditConfig, Config
from nemo_advrm.data.messages import Message
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.errors import RewardSourceError
from nemo_advrm.objectives.sft_statistics import own_z_scores, z_scores
from nemo_advrm.rewards.base import RewardSource
from nemo_advrm.rewards.features import ReferenceFeatures
from nemo_advrm.rewards.sample_rows import prompt_text
from nemo_advrm.rollouts.types import Prompt, Rollouts


@dataclass(frozen=True)
class Split:
    """Prompts with the policy's ordinary responses to them.

    Attributes:
        name: ``training`` (the attacks see these prompts) or ``held_out``.
        sft: scores of all models, targets first, then the others.
        gold_PN: the judge's scores of them, NaN where it gave none; None without a judge.
        asked_PN: False where the time ended before the judge was asked; None without a judge.
    """

    name: str
    prompts: list[Prompt]
    sft: SFTScores
    gold_PN: Tensor | None = None
    asked_PN: Tensor | None = None

    def with_verdicts(self, verdicts: Verdicts) -> Split:
        """Returns the split with what the judge says of the ordinary responses, in the order of the prompts.

        Raises RewardSourceError when more than half of those that it was asked about have no score, or none beside
        another to the same prompt: nothing can be measured by that.
        """
        shape = self.sft.scores_PNK.shape[:2]
        gold_PN, asked_PN = verdicts.gold_N.reshape(shape), verdicts.asked_N.reshape(shape)
        asked, missing = int(asked_PN.sum()), int((gold_PN.isnan() & asked_PN).sum())
        where = f"ordinary responses to the {self.name.replace('_', '-')} prompts"
        nowhere_two = bool(((~gold_PN.isnan()).sum(1) < 2).all())
        if nowhere_two and asked < asked_PN.numel():
            raise RewardSourceError(
                f"the judge was asked about {asked} of {asked_PN.numel()} {where} before its share of the budget "
                "ended, too few to compare with: the same command goes on with the others, and a run with fewer "
                "prompts (num_prompts, num_held_out) or a larger budget needs no second call"
            )
        if missing * 2 > asked or nowhere_two:
            raise RewardSourceError(
                f"the judge gave no score to {missing} of {asked} {where}: take another judge, or another judge.rubric"
            )
        return dataclasses.replace(self, gold_PN=gold_PN, asked_PN=asked_PN)

    def can_compare(self, prompt_id: int) -> bool:
        """Whether the judge was asked about an ordinary response to the prompt, or there is no judge."""
        return self.asked_PN is None or bool(self.asked_PN[prompt_id].any())

    def own_gold(self, prompt_id: int, place: int) -> float | None:
        """Returns the score that the judge gave an answer; None where it gave none."""
        gold = math.nan if self.gold_PN is None else self.gold_PN[prompt_id, place].item()
        return None if math.isnan(gold) else gold

    @cached_property
    def judged(self) -> SFTScores:
        """The responses with the judge's scores."""
        return dataclasses.replace(self.sft, gold_PN=self.gold_PN)

    def of(self, columns: list[int]) -> SFTScores:
        """Returns the responses as an attack on the model ``columns[0]`` with the others ``columns[1:]`` sees them."""
        hidden = {0: self.sft.hidden_states[columns[0]]} if columns[0] in self.sft.hidden_states else {}
        return dataclasses.replace(self.sft, scores_PNK=self.sft.scores_PNK[..., columns], hidden_states=hidden)

    def z(self, scores_N: Tensor, prompt_ids: list[int], model: int) -> Tensor:
        """Returns scores of the model of this column in standard deviations of ordinary responses, [N]."""
        statistics = self.sft.statistics()
        mean_N = statistics.prompt_mean_PK[prompt_ids, model]
        return z_scores(scores_N[:, None], mean_N[:, None], statistics.std_K[[model]])[:, 0]

    @cached_property
    def own_z_PNK(self) -> Tensor:
        """z of the ordinary responses themselves, each against the others to its prompt."""
        return own_z_scores(self.sft.scores_PNK, self.sft.statistics())

    def answers(self) -> list[Answer]:
        """Returns the ordinary responses as texts, in the order of the prompts."""
        found = []
        for p, responses in enumerate(self.sft.responses_PN):
            text = prompt_text(self.sft.prompts_P[p])
            found += [Answer(text, *one) for one in zip(responses, self.sft.ended(p), strict=True)]
        return found


@dataclass(frozen=True)
class Panel:
    """What an audit works with.

    Attributes:
        audit, cfg, tokenizer: the settings, the configuration of attacks, the policy's tokenizer.
        names: of targets and others.
        models: targets first, then the others.
        judge: None without one.
        training, held_out: the prompts; ``held_out`` is None without any.
        sft_policy: the loaded SFT policy where the detector reads it.
        judge_time: bounds what the judge is asked; None where it may be asked everything.
    """

    audit: AuditConfig
    cfg: Config
    tokenizer: Tokenizer
    names: list[str]
    models: list[RewardSource]
    judge: RewardSource | None
    training: Split
    held_out: Split | None
    sft_policy: ReferenceFeatures | None = None
    judge_time: JudgeTime | None = None

    @property
    def targets(self) -> int:
        return len(self.audit.target)

    @property
    def splits(self) -> list[Split]:
        return [self.training, *([self.held_out] if self.held_out is not None else [])]

    def verdicts(self, path: Path, rollouts: Rollouts, order: Sequence[int]) -> Verdicts:
        """Returns what the judge says of responses, see :func:`stored_verdicts`. All ranks call."""
        assert self.judge is not None
        lowest = self.cfg.judge.on_no_answer == "lowest"
        return stored_verdicts(path, self.judge, rollouts, lowest, self.judge_time, order)

    def begin_turn(self, parts: float, search: float = 0.0) -> None:
        """Begins a turn of the judge, which gets one part of so many of the time that is left; all ranks call."""
        if self.judge_time is not None:
            run_on_rank_zero(lambda time: time.turn(spent_seconds(self.audit), parts, search), self.judge_time)

    @property
    def judge_seconds(self) -> float:
        """Seconds that the judge has taken; known on rank 0."""
        return self.judge_time.seconds if self.judge_time is not None else 0.0

    def columns(self, target: int) -> list[int]:
        """Returns the indices of the members of an attack: the target (from 0), then the others."""
        return [target, *range(self.targets, len(self.models))]

    def members(self, target: int, counter: Any = None) -> list[RewardSource]:
        """Returns the members of an attack on a target; ``counter`` is told of the responses that it scores."""
        found = [self.models[k] for k in self.columns(target)]
        return found if counter is None else [Counted(found[0], counter), *found[1:]]


def texts(prompts: list[tuple[Message, ...]], responses: list[str], ended: list[bool]) -> Rollouts:
    """Returns responses as rollouts of texts alone, which every source reads by its own tokenizer."""
    none: list[list[int]] = [[] for _ in responses]
    return Rollouts(prompts, responses, ended, none, none, [0] * len(responses), fingerprint="")
