"""The plugin object without TensorRT and without a GPU: creator, shapes, formats, workspace, serialisation, copies, enqueue."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import OpCase, dense_attention, make_case, op_cases

from mra_export.contract import ATTRIBUTE_NAMES, PLUGIN_NAME, PLUGIN_NAMESPACE, PLUGIN_VERSION, Attributes

FLOAT16, FLOAT32, FLOAT64, CHAR, INT32, INT64 = 0, 1, 2, 6, 5, 10  # nvinfer1::PluginFieldType
FIELD_TYPES = {FLOAT32: np.float32, INT32: np.int32, INT64: np.int64, FLOAT64: np.float64, FLOAT16: np.float16}
TYPES = {"float32": 0, "float16": 1, "int8": 2, "int32": 3, "bool": 4, "bfloat16": 7, "int64": 8}  # nvinfer1::DataType
NUMPY = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
LINEAR, CHW4 = 0, 3  # nvinfer1::TensorFormat
BUILD, RUNTIME = 0, 1  # nvinfer1::TensorRTPhase


class Field(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("type", ctypes.c_int32), ("length", ctypes.c_int32))


class FieldCollection(ctypes.Structure):
    _fields_ = (("count", ctypes.c_int32), ("fields", ctypes.POINTER(Field)))


class Tensor(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("extents", ctypes.c_int64 * 8),
        ("smallest", ctypes.c_int64 * 8),
        ("largest", ctypes.c_int64 * 8),
    )


def tensor(
    type_: str, extents: tuple[int, ...], smallest: tuple[int, ...] = (), largest: tuple[int, ...] = (), format_: int = LINEAR
) -> Tensor:
    ends = (smallest or extents, largest or extents)
    return Tensor(TYPES[type_], format_, len(extents), *((ctypes.c_int64 * 8)(*shape) for shape in (extents, *ends)))


@dataclass
class FieldValue:
    """What a field collection holds: values of one type, or characters."""

    name: str | None
    type: int
    values: Any
    length: int | None = None


ATTRIBUTES = Attributes(num_heads=2, num_blocks=3, scale=0.125)


def fields(attributes: Attributes = ATTRIBUTES) -> list[FieldValue]:
    """All seven, as a careful caller passes them."""
    return [
        FieldValue("num_heads", INT32, attributes.num_heads),
        FieldValue("num_blocks", INT64, attributes.num_blocks),
        FieldValue("scale", FLOAT32, attributes.scale),
        FieldValue("approx_mode", CHAR, attributes.approx_mode.encode()),
        FieldValue("initial_prior_first_n_blocks", INT32, attributes.initial_prior_first_n_blocks),
        FieldValue("initial_prior_diagonal_n_blocks", INT32, attributes.initial_prior_diagonal_n_blocks),
        FieldValue("padding_invariant", INT32, int(attributes.padding_invariant)),
    ]


def changed(name: str, type_: int, values: Any, length: int | None = None) -> list[FieldValue]:
    return [FieldValue(name, type_, values, length) if field.name == name else field for field in fields()]


class Driver:
    """plugin_driver.cc with Python's types."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        for name in ("create", "clone", "attach"):
            getattr(library, f"driver_{name}").restype = ctypes.c_void_p
        for name in ("field_names", "serialized"):
            getattr(library, f"driver_{name}").restype = ctypes.POINTER(FieldCollection)
        for name in ("creator_name", "creator_version", "creator_namespace", "name", "version", "namespace"):
            getattr(library, f"driver_{name}").restype = ctypes.c_char_p
        library.driver_workspace.restype = ctypes.c_size_t

    def text(self, name: str, *arguments: Any) -> str:
        return str(getattr(self.library, f"driver_{name}")(*arguments).decode())

    def log_with(self, version: int, versioned: bool, finds: int = 1) -> None:
        self.library.driver_set_logger(version, int(versioned), finds)

    def messages(self) -> list[str]:
        """What was logged since the last call."""
        buffer = ctypes.create_string_buffer(8192)
        self.library.driver_take_messages(buffer, len(buffer))
        return buffer.value.decode().splitlines()

    def create_raw(self, values: list[FieldValue], phase: int = BUILD) -> int | None:
        keep, entries = [], []
        for field in values:
            if isinstance(field.values, bytes):
                data = np.frombuffer(field.values, np.uint8)
            else:
                data = np.atleast_1d(np.asarray(field.values, FIELD_TYPES.get(field.type, np.int32)))
            keep.append(data)
            length = len(data) if field.length is None else field.length
            name = None if field.name is None else field.name.encode()
            entries.append(Field(name, data.ctypes.data if len(data) else None, field.type, length))
        collection = FieldCollection(len(entries), (Field * len(entries))(*entries))
        made: int | None = self.library.driver_create(ctypes.byref(collection), phase)
        for data in keep:  # a plugin that kept a pointer into its caller's fields would now serialise this
            if data.flags.writeable:
                data[:] = 99
        return made

    def destroy(self, plugin: int | None) -> None:
        self.library.driver_destroy(ctypes.c_void_p(plugin))

    def serialized(self, plugin: int) -> dict[str, Any]:
        collection = self.library.driver_serialized(ctypes.c_void_p(plugin)).contents
        values: dict[str, Any] = {}
        for field in collection.fields[: collection.count]:
            raw = ctypes.string_at(
                field.data, field.length * (1 if field.type == CHAR else np.dtype(FIELD_TYPES[field.type]).itemsize)
            )
            values[field.name.decode()] = raw.decode() if field.type == CHAR else np.frombuffer(raw, FIELD_TYPES[field.type])[0]
        return values

    def call(self, name: str, plugin: int, inputs: list[Tensor], outputs: list[Tensor]) -> int:
        return int(
            getattr(self.library, f"driver_{name}")(
                ctypes.c_void_p(plugin),
                (Tensor * len(inputs))(*inputs),
                len(inputs),
                (Tensor * len(outputs))(*outputs),
                len(outputs),
            )
        )

    def supports(self, plugin: int, position: int, tensors: list[Tensor], outputs: int = 1) -> bool:
        count = len(tensors) - outputs
        return bool(
            self.library.driver_supports(ctypes.c_void_p(plugin), position, (Tensor * len(tensors))(*tensors), count, outputs)
        )

    def output_type(self, plugin: int, inputs: list[Tensor], outputs: int = 1) -> tuple[int, int]:
        answer = ctypes.c_int32()
        status = self.library.driver_output_type(
            ctypes.c_void_p(plugin), (Tensor * len(inputs))(*inputs), len(inputs), outputs, ctypes.byref(answer)
        )
        return int(status), answer.value

    def output_axes(self, plugin: int, inputs: list[Tensor], outputs: int = 1) -> tuple[int, list[int]]:
        rank, axes = ctypes.c_int32(), (ctypes.c_int32 * 8)()
        status = self.library.driver_output_shape(
            ctypes.c_void_p(plugin), (Tensor * len(inputs))(*inputs), len(inputs), outputs, ctypes.byref(rank), axes
        )
        return int(status), list(axes[: rank.value])

    def workspace(self, plugin: int, inputs: list[Tensor]) -> int:
        size = self.library.driver_workspace(ctypes.c_void_p(plugin), (Tensor * 4)(*inputs), ctypes.byref(inputs[0]))
        return int(size)

    def enqueue(
        self, plugin: int, type_: str, arrays: list[np.ndarray], workspace_bytes: int | None = None
    ) -> tuple[int, np.ndarray]:
        """Status and context for query, key, value and mask; the workspace holds 0xff before, NaN in every format."""
        inputs = layer_inputs(arrays[0].shape, type_)
        size = self.workspace(plugin, inputs) if workspace_bytes is None else workspace_bytes
        workspace = np.full(size + 64, 0xFF, np.uint8)
        start = -workspace.ctypes.data % 64
        context = np.full(arrays[0].shape, -7.0, arrays[0].dtype)
        data = (ctypes.c_void_p * 4)(*(array.ctypes.data for array in arrays))
        status = self.library.driver_enqueue(
            ctypes.c_void_p(plugin),
            (Tensor * 4)(*inputs),
            ctypes.byref(inputs[0]),
            data,
            ctypes.c_void_p(context.ctypes.data),
            ctypes.c_void_p(workspace.ctypes.data + start),
        )
        return int(status), context


def layer_inputs(shape: tuple[int, ...], type_: str = "float32") -> list[Tensor]:
    return [tensor(type_, shape)] * 3 + [tensor("int32", shape[:2])]


def profile(type_: str = "float32", hidden: int = 64, longest: int = 512) -> list[Tensor]:
    """Dynamic batch and length, as a build passes them."""
    operand = tensor(type_, (-1, -1, hidden), (1, 1, hidden), (8, longest, hidden))
    return [operand] * 3 + [tensor("int32", (-1, -1), (1, 1), (8, longest))]


@pytest.fixture
def driver(driver_library: ctypes.CDLL) -> Iterator[Driver]:
    made = Driver(driver_library)
    made.log_with(101401, versioned=False)
    made.messages()
    yield made
    assert made.messages() == []  # every message that a test causes is looked at


@pytest.fixture
def create(driver: Driver) -> Iterator[Callable[..., int]]:
    """Makes plugins that live until the end of the test."""
    made: list[int] = []

    def make(attributes: Attributes = ATTRIBUTES, phase: int = BUILD) -> int:
        plugin = driver.create_raw(fields(attributes), phase)
        assert plugin is not None, driver.messages()
        made.append(plugin)
        return plugin

    yield make
    for plugin in made:
        driver.destroy(plugin)


# ---- Creator and fields


def test_creator_is_the_contracts(driver: Driver, create: Callable[..., int]) -> None:
    expected = (PLUGIN_NAME, PLUGIN_VERSION, PLUGIN_NAMESPACE)
    assert tuple(driver.text(name) for name in ("creator_name", "creator_version", "creator_namespace")) == expected
    plugin = ctypes.c_void_p(create())
    assert tuple(driver.text(name, plugin) for name in ("name", "version", "namespace")) == expected
    collection = driver.library.driver_field_names().contents
    assert tuple(field.name.decode() for field in collection.fields[: collection.count]) == ATTRIBUTE_NAMES


def test_it_has_core_build_and_runtime_and_nothing_else(driver: Driver, create: Callable[..., int]) -> None:
    plugin = ctypes.c_void_p(create())
    assert [driver.library.driver_has_capability(plugin, kind) for kind in (0, 1, 2)] == [1, 1, 1]
    assert driver.library.driver_has_capability(plugin, 3) == 0
    assert "capability 3" in driver.messages()[0]


def test_optional_fields_have_the_contracts_defaults(driver: Driver) -> None:
    plugin = driver.create_raw(fields()[:3])
    assert plugin is not None
    values = driver.serialized(plugin)
    driver.destroy(plugin)
    assert values == pytest.approx({**Attributes(2, 3, 0.125).as_dict(), "padding_invariant": 0})


@given(
    st.builds(
        Attributes,
        num_heads=st.integers(1, 2**31 - 1),
        num_blocks=st.integers(1, 2**63 - 1),
        scale=st.floats(2**-100, 2**100, width=32),
        approx_mode=st.sampled_from(["full", "sparse"]),
        initial_prior_first_n_blocks=st.integers(0, 2**31 - 1),
        initial_prior_diagonal_n_blocks=st.integers(0, 2**31 - 1),
        padding_invariant=st.booleans(),
    )
)
def test_fields_survive_serialisation(driver_library: ctypes.CDLL, attributes: Attributes) -> None:
    """Created, copied, attached, written into a plan and created again from there: the same attributes."""
    driver = Driver(driver_library)
    first = driver.create_raw(fields(attributes))
    copy = driver_library.driver_clone(ctypes.c_void_p(first))
    attached = driver_library.driver_attach(ctypes.c_void_p(copy))
    assert len({first, copy, attached, None}) == 4
    driver.destroy(first)
    driver.destroy(copy)
    values = driver.serialized(attached)
    again = driver_library.driver_create(driver_library.driver_serialized(ctypes.c_void_p(attached)), RUNTIME)
    driver.destroy(attached)
    assert driver.serialized(again) == values
    driver.destroy(again)
    assert list(values) == list(ATTRIBUTE_NAMES)
    assert Attributes(**{**values, "padding_invariant": bool(values["padding_invariant"])}) == attributes


def test_fields_as_the_onnx_parser_passes_them(driver: Driver) -> None:
    """It narrows every integer to int32 and counts a string's closing NUL."""
    values = fields()
    values[1] = FieldValue("num_blocks", INT32, 3)
    values[3] = FieldValue("approx_mode", CHAR, b"sparse\0")
    plugin = driver.create_raw(values)
    assert plugin is not None
    assert driver.serialized(plugin)["approx_mode"] == "sparse"
    driver.destroy(plugin)


def test_float32_products_are_chosen_by_the_environment(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    for asked in ("fma", "tf32x3"):
        monkeypatch.setenv("MRA_ATTENTION_FLOAT32", asked)
        plugin = driver.create_raw(fields())
        assert plugin is not None
        driver.destroy(plugin)
    monkeypatch.setenv("MRA_ATTENTION_FLOAT32", "tf32")
    assert driver.create_raw(fields()) is None
    (logged,) = driver.messages()
    assert "MRA_ATTENTION_FLOAT32 is tf32: set it to fma or tf32x3, or unset it" in logged


BAD_FIELDS = {
    "unknown": ([*fields(), FieldValue("window", INT32, 4)], "field window is unknown"),
    "plugin version": ([*fields(), FieldValue("plugin_version", CHAR, b"1")], "field plugin_version is unknown"),
    "no name": ([*fields(), FieldValue(None, INT32, 4)], "without a name"),
    "twice": ([*fields(), FieldValue("scale", FLOAT32, 0.5)], "field scale is given twice"),
    "nothing": ([], "field num_heads is missing"),
    "no heads": (fields()[1:], "field num_heads is missing"),
    "no budget": ([fields()[0], *fields()[2:]], "field num_blocks is missing"),
    "no scale": (fields()[:2] + fields()[3:], "field scale is missing"),
    "heads as float": (changed("num_heads", FLOAT32, 2.0), "field num_heads has type 1"),
    "heads twice": (changed("num_heads", INT32, [2, 2]), "field num_heads has type 5 and length 2"),
    "heads empty": (changed("num_heads", INT32, []), "length 0"),
    "heads without data": (changed("num_heads", INT32, [], length=1), "field num_heads has type"),
    "no head": (changed("num_heads", INT32, 0), "field num_heads is 0"),
    "too many heads": (changed("num_heads", INT64, 2**32 + 2), "field num_heads is 4294967298"),
    "no block": (changed("num_blocks", INT64, 0), "field num_blocks is 0"),
    "negative budget": (changed("num_blocks", INT32, -5), "field num_blocks is -5"),
    "scale as double": (changed("scale", FLOAT64, 0.5), "field scale has type 2"),
    "scale as int": (changed("scale", INT32, 1), "field scale has type 5"),
    "scale zero": (changed("scale", FLOAT32, 0.0), "field scale is 0"),
    "scale negative": (changed("scale", FLOAT32, -0.5), "field scale is -0.5"),
    "scale infinite": (changed("scale", FLOAT32, np.inf), "field scale is inf"),
    "scale nan": (changed("scale", FLOAT32, np.nan), "field scale is"),
    "mode unknown": (changed("approx_mode", CHAR, b"dense"), "field approx_mode is 'dense'"),
    "mode prefix": (changed("approx_mode", CHAR, b"ful"), "field approx_mode is 'ful'"),
    "mode longer": (changed("approx_mode", CHAR, b"fuller"), "field approx_mode is 'fuller'"),
    "mode empty": (changed("approx_mode", CHAR, b""), "field approx_mode has type 6 and length 0"),
    "mode as number": (changed("approx_mode", INT32, 0), "field approx_mode has type 5"),
    "mode very long": (changed("approx_mode", CHAR, b"x" * 5000), "field approx_mode is 'xxx"),
    "first negative": (changed("initial_prior_first_n_blocks", INT32, -1), "field initial_prior_first_n_blocks is -1"),
    "diagonal negative": (changed("initial_prior_diagonal_n_blocks", INT32, -1), "field initial_prior_diagonal_n_blocks is -1"),
    "flag of two": (changed("padding_invariant", INT32, 2), "field padding_invariant is 2"),
}


@pytest.mark.parametrize("phase", [BUILD, RUNTIME])
@pytest.mark.parametrize("case", BAD_FIELDS)
def test_bad_fields_are_refused_with_a_message(driver: Driver, case: str, phase: int) -> None:
    values, message = BAD_FIELDS[case]
    assert driver.create_raw(values, phase) is None
    (logged,) = driver.messages()
    assert logged.startswith("1 MraAttention plugin: ")  # 1: ILogger::Severity::kERROR
    assert message in logged


def test_a_missing_collection_is_refused(driver: Driver) -> None:
    assert driver.library.driver_create(None, BUILD) is None
    assert driver.library.driver_create(ctypes.byref(FieldCollection(2, None)), BUILD) is None
    assert driver.library.driver_create(ctypes.byref(FieldCollection(-1, None)), BUILD) is None
    assert len(driver.messages()) == 3


# ---- Logging


@pytest.mark.parametrize(
    ("version", "versioned"),
    [(100000, False), (101601, False), (10400, False), (10500, True), (10701, True), (110000, True), (120000, True)],
)
def test_messages_reach_the_log_of_every_tensorrt(driver: Driver, version: int, versioned: bool) -> None:
    """TensorRT 11 and TensorRT-RTX 1.5 changed the layout of the logger's classes."""
    driver.log_with(version, versioned)
    assert driver.create_raw([]) is None
    assert "num_heads is missing" in driver.messages()[0]


@pytest.mark.parametrize(("version", "finds"), [(0, 1), (101401, 0), (110000, 0), (110000, 2)])
def test_without_a_logger_messages_go_to_stderr(
    driver: Driver, version: int, finds: int, capfd: pytest.CaptureFixture[str]
) -> None:
    driver.log_with(version, version >= 110000, finds)
    assert driver.create_raw([]) is None
    assert "MraAttention plugin: field num_heads is missing" in capfd.readouterr().err


# ---- Types, formats and shapes at build


@pytest.mark.parametrize("type_", NUMPY)
def test_output_has_the_type_and_the_symbolic_shape_of_query(driver: Driver, create: Callable[..., int], type_: str) -> None:
    plugin, inputs = create(), profile(type_)
    assert driver.library.driver_num_outputs(ctypes.c_void_p(plugin)) == 1
    assert driver.output_type(plugin, inputs) == (0, TYPES[type_])
    assert driver.output_axes(plugin, inputs) == (0, [0, 1, 2])
    assert driver.call("configure", plugin, inputs, inputs[:1]) == 0


def test_supported_formats(driver: Driver, create: Callable[..., int]) -> None:
    """Linear only; key, value and context of query's type; an int32 mask."""
    plugin = create()
    for query in TYPES:
        for position in range(5):
            for other in TYPES:
                for format_ in (LINEAR, CHW4):
                    types = [query, query, query, "int32", query]
                    types[position] = other
                    tensors = [tensor(type_, (-1, -1, 64)) for type_ in types]
                    tensors[position].format = format_
                    right = other == "int32" if position == 3 else other in NUMPY if position == 0 else other == query
                    assert driver.supports(plugin, position, tensors) == (right and format_ == LINEAR), (query, position, other)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["int8", "int8", "int8", "int32"], "query is a type"),
        (["float32", "float16", "float32", "int32"], "key is float16, query float32"),
        (["bfloat16", "bfloat16", "float32", "int32"], "value is float32, query bfloat16"),
        (["float32", "float32", "float32", "int64"], "mask is int64: cast it to int32"),
        (["float32", "float32", "float32", "bool"], "mask is bool"),
    ],
)
def test_wrong_types_are_refused(driver: Driver, create: Callable[..., int], inputs: list[str], message: str) -> None:
    plugin = create()
    tensors = [tensor(type_, (2, 40, 64)[: 2 if index == 3 else 3]) for index, type_ in enumerate(inputs)]
    assert driver.output_type(plugin, tensors)[0] != 0
    assert driver.call("configure", plugin, tensors, tensors[:1]) != 0
    assert driver.call("shape_change", plugin, tensors, tensors[:1]) != 0
    logged = driver.messages()
    assert len(logged) == 3
    assert all(message in line for line in logged)


WRONG_SHAPES = [
    ([(2, 40), (2, 40, 64), (2, 40, 64), (2, 40)], "query has shape (2, 40): pass"),
    ([(2, 40, 4, 16), (2, 40, 64), (2, 40, 64), (2, 40)], "query has shape (2, 40, 4, 16)"),
    ([(2, 40, 64), (2, 41, 64), (2, 40, 64), (2, 40)], "key has shape (2, 41, 64), query (2, 40, 64)"),
    ([(2, 40, 64), (3, 40, 64), (2, 40, 64), (2, 40)], "key has shape (3, 40, 64)"),
    ([(2, 40, 64), (2, 40, 64), (2, 40, 32), (2, 40)], "value has shape (2, 40, 32)"),
    ([(2, 40, 64), (2, 40, 64), (2, 40, 64), (2, 39)], "mask has shape (2, 39), query (2, 40, 64)"),
    ([(2, 40, 64), (2, 40, 64), (2, 40, 64), (1, 40)], "mask has shape (1, 40)"),
    ([(2, 40, 64), (2, 40, 64), (2, 40, 64), (2, 1, 40)], "mask has shape (2, 1, 40)"),
    ([(0, 40, 64), (0, 40, 64), (0, 40, 64), (0, 40)], "batch and length must be 1 or more"),
    ([(2, 0, 64), (2, 0, 64), (2, 0, 64), (2, 0)], "batch and length must be 1 or more"),
    ([(2, 40, 65)] * 3 + [(2, 40)], "last axis is 65, num_heads 2"),
    ([(2, 40, 14)] * 3 + [(2, 40)], "head size is 7 (14 / 2 heads)"),
    ([(2, 40, 514)] * 3 + [(2, 40)], "head size is 257"),
    ([(2, 40, 0)] * 3 + [(2, 40)], "head size is 0"),
]


@pytest.mark.parametrize(("shapes", "message"), WRONG_SHAPES)
def test_wrong_shapes_are_refused(driver: Driver, create: Callable[..., int], shapes: list[tuple[int, ...]], message: str) -> None:
    plugin = create()
    tensors = [tensor("int32" if index == 3 else "float32", shape) for index, shape in enumerate(shapes)]
    assert driver.output_axes(plugin, tensors)[0] != 0
    assert driver.call("configure", plugin, tensors, tensors[:1]) != 0
    assert driver.call("shape_change", plugin, tensors, tensors[:1]) != 0
    logged = driver.messages()
    assert len(logged) == 3
    assert all(message in line for line in logged)


def test_what_a_profile_hides_is_refused(driver: Driver, create: Callable[..., int]) -> None:
    """Dynamic axes fit when the network is made; the ends of the profile are what configurePlugin judges."""
    plugin = create()
    inputs = profile()
    inputs[3] = tensor("int32", (-1, -1), (1, 1), (8, 500))
    assert driver.output_axes(plugin, inputs)[0] == 0
    assert driver.call("configure", plugin, inputs, inputs[:1]) != 0
    assert "mask has shape (8, 500), query (8, 512, 64)" in driver.messages()[0]
    inputs = profile()
    inputs[3] = tensor("int32", (-1, -1), (1, 2), (8, 512))
    assert driver.call("configure", plugin, inputs, inputs[:1]) != 0
    assert "mask has shape (1, 2), query (1, 1, 64)" in driver.messages()[0]
    inputs = profile(longest=200_000)
    assert driver.call("configure", plugin, inputs, inputs[:1]) != 0
    assert "query has shape (8, 200000, 64)" in driver.messages()[0]
    assert driver.workspace(plugin, inputs) == 2**64 - 1
    assert len(driver.messages()) == 1


def test_a_wrong_number_of_tensors_is_refused(driver: Driver, create: Callable[..., int]) -> None:
    plugin, inputs = create(), layer_inputs((2, 40, 64))
    for some, outputs in ((inputs[:3], 1), (inputs, 2), (inputs, 0), ([*inputs, inputs[0]], 1), ([], 1)):
        assert driver.output_type(plugin, some, outputs)[0] != 0
        assert driver.output_axes(plugin, some, outputs)[0] != 0
        assert driver.call("configure", plugin, some, inputs[:1] * outputs) != 0
        assert driver.call("shape_change", plugin, some, inputs[:1] * outputs) != 0
        assert not driver.supports(plugin, 0, [*some, *inputs[:1] * outputs], outputs)
        assert all(f"{len(some)} inputs and {outputs} outputs" in line for line in driver.messages())


# ---- Workspace and enqueue


@settings(max_examples=60)
@given(
    heads=st.integers(1, 12),
    head_size=st.sampled_from([8, 32, 64, 200]),
    budget=st.one_of(st.integers(1, 4096), st.integers(1, 2**40)),
    mode=st.sampled_from(["full", "sparse"]),
    batches=st.tuples(st.integers(1, 32), st.integers(1, 32)),
    lengths=st.tuples(st.integers(1, 16384), st.integers(1, 16384)),
)
def test_workspace_of_the_largest_shape_covers_all_others(
    driver_library: ctypes.CDLL,
    heads: int,
    head_size: int,
    budget: int,
    mode: str,
    batches: tuple[int, int],
    lengths: tuple[int, int],
) -> None:
    driver = Driver(driver_library)
    plugin = driver.create_raw(fields(Attributes(heads, budget, 0.125, mode)))
    assert plugin is not None
    (small_batch, large_batch), (short, long) = sorted(batches), sorted(lengths)
    hidden = heads * head_size
    small = driver.workspace(plugin, layer_inputs((small_batch, short, hidden)))
    large = driver.workspace(plugin, layer_inputs((large_batch, long, hidden)))
    driver.destroy(plugin)
    assert 0 < small <= large < 2**50


def run_case(driver: Driver, plugin: int, case: OpCase, type_: str) -> tuple[np.ndarray, np.ndarray]:
    """Context of the plugin and of the float64 formula with the plugin's inputs, both float64."""
    arrays = [np.ascontiguousarray(array.astype(NUMPY[type_])) for array in case.arrays[:3]] + [case.mask]
    status, context = driver.enqueue(plugin, type_, arrays)
    assert status == 0, driver.messages()
    expected = dense_attention(*(array.astype(np.float64) for array in arrays[:3]), case.mask, case.attributes)
    assert np.all(expected.margin > 1e-4)
    return context.astype(np.float64), expected.context


TOLERANCES = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Of the largest value. The kernel's accuracy has tests of its own; a wrong operand, attribute or type is off by far more."""


@pytest.mark.parametrize("type_", NUMPY)
@pytest.mark.parametrize(("length", "masking"), [(1, "none"), (33, "holes"), (100, "right padding")])
@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_enqueue_equals_the_float64_formula(
    driver: Driver, create: Callable[..., int], type_: str, length: int, masking: str, mode: str
) -> None:
    attributes = Attributes(2, 5, 0.125, mode, 1, 1, padding_invariant=length == 33)
    case = make_case(attributes, 2, length, 32, masking, seed=length)
    context, expected = run_case(driver, create(attributes), case, type_)
    assert np.abs(context - expected).max() <= TOLERANCES[type_] * max(1, np.abs(expected).max())


def test_many_contexts_at_once(driver: Driver, create: Callable[..., int]) -> None:
    """Each context has its own copy, and its own shapes and attributes, whatever its neighbours do."""
    jobs = []
    for index in range(6):
        attributes = Attributes(2, 3 + index, 0.125, ("full", "sparse")[index % 2])
        plugin = driver.library.driver_attach(ctypes.c_void_p(create(attributes)))
        jobs.append((plugin, make_case(attributes, 1, 40 + 20 * index, 16, seed=index)))
    differences: dict[int, float] = {}

    def run(index: int) -> None:
        plugin, case = jobs[index]
        context, expected = run_case(driver, plugin, case, "float32")
        differences[index] = float(np.abs(context - expected).max())

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for plugin, _ in jobs:
        driver.destroy(plugin)
    assert sorted(differences) == list(range(len(jobs)))
    assert max(differences.values()) < 1e-5


def test_one_plugin_takes_changing_shapes(driver: Driver, create: Callable[..., int]) -> None:
    attributes = Attributes(2, 7, 0.125)
    plugin = create(attributes)
    for length in (70, 5, 128, 1):
        case = make_case(attributes, 1 + length % 2, length, 16, "holes", seed=length)
        tensors = layer_inputs(case.query.shape)
        assert driver.call("shape_change", plugin, tensors, tensors[:1]) == 0
        context, expected = run_case(driver, plugin, case, "float32")
        assert np.abs(context - expected).max() < 1e-5


def test_a_failed_launch_is_reported_with_cudas_own_text(driver: Driver, create: Callable[..., int]) -> None:
    plugin = create()
    case = make_case(ATTRIBUTES, 1, 40, 16)
    driver.library.mra_emulation_fail_after(1)
    status, _ = driver.enqueue(plugin, "float32", list(case.arrays))
    assert status != 0
    (logged,) = driver.messages()
    assert "enqueue failed for query of shape (1, 40, 32)" in logged
    assert "the text of the CUDA error" in logged


def test_enqueue_refuses_what_on_shape_change_would(driver: Driver, create: Callable[..., int]) -> None:
    plugin = create()
    case = make_case(ATTRIBUTES, 1, 40, 16)
    inputs = layer_inputs((1, 40, 33))
    data = (ctypes.c_void_p * 4)(*(array.ctypes.data for array in case.arrays))
    assert driver.library.driver_enqueue(ctypes.c_void_p(plugin), (Tensor * 4)(*inputs), ctypes.byref(inputs[0]), data, None, None)
    assert "last axis is 33" in driver.messages()[0]


def test_a_null_pointer_is_refused(driver: Driver, create: Callable[..., int]) -> None:
    plugin, inputs = create(), layer_inputs((1, 40, 32))
    answer = driver.library.driver_enqueue(
        ctypes.c_void_p(plugin), (Tensor * 4)(*inputs), ctypes.byref(inputs[0]), (ctypes.c_void_p * 4)(), None, None
    )
    assert answer != 0
    assert "a required pointer is NULL" in driver.messages()[0]


@settings(max_examples=15)
@given(case=op_cases(max_length=100), type_=st.sampled_from(sorted(NUMPY)))
def test_enqueue_over_the_whole_contract(driver_library: ctypes.CDLL, case: OpCase, type_: str) -> None:
    """With a budget that takes all blocks there is nothing to select, so any inputs may be compared."""
    attributes = Attributes(**{**case.attributes.as_dict(), "num_blocks": 1000})
    driver = Driver(driver_library)
    plugin = driver.create_raw(fields(attributes))
    assert plugin is not None
    whole = OpCase(attributes, *case.arrays)
    context, expected = run_case(driver, plugin, whole, type_)
    driver.destroy(plugin)
    assert np.abs(context - expected).max() <= TOLERANCES[type_] * max(1, np.abs(expected).max())
