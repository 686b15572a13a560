"""Look inside a running model: the query, key, value and mask of every MraAttention, in PyTorch and in ONNX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.helper
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mra_export.contract import OP_DOMAIN, OP_TYPE, Attributes
from mra_export.model import attention as reference
from mra_export.selection import Selection, block_scores, select

_TORCH_OP = torch.ops.mra.attention.default


@dataclass(frozen=True)
class LayerInputs:
    """What one layer's operator was given. query, key, value: (B, N, H * D) float32 (16-bit values widened); mask: (B, N) bool.

    value is None where the graph was only asked for what selection needs.
    """

    query: npt.NDArray[np.float32]
    key: npt.NDArray[np.float32]
    value: npt.NDArray[np.float32] | None
    mask: npt.NDArray[np.bool_]

    def selection(self, attributes: Attributes) -> Selection:
        """The blocks the operator chooses from these inputs."""
        return select(block_scores(self.query, self.key, self.mask, attributes), attributes.num_blocks)


class TorchProbe(TorchDispatchMode):  # type: ignore[misc, no-untyped-call]
    """While active, records each call of mra::attention; on request, answers it with the reference instead.

    reference: run attention in plain torch. forced: one selection per layer, which the reference then uses (implies reference).
    """

    def __init__(self, *, reference: bool = False, forced: Sequence[Selection] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers: list[LayerInputs] = []
        self._reference = reference or forced is not None
        self._forced = forced

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not _TORCH_OP:
            return func(*args, **(kwargs or {}))
        query, key, value, mask, *rest = args
        forced = self._forced[len(self.layers)] if self._forced is not None else None
        self.layers.append(LayerInputs(_widened(query), _widened(key), _widened(value), (mask != 0).cpu().numpy()))
        if not self._reference:
            return func(*args, **(kwargs or {}))
        attributes = Attributes(*rest, **(kwargs or {}))
        return reference.mra_attention(
            query, key, value, mask, attributes, selection=None if forced is None else _torch_selection(forced, query.device)
        )


def debug_graph(model: Path) -> tuple[bytes, list[tuple[str, str, str]]]:
    """The graph with each MraAttention's query, key and mask as outputs too, and their names by layer. In memory: up to 2 GB."""
    proto = onnx.load(model)
    present = {output.name for output in proto.graph.output}
    names = []
    for node in proto.graph.node:
        if node.domain == OP_DOMAIN and node.op_type == OP_TYPE:
            query, key, _, mask = node.input
            names.append((query, key, mask))
            for name in (query, key, mask):
                if name not in present:
                    proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
                    present.add(name)
    return proto.SerializeToString(), names


def layers_of(outputs: dict[str, npt.NDArray[Any]], names: Sequence[tuple[str, str, str]]) -> list[LayerInputs]:
    """Pick the layers out of a debug graph's outputs."""
    return [
        LayerInputs(outputs[query].astype(np.float32), outputs[key].astype(np.float32), None, outputs[mask] != 0)
        for query, key, mask in names
    ]


def _widened(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
    return np.asarray(tensor.detach().float().cpu().numpy())


def _torch_selection(selection: Selection, device: torch.device) -> reference.Selection:
    chosen, excluded = (torch.from_numpy(array).to(device) for array in (selection.chosen, selection.excluded))
    nothing = torch.zeros(0, device=device)  # scores are what selection is made of: a forced one has none
    return reference.Selection(chosen=chosen, excluded=excluded, score_class=nothing, score=nothing, margin=nothing)
