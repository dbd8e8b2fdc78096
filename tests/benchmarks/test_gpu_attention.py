"""The benchmark for a GPU as far as it goes without one, in Triton's interpreter (see `tests/conftest.py`)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

import gpu_attention
import gpu_checks

if TYPE_CHECKING:
    from pathlib import Path

TINY = ["--check-only", "--shapes", "4/2/16", "--dtypes", "fp32"]


def test_without_a_gpu_it_ends_with_one_line_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_attention.main([]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("gpu_attention: there is no CUDA device")
    assert output.err.count("\n") == 1


def test_checks_pass_and_are_written(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    assert gpu_attention.main([*TINY, "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert [check["name"] for check in document["checks"]] == [
        "plain",
        "window",
        "softcap, sinks",
        "evicted",
        "evicted, all",
    ]
    assert all(check["passed"] for check in document["checks"])


@pytest.mark.parametrize("fault", ["attend", "write"])
def test_a_backend_that_computes_anything_else_fails_the_checks(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(gpu_checks.TritonBackend, fault)
    if fault == "attend":
        monkeypatch.setattr(gpu_checks.TritonBackend, fault, lambda *call: 1.001 * right(*call))
    else:
        monkeypatch.setattr(
            gpu_checks.TritonBackend, fault, lambda self, layer, key, value: right(self, layer, key, key)
        )
    assert gpu_attention.main(TINY) == 1


@pytest.mark.parametrize("chunk", [1, 7])
def test_every_figure_of_a_measurement_is_a_positive_number(chunk: int, pytestconfig: pytest.Config) -> None:
    setting = gpu_attention.Setting(4, 2, 16, "fp32")
    device = torch.device(pytestconfig.getoption("device"))
    figure = gpu_attention.measure(setting, 2, 40, chunk, repeats=1, device=device)
    numbers = (figure.triton_us, figure.sdpa_us, figure.of_sdpa, figure.kv_gb_s, figure.copy_gb_s, figure.of_copy)
    assert all(number > 0 for number in (*numbers, figure.tflop_s, figure.host_us, figure.begin_ms))
