"""The process that builds one engine: `python -m mra_export.engine_builder`, started by engine.py.

It is a process of its own because TensorRT ends the process on some errors, and so that stopping it stops everything: it writes
only to the files it was given. One JSON request (Request) on stdin; on stdout one JSON object per line: {"log": [level, text]},
{"phase": name, "depth": d}, {"step": name, "done": n, "of": m}, and at the end {"result": ...} or {"error": ..., "kind": ...}.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mra_export import gpu, tensorrt_api
from mra_export.contract import OP_TYPE, PLUGIN_NAME, PLUGIN_NAMESPACE, PLUGIN_VERSION
from mra_export.errors import EngineError, MraExportError
from mra_export.plan import Profile

Send = Callable[[dict[str, Any]], None]


class Request(BaseModel):
    """What to build. model, plan, library, timing_cache: absolute paths; library null: no plugin. layers: plugin layers wanted."""

    backend: str
    model: str
    plan: str
    layers: int
    library: str | None
    profiles: list[Profile]
    version_compatible: bool
    hardware_compatibility: str | None
    embed_plugin: bool
    compute_capabilities: list[str]
    timing_cache: str | None
    workspace_mb: int | None
    builder_opt_level: int | None


class Result(BaseModel):
    """What was built. compute_capabilities and driver: as in plan.EngineEntry."""

    builder: str
    plugin_layers: int
    compute_capabilities: list[str]
    driver: str | None


def main() -> int:
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to stderr, not between our lines

    def send(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    try:
        result = build(Request.model_validate_json(sys.stdin.read()), send)
        send({"result": result.model_dump()})
    except BrokenPipeError:
        os._exit(1)  # nobody waits for this engine any more
    except MraExportError as error:
        send({"error": str(error), "kind": type(error).__name__})
    channel.close()
    return 0


def build(request: Request, send: Send) -> Result:
    """Parse, check, build, write the plan. Raises EngineError or PluginLoadError."""
    problems: list[str] = []

    def told(level: str, text: str) -> None:
        if "cudaError 35" in text and not gpu.devices():
            return  # TensorRT-RTX looks for a GPU, and then builds without one
        if level == "error":
            problems.append(text)
        if level != "info":
            send({"log": [level, text]})

    def errors() -> str:
        return "; ".join(problems[:3])

    trt = tensorrt_api.load(request.backend)
    logger = tensorrt_api.make_logger(trt, told)
    builder = trt.Builder(logger)
    if request.library is not None:
        tensorrt_api.register_plugin(trt, Path(request.library), errors)
    network = builder.create_network(_strongly_typed(trt))
    send({"phase": "parse model.onnx", "depth": 0})
    plugin_layers = _parse(trt, network, logger, request, errors)
    config = builder.create_builder_config()
    monitor = _monitor(trt, send)  # keep it: the configuration does not
    config.progress_monitor = monitor
    capabilities = _configure(trt, builder, config, network, request)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"{request.backend} {trt.__version__} could not build the engine: {errors() or 'it gives no reason'}")
    send({"phase": "write the plan", "depth": 0})
    with open(request.plan, "wb") as stream:
        stream.write(plan)
        stream.flush()
        os.fsync(stream.fileno())
    if request.timing_cache is not None:
        _write_timing_cache(Path(request.timing_cache), config)
    return Result(
        builder=trt.__version__,
        plugin_layers=plugin_layers,
        compute_capabilities=capabilities,
        driver=gpu.driver_version() if request.backend == "tensorrt" else None,  # TensorRT-RTX compiles where it runs
    )


def _strongly_typed(trt: Any) -> int:
    """The graph's dtypes decide. TensorRT 11 knows nothing else and needs no flag."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _parse(trt: Any, network: Any, logger: Any, request: Request, errors: Callable[[], str]) -> int:
    """Returns the number of plugin layers, which is the wanted one."""
    parser = trt.OnnxParser(network, logger)
    override = getattr(trt.OnnxParserFlag, "ENABLE_PLUGIN_OVERRIDE", None)
    if request.library is not None and override is not None:
        parser.set_flag(override)  # else the node's function body may be expanded in place of the plugin
    if not parser.parse_from_file(request.model):
        reasons = "; ".join(str(parser.get_error(index).desc()) for index in range(parser.num_errors))
        raise EngineError(f"{request.backend} {trt.__version__} does not accept {request.model}: {reasons or errors()}")
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    plugins = [layer.type for layer in layers].count(trt.LayerType.PLUGIN_V3)
    wanted = request.layers if request.library is not None else 0
    if plugins != wanted:
        plugin = f"plugin {PLUGIN_NAME}, version {PLUGIN_VERSION!r}, namespace {PLUGIN_NAMESPACE!r}, of {request.library}"
        reason = errors()
        raise EngineError(
            f"the network has {plugins} plugin layers, the model {request.layers} {OP_TYPE} layers: {request.backend} expanded the "
            f"function body of the others, because the graph's nodes do not fit the {plugin}{f' ({reason})' if reason else ''}. "
            "Export the bundle again with this mra-export, or pass --no-plugin to build from the function body"
        )
    return plugins


def _configure(trt: Any, builder: Any, config: Any, network: Any, request: Request) -> list[str]:
    """Set profiles and options; returns the compute capabilities that the engine will run on."""
    names = {network.get_input(index).name for index in range(network.num_inputs)}
    for shapes in request.profiles:
        profile = builder.create_optimization_profile()
        for name, shape in shapes.items():
            if name in names:  # an input that no node reads is dropped by the parser
                profile.set_shape(name, shape["min"], shape["opt"], shape["max"])
        if config.add_optimization_profile(profile) < 0:
            raise EngineError(f"{request.backend} {trt.__version__} refuses the profile {shapes}")
    if request.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if request.embed_plugin and request.library is not None:
        config.plugins_to_serialize = [request.library]
    if request.workspace_mb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_mb << 20)
    if request.builder_opt_level is not None:
        config.builder_optimization_level = request.builder_opt_level
    if request.timing_cache is not None:
        _read_timing_cache(Path(request.timing_cache), config)
    if request.backend == "tensorrt-rtx":
        return _rtx_capabilities(trt, config, request.compute_capabilities)
    here = gpu.devices()[0].compute_capability
    if request.hardware_compatibility is None:
        return [here]
    level = request.hardware_compatibility.upper().replace("-", "_")
    if level not in trt.HardwareCompatibilityLevel.__members__:
        raise EngineError(f"tensorrt {trt.__version__} has no hardware compatibility {request.hardware_compatibility}: update it")
    config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.__members__[level]
    return ["8.0+"] if level == "AMPERE_PLUS" else [here]


def _rtx_capabilities(trt: Any, config: Any, wanted: list[str]) -> list[str]:
    if not wanted:
        return ["8.0+"]  # what TensorRT-RTX builds for when it is not told
    known = {name for name in trt.ComputeCapability.__members__ if name.startswith("SM")}
    config.num_compute_capabilities = len(wanted)
    for index, capability in enumerate(wanted):
        name = "SM" + capability.replace(".", "")
        if name not in known:
            names = ", ".join(sorted((f"{n[2:-1]}.{n[-1]}" for n in known), key=float))
            raise EngineError(f"tensorrt-rtx {trt.__version__} cannot build for compute capability {capability}: it knows {names}")
        if not config.set_compute_capability(getattr(trt.ComputeCapability, name), index):
            raise EngineError(f"tensorrt-rtx {trt.__version__} refuses compute capability {capability}")
    return wanted


def _read_timing_cache(path: Path, config: Any) -> None:
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise EngineError(f"{path} is not a timing cache of this TensorRT and GPU: name another file, or delete it")


def _write_timing_cache(path: Path, config: Any) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(bytes(config.get_timing_cache().serialize()))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _monitor(trt: Any, send: Send) -> Any:
    """TensorRT's progress as our messages. Its methods may be called from any thread and must not raise."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, tuple[int, int]] = {}  # name -> depth, steps

        def _tell(self, message: dict[str, Any]) -> bool:
            try:
                send(message)
            except OSError:
                return False  # nobody listens any more: cancel
            return True

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            depth = 0 if parent_phase is None else self.phases.get(parent_phase, (0, 0))[0] + 1
            self.phases[phase_name] = (depth, num_steps)
            self._tell({"phase": phase_name, "depth": depth})

        def step_complete(self, phase_name: str, step: int) -> bool:
            return self._tell({"step": phase_name, "done": step + 1, "of": self.phases.get(phase_name, (0, 0))[1]})

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)

    return Monitor()


if __name__ == "__main__":
    sys.exit(main())
