"""Native kernels for tests, where the machine has a compiler."""

from __future__ import annotations

import pytest

from kvfold_server.kv.backends.native import NativeBackend
from kvfold_server.kv.backends.reference import ReferenceBackend
from kvfold_server.kv.native.layer_ops import LayerOps
from kvfold_server.kv.native.library import NativeUnavailableError

CPU_BACKENDS = (ReferenceBackend.name, NativeBackend.name)
"""Those that whole models are tested with: kernels for GPUs run on CPU in an interpreter, far too slowly."""


def layer_ops(backend: str) -> LayerOps | None:
    """What goes with a backend: kernels for layers with `native`, none with any other. Skips where none are built."""
    if backend != NativeBackend.name:
        return None
    try:
        return LayerOps()
    except NativeUnavailableError as error:
        pytest.skip(str(error))
