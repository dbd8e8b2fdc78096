"""The attention backends by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvfold_server.kv.backends.native import NativeBackend
from kvfold_server.kv.backends.reference import ReferenceBackend
from kvfold_server.kv.backends.triton import TritonBackend

if TYPE_CHECKING:
    from kvfold_server.kv.backends.base import AttentionBackend

BACKENDS: dict[str, type[AttentionBackend]] = {
    backend.name: backend for backend in (ReferenceBackend, NativeBackend, TritonBackend)
}
