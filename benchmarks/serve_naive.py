"""What serve_load.py compares with: a FastAPI server that answers one request at a time, each call on all processors.

python benchmarks/serve_naive.py BUNDLE PORT
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from mra_export import MraRuntime
from mra_export.predict import Predictor


class Body(BaseModel):
    text: str
    top: int = 5


def make_app(bundle: str) -> FastAPI:
    predictor = Predictor(MraRuntime.load(bundle, "onnxruntime"))
    app, one_at_a_time = FastAPI(), threading.Lock()

    @app.get("/v2/health/ready")
    def ready() -> dict[str, bool]:
        return {"ready": True}

    @app.post("/v1/fill-mask")
    def fill_mask(body: Body) -> dict[str, Any]:
        with one_at_a_time:
            return {"answers": predictor.texts([body.text])}

    return app


if __name__ == "__main__":
    uvicorn.run(make_app(sys.argv[1]), port=int(sys.argv[2]), access_log=False, log_level="warning")
