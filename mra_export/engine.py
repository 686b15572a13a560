"""From a bundle to a TensorRT engine in it: engines/<backend>-<version>-<GPU or portable>-<dtype>.plan, all or nothing."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mra_export import bundle as bundles
from mra_export import errors, gpu, libraries, profiles, tensorrt_api
from mra_export.bundle import MODEL, Bundle
from mra_export.contract import INT8, PLUGIN_NAME, PLUGIN_NAMESPACE, PLUGIN_VERSION
from mra_export.engine_builder import Request, Result
from mra_export.errors import BundleError, ContractError, EngineError, PluginLoadError
from mra_export.plan import EngineEntry, Plugin, entries
from mra_export.tensorrt_api import FLAVOURS

logger = logging.getLogger(__name__)

ENGINES = "engines"
PLUGIN_LIBRARY = "lib/libmra_trt.so"
BACKENDS = ("auto", *FLAVOURS)
HARDWARE_COMPATIBILITY = ("ampere-plus", "same-compute-capability")

Progress = Callable[[str, bool], None]
"""Told (text, passing): what the builder does now; passing: of interest only while it lasts."""


@dataclass(frozen=True)
class EngineOptions:
    """How to build.

    backend: "tensorrt", "tensorrt-rtx", or "auto": tensorrt where it and a GPU are, else tensorrt-rtx.
    min_shapes, opt_shapes, max_shapes: such as "input_ids:1x512", the n-th of each for the n-th profile (profiles.make_profiles).
    plugin: False builds the operator's function body into the engine, which then needs no plugin (and N x N memory).
    version_compatible: TensorRT only: the engine also runs in later versions of the same major version.
    hardware_compatibility: TensorRT only: one of HARDWARE_COMPATIBILITY, else the engine runs on this kind of GPU.
    embed_plugin: put the plugin library inside the plan; a runtime must then allow the plan to bring code.
    compute_capabilities: TensorRT-RTX only: the GPUs to build for, such as "8.9"; none: all that it supports.
    timing_cache: TensorRT only: a file to read tactic timings from and write them to.
    workspace_mb: MiB of scratch memory that a layer may take. builder_opt_level: 0 (fast build) to 5.
    """

    backend: str = "auto"
    min_shapes: tuple[str, ...] = ()
    opt_shapes: tuple[str, ...] = ()
    max_shapes: tuple[str, ...] = ()
    plugin: bool = True
    version_compatible: bool = False
    hardware_compatibility: str | None = None
    embed_plugin: bool = False
    compute_capabilities: tuple[str, ...] = ()
    timing_cache: Path | None = None
    workspace_mb: int | None = None
    builder_opt_level: int | None = None

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ContractError(f"backend is {self.backend!r}: use one of {', '.join(BACKENDS)}")
        if self.hardware_compatibility not in (None, *HARDWARE_COMPATIBILITY):
            raise ContractError(
                f"hardware_compatibility is {self.hardware_compatibility!r}: use one of {', '.join(HARDWARE_COMPATIBILITY)}"
            )
        if self.workspace_mb is not None and self.workspace_mb < 1:
            raise ContractError(f"workspace_mb is {self.workspace_mb}: it must be 1 or more")
        if self.builder_opt_level is not None and not 0 <= self.builder_opt_level <= 5:
            raise ContractError(f"builder_opt_level is {self.builder_opt_level}: it must be 0 to 5")
        if self.embed_plugin and not self.plugin:
            raise ContractError("embed_plugin and plugin=False contradict each other: pass one of --embed-plugin and --no-plugin")
        for value in self.compute_capabilities:
            if not re.fullmatch(r"\d{1,2}\.\d", value):
                raise ContractError(f"compute capability is {value!r}: write it as 8.9")

    def changed(self) -> dict[str, Any]:
        """What differs from the defaults, JSON-ready, shapes and backend left out: the manifest has those elsewhere."""
        skip = ("backend", "min_shapes", "opt_shapes", "max_shapes", "timing_cache")
        values = {field.name: getattr(self, field.name) for field in fields(self) if getattr(self, field.name) != field.default}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items() if name not in skip}


def choose_backend(name: str) -> str:
    """What "auto" means here, or the name itself once it is known to work. Raises EngineError saying what to install."""
    if name == "auto":
        if tensorrt_api.installed("tensorrt") and gpu.devices():
            return "tensorrt"
        if tensorrt_api.installed("tensorrt-rtx"):
            return "tensorrt-rtx"
        here = "is installed, but " + gpu.why_none() if tensorrt_api.installed("tensorrt") else "is not installed"
        raise EngineError(
            f"no engine can be built here: tensorrt {here}, and tensorrt-rtx, which needs no GPU to build, is not installed: "
            f"{FLAVOURS['tensorrt-rtx'].install}"
        )
    flavour = FLAVOURS[name]
    if not tensorrt_api.installed(name):
        raise EngineError(f"{name} is not installed: {flavour.install}")
    if not flavour.builds_without_gpu and not gpu.devices():
        raise EngineError(f"{name} builds engines only where a GPU is, and {gpu.why_none()}: use tensorrt-rtx, which needs none")
    return name


def check_can_build(options: EngineOptions) -> tuple[str, Path | None]:
    """The backend that will build, and the plugin library, None where `plugin` is False.

    Raises EngineError (nothing installed that can build here, or an option it does not know), PluginLoadError (no plugin library).
    """
    backend = choose_backend(options.backend)
    for option, why in FLAVOURS[backend].refuses.items():
        if getattr(options, option):
            flag = "--" + ("compute-capability" if option == "compute_capabilities" else option.replace("_", "-"))
            raise EngineError(f"{flag} is not for {backend}: {why}")
    if not options.plugin:
        return backend, None
    try:
        return backend, libraries.require("trt_plugin")
    except PluginLoadError as error:
        raise PluginLoadError(f"{error}; or pass --no-plugin, which builds from the function body (slower)") from error


def check_dtype(dtype: str) -> None:
    """Raises EngineError for a bundle's dtype that engines are not built from."""
    if dtype == INT8:
        raise EngineError(
            "no engine is built from an int8 graph: its scales and its uint8 activations are for CPUs, and TensorRT takes signed, "
            "symmetric ones only. Export with --dtype fp16 for a GPU"
        )


def build_engine(
    bundle: str | os.PathLike[str] | Bundle,
    options: EngineOptions | None = None,
    progress: Progress = lambda text, passing: None,
) -> EngineEntry:
    """Build an engine from the bundle's graph and add it to the bundle and its manifest; returns the manifest's row.

    An engine of the same name is replaced, together with its row. On any error or Ctrl-C the bundle stays as it was.
    Raises EngineError (cannot be built here, or an option the backend does not know), ContractError (an option's value),
    PluginLoadError (no plugin library), BundleError (the bundle cannot be written to).
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    options = options or EngineOptions()
    check_dtype(bundle.manifest.dtype)
    backend, library = check_can_build(options)
    shapes = profiles.make_profiles(bundle, options.min_shapes, options.opt_shapes, options.max_shapes, options.plugin)
    if not os.access(bundle.path, os.W_OK | os.X_OK):
        raise BundleError(f"{bundle.path} cannot be written to: change its permissions, or copy the bundle")
    with tempfile.TemporaryDirectory(prefix="mra-engine-") as scratch:
        plan = Path(scratch) / "engine.plan"
        request = Request(
            backend=backend,
            model=str(bundle.file(MODEL).resolve()),
            plan=str(plan),
            layers=bundle.manifest.model.num_hidden_layers,
            library=None if library is None else str(library),
            profiles=shapes,
            version_compatible=options.version_compatible,
            hardware_compatibility=options.hardware_compatibility,
            embed_plugin=options.embed_plugin,
            compute_capabilities=list(options.compute_capabilities),
            timing_cache=None if options.timing_cache is None else str(Path(options.timing_cache).resolve()),
            workspace_mb=options.workspace_mb,
            builder_opt_level=options.builder_opt_level,
        )
        result = _run_builder(request, progress)
        entry = EngineEntry(
            file=f"{ENGINES}/{backend}-{result.builder}-{_kind_of_gpu(options, result)}-{bundle.manifest.dtype}.plan",
            backend=backend,
            builder=result.builder,
            dtype=bundle.manifest.dtype,
            profiles=shapes,
            plugin_layers=result.plugin_layers,
            plugin=None if library is None else _plugin(library, options.embed_plugin),
            compute_capabilities=result.compute_capabilities,
            driver=result.driver,
            options=options.changed(),
        )
        _publish(bundle, plan, entry, library)
    return entry


def _kind_of_gpu(options: EngineOptions, result: Result) -> str:
    """The third part of an engine's file name."""
    if any(capability.endswith("+") for capability in result.compute_capabilities):
        return "portable"
    return "_".join("sm" + capability.replace(".", "") for capability in result.compute_capabilities)


def _plugin(library: Path, embedded: bool) -> Plugin:
    return Plugin(
        name=PLUGIN_NAME,
        version=PLUGIN_VERSION,
        namespace=PLUGIN_NAMESPACE,
        library=PLUGIN_LIBRARY,
        sha256=bundles.file_entry(library).sha256,
        embedded=embedded,
    )


def _run_builder(request: Request, progress: Progress) -> Result:
    """Run engine_builder.py in a process that is stopped with us. Raises what it raised, or EngineError where it died."""
    progress(f"{request.backend}: starting", False)
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            [sys.executable, "-m", "mra_export.engine_builder"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # a Ctrl-C of the terminal reaches this process alone, which then ends the builder
        )
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # it died at once: its exit status says so below
                process.stdin.write(request.model_dump_json())
                process.stdin.close()
            for line in process.stdout:
                answer = _hear(request.backend, json.loads(line), progress)
                if answer is not None:
                    return answer
            status = process.wait()
        finally:
            process.kill()
            process.wait()
        complaints.seek(0)
        last = complaints.read().decode(errors="replace").strip().splitlines()[-3:]
    how = f"was ended by signal {-status} ({signal.Signals(-status).name})" if status < 0 else f"ended with status {status}"
    raise EngineError(f"the {request.backend} builder {how}: {' / '.join(last) or 'it gives no reason'}")


def _hear(backend: str, message: dict[str, Any], progress: Progress) -> Result | None:
    """One message of the builder: the result, if it is that. Raises its error."""
    if "result" in message:
        return Result.model_validate(message["result"])
    if "error" in message:
        raise getattr(errors, message["kind"])(message["error"])
    if "log" in message:
        level, text = message["log"]
        logger.info("%s: %s: %s", backend, level, text)
    elif "phase" in message:
        progress(f"{backend}: {message['phase']}", message["depth"] > 1)
    elif "step" in message:
        progress(f"{backend}: {message['step']}, {message['done']} of {message['of']}", True)
    return None


def _publish(bundle: Bundle, plan: Path, entry: EngineEntry, library: Path | None) -> None:
    """Put plan and plugin library into the bundle. A reader finds the old engine, none, or the new one, never a wrong hash."""
    manifest = Bundle.load(bundle.path, verify_hashes=False).manifest  # again: the build took a while
    new = {entry.file: plan} if library is None else {entry.file: plan, PLUGIN_LIBRARY: library}
    folders = [folder for folder in {(bundle.path / name).parent for name in new} if not folder.exists()]
    staged: dict[str, Path] = {}
    try:
        try:
            for name, source in new.items():
                target = bundle.path / name
                target.parent.mkdir(exist_ok=True)
                staged[name] = target.with_name(f".{target.name}.{os.getpid()}.partial")
                shutil.copyfile(source, staged[name])
        except OSError as error:
            raise BundleError(f"{bundle.path} cannot take the engine ({error.strerror}): make room, or copy the bundle") from error
        entry_of = {name: bundles.file_entry(path) for name, path in staged.items()}
        _warn_of_other_plugin(bundle, entry)
        with _uninterrupted():
            changed = [name for name, wanted in entry_of.items() if manifest.files.get(name, wanted) != wanted]
            rows = [row for row in manifest.engines if row.get("file") != entry.file]
            if changed:
                for name in changed:
                    del manifest.files[name]
                manifest.engines = rows
                bundles.write_manifest(bundle.path, manifest)
            for name, path in staged.items():
                path.replace(bundle.path / name)
            manifest.files = dict(sorted({**manifest.files, **entry_of}.items()))
            manifest.engines = [*rows, entry.model_dump()]
            bundles.write_manifest(bundle.path, manifest)
    except BaseException:
        for path in staged.values():
            path.unlink(missing_ok=True)
        for folder in folders:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    bundle.manifest = manifest


def _warn_of_other_plugin(bundle: Bundle, entry: EngineEntry) -> None:
    """Engines that were built with another build of the plugin library no longer load beside the new one."""
    for other in entries(bundle):
        if entry.plugin and other.plugin and other.file != entry.file and other.plugin.sha256 != entry.plugin.sha256:
            logger.warning("%s was built with another %s: build it again as well", other.file, PLUGIN_LIBRARY)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold back a Ctrl-C, or a SIGTERM that someone handles, until the block is done. One that is ignored stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted
        return
    came: list[int] = []
    held = {number: handler for number in (signal.SIGINT, signal.SIGTERM) if callable(handler := signal.getsignal(number))}
    for number in held:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
    for late in came:
        signal.raise_signal(late)
