"""Makes the sdist and the wheels for Linux with glibc 2.28 or newer, in dist/: what `make wheel` runs, on any x86-64 Linux.

    python mra_export/plugins/wheel/build.py --tools .downloads/wheel --machine x86_64 --machine aarch64

--tools: where the packages of requirements.txt are, and in aarch64/ that architecture's nvidia-cuda-runtime.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
BUILD = ROOT / "build" / "wheel"
DIST = ROOT / "dist"
MACHINES = ("x86_64", "aarch64")
LIBRARIES = ("libmra_attention.so", "libmra_ort.so", "libmra_trt.so", "libmra_trt_register.so", "libmra_session.so")
"""Each wheel holds all of them; test_libraries.py compares with mra_export/libraries.py."""
WITH_KERNELS = LIBRARIES[:3]
PLATFORM = "manylinux_2_28"
AUDITWHEEL = """
import platform, sys
machine = sys.argv.pop(1)
platform.machine = lambda: machine
from auditwheel.main import main
sys.exit(main())
"""
"""It reads wheels of every machine, but takes a platform only of the one that it believes to be on."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", type=Path, required=True)
    parser.add_argument("--machine", choices=MACHINES, action="append")
    options = parser.parse_args()
    shutil.rmtree(DIST, ignore_errors=True)
    tools = options.tools.resolve()
    run(tools, sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", DIST)
    for machine in options.machine or MACHINES:
        wheel = repaired(tools, built(tools, machine), machine)
        check(wheel)
        print(f"{wheel.relative_to(ROOT)}: {wheel.stat().st_size / 1e6:.1f} MB")
    run(tools, sys.executable, "-m", "twine", "check", "--strict", *sorted(DIST.iterdir()))


def built(tools: Path, machine: str) -> Path:
    """The wheel as the build gives it, for machine."""
    folder = BUILD / machine
    for old in folder.glob("*.whl"):
        old.unlink()
    settings = {
        "build-dir": folder / "cmake",
        "cmake.args": f"--toolchain=cmake/zig-{machine}.cmake",
        "cmake.define.MRA_BUILD_CUDA": "ON",
        "install.strip": "false",  # done by the linker: this machine's strip knows its own architecture only
    }
    run(
        *(tools, sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder),
        *(f"-C{name}={value}" for name, value in settings.items()),
        CUDACXX=str(cuda(tools, machine) / "bin" / "nvcc"),
        _PYTHON_HOST_PLATFORM=f"linux-{machine}",
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def cuda(tools: Path, machine: str) -> Path:
    """CUDA with this machine's compiler and machine's libraries."""
    own = tools / "nvidia" / "cu13"
    if machine == os.uname().machine:
        return own
    folder = BUILD / machine / "cuda"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(own, folder, symlinks=True, ignore=shutil.ignore_patterns("lib*.a", "libcudart.so*"))
    for library in (tools / machine / "nvidia" / "cu13" / "lib").glob("lib*.a"):
        shutil.copy(library, folder / "lib")
    return folder


def repaired(tools: Path, wheel: Path, machine: str) -> Path:
    """The wheel in DIST, named for the oldest glibc that it runs with. Ends the program where it needs a newer one."""
    before = set(DIST.iterdir())
    auditwheel = (sys.executable, "-c", AUDITWHEEL, machine)
    run(tools, *auditwheel, "repair", "--plat", f"{PLATFORM}_{machine}", "--only-plat", "--wheel-dir", DIST, wheel)
    (made,) = set(DIST.iterdir()) - before
    return made


def check(wheel: Path) -> None:
    """Ends the program where a library is missing or was built without its CUDA kernels: CMake leaves out what it cannot build."""
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        for library in LIBRARIES:
            name = f"mra_export/lib/{library}"
            if name not in held:
                sys.exit(f"{wheel.name} has no {name}: the output of CMake above says why it was left out")
            if library in WITH_KERNELS and b".nv_fatbin" not in archive.read(name):
                sys.exit(f"{wheel.name}: {name} was built without its CUDA kernels: the output of CMake above says why")


def run(tools: Path, *command: str | Path, **environment: str) -> None:
    """Runs it in the repository with the packages of tools and nothing else of this machine's Python."""
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), str(tools / "bin"), os.environ["PATH"]]),
        "PYTHONPATH": str(tools),
        "ZIG_GLOBAL_CACHE_DIR": str(BUILD / "zig"),
        **environment,
    }
    done = subprocess.run([str(part) for part in command], cwd=ROOT, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(str(part) for part in command)} ended with {done.returncode}")


if __name__ == "__main__":
    main()
