"""For `polygraphy`, on the bundle that the environment variable MRA_BUNDLE names: see docs/tensorrt.md.

As a model (--model-type trt-network-script) this file is the bundle's graph as a TensorRT network, the plugin registered; as a
--data-loader-script it is the bundle's golden inputs. POLYGRAPHY_USE_TENSORRT_RTX=1 takes TensorRT-RTX instead of TensorRT.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polygraphy import config
from polygraphy.backend.trt import get_trt_logger

from mra_export import Bundle, libraries, tensorrt_api
from mra_export.bundle import MODEL, Arrays
from mra_export.contract import OP_TYPE


def _bundle() -> Bundle:
    return Bundle.load(os.environ["MRA_BUNDLE"])


def load_network() -> tuple[Any, Any, Any]:
    """What Polygraphy asks a network script for: builder, network, parser."""
    trt = tensorrt_api.load("tensorrt-rtx" if config.USE_TENSORRT_RTX else "tensorrt")
    # Polygraphy 0.53's `inspect model` imports tensorrt by that name, also with POLYGRAPHY_USE_TENSORRT_RTX=1.
    sys.modules.setdefault("tensorrt", trt)
    builder = trt.Builder(get_trt_logger())
    tensorrt_api.register_plugin(trt, Path(libraries.require("trt_plugin")), lambda: "see TensorRT's messages above")
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, get_trt_logger())
    parser.set_flag(trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)
    if not parser.parse_from_file(str(_bundle().file(MODEL))):
        raise RuntimeError("; ".join(parser.get_error(index).desc() for index in range(parser.num_errors)))
    layers = [network.get_layer(index).type for index in range(network.num_layers)]
    print(f"{layers.count(trt.LayerType.PLUGIN_V3)} {OP_TYPE} plugin layers")
    return builder, network, parser


def load_data() -> Iterator[Arrays]:
    """What Polygraphy asks a data loader script for: feeds."""
    yield from _bundle().golden()[0]
