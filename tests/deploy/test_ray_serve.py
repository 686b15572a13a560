"""Ray Serve runs two replicas of a bundle; one is killed under load, and every request is answered, and rightly."""

from __future__ import annotations

import importlib
import json
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest

from mra_export import Bundle, MraRuntime

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
start_server = importlib.import_module("start_server")
pytestmark = [pytest.mark.heavy, pytest.mark.skipif(start_server.why_no_ray() is not None, reason=str(start_server.why_no_ray()))]
REQUESTS = 300


class Served(NamedTuple):
    """bundle: what is served. url: of the server."""

    bundle: Bundle
    url: str


@pytest.fixture(scope="module")
def served(bundles, tmp_path_factory) -> Iterator[Served]:
    bundle = Bundle.load(bundles("invariant"))
    before = set(psutil.pids())
    with start_server.ray(bundle.path.resolve(), tmp_path_factory.mktemp("ray") / "log", replicas=2, num_cpus=1) as url:
        yield Served(bundle, url)
    left = [process for process in map(named, set(psutil.pids()) - before) if process and process.startswith("ray::")]
    assert not left, "Ray was stopped with all its processes"


def named(pid: int) -> str | None:
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return None


def replicas() -> list[psutil.Process]:
    """The model's replicas among this process's descendants."""
    found = []
    for process in psutil.Process().children(recursive=True):
        if (named(process.pid) or "").startswith("ray::ServeReplica:default:Replica"):
            found.append(process)
    return found


def post(url: str, body: bytes) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/v2/models/mra/infer", body), timeout=120) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def body(ids: np.ndarray) -> bytes:
    return json.dumps(
        {"inputs": [{"name": "input_ids", "shape": list(ids.shape), "datatype": "INT64", "data": ids.ravel().tolist()}]}
    ).encode()


def logits(answer: dict[str, Any]) -> np.ndarray:
    output = answer["outputs"][0]
    return np.array(output["data"], dtype=np.float32).reshape(output["shape"])


def test_a_killed_replica_loses_no_request(served: Served) -> None:
    deadline = time.monotonic() + 60
    while len(replicas()) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    victims = replicas()
    assert len(victims) == 2
    random = np.random.default_rng(0)
    requests = [random.integers(0, 261, (1, int(length))) for length in random.integers(1, 256, REQUESTS)]
    answered = threading.Semaphore(0)

    def ask(ids: np.ndarray) -> tuple[int, dict[str, Any]]:
        answer = post(served.url, body(ids))
        answered.release()
        return answer

    with ThreadPoolExecutor(16) as pool:
        futures = [pool.submit(ask, ids) for ids in requests]
        for _ in range(REQUESTS // 6):
            answered.acquire()
        victims[0].kill()
        killed_with = sum(not future.done() for future in futures)
        answers = [future.result() for future in futures]
    assert killed_with > REQUESTS // 2, "it was killed under load"
    assert [status for status, _ in answers] == [200] * REQUESTS
    with MraRuntime.load(served.bundle, "onnxruntime", intra_op_threads=1) as runtime:
        for ids, (_, answer) in zip(requests, answers, strict=True):
            np.testing.assert_allclose(logits(answer), runtime.run(input_ids=ids)["logits"], atol=1e-5)
    deadline = time.monotonic() + 120
    while len(replicas()) < 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert len(replicas()) == 2, "Ray replaces the dead one"


@pytest.mark.parametrize(
    ("request_body", "status", "message"),
    [
        (b"{", 400, "not valid JSON"),
        (body(np.array([[1, 261]])), 400, "vocab_size"),
        (body(np.ones((1, 257), dtype=np.int64)), 400, "max_position_embeddings is 256"),
        (body(np.ones((9, 2), dtype=np.int64)), 400, "max_batch_size is 8"),
    ],
)
def test_a_request_that_does_not_fit_is_told_so(served: Served, request_body, status, message) -> None:
    code, answer = post(served.url, request_body)
    assert code == status
    assert message in answer["error"]
    assert "Traceback" not in answer["error"]
    assert post(served.url, body(np.array([[1, 2]])))[0] == 200


def test_tritonclient_talks_to_it(served: Served) -> None:
    http = pytest.importorskip("tritonclient.http")
    client = http.InferenceServerClient(served.url.split("//")[1])
    assert client.is_server_ready()
    assert client.is_model_ready("mra")
    assert client.get_model_metadata("mra")["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, -1, 261]}]
    inputs, outputs = (side[1] for side in served.bundle.golden())
    tensors = []
    for name, array in inputs.items():
        tensor = http.InferInput(name, list(array.shape), "INT64")
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    np.testing.assert_allclose(client.infer("mra", tensors).as_numpy("logits"), outputs["logits"], atol=1e-4)
    client.close()


def test_what_is_not_there_is_404(served: Served) -> None:
    with pytest.raises(urllib.error.HTTPError) as missing:
        urllib.request.urlopen(f"{served.url}/v2/models/other")
    assert missing.value.code == 404
    assert "the model is at /v2/models/mra" in json.load(missing.value)["error"]
