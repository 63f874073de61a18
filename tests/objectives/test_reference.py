"""Reference statistics from SFT samples, z-scores and Z(U)."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_advrm.errors import RewardSourceError, UserError
from nemo_advrm.objectives.reference import disagreement_z, fit_reference, z_scores

# 2 prompts, 2 responses, 2 members
SCORES = torch.tensor([[[1.0, 0.0], [3.0, 4.0]], [[10.0, 5.0], [16.0, 7.0]]])


def test_statistics_by_hand() -> None:
    reference = fit_reference(SCORES)
    torch.testing.assert_close(reference.prompt_mean_PK, torch.tensor([[2.0, 2.0], [13.0, 6.0]]))
    # residuals of member 1: -1 1 -3 3; of member 2: -2 2 -1 1
    torch.testing.assert_close(reference.std_K, torch.tensor([math.sqrt(20 / 4), math.sqrt(10 / 4)]))
    # U: 1 -1 5 9
    assert reference.disagreement_mean == pytest.approx(3.5)
    assert reference.disagreement_std == pytest.approx(math.sqrt((2.5**2 + 4.5**2 + 1.5**2 + 5.5**2) / 4))


def test_z_scores_use_the_mean_of_the_prompt_and_the_global_spread() -> None:
    reference = fit_reference(SCORES)
    scores = torch.tensor([[2.0, 7.0], [13.0, 6.0]])
    z = z_scores(scores, reference.prompt_mean_PK[torch.tensor([0, 1])], reference.std_K)
    torch.testing.assert_close(z, torch.tensor([[0.0, 5 / math.sqrt(2.5)], [0.0, 0.0]]))


def test_sft_z_scores_have_zero_mean_and_unit_spread() -> None:
    scores = torch.randn(50, 4, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10.0, 0.01])
    reference = fit_reference(scores)
    z = z_scores(scores.reshape(-1, 3), reference.prompt_mean_PK.repeat_interleave(4, 0), reference.std_K)
    torch.testing.assert_close(z.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(3))


def test_z_of_u_uses_the_distribution_over_all_prompts() -> None:
    reference = fit_reference(SCORES)
    u_z = disagreement_z(torch.tensor([[9.0, 2.0]]), reference.disagreement_mean, reference.disagreement_std)
    # U = 7: 3.5 above the global mean. Against the second prompt alone (U: 5 and 9) it would have been 0.
    torch.testing.assert_close(u_z, torch.tensor([3.5 / math.sqrt(14.75)]))


def test_the_other_direction_mirrors_u_for_two_members() -> None:
    forward, backward = fit_reference(SCORES), fit_reference(SCORES, target=1)
    assert backward.disagreement_mean == -forward.disagreement_mean
    assert backward.disagreement_std == forward.disagreement_std
    z = disagreement_z(torch.tensor([[2.0, 9.0]]), backward.disagreement_mean, backward.disagreement_std, target=1)
    torch.testing.assert_close(z, torch.tensor([(7 + 3.5) / math.sqrt(14.75)]))


@pytest.mark.parametrize("constant", [0.0, 0.1, -1234.567])
def test_a_member_that_tells_nothing_apart_is_named(constant: float) -> None:
    scores = torch.randn(3, 7, 2)
    scores[:, :, 1] = constant
    with pytest.raises(UserError, match="reward model 2 has a spread of 0"):
        fit_reference(scores)


def test_a_spread_of_rounding_noise_counts_as_none() -> None:
    scores = torch.randn(3, 7, 2, generator=torch.Generator().manual_seed(0))
    scores[:, :, 0] = 100 + 1e-5 * scores[:, :, 1]
    with pytest.raises(UserError, match="reward model 1 has a spread"):
        fit_reference(scores)


@pytest.mark.parametrize("std", [0.0, math.nan, math.inf])
def test_an_unusable_std_from_a_file_is_an_error_and_not_a_division(std: float) -> None:
    with pytest.raises(RewardSourceError, match="reward model 2"):
        z_scores(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([1.0, std]))
    with pytest.raises(RewardSourceError, match="disagreement has a spread"):
        disagreement_z(torch.zeros(1, 2), 0.0, std)


def test_members_that_are_copies_are_an_error() -> None:
    scores = torch.randn(3, 4, 1).repeat(1, 1, 2)
    with pytest.raises(RewardSourceError, match="copies of each other"):
        fit_reference(scores)


def test_scores_that_are_not_finite_name_the_member() -> None:
    scores = torch.randn(3, 4, 2)
    scores[1, 2, 1] = math.nan
    with pytest.raises(RewardSourceError, match="reward model 2 gave a NaN"):
        fit_reference(scores)


@pytest.mark.parametrize("shape", [(0, 4, 2), (3, 1, 2)])
def test_too_few_samples_are_an_error(shape: tuple[int, int, int]) -> None:
    with pytest.raises(RewardSourceError, match="at least 2 SFT responses"):
        fit_reference(torch.zeros(shape))
