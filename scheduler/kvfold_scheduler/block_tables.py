"""Block tables of all sequences in one anonymous mapping, readable by the runner without a copy.

The table of a sequence at a layer is a run of `blocks_per_layer` entries:

    entries[(row * layer_count + layer) * blocks_per_layer + index] = block that holds tokens
        [index * tokens_per_block, (index + 1) * tokens_per_block) of the sequence in `row`

Entries that hold nothing (never written, left the window, or the layer is a sharer) name the padding block. The
operating system commits the mapping page by page as it is written to, so its virtual size costs nothing.
"""

from __future__ import annotations

import mmap
from array import array
from typing import NewType

from kvfold_scheduler.page_pool import PADDING_BLOCK, PoolCorruptionError

Row = NewType("Row", int)
"""A place in the tables that one running sequence occupies."""

ENTRY_BYTES = 4

MAX_ENTRIES_TO_SCAN = 1 << 20
"""Above this, an integrity check does not read every entry of the tables: it would take seconds."""


class BlockTables:
    """Tables for `row_count` sequences of `layer_count` layers, up to `blocks_per_layer` blocks each."""

    def __init__(self, row_count: int, layer_count: int, blocks_per_layer: int) -> None:
        self.row_count = row_count
        self.layer_count = layer_count
        self.blocks_per_layer = blocks_per_layer
        # Private: reading a page of a shared mapping would commit it.
        self._mapping = mmap.mmap(
            -1,
            max(1, row_count * layer_count * blocks_per_layer) * ENTRY_BYTES,
            flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
        )
        self.entries = memoryview(self._mapping).cast("i")
        self._free_rows = list(range(row_count - 1, -1, -1))
        self._is_open = bytearray(row_count)

    @property
    def free_row_count(self) -> int:
        """Rows that no sequence occupies."""
        return len(self._free_rows)

    def open_row(self) -> Row:
        """Takes a free row; every entry of it names the padding block. The caller checks `free_row_count` first."""
        row = self._free_rows.pop()
        self._is_open[row] = True
        return Row(row)

    def close_row(self, row: Row) -> None:
        """Gives a row back. Its entries must have been cleared. Raises PoolCorruptionError if it is free."""
        if not self._is_open[row]:
            raise PoolCorruptionError(f"row {row} was given back twice")
        self._is_open[row] = False
        self._free_rows.append(row)

    def start(self, row: Row, layer: int) -> int:
        """The index of the first entry of a row's table at a layer."""
        return (row * self.layer_count + layer) * self.blocks_per_layer

    def fill(self, row: Row, layer: int, first: int, blocks: array[int]) -> None:
        """Names `blocks` in the entries from `first` on of a table. The caller checks `blocks_per_layer` first."""
        for index, block in enumerate(blocks, self.start(row, layer) + first):
            self.entries[index] = block

    def named(self, row: Row, layer: int, first: int, stop: int) -> list[int]:
        """The blocks that entries [first, stop) of a table name."""
        begin = self.start(row, layer)
        return self.entries[begin + first : begin + stop].tolist()

    def clear(self, row: Row, layer: int, first: int, stop: int) -> list[int]:
        """Empties entries [first, stop) of a table and returns the blocks that they named."""
        begin = self.start(row, layer)
        blocks = self.entries[begin + first : begin + stop].tolist()
        self.entries[begin + first : begin + stop] = memoryview(array("i", [PADDING_BLOCK]) * len(blocks))
        return blocks

    def check_integrity(self, held: int) -> None:
        """Raises PoolCorruptionError unless each row is free or open, and exactly `held` entries name a block."""
        if sorted(self._free_rows) != [row for row in range(self.row_count) if not self._is_open[row]]:
            raise PoolCorruptionError("the free rows are not exactly those that no sequence occupies")
        size = self.row_count * self.layer_count * self.blocks_per_layer
        if size <= MAX_ENTRIES_TO_SCAN:
            named = size - self.entries[:size].tolist().count(PADDING_BLOCK)
            if named != held:
                raise PoolCorruptionError(f"the tables name {named} blocks, the sequences hold {held}")
