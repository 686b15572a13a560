"""The kernel's C++ sources under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, on every instruction set."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from instruction_sets import targets

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    not shutil.which("cmake") or not shutil.which("c++"), reason="needs cmake and a C++ compiler on PATH"
)


def build(sanitizers: str) -> Path:
    """The test program built with these sanitizers; the folder stays, so that only what changed is built again."""
    folder = ROOT / "build" / f"sanitized-{sanitizers.replace(',', '-')}"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    options = [
        f"-DMRA_SANITIZE={sanitizers}",
        "-DMRA_BUILD_TESTS=ON",
        "-DCMAKE_BUILD_TYPE=None",
        "-DMRA_BUILD_CUDA=OFF",
        "-DMRA_WARNINGS_AS_ERRORS=ON",
    ]
    commands = [
        ["cmake", "-S", str(ROOT / "mra_export/plugins"), "-B", str(folder), *generator, *options],
        ["cmake", "--build", str(folder), "--target", "mra_attention_hostile", "--parallel", "2"],
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return folder / "mra_attention_hostile"


@pytest.mark.slow
@pytest.mark.parametrize(("sanitizers", "cases"), [("address,undefined", 40), ("thread", 10)])
def test_hostile_shapes_under_sanitizers(sanitizers: str, cases: int, tmp_path: Path) -> None:
    probe = ["c++", f"-fsanitize={sanitizers}", "-x", "c++", "-", "-o", str(tmp_path / "probe")]
    if subprocess.run(probe, input="int main() {}", capture_output=True, text=True, timeout=60).returncode != 0:
        pytest.skip(f"the compiler has no run-time library for -fsanitize={sanitizers}")
    program = build(sanitizers)
    for target in targets():
        done = subprocess.run(
            [str(program), str(cases)],
            env={**os.environ, "MRA_ATTENTION_CPU_TARGET": target},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{target}: {done.stdout}{done.stderr[-5000:]}"
        assert done.stdout.strip() == f"{target}: {cases + 2} cases"
