"""nvcc compiles the kernels for every architecture without a warning, and no kernel spills a register. Needs nvcc, no GPU."""

from __future__ import annotations

import fcntl
import hashlib
import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import programs
import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "mra_export" / "plugins" / "cuda" / "mra_attention_cuda.cu"
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
FLAGS = (
    "-std=c++17",
    "-O3",
    "--Werror=all-warnings",
    "-Xcompiler=-Wall,-Wextra,-Wshadow,-Werror",
    f"-I{SOURCE.parents[1] / 'include'}",
)

# An SM has 65536 registers: enough for 2 CTAs of the 256 threads of logits and low resolution (1 at 128 dimensions of float32), for
# 1 of the 512 of select, 2 of its 256, for 9, 7 and 4 of the 64 of attend on tensor cores, and for 4 (6 with 168 registers)
# of the 64 of attend with float32 products.
MOST_REGISTERS = {
    "Pool": 96,
    "Logit": 128,
    "Select 2": 128,
    "Select 4": 128,
    "Select 8": 128,
    "SelectMany": 128,
    "Low 64": 128,
    "Low 128": 168,
    "AttendMma 32": 104,
    "AttendMma 64": 144,
    "AttendMma 128": 208,
    "AttendFma 32": 232,
    "AttendFma 64": 255,
    "AttendFma 128": 168,
    "AttendFma 256": 255,
    "AttendTf 32": 180,
    "AttendTf 64": 232,
    "AttendTf 128": 232,
    "ExportSelection": 64,
}
INSTANCES = {
    "Pool": 3,
    "Logit": 1,
    **{f"Select {tile}": 2 for tile in (2, 4, 8)},
    "SelectMany": 1,
    "Low 64": 2,
    "Low 128": 2,
    "AttendMma 32": 2,
    "AttendMma 64": 4,
    "AttendMma 128": 4,  # the wide ones also with loads of single elements
    # With loads of 16 bytes and of single elements; the widest one also for 16-bit types.
    "AttendFma 32": 1,
    "AttendFma 64": 2,
    "AttendFma 128": 2,
    "AttendFma 256": 4,
    "AttendTf 32": 1,
    "AttendTf 64": 2,
    "AttendTf 128": 2,
    "ExportSelection": 1,
}
"""Kernel, and its last template number (select: logits of a thread in each direction; others: padded head size) -> how many."""


@dataclass(frozen=True)
class Compiled:
    """What ptxas says of one kernel. stack, spill_stores, spill_loads: bytes per thread."""

    kernel: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


def find_nvcc() -> str:
    found = programs.nvcc()
    if found is None:
        pytest.skip("no nvcc: put it on PATH, set CUDACXX, or pip install nvidia-cuda-nvcc")
    return str(found)


@cache
def known_architectures() -> frozenset[str]:
    listed = subprocess.run([find_nvcc(), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    return frozenset(re.findall(r"sm_(\d+)", listed))


def compile_log(*arguments: str) -> str:
    """What nvcc and ptxas say; kept in build/nvcc, since a compilation takes ten seconds. Fails where nvcc does."""
    nvcc = find_nvcc()
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256("\0".join((version, *FLAGS, *arguments)).encode())
    for folder in (SOURCE.parent, SOURCE.parents[1] / "include", SOURCE.parents[1] / "common"):
        for path in sorted(folder.glob("*")):
            if path.is_file():
                digest.update(path.name.encode() + path.read_bytes())
    kept = ROOT / "build" / "nvcc"
    kept.mkdir(parents=True, exist_ok=True)
    log, output = kept / f"{digest.hexdigest()[:16]}.log", kept / f"{digest.hexdigest()[:16]}.out"
    with log.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not log.exists():
            command = [nvcc, *FLAGS, *arguments, "-o", str(output), str(SOURCE)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            output.unlink(missing_ok=True)
            assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"
            log.write_text(result.stdout + result.stderr)
    return log.read_text()


def parse(log: str) -> list[Compiled]:
    """ptxas -v, one entry for each kernel."""
    found = []
    for part in log.split("Compiling entry function")[1:]:
        name = re.search(r"'_ZN3mra\d+([A-Za-z]+)Kernel(\w*)'", part)
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert name is not None, part
        assert frame is not None, part
        assert registers is not None, part
        size = re.search(r"Li(\d+)E", name[2])
        kernel = f"{name[1]} {size[1]}" if size else name[1]
        found.append(Compiled(kernel, int(registers[1]), *(int(x) for x in frame.groups())))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills(architecture):
    if architecture not in known_architectures():
        pytest.skip(f"{find_nvcc()} does not know sm_{architecture}")
    kernels = parse(compile_log("-cubin", f"-arch=sm_{architecture}", "-Xptxas=-v"))
    assert {name: sum(k.kernel == name for k in kernels) for name in {k.kernel for k in kernels}} == INSTANCES
    for kernel in kernels:
        assert kernel.stack == kernel.spill_stores == kernel.spill_loads == 0, kernel
        assert kernel.registers <= MOST_REGISTERS[kernel.kernel], kernel


@pytest.mark.slow
def test_host_code_and_ptx_compile_without_a_warning():
    newest = max(known_architectures() & set(ARCHITECTURES), key=int)
    log = compile_log("-c", "-Xcompiler=-fPIC", f"-gencode=arch=compute_{newest},code=compute_{newest}")
    assert log.strip() == ""


def test_a_spill_would_be_seen():
    log = """ptxas info    : Compiling entry function '_ZN3mra12AttendKernelI6__halfLi64EEEvNS_7ProblemE' for 'sm_90'
ptxas info    : Function properties for _ZN3mra12AttendKernelI6__halfLi64EEEvNS_7ProblemE
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers
"""
    assert parse(log) == [Compiled("Attend 64", 64, 16, 12, 8)]
