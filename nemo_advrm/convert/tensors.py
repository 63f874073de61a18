"""What every weight format offers to conversion: tensors by canonical name, read and written one at a time.

The canonical names are those of one unsplit Megatron-Core model without the prefix ``model.``, layers numbered over the
whole model, the vocabulary unpadded (:mod:`nemo_advrm.convert.tensor_names` lists them for a ModelConfig)::

    embedding.word_embeddings.weight                       [vocabulary, hidden]
    embedding.position_embeddings.weight                   [positions, hidden]
    decoder.layers.3.self_attention.linear_qkv.layer_norm_weight   the norm before attention
    decoder.layers.3.self_attention.linear_qkv.weight      [groups * (heads / groups + 2) * head size, hidden]
    decoder.layers.3.self_attention.linear_qkv.bias
    decoder.layers.3.self_attention.q_layernorm.weight     [head size]
    decoder.layers.3.self_attention.k_layernorm.weight
    decoder.layers.3.self_attention.linear_proj.weight     [hidden, heads * head size]
    decoder.layers.3.post_self_attn_layernorm.weight
    decoder.layers.3.mlp.linear_fc1.layer_norm_weight      the norm before the MLP
    decoder.layers.3.mlp.linear_fc1.weight                 [gate and up stacked, hidden]
    decoder.layers.3.mlp.linear_fc2.weight                 [hidden, ffn]
    decoder.layers.3.post_mlp_layernorm.weight
    decoder.final_layernorm.weight
    output_layer.weight                                    [vocabulary, hidden], absent when tied and in RMs
    head.weight, head.bias                                 [outputs, hidden], [outputs]

Rows of ``linear_qkv`` are, group by group: the group's queries, its key, its value.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.data.reading import ReadingRule
from nemo_advrm.engine.gpt import Head


@dataclass(frozen=True)
class TensorSpec:
    """Shape and number format of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass
class Description:
    """What a checkpoint says of its model beside the weights.

    Attributes:
        model: the architecture; ``model.vocab_size`` is the unpadded vocabulary.
        head: "lm", "reward" or "value".
        tokenizer: directory or file of the tokenizer that travels with the weights, None when there is none.
        hf_config: the config.json the model came from, {} when it never was a Hugging Face model.
        rule: how conversations are read, where the tokenizer has a chat template.
        provenance: anything JSON holds: what it was converted from, training data, rounds, SFT statistics.
    """

    model: ModelConfig
    head: Head
    tokenizer: Path | None = None
    hf_config: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    rule: ReadingRule = field(default_factory=ReadingRule)


class TensorSource(Protocol):
    """A checkpoint that is read: names and shapes at once, each tensor only when asked for.

    Opening raises CheckpointError for a missing, damaged or unsupported checkpoint, before any tensor is read.
    """

    path: Path

    @property
    def description(self) -> Description: ...

    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor by canonical name, without reading data."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, of the shape and dtype that :meth:`tensors` gives."""
        ...

    def native(self, name: str) -> str:
        """What the format itself calls a tensor, for people to read."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class TensorSink(Protocol):
    """A checkpoint that is written under a partial name and gets its own name from :meth:`close`.

    It is constructed with what will come (the source's ``tensors()``, of the dtype wanted) and checks everything then,
    without touching the disk; entering it makes the partial. Leaving by an exception removes the partial; leaving
    without one calls :meth:`close`. A partial that a killed conversion left is removed by the next one.

    Attributes:
        nbytes: total size of the weights it will write, which may differ from the source's (padding, dtype).
    """

    path: Path
    nbytes: int

    def native(self, name: str) -> str:
        """What the format itself calls a tensor, for people to read."""
        ...

    def write(self, name: str, tensor: Tensor) -> None:
        """Store one tensor; each canonical name exactly once, in any order. Raises CheckpointError otherwise."""
        ...

    def close(self) -> None:
        """Make the checkpoint complete; raises CheckpointError when a tensor has not come."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
