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
_NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}


@dataclass(frozen=True)
class Layer:
    """One call of the operator. query, key, value: (B, N, H * D) of the model's dtype; mask: (B, N) bool; choice: its blocks.

    value is None where the graph was only asked for what selection needs.
    """

    query: npt.NDArray[Any]
    key: npt.NDArray[Any]
    value: npt.NDArray[Any] | None
    mask: npt.NDArray[np.bool_]
    choice: Choice


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
            self.layers.append(Layer(q, k, v, real, kernel_choice(q, k, real, attributes)))
            return func(*args, **(kwargs or {}))
        forced = None if self._forced is None else _selection(self._forced[len(self.layers)], query.device)
        context, used = reference.mra_attention(query, key, value, mask, attributes, selection=forced, return_selection=True)
        self.layers.append(Layer(q, k, v, real, Choice(used.chosen.cpu().numpy(), used.excluded.cpu().numpy())))
        return context


class DebugGraph:
    """A bundle's graph with each MraAttention's query, key and mask as outputs too, built in memory: up to 2 GB.

    function_choice: also the choice that the function body makes. A runtime that has its own MraAttention cannot give it; there it
    is asked of the compiled kernel, which is the same code.
    """

    def __init__(self, model: Path, attributes: Attributes, function_choice: bool) -> None:
        self._attributes = attributes
        self._function_choice = function_choice
        proto = onnx.load(model)
        if function_choice:
            for function in proto.functions:
                if (function.domain, function.name) == (OP_DOMAIN, OP_TYPE):
                    function.output.extend(_FUNCTION_CHOICE)
        present = {output.name for output in proto.graph.output}
        self._names: list[tuple[str, ...]] = []
        for node in proto.graph.node:
            if (node.domain, node.op_type) == (OP_DOMAIN, OP_TYPE):
                query, key, _, mask = node.input
                choice = [f"{node.output[0]}/{name}" for name in _FUNCTION_CHOICE] if function_choice else []
                node.output.extend(choice)
                self._names.append((query, key, mask, *choice))
                for name in (query, key, mask, *choice):
                    if name not in present:
                        proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
                        present.add(name)
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
            if choice_names:
                blocks = (*(outputs[name] for name in choice_names),)
                side = round(blocks[0].shape[-1] ** 0.5)
                choice = Choice(*(block.reshape(*block.shape[:2], side, side) for block in blocks))
            else:
                choice = kernel_choice(query, key, mask, self._attributes)
            found.append(Layer(query, key, None, mask, choice))
        return found


def kernel_choice(query: npt.NDArray[Any], key: npt.NDArray[Any], mask: npt.NDArray[np.bool_], attributes: Attributes) -> Choice:
    """What the compiled kernel chooses; without the library, what the formula chooses."""
    if kernel.available():
        chosen, excluded, _ = kernel.selection(query, key, mask, attributes)
        return Choice(chosen, excluded)
    return select(block_scores(query, key, mask, attributes), attributes.num_blocks)


def _to_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    return np.asarray(tensor.detach().float().cpu().numpy().astype(_NUMPY[tensor.dtype]))


def _selection(choice: Choice, device: torch.device) -> reference.Selection:
    chosen, excluded = (torch.from_numpy(array).to(device) for array in (choice.chosen, choice.excluded))
    nothing = torch.zeros(0, device=device)  # a forced choice has no scores
    return reference.Selection(chosen=chosen, excluded=excluded, score_class=nothing, score=nothing, margin=nothing)
