"""Reads ``.metadata`` of ``torch_dist`` weights, a pickle of torch.distributed.checkpoint, without running its code.

Every class in it becomes an inert record. The records that describe where tensors are stored are then validated and
rebuilt; a pickle with any other class is refused. The described sizes are compared with the files before memory is
allocated. ``torch.load(weights_only=True)`` is no alternative: it refuses these classes unless they are allowed, and
then builds them unchecked.
"""

from __future__ import annotations

import io
import pickle
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from nemo_advrm.errors import CheckpointError, one_line

NAME = ".metadata"
# a model saved by thousands of ranks has tens of MB
MAX_BYTES = 512 << 20
# packages whose classes the pickle may name; they are never imported
_KNOWN = ("torch.distributed.", "megatron.core.dist_checkpointing.", "pathlib")


class _Record:
    """Replaces an object of any class: keeps the constructor arguments and state, and does nothing."""

    kind = ""
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Size(tuple):
    """Replaces torch.Size."""


class _Inert(pickle._Unpickler):  # not the C unpickler, which allocates a memo of any size that the file names
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return type("Size", (_Size,), {})
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if f"{module}." == "torch.serialization." or f"{module}.".startswith(_KNOWN):
            return type("Record", (_Record,), {"kind": name})
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint does")


def open_metadata(directory: Path) -> Metadata:
    """Shapes and storage locations of the weights in ``directory``.

    Raises CheckpointError, naming the file, if it is missing, damaged, unsafe or describes more than the files hold.
    """
    path = directory / NAME
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{path}: has {path.stat().st_size} bytes, more than such a file has ({MAX_BYTES})")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: weights could not be read ({error})") from None

    def size_of(name: str) -> int | None:
        file = directory / name
        return file.stat().st_size if file.is_file() else None

    metadata = read_metadata(data, str(path))
    check_positions(metadata, size_of, str(path))
    return metadata


def read_metadata(data: bytes, source: str, renamed: dict[str, str] | None = None) -> Metadata:
    """Shapes and storage locations from the bytes of a ``.metadata`` file.

    Args:
        source: named in errors.
        renamed: old key -> key in the result.

    Raises:
        CheckpointError: damaged, not such a file, or with classes that no checkpoint has.
    """
    names = renamed or {}
    try:
        found = _Inert(io.BytesIO(data)).load()
        fields = _fields(found, "Metadata")
        stored = {names.get(str(key), str(key)): _stored(value) for key, value in fields["state_dict_metadata"].items()}
        places = dict(_place(index, info, names) for index, info in fields["storage_data"].items())
    except Exception as error:  # damaged bytes make the unpickler raise almost anything
        reason = one_line(error) if isinstance(error, OSError) else " ".join(str(error).split())[:200]
        raise CheckpointError(f"{source}: the weights cannot be trusted or are damaged: {NAME}: {reason}") from None
    return Metadata(stored, storage_data=places)


def check_positions(metadata: Metadata, size_of: Callable[[str], int | None], source: str) -> None:
    """Compare the described storage locations with the files.

    Args:
        size_of: size of the file with a name in bytes, None if there is none.
        source: named in errors.

    Raises:
        CheckpointError: a location outside its file or the directory, bytes that are described more than once, or a
            tensor that is larger than its stored bytes.
    """
    sizes: dict[str, int] = {}
    held: defaultdict[str, int] = defaultdict(int)
    for index, place in (metadata.storage_data or {}).items():
        name = place.relative_path
        if name not in sizes:
            # otherwise the metadata could make us read any file of the machine
            if Path(name).name != name:
                raise CheckpointError(f"{source}: names a file outside its directory ({name!r})")
            size = size_of(name)
            if size is None:
                raise CheckpointError(f"{source}: names the file {name}, which is not there")
            sizes[name] = size
        if place.offset < 0 or place.length < 0 or place.offset + place.length > sizes[name]:
            raise CheckpointError(
                f"{source}: {index.fqn} should be at bytes {place.offset} to {place.offset + place.length} of {name}, "
                f"which has {sizes[name]}"
            )
        held[index.fqn] += place.length
    if sum(held.values()) > sum(sizes.values()):
        raise CheckpointError(f"{source}: describes more bytes than its files have ({sum(sizes.values())})")
    for key, stored in metadata.state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata):
            claimed = stored.properties.dtype.itemsize
            for length in stored.size:
                claimed *= length
            if claimed > held[key]:
                raise CheckpointError(
                    f"{source}: {key} of the shape {list(stored.size)} would have {claimed} bytes, but {held[key]} "
                    "are stored"
                )


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, _Record) and value.kind == kind


def _fields(value: Any, kind: str) -> dict[str, Any]:
    if not _is(value, kind) or not isinstance(value.state, dict):
        raise ValueError(f"{kind} was expected")
    return value.state


def _size(value: Any) -> torch.Size:
    if not isinstance(value, _Size) or not all(type(n) is int and 0 <= n < 1 << 62 for n in value):
        raise ValueError("a shape was expected")
    return torch.Size(value)


def _stored(value: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if _is(value, "BytesStorageMetadata"):
        return BytesStorageMetadata()
    fields = _fields(value, "TensorStorageMetadata")
    if not _is(fields["properties"], "TensorProperties") or not isinstance(fields["properties"].state, tuple):
        raise ValueError("TensorProperties was expected")
    dtype = fields["properties"].state[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError("a number format was expected")
    chunks = [_fields(chunk, "ChunkStorageMetadata") for chunk in fields["chunks"]]
    return TensorStorageMetadata(
        TensorProperties(dtype=dtype),
        _size(fields["size"]),
        [ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"])) for chunk in chunks],
    )


def _place(index: Any, info: Any, names: dict[str, str]) -> tuple[MetadataIndex, _StorageInfo]:
    key, where = _fields(index, "MetadataIndex"), _fields(info, "_StorageInfo")
    if where.get("transform_descriptors"):
        raise ValueError("the data is transformed, which is not supported")
    path, offset, length = where["relative_path"], where["offset"], where["length"]
    if not (isinstance(path, str) and type(offset) is int and type(length) is int):
        raise ValueError("a place is not a path with an offset and a length")
    number = key.get("index")
    if number is not None and type(number) is not int:
        raise ValueError("the number of a chunk is not a number")
    position = None if key.get("offset") is None else _size(key["offset"])
    name = str(key["fqn"])
    return MetadataIndex(names.get(name, name), position, number), _StorageInfo(path, offset, length)
