"""The instruction sets of the CPU kernel as a fixture."""

from __future__ import annotations

from collections.abc import Iterator

import instruction_sets
import pytest
from chosen_target import chosen, why_not
from instruction_sets import Target


@pytest.fixture(scope="module", params=[name for name in instruction_sets.NAMES if not why_not(name)])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """mra_export.kernel runs on this instruction set. What cannot be here is one skipped test of test_kernel_binding.py."""
    with chosen(request.param, tmp_path_factory.mktemp(request.param)) as target:
        yield target
