"""Writing checkpoints: a model in one safetensors file. And keeping transformers' progress bars off the screen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils import logging


def save_checkpoint(model: PreTrainedModel, folder: Path) -> None:
    """Write config.json and model.safetensors, in the model's dtype, to an existing folder."""
    with no_progress_bars():
        model.save_pretrained(folder, max_shard_size="1000GB")


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """transformers draws bars of its own while loading and saving: our callers have theirs."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
