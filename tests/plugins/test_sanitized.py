"""The kernel's C++ sources under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, on every instruction set."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import sanitized
from instruction_sets import targets

pytestmark = sanitized.needs_compiler


@pytest.mark.slow
@pytest.mark.parametrize(("sanitizers", "cases"), [("address,undefined", 40), ("thread", 10)])
def test_hostile_shapes_under_sanitizers(sanitizers: str, cases: int, tmp_path: Path) -> None:
    sanitized.need_runtime(sanitizers, tmp_path)
    program = sanitized.build("mra_attention_hostile", sanitizers, "sanitized")
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
