"""Checks the header of a GGUF file against the file before anything is built from it.

The readers of ``gguf`` and transformers allocate as many objects and modules as the header says. ``gguf.GGUFReader``
makes an object for each value before anything can be compared, so that it cannot do this check.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path
from typing import Any, BinaryIO

from nemo_advrm.errors import CheckpointError, one_line

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MIN_TENSOR = 24  # bytes of the shortest tensor description
_MIN_FIELD = 13  # bytes of the shortest field: the length of its name, its type, one byte
_MAX_VALUES = 4_000_000  # of all fields: a vocabulary of 500,000 tokens has about 2,500,000
_MAX_DIMENSIONS = 4
_MAX_NAME = 1 << 16  # bytes
_MAX_KEPT = 10_000  # values of an array that are looked at
# fields that say how many modules are built
_COUNTS = re.compile(r"\.(block_count|expert_count|expert_used_count|leading_dense_block_count)$")
# and how large their tensors are
_SIZES = re.compile(r"\.(embedding_length|(expert_|expert_shared_)?feed_forward_length|vocab_size)$")
_HEADS = re.compile(r"\.attention\.(head_count|head_count_kv|key_length|value_length)$|\.rope\.dimension_count$")


def check_header(path: Path) -> None:
    """Raise CheckpointError, which names the file, for a header that contradicts the file.

    That is: another format, counts and lengths beyond the end of the file, tensors outside the file or overlapping, and
    more or larger layers than the tensors have. Needs the package ``gguf`` for the sizes of number formats.
    """
    try:
        with open(path, "rb") as file:
            _Header(file, path.stat().st_size).check()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged: {one_line(error, 200)}") from None


class _Header:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size, self._at = file, size, 0
        self._values = 0
        self._order = "<"

    def check(self) -> None:
        if self._take(4) != b"GGUF":
            raise ValueError("not a GGUF file")
        version = self._take(4)
        if version[:2] == b"\0\0":
            self._order = ">"
        tensors, fields = self._number("Q"), self._number("Q")
        if tensors * _MIN_TENSOR > self._left() or fields * _MIN_FIELD > self._left():
            raise ValueError(f"claims {tensors} tensors and {fields} fields, the file has {self._size} bytes")
        found: list[tuple[str, list[Any]]] = []
        alignment = 32
        for _ in range(fields):
            name = self._name()
            values = self._value(self._number("I"), name)
            if name == "general.alignment":
                alignment = values[0] if values and type(values[0]) is int else 0
            found.append((name, values))
        if alignment < 1 or alignment & (alignment - 1) or alignment > self._size:
            raise ValueError(f"general.alignment={alignment} is no power of two")
        shapes = self._tensors(tensors, alignment)
        for name, values in found:
            _check_field(name, values, shapes)

    def _tensors(self, count: int, alignment: int) -> list[list[int]]:
        """The shapes; raises ValueError unless the file holds the tensors one after another."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        shapes, extents = [], []
        for _ in range(count):
            name, dimensions = self._name(), self._number("I")
            if dimensions > _MAX_DIMENSIONS:
                raise ValueError(f"{name} has {dimensions} dimensions")
            shape = [self._number("Q") for _ in range(dimensions)]
            block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(self._number("I"))]
            shapes.append(shape)
            extents.append((self._number("Q"), math.prod(shape) * nbytes // block, name))
        start = -(-self._at // alignment) * alignment
        end = 0
        for offset, length, name in sorted(extents):
            if offset < end or start + offset + length > self._size:
                what = "lies in another tensor" if offset < end else f"claims {length} bytes at {start + offset}"
                raise ValueError(f"{name} {what}, the file has {self._size} bytes")
            end = offset + length
        return shapes

    def _value(self, kind: int, name: str) -> list[Any]:
        """The numbers of a field, of an array the first ``_MAX_KEPT``; the others are only counted."""
        length = 1
        if kind == _ARRAY:
            kind, length = self._number("I"), self._number("Q")
        self._values += length
        if self._values > _MAX_VALUES:
            raise ValueError(f"{name}: the header has more than {_MAX_VALUES} values")
        if kind == _STRING:
            for _ in range(length):
                self._skip(self._number("Q"), name)
            return []
        if kind not in _SCALARS:
            raise ValueError(f"{name} has values of the type {kind}, which no model has")
        width, kept = struct.calcsize(_SCALARS[kind]), min(length, _MAX_KEPT)
        if length * width > self._left():
            raise ValueError(f"{name} claims {length} values, the file ends before")
        values = list(struct.unpack(f"{self._order}{kept}{_SCALARS[kind]}", self._take(kept * width)))
        self._skip((length - kept) * width, name)
        return values

    def _name(self) -> str:
        length = self._number("Q")
        if length > _MAX_NAME:
            raise ValueError(f"a name claims {length} bytes")
        return self._take(length).decode("utf-8")

    def _number(self, form: str) -> Any:
        return struct.unpack(self._order + form, self._take(struct.calcsize(form)))[0]

    def _skip(self, length: int, name: str) -> None:
        if length > self._left():
            raise ValueError(f"{name} claims {length} bytes, the file ends before")
        self._file.seek(length, 1)
        self._at += length

    def _take(self, length: int) -> bytes:
        found = self._file.read(length) if length <= self._left() else b""
        if len(found) < length:
            raise ValueError("the file ends in its header")
        self._at += length
        return found

    def _left(self) -> int:
        return self._size - self._at


def _check_field(name: str, values: list[Any], shapes: list[list[int]]) -> None:
    """Raise ValueError for more modules, or larger ones, than the tensors have."""
    if _COUNTS.search(name):
        most, have = len(shapes), f"the file has {len(shapes)} tensors"
    elif _SIZES.search(name) or _HEADS.search(name):
        most = max((size for shape in shapes for size in shape), default=0)
        have = f"the largest dimension of a tensor is {most}"
    else:
        return
    for value in values:
        if not isinstance(value, int) or not 0 <= value <= most:
            raise ValueError(f"{name}={value}, but {have}")
