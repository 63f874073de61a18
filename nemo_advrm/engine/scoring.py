"""Scores token sequences with a Megatron reward model, and reads the hidden states that the scores are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_advrm.engine import runtime
from nemo_advrm.engine.microbatches import microbatch_rows, scored_microbatch
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.engine.schedule import forward


def score_sequences(model: MegatronModel, sequences: list[list[int]], pad_id: int) -> Tensor:
    """Reward of each whole sequence (prompt, response and its end token), read at its last token.

    A score does not depend on the other sequences. All ranks of a replica call with the same sequences and get the same
    result; all replicas must call equally often.

    Returns:
        [N] fp32 on the CPU in the given order; [N, outputs] for heads with several outputs.
    """
    scores = _read_at_end(model, sequences, pad_id, with_hidden=False)
    return scores.squeeze(-1) if model.head_outputs == 1 else scores


def scores_and_hidden_states(model: MegatronModel, sequences: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """What :func:`score_sequences` returns, and the hidden state that the head reads, in the same forward pass.

    Returns:
        Scores, [N] or [N, outputs], and hidden states after the last norm, [N, H]; fp32 on the CPU.
    """
    both = _read_at_end(model, sequences, pad_id, with_hidden=True)
    scores, hidden_NH = both[:, : model.head_outputs], both[:, model.head_outputs :]
    return scores.squeeze(-1) if model.head_outputs == 1 else scores, hidden_NH


def _read_at_end(model: MegatronModel, sequences: list[list[int]], pad_id: int, with_hidden: bool) -> Tensor:
    """What the head gives at the last token of each sequence, [N, outputs], or [N, outputs + H] with hidden states."""
    groups = microbatch_rows(model, [(len(s),) for s in sequences], rows=4)
    microbatches = [scored_microbatch(model, [sequences[i] for i in group], pad_id) for group in groups]
    if with_hidden:
        for microbatch in microbatches:
            microbatch.forward["with_hidden"] = True
    # also known on earlier pipeline stages, which have no head
    width = model.head_outputs + (model.config.hidden_size if with_hidden else 0)
    table = torch.zeros(len(sequences), width)
    # also without sequences: other data-parallel ranks may have some
    results = forward(model, microbatches, lambda output, _: output)
    if microbatches:
        if results:
            for group, result in zip(groups, results, strict=True):
                table[group] = result.float().cpu()
        table = runtime.current().broadcast_from_last_stage(table).cpu()
    return table
