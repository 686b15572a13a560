"""The aarch64 wheel under qemu-user: its libraries load, the kernel computes what its page says, a bundle gives its golden outputs.

`make wheel` makes it, `make test-wheel` runs this: heavy.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import aarch64
import pytest
import wheels
from driven_library import DrivenLibrary
from kernel_cases import DTYPES, check_against_formula, hostile_cases
from oracles import OpCase

from mra_export import kernel, libraries
from mra_export.bundle import file_entry

pytestmark = pytest.mark.heavy
RUNTIME = wheels.ROOT / ".downloads" / "onnxruntime-aarch64" / "onnxruntime" / "capi"
OPEN = """
#include <dlfcn.h>
#include <stdio.h>
int main(int argc, char** argv) {
  for (int n = 1; n < argc; ++n) {
    void* library = dlopen(argv[n], RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) return puts(dlerror()), 1;
    dlclose(library);
  }
  return 0;
}
"""


@pytest.fixture(scope="module")
def lib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := aarch64.missing():
        pytest.skip(reason)
    return wheels.unpacked("aarch64", tmp_path_factory.mktemp("aarch64"))


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def test_every_library_opens_and_closes(lib: Path, tmp_path: Path) -> None:
    (tmp_path / "open.c").write_text(OPEN)
    run("aarch64-linux-gnu-gcc", tmp_path / "open.c", "-o", tmp_path / "open", "-ldl")
    run(*aarch64.EMULATOR, tmp_path / "open", *(lib / file for file in libraries.FILES.values()))


@pytest.fixture(scope="module")
def _driven(lib: Path) -> Iterator[None]:
    """mra_export.kernel calls the wheel's libmra_attention."""
    driven = DrivenLibrary([*aarch64.EMULATOR, "-E", f"LD_LIBRARY_PATH={lib}", aarch64.build() / "mra_attention_driver"])
    with pytest.MonkeyPatch.context() as patch:
        driven.stand_in(patch)
        yield
    driven.close()


@pytest.mark.usefixtures("_driven")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("made", hostile_cases(), ids=str)
def test_the_kernel(made: OpCase, dtype: str) -> None:
    assert kernel.cpu_target() == "neon"
    check_against_formula(made, dtype)


@pytest.mark.parametrize("kind", ["fp32", "fp16"])
def test_a_bundle_by_a_cplusplus_program(kind: str, lib: Path, tmp_path: Path, bundles: Callable[[str], Path]) -> None:
    """hello_mra, the wheel's session and op libraries and ONNX Runtime, all for aarch64."""
    runtimes = list(RUNTIME.glob("libonnxruntime.so*"))
    if not runtimes:
        pytest.skip(f"no libonnxruntime.so in {RUNTIME}: make test-wheel gets it")
    source = wheels.ROOT / "mra_export/embed/examples/hello_mra.cc"
    compiler = ["aarch64-linux-gnu-g++", "-std=c++17", source, "-o", tmp_path / "hello_mra", "-I", lib.parent / "include"]
    run(*compiler, "-L", lib, "-lmra_session", f"-Wl,-rpath,{lib}")
    bundle = _with_op_library(bundles(kind), tmp_path / "bundle", lib / libraries.FILES["ort_ops"])
    variable = f"MRA_ONNXRUNTIME_LIBRARY={runtimes[0]}"
    lines = run(*aarch64.EMULATOR, "-E", variable, tmp_path / "hello_mra", bundle).splitlines()
    assert lines
    assert all(line.endswith(": pass") for line in lines), lines


def _with_op_library(bundle: Path, to: Path, library: Path) -> Path:
    """A copy as an export on the library's machine writes it."""
    shutil.copytree(bundle, to)
    name = f"lib/{library.name}"
    shutil.copy(library, to / name)
    manifest = json.loads((to / "manifest.json").read_text())
    manifest["files"][name] = file_entry(to / name).model_dump()
    (to / "manifest.json").write_text(json.dumps(manifest))
    return to
