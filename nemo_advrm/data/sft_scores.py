"""SFT responses of a run with their scores under every member, and the score statistics T_k(x) and s_k."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_advrm.data.hidden_states import beside, read_hidden_states
from nemo_advrm.data.messages import Message
from nemo_advrm.data.run_records import REFERENCE_ROW, RESTORE_ROWS, read_rows
from nemo_advrm.detectors.base import (
    ENTROPIES,
    HIDDEN_STATES,
    LOG_PROBS,
    OF_SFT_POLICY,
    Features,
    StandardisedDetector,
    build_detector,
)
from nemo_advrm.errors import ConfigError, DataError
from nemo_advrm.objectives.sft_statistics import SFTStatistics, fit_sft_statistics, judged_statistics
from nemo_advrm.objectives.spread import divide_by_spread, rounding_of


@dataclass(frozen=True)
class SFTScores:
    """SFT responses to P prompts with n responses each, scored by K members.

    Attributes:
        prompts_P: chat messages.
        responses_PN: texts.
        scores_PNK: raw scores.
        gold_PN: gold rewards, or None where the run has none; NaN of a response that the gold judge gave none.
        ended_PN: False where the length limit cut a response off; None (older files) means that all ended.
        tokens_PN: the policy's token ids of the responses; None when the file has none.
        hidden_states: of the responses, [P * n, D], by index of the member; those of the attacked members if the
            attack's detector reads them.
        log_probs_PN, entropies_PN: of the responses under the SFT policy, in nats; None unless a detector reads them.
        lengths_PN: the number of tokens that these sum over; None where there are none.
    """

    prompts_P: list[tuple[Message, ...]]
    responses_PN: list[list[str]]
    scores_PNK: Tensor
    gold_PN: Tensor | None
    ended_PN: list[list[bool]] | None = None
    tokens_PN: list[list[list[int]]] | None = None
    hidden_states: dict[int, Tensor] = field(default_factory=dict)
    log_probs_PN: Tensor | None = None
    entropies_PN: Tensor | None = None
    lengths_PN: Tensor | None = None
    _detectors: dict[tuple[str, int, bool], StandardisedDetector] = field(default_factory=dict, init=False, repr=False)

    def ended(self, prompt_id: int) -> list[bool]:
        """Return for each response to a prompt whether it was not cut off; files without this have ended ones only."""
        return [True] * len(self.responses_PN[prompt_id]) if self.ended_PN is None else self.ended_PN[prompt_id]

    def finished(self, prompt_id: int) -> list[int]:
        """Return the indices of the responses to a prompt that were not cut off."""
        return [i for i, ended in enumerate(self.ended(prompt_id)) if ended]

    @property
    def finished_share(self) -> float:
        """Share of all responses that were not cut off."""
        counts = [len(self.finished(i)) for i in range(len(self.responses_PN))]
        return sum(counts) / max(1, sum(map(len, self.responses_PN)))

    def statistics(self) -> SFTStatistics:
        return fit_sft_statistics(self.scores_PNK)

    def detector(
        self, name: str, target: int, new_prompts: bool = False, key: str = "adversarial.detector"
    ) -> StandardisedDetector:
        """Return the detector ``name`` for the member of index ``target``, fitted to these responses once.

        ``new_prompts``: it will score responses to other prompts, see :class:`StandardisedDetector`. ``key`` is the
        configuration key that names it, for messages.

        Raises ConfigError when they lack what the detector reads: they were scored, or read, for another one.
        """
        which = (name, target, new_prompts)
        if which not in self._detectors:
            detector, features = build_detector(name), self.features(target)
            known = {
                HIDDEN_STATES: features.hidden_states_ND,
                LOG_PROBS: features.log_probs_N,
                ENTROPIES: features.entropies_N,
            }
            missing = [feature for feature in detector.reads if feature in known and known[feature] is None]
            if missing:
                raise ConfigError(
                    f"{key}={name} reads {', '.join(missing)} of member {target + 1}, which "
                    "reference.jsonl and its file of hidden states do not have: restore both, or start the attack over "
                    "in another run_dir"
                )
            count = self.scores_PNK.size(1)
            self._detectors[which] = StandardisedDetector(detector, features, count, new_prompts)
        return self._detectors[which]

    def features(self, target: int) -> Features:
        """Return what is known of all responses for the attacked member of index ``target``."""
        flat = [
            None if values_PN is None or self.lengths_PN is None else values_PN.flatten()
            for values_PN in (self.log_probs_PN, self.entropies_PN, self.lengths_PN)
        ]
        return Features(self.scores_PNK.flatten(0, 1), target, self.hidden_states.get(target), *flat)

    def prompt_mean(self, prompt_index: Sequence[int]) -> Tensor:
        """Return T_k of the prompt of each response, [N, K]."""
        return self.scores_PNK.mean(1)[list(prompt_index)]

    def gold_z(self, gold_N: Tensor, prompt_index: Sequence[int]) -> Tensor | None:
        """Standardise the gold rewards of new responses like the members' scores.

        Returns [N], 0 where gold does not vary beyond rounding error, NaN where a response or all SFT responses to its
        prompt have no gold; None when the run has no gold.
        """
        if self.gold_PN is None:
            return None
        mean_P, std_P = judged_statistics(self.gold_PN)
        noise = rounding_of(self.gold_PN.nan_to_num()).max()
        places = list(prompt_index)
        z_N = divide_by_spread(gold_N - mean_P[places], std_P[places], noise)
        return z_N.where(~(gold_N - mean_P[places]).isnan(), torch.nan)

    def own_gold_z(self) -> Tensor | None:
        """Standardise the gold of each SFT response by the other responses to its prompt, like `own_z_scores`.

        Returns [P, n], NaN where a response has no gold, or no other response to its prompt; None when the run has no
        gold.
        """
        if self.gold_PN is None:
            return None
        prompts, count = self.gold_PN.shape
        z_B = self.gold_z(self.gold_PN.flatten(), [p for p in range(prompts) for _ in range(count)])
        assert z_B is not None
        judged_P1 = (~self.gold_PN.isnan()).sum(1, keepdim=True)
        return z_B.reshape(prompts, count) * ((judged_P1 + 1) / (judged_P1 - 1)).sqrt()

    @classmethod
    def read(cls, path: Path, reads: Collection[str] = ()) -> SFTScores:
        """Read ``reference.jsonl``, and what a detector reads of the responses besides their scores.

        Args:
            reads: :attr:`nemo_advrm.detectors.base.Detector.reads` of the detector that will be asked for. Hidden
                states are a file of their own, of gigabytes for a large model, and are only read if they are named.

        Raises DataError for a malformed row, when prompts have unequal numbers of samples, and for hidden states that
        are damaged.
        """
        grouped: dict[int, list[dict[str, Any]]] = {}
        members = 0
        for number, row in read_rows(path, REFERENCE_ROW, "SFT scores", RESTORE_ROWS):
            group = grouped.setdefault(row["prompt_id"], [])
            members = members or len(row["scores"])
            if wrong := _mismatch(row, group[0] if group else row, members):
                raise DataError(f"{path}:{number}: not a row of SFT scores ({wrong}): {RESTORE_ROWS}")
            group.append(row)
        sizes = {len(rows) for rows in grouped.values()}
        if len(sizes) != 1 or sorted(grouped) != list(range(len(grouped))):
            raise DataError(f"{path}: incomplete SFT scores (prompts or samples are missing); remove the file")
        rows = [grouped[i] for i in range(len(grouped))]
        gold = [[r.get("gold") for r in group] for group in rows]
        log_probs = _column(rows, "log_prob") if LOG_PROBS in reads else None
        entropies = _column(rows, "entropy") if ENTROPIES in reads else None
        lengths = _column(rows, "log_prob_tokens") if any(feature in reads for feature in OF_SFT_POLICY) else None
        count = sum(map(len, rows))
        return cls(
            [tuple(group[0]["messages"]) for group in rows],
            [[r["response"] for r in group] for group in rows],
            torch.tensor([[r["scores"] for r in group] for group in rows], dtype=torch.float32),
            None if gold[0][0] is None else torch.tensor(gold, dtype=torch.float32),
            [[r.get("ended") is not False for r in group] for group in rows],
            _column(rows, "tokens"),
            read_hidden_states(beside(path), count) if HIDDEN_STATES in reads else {},
            None if log_probs is None else torch.tensor(log_probs, dtype=torch.float32),
            None if entropies is None else torch.tensor(entropies, dtype=torch.float32),
            None if lengths is None else torch.tensor(lengths),
        )


def _column(rows: list[list[dict[str, Any]]], key: str) -> list[list[Any]] | None:
    """Return the values of ``key`` by prompt, None when a row lacks it, as rows of older versions do."""
    found = [[row.get(key) for row in group] for group in rows]
    return None if any(value is None for group in found for value in group) else found


def _mismatch(row: dict[str, Any], first: dict[str, Any], members: int) -> str:
    """Return how a row differs from the others, or ""; ``first`` is the first row of the same prompt."""
    if row["messages"] != first["messages"]:
        return f"the prompt differs from that of an earlier row with prompt_id={row['prompt_id']}"
    return "" if len(row["scores"]) == members else f"{len(row['scores'])} scores for {members} members"
