"""The device of the tests of attention backends."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return torch.device(pytestconfig.getoption("device"))
