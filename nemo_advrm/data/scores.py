"""Checks the scores that a reward source returns, be it a model, a function, a file or a server."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from nemo_advrm.errors import RewardSourceError


def as_scores(name: str, values: Any, count: int) -> Tensor:
    """Convert the scores of ``count`` responses to fp32 [count] on the CPU.

    Every score of every reward source passes this function.

    Raises RewardSourceError, with the source ``name``, unless ``values`` are ``count`` finite real numbers. It rejects
    a wrong count or shape, text, booleans, null, nested lists, NaN, infinity, and numbers too large for fp32.
    """
    scores = values if isinstance(values, Tensor) else _as_tensor(name, values)
    if scores.dtype == torch.bool or scores.is_complex():
        raise RewardSourceError(f"reward source {name} returned scores of the type {scores.dtype}, not real numbers")
    if scores.shape != (count,):
        raise RewardSourceError(
            f"reward source {name} returned scores of shape {tuple(scores.shape)} for {count} responses"
        )
    scores = scores.detach().float().cpu()
    wrong = (~torch.isfinite(scores)).nonzero().flatten().tolist()
    if wrong:
        raise RewardSourceError(
            f"reward source {name} returned {len(wrong)} scores that are NaN or infinite, the first for response "
            f"{wrong[0] + 1} of {count}"
        )
    return scores


def _as_tensor(name: str, values: Any) -> Tensor:
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise RewardSourceError(f"reward source {name} returned {_shown(values)}, not a list of scores")
    for place, value in enumerate(values):
        # numbers.Real includes numpy's numbers, but also booleans, which are not scores
        if isinstance(value, bool) or not isinstance(value, Real):
            raise RewardSourceError(
                f"reward source {name} returned {_shown(value)} as the score of response {place + 1}, not a number"
            )
    try:
        return torch.tensor([float(value) for value in values], dtype=torch.float64)
    except OverflowError:  # a whole number of hundreds of digits
        raise RewardSourceError(f"reward source {name} returned a score that is too large for a float") from None


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {reprlib.repr(value)}"
