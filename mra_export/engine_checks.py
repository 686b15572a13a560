"""Does an engine fit this machine? Asked before TensorRT sees a byte of it: loading a plan runs code and may end the process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mra_export import gpu, tensorrt_api
from mra_export.bundle import Bundle, file_entry
from mra_export.contract import PLUGIN_NAME, PLUGIN_NAMESPACE, PLUGIN_VERSION
from mra_export.errors import BundleError, EngineError, MraExportError, PluginLoadError
from mra_export.gpu import Gpu
from mra_export.plan import EngineEntry, Plugin, entries, read_header


def choose_engine(
    bundle: Bundle,
    file: str | None,
    *,
    allow_embedded_plugin: bool,
    devices: Sequence[Gpu],
    driver: str | None,
    device_index: int = 0,
) -> EngineEntry:
    """The first of the bundle's engines that fits here, or the one of that name (file, with or without its folder).

    devices, driver: what gpu.py says. Raises EngineError, PluginLoadError or BundleError with what does not fit and the command
    that rebuilds it; where there are several engines, with that of each.
    """
    found = entries(bundle)
    if not found:
        raise EngineError(f"{bundle.path} holds no engine: mra-export engine {bundle.path}")
    if file is not None:
        names = [entry.file for entry in found]
        found = [entry for entry in found if file in (entry.file, Path(entry.file).name)]
        if not found:
            raise EngineError(f"{bundle.path} has no engine {file}: it has {', '.join(names)}")
    reasons: list[MraExportError] = []
    for entry in found:
        try:
            check_files(bundle, entry, allow_embedded_plugin)
            check_version(bundle, entry, _installed_version(entry))
            check_gpu(bundle, entry, devices, driver, device_index)
        except MraExportError as error:
            reasons.append(error)
        else:
            return entry
    if len(reasons) == 1:
        raise reasons[0]
    raise EngineError(f"none of the engines of {bundle.path} fits here. " + " ".join(f"({reason})" for reason in reasons))


def check_files(bundle: Bundle, entry: EngineEntry, allow_embedded_plugin: bool) -> None:
    """The plan and its plugin library are what the manifest says, down to the header."""
    path = bundle.file(entry.file)
    again = rebuild(bundle, entry)
    header = read_header(path)
    if (header.backend, header.version) != (entry.backend, entry.builder):
        raise EngineError(
            f"{path} is a plan of {header.backend} {header.version}, the manifest says {entry.backend} {entry.builder}: {again}"
        )
    verify_hash(bundle, entry.file, file_entry(path).sha256)
    plugin = entry.plugin
    if plugin is None:
        return
    ours = (PLUGIN_NAME, PLUGIN_VERSION, PLUGIN_NAMESPACE)
    if (plugin.name, plugin.version, plugin.namespace) != ours:
        raise EngineError(
            f"{path} needs plugin {plugin.name} version {plugin.version!r}, this package has version {PLUGIN_VERSION!r}: {again}"
        )
    if plugin.embedded:
        if not allow_embedded_plugin:
            raise EngineError(
                f"{path} brings its own plugin code, which runs when it is loaded: pass allow_embedded_plugin=True if you trust "
                f"where it comes from, or build it without --embed-plugin: mra-export engine {bundle.path}"
            )
        return
    check_plugin_library(bundle, entry, plugin)


def check_plugin_library(bundle: Bundle, entry: EngineEntry, plugin: Plugin) -> Path:
    """The file of the plugin library that an engine needs beside it, the very build that the engine was built with.

    Raises PluginLoadError (it is missing), BundleError (altered) or EngineError (of another build).
    """
    again = rebuild(bundle, entry)
    if plugin.library not in bundle.manifest.files:
        raise PluginLoadError(f"{bundle.path} holds no {plugin.library}, which {entry.file} needs: {again}")
    library = bundle.file(plugin.library)
    if not library.is_file():
        raise PluginLoadError(f"{library} is missing, {entry.file} needs it: {again}")
    verify_hash(bundle, plugin.library, file_entry(library).sha256)
    if bundle.manifest.files[plugin.library].sha256 != plugin.sha256:
        engine = bundle.file(entry.file)
        raise EngineError(f"{engine} was built with another {plugin.library} (sha256 {plugin.sha256[:16]}...): {again}")
    return library


def verify_hash(bundle: Bundle, name: str, sha256: str) -> None:
    """Refuse a file whose hash is not the manifest's. Raises BundleError."""
    if sha256 != bundle.manifest.files[name].sha256:
        raise BundleError(f"{bundle.path / name} is altered: its sha256 is not the manifest's: copy the bundle or build it again")


def check_version(bundle: Bundle, entry: EngineEntry, installed: str) -> None:
    """An engine runs in the version that built it; a version-compatible one in later ones of that major version, too."""
    built, here = _numbers(entry.builder), _numbers(installed)
    if built[:3] == here[:3]:
        return
    if entry.options.get("version_compatible") and built[0] == here[0] and built <= here:
        return
    raise EngineError(
        f"{bundle.path / entry.file} was built by {entry.backend} {entry.builder}, installed is {installed}: "
        f"{rebuild(bundle, entry)}, or install that version"
    )


def check_gpu(bundle: Bundle, entry: EngineEntry, devices: Sequence[Gpu], driver: str | None, index: int = 0) -> None:
    """A GPU is here, the engine was built for its kind, and the driver's CUDA is of no older major version than the builder's."""
    if not devices:
        raise EngineError(f"{bundle.path / entry.file} runs on an NVIDIA GPU, and {gpu.why_none()}: use backend 'onnxruntime' here")
    here = devices[index]
    if not any(_fits(here.compute_capability, wanted) for wanted in entry.compute_capabilities):
        raise EngineError(
            f"{bundle.path / entry.file} runs on compute capability {', '.join(entry.compute_capabilities)}, "
            f"{here.name} has {here.compute_capability}: {rebuild(bundle, entry)} here"
        )
    if entry.driver is not None and (driver is None or _numbers(driver)[0] < _numbers(entry.driver)[0]):
        raise EngineError(
            f"{bundle.path / entry.file} was built where the driver runs CUDA {entry.driver}, here it runs CUDA {driver}: "
            f"update the driver, or {rebuild(bundle, entry)} here"
        )


def rebuild(bundle: Bundle, entry: EngineEntry) -> str:
    """The command that builds this engine again."""
    return f"mra-export engine {bundle.path} --backend {entry.backend}" + ("" if entry.plugin else " --no-plugin")


def _installed_version(entry: EngineEntry) -> str:
    if entry.backend not in tensorrt_api.FLAVOURS:
        raise EngineError(f"{entry.file} is of backend {entry.backend!r}: this package knows {', '.join(tensorrt_api.FLAVOURS)}")
    return tensorrt_api.version(entry.backend)


def _fits(here: str, wanted: str) -> bool:
    if wanted.endswith("+"):
        return _numbers(here) >= _numbers(wanted[:-1])
    return here == wanted


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
