"""What `make gpu-check` runs, as far as a machine without a GPU can say: its programs on emulated kernels, its build, its words."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mra_export import gpu

ROOT = Path(__file__).resolve().parents[1]
GPU_TESTS = ROOT / "tests" / "gpu"
PLUGINS = ROOT / "mra_export" / "plugins"
ORCHESTRATOR = ROOT / "benchmarks" / "gpu_check.py"
no_gpu = pytest.mark.skipif(bool(gpu.devices()), reason="this machine has a GPU")


@pytest.fixture(scope="module")
def modules() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a script of benchmarks/, tests/gpu, tests/emulator or tests/model by its name."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in ("benchmarks", "tests/gpu", "tests/emulator", "tests/model"):
            patch.syspath_prepend(ROOT / folder)
        yield importlib.import_module


@pytest.fixture(scope="module")
def check(modules: Callable[[str], ModuleType]) -> ModuleType:
    return modules("gpu_check")


@pytest.fixture(scope="module")
def emulated(modules: Callable[[str], ModuleType]) -> Path:
    """The library with the emulated kernels."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler: install g++")
    return Path(modules("emulated").build())


def run(command: list[Any], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, env={**os.environ, **environment}, timeout=300
    )


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


# ---- The command


@no_gpu
def test_without_a_gpu_it_says_so_in_one_line():
    result = run([sys.executable, "-S", ORCHESTRATOR])
    assert result.returncode == 2
    assert result.stdout.count("\n") == 1
    assert result.stdout.startswith(f"gpu-check: nothing was run: {gpu.why_none()}")
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "tests"], "invalid choice: 'tests'"),
        (["--minutes", "0"], "--minutes is 0: it must be above 0"),
        (["--architecture", "9.0", "--only", "build"], "write compute capability 9.0 as 90"),
    ],
)
def test_a_wrong_argument_is_refused(check, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        check.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_no_compiler_is_said_before_anything_is_run(check, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nvcc"))
    monkeypatch.setattr(check, "TOOLKIT", tmp_path)
    lines: list[str] = []
    assert check.main(["--only", "build", "--architecture", "90"], lines.append) == 2
    assert "no nvcc: put it on PATH or set CUDACXX" in "".join(lines)


@pytest.mark.slow
def test_the_build_it_makes_works(check, monkeypatch):
    (step,) = (step for step in check.STEPS if step.name == "build")
    monkeypatch.setattr(check, "STEPS", (replace(step, seconds=500),))  # other tests hold the other core
    try:
        check.find_nvcc(), check.find_cmake()
    except check.CannotStartError as reason:
        pytest.skip(str(reason))
    folder = ROOT / "build" / "gpu-check-test"
    lines: list[str] = []
    assert check.main(["--only", "build", "--architecture", "90", "--build", str(folder)], lines.append) == 0, "".join(lines)
    assert "gpu-check: ok: 1 of 1 steps ran" in lines[-1]
    with_plugin = "with the TensorRT plugin" in "".join(lines)
    assert (folder / "libmra_attention.so").is_file()
    assert (folder / "libmra_trt.so").is_file() == with_plugin
    for program in ["sanitizer_driver", *(["plugin_check"] if with_plugin else [])]:
        if not gpu.devices():  # linked, loaded, and stopped by the first call that needs a GPU
            result = run([folder / program])
            assert result.returncode == 1
            assert "FAIL cudaStreamCreateWithFlags" in result.stderr


# ---- Steps: what they say when they fail or lack something


def workplace(check: ModuleType, build: Path, seconds: float = 20) -> Any:
    return check.Workplace(build, nvcc=build / "bin" / "nvcc", cmake=("cmake",), architecture="90", seconds=seconds)


def test_a_step_that_hangs_is_stopped_with_all_it_started(check, tmp_path):
    check.ROOT, root = tmp_path, check.ROOT
    try:
        started = time.monotonic()
        marker = tmp_path / "survivor"
        child = f"sleep 2; touch {marker}"
        with pytest.raises(check.FailedError, match=r"not done after 1 s; last output: begun; log: logs/hang.txt"):
            workplace(check, tmp_path, seconds=1).run("hang", ["sh", "-c", f"echo begun; sh -c '{child}' & wait"])
        assert time.monotonic() - started < 2
        time.sleep(max(0.0, started + 2.5 - time.monotonic()))
        assert not marker.exists()
        assert "begun" in (tmp_path / "logs" / "hang.txt").read_text()
    finally:
        check.ROOT = root


@pytest.mark.parametrize(
    ("script", "error", "text"),
    [
        ("echo 'ok   one'; echo 'FAIL two: wrong'; echo 1 failed; exit 1", "FailedError", r"two: wrong \(exit status 1; log: "),
        ("echo 'SKIP all: no GPU'; exit 77", "LeftOutError", "^no GPU$"),
        ("exit 3", "FailedError", "it said nothing"),
    ],
)
def test_how_a_check_ended_is_told(check, tmp_path, script, error, text):
    with pytest.raises(getattr(check, error), match=text):
        workplace(check, tmp_path).check("name", ["sh", "-c", script])


def test_steps_left_out_say_what_is_missing(check, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    place = workplace(check, tmp_path)
    with pytest.raises(check.LeftOutError, match=r"compute-sanitizer is neither on PATH nor beside nvcc: it comes with"):
        check.sanitizer(place, "memcheck")
    with pytest.raises(check.LeftOutError, match=r"no TensorRT headers; set TENSORRT_ROOT, or.*fetch_headers.py"):
        check.plugin(place)


@pytest.mark.parametrize("step", ["kernels", "benchmark", "authors", "models"])
def test_a_python_without_packages_is_told_not_tripped_over(step, tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ORCHESTRATOR.parent)!r}); import gpu_check as c; from pathlib import Path\n"
        f"place = c.Workplace(Path({str(tmp_path)!r}), Path('nvcc'), ('cmake',), '90', 9.0)\n"
        f"try: c.{step}(place)\n"
        "except c.LeftOutError as reason: print(reason)"
    )
    result = run([sys.executable, "-S", "-c", code])
    assert result.stderr == ""
    assert "has no numpy, torch" in result.stdout
    assert "pip install numpy torch" in result.stdout


@pytest.mark.parametrize("script", ["model_check.py", "engine_check.py", "ort_check.py", "torch_check.py"])
def test_a_check_without_packages_is_left_out(script):
    result = run([sys.executable, "-S", GPU_TESTS / script], PYTHONPATH=str(ROOT))
    assert (result.returncode, result.stderr) == (77, "")
    assert result.stdout.startswith(f"SKIP all: {sys.executable} has no numpy, torch, transformers")
    assert "pip install numpy torch transformers" in result.stdout


@no_gpu
def test_a_check_without_a_gpu_is_left_out(check, tmp_path):
    with pytest.raises(check.LeftOutError, match="finds no CUDA GPU"):
        workplace(check, tmp_path).script("benchmark", "benchmarks/gpu_attention.py")


def executable(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


def test_a_toolkit_is_found_behind_a_wrapper(check, monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(check, "TOOLKIT", tmp_path / "cuda")
    nvcc = executable(tmp_path / "bin" / "nvcc")
    assert check.find_toolkit(nvcc) == tmp_path
    executable(tmp_path / "cuda" / "include" / "cuda_runtime.h")
    assert check.find_toolkit(nvcc) == tmp_path / "cuda"
    assert check.find_sanitizer(nvcc) is None
    sanitizer = executable(tmp_path / "cuda" / "bin" / "compute-sanitizer")
    assert check.find_sanitizer(nvcc) == sanitizer


def test_the_command_from_steps_to_files(check, monkeypatch, tmp_path):
    """A GPU in name only: the programs it would start are shell scripts."""
    monkeypatch.setattr(check.gpu, "devices", lambda: (gpu.Gpu("Made Up 9000", "9.0"),))
    monkeypatch.setattr(check, "TOOLKIT", tmp_path)
    monkeypatch.setattr(check, "_TORCH", "print('{}')")  # importing torch takes seconds
    monkeypatch.setenv("CUDACXX", str(executable(tmp_path / "nvcc", "echo release 13.0")))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    executable(tmp_path / "cmake")
    tool = executable(tmp_path / "compute-sanitizer", 'echo "$@"', "echo 33 shapes, all right", "echo ERROR SUMMARY: 0 errors")
    executable(tmp_path / "build" / "plugin_check", "echo 'ok   one'", "echo 0 failed")
    arguments = ["--only", "plugin", "--only", "memcheck", "--build", str(tmp_path / "build"), "--out", str(tmp_path / "out")]
    lines: list[str] = []
    assert check.main(arguments, lines.append) == 0, "".join(lines)
    text = "".join(lines)
    assert text.startswith("Made Up 9000, sm_90, nvcc 13.0, torch ")
    assert "[1/2] TensorRT plugin, driven directly (at most 60 s)\n      ok, " in text
    assert ": 1 checks ok, driven directly\n" in text
    assert text.endswith("gpu-check: ok: 2 of 2 steps ran, 0 left out\n")
    assert "--tool memcheck --error-exitcode 1 --leak-check full" in (tmp_path / "build" / "logs" / "memcheck.txt").read_text()
    (page,) = (tmp_path / "out").glob("gpu-made-up-9000-*.md")
    assert "| compute-sanitizer memcheck | ok |" in page.read_text()
    assert "Not measured in this run." in page.read_text()
    assert json.loads(page.with_suffix(".json").read_text())["machine"]["compute_capability"] == "9.0"

    tool.write_text("#!/bin/sh\necho 'FAIL B 1: wrong'\nexit 1\n")
    assert check.main(arguments, lines.append) == 1
    assert lines[-1] == "gpu-check: FAILED: compute-sanitizer memcheck\n"


CLEAN = ["========= COMPUTE-SANITIZER", "33 shapes, all right", "========= ERROR SUMMARY: 0 errors"]


def test_a_clean_sanitizer_run_passes(check):
    assert check.sanitizer_verdict(CLEAN) == "ERROR SUMMARY: 0 errors, over 33 shapes"
    race = [*CLEAN[:2], "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"]
    assert check.sanitizer_verdict(race).startswith("RACECHECK SUMMARY: 0 hazards")


@pytest.mark.parametrize(
    ("lines", "error", "text"),
    [
        ([*CLEAN[:2], "========= ERROR SUMMARY: 2 errors"], "FailedError", "ERROR SUMMARY: 2 errors"),
        ([*CLEAN[:2], "========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)"], "FailedError", "1 hazard"),
        (["FAIL B 1: 7.00 of the tolerance", CLEAN[2]], "FailedError", "7.00 of the tolerance; ERROR SUMMARY"),
        (CLEAN[1:2], "FailedError", "without its summary"),
        ([CLEAN[0], CLEAN[2]], "FailedError", "without its summary"),
        ([], "FailedError", "no output"),
        (["========= Error: Device not supported", "FAIL cudaMalloc: unknown"], "LeftOutError", "does not work on this machine"),
    ],
)
def test_anything_else_does_not(check, lines, error, text):
    with pytest.raises(getattr(check, error), match=text):
        check.sanitizer_verdict(lines)


def steps_of(check: ModuleType, **outcomes: Any) -> list[Any]:
    def step(name: str, outcome: Any) -> Any:
        def act(place: Any) -> Any:
            if isinstance(outcome, Exception):
                raise outcome
            return check.Outcome(outcome)

        return check.Step(name, name, 20, act)

    return [step(name, outcome) for name, outcome in outcomes.items()]


@pytest.mark.parametrize(
    ("outcomes", "status", "text"),
    [
        ({"build": "fine", "kernels": "fine"}, 0, "ok: 2 of 2 steps ran, 0 left out"),
        ({"build": "fine", "kernels": "fine", "engine": ("LeftOutError", "no TensorRT")}, 0, "ok: 2 of 3 steps ran, 1 left out"),
        ({"build": "fine", "kernels": ("LeftOutError", "no torch")}, 1, "the kernel tests did not run: no torch"),
        ({"build": "fine", "kernels": "fine", "model": ("FailedError", "wrong")}, 1, "FAILED: model"),
        ({"build": ("FailedError", "nvcc"), "kernels": "never run"}, 1, "FAILED: build"),
    ],
)
def test_the_exit_status(check, tmp_path, outcomes, status, text):
    made = {n: getattr(check, o[0])(o[1]) if isinstance(o, tuple) else o for n, o in outcomes.items()}
    steps = steps_of(check, **made)
    lines: list[str] = []
    done = check.run_steps(steps, lambda step: workplace(check, tmp_path), lines.append)
    assert check.verdict(done, steps)[0] == status
    assert text in check.verdict(done, steps)[1]
    assert len(lines) == 2 * len(steps)
    if isinstance(made["build"], Exception):
        assert "left out, 0.0 s: the build failed" in lines[-1]


def test_a_step_does_not_begin_when_the_time_is_over(check, tmp_path):
    place = workplace(check, tmp_path, seconds=1)
    lines: list[str] = []
    done = check.run_steps(steps_of(check, kernels="never run"), lambda step: place, lines.append)
    assert done[0]["detail"] == "no time is left: pass more with --minutes"


# ---- Results


def contestant(how: str, graph: float | None = None, calls: float | None = None, left_out: str = "") -> dict[str, Any]:
    times = {
        kind: {"median": t, "lower_quartile": t - 1, "upper_quartile": t + 1, "fastest": t - 2, "calls": 9, "unit": "us"}
        for kind, t in (("graph", graph), ("calls", calls))
        if t is not None
    }
    return {"how": how, "left_out": left_out, "times_us": times}


def row(dtype: str, goal: float | None, **contestants: Any) -> dict[str, Any]:
    shape = {"model": "base-512-4", "batch": 8, "length": 4096, "num_blocks": 512, "goal": goal, "dtype": dtype}
    launch = {
        "contestant": "ours",
        "kernel": "PoolKernel<float>",
        "measured_us": 36.0,
        "launch": "pool",
        "expected_us": 35.1,
        "bound": "HBM",
    }
    shape |= {"roofline_us": 25.0, "expected_us": 48.0, "launches": [launch]}
    return {**shape, "contestants": {name.replace("_", " "): c for name, c in contestants.items()}}


RESULT = {
    "date": "2001-02-03",
    "machine": {"gpu": "Made Up 9000", "nvcc": "13.0", "driver": None},
    "steps": [{"name": "build", "title": "build", "status": "ok", "seconds": 12.34, "detail": "a | b"}],
    "benchmark": {
        "gpu": "NVIDIA H200",
        "skipped": ["base-512-4 B 8 N 16384 float32: the GPU has too little memory"],
        "ceilings": {"bytes_per_us": 4.2e6, "flops_per_us": {"bfloat16": 7.9e8}},
        "rows": [
            row(
                "bfloat16",
                120.0,
                ours=contestant("mra_attention_cuda", 50.0, 60.0),
                sdpa=contestant("torch chose flash, error 1e-03", 500.0, 510.0),
                sdpa_cudnn=contestant("cudnn", 400.0, 410.0),
                sdpa_efficient=contestant("efficient", left_out="no kernel"),
                flex=contestant("same blocks", 75.0),
            ),
            row(
                "float32",
                120.0,
                ours=contestant("mra_attention_cuda", 100.0, 110.0),
                ours_tf32x3=contestant("mra_attention_cuda", 80.0),
                sdpa=contestant("torch chose efficient", 2000.0),
                authors=contestant("float32", calls=1500.0),
            ),
        ],
    },
}


def test_the_table(modules):
    page = modules("gpu_report").markdown(RESULT)
    assert page.startswith("# GPU check: Made Up 9000, 2001-02-03")
    assert "| driver | not known |" in page
    assert "| build | ok | 12.3 | a \\| b |" in page
    assert "copy 4.20 TB/s, bfloat16 product 790 TFLOP/s" in page
    narrow, wide = (line for line in page.splitlines() if line.startswith("| base-512-4 |"))
    assert narrow == (
        "| base-512-4 | 8 | 4096 | 512 | 50.0 (49.0-51.0) | - | 60.0 (59.0-61.0) | - | 50% | 48.0 | 500 (499-501) (flash) "
        "| 400 (399-401) (cudnn) | 8.0x | 75.0 (74.0-76.0) | 1.5x | 1500 (1499-1501) | 30.0x |"
    )
    assert "| 80.0 (79.0-81.0) | 25% | 48.0 | 2000 (1999-2001) (efficient) | 2000 (1999-2001) (efficient) | 20.0x | - | - |" in wide
    assert "| base-512-4, B 8, N 4096 | float32 | ours: PoolKernel<float> | pool | 36.0 | 35.1 | HBM |" in page
    assert "- sdpa efficient, bfloat16: no kernel" in page
    assert "- base-512-4 B 8 N 16384 float32: the GPU has too little memory" in page
    columns = {line.count("|") - line.count("\\|") for line in page.splitlines() if line.startswith(("| base-512-4 |", "| blocks"))}
    assert columns == {18}


def test_the_goals_are_judged(modules):
    report = modules("gpu_report")
    rows = RESULT["benchmark"]["rows"]
    assert report.goals(rows, "NVIDIA H200") == [
        ("base-512-4, B 8, N 4096, graph", "120 us", "50.0 us", "met"),
        ("base-512-4, B 8, N 4096, best dense takes", "8x", "8.0x", "met"),
        ("base-512-4, B 8, N 4096, float32, the authors' kernels take", "30x", "15.0x", "missed"),
    ]
    assert {verdict for *_, verdict in report.goals(rows, "NVIDIA L40S")} == {"not judged: this is not an H200"}
    one = {**rows[0], "batch": 1, "goal": 12.0, "contestants": {"ours": contestant("", graph=9.0, calls=20.0)}}
    one["contestants"]["ours"]["times_us"]["one"] = {**one["contestants"]["ours"]["times_us"]["graph"], "median": 12.5}
    assert report.goals([one], "NVIDIA H200") == [("base-512-4, B 1, N 4096, graph of one call", "12 us", "12.5 us", "missed")]
    wrong = {**rows[0], "contestants": {"ours": contestant("", left_out="wrong")}}
    assert {verdict for *_, verdict in report.goals([wrong], "NVIDIA H200")} == {"not measured"}


def test_a_wrong_kernel_has_no_times(modules):
    broken = json.loads(json.dumps(RESULT))
    broken["benchmark"]["rows"][0]["contestants"]["ours"] = contestant("", left_out="wrong, so not timed")
    page = modules("gpu_report").markdown(broken)
    assert "| base-512-4 | 8 | 4096 | 512 | - | - | - | - | - | 48.0 | 500 (499-501) (flash) | 400 (399-401) (cudnn) | - |" in page
    assert "- ours, bfloat16: wrong, so not timed" in page


def test_a_run_without_a_benchmark_says_that_nothing_was_measured(modules):
    assert "Not measured in this run." in modules("gpu_report").markdown({**RESULT, "benchmark": None})


def test_the_table_of_models(modules):
    timed = contestant("error 1e-03", graph=2000.0, calls=2500.0)
    row = {"preset": "base-512-4", "batch": 8, "length": 512, "dtype": "float16", "peer": "mra torch", **timed}
    row |= {"tokens_per_second": 2048000.0, "vs_dense": 1.5}
    missing = {**row, "peer": "mra tensorrt", **contestant("", left_out="not installed")}
    page = modules("gpu_report").markdown({**RESULT, "models": {"layers": None, "rows": [row, missing]}})
    assert "| base-512-4 | 8 | 512 | float16 | mra torch | 2.50 (2.50-2.50) | 2.00 (2.00-2.00) | 2048000 | 1.50x |" in page
    assert "- mra tensorrt, float16: not installed" in page
    assert "## Whole models" not in modules("gpu_report").markdown(RESULT)


def test_results_are_written_under_the_gpus_name(check, tmp_path):
    json_path, page = check.save(RESULT, tmp_path / "results")
    assert (json_path.name, page.name) == ("gpu-made-up-9000-2001-02-03.json", "gpu-made-up-9000-2001-02-03.md")
    assert json.loads(json_path.read_text()) == RESULT


# ---- The programs on the emulated kernels


FLAGS = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-DMRA_CUDA_EMULATION")
INCLUDES = (*(f"-I{PLUGINS / name}" for name in ("include", "common", "cuda")), f"-I{GPU_TESTS}")


def compiled(source: Path, folder: Path, *includes: str) -> Path:
    """The object file of a source for the host."""
    target = folder / f"{source.name}.o"
    compiler = os.environ.get("CXX", "g++")
    result = run([compiler, *FLAGS, *includes, *INCLUDES, "-c", "-x", "c++", source, "-o", target])
    assert result.returncode == 0, result.stderr
    return target


def linked(emulated: Path, *objects: Path) -> Path:
    """The program of these objects and the emulated kernels, beside the last one."""
    target = objects[-1].with_suffix(".program")
    command = [os.environ.get("CXX", "g++"), *objects, emulated, f"-Wl,-rpath,{emulated.parent}", "-ldl", "-lpthread", "-o", target]
    result = run(command)
    assert result.returncode == 0, result.stderr
    return target


def test_the_sanitizer_driver_on_the_emulated_kernels(emulated, tmp_path):
    program = linked(emulated, compiled(GPU_TESTS / "sanitizer_driver.cu", tmp_path))
    result = run([program, "--quick"])
    assert result.returncode == 0, result.stdout
    assert last_line(result.stdout) == "24 shapes, all right"
    assert result.stdout.count("ok   ") == 24


def test_the_sanitizer_driver_sees_a_wrong_value(emulated, tmp_path):
    for name in ("sanitizer_driver.cu", "attention_case.h", "device_memory.h"):
        text = (GPU_TESTS / name).read_text()
        if name == "attention_case.h":
            assert "return sum * p.scale;" in text
            text = text.replace("return sum * p.scale;", "return sum * p.scale * 1.02;")
        (tmp_path / name).write_text(text)
    program = linked(emulated, compiled(tmp_path / "sanitizer_driver.cu", tmp_path, f"-I{tmp_path}"))
    result = run([program, "--quick"])
    assert result.returncode == 1
    assert last_line(result.stdout).startswith("FAIL B ")


@pytest.fixture(scope="module")
def plugin_includes() -> tuple[str, ...]:
    spec = importlib.util.spec_from_file_location("fetch_headers", PLUGINS / "tensorrt" / "fetch_headers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.find()
    if found is None:
        pytest.skip("no TensorRT headers: run python mra_export/plugins/tensorrt/fetch_headers.py")
    return "-isystem", str(found), f"-I{ROOT / 'tests' / 'tensorrt' / 'host'}"


@pytest.fixture(scope="module")
def plugin_driver(plugin_includes: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(GPU_TESTS / "plugin_check.cu", tmp_path_factory.mktemp("plugin"), *plugin_includes)


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong version"])
def test_the_plugin_driven_directly(emulated, plugin_includes, plugin_driver, tmp_path, wrong):
    plugin = PLUGINS / "mra_attention_plugin.cu"
    if wrong:
        text = plugin.read_text()
        assert 'kVersion[] = "1"' in text
        plugin = tmp_path / plugin.name
        plugin.write_text(text.replace('kVersion[] = "1"', 'kVersion[] = "2"'))
    result = run([linked(emulated, plugin_driver, compiled(plugin, tmp_path, *plugin_includes))])
    if wrong:
        assert result.returncode == 1
        assert "FAIL the plugin's version" in result.stdout
    else:
        assert result.returncode == 0, result.stdout
        assert result.stdout.count("ok   ") == 8
        assert last_line(result.stdout) == "0 failed"


def test_the_kernel_check_needs_no_transformers(emulated, tmp_path):
    (tmp_path / "transformers.py").write_text("raise ImportError('hidden')")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    script = [GPU_TESTS / "kernel_check.py", "--device", "cpu", "--library", emulated, "--only", "ties"]
    result = run([sys.executable, *script], PYTHONPATH=path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ok   ties" in result.stdout


def test_the_model_check_on_the_emulated_kernels(modules, emulated, monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    script = modules("model_check")
    monkeypatch.setattr(script, "EMULATED_SHAPES", ((1, 200),))
    monkeypatch.setattr(script, "CHECKPOINT", tmp_path / "none")  # random weights are smaller
    lines: list[str] = []
    arguments = ["--device", "cpu", "--library", str(emulated), "--json", str(tmp_path / "rows.json")]
    assert script.main(arguments, lines.append) == 0, "".join(lines)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {(r["check"], r["backend"]) for r in rows if r["status"] == "pass"} == {
        ("outputs", "torch"),
        ("outputs", "kernel"),
        ("outputs", "mra::attention"),
        ("selection", "torch"),
        ("selection", "kernel"),
    }
    assert len(rows) == 15

    monkeypatch.setattr(script, "EMULATED_SHAPES", ((1, 5),))
    right = script._Kernel.__call__
    monkeypatch.setattr(script._Kernel, "__call__", lambda *a: (right(*a)[0] * 1.5, *right(*a)[1:]))
    lines.clear()
    assert script.main(arguments, lines.append) == 1
    assert any(line.startswith("FAIL outputs: kernel, fp32") for line in lines)
    assert not any(line.startswith("FAIL outputs: torch") for line in lines)


@pytest.fixture
def benchmark(modules: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark, small enough for the emulation."""
    import torch

    script = modules("gpu_attention")
    monkeypatch.setattr(script, "EMULATED_SHAPES", (script.Shape("base-512-4", 2, 96, 4, heads=2),))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # ten seconds; uncompiled, flex knows no blocks
    monkeypatch.setattr(modules("gpu_peers"), "why_not_compiled", lambda: "")
    return script


def test_the_benchmark_on_the_emulated_kernels(benchmark, emulated, tmp_path):
    lines: list[str] = []
    path = tmp_path / "rows.json"
    status = benchmark.main(["--device", "cpu", "--library", str(emulated), "--seconds", "0.01", "--json", str(path)], lines.append)
    assert status == 0, "".join(lines)
    result = json.loads(path.read_text())
    assert result["emulated"] is True
    assert [r["dtype"] for r in result["rows"]] == ["bfloat16", "float16", "float32"]
    for measured in result["rows"]:
        assert measured["contestants"]["ours"]["times_us"]["calls"]["calls"] >= 3
        assert measured["contestants"]["ours"]["times_us"]["calls"]["unit"] == "us"
        assert measured["contestants"]["sdpa"]["times_us"]["calls"]["median"] > 0
    flex = [r["contestants"]["flex"] for r in result["rows"]]
    assert flex[0]["left_out"].endswith("is above 0.02: not timed")
    assert [f["left_out"] for f in flex[1:]] == ["compiled for each shape, so in bfloat16 only"] * 2
    assert result["rows"][2]["contestants"]["authors"]["left_out"] == "not asked for: --authors-build"
    assert ("ours tf32x3" in result["rows"][2]["contestants"]) == benchmark.has_tf32x3()


@pytest.mark.slow
def test_flex_attention_takes_the_kernels_blocks(modules, emulated, monkeypatch):
    """Compiled where torch can. Without a compiler flex_attention knows no blocks, so there all are chosen."""
    import torch

    script, peers = modules("gpu_attention"), modules("gpu_peers")
    device = script.Device(script.kernel_check.load(emulated), torch.device("cpu"), small=True)
    can_compile = not peers.why_not_compiled()
    shape = script.Shape("", 1, 96, 4 if can_compile else 9, heads=1)
    sets = script.input_sets(device.torch_device, shape, torch.bfloat16)
    if not can_compile:
        monkeypatch.setattr(peers, "why_not_compiled", lambda: "")
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    found = peers.flex(sets, shape.attributes, script.chosen(device, shape.attributes), seconds=300)
    assert found.left_out == ""
    assert len(found.calls) == len(sets)
    if can_compile:
        stopped = peers.flex(sets, shape.attributes, script.chosen(device, shape.attributes), seconds=0.01)
        assert stopped.left_out == "torch.compile took more than 0.01 s"
    monkeypatch.undo()
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nowhere/include")
    found = peers.flex(sets, shape.attributes, script.chosen(device, shape.attributes))
    assert found.left_out.startswith("torch.compile needs /nowhere/include/Python.h: install it")


def test_the_benchmark_begins_nothing_when_its_time_is_over(benchmark, emulated):
    lines: list[str] = []
    assert benchmark.main(["--device", "cpu", "--library", str(emulated), "--limit", "0"], lines.append) == 1
    assert "SKIP base-512-4 B 2 N 96 float16: the time of --limit was over\n" in lines
    assert lines[-1] == "0 rows, 0 wrong, 3 left out\n"


def test_the_benchmark_times_nothing_that_is_wrong(benchmark, emulated, monkeypatch):
    right = benchmark.kernel_check.launch

    def wrong(device, params, inputs, context, workspace):
        right(device, params, inputs, context, workspace)
        context[0, 0, 0] += 1

    monkeypatch.setattr(benchmark.kernel_check, "launch", wrong)
    lines: list[str] = []
    assert benchmark.main(["--device", "cpu", "--library", str(emulated), "--dtype", "bfloat16"], lines.append) == 1
    assert "ours left out (wrong, so not timed:" in "".join(lines)


def test_launches_are_told_apart_by_their_place(modules):
    measure, script, cost = modules("gpu_measure"), modules("gpu_attention"), modules("gpu_cost")
    pool, select, attend = (
        "void mra::PoolKernel<float>(mra::Problem)",
        "mra::SelectKernel(mra::Problem)",
        "mra::Attend<float, 64>(int)",
    )
    events = [(pool, 5.0), (select, 3.0), (attend, 9.0), (pool, 7.0), (select, 3.5), (attend, 10.0)]
    found = measure.launches_of(events, 2)
    assert [(each.name, each.us, each.count) for each in found] == [
        ("PoolKernel<float>", 6.0, 2),
        ("SelectKernel", 3.25, 2),
        ("Attend<float, 64>", 9.5, 2),
    ]
    for wrong, text in ((events[:5], "5 kernels of 2 calls"), ([*events[:4], events[5], events[4]], "launch 2 of a call is")):
        with pytest.raises(ValueError, match=text):
            measure.launches_of(wrong, 2)
    gpu = cost.GPUS["H200"]
    expected = cost.launches(cost.Shape(8, 512, 64), "bfloat16", gpu)
    rows = script.launch_rows(measure.Contestant("ours"), found, expected, gpu)
    assert [(row["launch"], row["measured_us"]) for row in rows] == [("pool", 6.0), ("select", 3.25), ("attend", 9.5)]
    assert rows[0]["expected_us"] == pytest.approx(18874368 / 4.3e6)
    assert "expected_us" not in script.launch_rows(measure.Contestant("ours"), found[:2], expected, gpu)[0]
    assert "expected_us" not in script.launch_rows(measure.Contestant("ours"), found, expected, None)[0]


def test_the_roofline_is_the_longer_of_moving_and_computing(modules):
    script = modules("gpu_attention")
    import torch

    shape = script.Shape("base-512-4", 8, 4096, 512)
    moving = script.roofline(shape, torch.bfloat16, script.Ceilings(4e6, {"bfloat16": 1e12}))
    assert moving == pytest.approx(4 * 8 * 4096 * 768 * 2 / 4e6)
    computing = script.roofline(shape, torch.bfloat16, script.Ceilings(1e12, {"bfloat16": 8e8}))
    assert computing == pytest.approx(12.88e9 / 8e8, rel=1e-3)


def test_the_cost_models_gpu_is_known_by_torchs_name(modules):
    known = modules("gpu_attention").known_gpu
    names = ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA L40S")
    assert [known(name).name for name in names] == ["H200", "H100", "A100", "L40S"]
    assert [known(name) for name in ("NVIDIA H100 PCIe", "NVIDIA A100 80GB PCIe", "NVIDIA L40", "Tesla T4")] == [None] * 4


def test_the_shapes_are_those_of_the_goals(modules):
    script, cost = modules("gpu_attention"), modules("gpu_cost")
    assert sorted(shape.goal for shape in script.SHAPES if shape.goal) == sorted(goal.goal for goal in cost.GOALS)
    assert {(shape.batch, shape.length) for shape in script.SHAPES} == {(b, n) for b in (8, 1) for n in (512, 1024, 4096, 16384)}
    assert {(shape.batch, shape.num_blocks) for shape in script.SHAPES if shape.first} == {(8, 1024), (1, 1024)}


def test_the_authors_attention_is_called_as_they_meant_it(modules):
    """With their three primitives in plain torch, as tests/model has them: the benchmark then finds that it agrees."""
    pytest.importorskip("transformers.models.mra.modeling_mra")
    script, peers, primitives = modules("gpu_attention"), modules("gpu_peers"), modules("test_upstream")
    import torch

    def problem(*numbers: int) -> tuple[Any, Any]:
        shape = script.Shape("", *numbers, heads=2)
        return script.input_sets(torch.device("cpu"), shape, torch.float32), shape.attributes

    for numbers in ((2, 256, 16), (1, 256, 48, 3, 1)):
        found = peers.authors(*problem(*numbers), primitives, "")
        assert found.left_out == ""
        assert "100.00% of tokens agree" in found.how
    sets, attributes = problem(1, 256, 48, 3, 1)
    context = peers.authors(sets, attributes, primitives, "").calls[0]()
    assert peers.authors_agree(context, sets[0], problem(1, 256, 4)[1]) < peers.AUTHORS_ROWS
    for numbers, why in (((1, 64, 3), "multiple"), ((1, 12320, 4), "above 12288")):
        assert why in peers.authors(*problem(*numbers), primitives, "").left_out


def test_authors_kernels_that_were_not_fetched_are_left_out(modules, monkeypatch):
    script = modules("authors_kernels")
    monkeypatch.setattr(script, "SOURCES", ROOT / ".downloads" / "not-there")
    with pytest.raises(script.LeftOutError, match=r"where there is a network, run python benchmarks/authors_kernels.py"):
        script.compile_kernels(ROOT / "build" / "never")


def test_whole_models_are_checked_and_timed(modules, monkeypatch, tmp_path):
    import torch

    script = modules("gpu_model")
    monkeypatch.setattr(script, "TOY_CASES", (script.Case("tiny", 40, (1, 2)),))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(modules("measure"), "why_not_compiled", lambda: "")
    path, lines = tmp_path / "rows.json", []
    arguments = ["--device", "cpu", "--dtype", "float32", "--layers", "1", "--seconds", "0.01"]
    assert script.main([*arguments, "--json", str(path)], lines.append) == 0, "".join(lines)
    rows = json.loads(path.read_text())["rows"]
    assert [(r["batch"], r["peer"]) for r in rows] == [(batch, peer) for batch in (1, 2) for peer in script.PEERS]
    timed = {r["peer"] for r in rows if r["times_us"]}
    assert {"mra torch", "mra compiled", "dense torch", "dense compiled"} <= timed
    assert "mra onnxruntime" in timed or "ort_ops" in next(r["left_out"] for r in rows if r["peer"] == "mra onnxruntime")
    assert {r["left_out"] for r in rows if "graphs" in r["peer"]} == {"CUDA graphs need a GPU"}
    for r in rows:
        if r["times_us"]:
            assert r["tokens_per_second"] == pytest.approx(r["batch"] * 40 / r["times_us"]["calls"]["median"] * 1e6)
            assert r["vs_dense"] > 0

    monkeypatch.setitem(script.PEERS, "mra torch", lambda setup: lambda ids, mask: script.mra_torch(setup)(ids, mask) + 1)
    monkeypatch.setitem(script.PEERS, "dense torch", lambda setup: lambda ids, mask: 1 / 0)
    lines.clear()
    assert script.main([*arguments, "--peer", "mra torch", "--peer", "dense torch", "--json", str(path)], lines.append) == 1
    reasons = [r["left_out"] for r in json.loads(path.read_text())["rows"]]
    assert reasons[0].startswith("wrong, so not timed: needs a tolerance of")
    assert reasons[1] == "ZeroDivisionError: division by zero"
    lines.clear()
    assert script.main([*arguments, "--limit", "-1"], lines.append) == 1
    assert lines == ["SKIP tiny float32: the time of --limit was over\n", "0 rows, 0 wrong\n"]
