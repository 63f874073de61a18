"""Recomputed activations, the distributed optimizer and interleaved stages change memory and time, not results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import scale_jobs
import torch
from distributed import Worlds
from megatron.core.transformer.transformer_layer import TransformerLayer
from tiny import pairs

from nemo_advrm.engine import checkpoint
from nemo_advrm.engine.attention import FusedCoreAttention
from nemo_advrm.engine.cpu import types_of_cuda_tensors
from nemo_advrm.engine.microbatches import Microbatch
from nemo_advrm.engine.runtime import Layout, Runtime
from nemo_advrm.engine.schedule import _with_fillers, forward_backward

OVERLAP = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}


def _gradients(single: Runtime, **model: Any) -> tuple[dict[str, torch.Tensor], float, dict[str, int]]:
    """Gradients and loss of one microbatch with dropout, and how often layers and attention products were computed."""
    module = scale_jobs.reward_model(hidden_dropout=0.2, attention_dropout=0.2, micro_batch_tokens=512, **model)
    counts = {"layers": 0, "attention": 0}
    for part in module.model.parts[0].modules():
        for name, kind in (("layers", TransformerLayer), ("attention", FusedCoreAttention)):
            if isinstance(part, kind):
                part.register_forward_hook(
                    lambda *_, name=name: counts.__setitem__(name, counts[name] + 1)  # type: ignore[misc]
                )
    single.seed(3)
    module.optimizer.zero_grad()
    loss = forward_backward(module.model, module._microbatches(pairs(3)), module._loss)["loss"]
    gradients = {name: p.main_grad.clone() for name, p in module.model.parts[0].named_parameters()}
    return gradients, loss, counts


@pytest.mark.parametrize(
    ("model", "layers", "attention"),
    [
        ({"recompute": "selective"}, 4, 8),
        ({"recompute": "full"}, 8, 8),
        ({"recompute": "full", "recompute_num_layers": 2}, 8, 8),
        ({"recompute": "block", "recompute_num_layers": 3}, 7, 7),
    ],
)
def test_recomputed_activations_give_the_same_gradients_under_dropout(
    single: Runtime, model: dict[str, Any], layers: int, attention: int
) -> None:
    kept, kept_loss, kept_counts = _gradients(single)
    again, loss, counts = _gradients(single, **model)
    assert kept_counts == {"layers": 4, "attention": 4} and counts == {"layers": layers, "attention": attention}
    assert loss == kept_loss
    for name, gradient in kept.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_the_distributed_optimizer_splits_its_state_and_continues_at_other_layouts(
    single: Runtime, worlds: Worlds, tmp_path: Path
) -> None:
    initial = scale_jobs.reward_model()
    checkpoint.save(tmp_path / "initial", initial.model)
    unbroken = scale_jobs.train(initial, 0, 4)
    start = {"weights": str(tmp_path / "initial"), "path": str(tmp_path / "saved")}
    first = worlds.run(Layout(), "scale_jobs", "start_and_save", 2, model=OVERLAP, **start)
    interleaved = {**OVERLAP, "virtual_pipeline_model_parallel_size": 2}
    places = [(Layout(pipeline=2), interleaved), (Layout(tensor=2), OVERLAP)]
    for layout, model in places:
        later = worlds.run(layout, "scale_jobs", "load_and_continue", 2, model=model, path=str(tmp_path / "saved"))
        for metrics, expected in zip([*first[0], *later[0]], unbroken, strict=True):
            for name in ("train/loss", "train/margin", "grad_norm"):
                assert metrics[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-4), (layout, name)


def test_microbatches_of_an_interleaved_step_have_one_shape_and_fill_rounds(single: Runtime) -> None:
    module = scale_jobs.reward_model()
    module.model.chunks = [module.model.chunks[0]] * 2
    shapes = [(2, 5), (4, 3), (3, 7)]
    made = [
        Microbatch(torch.ones(shape, dtype=torch.int64), torch.tensor([1]), {"read_at_B": torch.ones(shape[0])})
        for shape in shapes
    ]
    turns = _with_fillers(module.model, made)
    assert [turn.read.tokens_BS.shape for turn in turns] == [(4, 7)] * 3
    assert [int(turn.read.tokens_BS.sum()) for turn in turns] == [10, 12, 21]
    assert turns[0].read.forward["read_at_B"].tolist() == [1, 1, 0, 0]
    assert [turn.real for turn in turns] == made


def test_types_are_those_of_a_gpu_only_while_the_optimizer_is_built() -> None:
    tensor = torch.zeros(1)
    with types_of_cuda_tensors():
        assert (tensor.type(), tensor.bfloat16().type()) == ("torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor")
        assert tensor.type(torch.int64).dtype == torch.int64
    assert tensor.type() == "torch.FloatTensor" and "type" not in vars(torch.Tensor)
