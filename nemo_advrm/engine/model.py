"""Builds this rank's part of a model and wraps it for training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_advrm.config.schema import ModelConfig, PrecisionConfig
from nemo_advrm.data.batching import microbatch_cost
from nemo_advrm.engine import lora, runtime, varlen
from nemo_advrm.engine.collectives import all_reduce_max
from nemo_advrm.engine.dimensions import Head, padded_vocab_size
from nemo_advrm.engine.gpt import HeadedGPT
from nemo_advrm.engine.offload import Parked
from nemo_advrm.engine.transformer import transformer_config
from nemo_advrm.seeds import derive_seed


@dataclass(frozen=True)
class Base:
    """The checkpoint below adapters: its directory, and the fingerprint of its files."""

    path: str
    digest: str


@dataclass
class MegatronModel:
    """This rank's part of one model: one chunk, or several under an interleaved pipeline.

    A model with adapters (:func:`with_adapters`) shares its parts with the frozen model below, which computes without
    them.

    Attributes:
        chunks: modules that the schedules call, wrapped by Megatron's DDP if the model is trained.
        parts: the unwrapped :class:`HeadedGPT` of each chunk.
        heads: members of an ensemble whose scores the outputs of the head are, one each; 1: one model, of any outputs.
        packs: whether its microbatches are packed rows.
        microbatch_cost: fixed cost of a microbatch, in tokens that could be computed instead;
            :mod:`nemo_advrm.engine.microbatch_cost` measures it on a GPU.
        base: the checkpoint below the adapters; None for a model without adapters.
        parked: the weights of a frozen model that wait in CPU memory, away from a GPU.
        gathered: False while updated weights are still sharded over data-parallel ranks.
        capture_failure: why its decoding step could not be captured as a CUDA graph; empty if that did not happen.
    """

    chunks: list[Any]
    parts: list[HeadedGPT]
    config: TransformerConfig
    model_config: ModelConfig
    head: Head
    vocab_size: int
    packs: bool
    microbatch_cost: int
    head_outputs: int = 1
    heads: int = 1
    base: Base | None = None
    parked: Parked | None = None
    gathered: bool = True
    capture_failure: str = ""

    @property
    def trainable(self) -> bool:
        return isinstance(self.chunks[0], DistributedDataParallel)

    def train(self) -> None:
        for chunk in self.chunks:
            chunk.train()

    def eval(self) -> None:
        for chunk in self.chunks:
            chunk.eval()

    @contextlib.contextmanager
    def resident(self) -> Iterator[None]:
        """Be ready for passes inside: those of a frozen model may be in CPU memory before, or have adapters beside."""
        if self.trainable:
            yield
            return
        with lora.switched_off(self.parts), self.parked.resident() if self.parked else contextlib.nullcontext():
            yield

    def prefetch(self) -> None:
        """Begin to copy weights that wait in CPU memory, as this model is used next; they stay until it was."""
        if self.parked is not None:
            self.parked.prefetch()

    def gather_parameters(self) -> None:
        """All-gather updated weights, if training with overlap_param_gather has not done so yet."""
        if not self.gathered:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)
            self.gathered = True

    def state_dict(self) -> dict[str, torch.Tensor]:
        """This rank's tensors."""
        self.gather_parameters()
        return self._merge([part.state_dict() for part in self.parts])

    def sharded_state_dict(self) -> dict[str, Any]:
        """Megatron's sharded tensors, which load at any other layout."""
        self.gather_parameters()
        return self._merge([part.sharded_state_dict(prefix="model.") for part in self.parts])

    def load_state_dict(self, state: dict[str, Any]) -> tuple[list[str], list[str]]:
        """Copy tensors under the names of :meth:`sharded_state_dict`; returns the missing and the unexpected names."""
        missing: list[str] = []
        unexpected: list[str] = []
        for prefix, part in zip(self._prefixes, self.parts, strict=True):
            start = f"{prefix}model."
            own = {name.removeprefix(start): tensor for name, tensor in state.items() if name.startswith(start)}
            result = part.load_state_dict(own, strict=False)
            missing += [prefix + name for name in result.missing_keys]
            unexpected += [prefix + name for name in result.unexpected_keys]
        return missing, unexpected

    @property
    def _prefixes(self) -> list[str]:
        """Prefix of each chunk's names: the chunk's number if there are several, as each counts its layers from 0."""
        return [""] if len(self.parts) == 1 else [f"{i}." for i in range(len(self.parts))]

    def _merge(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            prefix + name: value
            for prefix, state in zip(self._prefixes, states, strict=True)
            for name, value in state.items()
        }


def build_model(
    model: ModelConfig,
    precision: PrecisionConfig,
    head: Head,
    tokenizer_size: int,
    *,
    seed: int,
    trainable: bool = True,
    banned_token_ids: tuple[int, ...] = (),
    head_outputs: int = 1,
    head_init_std: float = 0.02,
    heads: int = 1,
) -> MegatronModel:
    """Build this rank's part of a model with weights drawn from ``seed``.

    A model that is not trainable has no gradient buffers and is in eval mode. A language model gives
    ``banned_token_ids`` no probability. ``heads`` above 1 are the members of an ensemble on one trunk; each is drawn
    from a seed of its own.
    """
    assert heads in (1, head_outputs)
    runtime.need_megatron()
    rt = runtime.current()
    config = transformer_config(model, precision, rt.on_gpu)
    config.finalize_model_grads_func = finalize_model_grads
    vocab_size = padded_vocab_size(model, tokenizer_size)
    rt.seed(seed)
    chunks = model.virtual_pipeline_model_parallel_size
    parts = [
        HeadedGPT(
            config,
            model,
            head,
            vocab_size,
            on_gpu=rt.on_gpu,
            pre_process=rt.is_first_stage and chunk == 0,
            post_process=rt.is_last_stage and chunk == chunks - 1,
            banned_token_ids=(*banned_token_ids, *range(min(tokenizer_size, vocab_size), vocab_size)),
            head_outputs=head_outputs,
            head_init_std=head_init_std,
            vp_stage=chunk if chunks > 1 else None,
        )
        for chunk in range(chunks)
    ]
    for part in parts:
        if not rt.on_gpu and model.expert_model_parallel_size > 1:
            _draw_experts(part, config, seed)
        _move_to_device(part, config, rt)
        if heads > 1 and part.post_process:
            part.head.draw([derive_seed(seed, "head", k) for k in range(1, heads + 1)], head_init_std)
    chunks_to_call: list[Any] = list(parts)
    if trainable:
        chunks_to_call = _wrap_all(parts, config, model)
    else:
        for part in parts:
            part.requires_grad_(False)
            part.eval()
    parked = None
    if model.offload_reference and not trainable and rt.on_gpu:
        parked = Parked([parameter for part in parts for parameter in part.parameters()], rt.device)
    packs = varlen.packs(model, config.params_dtype, rt.on_gpu)
    if rt.on_gpu:  # on every rank or on none: a kernel's trial may fail on one alone, for lack of memory for instance
        packs = not all_reduce_max(int(not packs))
    cost = microbatch_cost(rt.device)
    return MegatronModel(
        chunks_to_call, parts, config, model, head, vocab_size, packs, cost, head_outputs, heads, parked=parked
    )


def with_adapters(frozen: MegatronModel, model: ModelConfig, seed: int, base: Base) -> MegatronModel:
    """A model that trains adapters of ``model.lora``, drawn from ``seed``, and the head, beside ``frozen``'s weights.

    There is one copy of the weights: ``frozen`` remains what it was, for instance the reference policy of the KL
    penalty, and stays on the device. Adapters of an earlier call on it are dropped.
    """
    frozen.parked = None
    for part in frozen.parts:
        for parameter in part.parameters():
            parameter.data = parameter.data.to(runtime.current().device)
        lora.attach(part, model, seed)
    chunks = _wrap_all(frozen.parts, frozen.config, model)
    return replace(frozen, chunks=chunks, model_config=model, base=base)


def _draw_experts(part: HeadedGPT, config: TransformerConfig, seed: int) -> None:
    """Draw every expert's weights by its number: on a CPU Megatron gives those of all ranks the same."""
    for layer in part.decoder.layers:
        experts = layer.mlp.experts.local_experts
        first = parallel_state.get_expert_model_parallel_rank() * len(experts)
        for number, expert in enumerate(experts, first):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(seed, "expert", layer.layer_number, number))
                config.init_method(expert.linear_fc1.weight)
                config.output_layer_init_method(expert.linear_fc2.weight)


def _move_to_device(part: HeadedGPT, config: TransformerConfig, rt: runtime.Runtime) -> None:
    """Move a chunk to its device and dtype; a scalar head stays in fp32."""
    if rt.on_gpu:
        part.to(rt.device)
    keep_heads_in_fp32 = [p for n, p in part.named_parameters() if n.startswith("head.")]
    if config.bf16:
        part.bfloat16()
        for parameter in keep_heads_in_fp32:
            parameter.data = parameter.data.float()


def _wrap_all(parts: list[HeadedGPT], config: TransformerConfig, model: ModelConfig) -> list[Any]:
    """The chunks in Megatron's DDP, which gives what is to be trained its gradient buffers."""
    wrapped = [_wrap(part, config, model, bucketing=i == 0) for i, part in enumerate(parts)]
    if model.overlap_grad_reduce:
        held = [chunk.no_sync for chunk in wrapped]  # no reduction before the last microbatch
        config.no_sync_func = held if len(held) > 1 else held[0]
    return wrapped


def _wrap(part: HeadedGPT, config: TransformerConfig, model: ModelConfig, bucketing: bool) -> DistributedDataParallel:
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=model.overlap_grad_reduce,
        overlap_param_gather=model.overlap_param_gather,
        use_distributed_optimizer=model.use_distributed_optimizer,
        fp8_param_gather=config.fp8_param,
        check_for_nan_in_grad=False,  # the training step checks loss and gradient norm, and names the step
    )
    # one bucket for each later chunk: its communication overlaps with the first one's computation
    chunk = DistributedDataParallel(config, ddp, part, disable_bucketing=not bucketing)
    chunk.broadcast_params()
    return chunk
