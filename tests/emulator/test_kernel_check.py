"""tests/gpu/kernel_check.py, the check that GPU machines run, on the emulated kernels: its checks pass, and they can fail."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import emulated
import gpu_scripts
import pytest
from gpu_scripts import run


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    yield from gpu_scripts.loaded("kernel_check")


def test_all_checks_pass_on_the_emulated_kernels(script):
    status, text = run(script)
    assert status == 0, text
    assert text.count("ok   ") == len(script.CHECKS) - 2, text
    assert "SKIP graph" in text
    assert "SKIP streams" in text


def test_a_refused_launch_is_a_failure(script):
    emulated.library().mra_emulation_fail_after(2)
    status, text = run(script, "--only", "ties")
    assert status == 1
    assert "FAIL ties: status 13: a CUDA launch failed" in text


def test_a_wrong_value_is_a_failure(script, monkeypatch):
    right = script.launch

    def wrong(device, params, inputs, context, workspace):
        right(device, params, inputs, context, workspace)
        context[0, 0, 0] += 1e-3

    monkeypatch.setattr(script, "launch", wrong)
    status, text = run(script, "--only", "ties")
    assert status == 1
    assert "times the tolerance" in text


def test_a_write_outside_the_context_is_a_failure(script, monkeypatch):
    right = script.launch

    def wrong(device, params, inputs, context, workspace):
        right(device, params, inputs, context, workspace)
        size = context.numel()
        context.as_strided((size + 1,), (1,))[size] = 0

    monkeypatch.setattr(script, "launch", wrong)
    status, text = run(script, "--only", "ties")
    assert status == 1
    assert "the kernel wrote outside context" in text


def test_without_a_gpu_it_says_why_it_does_nothing(script, monkeypatch):
    monkeypatch.setattr(script.torch.cuda, "is_available", lambda: False)
    lines: list[str] = []
    assert script.main([], lines.append) == script.SKIPPED
    assert "torch finds no CUDA GPU" in "".join(lines)
