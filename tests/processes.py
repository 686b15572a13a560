"""Processes that tests start: signals reach them as at a terminal, and they are gone when the test is, however it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@contextlib.contextmanager
def started(command: Sequence[object], ignored: Sequence[signal.Signals] = (), **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """The process, and what it starts, until the block ends: then all of it is killed.

    ignored: signals that it ignores from its beginning, as a job in the background does SIGINT. The others act on it whatever this
    process inherited. options: of Popen.
    """

    def set_signals() -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

    process = subprocess.Popen([str(part) for part in command], start_new_session=True, preexec_fn=set_signals, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also what a leader that has ended left behind
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
