"""The compiled kernels on torch tensors: which of them takes a tensor, with what workspace, on which stream."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from mra_export import kernel, libraries
from mra_export.contract import BLOCK_SIZE, Attributes
from mra_export.kernel import Params

logger = logging.getLogger(__name__)

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_LEAST_CAPABILITY = (8, 0)


def takes(query: Tensor) -> bool:
    """Whether a compiled kernel is there for this tensor's device and dtype."""
    if query.dtype not in _DTYPES or not kernel.available():
        return False
    if _on_gpu(query):
        return _takes_gpu(query.device)
    return query.device.type == "cpu"


def attention(query: Tensor, key: Tensor, value: Tensor, real: Tensor, attributes: Attributes) -> Tensor:
    """query, key, value (B, N, H * D) of one dtype; real (B, N) int32; all contiguous. Returns context, (B, N, H * D).

    On a GPU: queued on torch's current stream, with memory of torch's allocator and without waiting.
    """
    context = torch.empty_like(query)
    q, k, v, m, c = (tensor.data_ptr() for tensor in (query, key, value, real, context))
    if not _on_gpu(query):
        batch, length, hidden = query.shape
        threads, head_size = torch.get_num_threads(), hidden // attributes.num_heads
        kernel.attention_cpu(attributes, _DTYPES[query.dtype], batch, length, head_size, q, k, v, m, c, threads)
        return context
    params = _params(query, attributes)
    with _stream_of(query.device) as stream:
        workspace = _workspace(params, query)
        kernel.attention_cuda(params, q, k, v, m, c, workspace.data_ptr(), workspace.numel(), stream)
    return context


def selection(query: Tensor, key: Tensor, real: Tensor, attributes: Attributes) -> tuple[Tensor, Tensor]:
    """The blocks that `attention` chooses and excludes for these inputs: each (B, H, nb, nb) bool."""
    params = _params(query, attributes)
    nb = -(-query.shape[1] // BLOCK_SIZE)
    states = torch.empty((query.shape[0], attributes.num_heads, nb, nb), dtype=torch.uint8, device=query.device)
    q, k, m, blocks = (tensor.data_ptr() for tensor in (query, key, real, states))
    if not _on_gpu(query):
        kernel.selection_cpu(params, q, k, m, blocks, None, torch.get_num_threads())
    else:
        with _stream_of(query.device) as stream:
            workspace = _workspace(params, query)
            kernel.selection_cuda(params, q, k, m, blocks, workspace.data_ptr(), workspace.numel(), stream)
    return states == 2, states > 0


def _on_gpu(query: Tensor) -> bool:
    return query.device.type == "cuda"


def _params(query: Tensor, attributes: Attributes) -> Params:
    batch, length, hidden = query.shape
    exact = query.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    head_size, mode = hidden // attributes.num_heads, "fma" if exact else "tf32x3"
    return kernel.make_params(attributes, _DTYPES[query.dtype], batch, length, head_size, float32_mode=mode)


def _workspace(params: Params, query: Tensor) -> Tensor:
    # Let go of while the work is queued: the allocator gives it to later work of the same stream only. It aligns to 512 bytes.
    return torch.empty(kernel.cuda_workspace_size(params), dtype=torch.uint8, device=query.device)


@contextlib.contextmanager
def _stream_of(device: torch.device) -> Iterator[int]:
    """The cudaStream_t of torch's current stream on this device, which is the current device within."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream().cuda_stream


@functools.cache
def _takes_gpu(device: torch.device) -> bool:
    why = None
    if not kernel.has_cuda(libraries.require("kernels")):
        why = "libmra_attention was built without CUDA; pip install . in the repository with an nvcc on PATH builds it"
    elif torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        why = f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    if why:
        logger.warning("mra::attention runs in plain torch on %s, slower: %s", device, why)
    return why is None
