"""The bundle: one folder with everything a server needs, described by manifest.json, published in one step or not at all.

    manifest.json  model.onnx (and model.onnx.data above 2 GB)  config.json  model.safetensors  tokenizer files  golden.npz
    lib/  the op library        engines/  TensorRT engines

The manifest is written last and lists the hash and size of every other file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mra_export import golden_file
from mra_export.contract import ATTRIBUTE_NAMES, CONTRACT_VERSION, INT8, PRECISIONS, Attributes
from mra_export.errors import BundleError, ContractError
from mra_export.golden_file import Arrays, Expected

SCHEMA_VERSION = 1
"""Version of manifest.json's own layout."""
MANIFEST = "manifest.json"
MODEL = "model.onnx"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
OP_LIBRARY = "lib/libmra_ort.so"
GOLDEN = "golden.npz"
REQUIRED_FILES = (MODEL, CONFIG, GOLDEN)

_staging: set[Path] = set()
"""Folders this process is filling. Their manifest has another name, so whatever a kill leaves behind loads nowhere."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ModelInfo(_Strict):
    """The checkpoint's architecture (its class name) and dimensions, as in its config.json."""

    architecture: str
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    vocab_size: int
    type_vocab_size: int
    num_labels: int


class Tensor(_Strict):
    """A graph input or output. dtype: numpy's name, or bfloat16. axes: a number, or the name of one that may change per call."""

    name: str
    dtype: str
    axes: list[str | int]


class FileEntry(_Strict):
    """sha256: hex digest; size: bytes."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class Quantization(_Strict):
    """How an int8 bundle's graph was quantised (quantize.py).

    method: "static", scales of the activations fixed by calibration, or "dynamic", taken from each call's own values.
    weights, activations: their integer type, in words. quantized, kept: the matrix products by node name, those in int8 and those
    left in float32. calibration: text, windows, tokens (of one window); null for dynamic.
    """

    method: Literal["static", "dynamic"]
    weights: str
    activations: str
    quantized: list[str]
    kept: list[str]
    calibration: Calibration | None


class Calibration(_Strict):
    """text: the file or folder as it was named. windows: how many pieces of it; tokens: of each piece."""

    text: str
    windows: int
    tokens: int


class Manifest(_Strict):
    """manifest.json.

    attributes: the operator's, the same in every layer. files: every file but the manifest, by relative POSIX path.
    parity: the report's rows at export, or null where none was asked for. engines: one row per TensorRT engine. quantization: of an
    int8 bundle.
    """

    schema_version: int = SCHEMA_VERSION
    contract_version: int = CONTRACT_VERSION
    model: ModelInfo
    task: str
    dtype: str
    opset: int
    padding_invariant: bool
    attributes: dict[str, int | float | str | bool]
    inputs: list[Tensor]
    outputs: list[Tensor]
    files: dict[str, FileEntry]
    versions: dict[str, str]
    source: str
    parity: list[dict[str, Any]] | None = None
    engines: list[dict[str, Any]] = Field(default_factory=list)
    quantization: Quantization | None = None

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, value: str) -> str:
        if value not in PRECISIONS:
            raise ValueError(f"use one of {', '.join(PRECISIONS)}")
        return value

    @field_validator("attributes")
    @classmethod
    def _operator_attributes(cls, value: dict[str, Any]) -> dict[str, Any]:
        if set(value) != set(ATTRIBUTE_NAMES):
            raise ValueError(f"the operator's attributes are {', '.join(ATTRIBUTE_NAMES)}")
        try:
            Attributes(**value)
        except (ContractError, TypeError) as error:
            raise ValueError(str(error)) from error
        return value

    @field_validator("files")
    @classmethod
    def _inside_the_bundle(cls, value: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in value:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or str(path) != name or name == MANIFEST:
                raise ValueError(f"file name {name!r} does not stay inside the bundle")
        return value

    def operator_attributes(self) -> Attributes:
        """`attributes` as the contract's dataclass."""
        return Attributes(**self.attributes)  # type: ignore[arg-type]

    @property
    def token_outputs(self) -> list[str]:
        """Names of the outputs with an entry per token: their first axes are those of input_ids."""
        axes = self.inputs[0].axes
        return [tensor.name for tensor in self.outputs if tensor.axes[: len(axes)] == axes]

    @property
    def chooses_tokens(self) -> bool:
        """Whether the graph can be had for chosen tokens only (token_graph.py), with the same answers.

        Not in 16 bits, which ONNX Runtime then rounds at other places, nor in int8 with scales taken from all tokens of a call.
        """
        dynamic = self.quantization is not None and self.quantization.method == "dynamic"
        return self.dtype in ("fp32", INT8) and not dynamic and len(self.outputs) == len(self.token_outputs) == 1


class Bundle:
    """A bundle on disk. path: its folder; manifest: what manifest.json says. Make one with `Bundle.load`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def load(cls, path: str | os.PathLike[str], verify_hashes: bool = True) -> Bundle:
        """Read the manifest and check every file it lists; without verify_hashes only that each is there and of the right size.

        Raises BundleError naming the file that is missing, truncated or altered, or the version that does not fit.
        """
        folder = Path(path)
        bundle = cls(folder, _read_manifest(folder))
        for name, entry in bundle.manifest.files.items():
            _check_file(folder / name, name, entry, verify_hashes)
        return bundle

    def file(self, name: str) -> Path:
        """Path of a file that the manifest lists, such as "model.onnx". Raises BundleError where it lists none of that name."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path} has no file {name}: it has {', '.join(sorted(self.manifest.files))}")
        return self.path / name

    def golden(self) -> tuple[list[Arrays], list[Expected]]:
        """(inputs, outputs): stored batches and PyTorch's float32 answers, one dict per batch. Raises BundleError.

        An output is a whole array or, where that would fill megabytes, parts of it (golden_file.Sampled).
        """
        path = self.file(GOLDEN)
        try:
            with np.load(path, allow_pickle=False) as archive:
                return golden_file.batches(archive)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise BundleError(f"{path} cannot be read as golden inputs and outputs ({error}): export the bundle again") from error


def write_golden(path: Path, inputs: list[Arrays], outputs: list[Expected]) -> None:
    """Store batches in one npz file. Uncompressed: float32 answers shrink by a tenth, and C++ readers need no inflate."""
    np.savez(path, **golden_file.named(inputs, outputs))  # type: ignore[arg-type]


def file_entry(path: Path) -> FileEntry:
    """Hash and size of a file, as the manifest lists them."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return FileEntry(sha256=digest.hexdigest(), size=path.stat().st_size)


def list_files(folder: Path) -> dict[str, FileEntry]:
    """Manifest entries of every file under a folder but the manifest itself."""
    paths = sorted(
        path for path in folder.rglob("*") if path.is_file() and path not in (folder / MANIFEST, _staged_name(folder / MANIFEST))
    )
    return {path.relative_to(folder).as_posix(): file_entry(path) for path in paths}


def write_manifest(folder: str | os.PathLike[str], manifest: BaseModel, name: str = MANIFEST) -> None:
    """Write or replace a folder's manifest, the file `name`, in one step: a reader sees the old one or the new one."""
    target = _manifest_path(Path(folder), name)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(manifest.model_dump_json(indent=2) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    _fsync_folder(target.parent)


def check_target(path: str | os.PathLike[str], force: bool, manifest: str = MANIFEST, what: str = "bundle") -> Path:
    """Refuse a place where a bundle must not or cannot be written; returns its absolute path.

    A folder that is empty or not there is fine. A bundle is overwritten with `force` only, and anything else never: no file that a
    bundle's manifest does not list is ever deleted. The same goes for other folders that we write, `what` with its own `manifest`.
    Raises BundleError.
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_dir():
        raise BundleError(f"{path} is a file: choose a folder that does not exist yet")
    if target.is_dir() and any(target.iterdir()):
        foreign = _foreign_file(target, manifest)
        if foreign:
            raise BundleError(f"{path} holds {foreign}, which no {what} lists: choose another folder, or move it away")
        if not force:
            raise BundleError(f"{path} already holds a {what}: pass --force to overwrite it, or choose another folder")
    parent = target.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise BundleError(f"{parent} cannot be written to: choose another folder for {target.name}, or change its permissions")
    return target


@contextlib.contextmanager
def staged(path: str | os.PathLike[str], force: bool = False, manifest: str = MANIFEST, what: str = "bundle") -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; on success it becomes `path`, on any exception or Ctrl-C it is removed.

    With `force`, an older bundle at `path` stays until the new one is complete. `manifest`, `what`: see `check_target`. Raises
    BundleError (see there), also if no manifest was written into the folder.
    """
    target = check_target(path, force, manifest, what)
    created = [parent for parent in target.parents if not parent.exists()]
    folder: Path | None = None
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            folder = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
            folder.mkdir()
        except OSError as error:
            raise BundleError(f"{target.parent} cannot be written to ({error.strerror}): choose another folder") from error
        _staging.add(folder)
        yield folder
        _publish(folder, target, force, manifest, what)
    except BaseException:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        for parent in created:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
    finally:
        if folder is not None:
            _staging.discard(folder)


def _publish(folder: Path, target: Path, force: bool, manifest: str, what: str) -> None:
    staged_manifest = _staged_name(folder / manifest)
    if not staged_manifest.is_file():
        raise BundleError(f"no manifest was written for {target}: the export did not finish")
    readable = folder.stat().st_mode & 0o666  # what the umask leaves; safetensors, for one, writes files that only we could read
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            path.chmod(readable)
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        else:
            _fsync_folder(path)
    check_target(target, force, manifest, what)  # again: the export took a while
    staged_manifest.replace(folder / manifest)
    _fsync_folder(folder)
    previous = None
    if force and target.is_dir() and any(target.iterdir()):
        previous = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.old")
        target.replace(previous)
    try:
        folder.replace(target)
    except BaseException as error:
        if previous is not None:
            previous.replace(target)
        if isinstance(error, OSError):
            raise BundleError(f"{target} cannot be replaced ({error.strerror}): another process may be writing it") from error
        raise
    _fsync_folder(target.parent)
    if previous is not None:
        shutil.rmtree(previous)


def _foreign_file(folder: Path, manifest: str) -> str | None:
    """A file in the folder that its manifest does not list, or None. An unreadable manifest lists nothing."""
    try:
        listed = set(json.loads((folder / manifest).read_text(encoding="utf-8"))["files"]) | {manifest}
    except (OSError, ValueError, KeyError, TypeError):
        listed = set()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in listed and (path.is_symlink() or not path.is_dir()):
            return name
    return None if listed else next(folder.iterdir()).name


def _manifest_path(folder: Path, name: str = MANIFEST) -> Path:
    return _staged_name(folder / name) if folder.resolve() in _staging else folder / name


def _staged_name(manifest: Path) -> Path:
    return manifest.with_suffix(".partial.json")


def _read_manifest(folder: Path) -> Manifest:
    path = _manifest_path(folder)
    if not folder.is_dir():
        raise BundleError(f"{folder} is not a folder: pass the folder that mra-export export wrote")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BundleError(f"{folder} has no {MANIFEST}, so it is not a complete bundle: export it again") from error
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read ({error}): export the bundle again") from error
    if not isinstance(raw, dict):
        raise BundleError(f"{path} is not a JSON object: export the bundle again")
    _check_version(path, "schema_version", raw.get("schema_version"), SCHEMA_VERSION)
    _check_version(path, "contract_version", raw.get("contract_version"), CONTRACT_VERSION)
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BundleError(f"{path}: {where}: {first['msg']}: export the bundle again") from error
    for name in REQUIRED_FILES:
        if name not in manifest.files:
            raise BundleError(f"{path} does not list {name}: export the bundle again")
    return manifest


def _check_version(path: Path, name: str, found: object, known: int) -> None:
    if found == known and not isinstance(found, bool):
        return
    if isinstance(found, int) and found > known:
        raise BundleError(
            f"{path} has {name} {found}, this package knows {known}: install a newer mra-export, or export the bundle again"
        )
    raise BundleError(f"{path} has {name} {found!r}, this package needs {known}: export the bundle again with this package")


def _check_file(path: Path, name: str, entry: FileEntry, verify_hash: bool) -> None:
    if not path.is_file():
        raise BundleError(f"{name} is missing from {path.parent}: export or copy the bundle again")
    size = path.stat().st_size
    if size != entry.size:
        state = "truncated" if size < entry.size else "altered"
        raise BundleError(f"{path} is {state}: {size} bytes, the manifest says {entry.size}: export or copy the bundle again")
    if verify_hash and file_entry(path).sha256 != entry.sha256:
        raise BundleError(f"{path} is altered: its sha256 is not the manifest's: export or copy the bundle again")


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
