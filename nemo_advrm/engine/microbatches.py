"""Builds microbatches from token rows: whole sequences, or prompts with responses to predict."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nemo_advrm.data.batching import pad_rows
from nemo_advrm.engine import runtime
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.engine.schedule import Microbatch, sequence_multiple


@dataclass(frozen=True)
class EncodedResponse:
    """Prompt and response with its end token; the loss covers the tokens from ``prompt_length`` on."""

    tokens: list[int]
    prompt_length: int


def response_microbatch(model: MegatronModel, rows: list[EncodedResponse], pad_id: int) -> Microbatch:
    """Microbatch that predicts the response tokens of ``rows``.

    ``extra`` holds ``targets_N`` [N], all response tokens row by row, and ``rows_N`` [N], the row of each.
    """
    microbatch = rows_to_microbatch(model, [r.tokens for r in rows], pad_id)
    tokens_BS, lengths_B = microbatch.tokens_BS, microbatch.lengths_B
    prompts_B = torch.tensor([r.prompt_length for r in rows], device=tokens_BS.device)
    positions_S = torch.arange(tokens_BS.size(1), device=tokens_BS.device)
    # position s - 1 predicts the token at position s
    predict_BS = (positions_S >= prompts_B[:, None] - 1) & (positions_S < lengths_B[:, None] - 1)
    microbatch.forward = {"predict_BS": predict_BS}
    microbatch.extra = {
        "targets_N": tokens_BS[:, 1:][predict_BS[:, :-1]],
        "rows_N": predict_BS.nonzero()[:, 0],
    }
    return microbatch


def rows_to_microbatch(model: MegatronModel, rows: list[list[int]], pad_id: int) -> Microbatch:
    """Microbatch of ``rows``, padded on the right to a multiple that the layout needs."""
    device = runtime.current().device
    tokens_BS, lengths_B = pad_rows(rows, pad_id, sequence_multiple(model))
    return Microbatch(tokens_BS.to(device), lengths_B.to(device))
