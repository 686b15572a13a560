"""Everything that a machine with an NVIDIA GPU can say about this repository, in one command: `make gpu-check`.

    python benchmarks/gpu_check.py [--only STEP] [--minutes 9] [--out FOLDER]

Builds the CUDA parts for the GPU at hand, checks the kernels, the plugin and a whole model on it, runs compute-sanitizer, and times
the kernel and whole models beside dense attention. Needs nvcc, CMake, a C++ compiler, and a Python with numpy, torch (CUDA) and
transformers; no network, nothing is installed. A step that lacks something is left out with a line that says what. Results: a JSON
file and a table under benchmarks/results/. This script itself needs the standard library only. More: docs/gpu-check.md.

Exit status: 0 nothing failed and the kernel tests ran; 1 something failed; 2 nothing could be started: no GPU, no compiler, or a
wrong argument.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_report import markdown

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "gpu"))
import needs

from mra_export import gpu

ROOT = Path(__file__).resolve().parents[1]
OK, FAILED, LEFT_OUT = "ok", "failed", "left out"
TOOLKIT = Path("/usr/local/cuda")
"""Where a toolkit is looked for when PATH has none."""
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


class CannotStartError(Exception):
    """Nothing can be run here; the text says why and what helps."""


class LeftOutError(Exception):
    """This step cannot be run here; the text says why and what helps."""


class FailedError(Exception):
    """This step found something wrong."""


@dataclass(frozen=True)
class Workplace:
    """Where and with what the steps run. architecture: compute capability without its point, such as "90"."""

    build: Path
    nvcc: Path
    cmake: tuple[str, ...]
    architecture: str
    seconds: float
    deadline: float = field(default_factory=lambda: time.monotonic() + 1e9)

    def left(self) -> float:
        """Seconds that the step may still take."""
        return max(1.0, min(self.seconds, self.deadline - time.monotonic()))

    def environment(self) -> dict[str, str]:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "MRA_EXPORT_LIBRARY_DIR": str(self.build),
            "HF_HUB_OFFLINE": "1",
            "TORCH_CUDA_ARCH_LIST": f"{self.architecture[:-1]}.{self.architecture[-1]}",
            "CUDA_HOME": str(find_toolkit(self.nvcc)),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), str(self.nvcc.parent), os.environ.get("PATH", "")]),
        }

    def run(self, name: str, command: Sequence[str]) -> tuple[int, list[str]]:
        """Exit status and output lines; all of it goes to logs/<name>.txt. Raises FailedError when the time is over."""
        log = self.build / "logs" / f"{name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        limit = self.left()
        lines: list[str] = []
        over = threading.Event()
        with log.open("w") as kept:
            kept.write(f"$ {' '.join(command)}\n")
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )

            def stop() -> None:
                over.set()
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

            timer = threading.Timer(limit, stop)
            timer.start()
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    kept.write(line)
                    lines.append(line.rstrip())
                process.wait()
            finally:
                timer.cancel()
                if process.poll() is None:
                    stop()
                    process.wait()
        if over.is_set():
            last = next((line for line in reversed(lines) if line.strip()), "nothing")
            raise FailedError(f"not done after {limit:.0f} s; last output: {last}; log: {log.relative_to(ROOT)}")
        return process.returncode, lines

    def check(self, name: str, command: Sequence[str]) -> list[str]:
        """The output of a check that passed. Raises LeftOutError where it had nothing to run on, FailedError where it failed."""
        status, lines = self.run(name, command)
        if status == 0:
            return lines
        last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
        if status == needs.SKIPPED:
            raise LeftOutError(last.removeprefix("SKIP all: "))
        wrong = next((line.removeprefix("FAIL ") for line in lines if line.startswith("FAIL")), last)
        raise FailedError(f"{wrong} (exit status {status}; log: build/{self.build.name}/logs/{name}.txt)")

    def script(self, name: str, path: str, *arguments: str) -> list[str]:
        return self.check(name, [sys.executable, str(ROOT / path), *arguments])

    def results(self, name: str) -> Path:
        """Where a check writes its rows. What an earlier run left is removed."""
        path = self.build / f"{name}.json"
        path.unlink(missing_ok=True)
        return path


@dataclass(frozen=True)
class Outcome:
    """What a step found, in one line, and what goes into the JSON file under the step's name."""

    detail: str
    data: Any = None


@dataclass(frozen=True)
class Step:
    name: str
    title: str
    seconds: float
    run: Callable[[Workplace], Outcome]


def build(place: Workplace) -> Outcome:
    ninja = shutil.which("ninja", path=place.environment()["PATH"])
    configure = [
        *place.cmake,
        *("-S", str(ROOT / "tests" / "gpu"), "-B", str(place.build), "-G", "Ninja" if ninja else "Unix Makefiles"),
        f"-DCMAKE_CUDA_COMPILER={place.nvcc}",
        f"-DCMAKE_CUDA_ARCHITECTURES={place.architecture}-real",
        f"-DMRA_CUDA_ARCHITECTURES={place.architecture}-real",
    ]
    used = place.build / "configured.json"
    if not used.is_file() or json.loads(used.read_text()) != configure:  # CMake refuses to change some of it in place
        (place.build / "CMakeCache.txt").unlink(missing_ok=True)
        shutil.rmtree(place.build / "CMakeFiles", ignore_errors=True)
    place.check("configure", configure)
    used.write_text(json.dumps(configure))
    place.check("build", [*place.cmake, "--build", str(place.build), "--parallel", str(os.cpu_count() or 1)])
    with_plugin = (place.build / "plugin_check").is_file()
    return Outcome(f"sm_{place.architecture}, {'with' if with_plugin else 'without'} the TensorRT plugin")


def _need(*modules: str) -> None:
    gone = needs.missing({module: module for module in modules})
    if gone:
        raise LeftOutError(gone)


def kernels(place: Workplace) -> Outcome:
    _need("numpy", "torch")
    lines = place.script("kernels", "tests/gpu/kernel_check.py")
    if "NOT compared" in lines[0]:
        raise FailedError("the CPU kernel was not found, so selection was not compared")
    return Outcome(f"{_passed(lines)}; selection bit-equal to the CPU kernel's")


def plugin(place: Workplace) -> Outcome:
    program = place.build / "plugin_check"
    if not program.is_file():
        raise LeftOutError(
            "libmra_trt was not built: no TensorRT headers; set TENSORRT_ROOT, or, where there is a network, run "
            "python mra_export/plugins/tensorrt/fetch_headers.py"
        )
    return Outcome(f"{_passed(place.check('plugin', [str(program)]))}, driven directly")


def engine(place: Workplace) -> Outcome:
    path = place.results("engine")
    lines = place.script("engine", "tests/gpu/engine_check.py", "--json", str(path))
    return Outcome(_passed(lines), json.loads(path.read_text())["rows"])


def onnxruntime(place: Workplace) -> Outcome:
    path = place.results("onnxruntime")
    lines = place.script("onnxruntime", "tests/gpu/ort_check.py", "--json", str(path))
    return Outcome(_passed(lines), json.loads(path.read_text())["rows"])


def torch_operator(place: Workplace) -> Outcome:
    return Outcome(_passed(place.script("torch", "tests/gpu/torch_check.py")))


def sanitizer(place: Workplace, tool: str) -> Outcome:
    program = find_sanitizer(place.nvcc)
    if program is None:
        raise LeftOutError("compute-sanitizer is neither on PATH nor beside nvcc: it comes with the CUDA toolkit (cuda-sanitizer)")
    options = {
        "memcheck": ["--leak-check", "full", "--padding", "1024"],  # a write past a buffer's end must not land in the next one
        "racecheck": ["--racecheck-report", "all"],
    }
    command = [str(program), "--tool", tool, "--error-exitcode", "1", *options.get(tool, [])]
    _, lines = place.run(tool, [*command, str(place.build / "sanitizer_driver")])
    return Outcome(sanitizer_verdict(lines))


def sanitizer_verdict(lines: Sequence[str]) -> str:
    """The tool's own summary. Raises FailedError unless it says that it found nothing and the driver finished, LeftOutError where
    it does not work on this machine."""
    refused = next((line.lstrip("= ") for line in lines if "Device not supported" in line), "")
    if refused:
        raise LeftOutError(f"compute-sanitizer does not work on this machine: {refused}")
    wrong = next((line for line in lines if line.startswith("FAIL")), "")
    summary = next((line.lstrip("= ") for line in reversed(lines) if "SUMMARY:" in line), "")
    calls = next((line for line in lines if "all right" in line), "")
    if wrong or any(int(count) for count in re.findall(r"(\d+) (?:error|hazard|warning)", summary)):
        raise FailedError("; ".join(filter(None, (wrong, summary))))
    if not summary or not calls:
        raise FailedError(f"it ended without its summary: {lines[-1] if lines else 'no output'}")
    return f"{summary}, over {calls.split(',')[0]}"


def model(place: Workplace) -> Outcome:
    path = place.results("model")
    lines = place.script("model", "tests/gpu/model_check.py", "--json", str(path))
    found = json.loads(path.read_text())
    return Outcome(f"{found['checkpoint']}: {lines[-1]}", found)


def authors(place: Workplace) -> Outcome:
    """Compiled in a step of its own: it takes as long as the benchmark."""
    _need("numpy", "torch", "transformers")
    folder = place.build / "authors"
    (folder / "lock").unlink(missing_ok=True)  # torch waits for whoever made it, also when that was stopped
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); from pathlib import Path; import authors_kernels as a\n"
        f"try: a.compile_kernels(Path({str(folder)!r}))\n"
        f"except a.LeftOutError as error: print('SKIP all:', error); sys.exit({needs.SKIPPED})"
    )
    place.check("authors", [sys.executable, "-c", code])
    return Outcome("compiled")


def benchmark(place: Workplace) -> Outcome:
    _need("numpy", "torch")
    path = place.results("benchmark")
    arguments = ["--json", str(path), *_limit(place)]
    compiled = place.build / "authors"
    if any(compiled.glob("*.so")):
        arguments += ["--authors-build", str(compiled)]
    lines = place.script("benchmark", "benchmarks/gpu_attention.py", *arguments)
    return Outcome(lines[-1], json.loads(path.read_text()))


def models(place: Workplace) -> Outcome:
    _need("numpy", "torch", "transformers")
    path = place.results("models")
    lines = place.script("models", "benchmarks/gpu_model.py", "--dtype", "float16", "--json", str(path), *_limit(place))
    return Outcome(lines[-1], json.loads(path.read_text()))


def _limit(place: Workplace) -> tuple[str, str]:
    """A benchmark begins nothing in the last sixth of its time, so that what it measured is kept."""
    return "--limit", f"{place.left() * 5 / 6:.0f}"


STEPS = (
    Step("build", "build", 180, build),
    Step("kernels", "kernel tests on the GPU", 150, kernels),
    Step("plugin", "TensorRT plugin, driven directly", 60, plugin),
    Step("engine", "TensorRT plugin in an engine", 150, engine),
    Step("onnxruntime", "ONNX Runtime's CUDA provider", 150, onnxruntime),
    Step("torch", "mra::attention in PyTorch", 120, torch_operator),
    *(
        Step(tool, f"compute-sanitizer {tool}", 90, lambda place, tool=tool: sanitizer(place, tool))  # type: ignore[misc]
        for tool in SANITIZERS
    ),
    Step("model", "a whole model on the GPU", 90, model),
    Step("authors", "the authors' kernels: compile", 150, authors),
    Step("benchmark", "benchmark beside dense attention", 240, benchmark),
    Step("models", "benchmark of whole models", 300, models),
)


def _passed(lines: Sequence[str]) -> str:
    """ "8 checks ok, 1 skipped"."""
    count = {word: sum(line.startswith(word) for line in lines) for word in ("ok", "SKIP")}
    return f"{count['ok']} checks ok" + (f", {count['SKIP']} skipped" if count["SKIP"] else "")


def find_nvcc() -> Path:
    for candidate in (os.environ.get("CUDACXX"), shutil.which("nvcc"), str(TOOLKIT / "bin" / "nvcc")):
        if candidate and Path(candidate).is_file():
            return Path(candidate).absolute()
    raise CannotStartError("no nvcc: put it on PATH or set CUDACXX to it; it comes with the CUDA toolkit, 12.8 or newer")


def find_toolkit(nvcc: Path) -> Path:
    """The folder with CUDA's headers, for torch's extension builder: nvcc may be a link or a wrapper elsewhere."""
    beside = nvcc.resolve().parent.parent
    given = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    return next((folder for folder in (*given, beside, TOOLKIT) if (folder / "include" / "cuda_runtime.h").is_file()), beside)


def find_cmake() -> tuple[str, ...]:
    """The command, from PATH, this Python's folder, or the wheel."""
    for candidate in (shutil.which("cmake"), str(Path(sys.executable).parent / "cmake")):
        if candidate and Path(candidate).is_file():
            return (candidate,)
    if find_spec("cmake") is not None:
        return (sys.executable, "-m", "cmake")
    raise CannotStartError("no cmake: install it (apt install cmake, or pip install cmake), 3.22 or newer")


def find_sanitizer(nvcc: Path) -> Path | None:
    toolkit = find_toolkit(nvcc)
    for candidate in (shutil.which("compute-sanitizer"), nvcc.parent / "compute-sanitizer", toolkit / "bin" / "compute-sanitizer"):
        if candidate and Path(candidate).is_file():
            return Path(candidate)
    beside = toolkit / "compute-sanitizer" / "compute-sanitizer"
    return beside if beside.is_file() else None


def machine(place: Workplace) -> dict[str, Any]:
    """What the figures belong to. A value that cannot be had is None."""
    devices = gpu.devices()
    driver = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    release = re.search(r"release ([\d.]+)", _output([str(place.nvcc), "--version"]) or "")
    torch = json.loads(_output([sys.executable, "-c", _TORCH]) or "{}")
    cpu = next((line.split(":", 1)[1].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")), None)
    return {
        "gpu": devices[0].name if devices else None,
        "gpus": len(devices),
        "compute_capability": devices[0].compute_capability if devices else None,
        "driver": driver.split()[0] if driver else None,
        "driver_cuda": gpu.driver_version(),
        "nvcc": release[1] if release else None,
        "torch": torch.get("torch"),
        "torch_cuda": torch.get("cuda"),
        "cudnn": torch.get("cudnn"),
        "python": platform.python_version(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "commit": (_output(["git", "-C", str(ROOT), "describe", "--always", "--dirty"]) or "").strip() or None,
    }


_TORCH = (
    "import json, torch; print(json.dumps({'torch': torch.__version__, 'cuda': torch.version.cuda, "
    "'cudnn': torch.backends.cudnn.version()}))"
)


def _output(command: Sequence[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


@contextlib.contextmanager
def _timed() -> Iterator[Callable[[], float]]:
    start = time.monotonic()
    yield lambda: time.monotonic() - start


def run_steps(steps: Sequence[Step], place: Callable[[Step], Workplace], write: Callable[[str], Any]) -> list[dict[str, Any]]:
    """One dictionary for each step: name, title, status, seconds, detail, data."""
    done: list[dict[str, Any]] = []
    for index, step in enumerate(steps, 1):
        here = place(step)
        write(f"[{index}/{len(steps)}] {step.title} (at most {here.left():.0f} s)\n")
        data = None
        with _timed() as seconds:
            try:
                broken = next((entry for entry in done if entry["name"] == "build" and entry["status"] != OK), None)
                if broken:
                    raise LeftOutError("the build failed")
                if here.left() < 5:
                    raise LeftOutError("no time is left: pass more with --minutes")
                outcome = step.run(here)
                status, detail, data = OK, outcome.detail, outcome.data
            except LeftOutError as reason:
                status, detail = LEFT_OUT, str(reason)
            except FailedError as error:
                status, detail = FAILED, str(error)
        done.append(
            {"name": step.name, "title": step.title, "status": status, "seconds": seconds(), "detail": detail, "data": data}
        )
        write(f"      {status}, {done[-1]['seconds']:.1f} s: {detail}\n")
    return done


def verdict(done: Sequence[dict[str, Any]], wanted: Sequence[Step]) -> tuple[int, str]:
    """Exit status and a last line."""
    failed = [entry["title"] for entry in done if entry["status"] == FAILED]
    if failed:
        return 1, f"FAILED: {', '.join(failed)}"
    untested = [entry for entry in done if entry["name"] == "kernels" and entry["status"] != OK]
    if untested:
        return 1, f"FAILED: the kernel tests did not run: {untested[0]['detail']}"
    left_out = sum(entry["status"] == LEFT_OUT for entry in done)
    return 0, f"ok: {len(done) - left_out} of {len(wanted)} steps ran, {left_out} left out"


def save(result: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Writes gpu-<name>-<date>.json and .md."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", str(result["machine"]["gpu"]).lower()).strip("-")
    stem = folder / f"gpu-{name}-{result['date']}"
    json_path, page = stem.with_suffix(".json"), stem.with_suffix(".md")
    json_path.write_text(json.dumps(result, indent=1) + "\n")
    page.write_text(markdown(result))
    return json_path, page


def main(arguments: Sequence[str] | None = None, write: Callable[[str], Any] = sys.stdout.write) -> int:
    parser = argparse.ArgumentParser(description="Build, check and time the CUDA parts on this machine's GPU.")
    parser.add_argument("--only", action="append", choices=[step.name for step in STEPS], help="this step; repeat for several")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together (default %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the results; default: benchmarks/results, and none with --only")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "gpu-check", help="folder to build in")
    parser.add_argument("--architecture", metavar="CC", help="such as 90: build for this; `--only build` then needs no GPU")
    options = parser.parse_args(arguments)
    steps = [step for step in STEPS if options.only is None or step.name in options.only]
    if options.minutes <= 0:
        parser.error(f"--minutes is {options.minutes:g}: it must be above 0")
    if options.architecture and not re.fullmatch(r"\d{2,3}", options.architecture):
        parser.error(f"--architecture is {options.architecture!r}: write compute capability 9.0 as 90")
    try:
        devices = gpu.devices()
        if not devices and not (options.architecture and options.only == ["build"]):
            raise CannotStartError(f"{gpu.why_none()}; the CPU's tests are `make test`")
        architecture = options.architecture or devices[0].compute_capability.replace(".", "")
        tools = {"nvcc": find_nvcc(), "cmake": find_cmake()}
    except CannotStartError as error:
        write(f"gpu-check: nothing was run: {error}\n")
        return 2
    end = time.monotonic() + options.minutes * 60

    def place(step: Step) -> Workplace:
        return Workplace(options.build.absolute(), architecture=architecture, seconds=step.seconds, deadline=end, **tools)  # type: ignore[arg-type]

    about = machine(place(STEPS[0]))
    write(f"{about['gpu'] or 'no GPU'}, sm_{architecture}, nvcc {about['nvcc']}, torch {about['torch']}, {about['commit']}\n")
    done = run_steps(steps, place, write)
    result: dict[str, Any] = {"date": datetime.date.today().isoformat(), "machine": about}
    result |= {entry["name"]: entry["data"] for entry in done if entry["data"] is not None}
    result["steps"] = [{name: value for name, value in entry.items() if name != "data"} for entry in done]
    folder = options.out or (None if options.only else ROOT / "benchmarks" / "results")
    if folder:
        for path in save(result, folder):
            write(f"wrote {path}\n")
    status, text = verdict(done, steps)
    write(f"gpu-check: {text}\n")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
