"""Dropout draws for every sequence by itself, wherever it stands in a packed row and whichever rank holds it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import Worlds
from megatron.core.transformer.enums import AttnMaskType
from tiny import TOKENIZER, pairs, tiny_config

from nemo_advrm.engine.attention import FusedCoreAttention
from nemo_advrm.engine.microbatches import Microbatch, scored_microbatch
from nemo_advrm.engine.packing import Packing
from nemo_advrm.engine.runtime import Layout, Runtime
from nemo_advrm.engine.schedule import Sums, forward_backward
from nemo_advrm.engine.transformer import transformer_config
from nemo_advrm.models.reward_model import RewardModel


@pytest.mark.parametrize(("softcap", "window"), [(0.0, 0), (0.0, 3), (2.0, 0)])
def test_packed_sequences_drop_weights_of_their_own(single: Runtime, softcap: float, window: int) -> None:
    rate, draws, twin = 0.3, 50, 6
    cfg = tiny_config(attention_dropout=rate, sliding_window=window)
    config = transformer_config(cfg.model, cfg.precision, on_gpu=False)
    attention = FusedCoreAttention(config, 1, AttnMaskType.causal, "self", softcap=softcap)
    packed = Packing.of([twin, twin, 4], 16, torch.device("cpu")).params
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(16, 4, 16, generator=generator), torch.randn(16, 2, 16, generator=generator)
    for tensor in (query, key):
        tensor[twin : 2 * twin] = tensor[:twin]
    value = torch.eye(16)[:, None].repeat(1, 2, 1)  # the output is the row of weights

    def weights() -> torch.Tensor:
        return attention(query, key, value, None, packed_seq_params=packed)  # type: ignore[no-any-return]

    kept = attention.eval() and weights()
    sequence_T = torch.tensor([0] * twin + [1] * twin + [2] * 4)
    distance = torch.arange(16)[:, None] - torch.arange(16)
    visible = (sequence_T[:, None] == sequence_T) & (distance >= 0) & (distance < (window or 16))
    assert torch.equal(kept > 0, visible[:, None].expand_as(kept))
    torch.testing.assert_close(kept[:twin, :, :twin], kept[twin : 2 * twin, :, twin : 2 * twin])
    single.seed(3)
    attention.train()
    drawn = torch.stack([weights() for _ in range(draws)])
    there = drawn != 0
    torch.testing.assert_close(drawn, (kept / (1 - rate)).expand_as(drawn) * there)

    def near(share: torch.Tensor, expected: float) -> bool:
        return bool((share.float().mean() - expected).abs() < 5 * (expected * (1 - expected) / share.numel()) ** 0.5)

    seen = visible.nonzero(as_tuple=True)
    assert near(~there[:, seen[0], :, seen[1]], rate)
    first, second = there[:, :twin, :, :twin], there[:, twin : 2 * twin, :, twin : 2 * twin]
    rows, keys = visible[:twin, :twin].nonzero(as_tuple=True)
    alike = first[:, rows, :, keys] == second[:, rows, :, keys]
    assert near(alike, rate**2 + (1 - rate) ** 2)


def _scores_under_dropout(single: Runtime, packing: str) -> torch.Tensor:
    """[draws, copies] scores of copies of one sequence that share a microbatch, in training."""
    cfg = tiny_config(hidden_dropout=0.2, attention_dropout=0.2, sequence_packing=packing)
    module = RewardModel(cfg, TOKENIZER, pairs(8), [], seed=3)
    microbatch = scored_microbatch(module.model, [[5, 9, 2, 30, 7]] * 16, TOKENIZER.pad_id)
    assert microbatch.tokens_BS.shape == ((1, 80) if packing == "always" else (16, 5))
    found: list[torch.Tensor] = []

    def loss(output: torch.Tensor, microbatch: Microbatch) -> tuple[torch.Tensor, int, Sums]:
        found.append(output.detach().flatten())
        return output.sum(), output.numel(), {}

    single.seed(3)
    for _ in range(10):
        forward_backward(module.model, [microbatch], loss)
    return torch.stack(found)


def test_copies_in_a_packed_row_vary_as_copies_in_rows_of_their_own(single: Runtime) -> None:
    packed, padded = _scores_under_dropout(single, "always"), _scores_under_dropout(single, "never")
    for scores in (packed, padded):
        assert scores.unique().numel() == scores.numel() == 160
        apart = torch.corrcoef(torch.stack([scores[:, :-1].flatten(), scores[:, 1:].flatten()]))[0, 1]
        assert apart.abs() < 5 / scores.numel() ** 0.5
    error = ((packed.var() + padded.var()) / packed.numel()) ** 0.5
    assert (packed.mean() - padded.mean()).abs() < 4 * error
    assert float(packed.std()) == pytest.approx(float(padded.std()), rel=0.2)


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(context=2), Layout(pipeline=2), Layout(tensor=2)], ids=["dp2", "cp2", "pp2", "tp2"]
)
def test_ranks_that_hold_other_values_draw_other_masks(worlds: Worlds, layout: Layout) -> None:
    (equal, own), (equal_there, own_there) = worlds.run(layout, "dropout_jobs", "streams", 2, model={})
    assert own != own_there and equal != own
    assert (equal == equal_there) == (layout.tensor == 2)
    again: list[Any] = worlds.run(layout, "dropout_jobs", "streams", 2, model={})
    assert again == [(equal, own), (equal_there, own_there)]
