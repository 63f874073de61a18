"""Rows that are written of scored responses: ``reference.jsonl`` and the ``samples.jsonl`` that selection reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemo_advrm.data.messages import Message
from nemo_advrm.rewards.base import RewardSource, Rollouts, checked_scores
from nemo_advrm.rewards.ensemble import Judgement
from nemo_advrm.rewards.reference import Reference, standardise


def prompt_text(messages: tuple[Message, ...]) -> str:
    """A prompt as one line of text, for records and reports."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)


def trajectory_rows(
    rollouts: Rollouts,
    judgement: Judgement,
    direction: int,
    policy: str,
    step: int,
    gold_N: Tensor | None = None,
    gold_z_N: Tensor | None = None,
) -> list[dict[str, Any]]:
    """One row of ``samples.jsonl`` per response of an adversary, judged by an ``AdversarialReward``.

    Rows have ``selected`` = False; selection marks them later.
    """
    details, index = judgement.details, rollouts.prompt_index
    return [
        {
            "direction": direction,
            "policy": policy,
            "step": step,
            "prompt_id": index[i],
            "prompt": prompt_text(rollouts.prompts[i]),
            "response": rollouts.responses[i],
            "length": len(rollouts.response_tokens[i]),
            "ended": rollouts.ended[i],
            "scores": judgement.scores_NK[i],
            "z": details["z"][i],
            "disagreement": details["disagreement"][i],
            "disagreement_z": details["disagreement_z"][i],
            "reward": judgement.rewards_N[i],
            "gold": None if gold_N is None else gold_N[i],
            "gold_z": None if gold_z_N is None else gold_z_N[i],
            "selected": False,
        }
        for i in range(len(rollouts))
    ]


def score_reference(
    rollouts: Rollouts, per_prompt: int, sources: list[RewardSource], gold: RewardSource | None = None
) -> tuple[Reference, list[dict[str, Any]]]:
    """The reference that ``per_prompt`` SFT responses of every prompt make, and its rows of ``reference.jsonl``.

    Responses of one prompt stand together. Every member scores, and gold where it is given, for evaluation.
    """
    scores_NK = torch.stack([checked_scores(source, rollouts) for source in sources], -1)
    gold_N = checked_scores(gold, rollouts) if gold is not None else None
    count = len(rollouts) // per_prompt
    responses = [rollouts.responses[i * per_prompt : (i + 1) * per_prompt] for i in range(count)]
    reference = Reference(
        rollouts.prompts[::per_prompt],
        responses,
        scores_NK.reshape(count, per_prompt, -1),
        None if gold_N is None else gold_N.reshape(count, per_prompt),
        [rollouts.ended[i * per_prompt : (i + 1) * per_prompt] for i in range(count)],
    )
    index = [i for i in range(count) for _ in range(per_prompt)]
    if len(sources) > 1:
        z_NK = standardise(reference, reference.statistics(), scores_NK, index, 0).z_NK
    else:
        z_NK = torch.full_like(scores_NK, float("nan"))
    rows = [
        {
            "prompt_id": index[i],
            "prompt": prompt_text(rollouts.prompts[i]),
            "messages": rollouts.prompts[i],
            "response": rollouts.responses[i],
            "ended": rollouts.ended[i],
            "tokens": rollouts.response_tokens[i],
            "scores": scores_NK[i],
            "z": z_NK[i],
            "gold": None if gold_N is None else gold_N[i],
        }
        for i in range(len(rollouts))
    ]
    return reference, rows
