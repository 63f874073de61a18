"""Reads the table of contents of ``torch_dist`` weights, which is a pickle, without running anything it names.

``.metadata`` is written by torch.distributed.checkpoint. Whatever class it names becomes an inert record here; the
few records that say where tensors lie are then checked and rebuilt. A pickle that names anything else is refused.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from nemo_advrm.errors import CheckpointError

# packages whose classes such a pickle may name; they are not imported
_KNOWN = ("torch.distributed.", "megatron.core.dist_checkpointing.", "pathlib")


class _Record:
    """Stands for an object of any class: keeps what it was made of and does nothing."""

    kind = ""
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Size(tuple):
    """Stands for torch.Size."""


class _Inert(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return type("Size", (_Size,), {})
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if f"{module}." == "torch.serialization." or f"{module}.".startswith(_KNOWN):
            return type("Record", (_Record,), {"kind": name})
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint does")


def read_metadata(data: bytes, source: str, renamed: dict[str, str] | None = None) -> Metadata:
    """Where each tensor of a checkpoint lies, from the bytes of its ``.metadata``.

    Args:
        source: named in errors.
        renamed: keys that the result shall hold under another name.

    Raises:
        CheckpointError: damaged, not such a table, or one that names what no checkpoint does.
    """
    try:
        found = _Inert(io.BytesIO(data)).load()
        fields = _fields(found, "Metadata")
        tensors = {
            str(key): _tensor(value)
            for key, value in fields["state_dict_metadata"].items()
            if _is(value, "TensorStorageMetadata")
        }
        places = dict(_place(index, info) for index, info in fields["storage_data"].items())
    except Exception as error:  # damaged bytes make the unpickler raise almost anything
        raise CheckpointError(f"{source}: the weights cannot be trusted or are damaged: .metadata: {error}") from None
    names = renamed or {}
    return Metadata(
        {names.get(key, key): value for key, value in tensors.items()},
        storage_data={
            MetadataIndex(names.get(index.fqn, index.fqn), index.offset, index.index): info
            for index, info in places.items()
        },
    )


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, _Record) and value.kind == kind


def _fields(value: Any, kind: str) -> dict[str, Any]:
    if not _is(value, kind) or not isinstance(value.state, dict):
        raise ValueError(f"{kind} was expected")
    return value.state


def _size(value: Any) -> torch.Size:
    if not isinstance(value, _Size) or not all(isinstance(n, int) and n >= 0 for n in value):
        raise ValueError(f"{value!r} is not a shape")
    return torch.Size(value)


def _tensor(value: Any) -> TensorStorageMetadata:
    fields = _fields(value, "TensorStorageMetadata")
    if not _is(fields["properties"], "TensorProperties") or not isinstance(fields["properties"].state, tuple):
        raise ValueError("TensorProperties was expected")
    dtype = fields["properties"].state[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{dtype!r} is not a number format")
    chunks = [_fields(chunk, "ChunkStorageMetadata") for chunk in fields["chunks"]]
    return TensorStorageMetadata(
        TensorProperties(dtype=dtype),
        _size(fields["size"]),
        [ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"])) for chunk in chunks],
    )


def _place(index: Any, info: Any) -> tuple[MetadataIndex, _StorageInfo]:
    key, where = _fields(index, "MetadataIndex"), _fields(info, "_StorageInfo")
    if where.get("transform_descriptors"):
        raise ValueError(f"the data is transformed by {where['transform_descriptors']}, which is not supported")
    path, offset, length = where["relative_path"], where["offset"], where["length"]
    if not (isinstance(path, str) and isinstance(offset, int) and isinstance(length, int)):
        raise ValueError("a place is not a path with an offset and a length")
    position = None if key.get("offset") is None else _size(key["offset"])
    return MetadataIndex(str(key["fqn"]), position, key.get("index")), _StorageInfo(path, offset, length)
