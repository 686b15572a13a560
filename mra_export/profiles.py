"""Optimisation profiles, the shapes an engine takes: from the command line to a profile, from a call's shape to its profile."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from mra_export.bundle import Bundle
from mra_export.errors import ContractError
from mra_export.plan import Profile

Shape = tuple[int, ...]
_SPEC = re.compile(r"([A-Za-z_][\w.]*):(\d+(?:x\d+)*)")
_BATCH, _CHOICES = 8, 4
_FUNCTION_BODY_LIMIT = 1 << 30
"""Bytes that one N x N tensor of the function body may take in a default profile."""


def make_profiles(
    bundle: Bundle, minimum: Sequence[str], optimum: Sequence[str], maximum: Sequence[str], plugin: bool
) -> list[Profile]:
    """Profiles from shapes such as "input_ids:1x512", the n-th of each kind for the n-th profile; every input gets the same shape.

    What is not given comes from the checkpoint: batch 1 to 8, lengths 1 to its longest, best for one row of the longest.
    Raises ContractError naming the option, its value and the fix.
    """
    given = {"min": minimum, "opt": optimum, "max": maximum}
    counts = {len(specs) for specs in given.values() if specs}
    if len(counts) > 1:
        raise ContractError(
            f"{', '.join(f'{len(specs)} --{kind}-shapes' for kind, specs in given.items())}: "
            "give each kind as often as there are profiles, or leave it out"
        )
    defaults = _defaults(bundle, plugin)
    profiles = []
    for index in range(counts.pop() if counts else 1):
        shapes = {kind: _parse(bundle, kind, specs[index]) for kind, specs in given.items() if specs}
        low, high = shapes.get("min"), shapes.get("max")
        if low is None:
            low = _smaller(defaults["min"], *shapes.values())
        if high is None:
            high = _larger(defaults["max"], *shapes.values())
        best = shapes.get("opt") or _smaller(_larger(defaults["opt"], low), high)
        if not _contains(low, high, best):
            raise ContractError(
                f"profile {index}: min {text(low)}, opt {text(best)}, max {text(high)}: no axis may shrink from one to the next"
            )
        shape = {"min": list(low), "opt": list(best), "max": list(high)}
        profiles.append({tensor.name: {kind: list(axes) for kind, axes in shape.items()} for tensor in bundle.manifest.inputs})
    return profiles


def pick(profiles: Sequence[Profile], shape: Shape) -> tuple[int, Shape]:
    """The profile for a call of this shape, and the shape to run: the same, or padded up to the profile's minimum.

    Of several that take it, the one with the least padding, then the one whose best shape is nearest. Raises ContractError naming
    all profiles where none takes it.
    """
    best: tuple[int, int, int, Shape] | None = None
    for index, profile in enumerate(profiles):
        low, optimum, high = (tuple(next(iter(profile.values()))[kind]) for kind in ("min", "opt", "max"))
        padded = _larger(low, shape)
        if not _contains(low, high, padded):
            continue
        candidate = (_volume(padded), abs(_volume(optimum) - _volume(shape)), index, padded)
        best = candidate if best is None else min(best, candidate)
    if best is None:
        raise ContractError(
            f"input_ids has shape {text(shape)}, the engine takes {describe(profiles)}: "
            "change the batch or the length, or build an engine with --max-shapes"
        )
    return best[2], best[3]


def pad(inputs: Mapping[str, npt.NDArray[np.int64]], shape: Shape) -> dict[str, npt.NDArray[np.int64]]:
    """Pad every input at the end of each axis with zeros: mask 0, so the operator ignores what was added."""
    padded = {}
    for name, array in inputs.items():
        if array.shape != shape:
            array = np.pad(array, [(0, wanted - had) for wanted, had in zip(shape, array.shape, strict=True)])
        padded[name] = array
    return padded


def describe(profiles: Sequence[Profile]) -> str:
    """Such as "1x1 to 8x512 (best 1x512)", for messages and tables."""
    shapes = [next(iter(profile.values())) for profile in profiles]
    return " or ".join(f"{text(shape['min'])} to {text(shape['max'])} (best {text(shape['opt'])})" for shape in shapes)


def text(shape: Sequence[int]) -> str:
    return "x".join(str(size) for size in shape)


def _defaults(bundle: Bundle, plugin: bool) -> dict[str, Shape]:
    model = bundle.manifest.model
    longest = model.max_position_embeddings
    choices = (_CHOICES,) if len(bundle.manifest.inputs[0].axes) == 3 else ()
    batch = _BATCH
    if not plugin:  # the function body forms (batch, heads, N, N) in float32
        per_row = model.num_attention_heads * longest * longest * 4 * (_CHOICES if choices else 1)
        batch = max(1, min(_BATCH, _FUNCTION_BODY_LIMIT // per_row))
    ones = (1,) * len(choices)
    return {"min": (1, *ones, 1), "opt": (1, *choices, longest), "max": (batch, *choices, longest)}


def _parse(bundle: Bundle, kind: str, spec: str) -> Shape:
    option = f"--{kind}-shapes {spec!r}"
    names = [tensor.name for tensor in bundle.manifest.inputs]
    rank = len(bundle.manifest.inputs[0].axes)
    example = "1x512" if rank == 2 else "1x4x512"
    shapes: list[Shape] = []
    for part in spec.split(","):
        match = _SPEC.fullmatch(part.strip())
        if match is None:
            raise ContractError(f"{option} is not NAME:SIZExSIZE: write it as input_ids:{example}")
        if match[1] not in names:
            raise ContractError(f"{option} names {match[1]}, the graph's inputs are {', '.join(names)}: write input_ids:{example}")
        shapes.append(tuple(int(size) for size in match[2].split("x")))
    shape = shapes[0]
    if any(other != shape for other in shapes):
        raise ContractError(f"{option} gives inputs different shapes: they all have the shape of input_ids")
    if len(shape) != rank:
        raise ContractError(f"{option} has {len(shape)} axes, the input {rank}: write it as input_ids:{example}")
    if min(shape) < 1:
        raise ContractError(f"{option} has an axis of 0: every axis must be 1 or more")
    longest = bundle.manifest.model.max_position_embeddings
    if shape[-1] > longest:
        raise ContractError(
            f"{option} has length {shape[-1]}, the model's max_position_embeddings is {longest}: use {longest} or less"
        )
    if max(shape) >= 1 << 31:
        raise ContractError(f"{option} has an axis of {max(shape)}: it must be below 2^31")
    return shape


def _smaller(*shapes: Shape) -> Shape:
    return tuple(min(sizes) for sizes in zip(*shapes, strict=True))


def _larger(*shapes: Shape) -> Shape:
    return tuple(max(sizes) for sizes in zip(*shapes, strict=True))


def _contains(low: Shape, high: Shape, shape: Shape) -> bool:
    return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))


def _volume(shape: Shape) -> int:
    return int(np.prod(shape, dtype=np.int64))
