"""Builds rows of scored responses: those of ``reference.jsonl``, and those of ``samples.jsonl`` for selection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemo_advrm.data.messages import Message
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.objectives.sft_statistics import own_z_scores
from nemo_advrm.rewards.base import RewardSource, checked_scores
from nemo_advrm.rewards.detector_features import FeatureReader
from nemo_advrm.rewards.ensemble import RewardOutput
from nemo_advrm.rollouts.types import Rollouts


def prompt_text(messages: tuple[Message, ...]) -> str:
    """Returns a prompt as text, for records and reports; several messages with their roles."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)


def gold_and_z(
    gold: RewardSource | None, rollouts: Rollouts, sft_responses: SFTScores
) -> tuple[Tensor | None, Tensor | None]:
    """Returns gold of an attack's responses and its z by the SFT responses, [N] each; None where there is no gold."""
    if gold is None:
        return None, None
    gold_N = checked_scores(gold, rollouts)
    return gold_N, sft_responses.gold_z(gold_N, rollouts.prompt_index)


def trajectory_rows(
    rollouts: Rollouts,
    reward_output: RewardOutput,
    target: int,
    policy: str,
    step: int,
    gold_N: Tensor | None = None,
    gold_z_N: Tensor | None = None,
) -> list[dict[str, Any]]:
    """Returns one row of ``samples.jsonl`` per response of an adversary, scored by an ``AdversarialReward``.

    ``reward`` is what the adversary was trained on, with the penalty for unended responses. ``selected`` is False;
    selection sets it later. Rows hold Python numbers and no tensors: a row of a tensor is a view, and pickling a view
    for other ranks copies its whole storage.

    Args:
        target: the attacked member, from 1 (the field ``direction``).
        policy: name of the adversary's directory.
    """
    index, lists = rollouts.prompt_index, {name: table.tolist() for name, table in reward_output.details.items()}
    scores, rewards = reward_output.scores_NK.tolist(), reward_output.rewards_N.tolist()
    origins = [{"origin": name} for name in rollouts.origins or ()] or [{}] * len(rollouts)
    gold, gold_z = _column(gold_N, len(rollouts)), _column(gold_z_N, len(rollouts))
    return [
        {
            "direction": target,
            "policy": policy,
            "step": step,
            "prompt_id": index[i],
            "prompt": prompt_text(rollouts.prompts[i]),
            "response": rollouts.responses[i],
            "length": len(rollouts.response_tokens[i]),
            "ended": rollouts.ended[i],
            "scores": scores[i],
            "z": lists["z"][i],
            "disagreement": lists["disagreement"][i],
            "disagreement_z": lists["disagreement_z"][i],
            "reward": rewards[i],
            "gold": gold[i],
            "gold_z": gold_z[i],
            "selected": False,
            **origins[i],
        }
        for i in range(len(rollouts))
    ]


def _column(values_N: Tensor | None, count: int) -> list[float | None]:
    return [None] * count if values_N is None else values_N.tolist()


def _by_prompt(values_N: Tensor | None, prompts: int) -> Tensor | None:
    return None if values_N is None else values_N.reshape(prompts, -1)


def score_sft_responses(
    rollouts: Rollouts, per_prompt: int, reader: FeatureReader, gold: RewardSource | None = None
) -> tuple[SFTScores, list[dict[str, Any]]]:
    """Scores SFT responses by every member, and by ``gold`` for evaluation; returns them with their rows.

    Args:
        rollouts: ``per_prompt`` responses to every prompt, those to one prompt adjacent.
        reader: scores them, and reads what its detectors read.

    Returns:
        The scored responses, and the rows of ``reference.jsonl``.
    """
    found = reader.read(rollouts)
    scores_NK = found.scores_NK
    gold_N = checked_scores(gold, rollouts) if gold is not None else None
    count = len(rollouts) // per_prompt
    responses = [rollouts.responses[i * per_prompt : (i + 1) * per_prompt] for i in range(count)]
    sft_responses = SFTScores(
        rollouts.prompts[::per_prompt],
        responses,
        scores_NK.reshape(count, per_prompt, -1),
        None if gold_N is None else gold_N.reshape(count, per_prompt),
        [rollouts.ended[i * per_prompt : (i + 1) * per_prompt] for i in range(count)],
        hidden_states=found.hidden_states,
        log_probs_PN=_by_prompt(found.log_probs_N, count),
        entropies_PN=_by_prompt(found.entropies_N, count),
        lengths_PN=_by_prompt(found.lengths_N, count),
    )
    index = [i for i in range(count) for _ in range(per_prompt)]
    if len(reader.members) > 1:
        z_NK = own_z_scores(sft_responses.scores_PNK, sft_responses.statistics()).flatten(0, 1)
    else:
        z_NK = torch.full_like(scores_NK, float("nan"))
    scores, z, gold_column = scores_NK.tolist(), z_NK.tolist(), _column(gold_N, len(rollouts))
    rows = [
        {
            "prompt_id": index[i],
            "prompt": prompt_text(rollouts.prompts[i]),
            "messages": rollouts.prompts[i],
            "response": rollouts.responses[i],
            "ended": rollouts.ended[i],
            "tokens": rollouts.response_tokens[i],
            "scores": scores[i],
            "z": z[i],
            "gold": gold_column[i],
        }
        for i in range(len(rollouts))
    ]
    of_policy = {"log_prob": found.log_probs_N, "entropy": found.entropies_N, "log_prob_tokens": found.lengths_N}
    for name, values_N in of_policy.items():
        if values_N is not None:
            for row, value in zip(rows, values_N.tolist(), strict=True):
                row[name] = value
    return sft_responses, rows
