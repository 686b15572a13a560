"""Tables for people: what each command prints when it is not asked for JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from mra_export.profiles import describe

Shown = list[Any]


def shown(kind: str) -> Callable[[Any], Shown]:
    """The function that turns a command's answer into tables and lines. kind: a task's name, or a command's."""
    functions: dict[str, Callable[[Any], Shown]] = {
        "fill-mask": _fill_mask,
        "text-classification": lambda answers: [_scores(answer["text"], answer["labels"]) for answer in answers],
        "token-classification": lambda answers: [_tokens(answer) for answer in answers],
        "feature-extraction": _features,
        "question-answering": lambda answer: [
            f"{answer['answer']}  (characters {answer['start']} to {answer['end']}, {answer['score']:.1%})"
        ],
        "multiple-choice": lambda answer: [_scores(answer["text"], answer["choices"])],
        "outputs": lambda answer: [f"{name}: {value['dtype']} {tuple(value['shape'])}" for name, value in answer.items()],
        "inspect": _inspect,
        "doctor": _doctor,
    }
    return functions[kind]


def _fill_mask(answers: Any) -> Shown:
    tables: Shown = []
    for answer in answers:
        for number, candidates in enumerate(answer["masks"]):
            which = f", mask {number + 1}" if len(answer["masks"]) > 1 else ""
            table = _table("token", "probability")
            for candidate in candidates:
                table.add_row(repr(candidate["token"]), f"{candidate['score']:.1%}")
            tables.append(_titled(answer["text"] + which, table))
    return tables


def _scores(title: str, scores: list[dict[str, Any]]) -> Group:
    single = len(scores) == 1
    table = _table("label", "value" if single else "probability")
    for entry in scores:
        table.add_row(entry["label"], f"{entry['score']:.4f}" if single else f"{entry['score']:.1%}")
    return _titled(title, table)


def _tokens(answer: dict[str, Any]) -> Group:
    table = _table("token", "label", "probability")
    for token in answer["tokens"]:
        table.add_row(repr(token["token"]), token["label"], f"{token['score']:.1%}")
    return _titled(answer["text"], table)


def _features(answers: Any) -> Shown:
    lines: Shown = []
    for answer in answers:
        first = ", ".join(f"{value:.3f}" for value in answer["features"][0][:6])
        lines.append(f"{answer['text']}: {len(answer['features'])} tokens x {len(answer['features'][0])}, the first begins {first}")
    return [*lines, "Add --json for all numbers."]


def _inspect(facts: dict[str, Any]) -> Shown:
    model, graph = facts["model"], facts["graph"]
    overview = _facts()
    dimensions = f"{model['num_hidden_layers']} layers, {model['hidden_size']} wide, {model['num_attention_heads']} heads"
    rows = {
        "model": f"{model['architecture']}, {dimensions}, {model['vocab_size']} tokens, length {model['max_position_embeddings']}",
        "task": facts["task"],
        "dtype, opset": f"{facts['dtype']}, {facts['opset']}",
        **({"quantisation": _quantization(facts["quantization"])} if facts["quantization"] else {}),
        "inputs": "; ".join(_tensor(tensor) for tensor in graph["inputs"]),
        "outputs": "; ".join(_tensor(tensor) for tensor in graph["outputs"]),
        "operator": ", ".join(f"{name} {value}" for name, value in facts["attributes"].items()),
        "graph": f"{graph['nodes']} nodes, {graph['attention_nodes']} of them mra.MraAttention",
        "functions": ", ".join(f"{name} ({count} nodes)" for name, count in graph["functions"].items()) or "none",
        "parity at export": _parity(facts["parity"]),
        "made with": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        "source": facts["source"],
    }
    for name, value in rows.items():
        overview.add_row(name, str(value))
    ops = _table("op", "nodes")
    for name, count in graph["ops"].items():
        ops.add_row(name, str(count))
    files = _table("name", "bytes", "sha256")
    for name, entry in facts["files"].items():
        files.add_row(name, str(entry["size"]), entry["sha256"][:16])
    tables: Shown = [_titled(facts["path"], overview), _titled("operators", ops), _titled("files", files)]
    if facts["engines"]:
        tables.append(_titled("engines", _engines(facts["engines"])))
    return tables


def _quantization(facts: dict[str, Any]) -> str:
    calibration = facts["calibration"]
    how = f"{facts['method']}, {len(facts['quantized'])} matrix products: "
    how += f"weights {facts['weights']}; activations {facts['activations']}"
    if facts["kept"]:
        how += f"; in float32: {', '.join(facts['kept'])}"
    if calibration:
        how += f"; calibrated with {calibration['windows']} pieces ({calibration['tokens']} tokens) of {calibration['text']}"
    return how


def _engines(engines: list[dict[str, Any]]) -> Table:
    table = _table("file", "builder", "dtype", "plugin layers", "plugin", "GPUs", "shapes", "options")
    for engine in engines:
        plugin = engine["plugin"]
        table.add_row(
            engine["file"],
            f"{engine['backend']} {engine['builder']}",
            engine["dtype"],
            str(engine["plugin_layers"]),
            f"version {plugin['version']}, {'inside the plan' if plugin['embedded'] else plugin['library']}" if plugin else "none",
            ", ".join(engine["compute_capabilities"]),
            describe(engine["profiles"]),
            ", ".join(f"{name} {value}" for name, value in engine["options"].items()) or "defaults",
        )
    return table


def _parity(counts: dict[str, int] | None) -> str:
    if counts is None:
        return "not checked"
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def _tensor(tensor: dict[str, Any]) -> str:
    return f"{tensor['name']} {tensor['dtype']} ({', '.join(str(axis) for axis in tensor['axes'])})"


def _doctor(facts: dict[str, Any]) -> Shown:
    here = _facts()
    for name, version in facts["versions"].items():
        here.add_row(name, version)
    cpu = facts["cpu"]
    here.add_row("processor", f"{cpu['model']}, {cpu['cpus']} CPUs, {' '.join(cpu['features'])}")
    here.add_row("int8 products", cpu["int8"])
    for gpu in facts["gpu"]:
        here.add_row("GPU", ", ".join(gpu.values()))
    if not facts["gpu"]:
        here.add_row("GPU", "none found")
    for name, path in facts["libraries"].items():
        here.add_row(f"library {name}", path or "not built")
    for part, reason in facts["left_out"].items():
        here.add_row(f"built without {part}", reason)
    for name, path in facts["embedding"].items():
        here.add_row(name, path or "none found")
    things: Shown = [_titled("this installation", here)]
    if facts["missing"]:
        missing = _table("what", "needed for", "how to get it")
        for entry in facts["missing"]:
            missing.add_row(entry["name"] + (" (optional)" if entry["optional"] else ""), entry["needed_for"], entry["command"])
        things.append(_titled("missing", missing))
    else:
        things.append("Nothing is missing.")
    things += [f"problem: {problem}" for problem in facts["problems"]]
    return things


def _table(*columns: str) -> Table:
    table = Table(highlight=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _facts() -> Table:
    """Name and value, without a header."""
    table = _table("", "")
    table.show_header = False
    return table


def _titled(title: str, table: Table) -> Group:
    """A title of any length: a table's own is wrapped to the table's width."""
    return Group(Text(title, style="bold"), table)
