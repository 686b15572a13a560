"""int8: the matrix products of a float32 graph on 8-bit integers, by ONNX Runtime's quantizer. Attention stays in float32.

static    with calibration text: each product's input has one scale, fixed at export: a text gives the same in any batch
dynamic   without: the scale is taken from the values of each call: what else is in the batch, padding too, moves the answer

Weights are int8, symmetric, one scale per output channel; activations uint8, one scale per tensor; sums are int32 and leave a
product as float32, so biases, residuals, normalisation and the operator see nothing of it. A graph like this is standard ONNX
(QuantizeLinear and DequantizeLinear, or DynamicQuantizeLinear and MatMulInteger); a runtime fuses it into integer kernels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

from mra_export.bundle import Calibration, Quantization
from mra_export.errors import ContractError
from mra_export.onnx_model import save

Inputs = dict[str, npt.NDArray[np.int64]]
PRODUCTS = ("MatMul", "Gemm")
MIN_CHANNELS = 16
"""Products with fewer outputs stay in float32: the heads of classification and answer spans, which cost nothing, and whose rounding
would be the answer's own. The vocabulary's decoder, a quarter of the published models' arithmetic, is quantised."""
_PREPARED = {"onnx.quant.pre_process": "onnxruntime.quant"}
"""Tells the quantizer that the graph needs no preparation, which it would otherwise advise on every call."""


def quantize(model: ir.Model, samples: Sequence[Inputs], text: str = "") -> tuple[ir.Model, Quantization]:
    """Quantise a float32 graph's matrix products with constant weights; returns the new graph and how it was made.

    samples: calibration batches, by input name; none: dynamic. text: where they came from. `model` is used up: its transposed
    weights are folded. Raises ContractError where the graph has no such product, or the quantizer left one out.
    """
    _fold_transposes(model.graph)
    chosen, kept = _products(model.graph)
    if not chosen:
        raise ContractError(f"the graph has no matrix product with {MIN_CHANNELS} output channels or more: export it in fp32")
    with tempfile.TemporaryDirectory(prefix="mra-quantize-") as scratch:
        source, target = Path(scratch, "float.onnx"), Path(scratch, "int8.onnx")
        model.metadata_props.update(_PREPARED)
        large = save(model, source)
        common: dict[str, Any] = {
            "op_types_to_quantize": list(PRODUCTS),
            "nodes_to_quantize": chosen,
            "per_channel": True,
            "reduce_range": False,  # products are exact in int32 where the processor has VNNI or dot products
            "weight_type": QuantType.QInt8,
            "use_external_data_format": large,
        }
        if samples:
            quantize_static(
                source,
                target,
                _Reader(samples),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                extra_options={"OpTypesToExcludeOutputQuantization": list(PRODUCTS)},
                **common,
            )
        else:
            quantize_dynamic(source, target, **common)
        quantized = ir.load(target)
        ir.external_data.load_to_model(quantized)  # the files go away
    if samples:
        _spare_residuals(quantized.graph)
    _check(quantized.graph, chosen, static=bool(samples))
    quantized.functions.update(model.functions)  # some versions of the quantizer drop them
    quantized.metadata_props.clear()
    quantized.producer_name, quantized.producer_version = model.producer_name, model.producer_version
    calibration = Calibration(text=text, windows=len(samples), tokens=sum(sample["input_ids"].size for sample in samples))
    return quantized, Quantization(
        method="static" if samples else "dynamic",
        weights="int8, symmetric, per output channel",
        activations="uint8, per tensor",
        quantized=chosen,
        kept=kept,
        calibration=calibration if samples else None,
    )


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, samples: Sequence[Inputs]) -> None:
        self._samples: Iterator[Inputs] = iter(samples)

    def get_next(self) -> Inputs | None:
        return next(self._samples, None)


def _fold_transposes(graph: ir.Graph) -> None:
    """Transpose weights now rather than in every session: a tied decoder's is the word table, transposed in the graph."""
    for node in list(graph):
        value = node.inputs[0] if node.op_type == "Transpose" else None
        if value is None or value.const_value is None or not value.is_initializer():
            continue
        order = node.attributes["perm"].as_ints() if "perm" in node.attributes else None
        array = np.ascontiguousarray(np.transpose(value.const_value.numpy(), order))
        old = node.outputs[0]
        new = ir.Value(name=f"{value.name}.transposed", shape=ir.Shape(array.shape), type=old.type, const_value=ir.tensor(array))
        graph.register_initializer(new)
        old.replace_all_uses_with(new)
        graph.remove(node, safe=True)


def _products(graph: ir.Graph) -> tuple[list[str], list[str]]:
    """Names of the matrix products to quantise, and of those that stay as they are."""
    chosen: list[str] = []
    kept: list[str] = []
    for node in graph:
        if node.domain == "" and node.op_type in PRODUCTS:
            (chosen if _channels(node) >= MIN_CHANNELS else kept).append(str(node.name))
    return chosen, kept


def _channels(node: ir.Node) -> int:
    """Output channels of a product with a constant matrix, else 0."""
    weight = node.inputs[1]
    if weight is None or not weight.is_initializer() or weight.const_value is None or len(weight.const_value.shape) != 2:
        return 0
    turned = "transB" in node.attributes and node.attributes["transB"].as_int()
    return int(weight.const_value.shape[0 if turned else 1])


def _spare_residuals(graph: ir.Graph) -> None:
    """Give whatever is no product the float32 values: the quantizer hands the rounded ones to every reader of a tensor."""
    for node in list(graph):
        if node.op_type != "DequantizeLinear" or node.inputs[0] is None:
            continue
        producer = node.inputs[0].producer()
        if producer is None or producer.op_type != "QuantizeLinear":
            continue  # a weight
        for use in list(node.outputs[0].uses()):
            if use.node.op_type not in PRODUCTS:
                use.node.replace_input_with(use.idx, producer.inputs[0])


def _check(graph: ir.Graph, chosen: Sequence[str], static: bool) -> None:
    """Every chosen product must have become an integer one: the quantizer leaves out what it does not know, without a word."""
    if static:
        sources = {
            str(node.name): [value.producer() for value in node.inputs[:2] if value is not None]
            for node in graph
            if node.op_type in PRODUCTS
        }
        done = sum(all(p is not None and p.op_type == "DequantizeLinear" for p in sources.get(name, [None])) for name in chosen)
    else:
        done = sum(node.op_type == "MatMulInteger" for node in graph)
    if done != len(chosen):
        raise ContractError(
            f"ONNX Runtime's quantizer made {done} of {len(chosen)} matrix products integer ones: export with --dtype fp32, or "
            "install another version of onnxruntime"
        )
