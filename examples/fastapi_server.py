"""A model in a FastAPI server of your own, where concurrent requests share calls: uvicorn --app-dir examples fastapi_server:app"""

import asyncio

import numpy as np
from fastapi import FastAPI, HTTPException

from mra_export import MraRuntime
from mra_export.errors import BusyError, ContractError
from mra_export.serve import BatchingRuntime

app = FastAPI()
batching = BatchingRuntime(MraRuntime.load("bundle"), max_batch_size=8, max_queue=100)


@app.post("/predict")
async def predict(ids: dict[str, list[int]]) -> dict[str, list[int]]:
    try:
        outputs = await asyncio.wrap_future(batching.submit(input_ids=np.array([ids["ids"]])))
    except (ContractError, BusyError) as error:
        raise HTTPException(400 if isinstance(error, ContractError) else 503, str(error)) from error
    return {"best": outputs["logits"][0].argmax(-1).tolist()}
