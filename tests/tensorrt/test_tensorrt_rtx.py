"""The built libmra_trt.so inside TensorRT-RTX, which parses and builds on machines without a GPU."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import itertools
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from engines import need_plugin
from onnx import TensorProto, helper

from mra_export import tensorrt_api
from mra_export.contract import (
    ATTRIBUTE_NAMES,
    OP_DOMAIN,
    OP_TYPE,
    OP_VERSION,
    PLUGIN_NAME,
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
    Attributes,
)
from mra_export.onnx_function import function_proto

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="no tensorrt_rtx: pip install tensorrt_rtx_cu13 for an x86-64 Linux"
)

HIDDEN = 64
ATTRIBUTES = Attributes(num_heads=2, num_blocks=8, scale=0.125, approx_mode="sparse", initial_prior_first_n_blocks=1)
TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


@pytest.fixture(scope="module")
def plugin_path() -> Path:
    return need_plugin()


class TensorRT:
    """TensorRT-RTX with the plugin loaded and every message kept."""

    def __init__(self, plugin_path: Path) -> None:
        self.trt = tensorrt_api.load("tensorrt-rtx")
        self.messages: list[tuple[str, str]] = []
        gc.collect()  # TensorRT gives plugins the first logger that still lives in the process: let go of other tests' loggers
        self.logger = tensorrt_api.make_logger(self.trt, lambda level, text: self.messages.append((level, text)))
        self.builder = self.trt.Builder(self.logger)
        tensorrt_api.register_plugin(self.trt, plugin_path, self.errors)
        self.registry = self.trt.get_plugin_registry()

    def errors(self) -> str:
        """The errors since the last call."""
        texts = [text for level, text in self.messages if level == "error"]
        self.messages.clear()
        return "\n".join(texts)

    def creator(self, version: str = PLUGIN_VERSION) -> Any:
        return self.registry.get_creator(PLUGIN_NAME, version, PLUGIN_NAMESPACE)

    def create(self, **changed: Any) -> Any:
        """A plugin made from Python fields; a value of None leaves the field out."""
        kind = self.trt.PluginFieldType
        values: dict[str, Any] = {
            "num_heads": (np.array([2], np.int32), kind.INT32),
            "num_blocks": (np.array([8], np.int64), kind.INT64),
            "scale": (np.array([0.125], np.float32), kind.FLOAT32),
            **changed,
        }
        entries = [self.trt.PluginField(name, *value) for name, value in values.items() if value is not None]
        return self.creator().create_plugin("layer", self.trt.PluginFieldCollection(entries), self.trt.TensorRTPhase.BUILD)

    def parse(self, model: onnx.ModelProto, override: bool = True) -> tuple[Any, list[str]]:
        """The network, or None, and what the parser reports."""
        network = self.builder.create_network(0)
        parser = self.trt.OnnxParser(network, self.logger)
        if override:
            parser.set_flag(self.trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)
        parsed = parser.parse(model.SerializeToString())
        return network if parsed else None, [parser.get_error(index).desc() for index in range(parser.num_errors)]

    def plugin_layers(self, network: Any) -> int:
        return sum(network.get_layer(index).type == self.trt.LayerType.PLUGIN_V3 for index in range(network.num_layers))

    def build(self, network: Any, longest: int = 512, embed: Path | None = None) -> Any:
        """The plan, or None; batch 1 to 8, length 1 to `longest`."""
        config = self.builder.create_builder_config()
        profile = self.builder.create_optimization_profile()
        for name in ("query", "key", "value"):
            profile.set_shape(name, (1, 1, HIDDEN), (2, 128, HIDDEN), (8, longest, HIDDEN))
        profile.set_shape("mask", (1, 1), (2, 128), (8, longest))
        config.add_optimization_profile(profile)
        if embed is not None:
            config.plugins_to_serialize = [str(embed)]
        return self.builder.build_serialized_network(network, config)


@pytest.fixture(scope="module")
def tensorrt_rtx(plugin_path: Path) -> TensorRT:
    return TensorRT(plugin_path)


@pytest.fixture
def rtx(tensorrt_rtx: TensorRT) -> TensorRT:
    tensorrt_rtx.messages.clear()
    return tensorrt_rtx


def model(
    dtype: str = "fp32", layers: int = 1, hidden: int = HIDDEN, mask: int = TensorProto.INT32, function: bool = True, **changed: Any
) -> onnx.ModelProto:
    """Layers of MraAttention, each with the one before as its query; batch and length dynamic."""
    values = {**ATTRIBUTES.as_dict(), "padding_invariant": int(ATTRIBUTES.padding_invariant)}
    values |= {"plugin_version": PLUGIN_VERSION, "plugin_namespace": PLUGIN_NAMESPACE, **changed}
    names = ["query", *(f"context_{index}" for index in range(layers - 1)), "context"]
    nodes = [
        helper.make_node(
            OP_TYPE, [query, "key", "value", "mask"], [context], name=f"attention_{context}", domain=OP_DOMAIN, **values
        )
        for query, context in itertools.pairwise(names)
    ]
    operands = [
        helper.make_tensor_value_info(name, TYPES[dtype], ["batch", "length", hidden]) for name in ("query", "key", "value")
    ]
    graph = helper.make_graph(
        nodes,
        "attention",
        [*operands, helper.make_tensor_value_info("mask", mask, ["batch", "length"])],
        [helper.make_tensor_value_info("context", TYPES[dtype], ["batch", "length", hidden])],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(OP_DOMAIN, OP_VERSION)]
    functions = [function_proto(ATTRIBUTES, dtype, 20)] if function else []
    return helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=functions)


def test_the_registry_has_the_creator_after_loading(rtx: TensorRT) -> None:
    creator = rtx.creator()
    assert (creator.name, creator.plugin_version, creator.plugin_namespace) == (PLUGIN_NAME, PLUGIN_VERSION, PLUGIN_NAMESPACE)
    assert tuple(field.name for field in creator.field_names) == ATTRIBUTE_NAMES
    assert rtx.creator(version="2") is None


def test_plugins_are_made_from_python_fields(rtx: TensorRT) -> None:
    plugin = rtx.create()
    assert plugin is not None
    kinds = rtx.trt.PluginCapabilityType
    assert all(plugin.get_capability_interface(kind) is not None for kind in (kinds.CORE, kinds.BUILD, kinds.RUNTIME))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"window": (np.array([1], np.int32), "INT32")}, "field window is unknown"),
        ({"num_heads": None}, "field num_heads is missing"),
        ({"scale": (np.array([1], np.int32), "INT32")}, "field scale has type"),
        ({"num_blocks": (np.array([0], np.int64), "INT64")}, "field num_blocks is 0"),
        ({"approx_mode": (np.frombuffer(b"dense", np.int8), "CHAR")}, "field approx_mode is 'dense'"),
    ],
)
def test_bad_fields_are_refused_in_tensorrts_log(rtx: TensorRT, changed: dict[str, Any], message: str) -> None:
    kind = rtx.trt.PluginFieldType
    typed = {name: value and (value[0], getattr(kind, value[1])) for name, value in changed.items()}
    assert rtx.create(**typed) is None
    assert message in rtx.errors()


@pytest.mark.parametrize("dtype", TYPES)
def test_a_model_is_built_with_one_plugin_layer_per_node(rtx: TensorRT, dtype: str) -> None:
    network, errors = rtx.parse(model(dtype, layers=2))
    assert errors == []
    assert rtx.plugin_layers(network) == 2 == network.num_layers
    assert network.get_output(0).dtype == {"fp32": rtx.trt.float32, "fp16": rtx.trt.float16, "bf16": rtx.trt.bfloat16}[dtype]
    assert tuple(network.get_output(0).shape) == (-1, -1, HIDDEN)
    assert rtx.build(network) is not None, rtx.errors()


def test_nodes_that_do_not_name_the_plugin_need_the_override_flag(rtx: TensorRT) -> None:
    """Otherwise their function body is built, and only the count of plugin layers tells."""
    unnamed = model()
    attributes = unnamed.graph.node[0].attribute
    for attribute in [attribute for attribute in attributes if attribute.name.startswith("plugin_")]:
        attributes.remove(attribute)
    layers = {override: rtx.plugin_layers(rtx.parse(unnamed, override)[0]) for override in (False, True)}
    assert layers == {False: 0, True: 1}


def test_a_model_without_the_function_is_built(rtx: TensorRT) -> None:
    network, errors = rtx.parse(model(function=False))
    assert errors == []
    assert rtx.plugin_layers(network) == 1
    assert rtx.build(network) is not None, rtx.errors()


def test_the_plugin_can_be_embedded_in_the_plan(rtx: TensorRT, plugin_path: Path) -> None:
    plain, _ = rtx.parse(model())
    embedded, _ = rtx.parse(model())
    difference = rtx.build(embedded, embed=plugin_path).nbytes - rtx.build(plain).nbytes
    assert difference >= 0.9 * plugin_path.stat().st_size


def test_another_plugin_version_is_refused(rtx: TensorRT) -> None:
    network, errors = rtx.parse(model(function=False, plugin_version="2"))
    assert network is None
    assert any("plugin name, version, and namespace" in error for error in errors)


def test_another_plugin_version_gets_the_function_body(rtx: TensorRT) -> None:
    """The count of plugin layers is what catches it."""
    network, errors = rtx.parse(model(plugin_version="2"))
    assert errors == []
    assert rtx.plugin_layers(network) == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mask": TensorProto.INT64}, "mask is int64: cast it to int32"),
        ({"hidden": 65}, "last axis is 65, num_heads 2"),
        ({"hidden": 1024}, "head size is 512"),
        ({"num_heads": 0}, "field num_heads is 0"),
        ({"approx_mode": "dense"}, "field approx_mode is 'dense'"),
        ({"scale": -1.0}, "field scale is -1"),
    ],
)
def test_a_bad_model_is_refused_with_the_plugins_message(rtx: TensorRT, changed: dict[str, Any], message: str) -> None:
    network, errors = rtx.parse(model(function=False, **changed))
    assert network is None
    assert errors != []
    assert message in rtx.errors()


def test_a_profile_beyond_the_kernel_is_refused(rtx: TensorRT) -> None:
    network, _ = rtx.parse(model())
    assert rtx.build(network, longest=200_000) is None
    assert "query has shape (8, 200000, 64)" in rtx.errors()


def test_the_library_exports_two_functions_and_needs_no_cuda(plugin_path: Path) -> None:
    library = ctypes.CDLL(str(plugin_path))
    assert hasattr(library, "getCreators")
    assert hasattr(library, "setLoggerFinder")
    assert not hasattr(library, "mra_attention_cuda")
    listing = subprocess.run(["readelf", "-d", str(plugin_path)], check=True, capture_output=True, text=True).stdout
    needed = [line for line in listing.splitlines() if "NEEDED" in line]
    assert needed
    assert not any("cuda" in line or "nvinfer" in line or "tensorrt" in line for line in needed)
