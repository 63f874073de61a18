"""Builds this rank's part of a model and wraps it for training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_advrm.megatron import runtime
from nemo_advrm.megatron.cpu_linear import use_onednn
from nemo_advrm.megatron.gpt import Head, HeadedGPT
from nemo_advrm.megatron.transformer import transformer_config
from nemo_advrm.schema import ModelConfig, PrecisionConfig


@dataclass
class MegatronModel:
    """This rank's part of one model. Megatron takes models as lists of chunks; ours have one.

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
    head_outputs: int = 1

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
        """This rank's tensors."""
        return self.parts[0].state_dict()

    def sharded_state_dict(self) -> dict[str, Any]:
        """Megatron's sharded tensors, valid for loading at any other layout."""
        return self.parts[0].sharded_state_dict(prefix="model.")


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
    """Build this rank's part with weights drawn from ``seed``.

    A model that is not trainable has no gradient buffers and is in eval mode. A language model gives
    ``hidden_tokens`` no probability.
    """
    rt = runtime.current()
    config = transformer_config(model, precision, rt.on_gpu)
    config.finalize_model_grads_func = finalize_model_grads
    vocab_size = padded_vocab_size(model, tokenizer_size)
    rt.seed(seed)
    part = HeadedGPT(
        config,
        model,
        head,
        vocab_size,
        on_gpu=rt.on_gpu,
        pre_process=rt.is_first_stage,
        post_process=rt.is_last_stage,
        hidden_tokens=(*hidden_tokens, *range(min(tokenizer_size, vocab_size), vocab_size)),
        head_outputs=head_outputs,
        head_init_std=head_init_std,
    )
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
        part.requires_grad_(False)
        part.eval()
        return MegatronModel([part], [part], config, model, head, vocab_size, head_outputs)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=model.use_distributed_optimizer,
        check_for_nan_in_grad=False,  # the step itself checks loss and gradient norm and names the step
    )
    chunk = DistributedDataParallel(config, ddp, part)
    chunk.broadcast_params()
    return MegatronModel([chunk], [part], config, model, head, vocab_size, head_outputs)
