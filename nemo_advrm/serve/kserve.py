"""The KServe v2 inference protocol, as Triton and NeMo-Aligner's reward model server speak it.

In: ``sentences`` BYTES [B, 1], or ``tokens`` INT64 [B, S] with ``sequence_lengths`` INT64 [B, 1]. Out: ``rewards``
FP32 [B, 1]. Tensors are JSON or binary. Source: github.com/kserve/open-inference-protocol, and Triton's extension for
binary tensor data. ``tritonserver`` itself was rejected: it needs a second process with an older NumPy, and asks
for no token.
"""

from __future__ import annotations

import json
import math
import struct
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from nemo_advrm.serve.errors import BadRequest
from nemo_advrm.serve.limits import RequestLimits, parse_json
from nemo_advrm.serve.samples import Sample
from nemo_advrm.serve.schemas import first_error

HEADER_LENGTH = "Inference-Header-Content-Length"
INPUTS = {"sentences": "BYTES", "tokens": "INT64", "sequence_lengths": "INT64", "add_EOS": "BOOL"}
OUTPUT = "rewards"
_TRITON_TYPES = {"BYTES": "TYPE_STRING", "INT64": "TYPE_INT64", "BOOL": "TYPE_BOOL"}
_DTYPES = {"BYTES": np.dtype(object), "INT64": np.dtype("<i8"), "BOOL": np.dtype("?")}  # strings are Python's
_FAIL_FAST = Field(fail_fast=True)  # a million wrong elements are one error
_JSON_DATA: dict[str, TypeAdapter[list[Any]]] = {
    "BYTES": TypeAdapter(Annotated[list[Annotated[str, Field(strict=True)]], _FAIL_FAST]),
    "INT64": TypeAdapter(Annotated[list[Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]], _FAIL_FAST]),
    "BOOL": TypeAdapter(Annotated[list[Annotated[bool, Field(strict=True)]], _FAIL_FAST]),
}


class _Part(BaseModel):
    """A part of a request; clients may send further keys."""

    model_config = ConfigDict(strict=True)


class Parameters(_Part):
    binary_data_size: int | None = Field(None, ge=0)  # of an input
    binary_data: bool = False  # of an output
    binary_data_output: bool = False  # of the request: of all its outputs


class InputTensor(_Part):
    name: Literal["sentences", "tokens", "sequence_lengths", "add_EOS"]
    datatype: str
    shape: list[Annotated[int, Field(ge=1, lt=2**31)]] = Field(min_length=1, max_length=2)
    data: list[Any] | None = None
    parameters: Parameters | None = None

    @property
    def binary_size(self) -> int | None:
        return None if self.parameters is None else self.parameters.binary_data_size


class OutputRequest(_Part):
    name: Literal["rewards"]
    parameters: Parameters | None = None


class InferRequest(_Part):
    id: str = ""
    inputs: list[InputTensor] = Field(min_length=1, max_length=len(INPUTS), fail_fast=True)
    outputs: list[OutputRequest] | None = Field(None, max_length=1, fail_fast=True)
    parameters: Parameters | None = None

    @property
    def wants_binary(self) -> bool:
        if self.outputs:
            output = self.outputs[0].parameters
            return output is not None and output.binary_data
        return self.parameters is not None and self.parameters.binary_data_output


def read_request(body: bytes, head_length: int | None, limits: RequestLimits) -> tuple[InferRequest, list[Sample]]:
    """Parse a request whose first ``head_length`` bytes are JSON and the rest binary tensors (None: all is JSON).

    Takes time and memory linear in the size of the body. Raises BadRequest that names the tensor, and TooLarge.
    """
    if head_length is not None and head_length > len(body):
        raise BadRequest(f"{HEADER_LENGTH}={head_length}, but the body has {len(body)} bytes")
    try:
        request = InferRequest.model_validate(parse_json(body[:head_length], limits))
    except ValidationError as error:
        raise BadRequest(first_error(error.errors(include_url=False, include_input=False))) from None
    rest = memoryview(b"" if head_length is None else body)[head_length or 0 :]
    tensors: dict[str, np.ndarray] = {}
    for tensor in request.inputs:
        name = f"input {tensor.name}"
        if tensor.name in tensors:
            raise BadRequest(f"{name} is given twice")
        datatype = INPUTS[tensor.name]
        if tensor.datatype != datatype:
            raise BadRequest(f"{name} has the datatype {tensor.datatype!r}, must be {datatype}")
        if datatype == "BYTES" and tensor.shape[1:] not in ([], [1]):
            raise BadRequest(f"{name}: the shape is {tensor.shape}, must be [B, 1]")
        limits.check_samples(tensor.shape[0])  # before any of them is read
        size = tensor.binary_size
        if size is None:
            values: Any = _from_json(name, datatype, tensor)
        elif size > len(rest):
            raise BadRequest(f"{name}: binary_data_size={size}, but {len(rest)} bytes are left")
        else:
            values, rest = _from_binary(name, datatype, tensor.shape, rest[:size]), rest[size:]
        tensors[tensor.name] = np.asarray(values, _DTYPES[datatype]).reshape(tensor.shape)
    if rest:
        raise BadRequest(f"{len(rest)} bytes belong to no input")
    return request, _samples(tensors)


def _from_json(name: str, datatype: str, tensor: InputTensor) -> list[Any]:
    data = tensor.data
    if data is None:
        raise BadRequest(f"{name} has neither data nor binary_data_size")
    if all(isinstance(row, list) for row in data):  # the protocol allows nested and flat data
        data = [element for row in data for element in row]
    _check_count(name, tensor.shape, len(data))
    try:
        return _JSON_DATA[datatype].validate_python(data)
    except ValidationError as error:
        message = first_error(error.errors(include_url=False, include_input=False))
        raise BadRequest(f"{name}: the data are not {datatype}: {message}") from None


def _from_binary(name: str, datatype: str, shape: list[int], raw: memoryview) -> np.ndarray | list[str]:
    if datatype != "BYTES":
        dtype = _DTYPES[datatype]
        if len(raw) % dtype.itemsize:
            raise BadRequest(f"{name}: {len(raw)} bytes are not a whole number of {datatype}")
        _check_count(name, shape, len(raw) // dtype.itemsize)
        return np.frombuffer(raw, dtype)
    # each string follows its length: UINT32, little-endian
    count, start, texts = math.prod(shape), 0, []
    for index in range(count):
        end = start + 4
        if end <= len(raw):
            end += struct.unpack_from("<I", raw, start)[0]
        if end > len(raw):
            raise BadRequest(f"{name}: string {index} is cut off")
        try:
            texts.append(str(raw[start + 4 : end], "utf-8"))
        except UnicodeDecodeError as error:
            raise BadRequest(f"{name}: string {index} is not UTF-8 ({error.reason})") from None
        start = end
    if start < len(raw):
        raise BadRequest(f"{name}: {len(raw) - start} bytes are left after {count} strings")
    return texts


def _check_count(name: str, shape: list[int], count: int) -> None:
    if math.prod(shape) != count:
        raise BadRequest(f"{name}: the shape {shape} does not hold {count} elements")


def _samples(tensors: dict[str, np.ndarray]) -> list[Sample]:
    sentences, tokens, lengths = (tensors.get(name) for name in ("sentences", "tokens", "sequence_lengths"))
    if (sentences is None) == (tokens is None):
        raise BadRequest("either sentences or tokens must be given")
    if sentences is not None:
        return [Sample("text", response=text) for text in sentences.flat]
    assert tokens is not None
    if tokens.ndim != 2:
        raise BadRequest("input tokens: the shape is not [B, S]")
    rows, width = tokens.shape
    if lengths is None or lengths.size != rows:
        raise BadRequest("input sequence_lengths [B, 1] must go with tokens [B, S]")
    if lengths.min() < 1 or lengths.max() > width:
        raise BadRequest(f"input sequence_lengths: lengths must be from 1 to {width}")
    return [
        Sample("tokens", tokens=tuple(row[:length].tolist())) for row, length in zip(tokens, lengths.flat, strict=True)
    ]


def write_response(model: str, request: InferRequest, rewards: list[float]) -> tuple[bytes, dict[str, str]]:
    """(body, headers) with ``rewards`` FP32 [B, 1]."""
    values = np.asarray(rewards, dtype="<f4")
    output: dict[str, Any] = {"name": OUTPUT, "datatype": "FP32", "shape": [len(rewards), 1]}
    response: dict[str, Any] = {"model_name": model, "model_version": "1", "outputs": [output]}
    if request.id:
        response["id"] = request.id
    if not request.wants_binary:
        output["data"] = values.tolist()
        return json.dumps(response).encode(), {"Content-Type": "application/json"}
    output["parameters"] = {"binary_data_size": values.nbytes}
    head = json.dumps(response).encode()
    return head + values.tobytes(), {HEADER_LENGTH: str(len(head)), "Content-Type": "application/octet-stream"}


def metadata(model: str) -> dict[str, Any]:
    """Response to ``/v2/models/NAME``."""
    return {
        "name": model,
        "versions": ["1"],
        "platform": "nemo_advrm",
        "inputs": [{"name": n, "datatype": t, "shape": [-1, 1 if n == "add_EOS" else -1]} for n, t in INPUTS.items()],
        "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": [-1, 1]}],
    }


def configuration(model: str, max_samples: int) -> dict[str, Any]:
    """Response to ``/v2/models/NAME/config``, which PyTriton's client reads before its first request."""
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
