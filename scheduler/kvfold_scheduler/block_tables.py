"""Block tables of all sequences in one anonymous mapping, readable by the runner without a copy.

The table of a sequence at a layer is a run of `blocks_per_layer` entries:

    entries[(row * layer_count + layer) * blocks_per_layer + index] = block that holds tokens
        [index * tokens_per_block, (index + 1) * tokens_per_block) of the sequence in `row`

Entries that hold nothing (never written, left the window, or the layer is a sharer) name the padding block. The mapping is
committed by the operating system page by page as it is touched, so its virtual size costs nothing.
"""

from __future__ import annotations

import mmap
from typing import NewType

from kvfold_scheduler.page_pool import PADDING_BLOCK

Row = NewType("Row", int)
"""A place in the tables that one running sequence occupies."""

ENTRY_BYTES = 4


class BlockTables:
    """Tables for `row_count` sequences of `layer_count` layers, up to `blocks_per_layer` blocks each."""

    def __init__(self, row_count: int, layer_count: int, blocks_per_layer: int) -> None:
        self.row_count = row_count
        self.layer_count = layer_count
        self.blocks_per_layer = blocks_per_layer
        self._mapping = mmap.mmap(-1, max(1, row_count * layer_count * blocks_per_layer) * ENTRY_BYTES)
        self.entries = memoryview(self._mapping).cast("i")
        self._free_rows = list(range(row_count - 1, -1, -1))

    @property
    def free_row_count(self) -> int:
        """Rows that no sequence occupies."""
        return len(self._free_rows)

    def open_row(self) -> Row:
        """Takes a free row; every entry of it names the padding block. The caller checks `free_row_count` first."""
        return Row(self._free_rows.pop())

    def close_row(self, row: Row) -> None:
        """Gives a row back. Its entries must have been cleared."""
        self._free_rows.append(row)

    def start(self, row: Row, layer: int) -> int:
        """The index of the first entry of a row's table at a layer."""
        return (row * self.layer_count + layer) * self.blocks_per_layer

    def clear(self, row: Row, layer: int, first: int, stop: int) -> list[int]:
        """Empties entries [first, stop) of a table and returns the blocks that they named."""
        begin = self.start(row, layer)
        blocks = self.entries[begin + first : begin + stop].tolist()
        for index in range(begin + first, begin + stop):
            self.entries[index] = PADDING_BLOCK
        return blocks
