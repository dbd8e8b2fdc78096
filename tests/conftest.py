"""What the whole suite shares: how it threads, and the default model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from kvfold_server.models import default
from kvfold_server.runtime import prepare_runtime

if TYPE_CHECKING:
    from pathlib import Path

# Before torch is imported: tests share two cores with the servers that they start.
prepare_runtime()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the tests of attention backends run (cpu)")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("device") == "cpu":
        # Triton's kernels run in its interpreter, which must be chosen before triton is imported: torch does that for
        # transformers.
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def default_model_folder() -> Path:
    """The prepared default model; fetched and converted the first time, then kept in the user's cache."""
    return default.default_model_folder()
