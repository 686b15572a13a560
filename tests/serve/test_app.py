"""The app inside a test's own process: text routes for every task, answers before the model is ready, and failures."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mra_export.errors import BackendError, BundleError, ContractError
from mra_export.predict import Predictor
from mra_export.runtime import MraRuntime
from mra_export.serve.settings import Settings, read_token

pytest.importorskip("fastapi", reason="serving needs the extra serve")
pytest.importorskip("httpx", reason="FastAPI's test client needs httpx")
from fastapi.testclient import TestClient

from mra_export.serve.app import ROUTES, make_app
from mra_export.serve.model import ServedModel

WAIT = 240


def ready(client: TestClient) -> TestClient:
    end = time.monotonic() + WAIT
    while client.get("/v2/health/ready").status_code != 200:
        assert time.monotonic() < end
        time.sleep(0.02)
    return client


def close(answer: Any, wanted: Any) -> bool:
    """Equal, numbers within rounding."""
    if isinstance(wanted, dict):
        return answer.keys() == wanted.keys() and all(close(answer[name], value) for name, value in wanted.items())
    if isinstance(wanted, list):
        return len(answer) == len(wanted) and all(map(close, answer, wanted))
    return bool(np.isclose(answer, wanted, atol=1e-9)) if isinstance(wanted, float) else answer == wanted


TEXTS = ["one text", "another, longer one, of more than one block of tokens"]


@pytest.mark.parametrize("kind", ["fp32", "classes", "tokens", "features", "answers", "choices"])
def test_text_routes_give_what_the_command_gives(bundles, kind) -> None:
    with MraRuntime.load(bundles(kind), "onnxruntime") as runtime, TestClient(make_app(bundles(kind))) as client:
        predictor = Predictor(runtime)
        route = ROUTES[predictor.task]
        ready(client)
        if kind == "answers":
            body: Any = {"question": "who?", "context": "it was Ada who wrote it"}
            wanted = [predictor.answer(**body)]
        elif kind == "choices":
            body = {"text": "It rains, so", "choices": ["he is wet.", "he is dry."]}
            wanted = [predictor.choose(**body)]
        else:
            texts = [text + "<mask>" for text in TEXTS] if kind == "fp32" else TEXTS
            body = {"text": texts, **({"pooling": "none"} if kind == "features" else {})}
            wanted = [answer for text in texts for answer in predictor.texts([text])]
        answer = client.post(route, json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == bundles(kind).name
        assert close(answer.json()["answers"], wanted)
        if isinstance(body.get("text"), list):
            one = client.post(route, json={**body, "text": body["text"][0]})
            assert close(one.json()["answers"], wanted[:1])
        for other in set(ROUTES.values()) - {route}:
            wrong = {"question": "a", "context": "b"} if "question" in other else {"text": "a"}
            wrong = {**wrong, "choices": ["a", "b"]} if "choose" in other else wrong
            assert client.post(other, json=wrong).status_code == 404


def test_vectors_are_pooled(bundles) -> None:
    with TestClient(make_app(bundles("features"))) as client:
        ready(client)
        answers = {
            pooling: client.post("/v1/embed", json={"text": "some text", "pooling": pooling}).json()["answers"][0]["features"]
            for pooling in ("none", "mean", "first")
        }
        assert client.post("/v1/embed", json={"text": "some text"}).json()["answers"][0]["features"] == answers["mean"]
    np.testing.assert_allclose(np.mean(answers["none"], axis=0), answers["mean"])
    np.testing.assert_allclose(answers["none"][0], answers["first"])


def test_bfloat16_and_float16_outputs(bundles) -> None:
    for kind, datatype in (("bf16", "FP32"), ("fp16", "FP16")):
        with TestClient(make_app(bundles(kind), Settings(name="m"))) as client:
            ready(client)
            assert client.get("/v2/models/m").json()["outputs"][0]["datatype"] == datatype
            tensor = {"name": "input_ids", "shape": [1, 3], "datatype": "INT64", "data": [5, 6, 7]}
            (output,) = client.post("/v2/models/m/infer", json={"inputs": [tensor]}).json()["outputs"]
            assert (output["datatype"], output["shape"], len(output["data"])) == (datatype, [1, 3, 261], 783)


def test_before_it_is_ready_it_lives_and_says_so(bundles, monkeypatch) -> None:
    go, load = threading.Event(), ServedModel.load

    def held(model: ServedModel) -> None:
        assert go.wait(WAIT)
        load(model)

    monkeypatch.setattr(ServedModel, "load", held)
    with TestClient(make_app(bundles("fp32"), Settings(name="m"))) as client:
        assert client.get("/v2/health/live").status_code == 200
        for path in ("/v2/health/ready", "/v2/models/m/ready", "/v2/models/m"):
            assert client.get(path).status_code == 503
        assert "mra_ready 0.0" in client.get("/metrics").text
        answer = client.post("/v1/fill-mask", json={"text": "<mask>"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert "is being loaded and checked: ask /v2/health/ready" in answer.json()["error"]
        go.set()
        ready(client)


def test_a_model_that_cannot_be_loaded_is_never_ready_and_says_why(bundles) -> None:
    told = threading.Event()
    with TestClient(make_app(bundles("bf16"), Settings(name="m", backend="onnxruntime"), on_failure=told.set)) as client:
        assert told.wait(WAIT)
        assert client.get("/v2/health/ready").status_code == 503
        assert "has no bfloat16 MatMul" in client.get("/v2/models/m").json()["error"]
    with pytest.raises(BundleError):
        make_app("nowhere")


def test_a_failing_model_is_an_error_of_the_server_and_the_next_request_is_answered(bundles, monkeypatch) -> None:
    app = make_app(bundles("fp32"), Settings(name="m"))
    with TestClient(app) as client:
        ready(client)
        runtime = app.state.model.batching.runtime

        def fail(**arrays: Any) -> Any:
            raise BackendError("out of memory in /secret/path")

        with monkeypatch.context() as patched:
            patched.setattr(runtime, "run", fail)
            answer = client.post("/v1/fill-mask", json={"text": "<mask>"})
        assert answer.status_code == 500
        assert "secret" not in answer.text
        assert answer.headers["x-request-id"] in answer.json()["error"]
        assert client.post("/v1/fill-mask", json={"text": "<mask>"}).status_code == 200
        assert 'mra_errors_total{kind="internal"} 1.0' in client.get("/metrics").text


def test_more_texts_than_the_queue_takes_are_busy_and_leave_nothing_behind(bundles) -> None:
    app = make_app(bundles("fp32"), Settings(max_queue=2, max_delay_ms=600_000, workers=1))
    with TestClient(app) as client:
        ready(client)
        answer = client.post("/v1/fill-mask", json={"text": ["<mask>"] * 3})
        assert (answer.status_code, "max_queue is 2" in answer.text) == (503, True)
        assert app.state.model.queue_length == 0


# Settings


def test_settings_are_checked() -> None:
    for name in ("max_body", "timeout", "drain"):
        with pytest.raises(ContractError, match=f"{name} is 0: it must be more than 0"):
            Settings(**{name: 0})
    with pytest.raises(ContractError, match="name is 'a/b': pass a name without a slash"):
        Settings(name="a/b")
    with pytest.raises(ContractError, match="holds no usable token"):
        Settings(token="")


def test_the_token_comes_from_a_file_or_the_environment(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("MRA_EXPORT_TOKEN", raising=False)
    assert read_token(None) is None
    monkeypatch.setenv("MRA_EXPORT_TOKEN", "from-environment")
    assert read_token(None) == "from-environment"
    (tmp_path / "token").write_text("from-file\n")
    assert read_token(tmp_path / "token") == "from-file"
    with pytest.raises(BundleError, match="cannot be read"):
        read_token(tmp_path / "none")
    for bad in ("", "two words", "ümlaut"):
        (tmp_path / "token").write_text(bad)
        with pytest.raises(ContractError, match="holds no usable token"):
            read_token(tmp_path / "token")


# One's own server


def test_the_example_of_an_own_server(bundles, tmp_path) -> None:
    source = Path(__file__).parent.parent.parent / "examples" / "fastapi_server.py"
    (tmp_path / "bundle").symlink_to(bundles("fp32"))
    code = (
        f"import runpy; app = runpy.run_path({str(source)!r})['app']\n"
        "from fastapi.testclient import TestClient\n"
        "with TestClient(app) as client:\n"
        "    answer = client.post('/predict', json={'ids': [5, 6, 7]})\n"
        "    print(answer.status_code, len(answer.json()['best']))\n"
        "    print(client.post('/predict', json={'ids': [5, 600]}).json())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=WAIT, check=False)
    assert done.stdout.splitlines()[0] == "200 3", done.stderr
    assert "vocab_size is 261" in done.stdout
    assert len([line for line in source.read_text().splitlines() if line.strip() and not line.startswith(('"""', "#"))]) <= 20
