"""libmra_trt_register.so, opened as Triton opens it and preloaded, before a stand-in for TensorRT and in a real registry."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from engines import bring_plugin, need_plugin, with_engines

from mra_export import libraries
from mra_export.contract import PLUGIN_NAME, PLUGIN_NAMESPACE, PLUGIN_VERSION
from mra_export.serve.triton import TritonOptions, write_repository

HERE = Path(__file__).resolve().parent
REGISTER, PLUGIN = libraries.FILES["trt_register"], libraries.FILES["trt_plugin"]
without_tensorrt = pytest.mark.skipif(
    ctypes.util.find_library("nvinfer") is not None, reason="the loader finds a TensorRT on this machine"
)
TRITON = "os.RTLD_NOW | os.RTLD_LOCAL"
"""How Triton's tensorrt backend opens what `plugins=` names; it never closes it."""
SERVER = f"""\
import ctypes, os, sys
def open(path):
    return ctypes.CDLL(path, {TRITON})
{{}}
print("the server goes on")
"""


def server(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code that has open(path), in a process of its own: what a library registers stays registered."""
    kept = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "LD_LIBRARY_PATH")}
    done = subprocess.run(
        [sys.executable, "-c", SERVER.format(code)], capture_output=True, text=True, timeout=120, env={**kept, **environment}
    )
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr}"
    assert done.stdout.endswith("the server goes on\n")
    return done


def message(done: subprocess.CompletedProcess[str]) -> str:
    """The one line on stderr."""
    (line,) = done.stderr.splitlines()
    assert line.startswith("libmra_trt_register: ")
    return line


@pytest.fixture(scope="session")
def built(tensorrt_headers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with libnvinfer.so.10, libnvinfer.so.11, a plugin library and one of another version."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler: install g++")
    folder = tmp_path_factory.mktemp("stand-in")
    for name, definitions in (
        ("libnvinfer.so.10", []),
        ("libnvinfer.so.11", ["-DSTAND_IN_11"]),
        (PLUGIN, ['-DPLUGIN_VERSION="1"']),
        ("libother.so", ['-DPLUGIN_VERSION="2"']),
    ):
        flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-deprecated-declarations", "-Wno-overloaded-virtual"]
        includes = [f"-I{HERE / 'host'}", "-isystem", str(tensorrt_headers)]
        output = ["-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name)]
        source = str(HERE / "stand_in_nvinfer.cc")
        subprocess.run([compiler, *flags, *includes, *definitions, source, *output, "-ldl"], check=True)
    return folder


@pytest.fixture
def register(built: Path, tmp_path: Path) -> Path:
    """libmra_trt_register.so with a plugin library beside it, as in a model repository."""
    (tmp_path / "models").mkdir()
    shutil.copy(built / PLUGIN, tmp_path / "models")
    return Path(shutil.copy(libraries.require("trt_register"), tmp_path / "models" / REGISTER))


def asked(library: str) -> str:
    """Code that prints the stand-in's creators and what it was asked."""
    return (
        f"nvinfer = open({library!r}); nvinfer.stand_in_record.restype = ctypes.c_char_p\n"
        "print(nvinfer.stand_in_creators(), nvinfer.stand_in_record().decode().split(chr(10))[:-1])"
    )


@pytest.mark.parametrize("soname", ["libnvinfer.so.10", "libnvinfer.so.11"])
def test_opened_as_triton_does_it_registers_the_plugin_once(built: Path, register: Path, soname: str) -> None:
    """TensorRT is there as the backend's dependency, in a namespace of its own. Closing and opening again changes nothing."""
    close = "import _ctypes; [(_ctypes.dlclose(library._handle), open(path)) for path in (%r,) for library in (open(path),)]"
    done = server(f"open({str(built / soname)!r})\n{close % str(register)}\n{asked(soname)}")
    assert done.stderr == ""
    assert done.stdout.splitlines()[0] == f"1 {['load ' + str(register.with_name(PLUGIN)), 'get ' + PLUGIN_NAME]}"


@pytest.mark.parametrize("soname", ["libnvinfer.so.10", "libnvinfer.so.11"])
def test_preloaded_it_opens_tensorrt_itself(built: Path, register: Path, tmp_path: Path, soname: str) -> None:
    (tmp_path / "tensorrt").mkdir()
    shutil.copy(built / soname, tmp_path / "tensorrt")
    done = server(asked(soname), LD_PRELOAD=str(register), LD_LIBRARY_PATH=str(tmp_path / "tensorrt"))
    assert done.stderr == ""
    assert done.stdout.splitlines()[0] == f"1 {['load ' + str(register.with_name(PLUGIN)), 'get ' + PLUGIN_NAME]}"


def test_preloaded_and_opened_it_registers_once(built: Path, register: Path) -> None:
    done = server(f"open({str(register)!r})\n{asked('libnvinfer.so.10')}", LD_PRELOAD=str(register), LD_LIBRARY_PATH=str(built))
    assert done.stderr == ""
    assert done.stdout.startswith("1 ['load ")


def test_a_tensorrt_that_is_loaded_goes_before_one_that_can_be_found(built: Path, register: Path) -> None:
    loaded, other = "libnvinfer.so.11", "libnvinfer.so.10"
    done = server(
        f"open({str(built / loaded)!r})\nopen({str(register)!r})\n{asked(loaded)}\n{asked(other)}", LD_LIBRARY_PATH=str(built)
    )
    assert done.stderr == ""
    assert [line[0] for line in done.stdout.splitlines()[:2]] == ["1", "0"]


def test_both_of_two_loaded_tensorrts_get_the_plugin(built: Path, register: Path) -> None:
    both = [str(built / soname) for soname in ("libnvinfer.so.10", "libnvinfer.so.11")]
    done = server(f"[open(path) for path in {both}]\nopen({str(register)!r})\n" + "\n".join(map(asked, both)))
    assert done.stderr == ""
    assert [line[0] for line in done.stdout.splitlines()[:2]] == ["1", "1"]


def test_a_plugin_that_is_registered_already_stays(built: Path, register: Path, tmp_path: Path) -> None:
    """By the same library: as asked. By another build of it: said, for its engines may differ."""
    shutil.copytree(register.parent, tmp_path / "second")
    second = tmp_path / "second" / REGISTER
    nvinfer = str(built / "libnvinfer.so.10")
    done = server(f"open({nvinfer!r})\nopen({str(register)!r})\nopen({str(second)!r})\n{asked(nvinfer)}")
    assert f"already there, from {register.with_name(PLUGIN)}, so {second.with_name(PLUGIN)} is not used" in message(done)
    assert done.stdout[0] == "1"
    second.with_name(PLUGIN).unlink()
    second.with_name(PLUGIN).symlink_to(register.with_name(PLUGIN))
    done = server(f"open({nvinfer!r})\nopen({str(register)!r})\nopen({str(second)!r})\n{asked(nvinfer)}")
    assert done.stderr == ""
    assert done.stdout[0] == "1"


@without_tensorrt
def test_without_tensorrt_it_says_so(register: Path) -> None:
    for done in (server(f"open({str(register)!r})"), server("", LD_PRELOAD=str(register))):
        assert "no TensorRT 10 or 11 (libnvinfer.so.10: cannot open" in message(done)
        assert "on LD_LIBRARY_PATH" in message(done)


@without_tensorrt
def test_tensorrt_rtx_is_left_alone(built: Path, register: Path, tmp_path: Path) -> None:
    """Its registry is laid out as TensorRT 11's, and its functions have the same names."""
    rtx = shutil.copy(built / "libnvinfer.so.11", tmp_path / "libtensorrt_rtx.so.1")
    Path(rtx).write_bytes(Path(rtx).read_bytes().replace(b"libnvinfer.so.11\0", b"libtensorrt_rtx\0\0"))  # its soname
    done = server(f"ctypes.CDLL({str(rtx)!r}, os.RTLD_NOW | os.RTLD_GLOBAL)\nopen({str(register)!r})\n{asked(str(rtx))}")
    assert "no TensorRT 10 or 11" in message(done)
    assert done.stdout.startswith("0 []")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"STAND_IN": "refuse"}, ["libnvinfer.so.10 does not take", PLUGIN, "--embed-plugin"]),
        ({"STAND_IN": "no registry"}, ["libnvinfer.so.10 has no plugin registry", "reinstall"]),
        ({"STAND_IN": "throw"}, ["registry failed (out of luck)", "--embed-plugin"]),
        ({"STAND_IN": "throw a number"}, ["registry failed:", "--embed-plugin"]),
        ({"STAND_IN_VERSION": "10701"}, ["libnvinfer.so.10 says that its version is 10701, not TensorRT 10"]),
        ({"STAND_IN_VERSION": "110000"}, ["version is 110000, not TensorRT 10", "knows TensorRT 10 and 11"]),
    ],
)
def test_a_tensorrt_that_refuses_is_named(built: Path, register: Path, environment: dict[str, str], words: list[str]) -> None:
    done = server(f"open({str(built / 'libnvinfer.so.10')!r})\nopen({str(register)!r})", **environment)
    assert all(word in message(done) for word in words), done.stderr


def test_a_plugin_library_that_does_not_fit_is_named(built: Path, register: Path) -> None:
    code = f"open({str(built / 'libnvinfer.so.10')!r})\nopen({str(register)!r})"
    plugin = register.with_name(PLUGIN)
    plugin.write_bytes(b"not a library")
    assert f"{plugin} does not open ({plugin}: " in message(server(code))
    shutil.copy(libraries.require("kernels"), plugin)
    assert f"{plugin} is no TensorRT plugin library, it has no getCreators" in message(server(code))
    shutil.copy(built / "libother.so", plugin)
    assert f"{plugin} brings no plugin MraAttention version '1'" in message(server(code))
    plugin.unlink()
    assert "No such file or directory): put the libmra_trt.so of the engine's bundle beside this library" in message(server(code))


def test_something_else_of_tensorrts_name_is_named(register: Path, built: Path, tmp_path: Path) -> None:
    other = tmp_path / "libnvinfer.so.10"
    subprocess.run(["cc", "-shared", "-x", "c", "/dev/null", "-Wl,-soname,libnvinfer.so.10", "-o", str(other)], check=True)
    done = server(f"open({str(other)!r})\nopen({str(register)!r})")
    assert "libnvinfer.so.10 has no getPluginRegistry" in message(done)


def test_the_built_plugin_library_is_registered(built: Path, register: Path) -> None:
    """The real one, and the name and version that the register library looks for are its own."""
    shutil.copy(need_plugin(), register.with_name(PLUGIN))
    nvinfer = str(built / "libnvinfer.so.10")
    done = server(f"open({nvinfer!r})\nopen({str(register)!r})\n{asked(nvinfer)}")
    assert done.stderr == ""
    assert done.stdout.startswith("1 ['load ")


def test_the_start_command_of_a_model_repository_registers_its_plugin(bundles, built: Path, tmp_path: Path) -> None:
    bundle = bring_plugin(with_engines(bundles("fp32"), tmp_path / "bundle"), (built / PLUGIN).read_bytes())
    target = tmp_path / "repository"
    write_repository(bundle, target, TritonOptions("tensorrt", mount=str(target)))
    readme = (target / "README.md").read_text()
    opened, preloaded = (re.search(f"{option}=([^ \n]+)", readme)[1] for option in ("tensorrt,plugins", "LD_PRELOAD"))
    nvinfer = str(built / "libnvinfer.so.10")
    wanted = f"1 {['load ' + str(target / 'mra' / '1' / PLUGIN), 'get ' + PLUGIN_NAME]}"
    assert server(f"open({nvinfer!r})\nopen({opened!r})\n{asked(nvinfer)}").stdout.splitlines()[0] == wanted
    done = server(asked("libnvinfer.so.10"), LD_PRELOAD=preloaded, LD_LIBRARY_PATH=str(built))
    assert done.stdout.splitlines()[0] == wanted


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="no tensorrt_rtx: pip install tensorrt_rtx_cu13")
def test_a_real_registry_laid_out_as_tensorrt_11s_takes_the_plugin(register: Path, tmp_path: Path) -> None:
    """TensorRT-RTX's own registry, behind a library that says that it is TensorRT 11: what is relied on of TensorRT's ABI holds."""
    shutil.copy(need_plugin(), register.with_name(PLUGIN))
    source, nvinfer = tmp_path / "nvinfer.cc", tmp_path / "libnvinfer.so.11"
    source.write_text(
        """\
#include <dlfcn.h>
extern "C" int getInferLibVersion() { return 110000; }
extern "C" void* getPluginRegistry() {
  void* library = dlopen("libtensorrt_rtx.so.1", RTLD_LAZY | RTLD_NOLOAD);
  return reinterpret_cast<void* (*)()>(dlsym(library, "getPluginRegistry"))();
}
"""
    )
    subprocess.run(["c++", "-shared", "-fPIC", str(source), f"-Wl,-soname,{nvinfer.name}", "-o", str(nvinfer), "-ldl"], check=True)
    done = server(
        f"""\
import tensorrt_rtx as trt
def ours():
    return [c for c in trt.get_plugin_registry().all_creators if c.name == {PLUGIN_NAME!r}]
assert not ours()
open({str(nvinfer)!r})
open({str(register)!r})
(creator,) = ours()
print(creator.plugin_version, repr(creator.plugin_namespace))
"""
    )
    assert "libmra_trt_register" not in done.stderr
    assert done.stdout.splitlines()[0] == f"{PLUGIN_VERSION} {PLUGIN_NAMESPACE!r}"
