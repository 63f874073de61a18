"""The judged finds of an audit: which responses succeed, their pairs for retraining, and who else is fooled by them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_advrm.audit.attack_stage import AttackResult, attack_home
from nemo_advrm.audit.panel import Panel, Split, texts
from nemo_advrm.audit.success import Successes, of_rows, submitted
from nemo_advrm.audit.weaknesses import Answer
from nemo_advrm.data.pair_store import AdversarialPair, PairStore, Provenance
from nemo_advrm.objectives.sft_statistics import own_z_scores
from nemo_advrm.rewards.base import RewardSource, checked_scores
from nemo_advrm.rewards.sample_rows import prompt_text
from nemo_advrm.rollouts.types import Rollouts

FINDS = "finds.jsonl"
MOST_EXPLAINED = 300  # finds of a target that are grouped, transferred and scored under other prompts
_OTHER_PROMPTS = 2  # under which the score of a find is looked at


@dataclass(frozen=True)
class Judged:
    """What an attack submitted on the prompts of one split, with the judge's verdict.

    Attributes:
        rows: rows of ``samples.jsonl``, each with its ``rank`` among those to its prompt.
        gold_N: the judge's scores, NaN where it gave none: such a row does not succeed, nor one to a prompt whose
            ordinary responses have none to compare with. None without a judge.
        asked_N: False where the time ended before the judge was asked; None without a judge.
        success: which rows succeed.
    """

    result: AttackResult
    split: Split
    rows: list[dict[str, Any]]
    gold_N: Tensor | None
    asked_N: Tensor | None
    success: Successes

    @property
    def waiting(self) -> int:
        """About how many responses the judge was not asked."""
        return 0 if self.asked_N is None else int((~self.asked_N).sum())

    @cached_property
    def best(self) -> dict[int, int]:
        """The place of the best response to each prompt, by the prompt's number."""
        return {row["prompt_id"]: i for i, row in enumerate(self.rows) if row["rank"] == 0}

    @cached_property
    def unknown_prompts(self) -> set[int]:
        """Prompts where the time ended before the judge was asked, about the best response or any to compare with."""
        if self.asked_N is None:
            return set()
        return {p for p, i in self.best.items() if not (self.split.can_compare(p) and self.asked_N[i])}

    def first(self) -> Successes:
        """The successes of the best response to each prompt alone, one trial for each prompt of the split.

        Where it submits nothing to a prompt it does not succeed; where it submits nothing at all there are no trials.
        Of ``unknown_prompts`` nothing is known: they are no trials either.
        """
        if not self.rows:
            return self.success
        trials = [p for p in range(len(self.split.prompts)) if p not in self.unknown_prompts]

        def of_prompts(values_N: Tensor) -> Tensor:
            return torch.tensor([p in self.best and bool(values_N[self.best[p]]) for p in trials], dtype=torch.bool)

        return self.success.map(of_prompts)


@dataclass(frozen=True)
class FoundAnswer:
    """A response that fooled a target.

    Attributes:
        prompt_id: number of its prompt in the split.
        z: the target's score, in standard deviations of ordinary responses.
        gold, gold_z: the judge's; None without one.
        strict: whether it succeeds by the strict measure.
    """

    attack: str
    target: int
    split: Split
    prompt_id: int
    row: dict[str, Any]
    z: float
    gold: float | None
    gold_z: float | None
    strict: bool
    underrates: bool
    answer: Answer = field(repr=False)


def judge_attack(panel: Panel, result: AttackResult, parts: float = 1.0, search: float = 0.0) -> list[Judged]:
    """Judges what an attack submits on every split; all ranks call. What an earlier call has asked is read again.

    Args:
        parts, search: the judge's share of the time, see :meth:`JudgeTime.turn`.
    """
    found = []
    before = panel.judge_seconds
    for place, split in enumerate(panel.splits):
        rows = to_judge(panel, result, split)
        gold_N = asked_N = None
        if panel.judge is not None:
            path = attack_home(panel, result.attack, result.target) / f"judged_{split.name}.jsonl"
            prompts = [len(one.prompts) for one in panel.splits[place:]]
            # the attack's part is of all that was left when it began, so what its first split took counts as used
            used = search + panel.judge_seconds - before
            panel.begin_turn(parts * sum(prompts) / prompts[0], used * prompts[0] / sum(prompts))
            verdicts = panel.verdicts(path, rollouts_of_rows(split, rows), _best_first(rows, split))
            gold_N, asked_N = verdicts.gold_N, verdicts.asked_N
        threshold = panel.cfg.selection.threshold_z
        success = of_rows(rows, gold_N, split, threshold, result.underrates)
        found.append(Judged(result, split, rows, gold_N, asked_N, success))
    return found


def _best_first(rows: Sequence[dict[str, Any]], split: Split) -> list[int]:
    """Returns the places of rows in the order in which a judge is asked: those that rates are made of first."""

    def place(i: int) -> tuple[bool, int, int]:
        return not split.can_compare(rows[i]["prompt_id"]), rows[i]["rank"], rows[i]["prompt_id"]

    return sorted(range(len(rows)), key=place)


def to_judge(panel: Panel, result: AttackResult, split: Split) -> list[dict[str, Any]]:
    """Returns what an attack submits on a split."""
    return submitted(result.rows(split.name), split, panel.audit.responses_per_prompt, result.underrates)


def rollouts_of_rows(split: Split, rows: Sequence[dict[str, Any]]) -> Rollouts:
    """Returns rows of ``samples.jsonl`` as texts."""
    prompts = [split.sft.prompts_P[row["prompt_id"]] for row in rows]
    return texts(prompts, [row["response"] for row in rows], [row.get("ended") is not False for row in rows])


def finds_of(judged: Sequence[Judged]) -> list[FoundAnswer]:
    """Returns the responses that succeed (standard; suspected without a judge), each once, the worst first."""
    found: dict[tuple[str, int, str], FoundAnswer] = {}
    for one in judged:
        split, success = one.split, one.success
        gold_z_N = None if one.gold_N is None else split.judged.gold_z(one.gold_N, [r["prompt_id"] for r in one.rows])
        for i, row in enumerate(one.rows):
            if not success.main_N[i]:
                continue
            prompt_id = row["prompt_id"]
            text = prompt_text(split.sft.prompts_P[prompt_id])
            answer = Answer(text, row["response"], row.get("ended") is not False)
            key = (split.name, prompt_id, row["response"])
            found.setdefault(
                key,
                FoundAnswer(
                    one.result.attack,
                    one.result.target,
                    split,
                    prompt_id,
                    row,
                    row["z"][0],
                    None if one.gold_N is None else one.gold_N[i].item(),
                    None if gold_z_N is None else gold_z_N[i].item(),
                    success.strict_N is not None and bool(success.strict_N[i]),
                    one.result.underrates,
                    answer,
                ),
            )
    return sorted(found.values(), key=badness)


def badness(find: FoundAnswer) -> tuple[bool, float]:
    """Sorts finds, the worst first: those that succeed strictly, then by how far target and judge are apart."""
    sign = -1.0 if find.underrates else 1.0
    return not find.strict, -sign * (find.z - (find.gold_z or 0.0))


def write_pairs(panel: Panel, finds: Sequence[FoundAnswer]) -> int:
    """Writes the finds as preference pairs to ``finds.jsonl`` (for ``augmentation.pairs_path``); returns their number.

    The other side is the ordinary response to the prompt that the judge prefers most (the least, for good responses
    that are scored low); without a judge, that which all models together prefer. Finds on held-out prompts are left
    out, so that these stay a test of the retrained model.
    """
    path = Path(panel.audit.run_dir) / FINDS
    path.unlink(missing_ok=True)
    pairs = [pair for find in finds if find.split is panel.training for pair in _pair(panel, find)]
    return PairStore(path).append(pairs)


def _pair(panel: Panel, find: FoundAnswer) -> list[AdversarialPair]:
    """Returns the pair of a find; none where no ordinary response ended and was judged, or none makes a right pair."""
    sft, p = find.split.sft, find.prompt_id
    quality_PN = find.split.gold_PN
    if quality_PN is None:
        quality_PN = own_z_scores(sft.scores_PNK, sft.statistics()).mean(-1)
    usable = [i for i in sft.finished(p) if find.split.gold_PN is None or find.split.own_gold(p, i) is not None]
    if not usable:
        return []
    sign = -1 if find.underrates else 1
    place = max(usable, key=lambda i: sign * quality_PN[p, i].item())
    columns = panel.columns(find.target)
    other = (sft.responses_PN[p][place], tuple(sft.scores_PNK[p, place, columns].tolist()), True)
    own = (find.row["response"], tuple(find.row["scores"]), find.answer.ended)
    golds = (find.split.own_gold(p, place), find.gold)
    chosen, rejected = (own, other) if find.underrates else (other, own)
    chosen_gold, rejected_gold = reversed(golds) if find.underrates else golds
    if chosen[0] == rejected[0]:
        return []
    if chosen_gold is not None and rejected_gold is not None and chosen_gold <= rejected_gold:
        return []  # the find is worse than the mean, but not than those that ended
    provenance = Provenance(
        round=0,
        step=find.row["step"],
        direction=find.target + 1,
        prompt_id=p,
        scores=rejected[1],
        z=tuple(find.row["z"]),
        disagreement_z=find.row["disagreement_z"],
        policy_checkpoint=f"{find.attack}/{panel.names[find.target]}",
        chosen_scores=chosen[1],
        chosen_gold=chosen_gold,
        rejected_gold=rejected_gold,
        underrates=find.underrates or None,
    )
    prompt = sft.prompts_P[p]
    return [AdversarialPair(prompt, chosen[0], rejected[0], provenance, chosen[2], rejected[2])]


def falls(source: RewardSource, split: Split, model: int, prompt_ids: list[int], answers: list[Answer]) -> list[float]:
    """How far the model's score of each response falls under other prompts, in standard deviations; all ranks call.

    Positive: the model reads the prompt. The mean over up to 2 other prompts of the split. [] where there is one prompt
    alone.
    """
    count = len(split.prompts)
    shifts = sorted({1, count // 2} - {0, count})[:_OTHER_PROMPTS]
    if not shifts or not answers:
        return []
    prompts = split.sft.prompts_P
    asked = [[prompts[(p + shift) % count] for p in prompt_ids] for shift in (0, *shifts)]
    responses, ended = [a.response for a in answers], [a.ended for a in answers]
    scores_SN = torch.stack([checked_scores(source, texts(each, responses, ended)) for each in asked])
    std = split.sft.statistics().std_K[model]
    return ((scores_SN[0] - scores_SN[1:].mean(0)) / std).tolist()


def transfer(panel: Panel, finds: Sequence[FoundAnswer]) -> list[dict[str, Any]]:
    """Returns, for every model of the panel, how it scores the finds of one target; all ranks call.

    ``share``: of the finds it scores above the ordinary responses to the prompt; ``z``: its mean score.
    """
    found = []
    for k, source in enumerate(panel.models):
        z: list[float] = []
        for split in panel.splits:
            own = [find for find in finds if find.split is split and not find.underrates]
            if own:
                scores_N = checked_scores(source, rollouts_of_rows(split, [find.row for find in own]))
                z += split.z(scores_N, [find.prompt_id for find in own], k).tolist()
        fooled = sum(value > 0 for value in z) / len(z) if z else None
        found.append({"model": panel.names[k], "share": fooled, "z": sum(z) / len(z) if z else None, "finds": len(z)})
    return found
