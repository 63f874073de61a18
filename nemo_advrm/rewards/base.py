"""The interface of a reward source, which scores responses to prompts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from nemo_advrm.data.scores import as_scores
from nemo_advrm.errors import RewardSourceError
from nemo_advrm.rollouts.types import Rollouts


class RewardSource(Protocol):
    """Scores responses. Every rank of a model replica calls with the same rollouts and gets the same scores."""

    name: str

    def score(self, rollouts: Rollouts) -> Tensor:
        """Returns one score per response, [N] fp32 on the CPU; higher is better."""
        ...


class HiddenStateSource(RewardSource, Protocol):
    """A source whose model runs in this process, so that its hidden states can be read. All ranks call."""

    def score_with_hidden_states(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """Returns the scores, [N], and the vectors that the head made them of, [N, D], from one forward pass.

        Both are fp32 on the CPU and the same on all ranks of a model replica. A decoder's vector is its hidden state
        after the last norm, at the token where the score is read.
        """
        ...


@runtime_checkable
class AnsweringSource(RewardSource, Protocol):
    """A source that may not answer, such as a language model that refuses. All ranks call."""

    def score_answered(self, rollouts: Rollouts) -> Tensor:
        """Returns the scores, [N] fp32 on the CPU, NaN where there is none."""
        ...

    def cost_line(self) -> str:
        """What the scores cost and how many are missing, for a command to print."""
        ...


def in_turn(sources: Sequence[RewardSource]) -> Iterator[RewardSource]:
    """Yields the sources; the weights of the next one, if they wait in CPU memory, come while this one scores."""
    for source, following in itertools.zip_longest(sources, sources[1:]):
        prefetch = getattr(following, "prefetch", None)
        # heads of one model: its pass for the first answers for the others, and nothing would take the weights back
        is_same = getattr(following, "model", following) is getattr(source, "model", source)
        if prefetch is not None and not is_same:
            prefetch()
        yield source


def source_dtype(source: RewardSource) -> torch.dtype:
    """Returns ``source.dtype``, the number format it computes in; fp32 for a source without one, such as a server."""
    dtype: torch.dtype = getattr(source, "dtype", torch.float32)
    return dtype


def checked_scores(source: RewardSource, rollouts: Rollouts) -> Tensor:
    """Scores ``rollouts`` and checks the result, [N] fp32 on the CPU.

    Raises RewardSourceError when :func:`as_scores` refuses the scores (wrong count, NaN, no numbers).
    """
    return as_scores(source.name, source.score(rollouts), len(rollouts))


def answered_scores(source: RewardSource, rollouts: Rollouts) -> Tensor:
    """Like :func:`checked_scores`, with NaN where a judge that reads refused to score or could not be read.

    Only such a source has NaN; of every other source they are an error.
    """
    if not isinstance(source, AnsweringSource):
        return checked_scores(source, rollouts)
    scores_N = source.score_answered(rollouts)
    return torch.where(scores_N.isnan(), scores_N, as_scores(source.name, scores_N.nan_to_num(), len(rollouts)))


def checked_scores_with_hidden_states(source: HiddenStateSource, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """Like :func:`checked_scores`, with the hidden states, [N, D].

    Raises RewardSourceError also for hidden states of another shape or that are not finite.
    """
    scores_N, hidden_ND = source.score_with_hidden_states(rollouts)
    if hidden_ND.dim() != 2 or len(hidden_ND) != len(rollouts) or not hidden_ND.isfinite().all():
        raise RewardSourceError(
            f"reward source {source.name} gave hidden states of shape {tuple(hidden_ND.shape)} for {len(rollouts)} "
            "responses, or some that are NaN or infinite"
        )
    return as_scores(source.name, scores_N, len(rollouts)), hidden_ND
