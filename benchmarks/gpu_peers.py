"""What the CUDA kernel is timed beside: torch's dense attention, flex_attention on the same blocks, the authors' kernels.

Each answer is checked; one that is wrong or cannot run keeps the reason and gets no times. Needs numpy and torch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import authors_kernels
import torch
from gpu_measure import Contestant, first_line, name_of
from measure import TimeIsUp, time_limit, why_not_compiled
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from mra_export.contract import BLOCK_SIZE, Attributes

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "gpu"))
from kernel_check import Inputs
from torch_reference import Selection, mra_attention

DENSE = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
"""Our name of each of torch's fused dense attentions -> torch's."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Largest absolute error of a peer beside float64, for values of unit size."""
FLEX_DTYPE = torch.bfloat16
"""flex_attention is compiled for each shape, some seconds each: in the goals' type only."""
AUTHORS_TOLERANCE, AUTHORS_ROWS = 2e-3, 0.99
"""Absolute, and the share of tokens that must keep it: their scores round otherwise, so near-tied blocks fall otherwise."""


def dense(sets: Sequence[Inputs], attributes: Attributes) -> list[Contestant]:
    """torch's own choice first, then each fused implementation that it did not choose."""
    split = [_split(inputs, attributes.num_heads) for inputs in sets]
    chosen = _torchs_choice(split[0])
    found = [Contestant("sdpa", f"torch chose {chosen}", [lambda h=h: scaled_dot_product_attention(*h) for h in split])]
    for name, backend in DENSE.items() if split[0][0].is_cuda else ():
        if name == chosen:
            continue

        def call(h: Any, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(*h)

        found.append(Contestant(f"sdpa {name}", name, [lambda h=h, call=call: call(h) for h in split]))
    for contestant in found:
        try:
            error = _dense_error(contestant.calls[0](), split[0])
        except (RuntimeError, torch.cuda.OutOfMemoryError) as reason:
            contestant.left_out = first_line(reason)
            continue
        _judge(contestant, error, TOLERANCE[sets[0].query.dtype])
    return found


def _split(inputs: Inputs, heads: int) -> tuple[Tensor, ...]:
    """query, key, value: (B, N, H * D) -> (B, H, N, D), the same memory."""
    return tuple(x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value))


def _torchs_choice(heads: Sequence[Tensor]) -> str:
    try:
        backend = SDPBackend(torch._fused_sdp_choice(*heads))
    except (AttributeError, RuntimeError, ValueError):
        return "what it does not tell"  # an internal function of torch
    return next((name for name, known in DENSE.items() if known == backend), backend.name.lower())


def _dense_error(context: Any, heads: Sequence[Tensor]) -> float:
    """Beside float64, for the first and the last 64 queries of the first batch row."""
    query, key, value = (x[0].double() for x in heads)
    worst = 0.0
    for part in (slice(0, 64), slice(-64, None)):
        weights = torch.softmax(query[:, part] @ key.transpose(1, 2) / math.sqrt(query.shape[2]), -1)
        worst = max(worst, float((context[0, :, part].double() - weights @ value).abs().max()))
    return worst


def _judge(contestant: Contestant, error: float, allowed: float) -> None:
    contestant.how += f", error {error:.1e}"
    if not error <= allowed:
        contestant.left_out = f"error {error:.1e} is above {allowed}: not timed"


def flex(sets: Sequence[Inputs], attributes: Attributes, chosen: Callable[[Inputs], Tensor], seconds: float = 60.0) -> Contestant:
    """torch's flex_attention, compiled, on the blocks that the kernel chose: no selection, no low-resolution part.

    chosen: inputs -> (B, H, nb, nb) bool. seconds: for the compiler.
    """
    contestant = Contestant("flex", "same blocks, without selection and low-resolution part")
    dtype, length = sets[0].query.dtype, sets[0].query.shape[1]
    if dtype != FLEX_DTYPE:
        contestant.left_out = f"compiled for each shape, so in {name_of(FLEX_DTYPE)} only"
    elif length % BLOCK_SIZE:
        contestant.left_out = f"N {length} is not a multiple of {BLOCK_SIZE}: it takes whole blocks"
    else:
        contestant.left_out = why_not_compiled()
    if contestant.left_out:
        return contestant
    try:
        from torch.nn.attention.flex_attention import BlockMask, flex_attention
    except ImportError as reason:
        contestant.left_out = f"torch {torch.__version__} has no flex_attention: {first_line(reason)}"
        return contestant
    torch.compiler.reset()  # shapes of an earlier problem are part of what was compiled
    compiled = torch.compile(flex_attention, dynamic=False)
    # Its tiles must divide the mask's blocks; the CPU's kernel has no such choice.
    options = {"BLOCK_M": BLOCK_SIZE, "BLOCK_N": BLOCK_SIZE} if sets[0].query.is_cuda else None

    picked = [chosen(inputs).to(inputs.query.device) for inputs in sets]

    def prepared(inputs: Inputs, blocks: Tensor) -> Callable[[], Tensor]:
        count = blocks.sum(-1, dtype=torch.int32)
        # Chosen columns first, in ascending order.
        columns = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
        mask = BlockMask.from_kv_blocks(
            torch.zeros_like(count), columns.clone(), count, columns, BLOCK_SIZE=BLOCK_SIZE, seq_lengths=(length, length)
        )
        split = _split(inputs, attributes.num_heads)
        return lambda: compiled(*split, block_mask=mask, scale=attributes.scale, kernel_options=options)

    try:
        with time_limit(seconds), torch.no_grad():
            contestant.calls = [prepared(inputs, blocks) for inputs, blocks in zip(sets, picked, strict=True)]
            context = contestant.calls[0]()
    except TimeIsUp:
        contestant.left_out = f"torch.compile took more than {seconds:g} s"
    except Exception as reason:  # torch's compiler raises whatever its parts do
        contestant.left_out = f"torch.compile: {type(reason).__name__}: {first_line(reason)}"
    else:
        row = first_row(sets[0])
        expected = reference(row, replace(attributes, approx_mode="sparse"), picked[0][:1])
        _judge(contestant, float((context[:1].transpose(1, 2).flatten(2).double() - expected).abs().max()), TOLERANCE[dtype])
    return contestant


def first_row(inputs: Inputs) -> Inputs:
    """The first batch row: rows are independent, and one keeps a reference small."""
    return Inputs(*(getattr(inputs, name)[:1] for name in ("query", "key", "value", "mask")))


def reference(row: Inputs, attributes: Attributes, chosen: Tensor | None = None) -> Tensor:
    """Context of one batch row in float64; chosen: (1, H, nb, nb) bool, forced."""
    forced = None
    if chosen is not None:
        forced = Selection(chosen, chosen, chosen.long(), torch.zeros_like(chosen, dtype=torch.float64), torch.zeros(()))
    return mra_attention(*(x.double() for x in (row.query, row.key, row.value)), row.mask, attributes, selection=forced)


def authors(sets: Sequence[Inputs], attributes: Attributes, kernels: Any, reason: str) -> Contestant:
    """kernels: compiled, or None with the reason."""
    contestant = Contestant("authors", "float32", capturable=False, left_out=reason)  # they launch on the default stream
    if reason:
        return contestant
    try:
        few = sets[:8]  # they copy their inputs
        calls = [authors_kernels.prepare(kernels, x.query, x.key, x.value, x.mask, attributes) for x in few]
        agree = authors_agree(calls[0](), few[0], attributes)
        contestant.how += f", {agree:.2%} of tokens agree"
        if agree < AUTHORS_ROWS:
            contestant.left_out = f"only {agree:.1%} of tokens agree with the operator: not timed"
        contestant.calls = list(calls)
    except (authors_kernels.LeftOutError, RuntimeError) as error:
        contestant.left_out = first_line(error)
    return contestant


def authors_agree(context: Tensor, inputs: Inputs, attributes: Attributes) -> float:
    """Share of the first batch row's tokens and heads whose context is the reference's, within AUTHORS_TOLERANCE."""
    row = first_row(inputs)
    expected = mra_attention(*(x.float() for x in (row.query, row.key, row.value)), row.mask, attributes)
    error = (context[:1] - expected).unflatten(2, (attributes.num_heads, -1)).abs().amax(-1)
    return float((error <= AUTHORS_TOLERANCE).float().mean())
