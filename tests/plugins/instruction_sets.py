"""The instruction sets that the CPU kernel is built for, and which of them this machine has."""

import os
from dataclasses import dataclass
from pathlib import Path

_AVX2 = ("avx2", "bmi1", "bmi2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_AVX512_BF16 = (*_AVX512, "avx512_bf16", "avx512_vnni", "avx512vbmi", "avx512_vbmi2", "avx512_bitalg", "gfni", "vaes")
FLAGS = {
    "x86_64": {
        "baseline": (),
        "avx2": _AVX2,
        "avx512": _AVX512,
        "avx512_bf16": _AVX512_BF16,
        "amx_bf16": (*_AVX512_BF16, "amx_tile", "amx_bf16"),
    },
    "aarch64": {"neon": ()},
}
"""Machine -> name for MRA_ATTENTION_CPU_TARGET -> the flags that /proc/cpuinfo must show."""

NAMES = [name for names in FLAGS.values() for name in names]


@dataclass(frozen=True)
class Target:
    """emulated: about ten times slower, so tests make fewer rounds."""

    name: str
    emulated: bool


def targets() -> list[str]:
    """The ones that this machine can run itself."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    return [name for name, needed in FLAGS.get(os.uname().machine, {}).items() if flags.issuperset(needed)]
