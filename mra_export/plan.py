"""What can be said about a .plan file without TensorRT: its header, and the manifest's row for it."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mra_export.bundle import Bundle
from mra_export.errors import BundleError, EngineError

Profile = dict[str, dict[str, list[int]]]
"""Input name -> {"min": shape, "opt": shape, "max": shape}."""

_HEADER = struct.Struct("<4s12xQ4B")
"""Magic, ..., bytes of the whole plan, version in four parts. Read off real plans; trtexec looks for the version there, too."""


class Plugin(BaseModel):
    """The plugin that an engine needs. library: its file in the bundle; sha256: of that file when the engine was built."""

    model_config = ConfigDict(extra="forbid")

    name: str
    version: str
    namespace: str
    library: str
    sha256: str
    embedded: bool


class EngineEntry(BaseModel):
    """One row of the manifest's `engines`.

    file: name in the bundle. backend: of tensorrt_api.FLAVOURS. builder: the version that built it, four parts.
    plugin_layers: MraAttention plugin layers in the network, 0 where the function body was built in.
    compute_capabilities: GPUs it runs on, such as ["9.0"]; "8.0+" means 8.0 and later.
    driver: TensorRT: the newest CUDA version that the driver of the building machine runs. Null for TensorRT-RTX.
    options: what differs from the defaults, by EngineOptions' names.
    """

    model_config = ConfigDict(extra="forbid")

    file: str
    backend: str
    builder: str
    dtype: str
    profiles: list[Profile]
    plugin_layers: int
    plugin: Plugin | None
    compute_capabilities: list[str]
    driver: str | None
    options: dict[str, Any]


@dataclass(frozen=True)
class Header:
    """backend: of tensorrt_api.FLAVOURS. version: four parts, such as "1.7.1.116". size: bytes that the file must have."""

    backend: str
    version: str
    size: int


def entries(bundle: Bundle) -> list[EngineEntry]:
    """The bundle's engines. Raises BundleError where the manifest's rows are not ours."""
    try:
        return [EngineEntry.model_validate(row) for row in bundle.manifest.engines]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BundleError(f"{bundle.path}: manifest.json, engines: {where}: {first['msg']}: build the engine again") from error


def read_header(path: Path) -> Header:
    """Raises EngineError for a file that is no plan, or not all of one."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(_HEADER.size)
    if len(start) < _HEADER.size:
        raise EngineError(f"{path} is truncated: it has {size} bytes, less than the header of a plan: build the engine again")
    magic, wanted, *version = _HEADER.unpack(start)
    if magic[1:] != b"trt":
        raise EngineError(f"{path} is not a TensorRT plan: it begins with {start[:8]!r}: build the engine again")
    backend = "tensorrt-rtx" if magic == b"vtrt" else "tensorrt"
    if backend == "tensorrt-rtx" and size < wanted:
        raise EngineError(f"{path} is truncated: {size} bytes, its header says {wanted}: copy or build the engine again")
    return Header(backend, ".".join(str(part) for part in version), wanted)
