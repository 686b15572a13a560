"""npz files of named arrays: the inputs and outputs of `mra-export run --npz`."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mra_export.errors import ContractError


def read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Every array of an npz file, by name; no pickled objects. Raises ContractError for any other file."""
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no archive of named arrays")
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ContractError(
            f"{path} is not an npz file of arrays ({error}): write it with numpy.savez(path, input_ids=...)"
        ) from error


def write_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write an npz file of exactly this name in one step. Raises OSError."""
    with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", dir=path.parent, delete=False) as stream:
        temporary = Path(stream.name)
        try:
            np.savez(stream, **arrays)  # type: ignore[arg-type]
            stream.close()
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
