"""Builds the real Megatron model of every pipeline stage on the meta device, in a fake process group."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_advrm.config.layout import expert_tensor_parallel_size
from nemo_advrm.config.schema import ModelConfig, PrecisionConfig
from nemo_advrm.engine import cpu
from nemo_advrm.engine.dimensions import Head
from nemo_advrm.engine.gpt import HeadedGPT
from nemo_advrm.engine.transformer import transformer_config


@contextmanager
def _rank(model: ModelConfig, rank: int, world_size: int) -> Iterator[None]:
    """Act as rank ``rank`` inside, in a fake process group without other processes; its collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("the planner must build its models in a process that has not started Megatron-Core")
    chunks = model.virtual_pipeline_model_parallel_size
    hook = sys.excepthook  # init_process_group wraps it to print the rank
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=model.tensor_model_parallel_size,
            pipeline_model_parallel_size=model.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
            context_parallel_size=model.context_parallel_size,
            expert_model_parallel_size=model.expert_model_parallel_size,
            expert_tensor_parallel_size=expert_tensor_parallel_size(
                model.tensor_model_parallel_size, model.expert_model_parallel_size
            ),
            create_gloo_process_groups=False,
        )
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        sys.excepthook = hook


def _build(model: ModelConfig, head: Head, vocab_size: int, head_outputs: int, stage: int) -> tuple[int, int]:
    """Parameters of all chunks of this process's stage: those of one rank, and those of all its ranks together."""
    config = transformer_config(model, PrecisionConfig(), on_gpu=False)  # the precision does not change the counts
    chunks = model.virtual_pipeline_model_parallel_size
    last = model.pipeline_model_parallel_size - 1
    on_rank = together = 0
    for chunk in range(chunks):
        # Megatron calls .cuda() on the weight of a pipeline's tied embeddings
        with torch.device("meta"), mock.patch.object(torch.Tensor, "cuda", lambda self, *args, **kwargs: self):
            part = HeadedGPT(
                config,
                model,
                head,
                vocab_size,
                on_gpu=False,
                pre_process=stage == 0 and chunk == 0,
                post_process=stage == last and chunk == chunks - 1,
                head_outputs=head_outputs,
                vp_stage=chunk if chunks > 1 else None,
            )
        for parameter in part.parameters():
            on_rank += parameter.numel()
            if stage and getattr(parameter, "shared_embedding", False):
                continue  # the last stage's copy of a tied embedding
            sharded = getattr(parameter, "tensor_model_parallel", False)
            dealt = not getattr(parameter, "allreduce", True)  # an expert's, and that expert is on no other rank
            split = model.tensor_model_parallel_size if sharded else 1
            together += parameter.numel() * (model.expert_model_parallel_size if dealt else split)
    return on_rank, together


def build_stages(
    model: ModelConfig, head: Head, vocab_size: int, world_size: int, head_outputs: int = 1
) -> tuple[list[int], int]:
    """Count parameters by real :class:`HeadedGPT` chunks on the meta device.

    Returns those of one rank of each pipeline stage, and those of the whole model, each counted once. Raises
    RuntimeError in a process that already runs Megatron-Core.
    """
    cpu.redirect_megatron_to_cpu()  # the exchange of experts makes a CUDA stream
    stages = model.pipeline_model_parallel_size
    counts = []
    for stage in range(stages):
        with _rank(model, stage * (world_size // stages), world_size):
            counts.append(_build(model, head, vocab_size, head_outputs, stage))
    return [on_rank for on_rank, _ in counts], sum(together for _, together in counts)
