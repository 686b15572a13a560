"""libmra_session under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer: many threads through one session."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    not shutil.which("cmake") or not shutil.which("c++"), reason="needs cmake and a C++ compiler on PATH"
)
THREADS, CALLS = 8, 6

# ONNX Runtime and the bundle's op library are not instrumented: what they do with memory that only they see is not judged here.
# The kernel has its own test (tests/plugins/test_sanitized.py).
SUPPRESSIONS = {
    "TSAN_OPTIONS": "race:libonnxruntime\nrace:libmra_ort\nmutex:libonnxruntime\ndeadlock:libonnxruntime\n",
    "LSAN_OPTIONS": "leak:libonnxruntime\n",
}


def build(sanitizers: str) -> Path:
    """The test program built with these sanitizers; the folder stays, so that only what changed is built again."""
    folder = ROOT / "build" / f"session-{sanitizers.replace(',', '-')}"
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
        ["cmake", "--build", str(folder), "--target", "mra_session_threads", "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return next(folder.rglob("mra_session_threads"))


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_many_threads_through_one_session_under_sanitizers(bundles, sanitizers, tmp_path) -> None:
    probe = ["c++", f"-fsanitize={sanitizers}", "-x", "c++", "-", "-o", str(tmp_path / "probe")]
    if subprocess.run(probe, input="int main() {}", capture_output=True, text=True, timeout=60).returncode != 0:
        pytest.skip(f"the compiler has no run-time library for -fsanitize={sanitizers}")
    program = build(sanitizers)
    environment = dict(os.environ)
    for variable, words in SUPPRESSIONS.items():
        (tmp_path / variable).write_text(words)
        environment[variable] = f"suppressions={tmp_path / variable}:print_suppressions=0"
    done = subprocess.run(
        [str(program), str(bundles("fp32")), str(THREADS), str(CALLS)], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr[-6000:]}"
    answered = THREADS * CALLS + THREADS // 4 * 3
    assert done.stdout.strip() == f"{answered} answered, {THREADS * CALLS * 3} refused, 0 wrong"
    assert "Sanitizer" not in done.stderr
