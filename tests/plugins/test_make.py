"""What the Makefile says and chooses: parts left out and why, the nvcc to build with, where torch comes from."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mra_export import libraries
from mra_export.errors import PluginLoadError

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ROOT / "mra_export" / "plugins" / "make"


def helper(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, HELPERS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def executable(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


# What was left out


def left_out_by_cmake(folder: Path, *options: str, **environment: str) -> dict[str, str]:
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["cmake", "-G", "Ninja", "-S", str(ROOT / "mra_export" / "plugins"), "-B", str(folder), *options]
    done = subprocess.run(
        command, env={**os.environ, "PATH": programs, **environment}, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = (folder / "left_out.txt").read_text().splitlines()
    for line in lines:
        assert f"left out: {line}" in done.stdout
    return dict(line.split(": ", 1) for line in lines)


def test_cmake_tells_why_a_part_is_left_out(tmp_path: Path) -> None:
    reasons = left_out_by_cmake(tmp_path, "-DMRA_BUILD_CUDA=OFF", "-DMRA_BUILD_SESSION=OFF")
    assert reasons == {
        "cuda": "MRA_BUILD_CUDA is OFF",
        "trt_plugin": "it needs the CUDA kernels: MRA_BUILD_CUDA is OFF",
        "session": "MRA_BUILD_SESSION is OFF",
    }


def test_cmake_names_the_nvcc_that_does_not_work_and_looks_again_the_next_time(tmp_path: Path) -> None:
    broken = executable(tmp_path / "a folder" / "nvcc", "exit 1")
    reasons = left_out_by_cmake(tmp_path / "build", CUDACXX=str(broken))
    assert reasons["cuda"].startswith(f"{broken} compiles nothing here with ")
    assert str(broken) in reasons["trt_plugin"]
    nvcc = helper("find_nvcc").find()
    if nvcc is not None:
        assert "cuda" not in left_out_by_cmake(tmp_path / "build", CUDACXX=str(nvcc))


def test_a_library_that_the_build_left_out_is_missed_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(libraries.DIRECTORY_VARIABLE, str(tmp_path))
    assert libraries.left_out() == {}
    (tmp_path / "left_out.txt").write_text("cuda: no nvcc: none at all\ntrt_plugin: no headers\n")
    assert libraries.left_out() == {"cuda": "no nvcc: none at all", "trt_plugin": "no headers"}
    with pytest.raises(PluginLoadError, match=r"libmra_trt\.so is not in .* \(the build went without: no headers\): build it with"):
        libraries.require("trt_plugin")


def test_the_list_names_every_part_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "left_out.txt").write_text("cuda: no nvcc\n")

    def told() -> str:
        environment = {**os.environ, libraries.DIRECTORY_VARIABLE: str(tmp_path)}
        command = [sys.executable, str(HELPERS / "left_out.py")]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=True).stdout

    lines = told().splitlines()
    assert lines[0].startswith("Left out here")
    assert "  CUDA kernels, for PyTorch and ONNX Runtime on a GPU: no nvcc" in lines
    (tmp_path / "left_out.txt").write_text("")
    assert not any("CUDA kernels" in line for line in told().splitlines())


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            "WARNING: old\nERROR: Could not find it\nERROR: No matching distribution\n\n[notice] a new pip\n",
            "ERROR: No matching distribution",
        ),
        ("WARNING: Retrying (Retry(total=0)) after connection broken by 'X'\nERROR: none", "the package index cannot be reached"),
        ("No space left", "No space left"),
        ("", "it could not be installed"),
    ],
)
def test_pips_last_error_is_the_reason(said: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "some part").write_text(said)
    assert list(helper("left_out").not_installed(tmp_path)) == [("some part", reason)]


def test_an_optional_command_that_fails_is_remembered_until_it_succeeds(tmp_path: Path) -> None:
    def run(command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", str(HELPERS / "optional.sh"), "a part", "sh", "-c", command],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    kept = tmp_path / ".venv" / "left-out" / "a part"
    done = run("echo there; echo oh no >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr, kept.read_text()) == (1, "there\n", "oh no\n", "oh no\n")
    done = run("echo a warning >&2")
    assert (done.returncode, done.stderr, kept.exists()) == (0, "a warning\n", False)


@pytest.mark.parametrize("target", ["test", "demo"])
@pytest.mark.parametrize("status", [0, 3])
def test_the_list_ends_both_commands_whatever_their_outcome(tmp_path: Path, target: str, status: int) -> None:
    """The Makefile with a stand-in for .venv's Python, in a folder with a space in its name."""
    clone = tmp_path / "a clone"
    shutil.copytree(ROOT / "mra_export" / "plugins", clone / "mra_export" / "plugins", ignore=shutil.ignore_patterns("third_party"))
    (clone / "mra_export" / "embed").mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, clone)
    executable(clone / "examples" / "demo.sh", "echo the job", f"exit {status}")
    executable(
        clone / ".venv" / "bin" / "python",
        f'case "$*" in *pytest*) echo the job; exit {status};; *left_out*) echo "left out";; esac',
    )
    for name in (".venv/pyvenv.cfg", ".venv/packages", ".venv/tensorrt", ".venv/installed"):
        (clone / name).touch()
    shutil.copytree(ROOT / "tests" / "old", clone / "tests" / "old")
    (clone / "tests" / "deploy").mkdir()
    for name in ("onnxruntime", "transformers"):
        (clone / ".downloads" / name).mkdir(parents=True)
    make = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(["make", target], cwd=clone, env=make, capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout.splitlines()[:2] == ["the job", "left out"], done.stderr
    assert done.returncode == (2 if status else 0)  # make's own: 2 for a command that failed
    assert (f"Error {status}" in done.stderr) is bool(status)


# What is chosen


def test_an_nvcc_that_is_here_was_built_with() -> None:
    nvcc = helper("find_nvcc").find()
    if nvcc is None:
        pytest.skip("no nvcc of CUDA 12.8 or newer: pip install 'nvidia-cuda-nvcc<13.1', as the Makefile does")
    assert {"cuda", "session_tensorrt", "trt_plugin"}.isdisjoint(libraries.left_out()), f"there is {nvcc}"
    assert libraries.require("trt_plugin").is_file()


def test_an_nvcc_that_is_too_old_does_not_hide_a_newer_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_nvcc = helper("find_nvcc")
    old = executable(tmp_path / "path" / "nvcc", 'echo "Cuda compilation tools, release 12.0, V12.0.1"')
    new = executable(
        tmp_path / "site packages" / "nvidia" / "cu13" / "bin" / "nvcc", 'echo "Cuda compilation tools, release 13.0, V13"'
    )
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setenv("PATH", f"{old.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(find_nvcc, "TOOLKIT", tmp_path / "none")
    monkeypatch.setattr(find_nvcc.sysconfig, "get_path", lambda name: str(tmp_path / "empty"))
    assert find_nvcc.find() is None
    monkeypatch.setattr(find_nvcc.sysconfig, "get_path", lambda name: str(tmp_path / "site packages"))
    assert find_nvcc.find() == new
    monkeypatch.setenv("CUDACXX", str(old))
    assert find_nvcc.find() == old  # asked for: CMake says what is wrong with it


@pytest.mark.parametrize(
    ("given", "gpu", "reachable", "index", "words"),
    [
        (None, False, True, "https://download.pytorch.org/whl/cpu", "CPU build from https://download.pytorch.org/whl/cpu (0.2 GB)"),
        (None, False, False, "", "plain package (2.7 GB, most of it CUDA's libraries): https://download.pytorch.org/whl/cpu"),
        (None, True, True, "", "for this machine's NVIDIA GPU (2.7 GB"),
        ("https://a.example/simple", True, True, "https://a.example/simple", "from TORCH_INDEX=https://a.example/simple"),
        ("", False, True, "", "TORCH_INDEX is empty"),
    ],
)
def test_where_torch_comes_from(
    given: str | None,
    gpu: bool,
    reachable: bool,
    index: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    torch, ran = helper("install_torch"), []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        ran.append(command[4:])
        return subprocess.CompletedProcess(command, 1 if "--no-index" in command else 0)

    if given is None:
        monkeypatch.delenv("TORCH_INDEX", raising=False)
    else:
        monkeypatch.setenv("TORCH_INDEX", given)
    monkeypatch.setattr(torch, "has_gpu", lambda: gpu)
    monkeypatch.setattr(torch, "reachable", lambda index: reachable)
    monkeypatch.setattr(torch.subprocess, "run", run)
    torch.install(["--quiet"])
    fetched = [["--quiet", "--no-deps", "--index-url", index, "torch"]] if index else []
    assert ran[-1 - len(fetched) :] == [*fetched, ["--quiet", "torch"]]
    assert words in capfd.readouterr().out


def test_a_torch_that_lies_here_is_taken_without_a_word(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    torch, ran = helper("install_torch"), []
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    monkeypatch.setattr(torch, "has_gpu", lambda: False)
    monkeypatch.setattr(
        torch.subprocess, "run", lambda command, **_: ran.append(command[4:]) or subprocess.CompletedProcess(command, 0)
    )
    torch.install([])
    assert ran == [["--no-index", "--no-deps", "torch"], ["torch"]]
    assert capfd.readouterr().out == ""


def test_an_index_without_an_answer_is_unreachable_within_seconds() -> None:
    assert helper("install_torch").reachable("http://127.0.0.1:1/whl/cpu") is False
