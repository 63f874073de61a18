"""Makes a preference pair from a rejected response: picks the SFT response to prefer and records the provenance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nemo_advrm.config.schema import SelectionConfig
from nemo_advrm.data.pair_store import AdversarialPair, Provenance
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.objectives.sft_statistics import own_z_scores
from nemo_advrm.objectives.uncertainty import others_mean
from nemo_advrm.seeds import derive_seed


class ChosenSide:
    """Picks the chosen sides of the pairs of one target by ``selection.chosen``.

    Quality is the mean of z: with raw scores the member with the largest scale would decide. ``other`` leaves the
    target out, because its scores are what the attack exploits.

    With ``underrates`` the finds are good responses, so they are the chosen sides and the SFT responses the rejected
    ones: of these the worst is taken where otherwise the best is.
    """

    def __init__(
        self,
        options: SelectionConfig,
        sft_responses: SFTScores,
        usable_PI: list[list[int]],
        target: int,
        seed: int,
        underrates: bool = False,
    ) -> None:
        self.options = options
        self.sft_responses = sft_responses
        self.usable_PI = usable_PI
        self.target = target
        self.seed = seed
        self.underrates = underrates
        z_PNK = own_z_scores(sft_responses.scores_PNK, sft_responses.statistics())
        if options.chosen == "other":
            z_BK = z_PNK.flatten(0, 1)
            self.quality_PN = others_mean(z_BK, target - 1).reshape(z_PNK.shape[:2])
        else:
            self.quality_PN = z_PNK.mean(-1)

    def place(self, prompt_id: int, step: int, find: str) -> int:
        """Returns the index of the SFT response that is paired with ``find``, which was sampled at ``step``."""
        usable = self.usable_PI[prompt_id]
        if self.options.chosen == "random":
            draw = torch.Generator().manual_seed(derive_seed(self.seed, "chosen", self.target, step, find))
            return usable[int(torch.randint(len(usable), (1,), generator=draw))]
        sign = -1 if self.underrates else 1
        return max(usable, key=lambda i: sign * self.quality_PN[prompt_id, i].item())

    def pair(self, row: dict[str, Any], round_number: int, policy_checkpoint: str) -> AdversarialPair:
        """Returns the pair of a find, a row of ``samples.jsonl``, and an SFT response to its prompt.

        The provenance has the find's own z and Z(U), and the scores of each side.
        """
        prompt_id, sft_responses = row["prompt_id"], self.sft_responses
        place, gold_PN = self.place(prompt_id, row["step"], row["response"]), sft_responses.gold_PN
        sft_scores = tuple(sft_responses.scores_PNK[prompt_id, place].tolist())
        sft_gold = None if gold_PN is None else gold_PN[prompt_id, place].item()
        sides = [(sft_responses.responses_PN[prompt_id][place], sft_scores, sft_gold, True)]
        sides.append((row["response"], tuple(row["scores"]), row["gold"], row.get("ended") is not False))
        chosen, rejected = reversed(sides) if self.underrates else sides
        return AdversarialPair(
            sft_responses.prompts_P[prompt_id],
            chosen[0],
            rejected[0],
            Provenance(
                round=round_number,
                step=row["step"],
                direction=self.target,
                prompt_id=prompt_id,
                scores=rejected[1],
                z=tuple(row["z"]),
                disagreement_z=row["disagreement_z"],
                policy_checkpoint=policy_checkpoint,
                chosen_scores=chosen[1],
                chosen_gold=chosen[2],
                rejected_gold=rejected[2],
                underrates=self.underrates or None,
            ),
            chosen_ended=chosen[3],
            rejected_ended=rejected[3],
        )


def wrong_labels(pairs: Sequence[AdversarialPair]) -> float | None:
    """Returns the share of pairs whose rejected side has the higher gold; None when no pair has gold on both sides."""
    golds = [(pair.provenance.chosen_gold, pair.provenance.rejected_gold) for pair in pairs]
    known = [(chosen, rejected) for chosen, rejected in golds if chosen is not None and rejected is not None]
    return sum(rejected > chosen for chosen, rejected in known) / len(known) if known else None
