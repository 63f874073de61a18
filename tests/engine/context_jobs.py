"""What context-parallel ranks hold and compute; every function runs on all ranks of a layout."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from tiny import TOKENIZER, sequences, tiny_config
from torch import Tensor

from nemo_advrm.commands import train_rm
from nemo_advrm.config import load_config
from nemo_advrm.config.schema import ModelConfig, PrecisionConfig
from nemo_advrm.engine import context, runtime
from nemo_advrm.engine.attention import FusedCoreAttention
from nemo_advrm.engine.collectives import run_on_first_rank
from nemo_advrm.engine.decoding import decoding
from nemo_advrm.engine.microbatches import EncodedResponse
from nemo_advrm.engine.transformer import transformer_config
from nemo_advrm.models.language_model import SupervisedModel


def place() -> dict[str, Any]:
    """This rank's place among the replicas, and what it hears from its own."""
    rt = runtime.current()
    return {
        "source": rt.is_replica_source,
        "heard": run_on_first_rank(rt.replica, lambda: f"rank {rt.rank}"),
        "replicas": rt.gather_data_parallel(rt.rank),
        "data": (rt.dp_rank, rt.dp_size),
    }


def parts(length: int) -> dict[str, Any]:
    """The part of 0 ... length - 1 that the rank holds; the whole made of the parts, and gradients through it."""
    rank = runtime.current().rank
    own = context.cp_slice(torch.arange(length, dtype=torch.float32), 0).requires_grad_()
    gradients = {}
    for used_whole in (True, False):
        whole = torch.cat(context.cp_all_gather(own, used_whole=used_whole))
        gradients[used_whole] = torch.autograd.grad(whole @ (torch.arange(length) + 100.0 * rank), own)[0].tolist()
    index_B, held_B = context.own_index(torch.arange(length), length)
    return {
        "own": own.tolist(),
        "whole": whole.tolist(),
        "gradients": gradients,
        "found": own[index_B[held_B]].tolist(),
        "held": held_B.nonzero().flatten().tolist(),
    }


def sum_of_parts() -> tuple[list[float], list[float]]:
    """The sum of one-hot rows, and the gradient of a loss that every rank computes from it."""
    rank = runtime.current().rank
    own = torch.zeros(3)
    own[rank] = rank + 1.0
    own.requires_grad_()
    total = context.cp_all_reduce(own)
    (total * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert own.grad is not None
    return total.tolist(), own.grad.tolist()


def attention(settings: dict[str, Any], softcap: float, qkvg: list[Tensor]) -> list[Tensor]:
    """Result and gradients of queries, keys and values of whole sequences [S, b, heads or groups, d]."""
    ranks = runtime.current().layout.context
    model = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, context_parallel_size=ranks, **settings)
    config = transformer_config(model, PrecisionConfig(), on_gpu=False)
    product = FusedCoreAttention(config, 1, AttnMaskType.causal, "self", softcap=softcap)
    parts = [context.cp_slice(t, 0) if ranks > 1 else t.clone() for t in qkvg]
    q, k, v = (t.requires_grad_() for t in parts[:3])
    result = product(q, k, v, None)
    found = [result, *torch.autograd.grad(result, (q, k, v), parts[3])]
    return [context.gather_sequence(t.detach()) if ranks > 1 else t.detach() for t in found]


class EngineAttention(torch.nn.Module):
    """Stands for Transformer Engine's attention, of which no build for CPUs exists."""

    def __init__(self) -> None:
        super().__init__()
        self.set_context_parallel_group("group", [0, 1], "stream", "p2p")

    def set_context_parallel_group(self, group: Any, ranks: Any, stream: Any, kind: str) -> None:
        self.cp_group, self.cp_global_ranks, self.cp_stream, self.cp_comm_type = group, ranks, stream, kind


def switched_off() -> tuple[EngineAttention, Any, list[Any]]:
    """A stand-in after the switch, its configuration, and what both said inside."""
    module = EngineAttention()
    config = SimpleNamespace(context_parallel_size=2, sequence_parallel=False, fp8=None, apply_rope_fusion=False)
    module.config = config  # type: ignore[assignment]
    with decoding([module]):
        inside = [module.cp_group, module.cp_comm_type, config.context_parallel_size]
    return module, config, inside


def train_on_ends() -> list[dict[str, float]]:
    """Steps of fine-tuning on responses of three tokens at the ends of long rows: one rank holds them all."""
    cfg = tiny_config("llama", runtime.current().layout)
    rows = [EncodedResponse((8 * row)[:16], 13) for row in sequences(8)]
    module = SupervisedModel(cfg, TOKENIZER, rows)
    steps = module.steps(0)
    return [module.train_on(next(steps), step) for step in range(2)]


def train_rm_stage(overrides: list[str], run_dir: str) -> dict[str, Any]:
    """The result that stage ``train_rm`` writes."""
    assert train_rm.main(load_config([*overrides, f"run_dir={run_dir}"], "train_rm")) == 0
    return json.loads((Path(run_dir) / "result.json").read_text())  # type: ignore[no-any-return]
