"""The MRA authors' own CUDA kernels, as transformers 4.37.2 shipped them in source, compiled for the torch at hand.

    python benchmarks/authors_kernels.py

fetches the source where there is a network; it needs pip only. The Python around them is transformers' own, of the version that is
installed. They know float32 and lengths that are a multiple of 32 only, and need a budget that is a multiple of 4.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from mra_export.contract import Attributes

ROOT = Path(__file__).resolve().parents[1]
WHEEL = "transformers==4.37.2"
INSIDE = "transformers/kernels/mra/"
SOURCES = ROOT / ".downloads" / "authors-mra"
FILES = ("cuda_kernel.cu", "cuda_launch.cu", "torch_extension.cpp")
FETCH = "python benchmarks/authors_kernels.py"
LONGEST = 48 * 1024 // 4
"""Their row-maximum kernel keeps a float for each token in shared memory and does not ask for more than the default 48 KB."""


class LeftOutError(Exception):
    """The kernels cannot be run here; the text says why."""


def fetch() -> None:
    """Download the sources into SOURCES. Raises CalledProcessError with pip's own words where there is no network."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        SOURCES.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith(INSIDE):
                    (SOURCES / Path(name).name).write_bytes(archive.read(name))


def compile_kernels(build: Path) -> Any:
    """The compiled extension module, from `build` if it is there already. Raises LeftOutError."""
    missing = [name for name in FILES if not (SOURCES / name).is_file()]
    if missing:
        raise LeftOutError(f"{SOURCES.relative_to(ROOT)} has no {', '.join(missing)}: where there is a network, run {FETCH}")
    _python_around()
    import torch

    try:
        from torch.utils.cpp_extension import load

        build.mkdir(parents=True, exist_ok=True)
        return load("mra_authors_kernels", [str(SOURCES / name) for name in FILES], build_directory=str(build), verbose=False)
    except Exception as error:  # nvcc, ninja, the host compiler, torch's own checks: each raises its own
        raise LeftOutError(f"they do not compile with torch {torch.__version__}: {_cause(error)}") from error


def prepare(kernels: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, attributes: Attributes) -> Callable[[], Tensor]:
    """A call of their attention on inputs in their layout. query, key, value: (B, N, H * D) of any float type; mask: (B, N).

    kernels: what compile_kernels gives. The call returns (B, N, H * D) float32. Raises LeftOutError for what they cannot run.
    """
    batch, length, hidden = query.shape
    heads = attributes.num_heads
    if length % 32 or attributes.num_blocks % 4:
        raise LeftOutError(f"N {length}, K {attributes.num_blocks}: they need a multiple of 32, and of 4")
    if length > LONGEST:
        raise LeftOutError(f"N {length}: their row-maximum kernel cannot be launched above {LONGEST}")
    if attributes.scale != 1 / math.sqrt(hidden // heads):
        raise LeftOutError(f"scale {attributes.scale}: they scale by 1 / sqrt(head size)")
    upstream = _python_around()
    upstream.mra_cuda_kernel = kernels
    split = [x.float().view(batch, length, heads, -1).transpose(1, 2).contiguous() for x in (query, key, value)]
    real = (mask != 0).float().repeat_interleave(heads, 0)  # (B * H, N)

    def call() -> Tensor:
        context = upstream.mra2_attention(
            *split,
            real,
            attributes.num_blocks,
            attributes.approx_mode,
            initial_prior_first_n_blocks=attributes.initial_prior_first_n_blocks,
            initial_prior_diagonal_n_blocks=attributes.initial_prior_diagonal_n_blocks,
        )
        return context.transpose(1, 2).reshape(batch, length, hidden)

    return call


def _python_around() -> Any:
    """transformers' MRA module, which calls the kernels."""
    if find_spec("transformers") is None:
        raise LeftOutError("transformers is not installed: pip install transformers")
    try:
        from transformers.models.mra import modeling_mra
    except Exception as error:
        raise LeftOutError(f"transformers' MRA does not load: {error}") from error
    if not hasattr(modeling_mra, "mra_cuda_kernel"):
        raise LeftOutError("this transformers calls the kernels in a way that is not known here: 4.51 to 5.23 are")
    return modeling_mra


def _cause(error: Exception) -> str:
    """The first line that a compiler called an error, else the last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), lines[-1] if lines else type(error).__name__)


if __name__ == "__main__":
    fetch()
