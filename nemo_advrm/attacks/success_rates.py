"""How often the responses of an attack succeed, from their rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.objectives.success import standard_success, standard_underrated, strict_success, strict_underrated
from nemo_advrm.rewards.find_rule import FindRule

Measure = Callable[..., Tensor]


def success_of(underrates: bool) -> tuple[Measure, Measure]:
    """Returns the measures of standard and strict success: of bad responses scored high, or of good ones scored low."""
    if underrates:
        return standard_underrated, strict_underrated
    return standard_success, strict_success


def success_rates_of(
    rows: Sequence[dict[str, Any]], sft_responses: SFTScores, rule: FindRule
) -> dict[str, float | None]:
    """Returns the rates ``summary_file.RATES`` of rows of ``samples.jsonl``, at least one.

    The side of SFT is the mean of the SFT responses to the same prompt. With ``rule.underrates`` success is that of
    good responses scored low. Rates that need gold are None where a row has none.

    Args:
        sft_responses: of the prompts of the rows.
        rule: for the target of the rows.
    """
    finds = rule.share(rows)
    if sft_responses.gold_PN is None or any(row["gold"] is None or row["gold_z"] is None for row in rows):
        return {"success_standard": None, "success_strict": None, "finds": finds, "gold": None}
    places = [row["prompt_id"] for row in rows]
    score_N = torch.tensor([row["scores"][rule.target_index] for row in rows])
    z_N = torch.tensor([row["z"][rule.target_index] for row in rows])
    gold_N, gold_z_N = (torch.tensor([row[key] for row in rows]) for key in ("gold", "gold_z"))
    sft_score_N = sft_responses.prompt_mean(places)[:, rule.target_index]
    sft_gold_N = sft_responses.gold_PN.mean(1)[places]
    standard, strict = success_of(rule.underrates)
    return {
        "success_standard": standard(score_N, sft_score_N, gold_N, sft_gold_N).float().mean().item(),
        "success_strict": strict(z_N, gold_z_N).float().mean().item(),
        "finds": finds,
        "gold": gold_N.mean().item(),
    }
