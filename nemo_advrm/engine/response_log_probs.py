"""Log-probabilities of whole responses under a language model."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_advrm.engine import runtime
from nemo_advrm.engine.log_probs import log_probs_and_entropy
from nemo_advrm.engine.microbatches import EncodedResponse, response_microbatch
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.engine.schedule import Microbatch, forward, microbatch_rows


@torch.no_grad()
def summed_log_probs(model: MegatronModel, rows: list[EncodedResponse], pad_id: int) -> Tensor:
    """Log-probability of each response, summed over its tokens, [N] fp32 in nats on the CPU.

    All ranks call. An empty response has log-probability 0.
    """
    places = [i for i, row in enumerate(rows) if len(row.tokens) > row.prompt_length]
    groups = microbatch_rows(model, [len(rows[i].tokens) for i in places])
    groups = [[places[i] for i in group] for group in groups]
    microbatches = [response_microbatch(model, [rows[i] for i in group], pad_id) for group in groups]

    def collect(logits_NV: Tensor, microbatch: Microbatch) -> Tensor:
        log_probs_N, _ = log_probs_and_entropy(logits_NV, microbatch.extra["targets_N"])
        sums_B = torch.zeros(microbatch.tokens_BS.size(0), device=log_probs_N.device)
        return sums_B.index_add(0, microbatch.extra["rows_N"], log_probs_N.float())

    values_N = torch.zeros(len(rows))
    for group, sums_B in zip(groups, forward(model, microbatches, collect), strict=False):
        values_N[group] = sums_B.cpu()
    if not rows:
        return values_N
    return runtime.current().broadcast_from_last_stage(values_N).cpu()
