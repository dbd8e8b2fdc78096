"""The attention backends by name, and which one a device gets by default."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from kvfold_server.kv.backends.native import NativeBackend
from kvfold_server.kv.backends.reference import ReferenceBackend
from kvfold_server.kv.backends.triton import TritonBackend
from kvfold_server.kv.native.library import NativeUnavailableError, load_library

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from kvfold_server.kv.backends.base import AttentionBackend

logger = logging.getLogger(__name__)

BACKENDS: dict[str, type[AttentionBackend]] = {
    backend.name: backend for backend in (ReferenceBackend, NativeBackend, TritonBackend)
}


def best_backend(device: torch.device, load: Callable[[], object] = load_library) -> str:
    """The name of the backend for a device. Logs a warning if it is not the fastest one.

    On GPUs that is the reference until a first run there has shown that the kernels for them are right: they are
    taken by name.

    `load` raises NativeUnavailableError where there is no native library.
    """
    if device.type != "cpu":
        return ReferenceBackend.name
    try:
        load()
    except NativeUnavailableError as error:
        logger.warning("attention runs on the reference backend, which is several times slower: %s", error)
        return ReferenceBackend.name
    return NativeBackend.name
