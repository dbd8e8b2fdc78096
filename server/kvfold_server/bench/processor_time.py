"""The processor time of another process."""

from __future__ import annotations

import ctypes
import time


def processor_seconds(process_id: int) -> float | None:
    """What all threads of a process have used so far, to the nanosecond, without its children.

    None where the system cannot tell: POSIX leaves the clocks of other processes optional, and macOS has none. Raises
    ProcessLookupError if there is no such process.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "clock_getcpuclockid"):
        return None
    clock = ctypes.c_int()
    if libc.clock_getcpuclockid(process_id, ctypes.byref(clock)) != 0:
        raise ProcessLookupError(f"there is no process {process_id}")
    return time.clock_gettime(clock.value)
