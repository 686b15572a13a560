"""The MraAttention operator as an ONNX function of standard ops: what runs where our kernel library is not loaded.

The body is the dense identity of docs/operator.md: attention whose logits are replaced, outside the chosen 32 x 32 blocks, by the
logit of the block means. It forms N x N logits per head, so it is a correct fallback, not a fast path. The numbers in its comments
are that page's steps.

The attributes are written into the body as literals (a graph cannot branch on a string attribute in TensorRT), so every node that
calls the function must carry exactly these attributes.
"""

from __future__ import annotations

import onnx
import onnx.parser

from mra_export.contract import ATTRIBUTE_NAMES, BLOCK_SIZE, DTYPES, OP_DOMAIN, OP_TYPE, Attributes
from mra_export.errors import ContractError

MIN_OPSET = 18
MAX_OPSET = 23
NODE_ATTRIBUTES = (*ATTRIBUTE_NAMES, "plugin_version", "plugin_namespace")
"""Attributes of each node: the operator's, and the two by which TensorRT's parser finds its plugin."""

_ELEMENT_TYPES = {
    "fp32": onnx.TensorProto.FLOAT,
    "fp16": onnx.TensorProto.FLOAT16,
    "bf16": onnx.TensorProto.BFLOAT16,
}
_EPS = 1e-6
_LOWEST = "-3.4028234663852886e+38"
_HIGHEST = "3.4028234663852886e+38"
_MAX_PRIORS = 3


def element_type(dtype: str) -> int:
    """onnx.TensorProto's number of the operator's tensor type T for "fp32", "fp16" or "bf16". Raises ContractError."""
    if dtype not in _ELEMENT_TYPES:
        raise ContractError(f"dtype is {dtype!r}: use one of {', '.join(DTYPES)}")
    return _ELEMENT_TYPES[dtype]


def check_opset(opset: int) -> None:
    """Refuse an ONNX opset the function body was not checked with. Raises ContractError."""
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise ContractError(f"opset is {opset}: use {MIN_OPSET} to {MAX_OPSET}")


def function_proto(attributes: Attributes, dtype: str, opset: int) -> onnx.FunctionProto:
    """The function mra.MraAttention(query, key, value, mask) -> context, for these attributes.

    query, key, value, context: (B, N, H * D) of `dtype` ("fp32", "fp16", "bf16"); mask: (B, N) int32, 0 = padding. B, N >= 1.
    opset: version of the standard ops, 18 to 23. Raises ContractError on another dtype or opset.
    """
    check_opset(opset)
    function = onnx.parser.parse_function(_text(attributes, element_type(dtype), opset))
    function.doc_string = "MRA attention in standard ops, for these attribute values only: " + ", ".join(
        f"{name}={value!r}" for name, value in attributes.as_dict().items()
    )
    return function


def _text(attributes: Attributes, element: int, opset: int) -> str:
    return f"""
<domain: "{OP_DOMAIN}", opset_import: ["" : {opset}]>
{OP_TYPE} <{", ".join(NODE_ATTRIBUTES)}> (query, key, value, mask) => (context)
{{
  zero = Constant <value = float {{0.0}}> ()
  one = Constant <value = float {{1.0}}> ()
  eps = Constant <value = float {{{_EPS}}}> ()
  scale = Constant <value = float {{{attributes.scale!r}}}> ()
  lowest = Constant <value = float {{{_LOWEST}}}> ()
  highest = Constant <value = float {{{_HIGHEST}}}> ()
  i0 = Constant <value = int64[1] {{0}}> ()
  i1 = Constant <value = int64[1] {{1}}> ()
  i2 = Constant <value = int64[1] {{2}}> ()
  i3 = Constant <value = int64[1] {{3}}> ()
  block_size = Constant <value = int64[1] {{{BLOCK_SIZE}}}> ()

  # Sizes: N tokens, nb blocks, L = 32 nb tokens after padding.
  length = Shape <start = 1, end = 2> (query)
  round_up = Constant <value = int64[1] {{{BLOCK_SIZE - 1}}}> ()
  length_up = Add (length, round_up)
  blocks = Div (length_up, block_size)
  padded_length = Mul (blocks, block_size)
  padding = Sub (padded_length, length)
  pads_head = Constant <value = int64[3] {{0, 0, 0}}> ()
  pads_2 = Concat <axis = 0> (pads_head, padding)
  pads_head_3 = Constant <value = int64[4] {{0, 0, 0, 0}}> ()
  pads_3 = Concat <axis = 0> (pads_head_3, padding, i0)

  # Real tokens per block, count: (B, 1, nb, 1). live: (B, 1, nb, nb), both blocks have a real token.
  real = Cast <to = {onnx.TensorProto.BOOL}> (mask)
  real_token = Unsqueeze (real, i2)
  real_float = Cast <to = {onnx.TensorProto.FLOAT}> (real)
  real_padded = Pad (real_float, pads_2, zero)
  head_axes = Constant <value = int64[2] {{0, 1}}> ()
  real_shape = Concat <axis = 0> (head_axes, blocks, block_size)
  real_blocks = Reshape (real_padded, real_shape)
  count = ReduceSum <keepdims = 1> (real_blocks, i3)
  count_eps = Add (count, eps)
  count_row = Transpose <perm = [0, 1, 3, 2]> (count)
  pair_count = Mul (count, count_row)
  live = Greater (pair_count, zero)

  # 1. Heads: (B, H, L, D). Masked tokens are replaced by 0, not multiplied: NaN there has no effect. Block means: (B, H, nb, D).
  heads_shape = Constant <value = int64[4] {{0, 0, {attributes.num_heads}, -1}}> ()
  copy_2 = Constant <value = int64[2] {{0, 0}}> ()
  infer = Constant <value = int64[1] {{-1}}> ()
  blocks_shape = Concat <axis = 0> (copy_2, blocks, block_size, infer)
  {_heads("query", element)}
  {_heads("key", element)}
  {_heads("value", element)}
  {_block_means("query")}
  {_block_means("key")}

  # 2. Block logits l and their row maximum r: (B, H, nb, nb), (B, H, nb, 1).
  key_means_t = Transpose <perm = [0, 1, 3, 2]> (key_means)
  block_dot = MatMul (query_means, key_means_t)
  block_logit = Mul (block_dot, scale)
  {_row_maximum(attributes.padding_invariant)}
  score = Sub (block_logit, row_max)

  # 3, 4. Class of each pair, preferences - 2 * dead: (B, 1, nb * nb). Classes are compared first, scores within a class.
  minus_two = Constant <value = float {{-2.0}}> ()
  dead_class = Where (live, zero, minus_two)
  {_priors(attributes)}
  class_shape = Constant <value = int64[3] {{0, 1, -1}}> ()
  class_flat = Reshape (class, class_shape)

  # 5. K' = min(K, nb * nb). cutoff, the lowest class with a chosen pair: the largest c with count(class >= c) >= K': (B, 1, 1).
  pairs = Mul (blocks, blocks)
  num_blocks = Constant <value = int64[1] {{{attributes.num_blocks}}}> ()
  budget = Min (num_blocks, pairs)
  budget_float = Cast <to = {onnx.TensorProto.FLOAT}> (budget)
  classes = Constant <value = float[{_MAX_PRIORS + 2}, 1] {{{", ".join(f"{c}.0" for c in range(-1, _MAX_PRIORS + 1))}}}> ()
  class_rows = Unsqueeze (class_flat, i2)
  at_least = GreaterOrEqual (class_rows, classes)
  at_least_float = Cast <to = {onnx.TensorProto.FLOAT}> (at_least)
  class_size = ReduceSum <keepdims = 0> (at_least_float, i3)
  reached = GreaterOrEqual (class_size, budget_float)
  reached_float = Cast <to = {onnx.TensorProto.FLOAT}> (reached)
  steps = ReduceSum <keepdims = 1> (reached_float, i2)
  cutoff = Add (steps, minus_two)

  # Chosen pairs by one TopK, which breaks ties towards the lower index; excluded also covers what is tied with the last chosen.
  flat_shape = Constant <value = int64[3] {{0, 0, -1}}> ()
  score_flat = Reshape (score, flat_shape)
  above = Greater (class_flat, cutoff)
  within = Equal (class_flat, cutoff)
  within_score = Where (within, score_flat, lowest)
  rank = Where (above, highest, within_score)
  top_rank, top_index = TopK <axis = 2, largest = 1, sorted = 1> (rank, budget)
  last_rank = ReduceMin <keepdims = 1> (top_rank, i2)
  excluded_flat = GreaterOrEqual (rank, last_rank)
  flat_size = Shape (rank)
  none_chosen = Expand (zero, flat_size)
  top_size = Shape (top_index)
  top_ones = Expand (one, top_size)
  chosen_float = ScatterElements <axis = 2> (none_chosen, top_index, top_ones)
  chosen_flat = Greater (chosen_float, zero)

  # 6. Token logits by block: (B, H, nb, 32, nb, 32); pairs of blocks: (B, H, nb, 1, nb, 1); real keys: (B, 1, 1, 1, nb, 32).
  pair_shape = Concat <axis = 0> (copy_2, blocks, i1, blocks, i1)
  chosen = Reshape (chosen_flat, pair_shape)
  excluded = Reshape (excluded_flat, pair_shape)
  coarse = Reshape (block_logit, pair_shape)
  real_key_axes = Constant <value = int64[2] {{1, 2}}> ()
  real_key_float = Unsqueeze (real_blocks, real_key_axes)
  real_key = Greater (real_key_float, zero)
  key_heads_t = Transpose <perm = [0, 1, 3, 2]> (key_heads)
  dot = MatMul (query_heads, key_heads_t)
  token_logit = Mul (dot, scale)
  tile_shape = Concat <axis = 0> (copy_2, blocks, block_size, blocks, block_size)
  tiles = Reshape (token_logit, tile_shape)
  {_outside_chosen(attributes.approx_mode)}
  mixed = Where (chosen, tiles, outside)
  kept = Where (real_key, mixed, lowest)
  square_shape = Concat <axis = 0> (copy_2, padded_length, padded_length)
  logits = Reshape (kept, square_shape)

  # Softmax with eps relative to the row's largest weight; a row with no weight gives 0.
  logit_max = ReduceMax <keepdims = 1> (logits, i3)
  shifted = Sub (logits, logit_max)
  weights = Exp (shifted)
  total = ReduceSum <keepdims = 1> (weights, i3)
  total_eps = Add (total, eps)
  weighted = MatMul (weights, value_heads)
  quotient = Div (weighted, total_eps)
  empty = Equal (logit_max, lowest)
  context_heads = Where (empty, zero, quotient)
  context_tokens = Transpose <perm = [0, 2, 1, 3]> (context_heads)
  context_padded = Reshape (context_tokens, flat_shape)
  context_slice = Slice (context_padded, i0, length, i1)
  context_float = Where (real_token, context_slice, zero)
  {_round("context", "context_float", element)}
}}
"""


def _lines(*statements: str) -> str:
    return "\n  ".join(statements)


def _heads(name: str, element: int) -> str:
    """(B, N, H * D) of T -> (B, H, L, D) of float32, 0 at masked and padding tokens."""
    widen = "Identity" if element == onnx.TensorProto.FLOAT else f"Cast <to = {onnx.TensorProto.FLOAT}>"
    return _lines(
        f"{name}_float = {widen} ({name})",
        f"{name}_real = Where (real_token, {name}_float, zero)",
        f"{name}_padded = Pad ({name}_real, pads_3, zero)",
        f"{name}_tokens = Reshape ({name}_padded, heads_shape)",
        f"{name}_heads = Transpose <perm = [0, 2, 1, 3]> ({name}_tokens)",
    )


def _block_means(name: str) -> str:
    return _lines(
        f"{name}_blocks = Reshape ({name}_heads, blocks_shape)",
        f"{name}_sums = ReduceSum <keepdims = 0> ({name}_blocks, i3)",
        f"{name}_means = Div ({name}_sums, count_eps)",
    )


def _row_maximum(padding_invariant: bool) -> str:
    """r: over every block, or, padding invariant, over live pairs only (0 for a row that has none)."""
    if not padding_invariant:
        return "row_max = ReduceMax <keepdims = 1> (block_logit, i3)"
    return _lines(
        "live_logit = Where (live, block_logit, lowest)",
        "live_max = ReduceMax <keepdims = 1> (live_logit, i3)",
        "no_live = Equal (live_max, lowest)",
        "row_max = Where (no_live, zero, live_max)",
    )


def _priors(attributes: Attributes) -> str:
    """class = dead_class + one for each prior that prefers the pair. A prior of 0 blocks is no prior at all."""
    first = attributes.initial_prior_first_n_blocks
    diagonal = attributes.initial_prior_diagonal_n_blocks
    if not first and not diagonal:
        return "class = Identity (dead_class)"
    statements = [
        "start = Constant <value = int64 {0}> ()",
        "step = Constant <value = int64 {1}> ()",
        "blocks_scalar = Squeeze (blocks, i0)",
        "index = Range (start, blocks_scalar, step)",
        f"index_float = Cast <to = {onnx.TensorProto.FLOAT}> (index)",
        "row = Unsqueeze (index_float, i1)",
        "column = Unsqueeze (index_float, i0)",
    ]
    total = "dead_class"
    if first:
        statements.append(f"first_n = Constant <value = float {{{float(first)}}}> ()")
        for axis in ("row", "column"):
            statements += [
                f"first_{axis} = Less ({axis}, first_n)",
                f"first_{axis}_gain = Cast <to = {onnx.TensorProto.FLOAT}> (first_{axis})",
                f"class_{axis} = Add ({total}, first_{axis}_gain)",
            ]
            total = f"class_{axis}"
    if diagonal:
        statements += [
            f"reach = Constant <value = float {{{float(diagonal // 2)}}}> ()",
            "offset = Sub (row, column)",
            "distance = Abs (offset)",
            "near = LessOrEqual (distance, reach)",
            f"near_gain = Cast <to = {onnx.TensorProto.FLOAT}> (near)",
            f"class_near = Add ({total}, near_gain)",
        ]
        total = "class_near"
    return _lines(*statements, f"class = Identity ({total})")


def _outside_chosen(approx_mode: str) -> str:
    if approx_mode == "sparse":
        return "outside = Identity (lowest)"
    return "outside = Where (excluded, lowest, coarse)"


def _round(name: str, source: str, element: int) -> str:
    if element == onnx.TensorProto.FLOAT:
        return f"{name} = Identity ({source})"
    return f"{name} = Cast <to = {element}> ({source})"
