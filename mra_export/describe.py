"""What is in a bundle: the facts behind `mra-export inspect`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import onnx

from mra_export.bundle import MODEL, Bundle
from mra_export.contract import OP_DOMAIN, OP_TYPE
from mra_export.plan import entries


def describe(bundle: Bundle) -> dict[str, Any]:
    """JSON-ready: model, task, dtype, opset, attributes, graph (inputs, outputs, nodes, ops, functions), files, engines,
    quantization, parity."""
    manifest = bundle.manifest
    graph = onnx.load(bundle.file(MODEL), load_external_data=False)
    ops = Counter(f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in graph.graph.node)
    rows = manifest.parity
    return {
        "path": str(bundle.path.resolve()),
        "model": manifest.model.model_dump(),
        "task": manifest.task,
        "dtype": manifest.dtype,
        "opset": manifest.opset,
        "padding_invariant": manifest.padding_invariant,
        "attributes": dict(manifest.attributes),
        "graph": {
            "inputs": [tensor.model_dump() for tensor in manifest.inputs],
            "outputs": [tensor.model_dump() for tensor in manifest.outputs],
            "nodes": sum(ops.values()),
            "attention_nodes": ops[f"{OP_DOMAIN}.{OP_TYPE}"],
            "ops": dict(ops.most_common()),
            "functions": {f"{f.domain}.{f.name}": len(f.node) for f in graph.functions},
        },
        "files": {name: entry.model_dump() for name, entry in sorted(manifest.files.items())},
        "engines": [entry.model_dump() for entry in entries(bundle)],
        "quantization": None if manifest.quantization is None else manifest.quantization.model_dump(),
        "parity": None if rows is None else dict(Counter(str(row.get("status")) for row in rows)),
        "versions": dict(manifest.versions),
        "source": manifest.source,
        "contract_version": manifest.contract_version,
        "schema_version": manifest.schema_version,
    }
