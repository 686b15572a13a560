"""mra_export: deploy MRA models (Multi Resolution Analysis attention) anywhere.

The public names are imported on first use, so `import mra_export` needs neither torch nor onnx.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mra_export.bundle import Bundle
    from mra_export.libraries import cmake_prefix, onnxruntime_library
    from mra_export.model import (
        MraConfig,
        MraForMaskedLM,
        MraForMultipleChoice,
        MraForQuestionAnswering,
        MraForSequenceClassification,
        MraForTokenClassification,
        MraModel,
    )
    from mra_export.runtime import MraRuntime

__version__ = "0.1.0"

_HOME = {
    "Bundle": "mra_export.bundle",
    "MraConfig": "mra_export.model",
    "MraForMaskedLM": "mra_export.model",
    "MraForMultipleChoice": "mra_export.model",
    "MraForQuestionAnswering": "mra_export.model",
    "MraForSequenceClassification": "mra_export.model",
    "MraForTokenClassification": "mra_export.model",
    "MraModel": "mra_export.model",
    "MraRuntime": "mra_export.runtime",
    "cmake_prefix": "mra_export.libraries",
    "onnxruntime_library": "mra_export.libraries",
}
__all__ = [
    "Bundle",
    "MraConfig",
    "MraForMaskedLM",
    "MraForMultipleChoice",
    "MraForQuestionAnswering",
    "MraForSequenceClassification",
    "MraForTokenClassification",
    "MraModel",
    "MraRuntime",
    "cmake_prefix",
    "onnxruntime_library",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
