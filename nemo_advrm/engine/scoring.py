"""Scores token sequences with a Megatron reward model."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_advrm.engine import runtime
from nemo_advrm.engine.microbatches import rows_to_microbatch
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.engine.schedule import forward, microbatch_rows


def score_sequences(model: MegatronModel, sequences: list[list[int]], pad_id: int) -> Tensor:
    """Reward of each whole sequence (prompt, response and its end token), read at its last token.

    A score does not depend on the other sequences. All ranks of a replica call with the same sequences and get the same
    result; all replicas must call equally often.

    Returns:
        [N] fp32 on the CPU in the given order; [N, outputs] for heads with several outputs.
    """
    groups = microbatch_rows(model, [len(s) for s in sequences], rows=4)
    microbatches = []
    for group in groups:
        microbatch = rows_to_microbatch(model, [sequences[i] for i in group], pad_id)
        microbatch.forward = {"read_at_B": microbatch.lengths_B - 1}
        microbatches.append(microbatch)
    width = model.head_outputs  # also known on earlier pipeline stages, which have no head
    scores = torch.zeros(len(sequences), width)
    # also without sequences: other data-parallel ranks may have some
    results = forward(model, microbatches, lambda output, _: output)
    if microbatches:
        if results:
            for group, result in zip(groups, results, strict=True):
                scores[group] = result.float().cpu()
        scores = runtime.current().broadcast_from_last_stage(scores).cpu()
    return scores.squeeze(-1) if width == 1 else scores
