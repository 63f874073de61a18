"""Reads and writes safetensors directories (one file, or several with an index) one tensor at a time.

The safetensors library can write a file only from a dictionary with all of its tensors. :class:`ShardWriter` writes the
same format (https://github.com/huggingface/safetensors#format) in place, so that no shard is in memory as a whole.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_advrm.convert.differences import list_names
from nemo_advrm.convert.tensors import TensorSpec
from nemo_advrm.errors import CheckpointError, one_line
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
    """Writes safetensors files of at most ``max_bytes``, with an index if there are several.

    Tensors may be written in any order. A tensor larger than ``max_bytes`` gets a file of its own.
    """

    def __init__(self, specs: dict[str, TensorSpec], max_bytes: int) -> None:
        self.specs = specs
        self._shards = _assign(specs, max_bytes)
        count = len(self._shards)
        self._names = [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        self._place: dict[str, tuple[int, int]] = {}  # name -> (shard, offset in the file)
        self._written: set[str] = set()
        self._files: list[Any] = []

    def open(self, directory: Path) -> None:
        """Create the files with their headers and full sizes."""
        for number, (file_name, names) in enumerate(zip(self._names, self._shards, strict=True)):
            header, offset = {"__metadata__": {"format": "pt"}}, 0
            for name in names:
                spec = self.specs[name]
                end = offset + spec.nbytes
                header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}  # type: ignore[dict-item]
                self._place[name] = number, offset
                offset = end
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            start = 8 + len(text)
            self._place |= {name: (number, start + self._place[name][1]) for name in names}
            file = open(directory / file_name, "w+b")  # noqa: SIM115 (closed by close())
            self._files.append(file)
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(start + offset)
        if len(self._names) > 1:
            weight_map = {name: self._names[shard] for name, (shard, _) in self._place.items()}
            total = sum(spec.nbytes for spec in self.specs.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def write(self, name: str, tensor: Tensor) -> None:
        spec = self.specs[name]
        assert tuple(tensor.shape) == spec.shape and tensor.dtype == spec.dtype, (name, tensor.shape, tensor.dtype)
        shard, offset = self._place[name]
        file = self._files[shard]
        file.seek(offset)
        file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        self._written.add(name)

    def close(self) -> None:
        """Flush to the disk; the tensors that were written must be all of them."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        self.abandon()
        assert self._written == self.specs.keys(), self.specs.keys() - self._written

    def abandon(self) -> None:
        for file in self._files:
            file.close()


def _assign(specs: dict[str, TensorSpec], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    return shards


def parse_size(text: str) -> int:
    """Parse "5GB", "500MB" or a number of bytes. Raises ValueError."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    unit = text[-2:].upper()
    size = float(text[:-2]) * units[unit] if unit in units else float(text)
    if not size >= 1:
        raise ValueError(text)
    return int(size)
