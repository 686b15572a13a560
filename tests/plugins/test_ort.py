"""The ONNX Runtime custom op: same bits as the kernel, every dtype, every refused attribute and shape, threads, old versions."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from kernel_cases import DTYPES, case, cast, hostile_cases
from onnx import TensorProto, helper
from oracles import OpCase

from mra_export import kernel, libraries
from mra_export.contract import OP_DOMAIN, OP_TYPE, OP_VERSION

ort = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.skipif(
    libraries.find("ort_ops") is None or not kernel.available(), reason="libmra_ort is not built: pip install -e ."
)

ELEMENT = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
VALID = {"num_heads": 2, "num_blocks": 5, "scale": 0.25}


def model(dtype: str = "float32", hidden: int | None = None, mask: int = TensorProto.INT32, **attributes: Any) -> bytes:
    """One MraAttention node between casts, so that the graph's own inputs and outputs are float32 whatever the node's type is."""
    kept = {name: value for name, value in attributes.items() if value is not None}
    element = ELEMENT.get(dtype, TensorProto.DOUBLE)
    names = ("query", "key", "value")
    nodes = [helper.make_node("Cast", [name], [f"{name}_t"], to=element) for name in names]
    nodes.append(
        helper.make_node(OP_TYPE, [f"{n}_t" for n in names] + ["mask"], ["context_t"], domain=OP_DOMAIN, name="layer.0", **kept)
    )
    nodes.append(helper.make_node("Cast", ["context_t"], ["context"], to=TensorProto.FLOAT))
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", "N", hidden]) for name in names]
    inputs.append(helper.make_tensor_value_info("mask", mask, None))
    outputs = [helper.make_tensor_value_info("context", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "one_node", inputs, outputs)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(OP_DOMAIN, OP_VERSION)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString())


def session(serialized: bytes, threads: int = 2) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(libraries.require("ort_ops")))
    return ort.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])


def feeds(made: OpCase) -> dict[str, np.ndarray]:
    return dict(zip(("query", "key", "value", "mask"), (x.astype(np.float32) for x in made.arrays[:3]), strict=False)) | {
        "mask": made.mask
    }


def expected(made: OpCase, dtype: str) -> np.ndarray:
    return kernel.attention(*cast(made, dtype).arrays, made.attributes).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("made", hostile_cases(), ids=str)
def test_same_bits_as_the_kernel_at_any_threads(made: OpCase, dtype: str) -> None:
    attributes = made.attributes.as_dict()
    attributes["num_blocks"] = min(attributes["num_blocks"], 2**62)
    attributes["padding_invariant"] = int(attributes["padding_invariant"])
    for threads in (1, 2, 4):
        actual = session(model(dtype, **attributes), threads).run(None, feeds(made))[0]
        assert actual.tobytes() == expected(made, dtype).tobytes(), f"{threads} threads"


def test_defaults_of_the_optional_attributes() -> None:
    made = case(2, 100, 2, 16, 5)
    assert made.attributes.scale == pytest.approx(32**-0.5)
    serialized = model(num_heads=2, num_blocks=5, scale=made.attributes.scale)
    assert session(serialized).run(None, feeds(made))[0].tobytes() == expected(made, "float32").tobytes()


def test_shape_inference_keeps_the_symbolic_axes() -> None:
    output = session(model(hidden=32, **VALID)).get_outputs()[0]
    assert output.shape == ["B", "N", 32]
    assert output.type == "tensor(float)"


def test_two_shapes_through_one_session() -> None:
    cases = [case(1, 33, 2, 16, 5), case(3, 500, 2, 16, 5, "holes"), case(2, 1, 2, 16, 5)]
    one = session(model(num_heads=2, num_blocks=5, scale=cases[0].attributes.scale))
    for made in (*cases, *reversed(cases)):
        assert one.run(None, feeds(made))[0].tobytes() == expected(made, "float32").tobytes()


def test_many_threads_through_one_session() -> None:
    cases = [case(1 + n % 3, 20 + 37 * n, 2, 16, 5, "holes", seed=n) for n in range(8)]
    wanted = [expected(made, "float32").tobytes() for made in cases]
    one = session(model(num_heads=2, num_blocks=5, scale=cases[0].attributes.scale))
    wrong: list[str] = []

    def work(start: int) -> None:
        for n in range(40):
            made = cases[(start + n) % len(cases)]
            if one.run(None, feeds(made))[0].tobytes() != wanted[(start + n) % len(cases)]:
                wrong.append(str(made))

    workers = [threading.Thread(target=work, args=(start,)) for start in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_one_library_in_many_sessions() -> None:
    made = case(1, 64, 2, 16, 5)
    serialized = model(num_heads=2, num_blocks=5, scale=made.attributes.scale)
    sessions = [session(serialized) for _ in range(5)]
    del sessions[1:4]
    for one in sessions:
        assert one.run(None, feeds(made))[0].tobytes() == expected(made, "float32").tobytes()


WRONG_ATTRIBUTES = {
    "num_heads missing": ({"num_heads": None}, "attribute num_heads (int) is missing"),
    "num_blocks missing": ({"num_blocks": None}, "attribute num_blocks (int) is missing"),
    "scale missing": ({"scale": None}, "attribute scale (float) is missing"),
    "num_heads zero": ({"num_heads": 0}, "num_heads is below 1: it must be 1 or more (num_heads=0"),
    "num_heads huge": ({"num_heads": 2**40}, "num_heads is 1099511627776"),
    "num_heads float": ({"num_heads": 2.0}, "attribute num_heads is of type float: it must be of type int"),
    "num_blocks zero": ({"num_blocks": 0}, "num_blocks is below 1"),
    "num_blocks string": ({"num_blocks": "many"}, "attribute num_blocks is of type string"),
    "scale int": ({"scale": 1}, "attribute scale is of type int: it must be of type float"),
    "scale zero": ({"scale": 0.0}, "scale is not a positive finite number"),
    "scale NaN": ({"scale": float("nan")}, "scale is not a positive finite number"),
    "mode": ({"approx_mode": "dense"}, "approx_mode is 'dense': use 'full' or 'sparse'"),
    "mode empty": ({"approx_mode": ""}, "approx_mode is '': use"),
    "mode int": ({"approx_mode": 1}, "attribute approx_mode is of type int: it must be of type string"),
    "first negative": ({"initial_prior_first_n_blocks": -1}, "negative: both must be 0 or more"),
    "diagonal negative": ({"initial_prior_diagonal_n_blocks": -2}, "negative: both must be 0 or more"),
    "first list": ({"initial_prior_first_n_blocks": [1, 2]}, "attribute initial_prior_first_n_blocks is of type list"),
    "padding_invariant": ({"padding_invariant": 2}, "padding_invariant must be 0 or 1"),
    "padding_invariant floats": ({"padding_invariant": [0.5]}, "attribute padding_invariant is of type list"),
}


@pytest.mark.parametrize("name", WRONG_ATTRIBUTES)
def test_wrong_attributes_are_refused_when_the_session_is_made(name: str) -> None:
    change, message = WRONG_ATTRIBUTES[name]
    with pytest.raises(Exception) as caught:  # noqa: PT011  ONNX Runtime has its own class for each code
        session(model(**{**VALID, **change}))
    assert message in str(caught.value)
    assert "MraAttention node 'layer.0'" in str(caught.value)


def test_wrong_shapes_are_refused_with_the_tensor_named() -> None:
    x = np.zeros((2, 40, 32), np.float32)
    mask = np.ones((2, 40), np.int32)
    good = {"query": x, "key": x, "value": x, "mask": mask}
    one = session(model(**VALID))
    wrong = [
        ({"key": x[:, 1:]}, "key has shape (2, 39, 32), query (2, 40, 32): pass query, key and value of the same shape"),
        ({"value": x[:1]}, "value has shape (1, 40, 32), query (2, 40, 32)"),
        ({"mask": mask[:, 1:]}, "mask has shape (2, 39), query (2, 40, 32): pass a mask of shape (2, 40), 1 = real token"),
        ({"mask": mask[0]}, "mask has shape (40), query (2, 40, 32)"),
        ({"mask": mask[:, None]}, "mask has shape (2, 1, 40)"),
        (dict.fromkeys(("query", "key", "value"), x[:, :, 1:]), "num_heads is 2: the last axis must be a multiple of num_heads"),
        (
            dict.fromkeys(("query", "key", "value"), x[:, :, :14]),
            "head size is 7 (query (2, 40, 14), 2 heads): it must be 8 to 256",
        ),
        ({n: np.zeros((1, 2, 514), np.float32) for n in ("query", "key", "value")} | {"mask": mask[:1, :2]}, "head size is 257"),
        ({n: v[:0] for n, v in good.items()}, "batch is below 1: it must be 1 or more (query has shape (0, 40, 32))"),
        ({n: v[:, :0] for n, v in good.items()}, "length is below 1"),
    ]
    for change, message in wrong:
        with pytest.raises(Exception) as caught:  # noqa: PT011
            one.run(None, good | change)
        assert message in str(caught.value)
        assert "layer.0" in str(caught.value)
    assert not one.run(None, good)[0].any(), "a refused call leaves the session usable"


def test_wrong_types_are_refused() -> None:
    for serialized in (model("float64", **VALID), model(mask=TensorProto.INT64, **VALID)):
        with pytest.raises(Exception, match="Type"):
            session(serialized)


def test_wrong_rank_is_refused() -> None:
    proto = onnx.load_from_string(model(**VALID))
    for value in proto.graph.input[:3]:
        value.type.tensor_type.ClearField("shape")
    one = session(proto.SerializeToString())
    flat = np.zeros((40, 32), np.float32)
    with pytest.raises(Exception, match=r"query has shape \(40, 32\): pass \(batch, length, num_heads \* head_size\)"):
        one.run(None, {"query": flat, "key": flat, "value": flat, "mask": np.ones((40,), np.int32)})


@pytest.mark.parametrize("dtype", DTYPES)
def test_old_onnxruntime(dtype: str, tmp_path: Path) -> None:
    """The oldest supported version loads the same file and gives the same bits and the same messages."""
    old = os.environ.get("MRA_TEST_ORT_OLD")
    if not old or not Path(old).is_dir():
        pytest.skip("MRA_TEST_ORT_OLD names no folder with an old onnxruntime: `make test` makes one")
    made = case(2, 300, 2, 16, 20, "holes", initial_prior_diagonal_n_blocks=1)
    attributes = made.attributes.as_dict() | {"padding_invariant": 0}
    (tmp_path / "model.onnx").write_bytes(model(dtype, **attributes))
    np.savez(tmp_path / "in.npz", **feeds(made))
    done = _probe(old, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() != ort.__version__, f"{old} holds the current version, not an old one"
    results = np.load(tmp_path / "out.npz")
    for threads in (1, 2):
        assert results[f"threads {threads}"].tobytes() == expected(made, dtype).tobytes()

    (tmp_path / "model.onnx").write_bytes(model(dtype, **attributes | {"scale": None}))
    done = _probe(old, tmp_path)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "MraAttention node 'layer.0': attribute scale (float) is missing" in done.stdout


def _probe(old: str, folder: Path) -> subprocess.CompletedProcess[str]:
    files = (libraries.require("ort_ops"), *(folder / name for name in ("model.onnx", "in.npz", "out.npz")))
    return subprocess.run(
        [sys.executable, str(Path(__file__).parent / "ort_probe.py"), *map(str, files)],
        env={**os.environ, "PYTHONPATH": old},
        capture_output=True,
        text=True,
        timeout=300,
    )
