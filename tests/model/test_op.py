"""mra::attention as an operator: torch's own checks, export, compile, autograd, and the compiled library behind it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from oracles import OpCase, dense_attention, make_case, op_cases
from torch._subclasses.fake_tensor import FakeTensorMode

from mra_export import kernel
from mra_export.contract import Attributes
from mra_export.errors import ContractError
from mra_export.model import attention as attention_module
from mra_export.model import compiled
from mra_export.model.attention import Selection, mra_attention, mra_attention_backward
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


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast_casts_as_for_torchs_own_attention(compiled: bool) -> None:
    *tensors, mask = inputs()
    leaves = [x.requires_grad_() for x in tensors]

    def layer(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attention(query, key, value, mask, *arguments())

    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    context = run(leaves[0], leaves[1].to(torch.bfloat16), leaves[2])  # of two types, as after a layer norm and a linear layer
    assert context.dtype == torch.bfloat16
    assert torch.equal(context, attention(*(x.bfloat16() for x in leaves), mask, *arguments()))
    gradients = torch.autograd.grad(context.float().sum(), leaves)
    assert [x.dtype for x in gradients] == [torch.float32] * 3
    assert all(x.abs().max() > 0 for x in gradients[::2])
    double = [x.double() for x in tensors]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(*double, mask, *arguments()).dtype == torch.float64
        with pytest.raises(ContractError, match=r"query is torch\.int64"):
            attention(*(x.long() for x in tensors), mask, *arguments())


def forced_gradients(
    tensors: list[torch.Tensor], mask: torch.Tensor, grad: torch.Tensor, attributes: Attributes, chosen: Any, excluded: Any
) -> tuple[torch.Tensor, ...]:
    """autograd of the reference with these blocks."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    nothing = torch.zeros(())
    context = mra_attention(*leaves, mask, attributes, selection=Selection(chosen, excluded, nothing, nothing, nothing))
    return torch.autograd.grad(context, leaves, grad)


BACKWARD_CASES = [
    (Attributes(2, 4, 0.25, "full", 0, 1), 70),
    (Attributes(3, 9, 0.3, "sparse", 1, 0), 130),
    (Attributes(1, 10**12, 0.2), 33),
    (Attributes(2, 1, 0.25, padding_invariant=True), 1),
]


@pytest.mark.parametrize(("attributes", "length"), BACKWARD_CASES)
@pytest.mark.parametrize("at_once", [1, 1 << 40], ids=["a head at a time", "all at once"])
def test_the_backward_is_the_references_with_any_selection(
    attributes: Attributes, length: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_module, "BACKWARD_BYTES", at_once)
    calls = []
    inner = attention_module._backward
    monkeypatch.setattr(attention_module, "_backward", lambda d, *rest: (calls.append(len(d)), inner(d, *rest))[1])
    *tensors, mask = inputs(torch.float64, length, attributes)
    nb = -(-length // 32)
    generator = torch.Generator().manual_seed(3)
    rank = torch.rand(2, attributes.num_heads, nb * nb, generator=generator).argsort(-1)
    chosen = (rank < attributes.num_blocks).view(2, attributes.num_heads, nb, nb)  # not those of the scores
    excluded = chosen | (rank < attributes.num_blocks + 2).view(chosen.shape)
    grad = torch.randn(tensors[0].shape, dtype=torch.float64, generator=generator)
    actual = mra_attention_backward(grad, *tensors, mask, attributes, (chosen, excluded))
    for a, b in zip(actual, forced_gradients(tensors, mask, grad, attributes, chosen, excluded), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)
    assert calls == ([1] * 2 * attributes.num_heads if at_once == 1 else [2 * attributes.num_heads])


def test_gradcheck_of_the_backward() -> None:
    attributes = Attributes(1, 2, 0.3)
    case = make_case(attributes, batch=1, length=40, head_size=8, masking="right padding")
    leaves = [torch.from_numpy(x).nan_to_num(0.0).double().requires_grad_() for x in (case.query, case.key, case.value)]
    mask = torch.from_numpy(case.mask)
    assert torch.autograd.gradcheck(lambda *x: attention(*x, mask, *arguments(attributes)), leaves, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_takes_the_blocks_that_the_kernel_chose(dtype: torch.dtype) -> None:
    if not kernel.available():
        pytest.skip("the compiled kernels are not built")
    attributes = Attributes(2, 9, 0.25, "full", 0, 1)
    *tensors, mask = inputs(dtype, 300, attributes)
    leaves = [x.requires_grad_() for x in tensors]
    context = attention(*leaves, mask, *arguments(attributes))
    grad = torch.randn(context.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad(context, leaves, grad)
    numpy_dtype = ml_dtypes.bfloat16 if dtype == torch.bfloat16 else np.float32
    arrays = [x.detach().float().numpy().astype(numpy_dtype) for x in tensors[:2]]
    chosen, excluded, _ = kernel.selection(*arrays, mask.numpy(), attributes)
    wanted = forced_gradients(
        [x.detach().double() for x in tensors],
        mask,
        grad.double(),
        attributes,
        *(torch.from_numpy(x) for x in (chosen, excluded)),
    )
    rounding = 1e-5 if dtype == torch.float32 else 2.0**-8
    for a, b in zip(gradients, wanted, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, atol=rounding * float(b.abs().max()), rtol=rounding)


def test_nothing_depends_on_data() -> None:
    """Fake tensors have no values: what runs with them reads none back, so it never waits for a GPU and may be in a CUDA graph."""
    with FakeTensorMode() as mode:
        *tensors, mask = (mode.from_tensor(x) for x in inputs(length=200))
        context, selection = mra_attention(*tensors, mask, ATTRIBUTES, return_selection=True)
        for fixed in (None, (selection.chosen, selection.excluded)):
            gradients = mra_attention_backward(context, *tensors, mask, ATTRIBUTES, fixed)
            assert [x.shape for x in gradients] == [x.shape for x in tensors]
        with pytest.raises(Exception, match="nonzero"):
            mask.nonzero()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_gpu_path_on_the_emulated_kernels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors are the CPU's, everything else is what a GPU's tensors get: workspace, stream, selection for the backward."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "emulator"))
    import emulated

    streams = []

    @contextlib.contextmanager
    def stream_of(device: torch.device) -> Iterator[int]:
        streams.append(device.type)
        yield 0

    monkeypatch.setattr(kernel, "library", emulated.library)
    monkeypatch.setattr(compiled, "takes", lambda query: True)
    monkeypatch.setattr(compiled, "_on_gpu", lambda query: True)
    monkeypatch.setattr(compiled, "_stream_of", stream_of)
    attributes = Attributes(2, 6, 0.25, "full", 0, 1)
    *tensors, mask = inputs(dtype, 140, attributes)
    leaves = [x.requires_grad_() for x in tensors]
    context = attention(*leaves, mask, *arguments(attributes))
    grad = torch.randn(context.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad(context, leaves, grad)
    assert streams == ["cpu", "cpu"]
    chosen, excluded = compiled.selection(tensors[0].detach(), tensors[1].detach(), mask, attributes)
    double = [x.detach().double() for x in tensors]
    nothing = torch.zeros(())
    forced = Selection(chosen, excluded, nothing, nothing, nothing)
    rounding = {torch.float32: 1e-5, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    wanted = mra_attention(*double, mask, attributes, selection=forced)
    torch.testing.assert_close(context.double(), wanted, atol=rounding * float(wanted.detach().abs().max()), rtol=rounding)
    for a, b in zip(gradients, forced_gradients(double, mask, grad.double(), attributes, chosen, excluded), strict=True):
        torch.testing.assert_close(a.double(), b, atol=2 * rounding * float(b.abs().max()), rtol=2 * rounding)


@pytest.mark.parametrize(
    ("dtype", "precision", "mode"),
    [
        (torch.float32, "highest", "fma"),
        (torch.float32, "high", "tf32x3"),
        (torch.float32, "medium", "tf32x3"),
        (torch.bfloat16, "high", "fma"),
    ],
)
def test_a_gpu_takes_torchs_float32_precision(
    dtype: torch.dtype, precision: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    params = compiled._params(inputs(dtype)[0], ATTRIBUTES)
    assert params.float32_mode == kernel.FLOAT32_MODES[mode]


def test_a_gpu_without_a_kernel_is_told_of_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    compiled._takes_gpu.cache_clear()
    monkeypatch.setattr(compiled.libraries, "require", lambda name: Path("libmra_attention.so"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    device = torch.device("cuda", 3)
    for built, capability, told in (
        (False, (9, 0), "was built without CUDA"),
        (True, (7, 5), "Old GPU is older than compute capability 8.0"),
        (True, (8, 0), None),
    ):
        compiled._takes_gpu.cache_clear()
        caplog.clear()
        monkeypatch.setattr(kernel, "has_cuda", lambda path, built=built: built)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert [compiled._takes_gpu(device) for _ in range(2)] == [told is None] * 2
        assert caplog.text.count("runs in plain torch on cuda:3, slower") == (told is not None)
        assert told is None or told in caplog.text
    compiled._takes_gpu.cache_clear()


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
