"""SFT statistics from SFT samples, z-scores and Z(U)."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_advrm.errors import RewardSourceError, UserError
from nemo_advrm.objectives.sft_statistics import (
    fit_members,
    fit_sft_statistics,
    fresh_std,
    judged_statistics,
    own_z_scores,
    standardise_members,
    z_scores,
)

# 2 prompts, 2 responses, 2 members
SCORES = torch.tensor([[[1.0, 0.0], [3.0, 4.0]], [[10.0, 5.0], [16.0, 7.0]]])


def test_statistics_by_hand() -> None:
    reference = fit_sft_statistics(SCORES)
    torch.testing.assert_close(reference.prompt_mean_PK, torch.tensor([[2.0, 2.0], [13.0, 6.0]]))
    # residuals of member 1: -1 1 -3 3; of member 2: -2 2 -1 1; 4 less 2 means leave 2, and T_k(x) errs by 1 / 2 more
    torch.testing.assert_close(reference.std_K, torch.tensor([math.sqrt(20 / 2 * 3 / 2), math.sqrt(10 / 2 * 3 / 2)]))


def test_z_scores_use_the_mean_of_the_prompt_and_the_global_spread() -> None:
    reference = fit_sft_statistics(SCORES)
    scores = torch.tensor([[2.0, 7.0], [13.0, 6.0]])
    z = z_scores(scores, reference.prompt_mean_PK[torch.tensor([0, 1])], reference.std_K)
    torch.testing.assert_close(z, torch.tensor([[0.0, 5 / math.sqrt(7.5)], [0.0, 0.0]]))


def test_the_samples_own_z_scores_have_zero_mean_and_unit_spread() -> None:
    scores = torch.randn(50, 4, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10.0, 0.01])
    z = own_z_scores(scores, fit_sft_statistics(scores)).flatten(0, 1)
    torch.testing.assert_close(z.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(3))


def test_a_samples_own_z_is_that_of_a_fresh_response_to_the_others() -> None:
    scores = torch.randn(40, 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    reference = fit_sft_statistics(scores)
    s_K = reference.std_K / math.sqrt(1 + 1 / 3)
    others_mean = scores[:, 1:].mean(1)
    by_hand = (scores[:, 0] - others_mean) / (s_K * math.sqrt(1 + 1 / 2))
    torch.testing.assert_close(own_z_scores(scores, reference)[:, 0], by_hand)


@pytest.mark.parametrize("samples", [2, 3, 6])
def test_a_fresh_sft_response_has_a_z_of_variance_one(samples: int) -> None:
    """Prompts differ in level; the sample and the fresh responses come from the same policy."""
    draw = torch.Generator().manual_seed(samples)
    prompts = 6000
    level_P1K = 3 * torch.randn(prompts, 1, 2, generator=draw)
    scale_K = torch.tensor([0.5, 4.0])

    def responses(count: int) -> torch.Tensor:
        return scale_K * (level_P1K + torch.randn(prompts, count, 2, generator=draw))

    reference = fit_sft_statistics(responses(samples))
    fresh_PK = responses(1)[:, 0]
    z_PK = z_scores(fresh_PK, reference.prompt_mean_PK, reference.std_K)
    # 6000 draws: a std is known to within 3 / sqrt(2 * 6000) = 0.027; without the correction 1.73, 1.41 and 1.18
    assert z_PK.std(0, correction=0).tolist() == pytest.approx([1.0, 1.0], abs=0.03)
    members = fit_members(responses(samples).flatten(0, 1))
    assert standardise_members(fresh_PK, members).std(0, correction=0).tolist() == pytest.approx([1.0, 1.0], abs=0.03)


def test_the_spread_of_a_fresh_response_by_hand() -> None:
    deviations = torch.tensor([[1.0], [-1.0], [3.0], [-3.0]])
    assert fresh_std(deviations, per_mean=2).item() == pytest.approx(math.sqrt(20 / 2 * 3 / 2))
    assert fresh_std(deviations, per_mean=4).item() == pytest.approx(math.sqrt(20 / 3 * 5 / 4))


def test_members_are_standardised_over_all_responses_by_hand() -> None:
    members = fit_members(SCORES.flatten(0, 1))
    # member 1: 1 3 10 16; member 2: 0 4 5 7
    torch.testing.assert_close(members.mean_K, torch.tensor([7.5, 4.0]))
    variances = torch.tensor([(6.5**2 + 4.5**2 + 2.5**2 + 8.5**2) / 3, (16 + 0 + 1 + 9) / 3]) * 5 / 4
    torch.testing.assert_close(members.std_K, variances.sqrt())
    z = standardise_members(torch.tensor([[7.5, 4.0], [0.0, 4.0]]), members)
    torch.testing.assert_close(z, torch.tensor([[0.0, 0.0], [-7.5, 0.0]]) / members.std_K)


def test_members_that_cannot_be_standardised_are_named() -> None:
    with pytest.raises(RewardSourceError, match="at least 2 SFT responses, not 1"):
        fit_members(torch.zeros(1, 2))
    with pytest.raises(RewardSourceError, match="reward model 2 has a spread of 0"):
        fit_members(torch.tensor([[1.0, 5.0], [2.0, 5.0]]))
    with pytest.raises(RewardSourceError, match="reward model 1 gave a NaN"):
        fit_members(torch.tensor([[math.nan, 5.0], [2.0, 6.0]]))


@pytest.mark.parametrize("constant", [0.0, 0.1, -1234.567])
def test_a_member_that_tells_nothing_apart_is_named(constant: float) -> None:
    scores = torch.randn(3, 7, 2)
    scores[:, :, 1] = constant
    with pytest.raises(UserError, match="reward model 2 has a spread of 0"):
        fit_sft_statistics(scores)


def test_a_spread_of_rounding_noise_counts_as_none() -> None:
    scores = torch.randn(3, 7, 2, generator=torch.Generator().manual_seed(0))
    scores[:, :, 0] = 100 + 1e-5 * scores[:, :, 1]
    with pytest.raises(UserError, match="reward model 1 has a spread"):
        fit_sft_statistics(scores)


@pytest.mark.parametrize("std", [0.0, math.nan, math.inf])
def test_an_unusable_std_from_a_file_is_an_error_and_not_a_division(std: float) -> None:
    with pytest.raises(RewardSourceError, match="reward model 2"):
        z_scores(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([1.0, std]))


def test_scores_that_are_not_finite_name_the_member() -> None:
    scores = torch.randn(3, 4, 2)
    scores[1, 2, 1] = math.nan
    with pytest.raises(RewardSourceError, match="reward model 2 gave a NaN"):
        fit_sft_statistics(scores)


@pytest.mark.parametrize("shape", [(0, 4, 2), (3, 1, 2)])
def test_too_few_samples_are_an_error(shape: tuple[int, int, int]) -> None:
    with pytest.raises(RewardSourceError, match="at least 2 SFT responses"):
        fit_sft_statistics(torch.zeros(shape))


def test_responses_without_a_judgement_take_no_degree_of_freedom() -> None:
    nan = math.nan
    values_PN = torch.tensor([[1.0, nan, 3.0], [nan, nan, nan], [0.0, 4.0, 2.0], [5.0, nan, nan]])
    mean_P, std_P = judged_statistics(values_PN)
    assert mean_P[[0, 2, 3]].tolist() == [2.0, 2.0, 5.0] and mean_P[1].isnan()
    # squares 1 + 1 + 4 + 4 + 0 over 1 + 0 + 2 + 0 degrees of freedom; the mean of 2, 3 and 1 responses adds its error
    variance = 10 / 3
    known = [math.sqrt(variance * (1 + 1 / count)) for count in (2, 3, 1)]
    assert std_P[[0, 2, 3]].tolist() == pytest.approx(known)


def test_judged_statistics_of_complete_judgements_are_those_of_scores() -> None:
    values_PN = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    statistics = fit_sft_statistics(values_PN[..., None])
    mean_P, std_P = judged_statistics(values_PN)
    assert torch.allclose(mean_P, statistics.prompt_mean_PK[:, 0])
    assert torch.allclose(std_P, statistics.std_K.expand(4))
