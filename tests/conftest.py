"""Fixtures that several test files share. Its place puts tests/ on the path, so `import oracles` works in every test file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import programs
import pytest
from hypothesis import HealthCheck, settings

programs.put_on_path()

# Test tensors are small and test processes many: threads beyond the first cost far more than they give.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("repository", deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repository")


@pytest.fixture
def tiny_config() -> Callable[..., Any]:
    """Makes an MraConfig small enough for any test; keyword arguments replace its values."""
    pytest.importorskip("transformers")
    from mra_export.model import MraConfig

    def make(**values: Any) -> MraConfig:
        small = {
            "vocab_size": 100,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 128,
            "block_per_row": 2,
            "hidden_dropout_prob": 0.0,
        }
        return MraConfig(**{**small, **values})

    return make


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the small bundle of a kind (exported.KINDS), to read only."""
    pytest.importorskip("torch")
    from exported import bundle

    from mra_export import libraries

    if libraries.find("ort_ops") is None:
        pytest.skip("libmra_ort.so is not built: make demo builds it")
    own = tmp_path_factory.getbasetemp()
    return lambda kind: bundle(kind, own.parent if "PYTEST_XDIST_WORKER" in os.environ else own, own)
