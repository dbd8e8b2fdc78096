"""The layer-blocks of one running sequence: reserving, growing, dropping what left a window, releasing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvfold_scheduler.block_tables import BlockTables, Row
    from kvfold_scheduler.geometry import CacheGeometry
    from kvfold_scheduler.page_pool import PagePool
    from kvfold_scheduler.sharing import SharingPlan


class SequenceCache:
    """Holds a row of the block tables and the blocks of each layer that is an owner at `depth`.

    All owner layers have the same number of table entries in use. A sliding layer's leading entries are empty once their
    tokens have left its window.
    """

    def __init__(
        self, geometry: CacheGeometry, plan: SharingPlan, pool: PagePool, tables: BlockTables, depth: int
    ) -> None:
        self._geometry = geometry
        self._pool = pool
        self._tables = tables
        self.depth = depth
        self._owners = plan.owners(depth)
        self._sliding = tuple(layer for layer in self._owners if geometry.layers[layer].window is not None)
        self.row: Row = tables.open_row()
        self._entries = 0
        self._dropped = dict.fromkeys(self._sliding, 0)
        self._held = 0
        self._held_peak = 0

    @property
    def held_bytes(self) -> int:
        """Bytes of the blocks that the sequence holds now."""
        return self._held * self._geometry.block_bytes

    @property
    def held_peak_bytes(self) -> int:
        """The most bytes that it held at any time."""
        return self._held_peak * self._geometry.block_bytes

    def blocks_to_grow(self, tokens: int) -> int:
        """How many more blocks are needed to hold `tokens` tokens."""
        return max(0, self._geometry.blocks_for(tokens) - self._entries) * len(self._owners)

    def grow(self, tokens: int) -> bool:
        """Reserves blocks for `tokens` tokens in all owner layers; False, and nothing changes, if the pool lacks them."""
        entries = self._geometry.blocks_for(tokens)
        if entries <= self._entries:
            return True
        blocks = self._pool.allocate((entries - self._entries) * len(self._owners))
        if blocks is None:
            return False
        table = self._tables.entries
        taken = 0
        for layer in self._owners:
            start = self._tables.start(self.row, layer)
            for index in range(self._entries, entries):
                table[start + index] = blocks[taken]
                taken += 1
        self._entries = entries
        self._held += taken
        self._held_peak = max(self._held_peak, self._held)
        return True

    def drop_outside_windows(self, position: int) -> None:
        """Frees the blocks of sliding layers that no token from `position` onward can see."""
        for layer in self._sliding:
            window = self._geometry.layers[layer].window
            if window is None:
                continue
            first_visible = max(0, position - window + 1)
            stop = min(first_visible // self._geometry.tokens_per_block, self._entries)
            if stop > self._dropped[layer]:
                blocks = self._tables.clear(self.row, layer, self._dropped[layer], stop)
                self._pool.release(blocks)
                self._held -= len(blocks)
                self._dropped[layer] = stop

    def release(self) -> None:
        """Gives all blocks and the row back."""
        for layer in self._owners:
            self._pool.release(self._tables.clear(self.row, layer, self._dropped.get(layer, 0), self._entries))
        self._entries = 0
        self._held = 0
        self._tables.close_row(self.row)

    def blocks(self) -> list[int]:
        """Every block that the sequence holds."""
        held: list[int] = []
        for layer in self._owners:
            start = self._tables.start(self.row, layer)
            held.extend(self._tables.entries[start + self._dropped.get(layer, 0) : start + self._entries])
        return held


def blocks_at_most(geometry: CacheGeometry, plan: SharingPlan, depth: int, tokens: int, chunk_tokens: int) -> int:
    """The most blocks that a sequence of `tokens` tokens holds at any time, computed in chunks of at most `chunk_tokens`."""
    total = 0
    for layer in plan.owners(depth):
        window = geometry.layers[layer].window
        blocks = geometry.blocks_for(tokens)
        if window is not None:
            blocks = min(blocks, geometry.blocks_for(window - 1 + chunk_tokens) + 1)
        total += blocks
    return total
