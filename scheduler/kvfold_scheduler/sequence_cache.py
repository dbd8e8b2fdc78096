"""The layer-blocks of one running sequence: reserving, growing, dropping what left a window, releasing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvfold_scheduler.layer_groups import layer_groups
from kvfold_scheduler.page_pool import PADDING_BLOCK, PoolCorruptionError

if TYPE_CHECKING:
    from kvfold_scheduler.block_tables import BlockTables, Row
    from kvfold_scheduler.geometry import CacheGeometry
    from kvfold_scheduler.page_pool import PagePool
    from kvfold_scheduler.sharing import SharingPlan


class SequenceCache:
    """Holds a row of the block tables and the blocks of each layer that is an owner at `depth`.

    Entries [first, entries) of a layer's table name blocks. `entries` is the same for all owner layers; `first` is
    above 0 in the layers of a sliding group once their oldest tokens have left the window.
    """

    def __init__(
        self, geometry: CacheGeometry, plan: SharingPlan, pool: PagePool, tables: BlockTables, depth: int
    ) -> None:
        self._geometry = geometry
        self._pool = pool
        self._tables = tables
        self.depth = depth
        self._owner_count = len(plan.owners(depth))
        self._groups = layer_groups(geometry, plan, depth)
        self.row: Row = tables.open_row()
        self._entries = 0
        self._first = [0] * len(self._groups)
        self._sliding = tuple(index for index, group in enumerate(self._groups) if group.window is not None)
        self._held = 0
        self._held_peak = 0
        self._released = False

    @property
    def held_blocks(self) -> int:
        """The blocks that the sequence holds now."""
        return self._held

    @property
    def held_bytes(self) -> int:
        """Bytes of the blocks that the sequence holds now."""
        return self._held * self._geometry.block_bytes

    @property
    def held_peak_bytes(self) -> int:
        """The most bytes that it held at any time."""
        return self._held_peak * self._geometry.block_bytes

    @property
    def token_capacity(self) -> int:
        """Tokens for which blocks are reserved; more of them need `grow`."""
        return self._entries * self._geometry.tokens_per_block

    def blocks_to_grow(self, tokens: int) -> int:
        """How many more blocks are needed to hold `tokens` tokens."""
        return max(0, self._geometry.blocks_for(tokens) - self._entries) * self._owner_count

    def grow(self, tokens: int) -> bool:
        """Reserves blocks for `tokens` tokens in all owner layers; False, and nothing changes, if the pool lacks them.

        Raises ValueError if the tables are too short for so many tokens.
        """
        entries = self._geometry.blocks_for(tokens)
        more = entries - self._entries
        if more <= 0:
            return True
        if entries > self._tables.blocks_per_layer:
            raise ValueError(
                f"{tokens} tokens need {entries} blocks a layer; the tables have {self._tables.blocks_per_layer}"
            )
        blocks = self._pool.allocate(more * self._owner_count)
        if blocks is None:
            return False
        taken = 0
        for group in self._groups:
            for layer in group.layers:
                self._tables.fill(self.row, layer, self._entries, blocks[taken : taken + more])
                taken += more
        self._entries = entries
        self._held += taken
        self._held_peak = max(self._held_peak, self._held)
        return True

    def drop_outside_windows(self, position: int) -> None:
        """Frees the blocks of sliding layers that no token from `position` onward can see."""
        for index in self._sliding:
            group = self._groups[index]
            stop = min(group.first_visible(position) // self._geometry.tokens_per_block, self._entries)
            if stop > self._first[index]:
                for layer in group.layers:
                    blocks = self._tables.clear(self.row, layer, self._first[index], stop)
                    self._pool.release(blocks)
                    self._held -= len(blocks)
                self._first[index] = stop

    def release(self) -> None:
        """Gives all blocks and the row back. Raises PoolCorruptionError on a second call: they may be another's."""
        if self._released:
            raise PoolCorruptionError(f"the sequence that was in row {self.row} was released twice")
        for first, group in zip(self._first, self._groups, strict=True):
            for layer in group.layers:
                self._pool.release(self._tables.clear(self.row, layer, first, self._entries))
        self._tables.close_row(self.row)
        self._held = 0
        self._released = True

    def blocks(self) -> list[int]:
        """Every block that the sequence holds."""
        held: list[int] = []
        for first, group in zip(self._first, self._groups, strict=True):
            for layer in group.layers:
                held.extend(self._tables.named(self.row, layer, first, self._entries))
        return held

    def check_integrity(self) -> None:
        """Raises PoolCorruptionError if the tables do not name as many blocks as the sequence believes to hold."""
        blocks = self.blocks()
        if len(blocks) != self._held:
            raise PoolCorruptionError(f"row {self.row} believes to hold {self._held} blocks, its tables {len(blocks)}")
        if PADDING_BLOCK in blocks:
            raise PoolCorruptionError(f"row {self.row} has no block for tokens that can be read")
