"""Which builds of the CPU kernel this machine can run."""

import os
from pathlib import Path


def targets() -> list[str]:
    if os.uname().machine in ("aarch64", "arm64"):
        return ["neon"]
    flags = Path("/proc/cpuinfo").read_text().split()
    avx2 = "avx2" in flags and "fma" in flags
    avx512 = all(f"avx512{part}" in flags for part in ("f", "bw", "dq", "vl"))
    return ["baseline", *(["avx2"] if avx2 else []), *(["avx512"] if avx512 else [])]
