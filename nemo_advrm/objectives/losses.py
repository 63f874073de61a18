"""Training losses of reward models, policies and critics, per row or per token and never reduced.

They are not reduced because Megatron divides a summed loss by the count over all data-parallel ranks. Shapes: B rows,
A attributes, T tokens. Masks are boolean or 0/1; masked values may be anything, NaN included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nemo_advrm.errors import ConfigError
from nemo_advrm.objectives.masked import zero_masked
from nemo_advrm.registry import PREFERENCE_LOSSES

# exp(20) = 4.9e8: far outside any clipping range, yet neither it nor its gradient overflows.
MAX_LOG_RATIO = 20.0


def bradley_terry(chosen_B: Tensor, rejected_B: Tensor, margin_B: Tensor | None = None) -> Tensor:
    """-log sigmoid(chosen - rejected - margin) of each pair, [B].

    Without `margin_B` this is Bradley & Terry (1952) as in Ouyang et al. (2022), eq. 1; with it, the margin loss of
    Touvron et al. (2023, Llama 2), eq. 2.
    """
    difference_B = chosen_B - rejected_B
    if margin_B is not None:
        difference_B = difference_B - margin_B
    return -F.logsigmoid(difference_B)


def scaled_bradley_terry(chosen_B: Tensor, rejected_B: Tensor, margin_B: Tensor) -> Tensor:
    """-margin * log sigmoid(chosen - rejected) of each pair, [B]: the margin repeats a pair instead of shifting it.

    Source: Wang et al. (2024), HelpSteer2-Preference, "Scaled Bradley-Terry". A margin of 0 drops the pair.
    """
    return margin_B * bradley_terry(chosen_B, rejected_B)


def regression(pred_BA: Tensor, target_BA: Tensor) -> Tensor:
    """Squared error averaged over the attributes of each row, [B]. Source: Wang et al. (2024), HelpSteer2."""
    return (pred_BA - target_BA).square().mean(-1)


def centering(chosen_B: Tensor, rejected_B: Tensor, coefficient: float) -> Tensor:
    """coefficient * (chosen + rejected)^2 of each pair, [B]: fixes the offset that Bradley-Terry leaves free.

    Source: Eisenstein et al. (2023), "Helping or Herding?".
    """
    return coefficient * (chosen_B + rejected_B).square()


def score_l2(chosen_B: Tensor, rejected_B: Tensor, coefficient: float) -> Tensor:
    """coefficient * (chosen^2 + rejected^2) / 2 of each pair, [B]: bounds the scale of the scores."""
    return coefficient * (chosen_B.square() + rejected_B.square()) / 2


def tied_loss(
    of_pairs: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    chosen_B: Tensor,
    rejected_B: Tensor,
    margin_B: Tensor | None,
) -> Tensor:
    """Mean of a pair's loss and of its loss with both responses exchanged, [B]: that of a pair without a preference.

    For Bradley-Terry it is the cross-entropy with the soft label 0.5, -log sigmoid(d) / 2 - log sigmoid(-d) / 2 with
    d = chosen - rejected, which is least at d = 0. Source: Liu et al. (2024), RRM (arXiv 2409.13156), neutral pairs.
    """
    return (of_pairs(chosen_B, rejected_B, margin_B) + of_pairs(rejected_B, chosen_B, margin_B)) / 2


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss of preference pairs, registered in :data:`nemo_advrm.registry.PREFERENCE_LOSSES`.

    Attributes:
        of_pairs: (chosen_B, rejected_B, margin_B) -> loss of each pair, [B]; margin_B has ``neutral_margin`` for
            pairs without one.
        needs_margin: training data without the key ``margin`` is refused.
        neutral_margin: what stands for a missing margin, as adversarial pairs have none.
        of_labels: (scores_BA, labels_BA) -> loss of each response, [B]; set where responses have labels and no pair
            has a preferred side, and ``of_pairs`` is not used then.
    """

    of_pairs: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None
    needs_margin: bool = False
    neutral_margin: float = 0.0
    of_labels: Callable[[Tensor, Tensor], Tensor] | None = None


BT = PreferenceLoss(lambda chosen_B, rejected_B, margin_B: bradley_terry(chosen_B, rejected_B))
MARGIN_BT = PreferenceLoss(bradley_terry, needs_margin=True)
SCALED_BT = PreferenceLoss(scaled_bradley_terry, needs_margin=True, neutral_margin=1.0)  # type: ignore[arg-type]
REGRESSION = PreferenceLoss(None, of_labels=regression)


def reads_labels(name: str) -> bool:
    """Whether the loss called ``name`` reads labels of each response, and no pair has a preferred side."""
    loss: PreferenceLoss = PREFERENCE_LOSSES[name]
    return loss.of_labels is not None


def preference_loss(
    name: str,
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None,
    centering_coefficient: float,
    score_l2_coefficient: float,
    tied: Tensor | None = None,
) -> Tensor:
    """Loss of each pair, [B]: the loss `name` (one of PREFERENCE_LOSSES) plus the two regularisers.

    "bt" ignores `margin`. Pairs where the boolean `tied`, [B], is true get :func:`tied_loss`. Raises ConfigError for an
    unknown name, and for a loss that needs margins without any.
    """
    loss = PREFERENCE_LOSSES[name]
    if loss.needs_margin and margin is None:
        raise ConfigError(f"preference loss {name!r} needs a margin on every pair, and the data has none")
    if loss.of_pairs is None:
        raise ConfigError(f"preference loss {name!r} reads labels, not pairs")
    loss_B = loss.of_pairs(chosen, rejected, margin)
    if tied is not None:
        loss_B = torch.where(tied, tied_loss(loss.of_pairs, chosen, rejected, margin), loss_B)
    # Skipped at 0, so that an overflowing square cannot turn 0 * inf into NaN.
    if centering_coefficient:
        loss_B = loss_B + centering(chosen, rejected, centering_coefficient)
    if score_l2_coefficient:
        loss_B = loss_B + score_l2(chosen, rejected, score_l2_coefficient)
    return loss_B


def policy_gradient(log_probs_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """-advantage * log pi of each token, [B, T], 0 where masked (REINFORCE, Williams 1992); no gradient to A."""
    advantages_BT = zero_masked(advantages_BT.detach(), mask_BT)
    return -advantages_BT * zero_masked(log_probs_BT, mask_BT)


def clipped_policy_gradient(
    log_probs_BT: Tensor,
    old_log_probs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """PPO's clipped loss of each token, 0 where masked, and whether the ratio of a kept token is clipped; both [B, T].

    max(-A q, -A clip(q, 1 - clip_low, 1 + clip_high)) with q = pi / pi_old (Schulman et al. 2017, eq. 7; separate
    bounds as in Yu et al. 2025, DAPO). The second result is true where q is outside the bounds, whatever the sign of A.
    Its mean over kept tokens is CleanRL's `clipfrac`.
    """
    log_ratio_BT = zero_masked(log_probs_BT, mask_BT) - zero_masked(old_log_probs_BT.detach(), mask_BT)
    ratio_BT = log_ratio_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    bounded_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    advantages_BT = zero_masked(advantages_BT.detach(), mask_BT)
    loss_BT = torch.maximum(-advantages_BT * ratio_BT, -advantages_BT * bounded_BT)
    clipped_BT = ((ratio_BT < 1 - clip_low) | (ratio_BT > 1 + clip_high)) & mask_BT.bool()
    return loss_BT, clipped_BT


def clipped_value(values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, clip: float) -> Tensor:
    """The critic's loss of each token, [B, T], 0 where masked: max((v - R)^2, (v_clip - R)^2) / 2.

    v_clip is v limited to within `clip` of the value at the rollout; clip = inf turns it off. Source: Schulman et al.'s
    PPO implementation, as described in Huang et al. (2022), "The 37 Implementation Details of PPO", detail 9.
    """
    values_BT = zero_masked(values_BT, mask_BT)
    old_values_BT = zero_masked(old_values_BT.detach(), mask_BT)
    returns_BT = zero_masked(returns_BT.detach(), mask_BT)
    near_BT = old_values_BT + (values_BT - old_values_BT).clamp(-clip, clip)
    return torch.maximum((values_BT - returns_BT).square(), (near_BT - returns_BT).square()) / 2
