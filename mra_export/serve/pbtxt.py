"""Protobuf's text format, as in Triton's config.pbtxt, from plain Python values."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


class Name(str):
    """The name of an enum's value, such as TYPE_INT64: written without quotes."""


def dumps(message: Mapping[str, Any]) -> str:
    """A message's fields: a mapping is a message, a list a repeated field, the rest a scalar. What is None or empty is left out."""
    return "\n".join(_message(message, "")) + "\n"


def parameters(values: Mapping[str, object]) -> list[dict[str, Any]]:
    """The map<string, ModelParameter> of a model; values that are None are left out."""
    return [{"key": key, "value": {"string_value": str(value)}} for key, value in values.items() if value is not None]


def _message(message: Mapping[str, Any], indent: str) -> Iterator[str]:
    for field, value in message.items():
        repeated = isinstance(value, Sequence) and not isinstance(value, str)
        for item in value if repeated else [value]:
            if isinstance(item, Mapping):
                yield f"{indent}{field} {{"
                yield from _message(item, indent + "  ")
                yield f"{indent}}}"
            elif item is not None:
                yield f"{indent}{field}: {_scalar(item)}"


def _scalar(value: Any) -> str:
    return str(value) if isinstance(value, Name) else json.dumps(value, ensure_ascii=False)  # a JSON scalar is a text-format scalar
