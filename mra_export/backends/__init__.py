"""One module per library that can run a bundle. `runtime.py` chooses; nothing else imports these but `verify.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt


class Backend(Protocol):
    """What `MraRuntime` needs of a backend. `run` may be called from several threads at once."""

    name: str
    device: str

    def run(self, inputs: Mapping[str, npt.NDArray[np.int64]]) -> dict[str, Any]:
        """The graph's inputs, checked (inputs.py) -> its outputs by name, as numpy arrays or torch tensors."""
        ...


@runtime_checkable
class TokenBackend(Backend, Protocol):
    """A backend that computes outputs with an entry per token for chosen tokens only."""

    def run_tokens(self, inputs: Mapping[str, npt.NDArray[np.int64]], tokens: npt.NDArray[np.int64]) -> dict[str, Any]:
        """tokens: (chosen,), numbers in (batch, length) counted through -> outputs of (chosen, ...)."""
        ...


@runtime_checkable
class CudaBackend(Backend, Protocol):
    """A backend that also takes torch CUDA tensors as they are, and not every shape."""

    def run_cuda(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The graph's inputs as int64 CUDA tensors, checked -> its outputs as CUDA tensors, on torch's current stream."""
        ...

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """Why inputs of this shape are not taken, or None."""
        ...
