"""The rows of members that are trained together on one trunk: how much each pair counts for each of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nemo_advrm.data.encoding import EncodedPair
from nemo_advrm.data.stored_rows import BatchedRows, JoinedRows, rows_at
from nemo_advrm.seeds import derive_seed
from nemo_advrm.training.reward_model_training import EncodedPreferences, bootstrap, drawn_rows


def rows_of_heads(parts: Sequence[EncodedPreferences], seed: int, resample: bool) -> EncodedPreferences:
    """Joins the pairs of all members; ``parts[k]`` are those of member k + 1.

    Members with the same pairs (the same object) share the rows. Otherwise each row counts for the member that it
    belongs to. With ``resample`` it counts as often as the member's bootstrap sample has drawn it: the sample that the
    member of this number has as a model of its own in a run of this ``seed``. All weights of a member are 1 on average,
    so that its loss is that of a training on its own pairs.
    """
    first, members = parts[0], len(parts)
    seeds = [derive_seed(derive_seed(seed, "rm", k), "bootstrap") for k in range(1, members + 1)]
    if members == 1:  # drawn as the only member is without a shared trunk: its rows come in another order
        return bootstrap(first, seeds[0]) if resample else first
    sizes = [len(part.train) for part in parts]
    counts = [
        torch.bincount(drawn_rows(size, own), minlength=size) if resample else torch.ones(size)
        for size, own in zip(sizes, seeds, strict=True)
    ]
    if all(part is first for part in parts):
        if not resample:
            return first
        weights_NK = torch.stack(counts, -1).float()
        pairs = first.train
    else:
        scaled = [sum(sizes) / size * count_N.float() for size, count_N in zip(sizes, counts, strict=True)]
        weights_NK = torch.block_diag(*(count_N[:, None] for count_N in scaled))
        pairs = JoinedRows(*(part.train for part in parts))
    return replace(first, train=WeightedPairs(pairs, weights_NK), held_out=[])


class WeightedPairs(BatchedRows[EncodedPair]):
    """Pairs with weights for the heads of a trunk, [N, K]; those that are in files are read when they are wanted."""

    def __init__(self, pairs: Sequence[EncodedPair], weights_NK: Tensor) -> None:
        self._pairs = pairs
        self._weights_NK = weights_NK

    def __len__(self) -> int:
        return len(self._pairs)

    def __iter__(self) -> Iterator[EncodedPair]:
        return (_weighted(pair, own_K) for pair, own_K in zip(self._pairs, self._weights_NK, strict=True))

    def take(self, places: Sequence[int]) -> list[EncodedPair]:
        pairs, weights_nK = rows_at(self._pairs, places), self._weights_NK[list(places)]
        return [_weighted(pair, own_K) for pair, own_K in zip(pairs, weights_nK, strict=True)]


def _weighted(pair: EncodedPair, weights_K: Tensor) -> EncodedPair:
    return replace(pair, head_weights=tuple(weights_K.tolist()))
