"""What this clone has been made without, one line each with the reason: `make demo` and `make test` end with it.

    .venv/bin/python mra_export/plugins/make/left_out.py [tests]

CMake's reasons lie beside the libraries, pip's in .venv/left-out (optional.sh). With "tests", what tests lack as well.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from mra_export import libraries

ROOT = Path(__file__).resolve().parents[3]
NAMES = {
    "cuda": "CUDA kernels, for PyTorch and ONNX Runtime on a GPU",
    "trt_plugin": "TensorRT plugin, for .plan engines",
    "session_tensorrt": "TensorRT engines in C and C++ programs",
}


def built_without() -> Iterator[tuple[str, str]]:
    for part, reason in libraries.left_out().items():
        yield NAMES.get(part, part), reason


def not_installed(folder: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(folder.glob("*")):
        yield file.name, why(file.read_text(errors="replace"))


def why(said: str) -> str:
    """The last error in what pip said."""
    if "connection broken by" in said:
        return "the package index cannot be reached"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (errors or lines or ["it could not be installed"])[-1]


def not_tested() -> Iterator[tuple[str, str]]:
    sys.path.insert(0, str(ROOT / "tests" / "plugins"))
    import aarch64  # type: ignore[import-not-found]

    if os.uname().machine != "aarch64" and (reason := aarch64.missing()):
        yield "tests of the kernel for aarch64", reason


if __name__ == "__main__":
    parts = [*built_without(), *not_installed(ROOT / ".venv" / "left-out"), *(not_tested() if "tests" in sys.argv[1:] else ())]
    print(
        "Left out here; `make clean` and the same command again once the reason is gone:" if parts else "Nothing is left out here."
    )
    for name, reason in parts:
        print(f"  {name}: {reason}")
