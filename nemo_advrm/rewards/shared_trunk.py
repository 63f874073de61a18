"""Members of an ensemble that are heads on one trunk: one pass of the trunk scores for all of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_advrm.config.schema import Config
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine import runtime
from nemo_advrm.engine.builders import build_reward_model
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.engine.scoring import score_sequences, scores_and_hidden_states
from nemo_advrm.rewards.checkpoint_members import OF_THE_JOB, SourceSpec, member_config, member_tokenizer
from nemo_advrm.rewards.local import MegatronReward
from nemo_advrm.rollouts.types import Rollouts


class SharedTrunk:
    """A frozen reward model with several heads, and what it gave for the last rows.

    Members that share this object and score the same rows one after the other, as an ensemble does, cost one forward
    pass. Adapters on one base model would be scored behind the same two methods.
    """

    def __init__(self, model: MegatronModel, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.passes = 0  # forward passes over rows so far
        self._reads_hidden = False
        self._last: tuple[list[list[int]], Tensor, Tensor | None] | None = None

    def scores(self, rows: list[list[int]]) -> Tensor:
        """Returns the scores of all heads, [N, K] fp32 on the CPU; all ranks call."""
        return self._of(rows)[1]

    def scores_and_hidden_states(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Returns the scores of all heads, [N, K], and the hidden states that they read, [N, H]; all ranks call."""
        # from now on they are kept in every pass: the member that is asked first need not be the one that reads them
        self._reads_hidden = True
        _, scores_NK, hidden_NH = self._of(rows)
        assert hidden_NH is not None
        return scores_NK, hidden_NH

    def _of(self, rows: list[list[int]]) -> tuple[list[list[int]], Tensor, Tensor | None]:
        known = self._last is not None and self._last[0] == rows and not (self._reads_hidden and self._last[2] is None)
        # the replicas have rows of their own, and a forward pass needs all of them
        if runtime.current().dp_all_reduce_max(int(not known)) or self._last is None:
            hidden_NH = None
            if self._reads_hidden:
                scores_NK, hidden_NH = scores_and_hidden_states(self.model, rows, self.tokenizer.pad_id)
            else:
                scores_NK = score_sequences(self.model, rows, self.tokenizer.pad_id)
            self.passes += 1
            self._last = (rows, scores_NK, hidden_NH)
        return self._last


class HeadReward(MegatronReward):
    """One head of a shared trunk as a reward source; ``head`` counts from 1."""

    def __init__(self, name: str, trunk: SharedTrunk, head: int) -> None:
        super().__init__(name, trunk.model, trunk.tokenizer)
        self.trunk = trunk
        self.head = head

    def score(self, rollouts: Rollouts) -> Tensor:
        """Returns scores, [N] fp32 on the CPU. Raises what :meth:`MegatronReward.score` raises."""
        return self.trunk.scores(self._rows(rollouts))[:, self.head - 1]

    def score_with_hidden_states(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """See :class:`nemo_advrm.rewards.base.HiddenStateSource`."""
        scores_NK, hidden_NH = self.trunk.scores_and_hidden_states(self._rows(rollouts))
        return scores_NK[:, self.head - 1], hidden_NH


def open_head(
    spec: SourceSpec, meta: dict[str, Any], name: str, cfg: Config, running: Tokenizer | None, opened: dict[Any, Any]
) -> HeadReward:
    """Opens a member of a checkpoint with several; all ranks call. Its trunk comes from ``opened`` if it is there."""
    settings = {key: getattr(cfg.model, key) for key in OF_THE_JOB}
    key = ("trunk", str(Path(spec.location).absolute()), repr((cfg.precision, settings)))
    if key not in opened:
        own = dataclasses.replace(cfg, model=member_config(meta, cfg.model))
        tokenizer = member_tokenizer(spec, meta, running)
        model = build_reward_model(own, tokenizer, spec.location, seed=0, trainable=False, heads=meta["heads"])
        opened[key] = SharedTrunk(model, tokenizer)
    return HeadReward(name, opened[key], spec.head)
