"""The interface of all weight formats: tensors are read and written one at a time by their canonical names.

Canonical names are those of one unsplit Megatron-Core model without the prefix ``model.``, with layers numbered over
the whole model and an unpadded vocabulary (:mod:`nemo_advrm.convert.tensor_names` lists them for a ModelConfig)::

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

Rows of ``linear_qkv`` are ordered by group; each group has its queries, its key and its value.
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
    """Shape and data type of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass
class Description:
    """The content of a checkpoint other than its weights.

    Attributes:
        model: the architecture; ``model.vocab_size`` is the unpadded vocabulary.
        head: "lm", "reward" or "value".
        tokenizer: directory or file of the tokenizer, None without one.
        hf_config: config.json of the original Hugging Face model, {} if there is none.
        rule: how conversations are read if the tokenizer has a chat template.
        provenance: JSON values: source of the conversion, training data, rounds, SFT statistics.
    """

    model: ModelConfig
    head: Head
    tokenizer: Path | None = None
    hf_config: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    rule: ReadingRule = field(default_factory=ReadingRule)


class TensorSource(Protocol):
    """Reads a checkpoint: names and shapes on opening, each tensor on request.

    Opening raises CheckpointError for a missing, damaged or unsupported checkpoint.
    """

    path: Path

    @property
    def description(self) -> Description: ...

    def tensors(self) -> dict[str, TensorSpec]:
        """Return the spec of every tensor by canonical name, without reading data."""
        ...

    def read(self, name: str) -> Tensor:
        """Read one tensor to the CPU, with the shape and dtype that :meth:`tensors` returns."""
        ...

    def native(self, name: str) -> str:
        """Return the name of a tensor in this format, for messages."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class TensorSink(Protocol):
    """Writes a checkpoint under a temporary name; :meth:`close` gives it its final name.

    The constructor gets the specs of all tensors and checks everything without writing. Entering creates the temporary
    directory. Leaving with an exception removes it; leaving without one calls :meth:`close`. The next conversion
    removes a temporary directory that a killed one left.

    Attributes:
        nbytes: total size of the weights to write, which may differ from that of the source (padding, dtype).
    """

    path: Path
    nbytes: int

    def native(self, name: str) -> str:
        """Return the name of a tensor in this format, for messages."""
        ...

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor. Each canonical name must be written exactly once, in any order; else CheckpointError."""
        ...

    def close(self) -> None:
        """Complete the checkpoint. Raises CheckpointError when a tensor was not written."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
