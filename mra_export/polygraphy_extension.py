"""Options of `polygraphy run` that this package adds: --mra-onnxrt and --mra-trt, a bundle's own runtimes.

`polygraphy run BUNDLE/model.onnx --onnxrt --mra-onnxrt` runs the graph twice, with its function body and with the op library, and
compares. The entry point polygraphy.run.plugins of pyproject.toml names `runners`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from polygraphy.tools.args import ModelArgs
from polygraphy.tools.args.base import BaseRunnerArgs
from polygraphy.tools.script import make_invocable

from mra_export import polygraphy_compare
from mra_export.bundle import MODEL, Bundle


class _Runner(BaseRunnerArgs):  # type: ignore[misc]
    """A runner over MraRuntime, on the bundle in whose folder the model lies."""

    option: str
    title: str
    runtime: str

    def get_name_opt_impl(self) -> tuple[str, str]:
        return self.title, self.option

    def add_to_script_impl(self, script: Any) -> None:
        script.add_import(imports=["runner_on"], frm=__name__)
        script.add_runner(make_invocable("runner_on", str(self.arg_groups[ModelArgs].path), self.runtime))


class MraOnnxrt(_Runner):
    """Option --mra-onnxrt."""

    option, title, runtime = "mra-onnxrt", "ONNX Runtime with the bundle's op library", "onnxruntime"


class MraTrt(_Runner):
    """Option --mra-trt."""

    option, title, runtime = "mra-trt", "the bundle's TensorRT engine", "tensorrt"


def runners() -> list[Any]:
    """What Polygraphy asks an extension for."""
    return [MraOnnxrt(), MraTrt()]


def runner_on(model: str, runtime: str) -> Any:
    """The Polygraphy runner for a bundle's model.onnx. Raises BundleError where that is no bundle's."""
    path = Path(model)
    if path.name != MODEL:
        path = path / MODEL
    return polygraphy_compare.runner(Bundle.load(path.parent), runtime)
