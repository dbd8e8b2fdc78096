"""The kernels of triton attention as machine code for GPUs; whether there is one matters not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

TESTS = Path(__file__).parents[2]

CONSUMER_SHARED_BYTES = 99 << 10
"""What a program may have on GPUs of compute capability 8.6, 8.9 and 12.0; 8.0, 9.0 and 10.0 have more."""

TARGETS = [(80, "gemma"), (90, "gpt-oss"), (120, "smollm in fp32")]
"""Compute capabilities, times 10, and models; see `support/compiled_attention.py`."""


@cache
def compiled(capability: int, model: str) -> dict[str, list[dict[str, Any]]]:
    with TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(TESTS), "TRITON_CACHE_DIR": folder}
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, "-m", "support.compiled_attention", str(capability), model]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
    assert {kernel["name"] for kernel in report["first_layer"]} == {"write_kernel", "attend_kernel", "merge_kernel"}
    return report


@pytest.mark.parametrize(("capability", "model"), TARGETS)
def test_kernels_fit_the_shared_memory_of_consumer_gpus(capability: int, model: str) -> None:
    for kernel in compiled(capability, model)["first_layer"]:
        assert kernel["shared_bytes"] <= CONSUMER_SHARED_BYTES, kernel


@pytest.mark.parametrize(("capability", "model"), [target for target in TARGETS if "fp32" not in target[1]])
def test_kernels_of_two_byte_numbers_keep_everything_in_registers(capability: int, model: str) -> None:
    for kernel in compiled(capability, model)["first_layer"]:
        assert kernel["stack_bytes"] == 0, kernel


@pytest.mark.parametrize(("capability", "model"), TARGETS)
def test_later_layers_and_steps_compile_nothing(capability: int, model: str) -> None:
    assert compiled(capability, model)["later"] == []
