"""What the HTTP server is told: one dataclass, checked when it is made."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mra_export.errors import BundleError, ContractError

TOKEN_VARIABLE = "MRA_EXPORT_TOKEN"
VERSION = "1"
"""Of the served model in the Open Inference Protocol: a server holds one."""


@dataclass(frozen=True)
class Settings:
    """What `mra-export serve` can be told.

    name: the model's in URLs; None: the bundle folder's name. backend, device: as for MraRuntime.load. threads: of one call on a
    CPU; None: the processors divided by the workers. workers: calls of the model at the same time; None: 2 with ONNX Runtime on a
    CPU, where two calls on half the threads each do more than one on all, else 1. max_batch_size to length_buckets: as for
    BatchingRuntime. max_body: bytes of a request. timeout: seconds from a request's first byte to its answer. drain: seconds that
    requests in flight get at the end. token: the bearer token that every request but health must show; None: none.

    Raises ContractError for values out of range.
    """

    name: str | None = None
    backend: str = "auto"
    device: str | None = None
    threads: int | None = None
    workers: int | None = None
    max_batch_size: int = 8
    max_batch_tokens: int | None = None
    max_delay_ms: float = 0.0
    max_queue: int = 256
    length_buckets: tuple[int, ...] | None = None
    max_body: int = 4 << 20
    timeout: float = 30.0
    drain: float = 30.0
    token: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("max_body", self.max_body), ("timeout", self.timeout), ("drain", self.drain)):
            if value <= 0:
                raise ContractError(f"{name} is {value}: it must be more than 0")
        if self.name is not None and (not self.name or "/" in self.name):
            raise ContractError(f"name is {self.name!r}: pass a name without a slash, it stands in URLs")
        if self.token is not None:
            _check_token(self.token)


def read_token(file: Path | None) -> str | None:
    """The bearer token: the content of this file, else of the environment variable MRA_EXPORT_TOKEN, else None.

    Raises BundleError for a file that cannot be read, ContractError for a token that no header can carry.
    """
    if file is None:
        token = os.environ.get(TOKEN_VARIABLE)
        where = TOKEN_VARIABLE
    else:
        try:
            token = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"the token file {file} cannot be read: {error}") from error
        where = str(file)
    if token is not None:
        _check_token(token, where)
    return token


def _check_token(token: str, where: str = "token") -> None:
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ContractError(f"{where} holds no usable token: write one word of printable ASCII characters")
