"""A server of our own for the length of a benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

STARTUP_SECONDS = 300
"""A model may have to be fetched and converted first."""


@dataclass(frozen=True, slots=True)
class RunningServer:
    """Where a server listens, and the process that is its front end."""

    address: str
    process_id: int


@contextmanager
def running_server(arguments: Sequence[str]) -> Iterator[RunningServer]:
    """Starts `kvfold serve` on a free port and yields it; stops it at the end. Raises RuntimeError if it does not
    start."""
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready.json"
        command = [sys.executable, "-m", "kvfold_server", *arguments, "--port", "0", "--ready-file", str(ready)]
        process = subprocess.Popen(command)
        try:
            deadline = time.monotonic() + STARTUP_SECONDS
            while not ready.exists():
                if process.poll() is not None:
                    raise RuntimeError(f"the server ended with exit code {process.returncode} before it was ready")
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the server was not ready after {STARTUP_SECONDS} seconds")
                time.sleep(0.05)
            yield RunningServer(json.loads(ready.read_text("utf-8"))["address"], process.pid)
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
