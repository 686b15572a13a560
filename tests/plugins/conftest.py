"""The instruction sets of the CPU kernel as a fixture."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import aarch64
import amx
import instruction_sets
import pytest
from driven_library import DrivenLibrary
from instruction_sets import Target

from mra_export import kernel, libraries

VARIABLE = "MRA_ATTENTION_CPU_TARGET"


@pytest.fixture(scope="module", params=instruction_sets.NAMES)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """mra_export.kernel runs on this instruction set: on this machine's own, or under an emulator. Skips where neither can be."""
    name = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, name)
        driven = None
        if name in instruction_sets.targets():
            if not kernel.available():
                pytest.skip("libmra_attention is not built: pip install -e .")
            _load_copy(libraries.require("kernels"), tmp_path_factory.mktemp(name), patch)
        elif name == "amx_bf16":
            _load_copy(amx.build() / libraries.FILES["kernels"], tmp_path_factory.mktemp(name), patch)
        elif name in instruction_sets.FLAGS["aarch64"]:
            driven = DrivenLibrary([*aarch64.EMULATOR, aarch64.build() / "mra_attention_driver"])
            driven.stand_in(patch)
        else:
            pytest.skip(f"this machine has no {name}")
        try:
            assert kernel.cpu_target() == name
            patch.delenv(VARIABLE)
            yield Target(name, emulated=name not in instruction_sets.targets())
        finally:
            if driven:
                driven.close()


def _load_copy(library: Path, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """mra_export.kernel uses another instance of the library: one asks for its instruction set once, at the first call."""
    shutil.copy(library, folder)
    with patch.context() as during:
        during.setenv(libraries.DIRECTORY_VARIABLE, str(folder))
        loaded = kernel.library.__wrapped__()
    patch.setattr(kernel, "library", lambda: loaded)
