"""Which backend an engine gets when nobody names one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvfold_server.kv.backends.registry import best_backend
from kvfold_server.kv.native.library import NativeUnavailableError

if TYPE_CHECKING:
    import pytest

CPU = torch.device("cpu")


def test_a_cpu_with_the_library_runs_native_attention(caplog: pytest.LogCaptureFixture) -> None:
    assert best_backend(CPU, load=lambda: None) == "native"
    assert caplog.records == []


def test_a_cpu_without_the_library_runs_the_reference_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    def missing() -> None:
        raise NativeUnavailableError("native attention was not built at install")

    assert best_backend(CPU, load=missing) == "reference"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "reference" in record.message
    assert "was not built at install" in record.message
