"""mra::attention as an operator: torch's own checks, export, compile, autograd, and the compiled library behind it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from oracles import OpCase, dense_attention, make_case, op_cases

from mra_export import kernel
from mra_export.contract import Attributes
from mra_export.errors import ContractError
from mra_export.model.attention import mra_attention
from mra_export.model.op import attention

ATTRIBUTES = Attributes(2, 4, 0.25, initial_prior_diagonal_n_blocks=1)


def inputs(dtype: torch.dtype = torch.float32, length: int = 70, attributes: Attributes = ATTRIBUTES) -> list[torch.Tensor]:
    case = make_case(attributes, batch=2, length=length, head_size=16, masking="right padding")
    tensors = [torch.from_numpy(x).nan_to_num(0.0).to(dtype) for x in (case.query, case.key, case.value)]
    return [*tensors, torch.from_numpy(case.mask)]


def arguments(attributes: Attributes = ATTRIBUTES) -> tuple[Any, ...]:
    return tuple(attributes.as_dict().values())


class Layer(torch.nn.Module):
    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return attention(query * 2, key, value, mask, *arguments()) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    query, key, value, mask = inputs(dtype)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    torch.library.opcheck(torch.ops.mra.attention.default, (*leaves, mask, *arguments()))


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_float64_is_the_reference_and_its_gradient(mode: str) -> None:
    attributes = Attributes(2, 4, 0.25, mode)
    *leaves, mask = inputs(torch.float64, attributes=attributes)
    for leaf in leaves:
        leaf.requires_grad_()
    ours = attention(*leaves, mask, *arguments(attributes))
    reference = mra_attention(*leaves, mask, attributes)
    assert torch.equal(ours, reference)
    grad = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(reference, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_export_keeps_one_node_with_dynamic_batch_and_length() -> None:
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=1, max=512)
    axes = {0: batch, 1: length}
    program = torch.export.export(Layer(), tuple(inputs()), dynamic_shapes=(axes, axes, axes, axes))
    nodes = [node for node in program.graph.nodes if node.target is torch.ops.mra.attention.default]
    assert len(nodes) == 1
    assert nodes[0].args[4:] == arguments()[: len(nodes[0].args) - 4]
    for shape in (1, 33, 200):
        tensors = inputs(length=shape)
        torch.testing.assert_close(program.module()(*tensors), Layer()(*tensors))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_makes_no_graph_break_forward_or_backward(dynamic: bool) -> None:
    compiled = torch.compile(Layer(), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (40, 70):
        *leaves, mask = inputs(length=length)
        for leaf in leaves:
            leaf.requires_grad_()
        expected, actual = Layer()(*leaves, mask), compiled(*leaves, mask)
        torch.testing.assert_close(actual, expected)
        for a, b in zip(torch.autograd.grad(actual.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True):
            torch.testing.assert_close(a, b)


def test_autocast_does_not_reach_inside() -> None:
    *tensors, mask = inputs(torch.bfloat16)
    leaves = [x.requires_grad_() for x in tensors]
    plain = attention(*leaves, mask, *arguments())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = attention(*leaves, mask, *arguments())
        reference = mra_attention(*leaves, mask, ATTRIBUTES)
        gradients = torch.autograd.grad(cast.float().sum(), leaves)
    assert torch.equal(cast, plain)
    assert torch.equal(reference, mra_attention(*leaves, mask, ATTRIBUTES))
    for a, b in zip(gradients, torch.autograd.grad(plain.float().sum(), leaves), strict=True):
        assert torch.equal(a, b)


def test_layouts_and_mask_types_do_not_matter() -> None:
    query, key, value, mask = inputs()
    expected = attention(query, key, value, mask, *arguments())
    strided = torch.stack([query, key, value], -1).unbind(-1)
    assert not strided[0].is_contiguous()
    for other in (mask.bool(), mask.long() * 7, mask.float() * 0.5, mask.repeat_interleave(2, 1)[:, ::2]):
        assert torch.equal(attention(*strided, other, *arguments()), expected)


@given(op_cases(max_length=130))
@settings(max_examples=15)
def test_the_compiled_library_agrees_with_the_reference(case: OpCase) -> None:
    if not kernel.available():
        pytest.skip("the compiled kernels are not built")
    tensors = [torch.from_numpy(x) for x in case.arrays]
    compiled = attention(*tensors, *arguments(case.attributes))
    reference = mra_attention(*tensors, case.attributes)
    decided = torch.from_numpy(dense_attention(*case.arrays, case.attributes).margin > 1e-3)  # (B, H)
    heads = (case.query.shape[0], case.query.shape[1], case.attributes.num_heads, -1)
    keep = decided[:, None, :, None].expand(*heads[:3], 1)
    difference = (compiled - reference).view(heads) * keep
    assert torch.isfinite(compiled).all()
    assert difference.abs().max() < 2e-4


def test_the_compiled_library_is_what_runs_where_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(kernel, "available", lambda: True)
    monkeypatch.setattr(kernel, "attention_cpu", lambda *given: calls.append(given))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        attention(*inputs(dtype), *arguments())
    attributes, name, batch, length, head_size, *addresses, threads = calls[0]
    assert (attributes, name, batch, length, head_size, threads) == (ATTRIBUTES, "float32", 2, 70, 16, torch.get_num_threads())
    assert len({*addresses}) == 5
    assert [call[1] for call in calls] == ["float32", "float16", "bfloat16"]
    attention(*inputs(torch.float64), *arguments())
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "multiple of num_heads"),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"approx_mode": "half"}, "use one of full, sparse"),
        ({"initial_prior_first_n_blocks": -1}, "initial_prior_first_n_blocks is -1"),
    ],
)
def test_attributes_outside_the_contract_are_refused_before_any_work(change: dict[str, Any], message: str) -> None:
    given = {**ATTRIBUTES.as_dict(), **change}
    with pytest.raises(ContractError, match=message):
        attention(*inputs(), *given.values())
    with torch.device("meta"), pytest.raises(ContractError, match=message):
        attention(*(torch.empty_like(x, device="meta") for x in inputs()), *given.values())
