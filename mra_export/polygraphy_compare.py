"""A second opinion: Polygraphy runs a bundle's runtimes on the golden inputs and compares them with each other.

`verify` compares each runtime with PyTorch and knows about blocks and near-ties. Polygraphy knows nothing of MRA and shares no code
with it; it must find nothing, with the tolerance for runtimes that choose their blocks freely.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from mra_export.bundle import Bundle
from mra_export.contract import TOLERANCES
from mra_export.golden_file import Arrays
from mra_export.parity import FAIL, FREE_SHARE, PASS, SKIP, Row
from mra_export.runtime import MraRuntime, real_positions

CHECK = "polygraphy"
OPTIONS: dict[str, dict[str, Any]] = {
    "onnxruntime": {"backend": "onnxruntime"},
    "onnxruntime-function": {"backend": "onnxruntime", "use_op_library": False},
    "tensorrt": {"backend": "tensorrt"},
}
"""Name of a runtime, as verify's -> the arguments of MraRuntime.load."""


def compare(bundle: Bundle, names: Sequence[str], inputs: Iterable[Arrays]) -> list[Row]:
    """One row for each pair of neighbours in `names` (of OPTIONS), batch and output."""
    dtype = bundle.manifest.dtype
    if find_spec("polygraphy") is None:
        return [Row(CHECK, names[0], dtype, "all", "", SKIP, "polygraphy is not installed: pip install polygraphy")]
    from polygraphy.comparator import Comparator, SimpleCompareFunc
    from polygraphy.logger import G_LOGGER

    tolerance = TOLERANCES[dtype].model_free
    batches = list(inputs)
    # Each runtime chose its blocks freely: in 16 bits, where near-ties are common, the share of the golden rows is judged.
    values = {"check_error_stat": "elemwise"} if dtype == "fp32" else {"check_error_stat": "quantile", "error_quantile": FREE_SHARE}
    compare_values = SimpleCompareFunc(atol=tolerance, rtol=tolerance, infinities_compare_equal=False, **values)
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        results = Comparator.run([runner(bundle, name, blank_padding=True) for name in names], data_loader=batches)
        (accuracy,) = Comparator.compare_accuracy(results, compare_func=compare_values)
    rows = []
    for (name, other), compared in accuracy.items():
        for batch, outputs in zip(batches, compared, strict=True):
            case = f"golden {'x'.join(str(size) for size in batch['input_ids'].shape)}, against {other}"
            for output, result in outputs.items():
                detail = {"max_abs": result.max_absdiff, "mean_abs": result.mean_absdiff}
                reason = "" if result else f"differs from {other} by up to {result.max_absdiff:.1e}"
                rows.append(Row(CHECK, name, dtype, case, output, PASS if result else FAIL, reason, tolerance, detail=detail))
    return rows


def runner(bundle: Bundle, name: str, blank_padding: bool = False) -> Any:
    """A Polygraphy runner over MraRuntime, so that what users run is what is compared.

    name: of OPTIONS. blank_padding: give 0 where padding stands, because what a model says there means nothing.
    """
    from polygraphy.backend.base import BaseRunner
    from polygraphy.common import TensorMetadata

    class MraRunner(BaseRunner):  # type: ignore[misc]
        def activate_impl(self) -> None:
            self.runtime = MraRuntime.load(bundle, **OPTIONS[name])

        def get_input_metadata_impl(self) -> Any:
            metadata = TensorMetadata()
            for tensor in bundle.manifest.inputs:
                metadata.add(tensor.name, np.int64, [None if isinstance(axis, str) else axis for axis in tensor.axes])
            return metadata

        def infer_impl(self, feed: Arrays) -> Arrays:
            start = time.perf_counter()
            outputs = self.runtime.run(**feed)
            self.inference_time = time.perf_counter() - start
            for output, array in outputs.items():
                keep = real_positions(bundle, output, feed) if blank_padding else None
                if keep is not None:
                    outputs[output] = np.where(keep.reshape(keep.shape + (1,) * (array.ndim - keep.ndim)), array, 0)
            return outputs

        def deactivate_impl(self) -> None:
            self.runtime.close()

    return MraRunner(name)
