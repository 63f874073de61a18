"""The distance to the k-th nearest neighbour by hand."""

from __future__ import annotations

import torch

from nemo_advrm.objectives.neighbours import neighbour_distance

AXES = torch.tensor([[5.0, 0.0], [0.0, 0.1], [-2.0, 0.0]]).double()


def test_the_distance_is_between_directions_by_hand() -> None:
    points = torch.tensor([[3.0, 0.0], [1.0, 1.0]]).double()
    expected = {1: [0.0, (2 - 2**0.5) ** 0.5], 2: [2**0.5, (2 - 2**0.5) ** 0.5], 3: [2.0, (2 + 2**0.5) ** 0.5]}
    for k, distances in expected.items():
        torch.testing.assert_close(neighbour_distance(points, AXES, k), torch.tensor(distances).double())


def test_with_too_few_known_points_it_is_the_farthest() -> None:
    torch.testing.assert_close(neighbour_distance(AXES[:1], AXES, 10), torch.tensor([2.0]).double())


def test_a_state_of_zeros_is_at_distance_one_of_all() -> None:
    torch.testing.assert_close(neighbour_distance(torch.zeros(1, 2).double(), AXES, 2), torch.ones(1).double())
