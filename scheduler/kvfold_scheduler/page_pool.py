"""The pool's ledger: which layer-blocks are free and how many readers each has. It moves no bytes."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, NewType

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

BlockId = NewType("BlockId", int)
"""The number of a layer-block in the arena. 0 is the padding block: never allocated, its bytes are zero."""

PADDING_BLOCK = BlockId(0)


class PoolCorruptionError(RuntimeError):
    """The ledger contradicts itself or a caller released what it does not hold: a bug, never a user's error."""


class PagePool:
    """`block_count` layer-blocks, numbered 1 to `block_count`, each free or held by one or more readers.

    Blocks that were freed last are allocated first: their memory is the most likely to be backed and in cache.
    """

    def __init__(self, block_count: int) -> None:
        if block_count < 1:
            raise ValueError("a pool needs at least one block")
        self.block_count = block_count
        self._free = array("i", range(block_count, 0, -1))
        self._readers = array("i", bytes(4 * (block_count + 1)))

    @property
    def free_count(self) -> int:
        """Blocks that can be allocated."""
        return len(self._free)

    @property
    def held_count(self) -> int:
        """Blocks with at least one reader."""
        return self.block_count - len(self._free)

    def allocate(self, count: int) -> array[int] | None:
        """Takes `count` blocks, each with one reader; None, and nothing changes, if there are not enough."""
        if count < 0:
            raise ValueError("cannot allocate a negative number of blocks")
        if count > len(self._free):
            return None
        start = len(self._free) - count
        blocks = self._free[start:]
        del self._free[start:]
        for block in blocks:
            self._readers[block] = 1
        return blocks

    def retain(self, blocks: Iterable[int]) -> None:
        """Adds a reader to each block. Raises PoolCorruptionError if one is free."""
        for block in blocks:
            if self._readers[block] == 0:
                raise PoolCorruptionError(f"block {block} is free and cannot get another reader")
            self._readers[block] += 1

    def release(self, blocks: Iterable[int]) -> list[int]:
        """Removes a reader from each block and returns those that became free. One without is a PoolCorruptionError."""
        freed = []
        for block in blocks:
            readers = self._readers[block] - 1
            if readers < 0:
                raise PoolCorruptionError(f"block {block} was released more often than it was taken")
            self._readers[block] = readers
            if readers == 0:
                freed.append(block)
        self._free.extend(freed)
        return freed

    def readers(self, block: int) -> int:
        """How many readers a block has; 0 if it is free."""
        return self._readers[block]

    def check_integrity(self, holders: Iterable[Sequence[int]]) -> None:
        """Recomputes every reader count from `holders`, one sequence of blocks a holder. Raises PoolCorruptionError."""
        expected = array("i", bytes(4 * (self.block_count + 1)))
        for blocks in holders:
            for block in blocks:
                if not 1 <= block <= self.block_count:
                    raise PoolCorruptionError(f"a table names block {block}, which does not exist")
                expected[block] += 1
        for block in range(1, self.block_count + 1):
            if expected[block] != self._readers[block]:
                raise PoolCorruptionError(
                    f"block {block} has {self._readers[block]} readers in the ledger, {expected[block]} in the tables"
                )
        if self._readers[PADDING_BLOCK] != 0:
            raise PoolCorruptionError("the padding block has a reader")
        free = sorted(self._free)
        if free != [block for block in range(1, self.block_count + 1) if self._readers[block] == 0]:
            raise PoolCorruptionError("the free list does not hold exactly the blocks without readers")
