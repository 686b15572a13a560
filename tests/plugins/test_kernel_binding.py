"""The Python side of the CPU kernel: whose threads it uses, which arrays, libraries and instruction sets it takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import instruction_sets
import numpy as np
import pytest
from chosen_target import chosen, why_not
from kernel_cases import case

from mra_export import kernel, libraries
from mra_export.contract import Attributes
from mra_export.errors import ContractError, PluginLoadError

pytestmark = pytest.mark.skipif(not kernel.available(), reason="libmra_attention is not built: pip install -e .")


def test_pool_is_the_loaded_openmp_runtime() -> None:
    """In a process with torch its own pool is used; in one without any runtime, threads are started instead."""
    code = """
import sys
{before}
from mra_export import kernel
import numpy as np
from mra_export.contract import Attributes
x = np.ones((1, 64, 16), np.float32)
out = kernel.attention(x, x, x, np.ones((1, 64)), Attributes(2, 4, 0.35), num_threads=2)
assert np.allclose(out, 1, atol=1e-5)
print(kernel._openmp("torch" in sys.modules) is not None)
"""
    for before, expected in (("", "False"), ("import torch", "True")):
        done = subprocess.run([sys.executable, "-c", code.format(before=before)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == expected


def test_refused_arrays() -> None:
    made = case(2, 40, 2, 8, 2)
    q, k, v, m = made.arrays
    refused = [
        ((q[0], k, v, m), "query has shape"),
        ((q, k[:, 1:], v, m), "key has shape"),
        ((q, k, v[:1], m), "value has shape"),
        ((q, k, v, m[:, 1:]), "mask has shape"),
        ((q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], m), "multiple of num_heads"),
        ((q[:, :, :8], k[:, :, :8], v[:, :, :8], m), "head size is 4"),
        ((q[:0], k[:0], v[:0], m[:0]), "batch and length must be 1 or more"),
        ((q, k.astype(np.float16), v, m), "key is of type float16"),
        ((q.astype(np.float64), k.astype(np.float64), v.astype(np.float64), m), "query is of type float64"),
    ]
    for arrays, message in refused:
        with pytest.raises(ContractError, match=message):
            kernel.attention(*arrays, made.attributes)
    with pytest.raises(ContractError, match="num_threads"):
        kernel.attention(*made.arrays, made.attributes, num_threads=0)
    with pytest.raises(ContractError, match="dtype is 'int8'"):
        kernel.make_params(made.attributes, "int8", 1, 1, 8)


def test_not_contiguous_arrays_and_bool_mask() -> None:
    made = case(2, 50, 2, 16, 3, "holes")
    expected = kernel.attention(*made.arrays, made.attributes)
    strided = [np.asfortranarray(x) for x in made.arrays[:3]]
    assert kernel.attention(*strided, made.mask.astype(bool), made.attributes).tobytes() == expected.tobytes()


def test_unusable_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(libraries.DIRECTORY_VARIABLE, str(tmp_path))
    kernel.library.cache_clear()
    try:
        assert not kernel.available()
        with pytest.raises(PluginLoadError, match=r"libmra_attention\.so is not in .*pip install"):
            kernel.library()
        (tmp_path / "libmra_attention.so").write_bytes(b"not a library")
        assert kernel.available()
        with pytest.raises(PluginLoadError, match=r"does not load: .*rebuild it"):
            kernel.library()
    finally:
        kernel.library.cache_clear()


def test_the_instruction_set_is_one_that_the_tests_know() -> None:
    assert kernel.cpu_target() in instruction_sets.NAMES, "add it to instruction_sets.py, so that every test runs on it"


@pytest.mark.parametrize("name", instruction_sets.NAMES)
def test_each_instruction_set_attends(name: str, tmp_path: Path) -> None:
    """test_kernel.py runs on each that this machine can run or emulate; what it leaves out is skipped here, with the reason."""
    if reason := why_not(name):
        pytest.skip(f"nothing is tested on {name}: {reason}")
    x = np.ones((1, 4, 8), np.float32)
    with chosen(name, tmp_path):
        np.testing.assert_allclose(kernel.attention(x, x, x, np.ones((1, 4)), Attributes(1, 1, 0.25)), x, atol=1e-5)


@pytest.mark.parametrize("name", ["sse9", "neon" if os.uname().machine == "x86_64" else "avx512"])
def test_an_instruction_set_that_is_not_there_is_refused(name: str) -> None:
    code = """
from mra_export import errors, kernel
import numpy as np
from mra_export.contract import Attributes
x = np.ones((1, 4, 8), np.float32)
for call in (kernel.cpu_target, lambda: kernel.attention(x, x, x, np.ones((1, 4)), Attributes(1, 1, 0.25))):
    try:
        call()
    except errors.MraExportError as error:
        print(type(error).__name__, error)
"""
    environment = {**os.environ, "MRA_ATTENTION_CPU_TARGET": name}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith(f"PluginLoadError MRA_ATTENTION_CPU_TARGET is '{name}'")
    assert second.startswith("ContractError MRA_ATTENTION_CPU_TARGET names an instruction set")
