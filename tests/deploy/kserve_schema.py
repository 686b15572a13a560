"""KServe's own description of its resources, read from the source of its Python models: importing them needs all of KServe."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any, NamedTuple

_PLAIN = {"str": str, "int": int, "bool": bool, "float": (int, float), "object": object}


class _Model(NamedTuple):
    """types: type by JSON key. required: JSON keys."""

    types: dict[str, str]
    required: set[str]


class KServe:
    """folder: where the package is installed. definitions: Kubernetes' own, by name."""

    def __init__(self, folder: Path, definitions: dict[str, Any]) -> None:
        self._models = {}
        for file in (folder / "kserve" / "models").glob("*.py"):
            text = file.read_text()
            for node in ast.parse(text).body:
                if isinstance(node, ast.ClassDef):
                    self._models[node.name] = _read(node, text)
        self._kubernetes = {name.rsplit(".", 1)[1]: name for name in definitions if name.startswith("io.k8s.api.core.v1.")}

    def problems(self, value: Any, kind: str, check_kubernetes: Any, path: str = "") -> list[str]:
        """What in `value` is not of this kind. check_kubernetes(definition, value) -> messages, for what is Kubernetes' own."""
        if kind.startswith("list["):
            if not isinstance(value, list):
                return [f"{path} is no list"]
            parts = [self.problems(item, kind[5:-1], check_kubernetes, f"{path}[{n}]") for n, item in enumerate(value)]
            return [problem for part in parts for problem in part]
        if kind.startswith("dict("):
            return [] if isinstance(value, dict) else [f"{path} is no object"]
        if kind in _PLAIN:
            wrong = not isinstance(value, _PLAIN[kind]) or (kind == "int" and isinstance(value, bool))
            return [f"{path} is {value!r}, no {kind}"] if wrong else []
        if kind not in self._models:
            name = self._kubernetes.get(kind.removeprefix("V1"))
            if name is None:
                return [f"{path}: {kind} is unknown"] if kind != "V1ObjectMeta" else []
            return [f"{path}: {message}" for message in check_kubernetes(name, value)]
        if not isinstance(value, dict):
            return [f"{path} is no object"]
        model = self._models[kind]
        found = [f"{path}.{key} is not there" for key in model.required - set(value)]
        for key, item in value.items():
            if key not in model.types:
                found.append(f"{path}.{key} is unknown to {kind}")
            else:
                found += self.problems(item, model.types[key], check_kubernetes, f"{path}.{key}")
        return found


def _read(node: ast.ClassDef, text: str) -> _Model:
    tables = {
        statement.targets[0].id: ast.literal_eval(statement.value)
        for statement in node.body
        if isinstance(statement, ast.Assign)
        and isinstance(statement.targets[0], ast.Name)
        and isinstance(statement.value, ast.Dict)
    }
    keys = tables["attribute_map"]
    needed = re.findall(r"Invalid value for `(\w+)`, must not be `None`", text)
    return _Model({keys[name]: kind for name, kind in tables["openapi_types"].items()}, {keys[name] for name in needed})
