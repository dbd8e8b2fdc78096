"""Many small arrays to the device in one copy."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch

IntArray: TypeAlias = np.ndarray[Any, np.dtype[np.signedinteger[Any]]]

ALIGNMENT = 4
"""Arrays begin at multiples of 16 bytes: Triton compiles a kernel again for pointers that are aligned otherwise."""


class Upload:
    """Collects arrays; `send` copies them, flattened and one after the other, into one int32 tensor."""

    def __init__(self) -> None:
        self._parts: list[tuple[slice, IntArray]] = []
        self._size = 0

    def add(self, array: IntArray) -> slice:
        """Where the array will be in the tensor. It is read when it is sent."""
        part = slice(self._size, self._size + array.size)
        self._parts.append((part, array))
        self._size += -(-array.size // ALIGNMENT) * ALIGNMENT
        return part

    def send(self, device: torch.device) -> torch.Tensor:
        """Sends all without waiting for it; torch keeps pinned memory until its copy is done."""
        host = torch.empty(self._size, dtype=torch.int32, pin_memory=device.type == "cuda")
        target = host.numpy()
        for part, array in self._parts:
            target[part].reshape(array.shape)[...] = array
        return host.to(device, non_blocking=True)
