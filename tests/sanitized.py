"""C++ test programs built with sanitizers, for the tests of the kernel and of libmra_session."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
needs_compiler = pytest.mark.skipif(
    not shutil.which("cmake") or not shutil.which("c++"), reason="needs cmake and a C++ compiler on PATH"
)


def need_runtime(sanitizers: str, folder: Path) -> None:
    """Skips where the compiler cannot link a program with them."""
    probe = ["c++", f"-fsanitize={sanitizers}", "-x", "c++", "-", "-o", str(folder / "probe")]
    if subprocess.run(probe, input="int main() {}", capture_output=True, text=True, timeout=60).returncode != 0:
        pytest.skip(f"the compiler has no run-time library for -fsanitize={sanitizers}")


def build(target: str, sanitizers: str, prefix: str) -> Path:
    """The program of that CMake target; its folder build/PREFIX-... stays, so that only what changed is built again."""
    folder = ROOT / "build" / f"{prefix}-{sanitizers.replace(',', '-')}"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    options = [
        f"-DMRA_SANITIZE={sanitizers}",
        "-DMRA_BUILD_TESTS=ON",
        "-DCMAKE_BUILD_TYPE=None",
        "-DMRA_BUILD_CUDA=OFF",
        "-DMRA_WARNINGS_AS_ERRORS=ON",
    ]
    for command in (
        ["cmake", "-S", str(ROOT / "mra_export/plugins"), "-B", str(folder), *generator, *options],
        ["cmake", "--build", str(folder), "--target", target, "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return next(path for path in folder.rglob(target) if path.is_file())
