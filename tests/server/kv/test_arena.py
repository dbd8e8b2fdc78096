"""How the arena takes its memory from the operating system."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvfold_scheduler.geometry import CacheGeometry, LayerKind
from kvfold_server.kv.arena import Arena

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


def flags_of_mapping(address: int) -> list[str]:
    """What the kernel was told about the memory at an address."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(maxsplit=1)[0]
        if "-" in head:
            first, stop = (int(part, 16) for part in head.split("-"))
            found = first <= address < stop
        elif found and head == "VmFlags:":
            return line.split()[1:]
    raise AssertionError(f"nothing is mapped at {address:x}")


@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="the kernel has no transparent huge pages")
def test_an_arena_on_cpu_may_lie_in_huge_pages() -> None:
    geometry = CacheGeometry((LayerKind(None, "rope", 3, 64, 64),), 2)
    arena = Arena(geometry, 500, torch.bfloat16, torch.device("cpu"))
    assert "hg" in flags_of_mapping(arena.rows.data_ptr())
