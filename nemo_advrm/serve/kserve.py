"""The KServe v2 inference protocol as NeMo-Aligner's reward model server speaks it: JSON and the binary extension.

In: ``sentences`` BYTES [B, 1], or ``tokens`` INT64 [B, S] with ``sequence_lengths`` INT64 [B, 1]. Out: ``rewards``
FP32 [B, 1]. Source: github.com/kserve/open-inference-protocol and Triton's extension for binary tensor data.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemo_advrm.serve.bounds import Bounds, check_samples, parse_json
from nemo_advrm.serve.samples import Sample

HEADER_LENGTH = "Inference-Header-Content-Length"
INPUTS = {"sentences": "BYTES", "tokens": "INT64", "sequence_lengths": "INT64", "add_EOS": "BOOL"}
_SIZES = {"INT64": ("<i8", 8), "BOOL": ("|b1", 1)}
_TRITON_TYPES = {"BYTES": "TYPE_STRING", "INT64": "TYPE_INT64", "BOOL": "TYPE_BOOL"}
OUTPUT = "rewards"


class BadTensors(Exception):
    """A request that does not follow the protocol; the message names the tensor."""


@dataclass(frozen=True)
class InferRequest:
    """The samples of a request and how its answer is wanted."""

    samples: list[Sample]
    identifier: str
    binary: bool


def read_request(body: bytes, header_length: int | None, bounds: Bounds) -> InferRequest:
    """Time and memory are linear in the size of the body. Raises BadTensors, Unreadable and TooLarge."""
    head, rest = (body, b"") if header_length is None else (body[:header_length], body[header_length:])
    if header_length is not None and not 0 <= header_length <= len(body):
        raise BadTensors(f"{HEADER_LENGTH}={header_length}, but the body has {len(body)} bytes")
    request = parse_json(head, bounds)
    if not isinstance(request, dict):
        raise BadTensors("the request is not a JSON object")
    tensors = _read_inputs(request.get("inputs"), memoryview(rest), bounds)
    return InferRequest(samples_of(tensors), _identifier(request), _wants_binary(request))


def _identifier(request: dict[str, Any]) -> str:
    identifier = request.get("id", "")
    if not isinstance(identifier, str):
        raise BadTensors("id is not a string")
    return identifier


def _wants_binary(request: dict[str, Any]) -> bool:
    outputs = request.get("outputs") or []
    if not isinstance(outputs, list) or not all(isinstance(o, dict) for o in outputs):
        raise BadTensors("outputs is not a list of objects")
    for output in outputs:
        if output.get("name") != OUTPUT:
            raise BadTensors(f"there is no output {output.get('name')!r}; it is {OUTPUT!r}")
        return bool(_parameters(output).get("binary_data", False))
    return bool(_parameters(request).get("binary_data_output", False))


def _parameters(node: dict[str, Any]) -> dict[str, Any]:
    parameters = node.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise BadTensors("parameters is not an object")
    return parameters


def _read_inputs(inputs: Any, rest: memoryview, bounds: Bounds) -> dict[str, np.ndarray]:
    if not isinstance(inputs, list) or not inputs:
        raise BadTensors("inputs is not a list of tensors")
    tensors: dict[str, np.ndarray] = {}
    for tensor in inputs:
        name = tensor.get("name") if isinstance(tensor, dict) else None
        if not isinstance(name, str) or name not in INPUTS:
            raise BadTensors(f"there is no input {name!r}; inputs: {', '.join(INPUTS)}")
        if name in tensors:
            raise BadTensors(f"input {name} is given twice")
        datatype = INPUTS[name]
        shape = _shape(name, datatype, tensor.get("shape"))
        if tensor.get("datatype") != datatype:
            raise BadTensors(f"input {name} has the datatype {tensor.get('datatype')!r}, {datatype} is wanted")
        check_samples(shape[0], bounds)  # before a single one is read
        size = _parameters(tensor).get("binary_data_size")
        if size is None:
            tensors[name] = _from_json(name, datatype, shape, tensor.get("data"))
            continue
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(rest):
            raise BadTensors(f"input {name}: binary_data_size={size!r}, but {len(rest)} bytes are left")
        tensors[name], rest = _from_binary(name, datatype, shape, rest[:size]), rest[size:]
    if rest:
        raise BadTensors(f"{len(rest)} bytes belong to no input")
    return tensors


def _shape(name: str, datatype: str, shape: Any) -> tuple[int, ...]:
    whole = isinstance(shape, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in shape)
    if not whole or not 1 <= len(shape) <= 2 or not all(1 <= n < 2**31 for n in shape):
        raise BadTensors(f"input {name}: the shape is not [B] or [B, N] with sizes from 1")
    if datatype == "BYTES" and shape[1:] not in ([], [1]):
        raise BadTensors(f"input {name}: the shape is {shape}, [B, 1] is wanted")
    return tuple(shape)


def _from_json(name: str, datatype: str, shape: tuple[int, ...], data: Any) -> np.ndarray:
    if not isinstance(data, list):
        raise BadTensors(f"input {name} has neither data nor binary_data_size")
    flat = [item for row in data for item in row] if all(isinstance(row, list) for row in data) else data
    _check_count(name, shape, len(flat))
    kinds = {"BYTES": str, "INT64": int, "BOOL": bool}
    if any(not isinstance(x, kinds[datatype]) or (datatype == "INT64" and isinstance(x, bool)) for x in flat):
        raise BadTensors(f"input {name}: the data does not consist of {datatype}")
    if datatype == "INT64" and any(not -(2**63) <= x < 2**63 for x in flat):
        raise BadTensors(f"input {name}: a number is larger than INT64")
    array = np.empty(len(flat), dtype=object) if datatype == "BYTES" else np.empty(len(flat), _SIZES[datatype][0])
    array[:] = flat
    return array.reshape(shape)


def _from_binary(name: str, datatype: str, shape: tuple[int, ...], raw: memoryview) -> np.ndarray:
    if datatype != "BYTES":
        dtype, size = _SIZES[datatype]
        if len(raw) % size:
            raise BadTensors(f"input {name}: {len(raw)} bytes are no whole number of {datatype}")
        _check_count(name, shape, len(raw) // size)
        return np.frombuffer(raw, dtype).reshape(shape)
    if len(raw) < 4 * math.prod(shape):  # each has its length before it
        raise BadTensors(f"input {name}: a string is cut off: {len(raw)} bytes are too few for {list(shape)}")
    array = np.empty(math.prod(shape), dtype=object)
    place = 0
    for number in range(array.size):
        length = struct.unpack_from("<I", raw, place)[0] if place + 4 <= len(raw) else len(raw)
        end = place + 4 + length
        if end > len(raw):
            raise BadTensors(f"input {name}: string {number} is cut off")
        try:
            array[number] = str(raw[place + 4 : end], "utf-8")
        except UnicodeDecodeError as error:
            raise BadTensors(f"input {name}: string {number} is not UTF-8 ({error.reason})") from None
        place = end
    if place < len(raw):
        raise BadTensors(f"input {name}: {len(raw) - place} bytes are left after {array.size} strings")
    return array.reshape(shape)


def _check_count(name: str, shape: tuple[int, ...], count: int) -> None:
    if math.prod(shape) != count:
        raise BadTensors(f"input {name}: the shape {list(shape)} does not hold {count} elements")


def samples_of(tensors: dict[str, np.ndarray]) -> list[Sample]:
    """The samples in arrays by input name, strings as Python's. Raises BadTensors."""
    sentences, tokens, lengths = (tensors.get(name) for name in ("sentences", "tokens", "sequence_lengths"))
    if (sentences is None) == (tokens is None):
        raise BadTensors("either sentences or tokens must be given")
    if sentences is not None:
        return [Sample("text", response=text) for text in sentences.flatten()]
    assert tokens is not None
    if tokens.ndim != 2:
        raise BadTensors("input tokens: the shape is not [B, S]")
    if lengths is None or lengths.size != len(tokens):
        raise BadTensors("input sequence_lengths [B, 1] must go with tokens [B, S]")
    if (lengths < 1).any() or (lengths > tokens.shape[1]).any():
        raise BadTensors(f"input sequence_lengths: lengths must be from 1 to {tokens.shape[1]}")
    rows = zip(tokens.tolist(), lengths.flatten().tolist(), strict=True)
    return [Sample("tokens", tokens=tuple(row[:length])) for row, length in rows]


def write_answer(model: str, request: InferRequest, rewards: list[float]) -> tuple[bytes, dict[str, str]]:
    """(body, headers) of the answer: ``rewards`` FP32 [B, 1]."""
    values = np.asarray(rewards, dtype="<f4")
    output: dict[str, Any] = {"name": OUTPUT, "datatype": "FP32", "shape": [len(rewards), 1]}
    answer: dict[str, Any] = {"model_name": model, "model_version": "1", "outputs": [output]}
    if request.identifier:
        answer["id"] = request.identifier
    if not request.binary:
        output["data"] = values.tolist()
        return json.dumps(answer).encode(), {"Content-Type": "application/json"}
    output["parameters"] = {"binary_data_size": values.nbytes}
    head = json.dumps(answer).encode()
    headers = {HEADER_LENGTH: str(len(head)), "Content-Type": "application/octet-stream"}
    return head + values.tobytes(), headers


def metadata(model: str) -> dict[str, Any]:
    """``/v2/models/NAME``."""
    return {
        "name": model,
        "versions": ["1"],
        "platform": "nemo_advrm",
        "inputs": [{"name": n, "datatype": t, "shape": [-1, 1 if n == "add_EOS" else -1]} for n, t in INPUTS.items()],
        "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": [-1, 1]}],
    }


def configuration(model: str, max_samples: int) -> dict[str, Any]:
    """``/v2/models/NAME/config``: what PyTriton's client reads before its first request."""
    return {
        "name": model,
        "backend": "python",
        "max_batch_size": max_samples,
        "input": [
            {"name": n, "data_type": _TRITON_TYPES[t], "dims": [1 if n == "add_EOS" else -1], "optional": True}
            for n, t in INPUTS.items()
        ],
        "output": [{"name": OUTPUT, "data_type": "TYPE_FP32", "dims": [1]}],
        "instance_group": [],
        "parameters": {},
        "model_transaction_policy": {"decoupled": False},
    }
