"""Checks scores, whatever gave them: a model, a function, a file or the JSON of a server."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from nemo_advrm.errors import RewardSourceError


def as_scores(name: str, values: Any, count: int) -> Tensor:
    """``values``, which the source ``name`` gave for ``count`` responses, as [count] fp32 on the CPU.

    Every score enters here, whatever gave it: a model, a function or the JSON of a server. Raises RewardSourceError,
    naming the source, for anything but ``count`` finite real numbers: another count or shape, text, booleans, null,
    nested lists, NaN, infinity, and numbers that fp32 cannot hold.
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
        raise RewardSourceError(f"reward source {name} returned no list of scores but {_shown(values)}")
    for place, value in enumerate(values):
        # numbers.Real holds numpy's numbers too; a boolean is a Real, and no score
        if isinstance(value, bool) or not isinstance(value, Real):
            raise RewardSourceError(
                f"reward source {name} returned {_shown(value)} as the score of response {place + 1}, not a number"
            )
    try:
        return torch.tensor([float(value) for value in values], dtype=torch.float64)
    except OverflowError:  # a whole number of hundreds of digits
        raise RewardSourceError(f"reward source {name} returned a score that no float can hold") from None


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {reprlib.repr(value)}"
