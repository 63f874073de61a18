"""Low-rank adapters (LoRA, arXiv 2106.09685) beside the frozen linear layers of a model.

An adapter adds ``alpha / rank * B A x`` to the output of a linear layer. It is a sibling of that layer
(``linear_qkv_adapter`` beside ``linear_qkv``), so that the base's tensors keep the names that they have in checkpoints.

Over tensor-parallel ranks B of a column-parallel layer and A of a row-parallel one are split as the layer's own weight.
The other matrix is whole on every rank: it is small, and this way ranks exchange activations of width ``rank`` alone,
where a split A would need the wide input of the layer gathered a second time under sequence parallelism.

Under FP8 the adapters compute in bf16.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nemo_advrm.config.schema import LoraConfig, ModelConfig
from nemo_advrm.engine import runtime
from nemo_advrm.engine.adapter_base import HOLDERS, SUFFIX, merged
from nemo_advrm.engine.gpt import HeadedGPT
from nemo_advrm.engine.parameters import SPLIT_OUTPUTS, adapted_sizes
from nemo_advrm.seeds import derive_seed


class Adapter(nn.Module):
    """The two matrices beside one linear layer that ``model.lora.targets`` names.

    A is drawn as in ``peft``, from ``seed`` alone, so that it is the same at every layout; B is zero at first.
    """

    def __init__(self, part: HeadedGPT, model: ModelConfig, lora: LoraConfig, target: str, seed: int) -> None:
        super().__init__()
        config: TransformerConfig = part.config
        self.column = target in SPLIT_OUTPUTS
        self.halves = target == "linear_fc1" and config.gated_linear_unit
        self.sequence_parallel = config.sequence_parallel
        self.dropout = lora.dropout
        self.scale = lora.alpha / lora.rank
        self.enabled = True
        self.handle: RemovableHandle | None = None  # of the hook that adds what it computes
        inputs, outputs = adapted_sizes(model)[target]
        draw = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(inputs)
        whole_A = torch.empty(lora.rank, inputs, device="cpu").uniform_(-bound, bound, generator=draw)
        size, rank = config.tensor_model_parallel_size, part.pg_collection.tp.rank()
        split_A = whole_A if self.column else whole_A.chunk(size, 1)[rank].contiguous()
        place = {"device": runtime.current().device, "dtype": config.params_dtype}
        rows = outputs // size if self.column else outputs
        self.lora_A = nn.Parameter(split_A.to(**place))
        self.lora_B = nn.Parameter(torch.zeros(rows, lora.rank, **place))
        whole, split, dim = (self.lora_A, self.lora_B, 0) if self.column else (self.lora_B, self.lora_A, 1)
        # Megatron sums its gradients over tensor-parallel ranks, each of which has seen a part of the tokens
        whole.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        set_tensor_model_parallel_attributes(split, True, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """What the layer gets, [S, B, in] -> what is added to its output: both split as the layer's own."""
        low = F.linear(self._dropped(x), self.lora_A)
        if self.column and self.sequence_parallel:
            low = tensor_parallel.gather_from_sequence_parallel_region(low)
        elif self.column:
            low = tensor_parallel.copy_to_tensor_model_parallel_region(low)
        elif self.sequence_parallel:
            low = tensor_parallel.reduce_scatter_to_sequence_parallel_region(low)
        else:
            low = tensor_parallel.reduce_from_tensor_model_parallel_region(low)
        return self.scale * F.linear(low, self.lora_B)

    def _dropped(self, x: Tensor) -> Tensor:
        if not (self.dropout and self.training):
            return x
        # ranks that hold the same values must drop the same ones, those that hold different values must not
        alike = self.column and not self.sequence_parallel
        with contextlib.nullcontext() if alike else tensor_parallel.get_cuda_rng_tracker().fork():
            return F.dropout(x, self.dropout)

    @torch.no_grad()
    def merge_into(self, weight: Tensor) -> None:
        """Add the adapter to this rank's part of the layer's weight; the sum is made in fp32.

        The weight may wait in CPU memory (``model.offload_reference``).
        """
        weight.copy_(merged(weight, self.lora_A, self.lora_B, self.scale))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Megatron's sharded tensors of both matrices."""
        axes = {"lora_B": 0} if self.column else {"lora_A": 1}
        state = self.state_dict(keep_vars=True)
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets)
        if self.halves:  # every rank has its part of both halves, as of the layer's weight
            name = f"{prefix}lora_B"
            sharded[name] = apply_swiglu_sharded_factory(sharded[name], sharded_offsets)
        return sharded


def is_trained(name: str) -> bool:
    """Whether a tensor of a model with adapters is trained: those of adapters and of a reward or value head."""
    return f"{SUFFIX}." in name or ".head." in f".{name}"


def attach(part: HeadedGPT, model: ModelConfig, seed: int) -> None:
    """Put new adapters beside the linear layers of a frozen chunk; they and a head are to be trained."""
    _detach(part)
    for number, holder, target in _places(part, model.lora.targets):
        linear = getattr(holder, target)
        adapter = Adapter(part, model, model.lora, target, derive_seed(seed, "lora", number, target))
        adapter.handle = linear.register_forward_hook(_Add(adapter))
        setattr(holder, target + SUFFIX, adapter)
    for name, parameter in part.named_parameters():
        parameter.requires_grad_(is_trained(name))
    recomputes = model.recompute in ("full", "block") and part.pre_process
    if recomputes and _need_gradient not in part.embedding._forward_hooks.values():
        # a recomputed layer has gradients only if its input has
        part.embedding.register_forward_hook(_need_gradient)


def _detach(part: HeadedGPT) -> None:
    """Remove the adapters of an earlier training on the same frozen chunk."""
    found = [(holder, *item) for holder in part.modules() for item in holder.named_children()]
    for holder, name, child in found:
        if isinstance(child, Adapter):
            assert child.handle is not None
            child.handle.remove()
            delattr(holder, name)


@contextlib.contextmanager
def switched_off(parts: list[HeadedGPT]) -> Iterator[None]:
    """Compute without adapters inside: the base alone."""
    adapters = [module for part in parts for module in part.modules() if isinstance(module, Adapter)]
    for adapter in adapters:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.enabled = True


@contextlib.contextmanager
def to_fill(parts: list[HeadedGPT], model: ModelConfig, lora: LoraConfig) -> Iterator[list[tuple[nn.Module, Adapter]]]:
    """New adapters stand beside the linear layers of a plain model inside, to be filled; gives (layer, adapter)."""
    places = [(part, holder, target) for part in parts for _, holder, target in _places(part, lora.targets)]
    for part, holder, target in places:
        setattr(holder, target + SUFFIX, Adapter(part, model, lora, target, seed=0))
    try:
        yield [(getattr(holder, target), getattr(holder, target + SUFFIX)) for _, holder, target in places]
    finally:
        for _, holder, target in places:
            delattr(holder, target + SUFFIX)


@contextlib.contextmanager
def to_merge(parts: list[HeadedGPT], model: ModelConfig, lora: LoraConfig) -> Iterator[None]:
    """As :func:`to_fill`; at the end the adapters are merged into the weights."""
    with to_fill(parts, model, lora) as filled:
        yield
        for linear, adapter in filled:
            adapter.merge_into(linear.weight)


@dataclass(frozen=True)
class AdapterSet:
    """The adapters and the head of one of several models that share frozen weights (``ensemble.share=lora``).

    They are no modules of the frozen model, which is without them what it was.

    Attributes:
        adapters: (linear layer, adapter); a layer has several where adapters were trained on adapters.
        heads: (chunk, head) of the last stage.
    """

    adapters: list[tuple[nn.Module, Adapter]]
    heads: list[tuple[HeadedGPT, nn.Module]]

    def __post_init__(self) -> None:
        for module in [*(adapter for _, adapter in self.adapters), *(head for _, head in self.heads)]:
            module.requires_grad_(False).eval()

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The frozen model computes as this one inside."""
        handles = [linear.register_forward_hook(_Add(adapter)) for linear, adapter in self.adapters]
        before = [(part, part.head) for part, _ in self.heads]
        for part, head in self.heads:
            part.head = head
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for part, head in before:
                part.head = head


def _places(part: HeadedGPT, targets: list[str]) -> Iterator[tuple[int, nn.Module, str]]:
    """(number of the layer in the whole model, the module that holds the linear layer, its name) of this chunk."""
    for layer in part.decoder.layers:
        for target in targets:
            yield layer.layer_number, getattr(layer, HOLDERS[target]), target


class _Add:
    """The forward hook of a linear layer that adds its adapter."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...], result: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        if not self.adapter.enabled:
            return result
        return result[0] + self.adapter(inputs[0]), result[1]


def _need_gradient(_: nn.Module, inputs: Any, embedded: Tensor) -> Tensor:
    return embedded.requires_grad_() if torch.is_grad_enabled() else embedded
