"""The Open Inference Protocol's tensors: JSON, and the binary extension that tritonclient speaks.

A request body is JSON, or JSON followed by the raw bytes of some tensors, little endian; then the header
Inference-Header-Content-Length says how long the JSON is. Answers are made the same way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from mra_export.errors import ContractError

INTEGERS = {
    **{f"INT{bits}": np.dtype(f"<i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"UINT{bits}": np.dtype(f"<u{bits // 8}") for bits in (8, 16, 32, 64)},
    "BOOL": np.dtype(np.bool_),
}
"""What input_ids, attention_mask and token_type_ids may come as."""
DATATYPES = {"float16": "FP16", "float32": "FP32", "float64": "FP64", "int32": "INT32", "int64": "INT64", "bool": "BOOL"}
"""numpy's name -> the protocol's, of outputs."""


class MalformedError(ValueError):
    """The body is not JSON at all."""


@dataclass(frozen=True)
class InferRequest:
    """arrays: by input. outputs: name -> whether it is wanted as bytes; empty: all of them, as `binary` says."""

    id: str | None
    arrays: dict[str, npt.NDArray[Any]]
    outputs: dict[str, bool]
    binary: bool


def read_json(body: bytes) -> Any:
    """Raises MalformedError."""
    try:
        return orjson.loads(body)
    except ValueError as error:
        raise MalformedError(f"the body is not valid JSON: {error}") from error


def read_infer(body: bytes, header_length: str | None) -> InferRequest:
    """header_length: the header Inference-Header-Content-Length. Raises MalformedError, ContractError naming what does not fit."""
    size = len(body)
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdigit() and len(header_length) < 20 and int(header_length) <= size):
            raise ContractError(
                f"Inference-Header-Content-Length is {header_length!r}: pass the number of bytes of JSON at the start of the body "
                f"({size} bytes)"
            )
        size = int(header_length)
    request = _object(read_json(body[:size]), "the body")
    inputs = request.get("inputs")
    if not isinstance(inputs, list) or not inputs:
        raise ContractError('the request has no list "inputs": pass one with name, shape, datatype and data for each input')
    raw, arrays = memoryview(body)[size:], {}
    for tensor in inputs:
        name, array, raw = _read_tensor(_object(tensor, "each of inputs"), raw)
        if name in arrays:
            raise ContractError(f"{name} is there twice: pass each input once")
        arrays[name] = array
    if len(raw):
        raise ContractError(f"{len(raw)} bytes are left after the last tensor: check binary_data_size and the header's length")
    outputs = {}
    for wanted in request.get("outputs") or []:
        name, parameters = _name(_object(wanted, "each of outputs")), _parameters(wanted)
        if "classification" in parameters or "shared_memory_region" in parameters:
            raise ContractError(
                f"{name}: classification and shared memory are not served: ask for the output as JSON or binary data"
            )
        outputs[name] = bool(parameters.get("binary_data", False))
    identity = request.get("id")
    if identity is not None and not isinstance(identity, str):
        raise ContractError(f"id is {identity!r}: pass a string")
    return InferRequest(identity, arrays, outputs, bool(_parameters(request).get("binary_data_output", False)))


def write_infer(
    model: str, version: str, request: InferRequest, outputs: Mapping[str, npt.NDArray[Any]]
) -> tuple[bytes, int | None]:
    """The body, and how long its JSON is where bytes follow it, else None. Raises ContractError for an output that is not there."""
    for name in request.outputs:
        if name not in outputs:
            raise ContractError(f"{name} is not an output of this model: ask for {', '.join(outputs)}")
    tensors: list[dict[str, Any]] = []
    raw: list[bytes] = []
    for name, binary in (request.outputs or dict.fromkeys(outputs, request.binary)).items():
        value = np.ascontiguousarray(outputs[name])
        tensor: dict[str, Any] = {"name": name, "datatype": DATATYPES[value.dtype.name], "shape": list(value.shape)}
        if binary:
            raw.append(value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes())
            tensor["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            tensor["data"] = value.astype(np.float32).ravel() if value.dtype == np.float16 else value.ravel()
        tensors.append(tensor)
    answer: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": tensors}
    if request.id is not None:
        answer["id"] = request.id
    header = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    return b"".join([header, *raw]), len(header) if raw else None


def _read_tensor(tensor: dict[str, Any], raw: memoryview) -> tuple[str, npt.NDArray[Any], memoryview]:
    """One of inputs -> its name, its array, and what is left of the bytes."""
    name, shape, datatype = _name(tensor), tensor.get("shape"), tensor.get("datatype")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > 8:
        raise ContractError(f"{name} has shape {shape!r}: pass a list of numbers, such as [1, 128]")
    if datatype not in INTEGERS:
        raise ContractError(f"{name} has datatype {datatype!r}: pass INT64")
    parameters = _parameters(tensor)
    if "shared_memory_region" in parameters:
        raise ContractError(f"{name} is in shared memory, which this server does not read: send its data")
    count = math.prod(shape)
    size = parameters.get("binary_data_size")
    if size is None:
        return name, _from_json(name, tensor, shape, count, datatype), raw
    dtype = INTEGERS[datatype]
    if type(size) is not int or size != count * dtype.itemsize:
        raise ContractError(
            f"{name} has binary_data_size {size!r}, {datatype} of shape {shape} takes {count * dtype.itemsize} bytes"
        )
    if size > len(raw):
        raise ContractError(
            f"{name} has binary_data_size {size}, but {len(raw)} bytes of data are left in the body: send all of them"
        )
    return name, np.frombuffer(raw[:size], dtype).reshape(shape), raw[size:]


def _from_json(name: str, tensor: dict[str, Any], shape: list[int], count: int, datatype: str) -> npt.NDArray[Any]:
    data = tensor.get("data")
    if not isinstance(data, list):
        raise ContractError(f'{name} has no list "data": pass its values, or binary_data_size and the bytes after the JSON')
    try:
        array = np.asarray(data, dtype=None if data else np.int64)
    except (ValueError, OverflowError) as error:
        raise ContractError(f"{name} has data of different depths or lengths: pass {count} numbers") from error
    if array.size != count:
        raise ContractError(f"{name} has {array.size} values, its shape {shape} takes {count}: pass as many")
    if count and array.dtype.kind not in ("b" if datatype == "BOOL" else "iu"):
        wanted = "true or false" if datatype == "BOOL" else "integers"
        raise ContractError(f"{name} has datatype {datatype} and data that is something else: pass {wanted}")
    return array.reshape(shape)


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ContractError(f"{what} is a JSON {type(value).__name__}: pass an object")
    return value


def _name(tensor: dict[str, Any]) -> str:
    name = tensor.get("name")
    if not isinstance(name, str):
        raise ContractError(f'an input or output has the name {name!r}: pass a string as "name"')
    return name


def _parameters(value: dict[str, Any]) -> dict[str, Any]:
    return _object(value.get("parameters") or {}, '"parameters"')
