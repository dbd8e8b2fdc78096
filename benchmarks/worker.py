"""A peer in a process of its own that stands still while it is not asked."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from peers.protocol import PeerInfo, PeerOptions, PeerRequest, TokenTimes, write_requests

if TYPE_CHECKING:
    from collections.abc import Sequence

BENCHMARKS = Path(__file__).parent
SOURCES = (BENCHMARKS, BENCHMARKS.parent / "server")
"""Where a worker finds the peers, and those parts of kvfold_server that need nothing but torch."""

EXIT_SECONDS = 30


class WorkerError(RuntimeError):
    """A worker ended before it answered; what it printed is above."""


class Worker:
    """Starts `python -m peers.MODULE` and speaks its protocol. A context manager: on exit the process ends.

    Between jobs the whole process group is stopped by a signal, so that nothing of it, such as a thread that spins
    while it waits, takes time from the other one.
    """

    def __init__(self, python: Path, module: str, options: PeerOptions) -> None:
        path = os.pathsep.join(map(str, SOURCES))
        self._process = subprocess.Popen(
            [python, "-m", f"peers.{module}", options.to_json()],
            cwd=BENCHMARKS,
            env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._module = module
        self._folder = tempfile.TemporaryDirectory()
        try:
            self.info = PeerInfo(**self._answer())
            self._stand_still()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def process_group(self) -> int:
        """Of the worker and all that it starts."""
        return self._process.pid

    def run_batch(self, requests: Sequence[PeerRequest]) -> float:
        """Seconds for all of them at once."""
        return float(self._do("batch", requests)["seconds"])

    def replay(self, requests: Sequence[PeerRequest]) -> list[TokenTimes]:
        """Token times of each request, submitted when it arrives."""
        return [TokenTimes(*times) for times in self._do("replay", requests)["requests"]]

    def close(self) -> None:
        """Ends the process and its children."""
        self._signal(signal.SIGCONT)
        if self._process.stdin is not None:
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(EXIT_SECONDS)
        self._signal(signal.SIGKILL)
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._folder.cleanup()

    def _do(self, kind: str, requests: Sequence[PeerRequest]) -> dict[str, Any]:
        path = Path(self._folder.name) / "requests.json"
        write_requests(path, requests)
        self._signal(signal.SIGCONT)
        if self._process.stdin is None:
            raise WorkerError("the worker has no input")
        self._process.stdin.write(json.dumps({"kind": kind, "requests": str(path)}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        self._stand_still()
        return answer

    def _answer(self) -> dict[str, Any]:
        line = "" if self._process.stdout is None else self._process.stdout.readline()
        if not line:
            raise WorkerError(f"the worker {self._module} ended with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _stand_still(self) -> None:
        """Returns when the worker's threads have stopped: a signal takes effect later than it is sent."""
        self._signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # all of the group may have ended
            os.killpg(self._process.pid, number)
