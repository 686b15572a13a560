"""Does every runtime of a bundle agree with PyTorch? One report of parity rows for each, judged by contract.TOLERANCES.

The reference is the bundle's weights in PyTorch, float32, with the plain reference attention. What is compared:

golden     the outputs stored at export, each runtime with its own block selection
outputs    a sweep of inputs. The reference takes the blocks that the runtime chose, so that this row judges arithmetic only
selection  those blocks, judged by the reference's scores for all pairs: only near-ties may fall the other way
operator   one layer's real queries, keys and values through the operator alone, against its formula in float64, at a budget where
           every runtime must choose the same blocks
canary     changing one token changes the answer elsewhere: a graph that ignores attention would pass everything else
padding    padding-invariant bundles: a text alone and in a batch gives the same
accuracy   where held-out text is given: the share of masked tokens named right, beside PyTorch's (accuracy.py)
polygraphy the runtimes that share the graph (ONNX Runtime, TensorRT) with each other, by Polygraphy's comparator

A TensorRT engine does not show its layers: its outputs are compared with the reference's own choice of blocks.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mra_export import accuracy, polygraphy_compare
from mra_export.backends.onnx_runtime import cuda_available
from mra_export.backends.pytorch import TorchBackend
from mra_export.bundle import Bundle
from mra_export.cases import Case, Inputs, random_case, sweep, text_cases
from mra_export.contract import DTYPES, TOLERANCES, Attributes, float_dtype
from mra_export.errors import BackendError, ContractError, EngineError
from mra_export.parity import FAIL, PASS, SKIP, Row, judge, measure
from mra_export.probe import Layer, TorchProbe, possible_choices
from mra_export.report import Report
from mra_export.runtime import real_positions
from mra_export.selection import Choice, Overlap, block_scores, clear_budget, dense_attention, overlap
from mra_export.subjects import NAMES, Arrays, Subject, open_subject

Progress = Callable[[str], None]
_OPERATOR_LENGTH = 320
"""Tokens at most for the operator's rows: their oracle is dense."""
_USERS_RUN = ("onnxruntime", "tensorrt")
"""Whose accuracy is measured: the others are there for comparison, and slow."""
_CANARY_SHARE = 0.1
"""The canary's effect must be at least this share of what it is in the reference."""


def verify(
    bundle: Bundle,
    backends: Sequence[str] = (),
    *,
    seeds: int = 1,
    quick: bool = False,
    held_out: str | os.PathLike[str] | None = None,
    progress: Progress = lambda text: None,
) -> Report:
    """Compare runtimes with PyTorch. A case that fails is a row of the report, not an exception.

    backends: of subjects.NAMES. None named: all, and one that cannot run here is a skipped row that says why; a named one that
    cannot run raises BackendError. seeds: how many sets of random inputs. quick: four shapes, and no text.
    held_out: a text file or a folder of them, to measure a fill-mask model's accuracy on, in the runtimes that users run.
    """
    if seeds < 1:
        raise ContractError(f"seeds is {seeds}: it must be 1 or more")
    for name in backends:
        if name not in NAMES:
            raise BackendError(f"backend is {name!r}: use one of {', '.join(NAMES)}")
    started = time.monotonic()
    dtype = bundle.manifest.dtype
    progress(f"loading {bundle.path} in PyTorch, float32, as the reference")
    plan = _Plan(bundle, seeds, quick, held_out, progress)
    rows: list[Row] = []
    shared: list[str] = []  # runtimes that Polygraphy compares with each other
    golden = bundle.golden()[0]
    for name in backends or NAMES:
        if not backends and name == "tensorrt" and not bundle.manifest.engines:
            continue
        if not backends and name == "onnxruntime-cuda" and not cuda_available():
            continue
        if name == "torch-reference" and float_dtype(dtype) == "fp32" and not backends:
            rows.append(Row("outputs", name, "fp32", "all", "", SKIP, "this is the reference itself"))
            continue
        progress(f"{name}: loading")
        try:
            subject = open_subject(name, bundle)
        except (BackendError, EngineError) as error:
            if backends:
                raise
            rows.append(Row("outputs", name, dtype, "all", "", SKIP, str(error)))
            continue
        rows += _check(subject, plan, progress)
        if name in polygraphy_compare.OPTIONS:
            shared.append(name)
            golden = [batch for batch in golden if subject.cannot_run(Case("golden", batch)) is None]
        del subject
    if len(shared) > 1 and golden and not quick:
        progress(f"polygraphy: {', '.join(shared)} with each other")
        rows += polygraphy_compare.compare(bundle, shared, golden)
    return Report(bundle, rows, time.monotonic() - started)


class _Reference:
    """The bundle in PyTorch, float32, plain attention; optionally with the selection of another runtime."""

    def __init__(self, bundle: Bundle) -> None:
        manifest = bundle.manifest
        self.attributes = manifest.operator_attributes()
        self._model = TorchBackend(
            bundle.path, task=manifest.task, dtype="fp32", padding_invariant=manifest.padding_invariant, device="cpu"
        )

    def run(self, inputs: Inputs, forced: Sequence[Choice] | None = None) -> tuple[Arrays, list[Layer]]:
        with TorchProbe(reference=True, forced=forced) as probe:
            outputs = self._model.run(inputs)
        return {name: value.numpy() for name, value in outputs.items()}, probe.layers


class _Plan:
    """What every runtime is put through, and what PyTorch says to it."""

    def __init__(
        self, bundle: Bundle, seeds: int, quick: bool, held_out: str | os.PathLike[str] | None, progress: Progress
    ) -> None:
        self.reference = _Reference(bundle)
        self.cases = sweep(bundle, seeds, quick) + ([] if quick else text_cases(bundle))
        self.operator_cases = list(_operator_cases(bundle, self.reference))
        self.canaries = list(_canaries(bundle, self.reference))
        self.held_out = None if held_out is None else accuracy.HeldOut(bundle, held_out)
        if self.held_out is not None:
            progress(f"PyTorch's accuracy on {held_out}")
            self.named = self.held_out.named(lambda inputs: self.reference.run(inputs)[0])


def _check(subject: Subject, plan: _Plan, progress: Progress) -> Iterator[Row]:
    if subject.runtime is not None:
        progress(f"{subject.name}: golden outputs")
        yield from (dataclasses.replace(row, backend=subject.name) for row in subject.runtime.compare_golden())
    for case in plan.cases:
        progress(f"{subject.name}: {case.name}")
        too_much = subject.cannot_run(case)
        if too_much:
            yield Row("outputs", subject.name, subject.precision, case.name, "", SKIP, too_much)
        else:
            yield from _outputs_and_selection(subject, plan.reference, case)
    progress(f"{subject.name}: operator, canary, padding")
    if not subject.opaque:
        yield from (_operator(subject, operator_case) for operator_case in plan.operator_cases)
    yield from (_canary(subject, canary) for canary in plan.canaries)
    if subject.bundle.manifest.padding_invariant:
        yield from _padding(subject)
    if plan.held_out is not None and subject.name in _USERS_RUN:
        progress(f"{subject.name}: accuracy on {plan.held_out.text}")
        named = plan.held_out.named(subject.run)
        yield accuracy.judge(subject.name, subject.precision, plan.held_out.text, named, plan.named)


def _outputs_and_selection(subject: Subject, reference: _Reference, case: Case) -> Iterator[Row]:
    bundle, dtype = subject.bundle, subject.precision
    tolerance = TOLERANCES[dtype]
    actual, layers = subject.observe(case.inputs)
    differing = 0
    allowed = tolerance.model
    if subject.opaque:
        allowed = tolerance.model_free
        expected, _ = reference.run(case.inputs)
    elif len(layers) == bundle.manifest.model.num_hidden_layers:
        ways = (_follow(reference, case, choices) for choices in possible_choices(layers))
        expected, overlaps = min(ways, key=lambda way: _distance(bundle, case, actual, way[0]))
        differing = sum(layer.differing for layer in overlaps)
        yield _selection_row(subject, case, overlaps)
    else:
        expected, _ = reference.run(case.inputs)
        reason = f"{len(layers)} MraAttention nodes ran, the model has {bundle.manifest.model.num_hidden_layers} layers"
        yield Row("selection", subject.name, dtype, case.name, "", FAIL, reason)
    note = f"{differing} near-tied block pairs taken as this runtime chose them" if differing else ""
    for name in (tensor.name for tensor in bundle.manifest.outputs):
        if name not in actual:
            yield Row("outputs", subject.name, dtype, case.name, name, FAIL, "this output is missing")
            continue
        keep = real_positions(bundle, name, case.inputs)
        yield judge(
            "outputs",
            subject.name,
            dtype,
            case.name,
            name,
            actual[name],
            expected[name],
            allowed,
            keep=keep,
            free=subject.opaque,
            note=note,
        )


def _follow(reference: _Reference, case: Case, choices: Sequence[Choice]) -> tuple[Arrays, list[Overlap]]:
    """The reference's answer when it takes these blocks, and how far they are from those it would have taken."""
    expected, own = reference.run(case.inputs, forced=choices)
    attributes = reference.attributes
    overlaps = [
        overlap(block_scores(layer.query, layer.key, layer.mask, attributes), attributes.num_blocks, choice)
        for layer, choice in zip(own, choices, strict=True)
    ]
    return expected, overlaps


def _distance(bundle: Bundle, case: Case, actual: Arrays, expected: Arrays) -> float:
    names = [tensor.name for tensor in bundle.manifest.outputs if tensor.name in actual]
    if any(actual[name].shape != expected[name].shape for name in names):
        return float("inf")
    pairs = ((actual[name], expected[name], real_positions(bundle, name, case.inputs)) for name in names)
    return max((measure(*pair).smallest_tolerance for pair in pairs), default=float("inf"))


def _selection_row(subject: Subject, case: Case, overlaps: Sequence[Overlap]) -> Row:
    dtype = subject.precision
    limit = TOLERANCES[dtype].near_tie
    margin = max((layer.largest_margin for layer in overlaps), default=0.0)
    differing = sum(layer.differing for layer in overlaps)
    detail = {
        "overlap": min((layer.share for layer in overlaps), default=1.0),
        "differing": differing,
        "largest_margin": margin,
        "layers": [
            {
                "layer": index,
                "overlap": layer.share,
                "differing": layer.differing,
                "margins": sorted(map(float, layer.margins), reverse=True),
            }
            for index, layer in enumerate(overlaps)
        ],
    }
    # NaN compares false: a margin that is not a number fails.
    status = PASS if margin <= limit else FAIL
    reason = ""
    if differing:
        reason = f"{differing} block pairs differ, the widest by {margin:.1e} (near-tie: {limit:.0e})"
    return Row("selection", subject.name, dtype, case.name, "", status, reason, limit, None, margin, detail)


@dataclass(frozen=True)
class _OperatorCase:
    """One layer's real inputs in the bundle's dtype, widened to float32, and the formula's answer in float64."""

    name: str
    attributes: Attributes
    query: npt.NDArray[np.float32]
    key: npt.NDArray[np.float32]
    value: npt.NDArray[np.float32]
    mask: npt.NDArray[np.bool_]
    expected: npt.NDArray[np.float64]


def _operator_cases(bundle: Bundle, reference: _Reference) -> Iterator[_OperatorCase]:
    """The first and the last layer."""
    case = random_case(bundle, 2, min(bundle.manifest.model.max_position_embeddings * 2 // 3, _OPERATOR_LENGTH), seed=0)
    _, layers = reference.run(case.inputs)
    for index in sorted({0, len(layers) - 1}) if layers else []:
        layer = layers[index]
        assert layer.value is not None
        query, key, value = (_rounded(tensor, bundle.manifest.dtype) for tensor in (layer.query, layer.key, layer.value))
        budget, gap = clear_budget(block_scores(query, key, layer.mask, reference.attributes), reference.attributes.num_blocks)
        attributes = dataclasses.replace(reference.attributes, num_blocks=budget)
        name = f"layer {index}, {case.name}, K = {budget}, gap {gap:.0e}"
        expected = dense_attention(query, key, value, layer.mask, attributes)
        yield _OperatorCase(name, attributes, query, key, value, layer.mask, expected)


def _operator(subject: Subject, case: _OperatorCase) -> Row:
    dtype = subject.precision
    actual = subject.operator(case.attributes, case.query, case.key, case.value, case.mask)
    return judge(
        "operator", subject.name, dtype, case.name, "context", actual, case.expected, TOLERANCES[dtype].operator, keep=case.mask
    )


def _rounded(array: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.float32]:
    """Values of the operator's dtype, kept in float32."""
    if float_dtype(dtype) == "fp32":
        return array
    import ml_dtypes  # bfloat16 for numpy, which comes with onnx

    return array.astype(ml_dtypes.bfloat16 if dtype == "bf16" else np.dtype(DTYPES[dtype])).astype(np.float32)


@dataclass(frozen=True)
class _Canary:
    """Two inputs that differ where the output is not read, and how much the reference's output changes, at most."""

    output: str
    per_token: bool
    before: Inputs
    after: Inputs
    effect: float

    def measure(self, run: Callable[[Inputs], Arrays]) -> float:
        before, after = (np.asarray(run(inputs)[self.output]).astype(np.float64) for inputs in (self.before, self.after))
        difference = np.abs(after - before)
        return float((difference[:, 1:] if self.per_token else difference).max())


def _canaries(bundle: Bundle, reference: _Reference) -> Iterator[_Canary]:
    """For outputs per token: change token 0, look at the others. For outputs per text, read at token 0: change the others."""
    model = bundle.manifest.model
    case = random_case(bundle, 1, min(model.max_position_embeddings, 64), seed=0, ragged=False)
    for tensor in bundle.manifest.outputs:
        per_token = real_positions(bundle, tensor.name, case.inputs) is not None
        ids = case.inputs["input_ids"].copy()
        part = (..., slice(0, 1)) if per_token else (..., slice(1, None))
        ids[part] = (ids[part] + model.vocab_size // 2) % model.vocab_size
        canary = _Canary(tensor.name, per_token, case.inputs, {**case.inputs, "input_ids": ids}, 0.0)
        yield dataclasses.replace(canary, effect=canary.measure(lambda inputs: reference.run(inputs)[0]))


def _canary(subject: Subject, canary: _Canary) -> Row:
    dtype, wanted = subject.precision, canary.effect
    what = (
        "changing token 0 changes the others" if canary.per_token else "changing the other tokens changes what is read at token 0"
    )
    if wanted == 0:
        return Row("canary", subject.name, dtype, what, canary.output, SKIP, "the model itself does not change")
    too_much = subject.cannot_run(Case("canary", canary.before))
    if too_much:
        return Row("canary", subject.name, dtype, what, canary.output, SKIP, too_much)
    found = canary.measure(subject.run)
    detail = {"effect": found, "reference_effect": wanted}
    if found >= _CANARY_SHARE * wanted:
        return Row("canary", subject.name, dtype, what, canary.output, PASS, "", detail=detail)
    reason = f"it changes them by {found:.1e}, PyTorch by {wanted:.1e}: this graph ignores attention"
    return Row("canary", subject.name, dtype, what, canary.output, FAIL, reason, detail=detail)


def _padding(subject: Subject) -> Iterator[Row]:
    bundle, dtype = subject.bundle, subject.precision
    batch = random_case(bundle, 2, min(bundle.manifest.model.max_position_embeddings, 100), seed=0)
    row = {name: value[1:2] for name, value in batch.inputs.items()}
    length = int(row["attention_mask"].reshape(-1, row["attention_mask"].shape[-1])[0].sum())  # row 1 is padded at its end
    alone = {name: value[..., :length] for name, value in row.items()}
    too_much = subject.cannot_run(batch) or subject.cannot_run(Case("alone", alone))
    if too_much:
        yield Row("padding", subject.name, dtype, batch.name, "", SKIP, too_much)
        return
    together, single = subject.run(batch.inputs), subject.run(alone)
    for tensor in bundle.manifest.outputs:
        keep = real_positions(bundle, tensor.name, alone)
        actual = together[tensor.name][1:2]
        actual = actual[:, :length] if keep is not None else actual
        case = f"{length} tokens alone and in a batch of {batch.inputs['input_ids'].shape[-1]}"
        yield judge(
            "padding",
            subject.name,
            dtype,
            case,
            tensor.name,
            actual,
            single[tensor.name],
            TOLERANCES[dtype].model_free,
            keep=keep,
            free=True,
        )
