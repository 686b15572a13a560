"""Installs PyTorch, its CPU build on a machine without an NVIDIA GPU (gigabytes less), and says first what is downloaded.

    .venv/bin/python mra_export/plugins/make/install_torch.py OPTIONS_OF_PIP_INSTALL...

The environment variable TORCH_INDEX names the package index to take it from; empty means pip's own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# torch 2.13.0 and what it needs, by the index's sizes of December 2026, for x86-64.
CPU_SIZE = "0.2 GB"
PLAIN_SIZE = "2.7 GB, most of it CUDA's libraries"
PLAIN = ""
"""The index that pip is configured for."""


def choose() -> tuple[str, str]:
    """The index to take torch from, and the line that says so."""
    given = os.environ.get("TORCH_INDEX")
    if given is not None:
        return (
            given,
            f"PyTorch from TORCH_INDEX={given}" if given else f"PyTorch, the plain package ({PLAIN_SIZE}): TORCH_INDEX is empty",
        )
    if has_gpu():
        return PLAIN, f"PyTorch for this machine's NVIDIA GPU ({PLAIN_SIZE})"
    if reachable(CPU_INDEX):
        return CPU_INDEX, f"PyTorch's CPU build from {CPU_INDEX} ({CPU_SIZE}): there is no NVIDIA GPU"
    return PLAIN, f"PyTorch, the plain package ({PLAIN_SIZE}): {CPU_INDEX} with the CPU build ({CPU_SIZE}) cannot be reached"


def has_gpu() -> bool:
    if os.path.exists("/dev/nvidia0") or os.path.exists("/proc/driver/nvidia"):
        return True
    command = shutil.which("nvidia-smi")
    return command is not None and subprocess.run([command, "-L"], capture_output=True, timeout=60, check=False).returncode == 0


def reachable(index: str) -> bool:
    # In a process of its own: nothing else bounds the time that a name server takes.
    ask = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=4)"
    try:
        return (
            subprocess.run([sys.executable, "-c", ask, f"{index}/torch/"], capture_output=True, timeout=6, check=False).returncode
            == 0
        )
    except subprocess.TimeoutExpired:
        return False


def install(options: Sequence[str]) -> None:
    """Raises CalledProcessError where pip fails, after pip's own words."""
    pip = [sys.executable, "-m", "pip", "install", *options]
    if os.environ.get("TORCH_INDEX") or has_gpu() or not lies_here(pip):
        index, line = choose()
        print(f"  {line}", flush=True)
        if index != PLAIN:
            subprocess.run([*pip, "--no-deps", "--index-url", index, "torch"], check=True)
    subprocess.run([*pip, "torch"], check=True)  # and what torch needs, from pip's own index


def lies_here(pip: Sequence[str]) -> bool:
    """Whether torch was there already or in a folder that pip is configured for (find-links): then it is installed now."""
    return subprocess.run([*pip, "--no-index", "--no-deps", "torch"], capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
    try:
        install(sys.argv[1:])
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
