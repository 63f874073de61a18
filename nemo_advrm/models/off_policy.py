"""What a policy served elsewhere wrote, weighted for the policy that learns from it."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_advrm.config.schema import PolicyServerConfig
from nemo_advrm.engine import runtime
from nemo_advrm.models.rollout_batch import RolloutBatch
from nemo_advrm.objectives.importance import effective_share, log_ratios, mean_ratio, truncated_weights, weighted_mean
from nemo_advrm.objectives.kl import response_kl
from nemo_advrm.rollouts.types import Rollouts

PREFIX = "off_policy/"
ESS, MEAN_RATIO, GAP = f"{PREFIX}ess", f"{PREFIX}mean_ratio", f"{PREFIX}gap"


def set_behaviour(data: RolloutBatch, rollouts: Rollouts) -> None:
    """Sets the log-probabilities of the policy that wrote: what it tells, else those of the reference policy.

    The reference has the weights that the trained policy starts from, which the served one has for ever.
    """
    told_BT = torch.full(data.mask_BT.shape, float("nan"))
    if rollouts.log_probs is not None:
        told_BT[data.mask_BT] = torch.tensor([value for row in rollouts.log_probs for value in row])
    data.is_told_BT = data.mask_BT & ~told_BT.isnan()
    data.behaviour_log_probs_BT = torch.where(data.is_told_BT, told_BT, data.reference_log_probs_BT)


def importance_weights(data: RolloutBatch, options: PolicyServerConfig) -> Tensor:
    """Returns what the loss of each token is multiplied by, [B, T]: pi / mu of the policy before this step's update.

    The ratio is truncated at ``policy_server.importance_cap``. Further updates on the same rollouts are clipped
    against that same policy, as they are on its own responses.
    """
    own = (data.old_log_probs_BT, data.behaviour_log_probs_BT, data.mask_BT)
    return truncated_weights(log_ratios(*own, options.importance), options.importance_cap)


def off_policy_metrics(data: RolloutBatch, proxy_B: Tensor, options: PolicyServerConfig) -> dict[str, float]:
    """Returns how far the served policy is from the trained one, over all data-parallel ranks.

    ``ess`` is the effective sample size of what ``policy_server.importance`` names, ``response_ess`` that of whole
    responses, both as shares; ``mean_ratio`` the mean ratio of what ``importance`` names; ``truncated`` the share of
    tokens whose ratio is above the cap; ``told`` the share whose log-probability the endpoint told, and ``gap`` the
    mean difference of these, up or down, from the start policy's, in nats. ``proxy`` and ``kl`` are those of the
    trained policy, estimated from the responses of the served one. ``empty`` is the share of responses without tokens,
    which the server refused: they were not sampled, and no other figure here counts them.
    """
    rt, mask_BT = runtime.current(), data.mask_BT
    own = (data.old_log_probs_BT, data.behaviour_log_probs_BT, mask_BT)
    tokens_BT = log_ratios(*own, "token")
    used_BT = log_ratios(*own, options.importance)
    gap_BT = (data.behaviour_log_probs_BT - data.reference_log_probs_BT).abs()
    columns = [used_BT, tokens_BT, data.is_told_BT.float(), gap_BT]
    parts = rt.gather_data_parallel(torch.stack([column[mask_BT] for column in columns]))
    used_N, tokens_N, told_N, gap_N = torch.cat(parts, 1)
    kl_B = response_kl(data.old_log_probs_BT, data.reference_log_probs_BT, mask_BT, "k1", "sum")
    rows = rt.gather_data_parallel(torch.stack([tokens_BT.sum(-1), proxy_B.float(), kl_B, mask_BT.any(-1).float()]))
    everything = torch.cat(rows, 1)
    written = everything[-1] > 0
    responses_R, proxy_R, kl_R = everything[:-1, written]
    response_ess = effective_share(responses_R)
    is_by_token = options.importance == "token"
    cap = torch.tensor(options.importance_cap).log()
    return {
        ESS: effective_share(tokens_N) if is_by_token else response_ess,
        f"{PREFIX}response_ess": response_ess,
        MEAN_RATIO: mean_ratio(tokens_N if is_by_token else responses_R),
        f"{PREFIX}truncated": (used_N > cap).float().sum().item() / max(1, used_N.numel()),
        f"{PREFIX}told": told_N.sum().item() / max(1, told_N.numel()),
        GAP: (gap_N * told_N).sum().item() / max(1.0, told_N.sum().item()),
        f"{PREFIX}proxy": weighted_mean(proxy_R, responses_R),
        f"{PREFIX}kl": weighted_mean(kl_R, responses_R),
        f"{PREFIX}empty": 1 - written.float().mean().item(),
    }
