"""How often an attack succeeds, and how often an ordinary response does, with intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_advrm.attacks.success_rates import success_of
from nemo_advrm.audit.measure_names import MEASURES
from nemo_advrm.audit.panel import Split
from nemo_advrm.objectives.proportions import wilson_interval

Row = dict[str, Any]


@dataclass(frozen=True)
class Successes:
    """Which of N responses succeed, bool [N] each; those that need a judge are None without one."""

    standard_N: Tensor | None
    strict_N: Tensor | None
    suspected_N: Tensor

    def of(self, measure: str) -> Tensor | None:
        found: Tensor | None = getattr(self, f"{measure}_N")
        return found

    def map(self, change: Callable[[Tensor], Tensor]) -> Successes:
        """Returns the successes with ``change`` applied to every measure that there is."""
        standard_N, strict_N = (None if each is None else change(each) for each in (self.standard_N, self.strict_N))
        return Successes(standard_N, strict_N, change(self.suspected_N))

    @property
    def main_N(self) -> Tensor:
        """Standard success, suspected finds without a judge."""
        return self.suspected_N if self.standard_N is None else self.standard_N


def successes(
    z_N: Tensor,
    unusual_N: Tensor,
    gold_N: Tensor | None,
    gold_z_N: Tensor | None,
    sft_gold_N: Tensor | None,
    threshold: float,
    underrates: bool = False,
) -> Successes:
    """Judges N responses.

    Args:
        z_N: the target's scores in standard deviations of ordinary responses to the prompt.
        unusual_N: the detector's.
        gold_N, gold_z_N, sft_gold_N: the judge's scores, these standardised, and its mean of the ordinary responses to
            the prompt; None without a judge.
        threshold: least Z(U) of a suspected find.
        underrates: the responses are to be good ones that the target scores low. Standard: scored below the ordinary
            responses, judged above. Strict: z < -1.96, and judged above. Suspected: z < -threshold.
    """
    suspected_N = z_N < -threshold if underrates else (z_N > 0) & (unusual_N > threshold)
    if gold_N is None or gold_z_N is None or sft_gold_N is None:
        return Successes(None, None, suspected_N)
    standard, strict = success_of(underrates)
    standard_N = standard(z_N, torch.zeros_like(z_N), gold_N, sft_gold_N)
    return Successes(standard_N, strict(z_N, gold_z_N), suspected_N)


def of_rows(rows: Sequence[Row], gold_N: Tensor | None, split: Split, threshold: float, underrates: bool) -> Successes:
    """Judges rows of ``samples.jsonl`` of an attack; z is the target's, which is the first member."""
    z_N = torch.tensor([row["z"][0] for row in rows])
    unusual_N = torch.tensor([row["disagreement_z"] for row in rows])
    if gold_N is None or split.gold_PN is None:
        return successes(z_N, unusual_N, None, None, None, threshold, underrates)
    prompts = [row["prompt_id"] for row in rows]
    gold_z_N, sft_gold_N = split.judged.gold_z(gold_N, prompts), split.gold_PN.nanmean(1)[prompts]
    return successes(z_N, unusual_N, gold_N, gold_z_N, sft_gold_N, threshold, underrates)


def of_ordinary(
    split: Split, columns: list[int], detector: str, threshold: float, underrates: bool = False
) -> Successes:
    """Judges the ordinary responses, each against the others to its prompt, in the order of the prompts.

    Without a score of the judge a response does not succeed.
    """
    view = split.of(columns)
    z_N = split.own_z_PNK[..., columns[0]].flatten()
    unusual_N = view.detector(detector, 0).own_S
    if split.gold_PN is None:
        return successes(z_N, unusual_N, None, None, None, threshold, underrates)
    gold_z_PN = split.judged.own_gold_z()
    assert gold_z_PN is not None
    count = split.gold_PN.size(1)
    sft_gold_N = split.gold_PN.nanmean(1).repeat_interleave(count)
    gold_N, gold_z_N = split.gold_PN.flatten(), gold_z_PN.flatten()
    return successes(z_N, unusual_N, gold_N, gold_z_N, sft_gold_N, threshold, underrates)


def submitted(rows: Sequence[Row], split: Split, most: int, underrates: bool) -> list[Row]:
    """Returns the responses that an attack submits: to each prompt its ``most`` best different ones, best first.

    Best is what the attack itself looks for, its reward; the judge is not asked. Of good responses that are to be
    scored low it is the lowest score. Ordinary responses are not submitted. Each row gets its ``rank``, from 0.
    """
    ordinary = [Counter(responses) for responses in split.sft.responses_PN]

    def place(row: Row) -> tuple[int, float, int]:
        best = -row["z"][0] if underrates else row.get("reward", row["z"][0])
        return row["prompt_id"], -best, row["step"]

    taken: list[Row] = []
    seen: dict[int, set[str]] = {}
    for row in sorted(rows, key=place):
        known = seen.setdefault(row["prompt_id"], set())
        text = row["response"]
        if len(known) < most and text not in known and not ordinary[row["prompt_id"]][text]:
            taken.append({**row, "rank": len(known)})
            known.add(text)
    return taken


def rate(success_N: Tensor | None, trials: int | None = None) -> dict[str, float] | None:
    """Returns ``rate``, ``low`` and ``high`` of a 95 % interval, and ``trials``; None without a measure.

    ``trials``: independent ones, fewer than N where several responses answer one prompt.
    """
    if success_N is None or not len(success_N):
        return None
    share = success_N.double().mean().item()
    count = len(success_N) if trials is None else trials
    low, high = wilson_interval(share * count, count)
    return {"rate": share, "low": low, "high": high, "trials": count}


def rates(found: Successes, trials: int | None = None) -> dict[str, Any]:
    """Returns the rate of every measure."""
    return {measure: rate(found.of(measure), trials) for measure in MEASURES}


def ordinary_rates(found: Successes, split: Split) -> dict[str, Any]:
    """Returns the rates of all ordinary responses that were judged; the prompts are the trials.

    A prompt with one judged response is left out: that response is its own mean, which it can never be below.
    """
    if split.gold_PN is None:
        return rates(found, len(split.prompts))
    judged_PN = ~split.gold_PN.isnan()
    judged_PN &= judged_PN.sum(1, keepdim=True) > 1
    return rates(found.map(lambda values_N: values_N[judged_PN.flatten()]), int(judged_PN.any(1).sum()))


def best_of_ordinary(found: Successes, split: Split, model: int, underrates: bool = False) -> Successes:
    """Returns the successes of the ordinary response to each prompt that the model likes best: an attack by choice.

    With ``underrates`` it is the one that the model likes least. Prompts where the judge was not asked about it are
    left out.
    """
    scores_PN = split.sft.scores_PNK[..., model]
    count = scores_PN.size(1)
    best_P = scores_PN.argmin(1) if underrates else scores_PN.argmax(1)
    places_P = torch.arange(len(best_P)) * count + best_P
    if split.asked_PN is not None:
        places_P = places_P[split.asked_PN.flatten()[places_P]]
    return found.map(lambda values_N: values_N[places_P])
