"""A runner without a model, for tests and simulations: hashes take the place of numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvfold_scheduler.block_tables import BlockTables
    from kvfold_scheduler.geometry import CacheGeometry
    from kvfold_scheduler.page_pool import PagePool
    from kvfold_scheduler.sequence import SequenceId
    from kvfold_scheduler.sharing import SharingPlan
    from kvfold_scheduler.step_plan import Chunk, StepPlan

POISON = -1
"""What free blocks contain, so that a stale table changes what is read."""


class HashRunner:
    """Computes plans as a transformer does: layer by layer, each token writes its KV and then reads what it may see.

    The next token is a hash of the KV that was read through the block tables, so it changes if a table is stale, a
    block has two writers or a layer reads the wrong owner. Equal tokens give equal hashes in every process.
    """

    def __init__(self, geometry: CacheGeometry, sharing: SharingPlan, pool: PagePool, tables: BlockTables) -> None:
        self._geometry = geometry
        self._sharing = sharing
        self._pool = pool
        self._tables = tables
        self._cells = [POISON] * ((pool.block_count + 1) * geometry.tokens_per_block)

    def execute(self, plan: StepPlan, tokens: Mapping[SequenceId, Sequence[int]]) -> dict[SequenceId, int]:
        """Computes a plan and returns the next token of each chunk that samples. `tokens` are the known ones."""
        self._poison_free_blocks()
        states = [
            [
                hash((position, tokens[chunk.sequence_id][position]))
                for position in range(chunk.start, chunk.start + chunk.count)
            ]
            for chunk in plan.chunks
        ]
        for layer in range(self._geometry.layer_count):
            for chunk, state in zip(plan.chunks, states, strict=True):
                if self._sharing.sources(chunk.depth)[layer] == layer:
                    self._write(chunk, layer, state)
            states = [self._attend(chunk, layer, state) for chunk, state in zip(plan.chunks, states, strict=True)]
        return {chunk.sequence_id: state[-1] for chunk, state in zip(plan.chunks, states, strict=True) if chunk.samples}

    def _poison_free_blocks(self) -> None:
        size = self._geometry.tokens_per_block
        for block in range(self._pool.block_count + 1):
            if self._pool.readers(block) == 0:
                self._cells[block * size : (block + 1) * size] = [POISON] * size

    def _write(self, chunk: Chunk, layer: int, state: list[int]) -> None:
        size = self._geometry.tokens_per_block
        table = self._tables.start(chunk.row, layer)
        for position, value in enumerate(state, chunk.start):
            block = self._tables.entries[table + position // size]
            self._cells[block * size + position % size] = hash((layer, value))

    def _attend(self, chunk: Chunk, layer: int, state: list[int]) -> list[int]:
        size = self._geometry.tokens_per_block
        window = self._geometry.layers[layer].window
        source = self._sharing.sources(chunk.depth)[layer]
        stop = chunk.start + chunk.count
        seen: list[int] = []
        for block in self._tables.named(chunk.row, source, 0, self._geometry.blocks_for(stop)):
            seen.extend(self._cells[block * size : (block + 1) * size])
        return [
            hash((value, *seen[0 if window is None else max(0, position + 1 - window) : position + 1]))
            for position, value in enumerate(state, chunk.start)
        ]
