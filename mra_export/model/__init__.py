"""MRA in PyTorch: configuration, reference attention, the mra::attention operator, and a model for each task."""

from mra_export.model.configuration import MraConfig
from mra_export.model.loading import TASKS, load
from mra_export.model.modeling import (
    MraForMaskedLM,
    MraForMultipleChoice,
    MraForQuestionAnswering,
    MraForSequenceClassification,
    MraForTokenClassification,
    MraModel,
    MraPreTrainedModel,
)

__all__ = [
    "TASKS",
    "MraConfig",
    "MraForMaskedLM",
    "MraForMultipleChoice",
    "MraForQuestionAnswering",
    "MraForSequenceClassification",
    "MraForTokenClassification",
    "MraModel",
    "MraPreTrainedModel",
    "load",
]
