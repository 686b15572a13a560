"""Look inside a running model: what each MraAttention was given and which blocks it chose, in PyTorch and in ONNX."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx.helper
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mra_export import kernel
from mra_export.contract import OP_DOMAIN, OP_TYPE, Attributes
from mra_export.model import attention as reference
from mra_export.selection import Choice, block_scores, select

_TORCH_OP = torch.ops.mra.attention.default
_FUNCTION_CHOICE = ("chosen_flat", "excluded_flat")
"""Where onnx_function.py keeps its choice: (B, H, nb * nb) bool each."""
_NUMPY_NAMES = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
_NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}


@dataclass(frozen=True)
class Layer:
    """One call of the operator. query, key, value: (B, N, H * D); mask: (B, N) bool.

    value is None where the graph was only asked for what selection needs. choices: the blocks it chose; two possibilities where it
    cannot be seen whether the runtime rounded query and key to the model's 16 bits.
    """

    query: npt.NDArray[Any]
    key: npt.NDArray[Any]
    value: npt.NDArray[Any] | None
    mask: npt.NDArray[np.bool_]
    choices: tuple[Choice, ...]


def possible_choices(layers: Sequence[Layer]) -> list[list[Choice]]:
    """Each way in which the whole model may have chosen its blocks, without repetitions: one choice per layer."""
    ways: list[list[Choice]] = []
    for index in range(max((len(layer.choices) for layer in layers), default=1)):
        way = [layer.choices[min(index, len(layer.choices) - 1)] for layer in layers]
        if not any(_same(way, known) for known in ways):
            ways.append(way)
    return ways


class TorchProbe(TorchDispatchMode):  # type: ignore[misc, no-untyped-call]
    """While active, records each call of mra::attention; on request, answers it with the reference instead.

    reference: run attention in plain torch. forced: one choice per layer, which the reference then uses (implies reference).
    """

    def __init__(self, *, reference: bool = False, forced: Sequence[Choice] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers: list[Layer] = []
        self._reference = reference or forced is not None
        self._forced = forced

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not _TORCH_OP:
            return func(*args, **(kwargs or {}))
        query, key, value, mask, *rest = args
        attributes = Attributes(*rest, **(kwargs or {}))
        q, k, v = (_to_numpy(tensor) for tensor in (query, key, value))
        real = (mask != 0).cpu().numpy()
        if not self._reference:
            self.layers.append(Layer(q, k, v, real, (kernel_choice(q, k, real, attributes),)))
            return func(*args, **(kwargs or {}))
        forced = None if self._forced is None else _selection(self._forced[len(self.layers)], query.device)
        context, used = reference.mra_attention(query, key, value, mask, attributes, selection=forced, return_selection=True)
        self.layers.append(Layer(q, k, v, real, (Choice(used.chosen.cpu().numpy(), used.excluded.cpu().numpy()),)))
        return context


class DebugGraph:
    """A bundle's graph with each MraAttention's query, key and mask as outputs too, built in memory: up to 2 GB.

    function_choice: also the choice that the function body makes. A runtime that has its own MraAttention cannot give it; there it
    is asked of the compiled kernel, which is the same code. Such a runtime may keep 16-bit tensors as float32 up to the operator,
    as ONNX Runtime does on a CPU: query and key leave the graph through a cast to float32, which shows them unrounded then.
    """

    def __init__(self, model: Path, attributes: Attributes, dtype: str, function_choice: bool) -> None:
        self._attributes = attributes
        self._rounded = np.dtype(_NUMPY_NAMES[dtype])
        proto = onnx.load(model)
        if function_choice:
            for function in proto.functions:
                if (function.domain, function.name) == (OP_DOMAIN, OP_TYPE):
                    function.output.extend(_FUNCTION_CHOICE)
        self._names: list[tuple[str, ...]] = []
        outputs: dict[str, None] = {}
        for node in [node for node in proto.graph.node if (node.domain, node.op_type) == (OP_DOMAIN, OP_TYPE)]:
            query, key, _, mask = node.input
            seen = [query, key]
            if not function_choice and dtype != "fp32":
                seen = [f"{name}/float32" for name in seen]
                casts = (
                    onnx.helper.make_node("Cast", [name], [f"{name}/float32"], to=onnx.TensorProto.FLOAT) for name in (query, key)
                )
                proto.graph.node.extend(casts)
            choice = [f"{node.output[0]}/{name}" for name in _FUNCTION_CHOICE] if function_choice else []
            node.output.extend(choice)
            self._names.append((*seen, mask, *choice))
            outputs.update(dict.fromkeys(self._names[-1]))
        present = {output.name for output in proto.graph.output}
        proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in outputs if name not in present)
        self._proto: onnx.ModelProto | None = proto

    def take(self) -> bytes:
        """The graph, serialised; once: it is as large as the model."""
        assert self._proto is not None
        proto, self._proto = self._proto, None
        return bytes(proto.SerializeToString())

    def layers(self, outputs: Mapping[str, npt.NDArray[Any]]) -> list[Layer]:
        """Pick the layers out of this graph's outputs."""
        found = []
        for query_name, key_name, mask_name, *choice_names in self._names:
            query, key, mask = outputs[query_name], outputs[key_name], outputs[mask_name] != 0
            choices: tuple[Choice, ...]
            if choice_names:
                blocks = [outputs[name] for name in choice_names]
                side = round(blocks[0].shape[-1] ** 0.5)
                choices = (Choice(*(block.reshape(*block.shape[:2], side, side) for block in blocks)),)
            else:
                kept, rounded = kernel_choice(query, key, mask, self._attributes), None
                if query.dtype != self._rounded:
                    rounded = kernel_choice(query.astype(self._rounded), key.astype(self._rounded), mask, self._attributes)
                choices = (kept,) if rounded is None else (kept, rounded)
            found.append(Layer(query, key, None, mask, choices))
        return found


def kernel_choice(query: npt.NDArray[Any], key: npt.NDArray[Any], mask: npt.NDArray[np.bool_], attributes: Attributes) -> Choice:
    """What the compiled kernel chooses; without the library, what the formula chooses."""
    if kernel.available():
        chosen, excluded, _ = kernel.selection(query, key, mask, attributes)
        return Choice(chosen, excluded)
    return select(block_scores(query, key, mask, attributes), attributes.num_blocks)


def _same(way: Sequence[Choice], other: Sequence[Choice]) -> bool:
    return all(
        np.array_equal(a.chosen, b.chosen) and np.array_equal(a.excluded, b.excluded) for a, b in zip(way, other, strict=True)
    )


def _to_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    return np.asarray(tensor.detach().float().cpu().numpy().astype(_NUMPY[tensor.dtype]))


def _selection(choice: Choice, device: torch.device) -> reference.Selection:
    chosen, excluded = (torch.from_numpy(array).to(device) for array in (choice.chosen, choice.excluded))
    nothing = torch.zeros(0, device=device)  # a forced choice has no scores
    return reference.Selection(chosen=chosen, excluded=excluded, score_class=nothing, score=nothing, margin=nothing)
