"""A reward source that tells how many responses it has scored, for the progress bar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from nemo_advrm.rewards.base import RewardSource
from nemo_advrm.rollouts.types import Rollouts


class Counted:
    """``source`` itself, except that ``counter`` gets the number of responses of every call."""

    def __init__(self, source: RewardSource, counter: Callable[[int], None]) -> None:
        self._source = source
        self._counter = counter

    def __getattr__(self, name: str) -> Any:
        if name == "score_with_hidden_states":  # absent where the source has none
            read = self._source.score_with_hidden_states  # type: ignore[attr-defined]

            def counted(rollouts: Rollouts) -> tuple[Tensor, Tensor]:
                self._counter(len(rollouts))
                found: tuple[Tensor, Tensor] = read(rollouts)
                return found

            return counted
        return getattr(self._source, name)

    def score(self, rollouts: Rollouts) -> Tensor:
        """See :meth:`nemo_advrm.rewards.base.RewardSource.score`."""
        self._counter(len(rollouts))
        return self._source.score(rollouts)
