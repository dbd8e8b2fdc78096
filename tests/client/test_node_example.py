"""The example for Node runs with nothing but the proto files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvfold.v1 import generation_pb2

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "clients" / "node"

needs_node = pytest.mark.skipif(shutil.which("npm") is None, reason="node is not installed")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example with its packages."""
    folder = tmp_path_factory.mktemp("node")
    for name in ("package.json", "package-lock.json", ".npmrc", "stream.mjs"):
        shutil.copy(EXAMPLE / name, folder)
    subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=folder, check=True, timeout=240)
    return folder


def run_example(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["node", "stream.mjs", *arguments],
        cwd=folder,
        env=os.environ | {"KVFOLD_PROTO": str(ROOT / "proto")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@needs_node
def test_it_streams_an_answer_and_prints_the_memory_report(server: Any, installed: Path) -> None:
    done = run_example(installed, "--server", server.address, "--shared-layers", "8", "--max-tokens", "9", "Hi there")
    assert done.stderr == ""
    assert done.returncode == 0
    assert done.stdout.splitlines() == ["Hello world", "2 tokens, 8 shared layers, 220 KV bytes held, 80 saved"]
    request = server.calls[0].request
    assert request.chat.messages[0] == generation_pb2.ChatMessage(role=generation_pb2.ROLE_USER, content="Hi there")
    assert (request.quality.shared_layers, request.stopping.max_tokens) == (8, 9)
    assert request.sampling.HasField("temperature")
    assert server.calls[0].time_remaining is not None


@needs_node
def test_an_error_is_one_line_and_an_exit_code(server: Any, installed: Path) -> None:
    server.answers["GenerateStream"] = lambda request, context: server.fail(
        context, grpc.StatusCode.NOT_FOUND, "there is no model x"
    )
    done = run_example(installed, "--server", server.address, "Hi")
    assert (done.returncode, done.stderr) == (1, "stream.mjs: NOT_FOUND: there is no model x\n")


def test_the_lock_file_names_no_registry() -> None:
    lock = json.loads((EXAMPLE / "package-lock.json").read_text())
    assert lock["packages"]
    assert all("resolved" not in package for package in lock["packages"].values())
    assert all(package.get("integrity", "").startswith("sha512-") for name, package in lock["packages"].items() if name)


def test_packages_are_pinned() -> None:
    dependencies = json.loads((EXAMPLE / "package.json").read_text())["dependencies"]
    assert all(version[0].isdigit() for version in dependencies.values())
