"""Every error the package raises on purpose.

Each message names the thing, shows the value and says the fix. `exit_code` is what the `mra-export` command returns for it.
"""


class MraExportError(Exception):
    """Base class: catch this to catch everything the package raises on purpose."""

    exit_code = 1


class CheckpointError(MraExportError):
    """A checkpoint cannot be read, or is not an MRA model."""

    exit_code = 2


class ContractError(MraExportError, ValueError):
    """Inputs or attributes outside the operator's contract (contract.py)."""

    exit_code = 2


class ParityError(MraExportError):
    """A runtime's answer is further from the PyTorch reference than its tolerance."""

    exit_code = 3


class BundleError(MraExportError):
    """A bundle is missing, incomplete, altered, or of another contract version."""

    exit_code = 4


class PluginLoadError(MraExportError):
    """A compiled library is missing or does not load."""

    exit_code = 4


class BackendError(MraExportError):
    """The backend, device or dtype that was asked for cannot run here."""

    exit_code = 4


class EngineError(MraExportError):
    """A TensorRT engine cannot be built or loaded."""

    exit_code = 4


class MissingPackageError(MraExportError):
    """An optional Python package that this needs is not installed."""

    exit_code = 4


class BusyError(MraExportError):
    """The queue of requests is full (serve/batching.py): nothing is wrong with the request, it may come again later."""

    exit_code = 1
