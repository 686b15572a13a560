"""A bundle on Ray Serve: replicas on one machine or many, each batching its requests, behind the Open Inference Protocol.

    serve run mra_export.serve.ray_app:app bundle=/shared/bundle replicas=2

One address in front (`Ingress`), the model behind it (`Replica`). A replica that dies takes no request with it: the ingress gives
its requests to another, which is safe because inference changes nothing.
"""

# No `from __future__ import annotations`: Ray reads the type of app's argument to turn name=value into RayOptions.
import asyncio
import os
from typing import Any

import numpy as np
import orjson
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.requests import Request
from starlette.responses import Response

from mra_export.bundle import Bundle, Tensor
from mra_export.errors import BackendError, BusyError, ContractError
from mra_export.runtime import MraRuntime, choose_backend
from mra_export.serve.batching import BatchingRuntime
from mra_export.serve.tensors import DATATYPES, MalformedError, read_infer, write_infer

VERSION = "1"
_ATTEMPTS = 5
"""Replicas that may die under one request."""
_READY_SECONDS = 10.0
_INGRESS_REQUESTS = 10_000
"""Requests that the ingress holds at once; the queue's bound is max_queue."""

Arrays = dict[str, Any]


class RayOptions(BaseModel):
    """What `serve run` takes as name=value.

    bundle: its folder, the same on every machine. name: the model's in URLs. replicas: copies of the model, or with max_replicas
    the least of them, more as load demands. num_cpus, num_gpus: of one replica; its threads are num_cpus. backend, device: as for
    MraRuntime.load. max_batch_size, max_delay_ms: as for BatchingRuntime. max_queue: requests that may wait for a replica.
    """

    model_config = ConfigDict(extra="forbid")

    bundle: str
    name: str = "mra"
    replicas: int = Field(1, ge=1)
    max_replicas: int | None = Field(None, ge=1)
    num_cpus: float = Field(1.0, ge=0)
    num_gpus: float = Field(0.0, ge=0)
    backend: str = "auto"
    device: str | None = None
    max_batch_size: int = Field(8, ge=1)
    max_delay_ms: float = Field(0.0, ge=0)
    max_queue: int = Field(256, ge=1)


class Replica:
    """One copy of the model. It is ready only when it gives the golden outputs."""

    def __init__(self, options: RayOptions) -> None:
        bundle = Bundle.load(options.bundle)
        device = options.device or ("cuda" if options.num_gpus else "cpu")
        backend = options.backend if options.backend != "auto" else choose_backend(bundle, device, True)[0]
        # Ray counts cores but confines nobody to them; torch's threads follow the OMP_NUM_THREADS that Ray sets.
        on_cpu = (backend, device) == ("onnxruntime", "cpu")
        threads = max(1, int(options.num_cpus)) if on_cpu else None
        chosen = on_cpu and bundle.manifest.chooses_tokens  # of fill-mask's logits few are answers
        runtime = MraRuntime.load(bundle, backend, device, intra_op_threads=threads, chosen_tokens=chosen)
        runtime.validate()
        self._batching = BatchingRuntime(
            runtime, max_batch_size=options.max_batch_size, max_delay_ms=options.max_delay_ms, max_queue=options.max_queue
        )

    async def infer(self, arrays: Arrays) -> Arrays:
        """Inputs of one request by name, and "tokens" for `submit` -> its outputs. Raises ContractError, BusyError."""
        return await asyncio.wrap_future(self._batching.submit(**arrays))

    async def process(self) -> int:
        """The replica's process id; an answer means that it is ready."""
        return os.getpid()

    def __del__(self) -> None:
        batching = getattr(self, "_batching", None)
        if batching is not None:
            batching.close()


class Ingress:
    """The HTTP side: /v2/health/live, /v2/health/ready, /v2/models/<name>[/ready], POST /v2/models/<name>/infer."""

    def __init__(self, options: RayOptions, replica: Any) -> None:
        self._name = options.name
        self._manifest = Bundle.load(options.bundle, verify_hashes=False).manifest
        self._replica = replica

    async def __call__(self, request: Request) -> Response:
        path = request.url.path.rstrip("/")
        model = f"/v2/models/{self._name}"
        route = (request.method, path.replace(f"{model}/versions/{VERSION}", model, 1))
        if route == ("POST", f"{model}/infer"):
            return await self._infer(await request.body(), request.headers.get("inference-header-content-length"))
        if route == ("GET", "/v2/health/live"):
            return _json({"live": True})
        if route in (("GET", "/v2/health/ready"), ("GET", f"{model}/ready")):
            ready = await self._ready()
            return _json({"ready": ready}, 200 if ready else 503)
        if route == ("GET", model):
            return _json(self._metadata())
        return _json({"error": f"there is no {request.method} {path}: the model is at {model}"}, 404)

    async def _infer(self, body: bytes, header_length: str | None) -> Response:
        try:
            asked = read_infer(body, header_length)
            outputs = await self._ask(asked.arrays)
            answer, json_size = write_infer(self._name, VERSION, asked, outputs)
        except (MalformedError, ContractError) as error:
            return _json({"error": _own_words(error)}, 400)
        except (BusyError, BackendError, BackPressureError, DeploymentUnavailableError, RayActorError) as error:
            return _json({"error": _own_words(error)}, 503, {"Retry-After": "1"})
        if json_size is None:
            return Response(answer, media_type="application/json")
        return Response(answer, media_type="application/octet-stream", headers={"Inference-Header-Content-Length": str(json_size)})

    async def _ask(self, arrays: Arrays) -> Arrays:
        for attempt in range(_ATTEMPTS):
            try:
                outputs: Arrays = await self._replica.infer.remote(arrays)
                return outputs
            except RayActorError:
                if attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    async def _ready(self) -> bool:
        try:
            await asyncio.wait_for(self._replica.process.remote(), _READY_SECONDS)
        except Exception:  # whatever it is, the answer is no
            return False
        return True

    def _metadata(self) -> dict[str, Any]:
        def described(tensor: Tensor) -> dict[str, Any]:
            shape = [axis if isinstance(axis, int) else -1 for axis in tensor.axes]
            dtype = "float32" if tensor.dtype == "bfloat16" else np.dtype(tensor.dtype).name  # numpy has no bfloat16
            return {"name": tensor.name, "datatype": DATATYPES[dtype], "shape": shape}

        return {
            "name": self._name,
            "versions": [VERSION],
            "platform": "mra_export_ray",
            "inputs": [described(tensor) for tensor in self._manifest.inputs],
            "outputs": [described(tensor) for tensor in self._manifest.outputs],
        }


def app(options: RayOptions) -> Any:
    """The Ray Serve application for these options: pass it to `serve.run`, or name it to `serve run` or `serve build`.

    Raises BundleError where there is no bundle, ContractError for max_replicas below replicas.
    """
    Bundle.load(options.bundle, verify_hashes=False)  # before anything starts
    scale: dict[str, Any] = {"num_replicas": options.replicas}
    if options.max_replicas is not None:
        if options.max_replicas < options.replicas:
            raise ContractError(
                f"max_replicas is {options.max_replicas}, replicas {options.replicas}: max_replicas must not be less"
            )
        scale = {
            "autoscaling_config": {
                "min_replicas": options.replicas,
                "max_replicas": options.max_replicas,
                "target_ongoing_requests": options.max_batch_size,
            }
        }
    replica = serve.deployment(Replica).options(
        ray_actor_options={"num_cpus": options.num_cpus, "num_gpus": options.num_gpus},
        max_ongoing_requests=2 * options.max_batch_size,  # one batch runs while the next gathers
        max_queued_requests=options.max_queue,
        **scale,
    )
    ingress = serve.deployment(Ingress).options(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=_INGRESS_REQUESTS)
    return ingress.bind(options, replica.bind(options))


def _own_words(error: Exception) -> str:
    """The message without the traceback of the other process, which Ray puts around errors that come from there."""
    cause = getattr(error, "cause", None)
    return str(cause if isinstance(cause, Exception) else error)


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, headers=headers, media_type="application/json")
