"""The installed package from outside: CMake projects, pkg-config and a plain C compiler, against the bundle's golden outputs."""

from __future__ import annotations

import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from processes import started

import mra_export
from mra_export import Bundle, MraRuntime, libraries

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    not shutil.which("cmake") or not shutil.which("c++"), reason="needs cmake and a C++ compiler on PATH"
)
DUMP = """\
#include <mra_session.hpp>
#include <cstdio>
#include <cstdlib>
// dump BUNDLE IDS MASK BATCH LENGTH: raw int64 files in, the first output as float32 on stdout.
static mra::Ints Read(const char* path, int64_t batch, int64_t length) {
  mra::Ints ints = {std::vector<int64_t>(static_cast<size_t>(batch * length)), {batch, length}};
  std::FILE* file = std::fopen(path, "rb");
  if (file == nullptr || std::fread(ints.values.data(), 8, ints.values.size(), file) != ints.values.size()) std::exit(3);
  std::fclose(file);
  return ints;
}
int main(int, char** argv) {
  const int64_t batch = std::atoll(argv[4]), length = std::atoll(argv[5]);
  const mra::Session session(argv[1]);
  const std::vector<float> values = session.Run(Read(argv[2], batch, length), Read(argv[3], batch, length)).at(0).Float32();
  return std::fwrite(values.data(), 4, values.size(), stdout) == values.size() ? 0 : 4;
}
"""
CMAKE = """\
cmake_minimum_required(VERSION 3.22)
project(outside LANGUAGES CXX)
find_package(MraExport 0.1 REQUIRED COMPONENTS session kernels ort_ops)
add_executable(dump dump.cc)
target_link_libraries(dump PRIVATE MraExport::session)
add_executable(kernel kernel.cc)
target_link_libraries(kernel PRIVATE MraExport::kernels)
file(GENERATE OUTPUT ort_ops.txt CONTENT $<TARGET_FILE:MraExport::ort_ops>)
"""


def run(*command: object, **options: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def cmake_build(source: Path, folder: Path) -> Path:
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    run(
        "cmake",
        "-S",
        source,
        "-B",
        folder,
        *generator,
        f"-DCMAKE_PREFIX_PATH={libraries.cmake_prefix()}",
        "-DCMAKE_BUILD_TYPE=Debug",
    )
    run("cmake", "--build", folder, "--parallel", 2)
    return folder


def test_an_outside_project_gets_the_golden_outputs(bundles, tmp_path) -> None:
    source = tmp_path / "outside"
    source.mkdir()
    (source / "CMakeLists.txt").write_text(CMAKE)
    (source / "dump.cc").write_text(DUMP)
    (source / "kernel.cc").write_text("#include <mra_attention.h>\nint main() { return mra_attention_contract_version() - 1; }\n")
    build = cmake_build(source, tmp_path / "a build")
    run(build / "kernel")
    assert Path((build / "ort_ops.txt").read_text()).samefile(libraries.require("ort_ops"))
    for inputs, outputs in zip(*Bundle.load(bundles("fp32")).golden(), strict=True):
        for name in ("input_ids", "attention_mask"):
            inputs[name].tofile(tmp_path / name)
        done = subprocess.run(
            [
                build / "dump",
                bundles("fp32"),
                tmp_path / "input_ids",
                tmp_path / "attention_mask",
                *map(str, inputs["input_ids"].shape),
            ],
            capture_output=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        wanted = outputs["logits"]
        found = np.frombuffer(done.stdout, np.float32).reshape(wanted.shape)
        real = inputs["attention_mask"] != 0
        np.testing.assert_allclose(found[real], wanted[real], atol=1e-4)


def test_a_component_that_was_not_built_is_named(tmp_path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(CMAKE.replace("ort_ops)", "engines)", 1))
    done = subprocess.run(
        ["cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={libraries.cmake_prefix()}"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode != 0
    assert "engines" in done.stderr
    targets = (libraries.cmake_prefix() / "lib/cmake/MraExport/MraExportTargets.cmake").read_text()
    assert "MraExport::trt_register" in targets
    assert ("MraExport::trt_plugin" in targets) is (libraries.find("trt_plugin") is not None)


def test_the_examples(bundles, tmp_path) -> None:
    build = cmake_build(ROOT / "mra_export/embed/examples", tmp_path)
    with MraRuntime.load(bundles("answers"), "onnxruntime") as runtime:
        wanted = runtime.compare_golden()
    lines = run(build / "hello_mra", bundles("answers")).splitlines()
    assert len(lines) == len(wanted)
    for line, row in zip(lines, wanted, strict=True):
        assert line.startswith(f"{row.case} {row.output}: max abs ")
        assert line.endswith(f"allowed {row.tolerance:.0e}: pass")
    broken = subprocess.run([build / "hello_mra", tmp_path], capture_output=True, text=True, timeout=100)
    assert (broken.returncode, "has no manifest.json" in broken.stderr) == (1, True)
    told = run(build / "mra_bench", bundles("fp32"), "--threads", 2, "--calls", 3, "--batch", 2, "--length", 33)
    assert told.startswith("onnxruntime on cpu, batch 2, length 33, 2 threads, 6 calls\n")
    assert re.search(r"a call: min [\d.]+ ms, median [\d.]+ ms, p99 [\d.]+ ms; [\d.]+ rows/s", told)


def test_the_header_is_c99_and_pkg_config_finds_the_library(bundles, tmp_path) -> None:
    if not shutil.which("pkg-config") or not shutil.which("cc"):
        pytest.skip("needs pkg-config and a C compiler: apt install pkg-config gcc")
    source = tmp_path / "plain.c"
    source.write_text("""\
#include <mra_session.h>
#include <stdio.h>
int main(int argc, char** argv) {
  MraSession* session = NULL;
  MraError* error = mra_session_open(argv[argc - 1], NULL, &session);
  if (error == NULL) error = mra_session_validate(session);
  puts(error == NULL ? mra_session_task(session) : mra_error_message(error));
  mra_error_free(error);
  mra_session_close(session);
  return 0;
}
""")
    prefix = libraries.cmake_prefix()
    flags = run(
        "pkg-config", "--cflags", "--libs", "mra_export", env={**os.environ, "PKG_CONFIG_PATH": str(prefix / "lib/pkgconfig")}
    )
    options = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-Wl,-rpath,{prefix / 'lib'}"]
    run("cc", *options, source, "-o", tmp_path / "plain", *shlex.split(flags))
    assert run(tmp_path / "plain", bundles("fp32")) == "fill-mask\n"
    assert "is not a folder" in run(tmp_path / "plain", tmp_path / "none")


def test_the_library_exports_its_c_api_and_nothing_else() -> None:
    if not shutil.which("nm"):
        pytest.skip("needs nm: apt install binutils")
    table = run("nm", "-D", "--defined-only", libraries.require("session"))
    names = {line.split()[-1] for line in table.splitlines()}
    header = (libraries.cmake_prefix() / "include/mra_session.h").read_text()
    assert names == set(re.findall(r"MRA_SESSION_API .*?\b(mra_\w+)\(", header))


def test_the_cmake_package_has_the_version_of_the_python_package() -> None:
    version = mra_export.__version__
    config = (libraries.cmake_prefix() / "lib/cmake/MraExport/MraExportConfigVersion.cmake").read_text()
    assert f'set(PACKAGE_VERSION "{version}")' in config


# The server of examples/cpp_server


@pytest.fixture
def server(bundles, tmp_path) -> Iterator[tuple[subprocess.Popen, int]]:
    build = cmake_build(ROOT / "examples/cpp_server", tmp_path / "build")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with started([build / "mra_server", bundles("fp32"), port], stdout=subprocess.PIPE, text=True) as process:
        assert "listening" in process.stdout.readline()
        yield process, port


def ask(port: int, method: str, path: str, body: str = "") -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for attempt in range(100):  # the line is printed just before the port opens
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            break
        except ConnectionRefusedError:
            if attempt == 99:
                raise
            connection.close()
            time.sleep(0.1)
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response.status, json.loads(text) if text else {}


def test_the_server(bundles, server) -> None:
    process, port = server
    assert ask(port, "GET", "/ready") == (200, {"ready": True})
    inputs, outputs = (side[1] for side in Bundle.load(bundles("fp32")).golden())
    request = json.dumps({name: array.tolist() for name, array in inputs.items()})
    status, answer = ask(port, "POST", "/infer", request)
    assert status == 200
    found = np.array(answer["logits"]["values"], np.float32).reshape(answer["logits"]["shape"])
    real = inputs["attention_mask"] != 0
    np.testing.assert_allclose(found[real], outputs["logits"][real], atol=1e-4)
    for body, words in (
        ('{"input_ids": [[0, 999]]}', "input_ids holds 999, the model's vocab_size is 261"),
        ('{"input_ids": [[0, 5]], "attention_mask": [[1]]}', "pass a mask of the same shape"),
        ('{"input_ids": [[0, 5], [1]]}', "rows differ in length"),
        ('{"input_ids": [[0], 5]}', "lists of lists of integers"),
        ('{"input_ids": [[0.5]]}', "lists of lists of integers"),
        ('{"input_ids": ' + "[" * 50000 + "]" * 50000 + "}", "lists of lists of integers"),
        ("{}", "input_ids is missing"),
        ("[1", "parse error"),
    ):
        status, answer = ask(port, "POST", "/infer", body)
        assert (status, words in answer["error"]) == (400, True), answer
    assert ask(port, "POST", "/infer", " " * (2 << 20))[0] == 413
    assert ask(port, "POST", "/infer", request)[0] == 200  # and it goes on
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
