"""libmra_session under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer: many threads through one session."""

from __future__ import annotations

import os
import subprocess

import pytest
import sanitized

pytestmark = sanitized.needs_compiler
THREADS, CALLS = 8, 6

# ONNX Runtime and the bundle's op library are not instrumented: what they do with memory that only they see is not judged here.
# The kernel has its own test (tests/plugins/test_sanitized.py).
SUPPRESSIONS = {
    "TSAN_OPTIONS": "race:libonnxruntime\nrace:libmra_ort\nmutex:libonnxruntime\ndeadlock:libonnxruntime\n",
    "LSAN_OPTIONS": "leak:libonnxruntime\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_many_threads_through_one_session_under_sanitizers(bundles, sanitizers, tmp_path) -> None:
    sanitized.need_runtime(sanitizers, tmp_path)
    program = sanitized.build("mra_session_threads", sanitizers, "session")
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
