"""Reads and writes safetensors directories (one file, or several with an index) one tensor at a time.

The safetensors library can write a file only from a dictionary with all of its tensors. :class:`ShardWriter` writes the
same format (https://github.com/huggingface/safetensors#format) in place, so that no shard is in memory as a whole.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_advrm.convert.tensor_names import TensorSpec
from nemo_advrm.errors import CheckpointError, list_names, one_line
from nemo_advrm.untrusted_files import read_json_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# all formats, including those of buffers and quantised weights
ANY_FORMAT = DTYPES | {
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsDirectory:
    """The tensors of a Hugging Face directory by their Hugging Face names.

    Raises CheckpointError when there are none, a file is missing, truncated or damaged, the index differs from the
    files, or a tensor has a data type that is not in ``formats`` (fp32, bf16 and fp16, or ``ANY_FORMAT``).
    """

    def __init__(self, directory: Path, formats: dict[str, torch.dtype] = DTYPES) -> None:
        self.directory = directory
        self._file_of: dict[str, str] = {}
        self.specs: dict[str, TensorSpec] = {}
        index = _read_index(directory)
        files = sorted(set(index.values())) if index else [SINGLE]
        for file in files:
            specs = _read_header(directory / file, formats)
            if index:
                _compare_with_index(directory, file, set(specs), {name for name, at in index.items() if at == file})
            self._file_of |= dict.fromkeys(specs, file)
            self.specs |= specs

    def read(self, name: str) -> Tensor:
        """Read one tensor; the file is opened for each tensor, so that pages do not stay mapped."""
        path = self.directory / self._file_of[name]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {name} could not be read ({error})") from None


def indexed_files(directory: Path) -> set[str]:
    """Return the files that the index of a directory names."""
    return set(_read_index(directory).values())


def _read_index(directory: Path) -> dict[str, str]:
    """Return the file of each tensor of a sharded checkpoint; {} for a single file. Raises CheckpointError."""
    path = directory / INDEX
    if not path.exists():
        if not (directory / SINGLE).exists():
            pickled = sorted(p.name for p in (*directory.glob("*.bin"), *directory.glob("*.pt")))
            hint = (
                f" ({pickled[0]} is a pickle, which is not loaded: save the model again with save_pretrained, "
                "which writes safetensors)"
                if pickled
                else ""
            )
            raise CheckpointError(f"{directory}: there is neither {SINGLE} nor {INDEX}{hint}")
        return {}
    index = read_json_object(path).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(v, str) for v in index.values()):
        raise CheckpointError(
            f"{path}: not an index of safetensors files (weight_map must map each tensor to its file)"
        )
    there = {file.name for file in directory.iterdir() if file.is_file()}
    for file in sorted(set(index.values())):
        if Path(file).name != file:
            raise CheckpointError(f"{path}: names a file outside its directory ({one_line(repr(file), 80)})")
        if file not in there:
            raise CheckpointError(f"{path}: names the file {one_line(file, 80)}, which does not exist")
    return index


def _read_header(path: Path, formats: dict[str, torch.dtype]) -> dict[str, TensorSpec]:
    try:
        with safe_open(path, framework="pt") as file:  # checks the header and the length of the file
            specs = {}
            for name in file.keys():  # noqa: SIM118 (no mapping)
                part = file.get_slice(name)
                dtype = formats.get(part.get_dtype())
                if dtype is None:
                    known = ", ".join(formats)
                    raise CheckpointError(f"{path}: {name} has the data type {part.get_dtype()}; supported: {known}")
                specs[name] = TensorSpec(tuple(part.get_shape()), dtype)
            return specs
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a complete safetensors file ({error})") from None


def _compare_with_index(directory: Path, file: str, there: set[str], indexed: set[str]) -> None:
    missing, extra = sorted(indexed - there), sorted(there - indexed)
    if missing or extra:
        raise CheckpointError(
            f"{directory / INDEX}: differs from {file}: {list_names('only the index has', missing)}"
            f"{'; ' if missing and extra else ''}{list_names('only the file has', extra)}"
        )


class ShardWriter:
    """Writes safetensors files of at most ``max_size``, with an index if there are several.

    Tensors may be written in any order. A tensor larger than ``max_size`` gets a file of its own.

    Args:
        max_size: bytes, or a text such as "5GB"; ValueError or OverflowError for another text.
    """

    def __init__(self, specs: dict[str, TensorSpec], max_size: int | str) -> None:
        self.specs = specs
        shapes = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs.items()}
        self._split = split_torch_state_dict_into_shards(shapes, max_shard_size=max_size)
        self._place: dict[str, tuple[BinaryIO, int]] = {}  # name -> (file, offset in it)
        self._left = set(specs)
        self._files: list[BinaryIO] = []

    def open(self, directory: Path) -> None:
        """Create the files with their headers and full sizes."""
        for file_name, names in self._split.filename_to_tensors.items():
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            end = 0
            for name in names:
                spec, offset = self.specs[name], end
                end += spec.nbytes
                header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            start = 8 + len(text)
            file = open(directory / file_name, "w+b")  # noqa: SIM115 (closed by abandon())
            self._files.append(file)
            self._place |= {name: (file, start + header[name]["data_offsets"][0]) for name in names}
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(start + end)
        if self._split.is_sharded:
            index = {"metadata": self._split.metadata, "weight_map": self._split.tensor_to_filename}
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def write(self, name: str, tensor: Tensor) -> None:
        spec = self.specs[name]
        assert tuple(tensor.shape) == spec.shape and tensor.dtype == spec.dtype, (name, tensor.shape, tensor.dtype)
        file, offset = self._place[name]
        file.seek(offset)
        file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        self._left.discard(name)

    def close(self) -> None:
        """Flush to the disk; the tensors that were written must be all of them."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        self.abandon()
        assert not self._left, self._left

    def abandon(self) -> None:
        for file in self._files:
            file.close()
