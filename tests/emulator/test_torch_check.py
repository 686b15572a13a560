"""tests/gpu/torch_check.py, the check that GPU machines run, on the emulated kernels: its checks pass, and they can fail."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import emulated
import gpu_scripts
import pytest
from gpu_scripts import run


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    yield from gpu_scripts.loaded("torch_check")


def test_all_checks_pass_on_the_emulated_kernels(script):
    status, text = run(script)
    assert status == 0, text
    assert text.count("ok   ") == 3, text
    assert text.count("SKIP ") == len(script.CHECKS) - 3, text


def test_a_wrong_gradient_is_a_failure(script, monkeypatch):
    from mra_export.model import op

    right = op.mra_attention_backward
    monkeypatch.setattr(op, "mra_attention_backward", lambda *given: tuple(x * 1.02 for x in right(*given)))
    status, text = run(script, "--only", "values_and_gradients")
    assert status == 1
    assert "the gradient of value differs by" in text


def test_a_refused_launch_is_a_failure(script):
    emulated.library().mra_emulation_fail_after(1)
    status, text = run(script, "--only", "autocast")
    assert status == 1
    assert "a CUDA launch failed" in text
