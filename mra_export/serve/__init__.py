"""Serving: dynamic batching for any Python server (`BatchingRuntime`), and an HTTP server of its own (`mra-export serve`).

Importing this needs neither FastAPI nor a model runtime; app.py and what it imports need the extra `serve`.
"""

from mra_export.serve.batching import Batch, BatchingRuntime

__all__ = ["Batch", "BatchingRuntime"]
