"""Log-probabilities and entropies of whole responses under a language model."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_advrm.engine import runtime
from nemo_advrm.engine.log_probs import log_probs_and_entropy
from nemo_advrm.engine.microbatches import EncodedResponse, response_microbatch
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.engine.schedule import Microbatch, forward, microbatch_rows


def summed_log_probs(model: MegatronModel, rows: list[EncodedResponse], pad_id: int) -> Tensor:
    """Log-probability of each response, summed over its tokens, [N] fp32 in nats on the CPU.

    All ranks call. An empty response has log-probability 0.
    """
    return summed_log_probs_and_entropies(model, rows, pad_id)[:, 0]


@torch.no_grad()
def summed_log_probs_and_entropies(model: MegatronModel, rows: list[EncodedResponse], pad_id: int) -> Tensor:
    """Log-probability and entropy of each response, summed over its tokens, [N, 2] fp32 in nats on the CPU.

    All ranks call. Both are 0 for an empty response.
    """
    places = [i for i, row in enumerate(rows) if len(row.tokens) > row.prompt_length]
    groups = microbatch_rows(model, [len(rows[i].tokens) for i in places])
    groups = [[places[i] for i in group] for group in groups]
    microbatches = [response_microbatch(model, [rows[i] for i in group], pad_id) for group in groups]

    def collect(logits_NV: Tensor, microbatch: Microbatch) -> Tensor:
        both_N2 = torch.stack(log_probs_and_entropy(logits_NV, microbatch.extra["targets_N"]), -1).float()
        sums_B2 = torch.zeros(microbatch.tokens_BS.size(0), 2, device=both_N2.device)
        return sums_B2.index_add(0, microbatch.extra["rows_N"], both_N2)

    values_N2 = torch.zeros(len(rows), 2)
    for group, sums_B2 in zip(groups, forward(model, microbatches, collect), strict=False):
        values_N2[group] = sums_B2.cpu()
    if not rows:
        return values_N2
    return runtime.current().broadcast_from_last_stage(values_N2).cpu()
