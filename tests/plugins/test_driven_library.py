"""What stands between the tests and an emulated kernel: a kernel that misbehaves, built for this machine, must not get past it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from driven_library import DrivenLibrary
from kernel_cases import case

from mra_export import kernel
from mra_export.errors import ContractError

ROOT = Path(__file__).resolve().parents[2]

# Copies query to context; num_threads says what else it does. 40 tokens of 2 heads of 8.
KERNEL = """
#include <cstring>

#include "mra_attention.h"
#include "mra_threads.h"

const char* mra_attention_cpu_target() { return nullptr; }
int32_t mra_attention_contract_version() { return 77; }
const char* mra_status_string(MraStatus status) { return status == MRA_ERROR_CUDA ? "what: fix" : "?"; }
void mra_parallel_for_openmp(void*, int64_t, void (*)(void*, int64_t), void*) {}
void mra_parallel_for_std(void*, int64_t, void (*)(void*, int64_t), void*) {}
MraStatus mra_attention_cpu_workspace_size(const MraAttentionParams*, int32_t, size_t* bytes) {
  *bytes = 100;
  return MRA_OK;
}
MraStatus mra_attention_cpu(const MraAttentionParams*, const void* query, const void* key, const void* value, const int32_t*,
                            void* context, void* workspace, size_t, const MraThreads* threads) {
  const size_t size = 40 * 16 * sizeof(float);
  std::memcpy(context, query, size);
  switch (threads->num_threads) {
    case 2: static_cast<char*>(context)[-1] = 0; break;
    case 3: static_cast<char*>(context)[size] = 0; break;
    case 4: *static_cast<char*>(const_cast<void*>(key)) ^= 1; break;
    case 5: static_cast<char*>(workspace)[101] = 0; break;
    case 6: return static_cast<const volatile char*>(value)[size] ? MRA_ERROR_CUDA : MRA_OK;
    case 7: return MRA_ERROR_CUDA;
  }
  return MRA_OK;
}
MraStatus mra_attention_cpu_selection(const MraAttentionParams*, const void*, const void*, const int32_t*, uint8_t*, float*, void*,
                                      size_t, const MraThreads*) { return MRA_ERROR_NOT_BUILT; }
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("c++"):
        pytest.skip("needs a C++ compiler: apt install g++")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "kernel.cc").write_text(KERNEL)
    command = ["c++", "-std=c++17", "-pthread", "-I", str(ROOT / "mra_export/plugins/include"), "-o", str(folder / "driver")]
    sources = [str(ROOT / "tests/cpp/mra_attention_driver.cc"), str(folder / "kernel.cc"), "-ldl"]
    done = subprocess.run([*command, *sources], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / "driver"


@pytest.fixture
def library(program: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DrivenLibrary]:
    driven = DrivenLibrary([program])
    driven.stand_in(monkeypatch)
    yield driven
    driven.close()


def run(num_threads: int) -> None:
    made = case(1, 40, 2, 8, 2)
    context = kernel.attention(*made.arrays, made.attributes, num_threads=num_threads)
    np.testing.assert_array_equal(context, made.query)


def test_answers_come_back(library: DrivenLibrary) -> None:
    assert library.mra_attention_cpu_target() is None
    assert library.mra_attention_contract_version() == 77
    run(1)
    with pytest.raises(ContractError, match="what: fix"):
        run(7)


@pytest.mark.parametrize(
    ("num_threads", "message"),
    [
        (2, "^context was written outside its bounds$"),
        (4, "^key is an input and was written$"),
        (5, "^workspace was written outside its bounds$"),
        (3, "the driver ended with status -11"),
        (6, "the driver ended with status -11"),
    ],
)
def test_misbehaviour_is_noticed(num_threads: int, message: str, library: DrivenLibrary) -> None:
    with pytest.raises(AssertionError, match=message):
        run(num_threads)
    if "ended" in message:
        with pytest.raises(AssertionError, match="the driver ended"):  # no later call waits for an answer
            run(1)
