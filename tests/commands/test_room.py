"""The room that RLHF leaves: what R_1 likes of its responses and the others do not."""

from __future__ import annotations

import torch

from nemo_advrm.evaluation.room import shares


def test_the_share_is_of_what_r1_likes_alone() -> None:
    z_NK = torch.tensor([[2.0, -1.0], [1.5, 0.5], [1.1, -0.1], [3.0, 2.0], [0.9, -5.0], [-2.0, -2.0]])
    assert shares(z_NK) == {"liked": 4, "share": 0.5}


def test_several_others_are_asked_together() -> None:
    z_NK = torch.tensor([[2.0, -1.0, 0.5], [2.0, -1.0, 1.5]])
    assert shares(z_NK) == {"liked": 2, "share": 0.5}


def test_there_is_no_share_of_nothing() -> None:
    assert shares(torch.tensor([[1.0, -3.0]])) == {"liked": 0, "share": None}
