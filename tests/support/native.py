"""Native kernels for tests, where the machine has a compiler."""

from __future__ import annotations

import pytest

from kvfold_server.kv.native.layer_ops import LayerOps
from kvfold_server.kv.native.library import NativeUnavailableError


def layer_ops(backend: str) -> LayerOps | None:
    """What goes with a backend: kernels for layers with `native`, none with any other. Skips where none are built."""
    if backend != "native":
        return None
    try:
        return LayerOps()
    except NativeUnavailableError as error:
        pytest.skip(str(error))
