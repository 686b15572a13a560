"""Does everything with a wheel that needs no compiler, in an empty virtual environment, on a machine that may have Python alone.

    python3 tests/wheel/use_wheel.py WHEEL CHECKPOINT FOLDER [--constraints FILE]

Ends with 0, and FOLDER then holds the environment (venv) and the bundle; or with what went wrong. Standard library only.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "make", "cmake", "ninja", "nvcc")
PYTHONS = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MRA_", "VIRTUAL_ENV"))}
TEXT = "for i in range(<mask>):"
WAIT = 600
"""Seconds until the server must answer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--constraints", type=Path)
    options = parser.parse_args()
    if found := [name for name in COMPILERS if shutil.which(name)]:
        sys.exit(f"on PATH there is {', '.join(found)}: a machine that has it proves nothing about one that has not")
    folder = options.folder.resolve()
    install(options.wheel.resolve(), folder, ["-c", str(options.constraints.resolve())] if options.constraints else [])
    bundle = folder / "bundle"
    command(folder, "doctor")
    command(folder, "export", options.checkpoint.resolve(), bundle)
    command(folder, "verify", bundle)
    found = tokens(json.loads(command(folder, "run", bundle, "--text", TEXT, "--json")))
    served = tokens(asked(folder, bundle))
    expect(len(found) == 5 and found == served, f"run answers {found}, serve {served}")
    command(folder, "engine", bundle, "--backend", "tensorrt-rtx", "--compute-capability", "8.9")
    (engine,) = json.loads((bundle / "manifest.json").read_text())["engines"]
    expect(engine["plugin_layers"] == 4, f"the engine has {engine['plugin_layers']} plugin layers, not 4")
    plan = bundle / engine["file"]
    print(f"{plan}: {plan.stat().st_size} bytes, {engine['plugin_layers']} plugin layers")


def install(wheel: Path, folder: Path, constraints: list[str]) -> None:
    """Into folder/venv, with every package that the commands need."""
    bundled = importlib.util.find_spec("ensurepip") is not None  # else this Python's pip installs there
    subprocess.run([sys.executable, "-m", "venv", *([] if bundled else ["--without-pip"]), folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    pip = [python, "-m", "pip"] if bundled else [sys.executable, "-m", "pip", "--python", python]
    subprocess.run([*pip, "install", "--quiet", *constraints, f"{wheel}[serve,tensorrt-rtx]"], check=True, env=PYTHONS)


def command(folder: Path, *arguments: str | Path) -> str:
    """What `mra-export ARGUMENTS` prints."""
    print(f"$ mra-export {' '.join(str(part) for part in arguments)}", flush=True)
    done = subprocess.run(
        [folder / "venv" / "bin" / "mra-export", *arguments],
        cwd=folder,
        env=PYTHONS,
        text=True,
        stdout=subprocess.PIPE,
        check=False,
    )
    print(done.stdout, flush=True)
    expect(done.returncode == 0, f"it ended with {done.returncode}")
    return done.stdout


def asked(folder: Path, bundle: Path) -> list[dict[str, Any]]:
    """The server's answers to one text. It ends as SIGTERM asks it to, or the program does."""
    log = folder / "serve.log"
    with log.open("wb") as stream:
        server = subprocess.Popen(
            [folder / "venv" / "bin" / "mra-export", "serve", bundle, "--port", "0"],
            cwd=folder,
            env=PYTHONS,
            stdout=stream,
            stderr=stream,
        )
    try:
        url = event(server, log, "listening")["url"]
        event(server, log, "ready")
        body = json.dumps({"text": TEXT}).encode()
        request = urllib.request.Request(f"{url}/v1/fill-mask", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=WAIT) as response:
            answers = json.load(response)["answers"]
        server.send_signal(signal.SIGTERM)
        expect(server.wait(WAIT) == 0, f"the server ended with {server.returncode}: {log.read_text()}")
        return answers
    finally:
        server.kill()
        server.wait()


def event(server: subprocess.Popen[bytes], log: Path, name: str) -> dict[str, Any]:
    """The log's line about it, once it is there."""
    end = time.monotonic() + WAIT
    while time.monotonic() < end and server.poll() is None:
        for line in log.read_text().rpartition("\n")[0].splitlines():
            if line.startswith("{") and json.loads(line)["event"] == name:
                return json.loads(line)
        time.sleep(0.1)
    sys.exit(f"the server never said {name}: {log.read_text()}")


def tokens(answers: list[dict[str, Any]]) -> list[str]:
    """Of the one mask of the one text, best first."""
    ((mask,),) = (answered["masks"] for answered in answers)
    return [row["token"] for row in mask]


def expect(right: bool, otherwise: str) -> None:
    if not right:
        sys.exit(otherwise)


if __name__ == "__main__":
    main()
