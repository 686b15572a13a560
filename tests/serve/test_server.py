"""`mra-export serve`, really started: the Open Inference Protocol, bad requests, token, metrics, logs, and its end."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from started import COMMAND, WAIT, Server, tensor

from mra_export.bundle import GOLDEN, Bundle, file_entry, write_golden
from mra_export.runtime import MraRuntime

INFER = "/v2/models/mra/infer"
FILL = "/v1/fill-mask"


@pytest.fixture(scope="module")
def server(bundles, tmp_path_factory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    with Server(bundles("fp32"), log, "--max-body", "20000", "--max-batch-size", "4").ready() as server:
        yield server
        assert server.stop() == 0


@pytest.fixture(scope="module")
def logits(bundles) -> Any:
    """What the runtime gives for a list of token ids."""
    with MraRuntime.load(bundles("fp32"), "onnxruntime") as runtime:
        yield lambda rows: runtime.run(input_ids=np.array(rows))["logits"]


def good(server: Server, logits: Any) -> None:
    """The server still answers, and rightly."""
    status, answer, _ = server.ask("POST", INFER, {"inputs": [tensor([[5, 6, 7]])]})
    assert status == 200
    (output,) = answer["outputs"]
    np.testing.assert_array_equal(np.array(output["data"], np.float32).reshape(output["shape"]), logits([[5, 6, 7]]))


# The protocol


def test_health_and_metadata(server) -> None:
    assert server.ask("GET", "/v2/health/live")[:2] == (200, {"live": True})
    assert server.ask("GET", "/v2/health/ready")[:2] == (200, {"ready": True})
    status, answer, _ = server.ask("GET", "/v2")
    assert (status, answer["name"], answer["extensions"]) == (200, "mra_export", ["binary_tensor_data"])
    for path in ("/v2/models/mra", "/v2/models/mra/versions/1"):
        assert server.ask("GET", path + "/ready")[:2] == (200, {"name": "mra", "ready": True})
        status, answer, _ = server.ask("GET", path)
        assert (status, answer["versions"], answer["platform"]) == (200, ["1"], "mra_export_onnxruntime")
        assert answer["inputs"][0] == {"name": "input_ids", "datatype": "INT64", "shape": [-1, -1]}
        assert answer["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, -1, 261]}]


def test_infer_as_json(server, logits) -> None:
    rows = [[5, 6, 7, 8], [9, 10, 11, 12]]
    for path in (INFER, "/v2/models/mra/versions/1/infer"):
        body = {"id": "mine", "inputs": [tensor(rows), tensor([[1] * 4] * 2, "attention_mask")], "outputs": [{"name": "logits"}]}
        status, answer, _ = server.ask("POST", path, body)
        assert (status, answer["id"], answer["model_name"], answer["model_version"]) == (200, "mine", "mra", "1")
        (output,) = answer["outputs"]
        assert (output["name"], output["datatype"], output["shape"]) == ("logits", "FP32", [2, 4, 261])
        np.testing.assert_array_equal(np.array(output["data"], np.float32).reshape(2, 4, 261), logits(rows))
    flat = {**tensor(rows), "data": [*rows[0], *rows[1]]}
    assert server.ask("POST", INFER, {"inputs": [flat]})[1]["outputs"][0]["data"] == output["data"]
    small = tensor(rows, datatype="UINT8")
    assert server.ask("POST", INFER, {"inputs": [small]})[1]["outputs"][0]["data"] == output["data"]


def test_infer_of_chosen_tokens_only(server, logits) -> None:
    rows = [[5, 6, 7, 8], [9, 10, 11, 12]]
    body = {"inputs": [tensor(rows), tensor([6, 1], "tokens")]}
    (output,) = server.ask("POST", INFER, body)[1]["outputs"]
    assert output["shape"] == [2, 261]
    np.testing.assert_array_equal(np.array(output["data"], np.float32).reshape(2, 261), logits(rows).reshape(8, 261)[[6, 1]])


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_tritonclient(server, logits, binary_in, binary_out) -> None:
    triton = pytest.importorskip("tritonclient.http")
    rows = np.random.default_rng(0).integers(0, 261, (3, 40))
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}", network_timeout=WAIT) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("mra")
        assert client.is_model_ready("mra", "1")
        assert not client.is_model_ready("other")
        assert client.get_server_metadata()["name"] == "mra_export"
        described = client.get_model_metadata("mra", "1")
        inputs = []
        for entry in described["inputs"]:
            value = rows if entry["name"] == "input_ids" else np.ones_like(rows)
            inputs.append(triton.InferInput(entry["name"], value.shape, entry["datatype"]))
            inputs[-1].set_data_from_numpy(value, binary_data=binary_in)
        wanted = [triton.InferRequestedOutput("logits", binary_data=binary_out)]
        for outputs in (wanted, None) if binary_out else (wanted,):
            answer = client.infer("mra", inputs, outputs=outputs, request_id="7")
            assert answer.get_response()["id"] == "7"
            np.testing.assert_array_equal(answer.as_numpy("logits"), logits(rows))
        inputs[0].set_data_from_numpy(rows + 300, binary_data=binary_in)
        with pytest.raises(triton.InferenceServerException, match="vocab_size is 261"):
            client.infer("mra", inputs)


def test_ragged_callers_get_their_own_answers(server, logits) -> None:
    random = np.random.default_rng(3)
    rows = [random.integers(0, 261, random.integers(1, 60)).tolist() for _ in range(24)]

    def ask(row: list[int]) -> Any:
        (output,) = server.ask("POST", INFER, {"inputs": [tensor([row])]})[1]["outputs"]
        return np.array(output["data"], np.float32).reshape(output["shape"])

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        for row, answer in zip(rows, pool.map(ask, rows), strict=True):
            np.testing.assert_array_equal(answer, logits([row]))


def test_text(server) -> None:
    status, answer, _ = server.ask("POST", FILL, {"text": ["a<mask>b", "<mask>"], "top": 2})
    assert status == 200
    assert [entry["text"] for entry in answer["answers"]] == ["a<mask>b", "<mask>"]
    assert [len(mask) for entry in answer["answers"] for mask in entry["masks"]] == [2, 2]


# Bad requests


def binary(*tensors: dict[str, Any], raw: bytes = b"") -> tuple[bytes, dict[str, str]]:
    header = json.dumps({"inputs": list(tensors)}).encode()
    return header + raw, {"Inference_Header_Content_Length": str(len(header))}


IDS = {"name": "input_ids", "shape": [1, 2], "datatype": "INT64"}
BAD: dict[str, tuple[str, str, Any, dict[str, str], int, str]] = {
    "dtype": ("POST", INFER, {"inputs": [tensor([[1.5]], datatype="FP32")]}, {}, 400, "input_ids has datatype 'FP32': pass INT64"),
    "no dtype": ("POST", INFER, {"inputs": [{"name": "input_ids", "shape": [1, 1], "data": [1]}]}, {}, 400, "datatype None"),
    "values of another type": ("POST", INFER, {"inputs": [tensor([["a", "b"]])]}, {}, 400, "pass integers"),
    "numbers with a point": ("POST", INFER, {"inputs": [tensor([[1, 2.5]])]}, {}, 400, "pass integers"),
    "numbers beyond all": ("POST", INFER, {"inputs": [tensor([[2**63]])]}, {}, 400, "input_ids holds"),
    "ragged": ("POST", INFER, {"inputs": [tensor([[1, 2], [3]])]}, {}, 400, "different depths or lengths"),
    "shape and data": ("POST", INFER, {"inputs": [{**IDS, "data": [1, 2, 3]}]}, {}, 400, "has 3 values, its shape [1, 2] takes 2"),
    "rank": ("POST", INFER, {"inputs": [tensor([1, 2])]}, {}, 400, "pass 2 axes, (batch, length)"),
    "no shape": ("POST", INFER, {"inputs": [{**IDS, "shape": "2"}]}, {}, 400, "pass a list of numbers"),
    "negative shape": ("POST", INFER, {"inputs": [{**IDS, "shape": [-1, 2]}]}, {}, 400, "pass a list of numbers"),
    "empty": ("POST", INFER, {"inputs": [{**IDS, "shape": [0, 2], "data": []}]}, {}, 400, "every axis must be 1 or more"),
    "mask of another shape": (
        "POST",
        INFER,
        {"inputs": [tensor([[1, 2]]), tensor([[1]], "attention_mask")]},
        {},
        400,
        "same shape",
    ),
    "too long": ("POST", INFER, {"inputs": [tensor([[5] * 257])]}, {}, 400, "cut the input to 256 tokens or fewer"),
    "too many rows": ("POST", INFER, {"inputs": [tensor([[5]] * 5)]}, {}, 400, "send 4 rows or fewer at once"),
    "outside the vocabulary": ("POST", INFER, {"inputs": [tensor([[261]])]}, {}, 400, "pass values from 0 to 260"),
    "below it": ("POST", INFER, {"inputs": [tensor([[-1]])]}, {}, 400, "pass values from 0 to 260"),
    "another input": ("POST", INFER, {"inputs": [tensor([[1]], "pixels")]}, {}, 400, "pixels is not an input of this model"),
    "an input twice": ("POST", INFER, {"inputs": [tensor([[1]]), tensor([[1]])]}, {}, 400, "pass each input once"),
    "no input_ids": ("POST", INFER, {"inputs": [tensor([[1]], "attention_mask")]}, {}, 400, "input_ids is missing"),
    "no inputs": ("POST", INFER, {"inputs": []}, {}, 400, 'no list "inputs"'),
    "another output": ("POST", INFER, {"inputs": [tensor([[1]])], "outputs": [{"name": "x"}]}, {}, 400, "ask for logits"),
    "a list": ("POST", INFER, [], {}, 400, "the body is a JSON list: pass an object"),
    "invalid JSON": ("POST", INFER, b'{"inputs": [', {}, 400, "not valid JSON"),
    "nested without end": ("POST", INFER, b"[" * 15000, {}, 400, "not valid JSON"),
    "no body": ("POST", INFER, None, {}, 400, "not valid JSON"),
    "not UTF-8": ("POST", INFER, b'{"id": "\xff"}', {}, 400, "not valid JSON"),
    "bytes short": (
        "POST",
        INFER,
        *binary({**IDS, "parameters": {"binary_data_size": 16}}, raw=b"123"),
        400,
        "3 bytes of data are left",
    ),
    "bytes left": ("POST", INFER, *binary({**IDS, "data": [1, 2]}, raw=b"123"), 400, "3 bytes are left after the last tensor"),
    "bytes miscounted": (
        "POST",
        INFER,
        *binary({**IDS, "parameters": {"binary_data_size": 8}}, raw=b"12345678"),
        400,
        "takes 16 bytes",
    ),
    "tokens": (
        "POST",
        INFER,
        {"inputs": [tensor([[5, 6]]), tensor([2], "tokens")]},
        {},
        400,
        "tokens holds 2, input_ids of shape (1, 2) has 2: pass numbers from 0 to 1",
    ),
    "header too long": ("POST", INFER, b"{}", {"Inference_Header_Content_Length": "3"}, 400, "pass the number of bytes of JSON"),
    "header no number": ("POST", INFER, b"{}", {"Inference_Header_Content_Length": "-1"}, 400, "pass the number of bytes of JSON"),
    "huge": ("POST", INFER, b" " * 20001, {}, 413, "more than 20000 bytes: send less at once"),
    "huge text": ("POST", FILL, {"text": "x" * 20001}, {}, 413, "more than 20000 bytes"),
    "media type": ("POST", INFER, b"a=1", {"Content_Type": "text/plain"}, 415, "send application/json"),
    "form": ("POST", FILL, b"a=1", {"Content_Type": "application/x-www-form-urlencoded"}, 415, "send application/json"),
    "compressed": ("POST", INFER, b"a", {"Content_Encoding": "gzip"}, 415, "send it uncompressed"),
    "unknown model": ("POST", "/v2/models/other/infer", {}, {}, 404, "there is no model 'other': this server has mra"),
    "unknown model's metadata": ("GET", "/v2/models/other", None, {}, 404, "this server has mra"),
    "unknown version": ("POST", "/v2/models/mra/versions/2/infer", {}, {}, 404, "no version '2': it has 1"),
    "unknown path": ("GET", "/v3", None, {}, 404, "there is no /v3"),
    "method": ("GET", INFER, None, {}, 405, "does not take GET"),
    "another task": (
        "POST",
        "/v1/classify",
        {"text": "a"},
        {},
        404,
        "is for fill-mask, not for text-classification: use /v1/fill-mask",
    ),
    "invalid JSON text": ("POST", FILL, b"{", {"Content_Type": "application/json"}, 400, "not valid JSON"),
    "no text": ("POST", FILL, {}, {}, 422, "text: Field required"),
    "a number for a text": ("POST", FILL, {"text": 5}, {}, 422, "text"),
    "an unknown field": ("POST", FILL, {"text": "<mask>", "topp": 5}, {}, 422, "topp"),
    "no mask": ("POST", FILL, {"text": "abc"}, {}, 400, "has no <mask>: write it where a word is missing"),
    "a text that is too long": ("POST", FILL, {"text": "<mask>" + "x" * 300}, {}, 400, "the model takes 256: shorten it"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_gets_its_status_and_the_fix_and_the_server_goes_on(server, logits, case) -> None:
    method, path, body, headers, wanted, message = BAD[case]
    status, answer, _ = server.ask(method, path, body, **headers)
    assert (status, message in answer["error"]) == (wanted, True), answer
    good(server, logits)


def raw(server: Server, sent: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), WAIT) as connection:
        connection.sendall(sent)
        received = b""
        while part := connection.recv(65536):
            received += part
    return received


def test_a_huge_body_is_refused_before_it_is_sent_and_while_it_is(server, logits) -> None:
    post = f"POST {INFER} HTTP/1.1\r\nHost: a\r\n".encode()
    assert raw(server, post + b"Content-Length: 99999999999\r\n\r\n").startswith(b"HTTP/1.1 413 ")
    for path in (INFER, FILL):
        post = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        assert raw(server, post + (b"1000\r\n" + b" " * 4096 + b"\r\n") * 6).startswith(b"HTTP/1.1 413 ")
    good(server, logits)


def test_what_is_no_http_hurts_nobody(server, logits) -> None:
    assert raw(server, b"\x00\x01\x02 nonsense\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    good(server, logits)


# Metrics and logs


def test_metrics(server, logits) -> None:
    good(server, logits)
    server.ask("POST", INFER, b"{")
    status, text, _ = server.ask("GET", "/metrics")
    assert status == 200
    prometheus = pytest.importorskip("prometheus_client.parser")
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in prometheus.text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["mra_ready",] == 1
    assert samples["mra_queue_length",] == 0
    assert samples["mra_errors_total", "bad_request"] >= 1
    assert samples["mra_requests_total", "/v2/models/{name}/infer", "200"] >= 1
    assert samples["mra_batch_requests_count",] == samples["mra_model_seconds_count",] >= 1
    assert samples["mra_queue_seconds_count",] >= samples["mra_batch_requests_count",]
    assert samples["mra_tokens_total",] >= 3
    assert samples["mra_request_seconds_count", "/v2/models/{name}/infer"] >= 2
    assert samples["process_resident_memory_bytes",] > 0


def test_logs_are_json_with_the_callers_request_id_and_without_its_text(server) -> None:
    _, _, headers = server.ask("POST", FILL, {"text": "secret<mask>"}, X_Request_Id="mine-1")
    assert headers["x-request-id"] == "mine-1"
    _, _, headers = server.ask("POST", FILL, {"text": "secret<mask>"}, X_Request_Id="no good id")
    assert headers["x-request-id"] != "no good id"
    end = time.monotonic() + WAIT
    while not (lines := [line for line in server.lines("request") if line["request_id"] == "mine-1"]):
        assert time.monotonic() < end
        time.sleep(0.02)
    assert {"status": 200, "path": FILL, "rows": 1, "method": "POST", "level": "info"}.items() <= lines[0].items()
    assert lines[0]["ms"] > 0
    text = server.log.read_text()
    assert "secret" not in text
    assert all(json.loads(line) for line in text.rpartition("\n")[0].splitlines())


# Token, queue, time, end


def test_a_token_is_asked_for_everywhere_but_health(bundles, tmp_path) -> None:
    (tmp_path / "token").write_text("right-token\n")
    with Server(bundles("fp32"), tmp_path / "log", "--token-file", str(tmp_path / "token")).ready() as server:
        assert server.ask("GET", "/v2/health/ready")[0] == 200
        for path in ("/metrics", "/v2", "/v2/models/mra", "/openapi.json", "/v9"):
            for headers in ({}, {"Authorization": "Bearer wrong-token"}, {"Authorization": "right-token"}):
                status, answer, sent = server.ask("GET", path, **headers)
                assert (status, sent["www-authenticate"]) == (401, "Bearer")
                assert "pass the server's token" in answer["error"]
        right = {"Authorization": "Bearer right-token"}
        assert server.ask("GET", "/v2/models/mra", **right)[0] == 200
        assert server.ask("POST", INFER, {"inputs": [tensor([[1]])]}, **right)[0] == 200
        assert server.ask("POST", INFER, {"inputs": [tensor([[1]])]})[0] == 401
        assert server.stop() == 0
    assert "right-token" not in server.log.read_text()


def test_a_full_queue_is_busy_time_ends_and_sigterm_drains(bundles, tmp_path) -> None:
    """One worker that waits ten minutes for batch mates holds the queue of two full, and lets it go when it drains."""
    options = ("--max-queue", "2", "--max-delay-ms", "600000", "--workers", "1", "--timeout", "3")
    body = {"inputs": [tensor([[5, 6, 7]])]}
    with Server(bundles("fp32"), tmp_path / "log", *options).ready() as server:
        end = time.monotonic() + WAIT
        answers: list[Any] = []
        while [status for status, _, _ in answers] != [503, 504, 504]:  # others may hold the processor for longer than the time-out
            assert time.monotonic() < end, answers
            with concurrent.futures.ThreadPoolExecutor(3) as pool:
                answers = sorted(pool.map(lambda _: server.ask("POST", INFER, body), range(3)), key=lambda answer: answer[0])
        assert "2 requests are waiting, max_queue is 2: try again later" in answers[0][1]["error"]
        assert answers[0][2]["retry-after"] == "1"
        assert "no answer within 3 s" in answers[1][1]["error"]
        slow = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{{".encode()
        assert raw(server, slow).startswith(b"HTTP/1.1 408 "), "a body that never ends"
        assert "mra_queue_length 0.0" in server.ask("GET", "/metrics")[1], "what timed out does not stay in the queue"
        metrics = server.ask("GET", "/metrics")[1]
        assert 'mra_errors_total{kind="busy"}' in metrics
        assert 'mra_errors_total{kind="timeout"}' in metrics
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(server.ask, "POST", INFER, body)
            time.sleep(0.5)
            server.process.terminate()
            assert waiting.result(WAIT)[0] in (200, 504)
        assert server.stop() == 0
    assert server.lines("stopped")


def test_a_client_that_goes_away_leaves_the_queue(bundles, tmp_path) -> None:
    with Server(bundles("fp32"), tmp_path / "log", "--max-delay-ms", "600000", "--workers", "1").ready() as server:
        body = json.dumps({"inputs": [tensor([[5, 6, 7]])]}).encode()
        with socket.create_connection(("127.0.0.1", server.port), WAIT) as connection:
            connection.sendall(f"POST {INFER} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            while "mra_queue_length 1.0" not in server.ask("GET", "/metrics")[1]:
                time.sleep(0.02)
        while "mra_queue_length 0.0" not in server.ask("GET", "/metrics")[1]:
            time.sleep(0.02)
        assert 'mra_errors_total{kind="client_gone"} 1.0' in server.ask("GET", "/metrics")[1]
        assert server.stop() == 0


def test_sigterm_answers_what_is_in_flight(bundles, tmp_path) -> None:
    with Server(bundles("fp32"), tmp_path / "log", "--workers", "1").ready() as server:
        statuses: list[int] = []

        def ask() -> None:
            with contextlib.suppress(OSError):  # it listens no more, so it has not taken this one
                while True:
                    statuses.append(server.ask("POST", INFER, {"inputs": [tensor([[5] * 250])]})[0])

        callers = [threading.Thread(target=ask) for _ in range(4)]
        for caller in callers:
            caller.start()
        server.wait_for("request", 8)
        assert server.stop() == 0
        for caller in callers:
            caller.join(WAIT)
        assert set(statuses) == {200}
        assert len(statuses) == len(server.lines("request")) >= 8, "every request that was taken was answered"


# Start


def test_ready_only_after_the_golden_outputs_agree(bundles, tmp_path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundles("fp32"), folder)
    inputs, outputs = Bundle.load(folder).golden()
    for output in outputs:
        output["logits"] = output["logits"] + 1
    write_golden(folder / GOLDEN, inputs, outputs)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][GOLDEN] = file_entry(folder / GOLDEN).model_dump()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with Server(folder, tmp_path / "log") as server:
        seen = []
        with contextlib.suppress(OSError):  # it has ended
            while True:
                seen.append(server.ask("GET", "/v2/health/ready")[:2])
        assert server.process.wait(WAIT) == 3
        assert all(answer == (503, {"ready": False}) for answer in seen)
        assert "differs from PyTorch in logits" in server.log.read_text()


def refused(*arguments: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [*COMMAND, "serve", *arguments],
        capture_output=True,
        text=True,
        timeout=WAIT,
        env={**os.environ, **environment},
        check=False,
    )
    return done.returncode, done.stderr


def test_what_cannot_be_served_ends_at_once(bundles, tmp_path, server) -> None:
    assert refused(str(tmp_path / "none"))[0] == 4
    code, said = refused(str(bundles("fp32")), "--port", str(server.port))
    assert (code, f"cannot listen on 127.0.0.1 port {server.port}" in said) == (4, True), said
    code, said = refused(str(bundles("fp32")), "--token-file", str(tmp_path / "none"))
    assert (code, "cannot be read" in said) == (4, True), said
    code, said = refused(str(bundles("fp32")), MRA_EXPORT_TOKEN="two words")
    assert (code, "MRA_EXPORT_TOKEN holds no usable token" in said) == (2, True), said


def test_without_the_extra_it_says_what_to_install(bundles) -> None:
    code = "import sys; sys.modules['fastapi'] = None; from mra_export.cli import main; main()"
    script = (
        f"import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'fastapi' else f(n, *a); {code}"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "serve", str(bundles("fp32"))], capture_output=True, text=True, timeout=WAIT, check=False
    )
    assert done.returncode == 4
    assert "serving needs fastapi, not installed here: pip install 'mra-export[serve]'" in done.stderr
