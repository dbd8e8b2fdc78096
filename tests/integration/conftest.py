"""`kvfold serve` as a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@dataclass
class ServeProcess:
    """A running server; `ready_file` is where it writes its address, `log` what it has printed."""

    process: subprocess.Popen[bytes]
    ready_file: Path
    log_file: Path

    @property
    def ready(self) -> dict[str, Any]:
        return json.loads(self.ready_file.read_text())  # type: ignore[no-any-return]

    @property
    def address(self) -> str:
        return str(self.ready["address"])

    @property
    def log(self) -> list[str]:
        return self.log_file.read_text().splitlines()

    def wait_ready(self, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not self.ready_file.exists():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, "the server was not ready in time"
            time.sleep(0.05)

    def engine_ids(self) -> list[int]:
        """The process ids of its engines."""
        command = ["ps", "-o", "pid=", "--ppid", str(self.process.pid)]
        listed = subprocess.run(command, capture_output=True, text=True, check=False)
        return [int(line) for line in listed.stdout.split()]


KvfoldServe = Callable[..., contextlib.AbstractContextManager[ServeProcess]]

FAKE = "kvfold_server.engine.fake:start_engine"


@pytest.fixture(scope="session")
def kvfold_serve(tmp_path_factory: pytest.TempPathFactory) -> KvfoldServe:
    """Starts `kvfold serve` with these arguments, on a free port; keywords are environment variables."""

    @contextlib.contextmanager
    def start(*arguments: str, wait: bool = True, **environment: str) -> Iterator[ServeProcess]:
        folder = tmp_path_factory.mktemp("serve")
        ready_file, log_file = folder / "ready.json", folder / "log"
        command = [sys.executable, "-m", "kvfold_client.cli", "serve", *arguments]
        with (
            log_file.open("wb") as log,
            subprocess.Popen(
                [*command, "--port", "0", "--ready-file", str(ready_file)],
                env=os.environ | environment,
                stdout=log,
                stderr=log,
            ) as process,
        ):
            server = ServeProcess(process, ready_file, log_file)
            try:
                if wait:
                    server.wait_ready()
                yield server
            finally:
                if process.poll() is None:
                    process.kill()

    return start


@pytest.fixture
def serve_fake(
    kvfold_serve: KvfoldServe, tmp_path: Path, default_model_folder: Path
) -> Callable[..., contextlib.AbstractContextManager[ServeProcess]]:
    """Serves what stands for a model where none has to be good: the fake engine, with the default model's tokenizer.

    Keywords are those of FakeSettings.
    """

    def start(*arguments: str, **settings: object) -> contextlib.AbstractContextManager[ServeProcess]:
        shutil.copy(default_model_folder / "tokenizer.json", tmp_path)
        (tmp_path / "fake_engine.json").write_text(json.dumps(settings))
        return kvfold_serve("--model", str(tmp_path), *arguments, KVFOLD_ENGINE_FACTORY=FAKE)

    return start


@pytest.fixture(scope="module")
def default_server(kvfold_serve: KvfoldServe, default_model_folder: Path) -> Iterator[ServeProcess]:
    """A server with the default model, shared by the tests of a module."""
    with kvfold_serve("--model", f"default={default_model_folder}", "--kv-memory", "256MiB") as server:
        yield server
