"""A `kvfold serve` of our own: started, waited for, stopped."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from collections import deque
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

_POLL_SECONDS = 0.05
_STOP_SECONDS = 20.0
_LAST_LINES = 15


class ServerFailedError(Exception):
    """The server ended before it was ready; what it said has been passed on."""


class ServerProcess:
    """A server on a free port of this machine, as a context manager; the block runs while it serves at `address`.

    Until the server is ready, what it prints (the download of the default model, its conversion) is passed on to our
    stderr, through a terminal of its own if ours is one, so that progress bars move. After that, only the last lines
    are kept. It has its own session, so that Ctrl-C reaches us alone; leaving the block stops it with SIGTERM, and
    with SIGKILL if it does not end within 20 s.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = list(arguments)
        self._folder = TemporaryDirectory(prefix="kvfold-")
        self._last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._pass_on = True
        self.address = ""

    def __enter__(self) -> Self:
        ready_file = Path(self._folder.name) / "ready.json"
        reading, writing = _output_pipe()
        command = [sys.executable, "-m", "kvfold_client.cli", "serve", *self._arguments]
        self._process = subprocess.Popen(
            [*command, "--port", "0", "--ready-file", str(ready_file), "--grace", "5"],
            stdin=subprocess.DEVNULL,
            stdout=writing,
            stderr=writing,
            start_new_session=True,
        )
        os.close(writing)
        self._reader = threading.Thread(target=self._read_output, args=(reading,), daemon=True)
        self._reader.start()
        try:
            while not ready_file.exists():
                if self._process.poll() is not None:
                    self._reader.join()
                    raise ServerFailedError(f"the server did not start (exit code {self._process.returncode})")
                time.sleep(_POLL_SECONDS)
            self.address = json.loads(ready_file.read_text())["address"]
        except BaseException:
            self._stop()
            raise
        self._pass_on = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def last_lines(self) -> tuple[str, ...]:
        """What the server printed last."""
        return tuple(self._last_lines)

    def _stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)  # its engines too: the group is the server's own
                self._process.wait()
        self._reader.join()
        self._folder.cleanup()

    def _read_output(self, reading: int) -> None:
        unfinished = b""
        with contextlib.suppress(OSError):  # a terminal whose other side is closed reports its end as an error
            while piece := os.read(reading, 4096):
                if self._pass_on:
                    os.write(sys.stderr.fileno(), piece)
                *lines, unfinished = (unfinished + piece).split(b"\n")
                self._last_lines.extend(line.decode(errors="replace").rstrip() for line in lines)
        os.close(reading)


def _output_pipe() -> tuple[int, int]:
    """The reading and the writing end of a terminal as wide as ours, or of a pipe if stderr is no terminal."""
    if not sys.stderr.isatty():
        return os.pipe()
    reading, writing = pty.openpty()
    termios.tcsetwinsize(writing, termios.tcgetwinsize(sys.stderr.fileno()))
    return reading, writing
