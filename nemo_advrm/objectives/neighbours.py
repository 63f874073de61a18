"""Distance of a point to its k-th nearest neighbour among known points."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def neighbour_distance(points_ND: Tensor, known_SD: Tensor, k: int) -> Tensor:
    """Euclidean distance of each direction to the k-th nearest of the known directions, [N], from 0 to 2.

    Points are scaled to length 1 first, as in Sun et al. 2022 (arXiv 2204.06507), whose score it is up to the sign.
    With fewer than k known points it is the distance to the farthest. Needs N S numbers; compute in fp64, because the
    distances of nearly parallel states are small differences.
    """
    distances_NS = torch.cdist(normalize(points_ND, dim=-1), normalize(known_SD, dim=-1))
    return distances_NS.kthvalue(min(k, known_SD.shape[0]), dim=-1).values
