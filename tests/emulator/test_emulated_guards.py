"""The emulated kernels never touch a byte outside their buffers, their workspace sections or their shared memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import emulated
import pytest

SCRIPT = Path(__file__).with_name("guarded_calls.py")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    emulated.build()  # here, so that the child's time is its own
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(SCRIPT.parent), str(SCRIPT.parents[1])))}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)


@pytest.mark.parametrize("side", ["end", "start"])
def test_buffers_against_inaccessible_pages(side):
    result = run(side)
    assert result.returncode == 0, result.stderr
    assert "7 shapes" in result.stdout


@pytest.mark.parametrize("buffer", ["query", "key", "value", "mask", "context"])
def test_a_buffer_that_is_too_short_is_noticed(buffer):
    result = run("end", "short", buffer)
    assert result.returncode == emulated.FAULT_EXIT, result.stderr
    assert f"past the end of {buffer}" in result.stderr
