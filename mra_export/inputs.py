"""What a runtime accepts: checks names, types, shapes and values before any work, and fills in what may be left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mra_export.errors import ContractError

if TYPE_CHECKING:
    import torch

Integers = npt.NDArray[np.int64]
_NAMES = ("input_ids", "attention_mask", "token_type_ids")
_AXES = {2: "(batch, length)", 3: "(batch, choices, length)"}


@dataclass(frozen=True)
class InputSpec:
    """A model's inputs.

    names: the graph's inputs, in its order: input_ids, attention_mask, and token_type_ids where type_vocab_size > 1.
    rank: 2 for (batch, length), 3 for multiple choice's (batch, choices, length).
    """

    names: tuple[str, ...]
    rank: int
    vocab_size: int
    type_vocab_size: int
    max_length: int

    def prepare(self, arrays: Mapping[str, Any]) -> dict[str, Integers]:
        """numpy arrays or torch tensors of any integer type -> contiguous int64 numpy arrays, one per graph input.

        A mask that is left out is all ones, token_type_ids all zeros; any mask value other than 0 counts as 1.
        Raises ContractError naming the input, its value and the fix.
        """
        _check_names(arrays)
        given = {name: _integers(name, value) for name, value in arrays.items() if value is not None}
        self._check_shapes(given)
        ids, mask, types = (given.get(name) for name in _NAMES)
        assert ids is not None
        _check_range("input_ids", int(ids.min()), int(ids.max()), self.vocab_size, "vocab_size")
        if types is not None:
            _check_range("token_type_ids", int(types.min()), int(types.max()), self.type_vocab_size, "type_vocab_size")
        prepared = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids) if mask is None else (mask != 0).astype(np.int64),
            "token_type_ids": np.zeros_like(ids) if types is None else types,
        }
        return {name: np.ascontiguousarray(prepared[name]) for name in self.names}

    def prepare_tensors(self, tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """As `prepare`, for torch tensors that stay on their device: contiguous int64 tensors there.

        The values are checked where they are, which waits for them once. Raises ContractError, also for inputs on several devices.
        """
        import torch

        _check_names(tensors)
        given = {name: value for name, value in tensors.items() if value is not None}
        for name, value in given.items():
            _check_tensor(name, value)
        self._check_shapes(given)
        ids = given["input_ids"]
        for name, value in given.items():
            if value.device != ids.device:
                raise ContractError(f"{name} is on {value.device}, input_ids on {ids.device}: pass all inputs on one device")
        given = {name: value.to(torch.int64) for name, value in given.items() if name != "attention_mask"}
        limits = {"input_ids": (self.vocab_size, "vocab_size"), "token_type_ids": (self.type_vocab_size, "type_vocab_size")}
        for name, value in given.items():
            low, high = torch.stack(torch.aminmax(value)).tolist()
            _check_range(name, low, high, *limits[name])
        ids, mask = given["input_ids"], tensors.get("attention_mask")
        prepared = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids) if mask is None else (mask != 0).to(torch.int64),
            "token_type_ids": given.get("token_type_ids", torch.zeros_like(ids)),
        }
        return {name: prepared[name].contiguous() for name in self.names}

    def _check_shapes(self, given: Mapping[str, Any]) -> None:
        """given: arrays or tensors."""
        if "input_ids" not in given:
            raise ContractError("input_ids is missing: pass token ids of shape " + _AXES[self.rank])
        shape = tuple(given["input_ids"].shape)
        if len(shape) != self.rank:
            raise ContractError(f"input_ids has shape {shape}: pass {self.rank} axes, {_AXES[self.rank]}")
        if 0 in shape:
            raise ContractError(f"input_ids has shape {shape}: every axis must be 1 or more")
        if shape[-1] > self.max_length:
            raise ContractError(
                f"input_ids has length {shape[-1]}, the model's max_position_embeddings is {self.max_length}: "
                f"cut the input to {self.max_length} tokens or fewer"
            )
        for name, value in given.items():
            if tuple(value.shape) != shape:
                what = "a mask" if name == "attention_mask" else name
                raise ContractError(f"{name} has shape {tuple(value.shape)}, input_ids {shape}: pass {what} of the same shape")


def check_tokens(tokens: Any, shape: tuple[int, ...]) -> Integers:
    """Token numbers as `MraRuntime.run` takes them -> the same, int64. Raises ContractError."""
    numbers = np.asarray(tokens)
    count = int(np.prod(shape))
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu" or not numbers.size:
        raise ContractError(f"tokens has shape {numbers.shape} and dtype {numbers.dtype}: pass one axis of integers, at least one")
    if numbers.min() < 0 or numbers.max() >= count:
        wrong = numbers.min() if numbers.min() < 0 else numbers.max()
        raise ContractError(f"tokens holds {wrong}, input_ids of shape {shape} has {count}: pass numbers from 0 to {count - 1}")
    return numbers.astype(np.int64)


def stacked(requests: Sequence[Mapping[str, Integers]]) -> dict[str, Integers]:
    """Inputs of several requests, (rows, length) or (rows, choices, length) each -> their rows below each other, padded at the end
    with masked tokens to the longest.
    """
    if len(requests) == 1:
        return dict(requests[0])
    longest = max(request["input_ids"].shape[-1] for request in requests)
    merged = {}
    for name, first in requests[0].items():
        rows = sum(len(request[name]) for request in requests)
        merged[name] = np.zeros((rows, *first.shape[1:-1], longest), dtype=np.int64)
        row = 0
        for request in requests:
            own = request[name]
            merged[name][row : row + len(own), ..., : own.shape[-1]] = own
            row += len(own)
    return merged


def is_torch(value: Any) -> bool:
    """True for a torch tensor, without importing torch."""
    return type(value).__module__.split(".")[0] == "torch" and hasattr(value, "detach")


def like(outputs: Mapping[str, Any], example: Any) -> dict[str, Any]:
    """Give outputs, numpy or torch, the kind of `example`: torch in, torch out on its device; numpy in, numpy out.

    numpy has no bfloat16, so bfloat16 tensors become float32 arrays, without loss.
    """
    if is_torch(example):
        import torch

        return {name: torch.as_tensor(value).to(example.device) for name, value in outputs.items()}
    return {name: _to_numpy(value) if is_torch(value) else value for name, value in outputs.items()}


def _to_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    tensor = tensor.detach().cpu()
    return np.asarray((tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy())


def _check_names(arrays: Mapping[str, Any]) -> None:
    for name in arrays:
        if name not in _NAMES:
            raise ContractError(f"{name} is not an input of this model: pass {', '.join(_NAMES)}")


def _check_tensor(name: str, value: Any) -> None:
    if not is_torch(value):
        raise ContractError(f"{name} is a {type(value).__name__}, input_ids a torch tensor: pass a torch tensor")
    if value.dtype.is_floating_point or value.dtype.is_complex:
        raise ContractError(f"{name} has dtype {value.dtype}: pass integers")


def _integers(name: str, value: Any) -> Integers:
    if is_torch(value):
        _check_tensor(name, value)
        value = value.detach().cpu().numpy()
    if not isinstance(value, np.ndarray):
        raise ContractError(f"{name} is a {type(value).__name__}: pass a numpy array or a torch tensor")
    if value.dtype.kind not in "iub":
        raise ContractError(f"{name} has dtype {value.dtype}: pass integers")
    if value.dtype == np.uint64 and value.size and value.max() > np.iinfo(np.int64).max:
        raise ContractError(f"{name} holds {value.max()}: it must fit into int64")
    return value.astype(np.int64)


def _check_range(name: str, low: int, high: int, limit: int, limit_name: str) -> None:
    if low < 0 or high >= limit:
        raise ContractError(
            f"{name} holds {low if low < 0 else high}, the model's {limit_name} is {limit}: pass values from 0 to {limit - 1}"
        )
