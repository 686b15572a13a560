"""What the CPU kernel is timed beside: other attention of the same inputs, each checked before it is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnxruntime as ort
import torch
from measure import TimeIsUp, time_limit, why_not_compiled
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mra_export.contract import BLOCK_SIZE, Attributes
from mra_export.model.attention import Selection, mra_attention

Call = Callable[[], Tensor]
TOLERANCE = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Largest absolute error, for inputs of unit size: rounding of the output type, and a floor."""


class LeftOutError(Exception):
    """Why a peer is not timed."""


@dataclass(frozen=True)
class Problem:
    """query, key, value: (1, N, H * D) of one dtype; mask: (1, N) int32, all ones. selection: the blocks that the kernel chose."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor
    attributes: Attributes
    selection: Selection
    threads: int
    compile_seconds: float

    @property
    def dtype(self) -> str:
        return str(self.query.dtype).removeprefix("torch.")

    def heads(self, x: Tensor) -> Tensor:
        """(1, N, H * D) -> (1, H, N, D), a view."""
        return x.view(1, x.shape[1], self.attributes.num_heads, -1).transpose(1, 2)


def sdpa(problem: Problem) -> Call:
    """torch's dense attention, the kernel it chooses on a CPU (flash)."""

    def call() -> Tensor:
        q, k, v = (problem.heads(x) for x in (problem.query, problem.key, problem.value))
        context = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=problem.attributes.scale)
        return context.transpose(1, 2).flatten(2)

    return call


def ort_mha(problem: Problem) -> Call:
    """ONNX Runtime's own dense attention, com.microsoft.MultiHeadAttention, inputs and output bound to torch's memory."""
    if problem.dtype != "float32":
        raise LeftOutError("ONNX Runtime's MultiHeadAttention for CPUs takes float32 only")
    shape = tuple(problem.query.shape)
    names = ("query", "key", "value")
    node = onnx.helper.make_node(
        "MultiHeadAttention",
        names,
        ["context"],
        domain="com.microsoft",
        num_heads=problem.attributes.num_heads,
        scale=problem.attributes.scale,
    )
    infos = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in (*names, "context")]
    graph = onnx.helper.make_graph([node], "attention", infos[:3], infos[3:])
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = problem.threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    context = torch.empty_like(problem.query)
    binding = session.io_binding()
    for name, x in zip(names, (problem.query, problem.key, problem.value), strict=True):
        binding.bind_input(name, "cpu", 0, np.float32, shape, x.data_ptr())
    binding.bind_output("context", "cpu", 0, np.float32, shape, context.data_ptr())

    def call() -> Tensor:
        session.run_with_iobinding(binding)
        return context

    return call


def flex(problem: Problem) -> Call:
    """torch's flex_attention, compiled, on the blocks that the kernel chose: no selection, no low-resolution part."""
    chosen = problem.selection.chosen
    blocks = chosen.sum(-1, dtype=torch.int32)
    # Chosen columns first, in ascending order.
    indices = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    none = torch.zeros_like(blocks)
    length = problem.query.shape[1]
    if length % BLOCK_SIZE:
        raise LeftOutError(f"length {length} is not a multiple of {BLOCK_SIZE}: flex_attention takes whole blocks")
    # A copy, and no views inside the compiled function: torch 2.13's lowering for CPUs fails on one buffer passed twice.
    mask = BlockMask.from_kv_blocks(none, indices.clone(), blocks, indices, BLOCK_SIZE=BLOCK_SIZE, seq_lengths=(length, length))
    q, k, v = (problem.heads(x) for x in (problem.query, problem.key, problem.value))
    call = _compiled(problem, partial(flex_attention, block_mask=mask, scale=problem.attributes.scale), q, k, v)
    return lambda: call().transpose(1, 2).flatten(2)


def reference(problem: Problem) -> Call:
    """This package's reference in plain torch, selection included."""
    return lambda: mra_attention(problem.query, problem.key, problem.value, problem.mask, problem.attributes)


def reference_compiled(problem: Problem) -> Call:
    """The reference through torch.compile, which breaks its graph where the number of tiles depends on the data."""
    return _compiled(problem, mra_attention, problem.query, problem.key, problem.value, problem.mask, problem.attributes)


PEERS: dict[str, Callable[[Problem], Call]] = {
    "sdpa": sdpa,
    "ort_mha": ort_mha,
    "flex": flex,
    "reference": reference,
    "reference_compiled": reference_compiled,
}
DENSE = ("sdpa", "ort_mha")


def open_peer(name: str, problem: Problem) -> Call:
    """The peer's call, checked. Raises LeftOutError where it cannot run here or its answer is wrong."""
    with torch.no_grad():
        call = PEERS[name](problem)
        context = call()
        if name in DENSE:
            wide = replace(problem, query=problem.query.float(), key=problem.key.float(), value=problem.value.float())
            expected = sdpa(wide)()
        else:
            mode = "sparse" if name == "flex" else problem.attributes.approx_mode
            attributes = replace(problem.attributes, approx_mode=mode)
            wide_inputs = (x.float() for x in (problem.query, problem.key, problem.value))
            expected = mra_attention(*wide_inputs, problem.mask, attributes, selection=problem.selection)
    error = float((context.float() - expected).abs().max())
    if not error <= TOLERANCE[problem.dtype]:
        raise LeftOutError(f"its error is {error:.2g}, above {TOLERANCE[problem.dtype]:.0e}")
    return call


def _compiled(problem: Problem, function: Callable[..., Any], *arguments: Any) -> Call:
    """function(*arguments) through torch.compile, compiled now and within the time allowed."""
    if reason := why_not_compiled():
        raise LeftOutError(reason)
    torch.compiler.reset()  # threads and shapes of an earlier problem are part of what was compiled
    compiled = torch.compile(function, dynamic=False)

    def call() -> Tensor:
        with torch.no_grad():
            context = compiled(*arguments)
        assert isinstance(context, Tensor)
        return context

    try:
        with time_limit(problem.compile_seconds):
            call()
    except TimeIsUp as error:
        raise LeftOutError(f"torch.compile took more than {problem.compile_seconds:g} s") from error
    except Exception as error:
        raise LeftOutError(f"torch.compile: {type(error).__name__}: {str(error).strip().splitlines()[0]}") from error
    return call
