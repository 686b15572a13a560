"""A real tritonserver runs what `mra-export triton --backend python` writes: over HTTP and gRPC, without a GPU."""

from __future__ import annotations

import importlib
import json
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from mra_export import Bundle, MraRuntime
from mra_export.serve.triton import TritonOptions, write_repository
from mra_export.text import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
start_server = importlib.import_module("start_server")
pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(start_server.why_no_triton() is not None, reason=str(start_server.why_no_triton())),
]


class Served(NamedTuple):
    """bundle: what is served. http: base URL. grpc: host:port."""

    bundle: Bundle
    http: str
    grpc: str


@pytest.fixture(scope="module")
def served(bundles, tmp_path_factory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("triton")
    bundle = Bundle.load(bundles("invariant"))
    options = TritonOptions("python", tokenizer=True, max_batch_size=4, max_delay_ms=50, threads=1)
    write_repository(bundle, folder / "repository", options)
    with start_server.triton(folder / "repository", folder / "log") as (http, grpc):
        yield Served(bundle, http, grpc)


def ragged(bundle: Bundle, count: int) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    sizes = [(1 + index % 2, int(length)) for index, length in enumerate(random.integers(1, 256, count))]
    return [{"input_ids": random.integers(0, bundle.manifest.model.vocab_size, size)} for size in sizes]


def infer(client: Any, module: Any, inputs: dict[str, np.ndarray], model: str = "mra") -> Any:
    tensors = []
    for name, array in inputs.items():
        tensor = module.InferInput(name, list(array.shape), "BYTES" if array.dtype == object else "INT64")
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    return client.infer(model, tensors)


def test_http_and_grpc_give_what_the_runtime_gives(served: Served) -> None:
    grpc, http = (pytest.importorskip(f"tritonclient.{name}") for name in ("grpc", "http"))
    clients = (grpc.InferenceServerClient(served.grpc), grpc), (http.InferenceServerClient(served.http.split("//")[1]), http)
    with MraRuntime.load(served.bundle, "onnxruntime") as runtime:
        for inputs in (*served.bundle.golden()[0], {"input_ids": np.array([[0, 5, 6, 7, 2]])}):
            wanted = runtime.run(**inputs)
            for client, module in clients:
                assert client.is_model_ready("mra")
                answer = infer(client, module, inputs)
                for name, array in wanted.items():
                    np.testing.assert_array_equal(answer.as_numpy(name), array)
    for client, _ in clients:
        client.close()


def test_ragged_requests_share_batches_and_none_changes_another(served: Served) -> None:
    http = pytest.importorskip("tritonclient.http")
    requests = ragged(served.bundle, 40)
    with MraRuntime.load(served.bundle, "onnxruntime") as runtime:
        wanted = [runtime.run(**inputs)["logits"] for inputs in requests]
    local = threading.local()

    def ask(inputs: dict[str, np.ndarray]) -> np.ndarray:
        if not hasattr(local, "client"):
            local.client = http.InferenceServerClient(served.http.split("//")[1])
        return infer(local.client, http, inputs).as_numpy("logits")

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, requests))
    for answer, expected in zip(answers, wanted, strict=True):
        np.testing.assert_allclose(answer, expected, atol=1e-5)
    with urllib.request.urlopen(f"{served.http}/v2/models/mra/stats") as response:
        stats = json.load(response)["model_stats"][0]
    assert stats["execution_count"] < stats["inference_count"] - len(requests) // 2, "calls hold several rows each"


def test_text_goes_through_the_ensemble(served: Served) -> None:
    http = pytest.importorskip("tritonclient.http")
    texts = ["for i in <mask>:", "a much longer <mask> of words"]
    client = http.InferenceServerClient(served.http.split("//")[1])
    answer = infer(client, http, {"TEXT": np.array([[text.encode()] for text in texts], dtype=object)}, "mra-text")
    encoded = Tokenizer(served.bundle.path).encode(texts, 256)
    np.testing.assert_array_equal(answer.as_numpy("input_ids"), encoded["input_ids"])
    with MraRuntime.load(served.bundle, "onnxruntime") as runtime:
        wanted = runtime.run(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"])
    np.testing.assert_allclose(answer.as_numpy("logits"), wanted["logits"], atol=1e-5)
    client.close()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([("input_ids", [1, 3], "INT64", [1, 2, 261])], "vocab_size"),
        ([("input_ids", [1, 257], "INT64", [1] * 257)], "max_position_embeddings is 256"),
        ([("input_ids", [1, 2], "INT64", [1, 2]), ("attention_mask", [1, 3], "INT64", [1, 1, 1])], "mask of the same shape"),
        ([("input_ids", [1, 2], "FP32", [1.0, 2.0])], "input_ids"),
        ([("input_ids", [5, 1], "INT64", [1] * 5)], "must be <= 4"),
        ([("attention_mask", [1, 2], "INT64", [1, 1])], "input_ids"),
    ],
)
def test_a_request_that_does_not_fit_is_told_so_and_the_server_goes_on(served: Served, inputs, message) -> None:
    body = {"inputs": [dict(zip(("name", "shape", "datatype", "data"), tensor, strict=True)) for tensor in inputs]}
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(served, body)
    assert refused.value.code == 400
    assert message in json.load(refused.value)["error"]
    fine = {"inputs": [{"name": "input_ids", "shape": [1, 2], "datatype": "INT64", "data": [1, 2]}]}
    assert ask(served, fine)["outputs"][0]["shape"] == [1, 2, 261]


def test_metadata_names_every_tensor(served: Served) -> None:
    with urllib.request.urlopen(f"{served.http}/v2/models/mra") as response:
        metadata = json.load(response)
    assert {tensor["name"] for tensor in metadata["inputs"]} == {"input_ids", "attention_mask"}
    assert metadata["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, -1, 261]}]


def ask(served: Served, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(f"{served.http}/v2/models/mra/infer", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)
