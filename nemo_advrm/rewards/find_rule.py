"""The selection rule of one target: which responses of an attack are finds, and how many SFT responses would be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nemo_advrm.config.schema import AdversarialConfig, Config, SelectionConfig
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.data.tokenizers import Tokenizer, round_trips
from nemo_advrm.objectives.selection import first_step, is_underrated, qualifies
from nemo_advrm.objectives.sft_statistics import SFTStatistics, own_z_scores

Find = tuple[int, str]
"""(prompt_id, response)"""


def asks_others(options: AdversarialConfig) -> bool:
    """Returns whether the adversary's reward depends on the other members, or on the target alone."""
    return bool(options.coefficient if options.preset == "paper" else options.others_weight)


def falls_short(found: int, null: float, options: SelectionConfig) -> bool:
    """Returns whether ``found`` is below ``selection.null_ratio`` times the null count."""
    return found < options.null_ratio * null


class FindRule:
    """The selection rule for the attack on member ``target`` (from 1).

    A find is a response that the target scores above the mean of the prompt's SFT responses and whose Z(U) is above
    ``selection.threshold_z``. When the adversary maximised the target alone (``asks_others`` is false), the target's z
    must be above the threshold instead: the reward did not depend on the others, so the rule does not read their scores
    either, unless ``selection.require_others_negative`` is set. A find is also usable in a pair, not blank, and not one
    of the prompt's SFT responses.

    With ``underrates`` a find is a good response that the target scores low: its z is below -``selection.threshold_z``,
    and the mean z of the other members, where there are any, is above 0. The detector is not asked.

    Args:
        cfg: configuration of the stage.
        sft_responses: SFT responses to the prompts of the attack, with their scores.
        target: the attacked member, from 1.
        tokenizer: of the policy.
        underrates: whether the attack looks for good responses that are scored low (``Attack.underrates``).
    """

    def __init__(
        self, cfg: Config, sft_responses: SFTScores, target: int, tokenizer: Tokenizer, underrates: bool = False
    ) -> None:
        self.options = cfg.selection
        self.sft_responses = sft_responses
        self.tokenizer = tokenizer
        self.target = target
        self.target_index = target - 1
        self.detector = cfg.adversarial.detector
        self.by_disagreement = asks_others(cfg.adversarial)
        self.underrates = underrates

    @cached_property
    def usable_PI(self) -> list[list[int]]:
        """For each prompt, indices of the SFT responses that may be chosen: they ended and round-trip as text."""
        return [
            [i for i in self.sft_responses.finished(p) if round_trips(responses[i], self.tokenizer)]
            for p, responses in enumerate(self.sft_responses.responses_PN)
        ]

    def ranking(self, rows: Sequence[dict[str, Any]]) -> Tensor:
        """Returns what is compared with the threshold and ranks finds, [B]: Z(U), or z (-z) of the target."""
        if self.underrates:
            return torch.tensor([-row["z"][self.target_index] for row in rows])
        if self.by_disagreement:
            return torch.tensor([row["disagreement_z"] for row in rows])
        return torch.tensor([row["z"][self.target_index] for row in rows])

    def qualified(self, rows: Sequence[dict[str, Any]]) -> Tensor:
        """Returns which rows of ``samples.jsonl`` pass the rule, whether usable in a pair or not, bool [B]."""
        if not rows:
            return torch.zeros(0, dtype=torch.bool)
        # an empty response, or one of the SFT responses, is not an adversarial example
        new = [bool(r["response"].strip()) and r["response"] not in self._sft_PN[r["prompt_id"]] for r in rows]
        return self._qualified(rows) & torch.tensor(new)

    def unusable(self, row: dict[str, Any]) -> str | None:
        """Returns why an adversarial response cannot be one side of a pair, None when it can."""
        if self.options.require_ended and row.get("ended") is False:
            return "unended"
        if not round_trips(row["response"], self.tokenizer):
            return "not_text"
        return None if self.usable_PI[row["prompt_id"]] else "no_usable_sft"

    def finds(self, rows: Sequence[dict[str, Any]]) -> set[Find]:
        """Returns the different finds among the rows."""
        taken = [row for row, ok in zip(rows, self.qualified(rows).tolist(), strict=True) if ok]
        return {(row["prompt_id"], row["response"]) for row in taken if self.unusable(row) is None}

    def share(self, rows: Sequence[dict[str, Any]]) -> float:
        """Returns the share of rows that are finds; repeated finds count each time."""
        taken = [row for row, ok in zip(rows, self.qualified(rows).tolist(), strict=True) if ok]
        return sum(self.unusable(row) is None for row in taken) / len(rows)

    @cached_property
    def null_share(self) -> float:
        """Share of the SFT responses that pass the rule, each compared with the other responses to its prompt."""
        prompts, count, _ = self.sft_responses.scores_PNK.shape
        rows = [self.sft_row(p, i) for p in range(prompts) for i in range(count)]
        qualified_B = self._qualified(rows)
        return sum(ok and self._is_new_sft(row) for row, ok in zip(rows, qualified_B.tolist(), strict=True)) / len(rows)

    def sft_row(self, prompt: int, place: int) -> dict[str, Any]:
        """Returns an SFT response as a row of ``samples.jsonl``; z is relative to the prompt's other responses."""
        sft_responses = self.sft_responses
        return {
            "prompt_id": prompt,
            "step": 0,
            "response": sft_responses.responses_PN[prompt][place],
            "ended": sft_responses.ended(prompt)[place],
            "scores": sft_responses.scores_PNK[prompt, place].tolist(),
            "z": self.own_z_PNK[prompt, place].tolist(),
            "disagreement_z": self._own_disagreement_z_PN[prompt, place].item(),
            "gold": None if sft_responses.gold_PN is None else sft_responses.gold_PN[prompt, place].item(),
        }

    def null(self, samples: int) -> float:
        """Returns the null count: how many of ``samples`` SFT responses would pass the rule."""
        return self.null_share * samples

    def late_finds(self, steps: Sequence[tuple[set[Find], int]]) -> tuple[int, int]:
        """The different finds, and the samples, of the part of the steps that selection reads (``last_fraction``).

        Args:
            steps: the finds of every step so far and how many samples it had.
        """
        late = steps[first_step(len(steps), self.options.last_fraction) :]
        return len(set().union(*(finds for finds, _ in late))), sum(count for _, count in late)

    def are_enough(self, steps: Sequence[tuple[set[Find], int]], enough: int) -> bool:
        """Whether an attack may end after these ``steps``: selection would have ``enough`` finds, and keep them."""
        found, samples = self.late_finds(steps)
        return found >= enough and not self.falls_short(found, samples)

    def falls_short(self, found: int, samples: int) -> bool:
        """Returns whether an attack with ``samples`` responses has too few finds."""
        return falls_short(found, self.null(samples), self.options)

    @cached_property
    def _sft_PN(self) -> list[Counter[str]]:
        return [Counter(responses) for responses in self.sft_responses.responses_PN]

    @cached_property
    def own_z_PNK(self) -> Tensor:
        """z of the SFT responses, each relative to the other responses to its prompt."""
        return own_z_scores(self.sft_responses.scores_PNK, self._statistics)

    @cached_property
    def _statistics(self) -> SFTStatistics:
        return self.sft_responses.statistics()

    @cached_property
    def _own_disagreement_z_PN(self) -> Tensor:
        detector = self.sft_responses.detector(self.detector, self.target_index)
        return detector.own_S.reshape(self.sft_responses.scores_PNK.shape[:2])

    def _qualified(self, rows: Sequence[dict[str, Any]]) -> Tensor:
        options = self.options
        scores_BK, z_BK = torch.tensor([row["scores"] for row in rows]), torch.tensor([row["z"] for row in rows])
        prompt_mean_B = self.sft_responses.prompt_mean([row["prompt_id"] for row in rows])[:, self.target_index]
        if self.underrates:
            return is_underrated(scores_BK, z_BK, prompt_mean_B, options.threshold_z, self.target_index)
        return qualifies(
            scores_BK,
            z_BK,
            prompt_mean_B,
            self.ranking(rows),
            options.threshold_z,
            self.target_index,
            options.require_others_negative,
        )

    def _is_new_sft(self, row: dict[str, Any]) -> bool:
        """Returns whether an SFT response is usable and differs from all other SFT responses to its prompt."""
        response = row["response"]
        return bool(response.strip()) and self._sft_PN[row["prompt_id"]][response] == 1 and self.unusable(row) is None
