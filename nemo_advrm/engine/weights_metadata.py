"""Reads the table of contents of ``torch_dist`` weights, which is a pickle, without running anything it names.

``.metadata`` is written by torch.distributed.checkpoint. Whatever class it names becomes an inert record here; the
few records that say where tensors lie are then checked and rebuilt. A pickle that names anything else is refused.
What the table claims is compared with the files before anybody takes memory for it.
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
# of a model on thousands of ranks it has tens of MB
MAX_BYTES = 512 << 20
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


class _Inert(pickle._Unpickler):  # not the one in C, which takes memory for any number that a file gives its memo
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return type("Size", (_Size,), {})
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if f"{module}." == "torch.serialization." or f"{module}.".startswith(_KNOWN):
            return type("Record", (_Record,), {"kind": name})
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint does")


def open_metadata(directory: Path) -> Metadata:
    """What the weights in ``directory`` are and where they lie.

    Raises CheckpointError that names the file: missing, damaged, not to be trusted, or describing more than there is.
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
    check_places(metadata, size_of, str(path))
    return metadata


def read_metadata(data: bytes, source: str, renamed: dict[str, str] | None = None) -> Metadata:
    """Where each tensor of a checkpoint lies, from the bytes of its ``.metadata``.

    Args:
        source: named in errors.
        renamed: keys that the result shall hold under another name.

    Raises:
        CheckpointError: damaged, not such a table, or one that names what no checkpoint does.
    """
    names = renamed or {}
    try:
        found = _Inert(io.BytesIO(data)).load()
        fields = _fields(found, "Metadata")
        stored = {names.get(str(key), str(key)): _stored(value) for key, value in fields["state_dict_metadata"].items()}
        places = dict(_place(index, info, names) for index, info in fields["storage_data"].items())
    except Exception as error:  # damaged bytes make the unpickler raise almost anything
        reason = one_line(error) if isinstance(error, OSError) else " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{source}: the weights cannot be trusted or are damaged: {NAME}: {reason}"
        ) from None
    return Metadata(stored, storage_data=places)


def check_places(metadata: Metadata, size_of: Callable[[str], int | None], source: str) -> None:
    """Compare what a table of contents claims with the files.

    Args:
        size_of: bytes of the file of a name, None where there is none.
        source: named in errors.

    Raises:
        CheckpointError: a place outside its file or its directory, files that are counted twice, or a tensor that is
            larger than what is stored of it.
    """
    sizes: dict[str, int] = {}
    held: defaultdict[str, int] = defaultdict(int)
    for index, place in (metadata.storage_data or {}).items():
        name = place.relative_path
        if name not in sizes:
            # a table could else have any file of the machine read
            if Path(name).name != name:
                raise CheckpointError(f"{source}: names a file outside its directory ({name!r})")
            size = size_of(name)
            if size is None:
                raise CheckpointError(f"{source}: names the file {name}, which is not there")
            sizes[name] = size
        if place.offset < 0 or place.length < 0 or place.offset + place.length > sizes[name]:
            raise CheckpointError(
                f"{source}: {index.fqn} should lie at bytes {place.offset} to {place.offset + place.length} of {name}, "
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
