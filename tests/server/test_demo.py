"""`kvfold demo`: the real client shows the real server; only the engine inside is a fake."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

START = [sys.executable, "-m", "kvfold_client.cli", "demo"]


def is_listening(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


@pytest.fixture
def environment(fake_factory: str) -> dict[str, str]:
    return os.environ | {"KVFOLD_ENGINE_FACTORY": fake_factory, "COLUMNS": "100"}


def address_in(output: str) -> str:
    found = re.search(r"at (127\.0\.0\.1:\d+)", output)
    assert found is not None, output
    return found[1]


def test_the_demo_ends_with_the_table_and_leaves_no_server(make_fake_model: Any, environment: dict[str, str]) -> None:
    folder: Path = make_fake_model()
    done = subprocess.run(
        [*START, "--model", str(folder)], capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^ *(\d+|16 mixed) +[\d.]+ [KM]iB", done.stdout, re.MULTILINE)
    assert rows == ["0", "2", "16 mixed"]
    assert "\x1b" not in done.stdout
    assert not is_listening(address_in(done.stdout))


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_ended_takes_its_server_with_it(
    make_fake_model: Any, environment: dict[str, str], ending: signal.Signals
) -> None:
    folder: Path = make_fake_model(step_seconds=0.2)
    with subprocess.Popen(
        [*START, "--model", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        seen = ""
        while "Serving" not in seen:
            seen += process.stdout.readline()
        address = address_in(seen)
        assert is_listening(address)
        process.send_signal(ending)
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert not is_listening(address)


def test_a_server_that_does_not_start_is_explained(make_fake_model: Any, environment: dict[str, str]) -> None:
    folder: Path = make_fake_model(load_failure="the weights are of another world")
    done = subprocess.run(
        [*START, "--model", str(folder)], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "the weights are of another world" in done.stderr
    assert done.stderr.endswith("kvfold demo: the server did not start (exit code 1)\n")
