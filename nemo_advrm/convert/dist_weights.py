"""Reads and writes ``torch_dist`` weights of Megatron-Core one layer at a time.

Megatron stacks the layers of one name along dimension 0. The reader extracts one layer from a stacked tensor, whatever
its chunks; the writer stores each layer as one chunk in a file of its own. Both use the file reader and writer of
``torch.distributed.checkpoint`` without process groups. Megatron's own functions are not used because they need the
whole model in memory.
"""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, Metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.convert.tensor_names import (
    VOCABULARY_ROWS,
    TensorSpec,
    canonical_shapes,
    extra_states,
    layer_of,
    stacked_name,
)
from nemo_advrm.convert.tensors import TensorSource
from nemo_advrm.engine.dimensions import Head
from nemo_advrm.engine.safe_readers import WeightsReader, reason
from nemo_advrm.errors import CheckpointError

PREFIX = "model."  # of the keys of a model in a checkpoint
# the content of metadata.json. Megatron's save_config writes the same, but importing Megatron-Core takes longer than
# most conversions
FORMAT_OF_FILES = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_LAYERS = "decoder.layers."
_MOST_LAYERS = 10_000  # a damaged or malicious file may claim any number


class StackedReader:
    """Reads canonical tensors from a ``weights`` directory.

    Args:
        directory: contains ``.metadata`` and the data files.
        metadata: content of ``.metadata`` (:func:`nemo_advrm.engine.weights_metadata.read_metadata`).
        source: name for error messages instead of ``directory``.
        prefix: of the keys of the model.
        only: beginnings of the names to read; () for all.

    Raises CheckpointError for a tensor without dimensions or with more than 10,000 layers.
    """

    def __init__(
        self, directory: Path, metadata: Metadata, source: str = "", prefix: str = PREFIX, only: tuple[str, ...] = ()
    ) -> None:
        self._prefix = prefix
        self._reader = WeightsReader(directory, metadata)
        self._metadata = metadata
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self.specs: dict[str, TensorSpec] = {}
        for key, stored in self._metadata.state_dict_metadata.items():
            if not key.startswith(prefix) or not isinstance(stored, TensorStorageMetadata):
                continue
            name, shape = key.removeprefix(prefix), tuple(stored.size)
            if only and not name.startswith(only):
                continue
            if not shape:
                raise CheckpointError(f"{source or directory}: {key} has no dimensions")
            if not name.startswith(_LAYERS):
                self.specs[name] = TensorSpec(shape, stored.properties.dtype)
                continue
            if not 0 < shape[0] <= _MOST_LAYERS:
                raise CheckpointError(f"{source or directory}: {key} is {list(shape)}, which is not a stack of layers")
            for layer in range(shape[0]):
                one = name.replace(_LAYERS, f"{_LAYERS}{layer}.", 1)
                self.specs[one] = TensorSpec(shape[1:], stored.properties.dtype)

    def read(self, name: str) -> Tensor:
        spec, layer = self.specs[name], layer_of(name)
        key = self._prefix + stacked_name(name)
        stored = self._metadata.state_dict_metadata[key]
        assert isinstance(stored, TensorStorageMetadata)
        offsets, sizes = [0] * len(stored.size), list(stored.size)
        if layer is not None:
            offsets[0], sizes[0] = layer, 1
        target = torch.empty(sizes, dtype=spec.dtype)
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, stored, [wanted])
        if sum(torch.Size(item.lengths).numel() for item in items) != target.numel():
            raise ValueError(f"{name} is not stored completely")
        self._reader.read_data(LoadPlan(items), _CopyIntoTensor(target)).wait()
        return target.reshape(spec.shape)


class Reader(Protocol):
    """Reads canonical tensors."""

    specs: dict[str, TensorSpec]

    def read(self, name: str) -> Tensor: ...


class StackedSource(TensorSource):
    """A source whose weights are read by ``_reader``. Padded rows of the vocabulary are not converted."""

    _reader: Reader
    _renamed: ClassVar[dict[str, str]] = {}  # canonical name -> name in the file

    def read(self, name: str) -> Tensor:
        try:
            tensor = self._reader.read(name)
        except Exception as error:  # torch raises many types for a damaged file
            raise CheckpointError(f"{self.path}: {name} could not be read ({reason(error)})") from None
        return tensor[: self.specs[name].shape[0]] if name in VOCABULARY_ROWS else tensor

    def native(self, name: str) -> str:
        return stored_place(self._renamed.get(name, name))

    def _specs(self, model: ModelConfig, head: Head, outputs: int) -> dict[str, TensorSpec]:
        """Return the specs of the tensors to convert, with a head of ``outputs`` outputs."""
        shapes = canonical_shapes(model, head, model.vocab_size, outputs)
        return {name: TensorSpec(shape, self._reader.specs[name].dtype) for name, shape in shapes.items()}


def stored_place(name: str) -> str:
    """Return the key and, in brackets, the layer of a tensor in a ``weights`` directory."""
    layer = layer_of(name)
    return PREFIX + stacked_name(name) + ("" if layer is None else f"[{layer}]")


class _CopyIntoTensor(DefaultLoadPlanner):
    """Copies the chunks that are read into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self._target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Do nothing: the chunk was read into the target itself."""


class _SingleItemPlanner(DefaultSavePlanner):
    """Passes one tensor, or bytes, to the writer."""

    def __init__(self, data: Tensor | io.BytesIO) -> None:
        super().__init__()
        self._data = data

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        return self._data


class StackedWriter:
    """Writes canonical tensors into an empty ``weights`` directory that Megatron loads at any layout.

    Args:
        num_layers: number of layers of the whole model.
        specs: specs of all tensors to write, with padded shapes.
        sync: call fsync after each file.
    """

    def __init__(self, directory: Path, num_layers: int, specs: dict[str, TensorSpec], sync: bool = True) -> None:
        self._directory = directory
        self._layers = num_layers
        self._specs = specs
        self._writer = FileSystemWriter(directory, sync_files=sync)
        self._writer.set_up_storage_writer(is_coordinator=True)
        self._results: list[WriteResult] = []
        self._numbers = itertools.count()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor into a file of its own. Raises ValueError when its shape differs from its spec."""
        if tuple(tensor.shape) != self._specs[name].shape:
            raise ValueError(f"{name} is {list(tensor.shape)} but should be {list(self._specs[name].shape)}")
        key, chunk, whole = self._place(name)
        data = TensorWriteData(chunk, TensorProperties(dtype=tensor.dtype), whole)
        index = MetadataIndex(key, chunk.offsets, layer_of(name) or 0)
        item = WriteItem(index, WriteItemType.SHARD, tensor_data=data)
        self._put([item], tensor.reshape(chunk.sizes).contiguous())

    def close(self) -> None:
        """Write the (empty) extra states that Megatron expects for its linear layers, and the metadata."""
        empty = io.BytesIO()
        torch.save([None], empty)
        shapes = {name: spec.shape for name, spec in self._specs.items()}
        states = [PREFIX + key for key in extra_states(shapes, self._layers)]
        self._put([WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in states], empty)
        tensors: dict[str, TensorStorageMetadata] = {}
        for name, spec in self._specs.items():
            key, chunk, whole = self._place(name)
            properties = TensorProperties(dtype=spec.dtype)
            tensors.setdefault(key, TensorStorageMetadata(properties, whole, [])).chunks.append(chunk)
        stored = {key: BytesStorageMetadata() for key in states} | tensors
        self._writer.finish(Metadata(stored), [self._results])
        torch.save({}, self._directory / "common.pt")
        (self._directory / "metadata.json").write_text(json.dumps(FORMAT_OF_FILES), encoding="utf-8")

    def _place(self, name: str) -> tuple[str, ChunkStorageMetadata, torch.Size]:
        """Return the key of a tensor, its chunk, and the size of the whole stack of layers."""
        key, shape, layer = PREFIX + stacked_name(name), torch.Size(self._specs[name].shape), layer_of(name)
        start = [0] * len(shape)
        if layer is None:
            return key, ChunkStorageMetadata(torch.Size(start), shape), shape
        chunk = ChunkStorageMetadata(torch.Size((layer, *start)), torch.Size((1, *shape)))
        return key, chunk, torch.Size((self._layers, *shape))

    def _put(self, items: list[WriteItem], data: Tensor | io.BytesIO) -> None:
        plan = SavePlan(items, storage_data=_StoragePrefix(f"__{next(self._numbers)}_"))
        try:
            self._results += self._writer.write_data(plan, _SingleItemPlanner(data)).wait()
        except RuntimeError as error:
            # after a file system error torch's archive writer fails again when it closes the file: raise the first
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise
