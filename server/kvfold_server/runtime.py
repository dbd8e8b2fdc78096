"""How a process that computes waits for its threads, keeps its memory, and spares its garbage collector."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

SPINS = 1000
"""How often an OpenMP thread looks for the next piece of work before it sleeps: 25 microseconds (Zen 4), which covers
most gaps between the products of a step. The default, milliseconds, makes a step ten times as long on cores that are
shared: spinning threads hold up the thread that they wait for."""

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
KEPT_BYTES = 1 << 30
"""Freed buffers up to this size stay with the process. With glibc's own bound, each step would return its logits and
activations to the system and page-fault them in anew."""

NEW_OBJECTS = 10_000
"""How many objects more than before set off a collection. A token that is sent to each of 500 streams makes some 5,000,
all of which go by themselves soon after; Python's own bound of 700 would have them searched for garbage seven times."""


def prepare_runtime() -> None:
    """Call first of all: what OpenMP is told has no effect once torch is imported.

    A user's own settings stand.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
            libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


@contextmanager
def lasting_imports() -> Iterator[None]:
    """For a block that imports large libraries, which live as long as the process.

    The garbage collector looks at their objects neither now, which would take a fifth of the time of the imports, nor
    in a later collection: one of all objects takes 0.3 s with them, and that long no step is computed.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def spare_loaded_objects() -> None:
    """Call when all is loaded that stays for the life of the process: garbage is not looked for there any more.

    Those are 100,000 objects and more. Searching them again and again is a tenth of what a front end does, and each
    time all streams stand still.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(NEW_OBJECTS)


def release_freed_memory() -> None:
    """Gives freed memory back to the system, however little `prepare_runtime` lets go: for once, after much was freed
    for good."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
