"""Who may import whom. Each rule runs in a process of its own, where what was imported can be seen."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

PLUGINS = Path(__file__).parent.parent / "mra_export" / "plugins"

FRAMEWORKS = {"torch", "transformers", "onnx", "onnxruntime", "onnxscript", "tensorrt", "tensorrt_rtx"}
RUNTIMES = {"onnxruntime", "tensorrt", "tensorrt_rtx"}
RULES = {
    "mra_export": FRAMEWORKS | {"numpy"},
    "mra_export.contract": FRAMEWORKS | {"numpy"},
    "mra_export.errors": FRAMEWORKS | {"numpy"},
    "mra_export.parity": FRAMEWORKS,
    "mra_export.kernel": FRAMEWORKS,
    "mra_export.model": RUNTIMES | {"onnx", "onnxscript"},
    "mra_export.export": RUNTIMES,
    "mra_export.quantize": {"tensorrt", "tensorrt_rtx"},
    "mra_export.engine": {"torch", "transformers", "mra_export.model"},
    "mra_export.runtime": {"torch", "transformers", "mra_export.model"},
    "mra_export.bench": RUNTIMES | {"torch", "transformers", "mra_export.model"},
    "mra_export.bundle": {"torch", "transformers", "mra_export.model"},
    "mra_export.serve": FRAMEWORKS | {"mra_export.runtime", "mra_export.model", "fastapi", "uvicorn"},
}


@pytest.mark.parametrize("module", RULES)
def test_a_module_imports_only_what_it_may(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not part of this version")
    code = f"import sys, {module}; print('\\n'.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    imported = set(result.stdout.split())
    assert not imported & (RULES[module] | {"mra_export.cli"})


def test_public_names_are_all_there() -> None:
    import mra_export

    assert all(getattr(mra_export, name) for name in mra_export.__all__)


def includes(source: Path) -> set[str]:
    return set(re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', source.read_text(), re.MULTILINE))


def test_kernels_include_no_framework_header() -> None:
    kernels = [path for folder in ("cpu", "cuda", "include") for path in (PLUGINS / folder).rglob("*") if path.is_file()]
    assert kernels
    for source in kernels:
        assert not [name for name in includes(source) if re.search(r"torch|ATen|onnxruntime|NvInfer|tensorrt", name)], source


def test_adapters_do_not_include_each_other() -> None:
    for source in PLUGINS.glob("*.c*"):
        assert not [name for name in includes(source) if re.search(r"_(ort|plugin)\.", name)], source
