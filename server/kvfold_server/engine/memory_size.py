"""How large a pool is when nobody says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

SHARE_OF_FREE = 0.25
"""Of the host's memory, which others use too."""

SHARE_OF_DEVICE = 0.8
"""Of a device's free memory after the weights; the rest is for activations."""

CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def default_kv_bytes(device: torch.device) -> int:
    """A part of the memory that is free now: of the device, or of the host as far as the container may use it."""
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        return int(free * SHARE_OF_DEVICE)
    return int(min(_available_bytes(Path("/proc/meminfo")), *_limits(CGROUP_LIMITS)) * SHARE_OF_FREE)


def _available_bytes(meminfo: Path) -> int:
    for line in meminfo.read_text("ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{meminfo} does not say how much memory is available")


def _limits(paths: Iterable[Path]) -> list[int]:
    """The limits that are set; an unlimited container says "max" or a number beyond any memory, and both are no
    limit."""
    limits = [1 << 62]
    for path in paths:
        try:
            limits.append(int(path.read_text("ascii")))
        except (OSError, ValueError):
            continue
    return limits
