"""A graph that computes what follows the last attention layer for chosen tokens only.

After the last MraAttention every token goes its own way, through the rest of its layer and the head. Whoever wants the logits of
a few tokens, as fill-mask does, needs none of that for the others: it is 40 % of the work of a small model with a vocabulary's
worth of logits, and nearly all of its output.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from mra_export.contract import OP_DOMAIN, OP_TYPE
from mra_export.errors import ContractError

TOKENS = "tokens"
"""The further input, (chosen,) int64: each a token's number in (batch, sequence), counted through."""
_SHAPE = "tokens/shape"


def choose_tokens(model: onnx.ModelProto, hidden_size: int) -> None:
    """Give the graph of a task with one output, an entry per token, the input TOKENS: (batch, sequence, n) becomes (chosen, 1, n).

    Each value is the one that the whole output has there, bitwise where the runtime computes a row of a matrix product whatever
    rows are beside it. Raises ContractError for a graph of another form.
    """
    graph = model.graph
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node]
    attention = [node.output[0] for node in nodes if (node.domain, node.op_type) == (OP_DOMAIN, OP_TYPE)][-1]
    after = {attention}  # values that depend on the last attention layer
    before = {value.name for value in graph.input}  # others that depend on the inputs: not weights, nor what is made of them
    head: list[onnx.NodeProto] = []
    tail: list[onnx.NodeProto] = []
    for node in nodes:
        follows = bool(after.intersection(node.input))
        (tail if follows else head).append(node)
        if follows:
            after.update(node.output)
        elif before.intersection(node.input):
            before.update(node.output)
    crossing = list(dict.fromkeys(name for node in tail for name in node.input if name in before))
    if len(graph.output) != 1 or len(crossing) != 2 or attention not in crossing:
        raise ContractError(
            f"the graph has {len(graph.output)} outputs, and what follows its last {OP_TYPE} takes {', '.join(crossing)}: only one "
            "output of that attention and of one residual can be computed for chosen tokens"
        )
    gathers = []
    for name in crossing:
        gathers.append(helper.make_node("Reshape", [name, _SHAPE], [f"{name}/rows"], f"{name}/Reshape"))
        gathers.append(helper.make_node("Gather", [f"{name}/rows", TOKENS], [f"{name}/chosen"], f"{name}/Gather", axis=0))
    for node in tail:
        node.input[:] = [f"{name}/chosen" if name in crossing else name for name in node.input]
    del graph.node[:]
    graph.node.extend([*head, *gathers, *tail])
    graph.initializer.append(numpy_helper.from_array(np.array([-1, 1, hidden_size]), _SHAPE))
    graph.input.append(helper.make_tensor_value_info(TOKENS, onnx.TensorProto.INT64, ["chosen"]))
    del graph.value_info[:]  # shapes of before
    axes = graph.output[0].type.tensor_type.shape.dim
    axes[0].dim_param, axes[1].dim_value = "chosen", 1
