"""What the wheels hold, and that they do their work where there is no compiler. `make wheel` makes them, in minutes: heavy."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

import pytest
import wheels

import mra_export
from mra_export import libraries

pytestmark = pytest.mark.heavy
HEADERS = ("mra_attention.h", "mra_threads.h", "mra_session.h", "mra_session.hpp")
KERNELS = {"kernels", "ort_ops", "trt_plugin"}
"""The libraries with the CUDA kernels in them."""
MACHINE = {"x86_64": "Advanced Micro Devices X86-64", "aarch64": "AArch64"}


@pytest.fixture(scope="module", params=wheels.MACHINES)
def machine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def lib(machine: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheels.unpacked(machine, tmp_path_factory.mktemp(machine))


def elf(*options: str | Path) -> str:
    if not shutil.which("readelf"):
        pytest.skip("needs readelf: apt install binutils")
    return subprocess.run(["readelf", "--wide", *options], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("name", libraries.FILES)
def test_a_library(name: str, lib: Path, machine: str) -> None:
    """For its machine; needs glibc 2.28 or older and nothing else; plain C names only; with the kernels of every GPU."""
    report = elf("--file-header", "--sections", "--dynamic", "--dyn-syms", "--version-info", lib / libraries.FILES[name])
    assert re.search(rf"Machine:\s+{MACHINE[machine]}", report)
    assert set(re.findall(r"NEEDED.*\[(\S+?)\.so", report)) <= {
        *("libc", "libm", "libdl", "libpthread", "librt", "ld-linux-x86-64", "ld-linux-aarch64")
    }
    assert not re.findall(r"RPATH|RUNPATH", report)
    needed = [tuple(map(int, version.split("."))) for version in re.findall(r"Name: GLIBC_([0-9.]+)", report)]
    assert max(needed) <= (2, 28)
    exported = {line.split()[7] for line in report.splitlines() if re.search(r" (GLOBAL|WEAK|UNIQUE) +DEFAULT +\d+ ", line)}
    assert all(re.match(r"mra_|RegisterCustomOps$|getCreators$|setLoggerFinder$", symbol) for symbol in exported), exported
    assert bool(exported) == (name != "trt_register")
    assert (".nv_fatbin" in report) == (name in KERNELS)


def test_the_same_names_as_the_build_here(lib: Path) -> None:
    for name, file in libraries.FILES.items():
        own = libraries.find(name)
        if own is not None:
            found = [set(re.findall(r"GLOBAL +DEFAULT +\d+ (\S+)", elf("--dyn-syms", library))) for library in (own, lib / file)]
            assert found[0] == found[1]


def test_a_closed_library_leaves_nothing_for_the_end_of_the_process(lib: Path, machine: str) -> None:
    if machine != os.uname().machine:
        pytest.skip("another machine's: tests/plugins/test_aarch64_wheel.py")
    close = "import _ctypes, sys; _ctypes.dlclose(_ctypes.dlopen(sys.argv[1], 2))"
    for file in libraries.FILES.values():
        done = subprocess.run([sys.executable, "-c", close, lib / file], capture_output=True, text=True)
        assert done.returncode == 0, f"{file}: {done.returncode} {done.stderr}"


def test_what_c_and_cplusplus_programs_need(lib: Path) -> None:
    assert {file.name for file in (lib.parent / "include").iterdir()} == set(HEADERS)
    version = (lib / "cmake/MraExport/MraExportConfigVersion.cmake").read_text()
    assert f'set(PACKAGE_VERSION "{mra_export.__version__}")' in version
    assert f"Version: {mra_export.__version__}\n" in (lib / "pkgconfig/mra_export.pc").read_text()
    targets = (lib / "cmake/MraExport/MraExportTargets.cmake").read_text()
    assert {f"MraExport::{name}" for name in libraries.FILES} <= set(targets.split())
    for file in (lib / "cmake/MraExport").iterdir():  # nothing of the machine that built it
        assert str(wheels.ROOT) not in file.read_text()


def test_metadata(lib: Path) -> None:
    (info,) = lib.parents[1].glob("mra_export-*.dist-info")
    head, _, text = (info / "METADATA").read_text().partition("\n\n")
    metadata = Parser().parsestr(head)
    assert metadata["Version"] == mra_export.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert text == (wheels.ROOT / "README.md").read_text()
    assert {"tensorrt", "tensorrt-rtx", "serve", "plot", "all"} <= set(metadata.get_all("Provides-Extra"))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "tests", ["plugins/test_kernel.py", "plugins/test_ort.py", "plugins/test_ort_cuda.py", "tensorrt", "embed/test_session.py"]
)
def test_a_build_of_another_compiler_passes_the_same_tests(tests: str, tmp_path: Path) -> None:
    lib = wheels.unpacked(os.uname().machine, tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not neon", f"tests/{tests}"]
    environment = {**os.environ, libraries.DIRECTORY_VARIABLE: str(lib)}
    done = subprocess.run(command, cwd=wheels.ROOT, env=environment, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stdout[-5000:]
    assert re.search(r"\d+ passed", done.stdout)


@pytest.mark.timeout(1800)
def test_the_sdist(tmp_path: Path) -> None:
    """It holds all of the repository but the benchmarks' results, and pip makes a wheel of it in another folder."""
    sdist = wheels.DIST / f"mra_export-{mra_export.__version__}.tar.gz"
    if not sdist.is_file():
        pytest.skip(f"no {sdist.name} in dist/: make wheel")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=wheels.ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    assert {name for name in tracked if not name.startswith("benchmarks/results/")} <= held
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, sdist]
    settings = ["-C", "cmake.define.MRA_BUILD_CUDA=OFF"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # pip's cmake and ninja
    subprocess.run([*command, *settings], cwd=tmp_path, env={**os.environ, "PATH": path}, check=True, timeout=1700)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert {f"mra_export/lib/{libraries.FILES[name]}" for name in ("kernels", "ort_ops", "session")} <= set(archive.namelist())


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """use_wheel.py's folder: every command was run from an environment with nothing on PATH."""
    wheel, folder = wheels.path(os.uname().machine), tmp_path_factory.mktemp("used")
    nothing = tmp_path_factory.mktemp("nothing")
    arguments = [wheel, wheels.ROOT / "examples/mra-tiny-python", folder, "--constraints", wheels.ROOT / "constraints.txt"]
    done = subprocess.run(
        [sys.executable, wheels.ROOT / "tests/wheel/use_wheel.py", *arguments],
        env={**os.environ, "PATH": str(nothing)},
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert done.returncode == 0, f"{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
    yield folder
    shutil.rmtree(folder)  # over a gigabyte


@pytest.mark.timeout(1800)
def test_every_command_where_there_is_no_compiler(used: Path) -> None:
    assert list((used / "bundle" / "engines").glob("*.plan"))


@pytest.mark.timeout(1800)
def test_a_cplusplus_program_built_against_the_wheel(used: Path, tmp_path: Path) -> None:
    """hello_mra by find_package, with the machine's own compiler and C++ library, gives the bundle's golden outputs."""
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # pip's cmake
    if missing := [tool for tool in ("cmake", "c++", "make") if not shutil.which(tool, path=path["PATH"])]:
        pytest.skip(f"not on PATH: {', '.join(missing)}")
    place = [used / "venv/bin/python", "-c", "import mra_export as m; print(m.cmake_prefix(), m.onnxruntime_library())"]
    # Elsewhere than in the repository, whose own package would be imported.
    prefix, runtime = subprocess.run(place, cwd=used, check=True, capture_output=True, text=True).stdout.split()
    assert str(used) in prefix
    for command in (
        ["cmake", "-S", wheels.ROOT / "mra_export/embed/examples", "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={prefix}"],
        ["cmake", "--build", tmp_path, "--target", "hello_mra"],
        [tmp_path / "hello_mra", used / "bundle"],
    ):
        environment = {**os.environ, **path, "MRA_ONNXRUNTIME_LIBRARY": runtime}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) > 1
    assert all(line.endswith(": pass") for line in done.stdout.splitlines()), done.stdout
