"""Log-probabilities and entropies of whole responses under a language model."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_advrm.engine import runtime
from nemo_advrm.engine.log_probs import Logits, token_values
from nemo_advrm.engine.microbatches import EncodedResponse, Microbatch, microbatch_rows, response_microbatch
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.engine.schedule import forward


def summed_log_probs(model: MegatronModel, rows: list[EncodedResponse], pad_id: int) -> Tensor:
    """Log-probability of each response, summed over its tokens, [N] fp32 in nats on the CPU.

    All ranks call. An empty response has log-probability 0.
    """
    return _summed(model, rows, pad_id, with_entropy=False)[:, 0]


def summed_log_probs_and_entropies(model: MegatronModel, rows: list[EncodedResponse], pad_id: int) -> Tensor:
    """Log-probability and entropy of each response, summed over its tokens, [N, 2] fp32 in nats on the CPU.

    All ranks call. Both are 0 for an empty response.
    """
    return _summed(model, rows, pad_id, with_entropy=True)


@torch.no_grad()
def _summed(model: MegatronModel, rows: list[EncodedResponse], pad_id: int, with_entropy: bool) -> Tensor:
    columns = 1 + with_entropy
    places = [i for i, row in enumerate(rows) if len(row.tokens) > row.prompt_length]
    groups = microbatch_rows(model, [(len(rows[i].tokens),) for i in places])
    groups = [[places[i] for i in group] for group in groups]
    microbatches = [response_microbatch(model, [rows[i] for i in group], pad_id) for group in groups]

    def collect(logits_NV: Logits, microbatch: Microbatch) -> Tensor:
        targets_N = microbatch.extra["targets_N"]
        values_CN = token_values(logits_NV, targets_N, 1.0, with_entropy)
        sums_BC = torch.zeros(microbatch.lengths_B.numel(), columns, device=targets_N.device)
        return sums_BC.index_add(0, microbatch.extra["rows_N"], values_CN.T)

    values_NC = torch.zeros(len(rows), columns)
    for group, sums_BC in zip(groups, forward(model, microbatches, collect), strict=False):
        values_NC[group] = sums_BC.cpu()
    if not rows:
        return values_NC
    return runtime.current().broadcast_from_last_stage(values_NC).cpu()
