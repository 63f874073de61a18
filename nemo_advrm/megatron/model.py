"""Builds this rank's part of a model and wraps it for training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_advrm.errors import ConfigError
from nemo_advrm.megatron import runtime
from nemo_advrm.megatron.cpu_linear import use_onednn
from nemo_advrm.megatron.gpt import Head, HeadedGPT
from nemo_advrm.megatron.transformer import transformer_config
from nemo_advrm.schema import ModelConfig, PrecisionConfig


@dataclass
class MegatronModel:
    """The chunks of one model on this rank (more than one under the interleaved pipeline).

    Attributes:
        chunks: what schedules call: wrapped by Megatron's DDP if the model is trained.
        parts: the bare :class:`HeadedGPT` of each chunk.
    """

    chunks: list[Any]
    parts: list[HeadedGPT]
    config: TransformerConfig
    model: ModelConfig
    head: Head
    vocab_size: int

    @property
    def trainable(self) -> bool:
        return isinstance(self.chunks[0], DistributedDataParallel)

    def train(self) -> None:
        for chunk in self.chunks:
            chunk.train()

    def eval(self) -> None:
        for chunk in self.chunks:
            chunk.eval()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """This rank's tensors; keys carry the chunk number under the interleaved pipeline."""
        if len(self.parts) == 1:
            return self.parts[0].state_dict()
        return {f"{i}.{k}": v for i, part in enumerate(self.parts) for k, v in part.state_dict().items()}

    def sharded_state_dict(self) -> dict[str, Any]:
        """Megatron's sharded tensors, valid for loading at any other layout."""
        if len(self.parts) == 1:
            return self.parts[0].sharded_state_dict(prefix="model.")
        state: dict[str, Any] = {}
        for i, part in enumerate(self.parts):
            state.update({f"{i}.{k}": v for k, v in part.sharded_state_dict(prefix="model.").items()})
        return state


def padded_vocab_size(model: ModelConfig, tokenizer_size: int) -> int:
    """The vocabulary padded so that tensor-parallel ranks get equal parts.

    The unit does not depend on small tensor-parallel sizes, so that a checkpoint opens at TP 1, 2, 4 and 8.
    """
    wanted = model.vocab_size or tokenizer_size
    unit = model.make_vocab_size_divisible_by
    if unit % model.tensor_model_parallel_size:
        unit *= model.tensor_model_parallel_size
    return -(-wanted // unit) * unit


def build_model(
    model: ModelConfig,
    precision: PrecisionConfig,
    head: Head,
    tokenizer_size: int,
    *,
    seed: int,
    trainable: bool = True,
    hidden_tokens: tuple[int, ...] = (),
    head_outputs: int = 1,
    head_init_std: float = 0.02,
) -> MegatronModel:
    """Build this rank's chunks with weights drawn from ``seed``.

    A model that is not trainable has no gradient buffers and is in eval mode. A language model gives
    ``hidden_tokens`` no probability.
    """
    from megatron.core import parallel_state

    rt = runtime.current()
    if model.virtual_pipeline_model_parallel_size:
        # Megatron's interleaved schedule wants microbatches in multiples of the pipeline size, and between two stages
        # it confuses the shapes (and, batched, the contents) of what travels in the two directions
        raise ConfigError(
            "model.virtual_pipeline_model_parallel_size: the interleaved schedule needs microbatches of equal shape, "
            "and ours follow the lengths of the rows; set it to 0"
        )
    config = transformer_config(model, precision, rt.on_gpu)
    config.finalize_model_grads_func = finalize_model_grads
    vocab_size = padded_vocab_size(model, tokenizer_size)
    rt.seed(seed)
    virtual = model.virtual_pipeline_model_parallel_size or 0
    parts = []
    for i in range(max(1, virtual)):
        stage = i if virtual else None
        parts.append(
            HeadedGPT(
                config,
                model,
                head,
                vocab_size,
                on_gpu=rt.on_gpu,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
                vp_stage=stage,
                hidden_tokens=(*hidden_tokens, *range(min(tokenizer_size, vocab_size), vocab_size)),
                head_outputs=head_outputs,
                head_init_std=head_init_std,
            )
        )
    for part in parts:
        if rt.on_gpu:
            part.to(rt.device)
        else:
            use_onednn(part)
        keep_heads_in_fp32 = [p for n, p in part.named_parameters() if n.startswith("head.")]
        if config.bf16:
            part.bfloat16()
            for parameter in keep_heads_in_fp32:
                parameter.data = parameter.data.float()
    if not trainable:
        for part in parts:
            part.requires_grad_(False)
            part.eval()
        return MegatronModel(list(parts), parts, config, model, head, vocab_size)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=model.use_distributed_optimizer,
        check_for_nan_in_grad=False,  # the step itself checks loss and gradient norm and names the step
    )
    chunks = [
        DistributedDataParallel(config, ddp, part, disable_bucketing=i > 0) for i, part in enumerate(parts)
    ]
    for chunk in chunks:
        chunk.broadcast_params()
    return MegatronModel(chunks, parts, config, model, head, vocab_size)
