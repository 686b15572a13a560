"""mra::attention, the operator as PyTorch sees it: one node in torch.export, one call in torch.compile.

Forward: the compiled library for float32, float16 and bfloat16 where it has a kernel for the device (compiled.py), else the
reference (attention.py). Backward: the reference's formula with the forward's selection. Under autocast: in autocast's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mra_export.contract import ATTRIBUTE_NAMES, TORCH_OP, Attributes, check_shapes
from mra_export.errors import ContractError
from mra_export.model import compiled
from mra_export.model.attention import check_inputs, mra_attention, mra_attention_backward


@torch.library.custom_op(TORCH_OP, mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    num_heads: int,
    num_blocks: int,
    scale: float,
    approx_mode: str = "full",
    initial_prior_first_n_blocks: int = 0,
    initial_prior_diagonal_n_blocks: int = 0,
    padding_invariant: bool = False,
) -> Tensor:
    """MRA attention of query, key, value (B, N, H * D) under mask (B, N), nonzero = real; returns context (B, N, H * D)."""
    attributes = Attributes(
        num_heads,
        num_blocks,
        scale,
        approx_mode,
        initial_prior_first_n_blocks,
        initial_prior_diagonal_n_blocks,
        padding_invariant,
    )
    check_inputs(query, key, value, mask, num_heads)
    if compiled.takes(query):
        query, key, value = (x.contiguous() for x in (query, key, value))
        return compiled.attention(query, key, value, _real(mask), attributes)
    return mra_attention(query, key, value, mask, attributes)


def _real(mask: Tensor) -> Tensor:
    return (mask != 0).to(torch.int32).contiguous()


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *attributes: int | float | str | bool) -> Tensor:
    checked = Attributes(*attributes)  # type: ignore[arg-type]
    if query.dim() != 3:
        raise ContractError(f"query has {query.dim()} axes: pass (batch, length, num_heads * head_size)")
    # Batch and length may be symbolic here; the real call checks them.
    row = (1, 1, query.shape[2])
    check_shapes(row, row, row, (1, 1), checked.num_heads)
    return query.new_empty(query.shape)


@torch.library.custom_op(f"{TORCH_OP}_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    num_heads: int,
    num_blocks: int,
    scale: float,
    approx_mode: str,
    initial_prior_first_n_blocks: int,
    initial_prior_diagonal_n_blocks: int,
    padding_invariant: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, the selection held fixed. Shapes and dtypes as in `attention`."""
    attributes = Attributes(
        num_heads,
        num_blocks,
        scale,
        approx_mode,
        initial_prior_first_n_blocks,
        initial_prior_diagonal_n_blocks,
        padding_invariant,
    )
    check_inputs(query, key, value, mask, num_heads)
    selection = None
    if compiled.takes(query):
        selection = compiled.selection(query.contiguous(), key.contiguous(), _real(mask), attributes)
    return mra_attention_backward(grad, query, key, value, mask, attributes, selection)


@attention_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *attributes: int | float | str | bool
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])  # type: ignore[arg-type]
    ctx.attributes = inputs[4:]  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = attention_backward(grad, *ctx.saved_tensors, *ctx.attributes)  # type: ignore[attr-defined]
    return (*gradients, *(None for _ in range(1 + len(ATTRIBUTE_NAMES))))


attention.register_autograd(_backward, setup_context=_save)


_CAST = (torch.float32, torch.float16, torch.bfloat16)


def _register_autocast(device_type: str, key: str) -> None:
    """query, key and value go in as autocast's dtype, like those of torch's own attention; float64 stays, as there."""
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)
        tensors = (x.to(dtype) if x.dtype in _CAST else x for x in (query, key, value))
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            context: Tensor = torch.ops.mra.attention.default(*tensors, *rest)
        return context

    torch.library.impl(TORCH_OP, key, lib=_library)(cast)


_library = torch.library.Library(TORCH_OP.split("::")[0], "FRAGMENT")  # type: ignore[no-untyped-call]
for _device_type, _key in (("cuda", "AutocastCUDA"), ("cpu", "AutocastCPU")):
    _register_autocast(_device_type, _key)
