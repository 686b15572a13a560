"""PyTorch: the bundle's weights in this package's own model. The reference every other backend is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mra_export.bundle import WEIGHTS
from mra_export.contract import DTYPES
from mra_export.errors import BackendError


class TorchBackend:
    """The bundle's model on a CPU or GPU, in the bundle's dtype unless another is asked for.

    reference: bypass the compiled operator and run attention in plain torch.
    Raises BackendError where the device or the weights are not there.
    """

    name = "torch"

    def __init__(
        self, folder: Path, *, task: str, dtype: str, padding_invariant: bool, device: str = "cpu", reference: bool = False
    ) -> None:
        from mra_export.checkpoint import no_progress_bars
        from mra_export.model import load

        check_device(device)
        if not (folder / WEIGHTS).is_file():
            raise BackendError(
                f"{folder} holds no {WEIGHTS}, which the torch backend and verify need: export it again without --no-weights. "
                "Other backends run it, and MraRuntime.validate() compares them with the PyTorch outputs that it holds"
            )
        self.device = device
        self._device = torch.device(device)
        with no_progress_bars():
            model = load(str(folder), task=task, dtype=getattr(torch, DTYPES[dtype]))
        model.set_padding_invariant(padding_invariant)
        model.set_reference_attention(reference)
        self.model = model.eval().to(self._device)

    def run(self, inputs: Mapping[str, npt.NDArray[np.int64]]) -> dict[str, Any]:
        tensors = {name: torch.from_numpy(value).to(self._device) for name, value in inputs.items()}
        with torch.inference_mode():
            outputs = self.model(**tensors, return_dict=True)
        return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def check_device(device: str) -> None:
    """Raises BackendError saying why a GPU cannot be used."""
    if device == "cuda" and not torch.cuda.is_available():
        why = "was built without CUDA" if torch.version.cuda is None else "finds no usable NVIDIA GPU or driver"
        raise BackendError(f"device is 'cuda', but torch {torch.__version__} {why}: use device 'cpu'")
