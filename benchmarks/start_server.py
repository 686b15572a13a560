"""Start Triton's python backend or Ray Serve on a bundle, on this machine and without a GPU, for benchmarks and tests.

    python benchmarks/start_server.py triton BUNDLE [--port 8000]
    python benchmarks/start_server.py ray BUNDLE [--port 8000] [--replicas 2]

Prints the base URL (Open Inference Protocol, model "mra") when the server is ready, and stops it at Ctrl-C. Both servers live in
folders of their own, which `make test-heavy` fills: .downloads/triton and .downloads/ray.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
TRITON = Path(os.environ.get("MRA_TEST_TRITON", ROOT / ".downloads" / "triton"))
RAY = Path(os.environ.get("MRA_TEST_RAY", ROOT / ".downloads" / "ray"))
_RAY = """
import json, signal, sys
import ray
from ray import serve
from mra_export.serve.ray_app import RayOptions, app

signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
ray.init(include_dashboard=False, num_cpus=16, object_store_memory=256 << 20)
try:
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(app(RayOptions(**json.loads(sys.argv[2]))))
    signal.pause()
finally:
    serve.shutdown()
    ray.shutdown()
"""
"""What `serve run` does, on a port of our choice and without the dashboard. 16: replicas may be more than cores here."""
_START_SECONDS = 240
_STOP_SECONDS = 40


def why_no_triton() -> str | None:
    """What is missing for `triton`, or None."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    server = TRITON / "pytriton" / "tritonserver"
    if not (server / "bin" / "tritonserver").is_file():
        return f"no tritonserver in {TRITON}: make test-heavy gets it (nvidia-pytriton, Linux on x86-64)"
    if not (server / "python_backend_stubs" / version).is_dir() or not (TRITON / "numpy").is_dir():
        return f"{TRITON} has no python backend, or no numpy below 2, for Python {version}"
    library = Path(sysconfig.get_config_var("LIBDIR")) / str(sysconfig.get_config_var("INSTSONAME"))
    if ".so" not in library.name or not library.is_file():
        return f"this Python has no shared library ({library}), which Triton's python backend needs"
    return None


def why_no_ray() -> str | None:
    """What is missing for `ray`, or None."""
    return None if (RAY / "ray").is_dir() else f"no Ray in {RAY}: make test-heavy gets it"


@contextlib.contextmanager
def triton(repository: Path, log: Path, port: int | None = None) -> Iterator[tuple[str, str]]:
    """Run tritonserver on a model repository of the python backend until the block ends; yields its HTTP URL and gRPC host:port.

    Raises RuntimeError with the end of the log where it does not get ready.
    """
    http, grpc = port or free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="mra-triton-") as scratch:
        backends, environment = _triton_python(Path(scratch))
        command = [
            TRITON / "pytriton" / "tritonserver" / "bin" / "tritonserver",
            f"--model-repository={repository}",
            f"--backend-directory={backends}",
            f"--http-port={http}",
            f"--grpc-port={grpc}",
            "--http-address=127.0.0.1",
            "--grpc-address=127.0.0.1",
            "--allow-metrics=false",
            "--exit-timeout-secs=5",
        ]
        with _running(command, environment, log, f"http://127.0.0.1:{http}/v2/health/ready"):
            yield f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc}"


@contextlib.contextmanager
def ray(bundle: Path, log: Path, port: int | None = None, **options: object) -> Iterator[str]:
    """Run Ray Serve with mra_export.serve.ray_app on a bundle until the block ends; yields its HTTP URL. options: of RayOptions."""
    http = port or free_port()
    command = [sys.executable, "-c", _RAY, str(http), json.dumps({"bundle": str(bundle), **options})]
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as scratch:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(RAY), str(ROOT)]),
            "RAY_TMPDIR": scratch,
            "RAY_AUTH_MODE": "disabled",  # else it leaves a token in the home folder; everything here listens on 127.0.0.1
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        with _running(command, environment, log, f"http://127.0.0.1:{http}/v2/health/ready"):
            yield f"http://127.0.0.1:{http}"


def free_port() -> int:
    """A port on which nobody listens on 127.0.0.1 right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _triton_python(scratch: Path) -> tuple[Path, dict[str, str]]:
    """The backend folder and the environment in which Triton's python backend runs on this interpreter's packages.

    The backend takes its packages from the first virtual environment on PATH, not from PYTHONPATH, and this release knows numpy 1
    only: it gets an environment of its own, with its numpy before ours.
    """
    server = TRITON / "pytriton" / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    backend = scratch / "backends" / "python"
    shutil.copytree(server / "backends" / "python", backend)
    shutil.copy(server / "python_backend_stubs" / version / "triton_python_backend_stub", backend)
    for program in (server / "bin" / "tritonserver", backend / "triton_python_backend_stub"):
        program.chmod(0o755)
    home = scratch / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    folders = [folder for folder in sys.path if folder.endswith(("site-packages", "dist-packages"))]
    lines = [str(TRITON), *(f"import site; site.addsitedir({folder!r})" for folder in folders), str(ROOT)]
    (home / "lib" / f"python{version}" / "site-packages" / "mra.pth").write_text("\n".join(lines) + "\n")
    libraries = [sysconfig.get_config_var("LIBDIR"), str(TRITON / "nvidia_pytriton.libs"), os.environ.get("LD_LIBRARY_PATH", "")]
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(home / "bin"), os.environ["PATH"]]),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
    }
    environment.pop("PYTHONPATH", None)
    return backend.parent, environment


@contextlib.contextmanager
def _running(command: list[object], environment: dict[str, str], log: Path, ready: str) -> Iterator[None]:
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [str(part) for part in command], env=environment, stdout=stream, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp
        )
    try:
        _wait(process, ready, log)
        yield
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
        for child in family:  # what is still there: Ray's processes are in groups of their own
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.kill()
        process.wait()


def _wait(process: subprocess.Popen[bytes], ready: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(ready, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    state = "ended" if process.poll() is not None else "is not ready"
    raise RuntimeError(f"the server {state}:\n{log.read_text(errors='replace')[-4000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", choices=("triton", "ray"))
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--replicas", type=int, default=1)
    options = parser.parse_args()
    missing = why_no_triton() if options.server == "triton" else why_no_ray()
    if missing:
        sys.exit(missing)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with tempfile.TemporaryDirectory(prefix="mra-server-") as scratch, contextlib.ExitStack() as stack:
        log = Path(scratch) / "log"
        if options.server == "triton":
            from mra_export import Bundle
            from mra_export.serve.triton import TritonOptions, write_repository

            repository = Path(scratch) / "repository"
            wanted = TritonOptions("python", instances=options.replicas)
            write_repository(Bundle.load(options.bundle), repository, wanted)
            url, _ = stack.enter_context(triton(repository, log, options.port))
        else:
            url = stack.enter_context(ray(options.bundle, log, options.port, replicas=options.replicas))
        print(url, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
