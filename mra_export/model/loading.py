"""A checkpoint, by folder or hub id, to a model; every way it can be unfit is a CheckpointError that says so."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PretrainedConfig

from mra_export.errors import CheckpointError, ContractError
from mra_export.model.configuration import MraConfig
from mra_export.model.modeling import (
    MraForMaskedLM,
    MraForMultipleChoice,
    MraForQuestionAnswering,
    MraForSequenceClassification,
    MraForTokenClassification,
    MraModel,
    MraPreTrainedModel,
)

TASKS: dict[str, type[MraPreTrainedModel]] = {
    "fill-mask": MraForMaskedLM,
    "text-classification": MraForSequenceClassification,
    "multiple-choice": MraForMultipleChoice,
    "token-classification": MraForTokenClassification,
    "question-answering": MraForQuestionAnswering,
    "feature-extraction": MraModel,
}
"""transformers' pipeline name -> model class."""

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_HEADS = ("cls.", "classifier.", "pre_classifier.", "qa_outputs.")
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def load(path_or_hub_id: str | Path, task: str = "auto", dtype: torch.dtype = torch.float32) -> MraPreTrainedModel:
    """The model of a checkpoint written by transformers or by us, in eval mode on the CPU.

    path_or_hub_id: a folder with config.json and model.safetensors or pytorch_model.bin, or a hub id, which transformers downloads.
    task: a key of TASKS, or "auto" for the architecture that the checkpoint names. "feature-extraction" leaves a head out.
    dtype: of the weights, whatever the file holds.

    Raises CheckpointError where the checkpoint is missing, damaged, not MRA, or lacks or exceeds the task's weights.
    """
    if task != "auto" and task not in TASKS:
        raise ContractError(f"task is {task!r}: use auto or one of {', '.join(TASKS)}")
    if not dtype.is_floating_point:
        raise ContractError(f"dtype is {dtype}: use a floating point type")
    config = _config(path_or_hub_id)
    if task == "auto":
        try:
            task = task_of(config)
        except CheckpointError as error:
            raise CheckpointError(f"{path_or_hub_id}: {error}") from None
    model_class = TASKS[task]
    try:
        model, info = model_class.from_pretrained(
            str(path_or_hub_id),
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # named below
        )
    except Exception as error:  # each file format and release of transformers raises its own types
        raise CheckpointError(f"{path_or_hub_id}: the weights cannot be read as {model_class.__name__}: {error}") from error

    # Some releases list keys, others (key, shape in the file, shape in the model).
    if mismatched := sorted(entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]):
        raise CheckpointError(
            f"{path_or_hub_id}: {_listed(mismatched)} of another shape than config.json and {task} ask for: "
            "pass the task and the config.json that the checkpoint was trained with"
        )
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{path_or_hub_id}: {_listed(missing)} missing for {task} ({model_class.__name__}): "
            "pass the task that the checkpoint was trained for, or a complete checkpoint"
        )
    unexpected = sorted(info["unexpected_keys"])
    if model_class is MraModel:
        unexpected = [key for key in unexpected if not key.startswith(_HEADS)]
    if unexpected:
        raise CheckpointError(
            f"{path_or_hub_id}: {_listed(unexpected)} not part of {task} ({model_class.__name__}) as config.json describes it: "
            "pass the task and the config.json that the checkpoint was trained with"
        )
    return cast(MraPreTrainedModel, model.to(dtype).eval())


def task_of(config: MraConfig) -> str:
    """The task of the architecture that a configuration names. Raises CheckpointError where it names none we have."""
    architectures = config.architectures or []
    for task, model_class in TASKS.items():
        if model_class.__name__ in architectures:
            return task
    raise CheckpointError(f"architectures in config.json is {architectures}: pass a task, one of {', '.join(TASKS)}")


def _config(path_or_hub_id: str | Path) -> MraConfig:
    folder = Path(path_or_hub_id)
    local = folder.is_dir()
    if local:
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder} has no config.json: pass a folder that save_pretrained wrote")
        if not any((folder / name).is_file() for name in WEIGHTS):
            raise CheckpointError(f"{folder} has no weights: expected {WEIGHTS[0]} or {WEIGHTS[2]}")
    elif folder.exists():
        raise CheckpointError(f"{folder} is a file: pass the checkpoint's folder")
    elif isinstance(path_or_hub_id, Path) or not _HUB_ID.fullmatch(path_or_hub_id):
        raise CheckpointError(f"{path_or_hub_id}: no such folder, and not a hub id such as uw-madison/mra-base-512-4")
    try:
        values: dict[str, Any] = PretrainedConfig.get_config_dict(str(path_or_hub_id))[0]
    except (OSError, ValueError) as error:
        what = f"{folder}/config.json cannot be read" if local else f"{path_or_hub_id}: no such folder, nor could the hub give it"
        raise CheckpointError(f"{what}: {error}") from error
    model_type = values.get("model_type")
    if model_type != MraConfig.model_type:
        raise CheckpointError(f"{path_or_hub_id}: config.json's model_type is {model_type!r}: only 'mra' models are supported")
    try:
        return cast(MraConfig, MraConfig.from_dict(values))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path_or_hub_id}: config.json: {error}") from error


def _listed(keys: Iterable[str], shown: int = 5) -> str:
    names = list(keys)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{', '.join(names[:shown])}{more} {'is' if len(names) == 1 else 'are'}"
