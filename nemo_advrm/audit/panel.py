"""The models of an audit side by side, with the policy's ordinary responses scored by all of them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_advrm.audit.counting import Counted
from nemo_advrm.audit.weaknesses import Answer
from nemo_advrm.config.schema import AuditConfig, Config
from nemo_advrm.data.jsonl import read_jsonl, write_jsonl_atomic
from nemo_advrm.data.messages import Message
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.errors import DataError, RewardSourceError
from nemo_advrm.objectives.sft_statistics import own_z_scores, z_scores
from nemo_advrm.rewards.base import RewardSource, answered_scores, checked_scores
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
    """

    name: str
    prompts: list[Prompt]
    sft: SFTScores
    gold_PN: Tensor | None = None

    def with_gold(self, gold_PN: Tensor) -> Split:
        """Returns the split with the judge's scores of the ordinary responses, NaN where there is none.

        Raises RewardSourceError when more than half of them have no score, or none beside another to the same prompt:
        such a judge measures nothing.
        """
        missing = int(gold_PN.isnan().sum())
        if missing * 2 > gold_PN.numel() or ((~gold_PN.isnan()).sum(1) < 2).all():
            raise RewardSourceError(
                f"the judge gave no score to {missing} of {gold_PN.numel()} ordinary responses to the "
                f"{self.name.replace('_', '-')} prompts: take another judge, or another judge.rubric"
            )
        return dataclasses.replace(self, gold_PN=gold_PN)

    @property
    def unjudged(self) -> int:
        """How many answers got no score."""
        return 0 if self.gold_PN is None else int(self.gold_PN.isnan().sum())

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

    @property
    def targets(self) -> int:
        return len(self.audit.target)

    @property
    def splits(self) -> list[Split]:
        return [self.training, *([self.held_out] if self.held_out is not None else [])]

    def verdicts(self, path: Path, rollouts: Rollouts) -> Tensor:
        """Returns the judge's scores, [N], NaN where it gave none; see :func:`stored_scores`. All ranks call."""
        assert self.judge is not None
        return stored_scores(path, self.judge, rollouts, self.cfg.judge.on_no_answer == "lowest")

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


def stored_scores(path: Path, source: RewardSource, rollouts: Rollouts, lowest: bool = False) -> Tensor:
    """Scores responses, or reads the scores that an earlier call wrote to ``path``, [N] fp32; all ranks call.

    A judge may be slow or cost money, so nothing is asked twice. NaN (null in the file) where it gave no score, unless
    ``lowest`` (judge.on_no_answer) gives such responses the lowest. Raises DataError for a file of other responses.
    """
    known = run_on_rank_zero(_read_scores, path, rollouts)
    if known is None:
        scores_N = torch.empty(0)
        if len(rollouts):
            scores_N = checked_scores(source, rollouts) if lowest else answered_scores(source, rollouts)
        known = [None if math.isnan(score) else score for score in scores_N.tolist()]
        rows = [{"response": r, "score": s} for r, s in zip(rollouts.responses, known, strict=True)]
        run_on_rank_zero(write_jsonl_atomic, path, rows)
    return torch.tensor([math.nan if score is None else score for score in known], dtype=torch.float32)


def _read_scores(path: Path, rollouts: Rollouts) -> list[float | None] | None:
    if not path.exists():
        return None
    rows = [row for _, row in read_jsonl(path)] if path.stat().st_size else []  # nothing was submitted
    cure = f"remove {path} and its responses are scored again"
    if [row.get("response") if isinstance(row, dict) else None for row in rows] != rollouts.responses:
        raise DataError(f"{path}: holds scores of other responses: {cure}")
    scores = [row.get("score") for row in rows]
    if not all(score is None or type(score) in (int, float) for score in scores):
        raise DataError(f"{path}: holds a score that is no number: {cure}")
    return scores
