"""The arena: one mapping of constant-byte layer-blocks.

A layer-block holds `tokens_per_block` token rows; a token row is the K and then the V of one token at one layer:

    block b, dtype of the model      token 0 | K: kv_heads x key_dim | V: kv_heads x value_dim |
                                     token 1 | K                     | V                       |
                                     ...

A row is the unit of gathering and moving, whatever its dtype. Block 0 is the padding block; its bytes stay zero, so
that padded positions of a gather read zeros.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kvfold_scheduler.geometry import CacheGeometry


class Arena:
    """`block_count` layer-blocks and the padding block, in `dtype` on `device`.

    On CPU the blocks lie in one anonymous mapping, aligned to the operating system's page and committed as they are
    first written, in huge pages where there are any. `rows` views them as token rows: [(block_count + 1) *
    tokens_per_block, kv_heads * (key_dim + value_dim)].
    """

    def __init__(self, geometry: CacheGeometry, block_count: int, dtype: torch.dtype, device: torch.device) -> None:
        if dtype.itemsize != geometry.value_bytes:
            raise ValueError(f"the geometry counts {geometry.value_bytes} bytes a value, {dtype} has {dtype.itemsize}")
        self.geometry = geometry
        self.block_count = block_count
        kind = geometry.layers[0]
        self.key_values = kind.kv_heads * kind.key_dim
        shape = ((block_count + 1) * geometry.tokens_per_block, kind.values_per_token)
        if device.type == "cpu":
            # Private: of a shared mapping, pages that were only read are committed too, and none can be given back.
            size = (block_count + 1) * geometry.block_bytes
            mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            _ask_for_huge_pages(mapping)
            self.rows = torch.frombuffer(mapping, dtype=dtype).view(shape)
        else:
            self.rows = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def byte_count(self) -> int:
        """Bytes of all blocks, the padding block not counted."""
        return self.block_count * self.geometry.block_bytes

    def fill(self, value: float) -> None:
        """Overwrites every block but the padding block; tests fill with NaN to show that nothing unwritten is read."""
        self.rows[self.geometry.tokens_per_block :] = value


def _ask_for_huge_pages(mapping: mmap.mmap) -> None:
    """Attention reads blocks that lie anywhere in the arena; in small pages each of them costs several address lookups.

    A block can be given back to the operating system all the same, which then splits the huge page.
    """
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel that was built without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
