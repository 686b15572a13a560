"""The build for 64-bit ARM beyond what test_kernel.py runs: the hostile program, the ONNX Runtime adapter, the documentation."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import aarch64
import instruction_sets
import pytest


@pytest.fixture(scope="module")
def built() -> Path:
    return aarch64.build()


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=aarch64.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.parametrize("name", instruction_sets.FLAGS["aarch64"])
def test_hostile_shapes(name: str, built: Path) -> None:
    command = ["env", f"MRA_ATTENTION_CPU_TARGET={name}", *aarch64.EMULATOR, built / "mra_attention_hostile", "40"]
    assert run(*command).strip() == f"{name}: 42 cases"


@pytest.mark.parametrize(
    ("library", "exported"),
    [("libmra_attention.so", "mra_attention_cpu"), ("libmra_ort.so", "RegisterCustomOps")],
)
def test_libraries(built: Path, library: str, exported: str) -> None:
    """For the right machine, with plain C names only, and needing nothing beyond the C and C++ run-time libraries."""
    report = run("aarch64-linux-gnu-readelf", "--wide", "--file-header", "--dynamic", "--dyn-syms", built / library)
    assert re.search(r"Machine:\s+AArch64", report)
    names = set(re.findall(r"(?:GLOBAL|WEAK)\s+DEFAULT\s+\d+ (\S+)", report))
    assert exported in names
    assert not [name for name in names if name.startswith("_Z")]
    needed = set(re.findall(r"NEEDED.*\[(\S+?)\.so", report))
    assert needed <= {"libstdc++", "libm", "libgcc_s", "libc", "libpthread", "ld-linux-aarch64"}


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine="x86_64"))
    with pytest.raises(pytest.skip.Exception, match=r"not on PATH: .*apt install g\+\+-aarch64-linux-gnu.*apt install qemu-user"):
        aarch64.build()
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine="aarch64"))
    with pytest.raises(pytest.skip.Exception, match="its own build is tested"):
        aarch64.build()


def test_documented_commands() -> None:
    if reason := aarch64.missing():
        pytest.skip(reason)
    page = (aarch64.ROOT / "docs" / "kernels.md").read_text()
    (block,) = re.findall(r"^```console title=aarch64\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    commands = re.findall(r"^\$ (.*)", block.replace("\\\n", " "), re.MULTILINE)
    assert len(commands) == 3
    with aarch64.alone():
        outputs = [run("bash", "-euc", command) for command in commands]
    assert outputs[-1] == block.splitlines()[-1] + "\n"
