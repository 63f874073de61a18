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
    decoder.layers.3.pre_mlp_layernorm.weight              with experts: the norm before the MLP, and in place of it
    decoder.layers.3.mlp.router.weight                     [experts, hidden]
    decoder.layers.3.mlp.experts.experts.linear_fc1.weight         [experts, gate and up stacked, hidden]
    decoder.layers.3.mlp.experts.experts.linear_fc2.weight         [experts, hidden, ffn]
    decoder.layers.3.post_mlp_layernorm.weight
    decoder.final_layernorm.weight
    output_layer.weight                                    [vocabulary, hidden], absent when tied and in RMs
    head.weight, head.bias                                 [outputs, hidden], [outputs]

Rows of ``linear_qkv`` are ordered by group; each group has its queries, its key and its value.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.convert.partial import PartialDirectory
from nemo_advrm.convert.tensor_names import VOCABULARY_ROWS, TensorSpec
from nemo_advrm.convert.transforms import pad_vocabulary
from nemo_advrm.data.reading import ReadingRule
from nemo_advrm.engine.dimensions import Head
from nemo_advrm.errors import CheckpointError, list_names
from nemo_advrm.files import atomic_replace


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


class TensorSource(ABC):
    """Reads a checkpoint: names and shapes on opening, each tensor on request.

    Opening raises CheckpointError for a missing, damaged or unsupported checkpoint.

    Attributes:
        specs: the spec of every tensor by canonical name, in the order of the forward pass.
    """

    path: Path
    description: Description
    specs: dict[str, TensorSpec]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Read one tensor to the CPU, with the shape and dtype of its spec."""

    @abstractmethod
    def native(self, name: str) -> str:
        """Return the name of a tensor in this format, for messages."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:  # noqa: B027 (most formats open a file only while a tensor is read)
        """Close open files."""


class TensorSink(ABC):
    """Writes a checkpoint as ``NAME.partial``, which gets its final name when all tensors are written.

    The constructor checks everything and writes nothing. Leaving the context with an exception removes what was
    written. The next conversion removes what a killed one left.

    Args:
        names: canonical names of all tensors; each must be written exactly once, in any order.
        rows: number of rows to which tensors with one row per vocabulary entry are padded.
        nbytes: total size of the weights to write, which may differ from that of the source (padding, dtype).
    """

    def __init__(self, path: Path, names: Iterable[str], rows: int, nbytes: int) -> None:
        self.path, self.nbytes = path, nbytes
        self._rows, self._left = rows, set(names)
        self._directory = PartialDirectory(path, nbytes)

    @abstractmethod
    def native(self, name: str) -> str:
        """Return the name of a tensor in this format, for messages."""

    @abstractmethod
    def _open(self, partial: Path) -> None:
        """Create the files of the weights in the empty directory ``partial``."""

    @abstractmethod
    def _put(self, name: str, tensor: Tensor) -> None:
        """Write one (padded) tensor."""

    @abstractmethod
    def _complete(self, partial: Path) -> Path:
        """Write the rest; return the directory or file that becomes ``path``."""

    def _close(self) -> None:  # noqa: B027 (most formats have no open files)
        """Close open files; called once at the end, also after an error."""

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; raises CheckpointError when it is unknown or was written before."""
        if name not in self._left:
            raise CheckpointError(f"{self.path}: {name} is unexpected or was written twice")
        self._left.remove(name)
        self._put(name, pad_vocabulary(tensor, self._rows) if name in VOCABULARY_ROWS else tensor)

    def __enter__(self) -> Self:
        try:
            self._open(self._directory.make())
        except BaseException as error:
            self.__exit__(type(error))
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                if self._left:
                    missing = list_names("tensors that were not written:", sorted(self._left))
                    raise CheckpointError(f"{self.path}: {missing}")
                atomic_replace(self._complete(self._directory.partial), self.path)
        finally:
            try:
                self._close()
            finally:  # closing an archive writes its end, which fails on a full disk
                self._directory.remove()
