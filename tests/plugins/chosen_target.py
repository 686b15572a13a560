"""mra_export.kernel on an instruction set of the tests' choice: this machine's own, or an emulator's."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aarch64
import amx
import instruction_sets
import pytest
from driven_library import DrivenLibrary
from instruction_sets import Target

from mra_export import kernel, libraries

VARIABLE = "MRA_ATTENTION_CPU_TARGET"


def why_not(name: str) -> str:
    """Why this instruction set cannot be tested on this machine, itself or under an emulator; empty where it can."""
    if name in instruction_sets.targets():
        return ""
    if name in instruction_sets.FLAGS["aarch64"]:
        return aarch64.missing()
    if name != "amx_bf16":
        return f"this machine has no {name}"
    if "avx512_bf16" not in instruction_sets.targets():
        return "this machine has no amx_bf16, and no avx512_bf16, which its emulation needs"
    return ""


@contextmanager
def chosen(name: str, folder: Path) -> Iterator[Target]:
    """Within the block mra_export.kernel runs on it. folder: for a copy of the library."""
    emulated = name not in instruction_sets.targets()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, name)
        driven = None
        if not emulated:
            _load_copy(libraries.require("kernels"), folder, patch)
        elif name == "amx_bf16":
            _load_copy(amx.build() / libraries.FILES["kernels"], folder, patch)
        else:
            driven = DrivenLibrary([*aarch64.EMULATOR, aarch64.build() / "mra_attention_driver"])
            driven.stand_in(patch)
        try:
            assert kernel.cpu_target() == name
            patch.delenv(VARIABLE)
            yield Target(name, emulated)
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
