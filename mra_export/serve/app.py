"""The HTTP routes: the Open Inference Protocol v2 under /v2, text by task under /v1, /metrics.

app = make_app("bundle") is an ASGI app for any server; `mra-export serve` runs it on uvicorn (server.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from mra_export import __version__
from mra_export.bundle import Bundle, Tensor
from mra_export.errors import BackendError, BusyError, ContractError, MraExportError
from mra_export.predict import Predictor, Prompt
from mra_export.serve.gate import Gate, Refused
from mra_export.serve.metrics import Metrics
from mra_export.serve.model import ServedModel
from mra_export.serve.settings import VERSION, Settings
from mra_export.serve.tensors import DATATYPES, MalformedError, read_infer, write_infer

logger = logging.getLogger("mra_export.serve")

ROUTES = {
    "fill-mask": "/v1/fill-mask",
    "text-classification": "/v1/classify",
    "token-classification": "/v1/token-classify",
    "feature-extraction": "/v1/embed",
    "question-answering": "/v1/question-answer",
    "multiple-choice": "/v1/choose",
}
"""Task -> its text route."""
MAX_TEXTS = 128
_ASIDE = 1 << 16
"""Bytes of a body or of outputs from which on they go to a thread: below, going there takes longer than the work."""
_ASIDE_TEXT = 1 << 12
"""As much for characters of a text."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Texts(_Body):
    text: str | Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS)] = Field(description="One text or several")

    @property
    def texts(self) -> list[str]:
        return [self.text] if isinstance(self.text, str) else self.text

    @property
    def size(self) -> int:
        return sum(map(len, self.texts))


class Masked(Texts):
    top: int = Field(5, ge=1, le=1000, description="Tokens for each mask")


class Embedded(Texts):
    pooling: Literal["none", "mean", "first"] = Field("mean", description="One vector per text, or with none one per token")


class Question(_Body):
    question: str
    context: str


class Choices(_Body):
    text: str
    choices: list[str] = Field(min_length=2, max_length=MAX_TEXTS)


def make_app(
    bundle: str | os.PathLike[str], settings: Settings | None = None, on_failure: Callable[[], None] | None = None
) -> FastAPI:
    """An app that serves this bundle. It answers 503 until the model is loaded and agrees with its golden outputs.

    on_failure: called where it cannot be loaded or does not agree; app.state.model.failure says why.
    Raises BundleError where there is no bundle.
    """
    settings = settings or Settings()
    model = ServedModel(Bundle.load(bundle, verify_hashes=False), settings)
    metrics = Metrics(lambda: model.queue_length, lambda: model.ready)
    model.on_batch = metrics.batch

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.ensure_future(_load(model, on_failure))
        try:
            yield
        finally:
            await loading
            await asyncio.to_thread(model.close)

    app = FastAPI(title="mra_export", version=__version__, lifespan=lifespan)
    app.state.model = model
    app.add_middleware(Gate, settings=settings, metrics=metrics)
    _add_errors(app)
    _add_protocol(app, model)
    _add_texts(app, model)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


async def _load(model: ServedModel, on_failure: Callable[[], None] | None) -> None:
    try:
        await asyncio.to_thread(model.load)
    except Exception as error:
        model.failure = error
        logger.error("not ready", extra={"fields": {"model": model.name, "error": str(error)}}, exc_info=error)
        if on_failure is not None:
            on_failure()


def _add_errors(app: FastAPI) -> None:
    def answer(request: Request, refused: Refused) -> Response:
        request.state.kind = refused.kind
        return _json({"error": refused.detail}, refused.status_code, refused.headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if isinstance(error, Refused):
            return answer(request, error)
        message = error.detail
        if error.status_code == 404:
            message = f"there is no {request.url.path}: /openapi.json lists what there is"
        elif error.status_code == 405:
            message = f"{request.url.path} does not take {request.method}: /openapi.json says what it takes"
        return answer(request, Refused(error.status_code, message, headers=dict(error.headers or {})))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        problems = error.errors()
        for problem in problems:
            if problem["type"] == "json_invalid":
                reason = problem.get("ctx", {}).get("error", "")
                return answer(request, Refused(400, f"the body is not valid JSON ({reason}): send a JSON object"))
        places = [(".".join(str(part) for part in problem["loc"] if part != "body") or "the body", problem) for problem in problems]
        message = "; ".join(f"{place}: {problem['msg']}" for place, problem in places[:5])
        return answer(request, Refused(422, f"{message}. /docs shows what {request.url.path} takes"))

    @app.exception_handler(MalformedError)
    async def malformed(request: Request, error: MalformedError) -> Response:
        return answer(request, Refused(400, str(error)))

    @app.exception_handler(MraExportError)
    async def ours(request: Request, error: MraExportError) -> Response:
        if isinstance(error, ContractError):
            return answer(request, Refused(400, str(error)))
        if isinstance(error, BusyError):
            return answer(request, Refused(503, str(error), "busy", {"Retry-After": "1"}))
        model: ServedModel = request.app.state.model
        if isinstance(error, BackendError) and not model.ready:
            return answer(request, Refused(503, str(error), "draining"))
        raise error  # the gate logs it and answers 500


def _add_protocol(app: FastAPI, model: ServedModel) -> None:
    def check(name: str, version: str | None = None) -> None:
        if name != model.name:
            raise Refused(404, f"there is no model {name!r}: this server has {model.name}")
        if version not in (None, VERSION):
            raise Refused(404, f"the model {name} has no version {version!r}: it has {VERSION}")

    @app.get("/v2")
    async def server_metadata() -> Response:
        return _json({"name": "mra_export", "version": __version__, "extensions": ["binary_tensor_data"]})

    @app.get("/v2/health/live")
    async def live() -> Response:
        return _json({"live": True})

    @app.get("/v2/health/ready")
    async def ready() -> Response:
        return _json({"ready": model.ready}, 200 if model.ready else 503)

    @app.get("/v2/models/{name}")
    @app.get("/v2/models/{name}/versions/{version}")
    async def metadata(name: str, version: str | None = None) -> Response:
        check(name, version)
        model.require()
        return _json(model_metadata(model))

    @app.get("/v2/models/{name}/ready")
    @app.get("/v2/models/{name}/versions/{version}/ready")
    async def model_ready(name: str, version: str | None = None) -> Response:
        check(name, version)
        return _json({"name": name, "ready": model.ready}, 200 if model.ready else 503)

    @app.post("/v2/models/{name}/infer")
    @app.post("/v2/models/{name}/versions/{version}/infer")
    async def infer(request: Request, name: str, version: str | None = None) -> Response:
        check(name, version)
        model.require()
        body = await request.body()
        header_length = request.headers.get("inference-header-content-length")
        if len(body) > _ASIDE:
            asked = await model.aside(read_infer, body, header_length)
        else:
            asked = read_infer(body, header_length)
        for wanted in asked.outputs:
            if wanted not in (names := [tensor.name for tensor in model.bundle.manifest.outputs]):
                raise ContractError(f"{wanted} is not an output of this model: ask for {', '.join(names)}")
        (outputs,) = await model.run(request, [asked.arrays])  # an input "tokens" is `submit`'s: outputs of these tokens only
        if _size([outputs]) > _ASIDE:
            answer, json_size = await model.aside(write_infer, name, VERSION, asked, outputs)
        else:
            answer, json_size = write_infer(name, VERSION, asked, outputs)
        if json_size is None:
            return Response(answer, media_type="application/json")
        headers = {"Inference-Header-Content-Length": str(json_size)}
        return Response(answer, media_type="application/octet-stream", headers=headers)


def _add_texts(app: FastAPI, model: ServedModel) -> None:
    async def answer(request: Request, task: str, size: int, ask: Callable[[Predictor], list[Prompt]]) -> Response:
        """size: characters of all texts."""
        own = model.bundle.manifest.task
        if own != task:
            raise Refused(404, f"the model {model.name} is for {own}, not for {task}: use {ROUTES[own]}")
        model.require()
        if model.predictor is None:
            raise Refused(404, f"the model {model.name} has no tokenizer: send token ids to /v2/models/{model.name}/infer")
        prompts = ask(model.predictor) if size < _ASIDE_TEXT else await model.aside(ask, model.predictor)
        outputs = await model.run(request, [{**prompt.inputs, "tokens": prompt.tokens} for prompt in prompts])

        def write() -> Response:
            answers = [prompt.answer(out) for prompt, out in zip(prompts, outputs, strict=True)]
            return _json({"model": model.name, "answers": answers})

        return write() if _size(outputs) < _ASIDE else await model.aside(write)

    @app.post(ROUTES["fill-mask"])
    async def fill_mask(request: Request, body: Masked) -> Response:
        """The likeliest tokens at each mask token of each text."""
        return await answer(request, "fill-mask", body.size, lambda p: [p.text(text, top=body.top) for text in body.texts])

    @app.post(ROUTES["text-classification"])
    async def classify(request: Request, body: Texts) -> Response:
        """Every label with its probability, the likeliest first, for each text."""
        return await answer(request, "text-classification", body.size, lambda p: [p.text(text) for text in body.texts])

    @app.post(ROUTES["token-classification"])
    async def token_classify(request: Request, body: Texts) -> Response:
        """The likeliest label of each token of each text."""
        return await answer(request, "token-classification", body.size, lambda p: [p.text(text) for text in body.texts])

    @app.post(ROUTES["feature-extraction"])
    async def embed(request: Request, body: Embedded) -> Response:
        """One vector for each text, or for each of its tokens."""
        return await answer(
            request, "feature-extraction", body.size, lambda p: [p.text(text, pooling=body.pooling) for text in body.texts]
        )

    @app.post(ROUTES["question-answering"])
    async def question_answer(request: Request, body: Question) -> Response:
        """The span of the context that answers the question."""
        size = len(body.question) + len(body.context)
        return await answer(request, "question-answering", size, lambda p: [p.question(body.question, body.context)])

    @app.post(ROUTES["multiple-choice"])
    async def choose(request: Request, body: Choices) -> Response:
        """Every choice with its probability, the likeliest first."""
        size = sum(len(body.text) + len(choice) for choice in body.choices)
        return await answer(request, "multiple-choice", size, lambda p: [p.choices(body.text, body.choices)])


def model_metadata(model: ServedModel) -> dict[str, Any]:
    """The protocol's description of the model: -1 for an axis that may change from call to call."""

    def described(tensor: Tensor) -> dict[str, Any]:
        shape = [axis if isinstance(axis, int) else -1 for axis in tensor.axes]
        # numpy has no bfloat16: such outputs come as float32
        dtype = "float32" if tensor.dtype == "bfloat16" else np.dtype(tensor.dtype).name
        return {"name": tensor.name, "datatype": DATATYPES[dtype], "shape": shape}

    manifest = model.bundle.manifest
    return {
        "name": model.name,
        "versions": [VERSION],
        "platform": f"mra_export_{model.require().runtime.backend}",
        "inputs": [described(tensor) for tensor in manifest.inputs],
        "outputs": [described(tensor) for tensor in manifest.outputs],
    }


def _size(outputs: Sequence[Mapping[str, Any]]) -> int:
    return sum(value.nbytes for each in outputs for value in each.values())


def _json(content: Any, status: int = 200, headers: Any = None) -> Response:
    return Response(orjson.dumps(content), status, headers=headers, media_type="application/json")
