"""A PyTorch MRA model as an ONNX graph: torch.export, one mra.MraAttention node per layer, and its function body once."""

from __future__ import annotations

import ast
import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import onnx
import onnx_ir as ir
import onnxscript
import torch
from onnx.defs import OpSchema
from torch import Tensor, nn
from transformers import PreTrainedModel

from mra_export import bundle
from mra_export.contract import OP_DOMAIN, OP_TYPE, OP_VERSION, PLUGIN_NAMESPACE, PLUGIN_VERSION, Attributes
from mra_export.errors import ContractError
from mra_export.onnx_function import check_opset, function_proto

EXTERNAL_DATA = "model.onnx.data"
_SINGLE_FILE_LIMIT = 2_000_000_000
"""Bytes of weights above which they go into a file of their own: a protobuf ends at 2 GiB."""
_SCOPES = "pkg.torch.onnx.name_scopes"
_ALIASED_BYTES = 4096
"""Memory this far apart shares its place in a CPU's first-level cache."""
_PADDING = 16
"""Columns that take a feed-forward layer's rows off that distance: a cache line of float32, and what tensor cores want."""

_TOKENS: tuple[str | int, ...] = ("batch", "sequence")
_CHOICES: tuple[str | int, ...] = ("batch", "choices", "sequence")


@dataclass(frozen=True)
class Signature:
    """A graph's inputs (all int64) and outputs (all of the model's dtype): name -> axes, a string where it may change per call."""

    inputs: dict[str, tuple[str | int, ...]]
    outputs: dict[str, tuple[str | int, ...]]


def signature(task: str, config: Any) -> Signature:
    """What the graph of a task takes and gives, with transformers' names."""
    outputs: dict[str, dict[str, tuple[str | int, ...]]] = {
        "fill-mask": {"logits": (*_TOKENS, config.vocab_size)},
        "text-classification": {"logits": ("batch", config.num_labels)},
        "multiple-choice": {"logits": ("batch", "choices")},
        "token-classification": {"logits": (*_TOKENS, config.num_labels)},
        "question-answering": {"start_logits": _TOKENS, "end_logits": _TOKENS},
        "feature-extraction": {"last_hidden_state": (*_TOKENS, config.hidden_size)},
    }
    names = ["input_ids", "attention_mask"] + ["token_type_ids"] * (config.type_vocab_size > 1)
    axes = _CHOICES if task == "multiple-choice" else _TOKENS
    return Signature(dict.fromkeys(names, axes), outputs[task])


def to_onnx(model: PreTrainedModel, task: str, attributes: Attributes, dtype: str, opset: int) -> ir.Model:
    """Export a model that is already of `dtype` ("fp32", "fp16", "bf16") and in eval mode.

    opset: 18 to 23. Raises ContractError where the graph is not what the bundle promises: its opset, one MraAttention node per
    layer with these attributes, and no Transpose beside them.
    """
    check_opset(opset)
    expected = signature(task, model.config)
    graph_module = _Forward(model, list(expected.inputs), list(expected.outputs)).eval()
    limit = model.config.max_position_embeddings
    axes = {
        "batch": torch.export.Dim("batch", min=1),
        "choices": torch.export.Dim("choices", min=1),
        "sequence": torch.export.Dim("sequence", min=1, max=limit),
    }
    # Sizes 0 and 1 would be taken for constants, and equal sizes for one axis.
    sizes = {"batch": 3, "choices": 4, "sequence": min(limit, 40)}
    example = tuple(torch.ones([sizes[str(axis)] for axis in shape], dtype=torch.int64) for shape in expected.inputs.values())
    dynamic = tuple({index: axes[str(axis)] for index, axis in enumerate(shape)} for shape in expected.inputs.values())
    with _quiet(), torch.no_grad(), unaliased_rows(model):
        program = torch.onnx.export(
            graph_module,
            example,
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=(dynamic,),
            input_names=list(expected.inputs),
            output_names=list(expected.outputs),
            custom_translation_table={torch.ops.mra.attention.default: _translate},
            verbose=False,
        )
    assert program is not None
    exported = program.model
    _declare(exported, expected)
    function = ir.serde.deserialize_function(function_proto(attributes, dtype, opset))
    exported.functions[function.identifier()] = function
    _halve_first(exported.graph)
    _name_by_scope(exported.graph)
    _drop_metadata(exported)
    exported.producer_name = "mra-export"
    exported.producer_version = None
    exported.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    _check_graph(exported, model.config.num_hidden_layers, attributes, opset)
    return exported


def save(model: ir.Model, path: Path) -> bool:
    """Write the graph to `path`, and above 2 GB of weights those to EXTERNAL_DATA beside it; returns whether it did that."""
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    large = bool(weights > _SINGLE_FILE_LIMIT)
    ir.save(model, path, external_data=EXTERNAL_DATA if large else None)
    return large


def save_checked(model: ir.Model, folder: Path) -> None:
    """Write model.onnx, and above 2 GB of weights model.onnx.data, then run onnx's checker with shape inference over the file.

    Raises ContractError with the checker's words.
    """
    path = folder / bundle.MODEL
    save(model, path)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ContractError(f"the exported graph does not pass onnx {onnx.__version__}'s checker: {error}") from error


class _Forward(nn.Module):
    """The model with the graph's inputs in order and nothing but the graph's outputs."""

    def __init__(self, model: nn.Module, inputs: list[str], outputs: list[str]) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.outputs = outputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        result = self.model(**dict(zip(self.inputs, tensors, strict=True)), return_dict=True)
        return tuple(result[name] for name in self.outputs)


@contextlib.contextmanager
def unaliased_rows(model: PreTrainedModel) -> Iterator[None]:
    """Widen float32 feed-forward layers by zero columns while the graph is made, where a row is a multiple of 4096 bytes long.

    A matrix product reads a dozen rows of its left input at once. Rows 4096 bytes apart all want the same place in the cache and
    push each other out: 3072 columns, RoBERTa's size, cost a tenth of the second product's time (docs/onnxruntime.md). The zero
    columns meet zero rows of the second weight, so the answer is the same.
    """
    aliased = model.dtype == torch.float32 and model.config.intermediate_size * 4 % _ALIASED_BYTES == 0
    paddings: list[tuple[nn.Linear, str, tuple[int, ...]]] = []
    for layer in cast(Any, model.base_model).encoder.layer if aliased else ():
        up, down = layer.intermediate.dense, layer.output.dense
        paddings += [(up, "weight", (0, 0, 0, _PADDING)), (up, "bias", (0, _PADDING)), (down, "weight", (0, _PADDING))]
    kept = [getattr(linear, name) for linear, name, _ in paddings]
    try:
        for linear, name, padding in paddings:
            # New parameters, not new data in the old ones: the graph refers to them until it is written.
            setattr(linear, name, nn.Parameter(nn.functional.pad(getattr(linear, name), padding), requires_grad=False))
        yield
    finally:
        for (linear, name, _), parameter in zip(paddings, kept, strict=True):
            setattr(linear, name, parameter)


def _schema() -> OpSchema:
    kinds = OpSchema.AttrType
    attributes = {
        "num_heads": kinds.INT,
        "num_blocks": kinds.INT,
        "scale": kinds.FLOAT,
        "approx_mode": kinds.STRING,
        "initial_prior_first_n_blocks": kinds.INT,
        "initial_prior_diagonal_n_blocks": kinds.INT,
        "padding_invariant": kinds.INT,
        "plugin_version": kinds.STRING,
        "plugin_namespace": kinds.STRING,
    }
    return OpSchema(
        OP_TYPE,
        OP_DOMAIN,
        OP_VERSION,
        inputs=[
            *(OpSchema.FormalParameter(name, "T") for name in ("query", "key", "value")),
            OpSchema.FormalParameter("mask", "tensor(int32)"),
        ],
        outputs=[OpSchema.FormalParameter("context", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "query, key, value and context")],
        attributes=[OpSchema.Attribute(name, kind) for name, kind in attributes.items()],
    )


# A bare Op, not an onnxscript function: the exporter would inline that.
_OPERATOR = onnxscript.values.Op(onnxscript.values.Opset(OP_DOMAIN, OP_VERSION), OP_TYPE, _schema())


def _translate(
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    num_heads: int,
    num_blocks: int,
    scale: float,
    approx_mode: str = "full",
    initial_prior_first_n_blocks: int = 0,
    initial_prior_diagonal_n_blocks: int = 0,
    padding_invariant: bool = False,
) -> Any:
    """torch.ops.mra.attention -> mra.MraAttention, every attribute written out."""
    return _OPERATOR(
        query,
        key,
        value,
        mask,
        num_heads=num_heads,
        num_blocks=num_blocks,
        scale=scale,
        approx_mode=approx_mode,
        initial_prior_first_n_blocks=initial_prior_first_n_blocks,
        initial_prior_diagonal_n_blocks=initial_prior_diagonal_n_blocks,
        padding_invariant=int(padding_invariant),
        plugin_version=PLUGIN_VERSION,
        plugin_namespace=PLUGIN_NAMESPACE,
    )


def _declare(model: ir.Model, expected: Signature) -> None:
    """Give inputs and outputs their promised axes: the exporter names derived ones after expressions."""
    for values, axes in ((model.graph.inputs, expected.inputs), (model.graph.outputs, expected.outputs)):
        if [value.name for value in values] != list(axes):
            raise ContractError(f"the exported graph has {[value.name for value in values]} where {list(axes)} is promised")
        for value, shape in zip(values, axes.values(), strict=True):
            value.shape = ir.Shape(shape)


def _halve_first(graph: ir.Graph) -> None:
    """GELU as (x * 0.5) * (1 + erf), which runtimes know and fuse: below opset 20 the exporter writes x * (0.5 * (1 + erf))."""
    for node in graph:
        chain = [node]
        while len(chain) < 4 and len(consumers := chain[-1].outputs[0].consumers()) == 1:
            chain.append(consumers[0])
        if [link.op_type for link in chain] != ["Erf", "Add", "Mul", "Mul"]:
            continue
        _, add, half, product = chain
        factor, x = half.inputs[0], product.inputs[0]
        if half.inputs[1] is add.outputs[0] and product.inputs[1] is half.outputs[0]:
            half.replace_input_with(0, x)
            half.replace_input_with(1, factor)
            product.replace_input_with(0, half.outputs[0])
            product.replace_input_with(1, add.outputs[0])


def _name_by_scope(graph: ir.Graph) -> None:
    """Nodes and weights by their place in the model, such as /mra/encoder/layer.0/attention/self/MraAttention."""
    used: Counter[str] = Counter()
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))[:-1]  # the last one is the operator itself
        modules = [scope for scope in scopes if scope.startswith("model.")]
        path = _slashes(modules[-1].removeprefix("model.")) if modules else ""
        name = f"{path}/{node.op_type}"
        node.name = f"{name}_{used[name]}" if used[name] else name
        used[name] += 1
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if modules and weight is not None and weight.is_initializer() and (weight.name or "").startswith("val_"):
            # A Linear layer's weight that the exporter transposed and numbered.
            weight.name = f"{modules[-1]}.weight"
    for name in list(graph.initializers):
        if name.startswith("model."):
            graph.initializers[name].name = name.removeprefix("model.")


def _slashes(scope: str) -> str:
    """mra.encoder.layer.0.output -> /mra/encoder/layer.0/output: an index stays with its list."""
    parts: list[str] = []
    for part in scope.split("."):
        if part.isdigit():
            parts[-1] += f".{part}"
        else:
            parts.append(part)
    return "/" + "/".join(parts)


def _drop_metadata(model: ir.Model) -> None:
    """The exporter records stack traces, with this machine's paths, at every node and value."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _check_graph(model: ir.Model, layers: int, attributes: Attributes, opset: int) -> None:
    if model.opset_imports.get("") != opset:
        raise ContractError(f"torch {torch.__version__} exported opset {model.opset_imports.get('')}, not {opset}: use opset 18")
    nodes = [node for node in model.graph if (node.domain, node.op_type) == (OP_DOMAIN, OP_TYPE)]
    if len(nodes) != layers:
        raise ContractError(
            f"the exported graph has {len(nodes)} {OP_TYPE} nodes, the model {layers} layers: attention was lost on the way, "
            "set_reference_attention(False) keeps it one operator"
        )
    wanted = attributes.as_dict()
    for node in nodes:
        found = {name: node.attributes[name].value for name in wanted}
        if any(found[name] != value for name, value in wanted.items() if name != "scale"):
            raise ContractError(f"{node.name} has attributes {found}, the function body is for {wanted}")
        producers = [value.producer() for value in node.inputs if value is not None]
        consumers = [use.node for output in node.outputs for use in output.uses()]
        if any(other is not None and other.op_type == "Transpose" for other in (*producers, *consumers)):
            raise ContractError(f"{node.name} has a Transpose beside it: the operator takes what a Linear layer writes")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's advice on axis names and on torchvision, which no user of ours can act on, off the screen."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*axis name.*will not be used.*")
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)
