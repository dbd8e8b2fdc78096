"""How a process that computes waits for its threads and keeps its memory."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
KEPT_BYTES = 1 << 30
"""Freed buffers up to this size stay with the process. With glibc's own bound, each step would return its logits and
activations to the system and page-fault them in anew."""


def prepare_runtime() -> None:
    """Call first of all: what OpenMP is told has no effect once torch is imported.

    OpenMP threads sleep while they wait: spinning threads of an engine that shares its cores, be it with its own front
    end, hold up the thread they wait for, and a step takes ten times as long. A user's own setting stands.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
            libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
