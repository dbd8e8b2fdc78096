"""The pool's bookkeeping against a naive model that copies everything and knows no blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from kvfold_scheduler.block_tables import BlockTables
from kvfold_scheduler.geometry import CacheGeometry, LayerKind
from kvfold_scheduler.page_pool import PagePool
from kvfold_scheduler.sequence_cache import SequenceCache
from kvfold_scheduler.sharing import SharingEntry, SharingPlan

SIZE = 16
"""Tokens of a block."""

CONTEXT = 200
"""Tokens that a table has room for."""

MODELS = {
    "full": ((None,) * 5, ((4, 0), (2, 1), (3, 0))),
    "sliding and full": ((None, 20, 20, None, 7, 20), ((2, 1), (3, 0), (5, 1))),
    "sliding only": ((16, 1, 33, 16), ((3, 0),)),
}
"""Windows of the layers and (sharer, owner) pairs."""


@dataclass
class Naive:
    """What one sequence should read: every layer's tokens in a list; and the indices of the blocks that they take."""

    depth: int
    tokens: dict[int, list[int]]
    blocks: dict[int, set[int]]
    dropped_before: dict[int, int] = field(default_factory=dict)
    reserved: int = 0

    @property
    def length(self) -> int:
        """Tokens that were written."""
        return len(next(iter(self.tokens.values())))


class PoolBookkeeping(RuleBasedStateMachine):
    """Sequences of mixed depths grow, are written, drop what left a window and go; nobody may read another's tokens."""

    caches = Bundle("caches")

    @initialize(model=st.sampled_from(sorted(MODELS)), block_count=st.integers(1, 120), rows=st.integers(1, 5))
    def build(self, model: str, block_count: int, rows: int) -> None:
        windows, pairs = MODELS[model]
        kinds = tuple(LayerKind(window, "default", 1, 64, 64) for window in windows)
        self.geometry = CacheGeometry(kinds, 2)
        self.plan = SharingPlan(len(kinds), tuple(SharingEntry(*pair) for pair in pairs))
        self.pool = PagePool(block_count)
        self.tables = BlockTables(rows, len(kinds), self.geometry.blocks_for(CONTEXT))
        self.cells: dict[tuple[int, int], int] = {}
        self.naive: dict[SequenceCache, Naive] = {}
        self.written = 0

    @precondition(lambda self: self.tables.free_row_count > 0)
    @rule(target=caches, depth=st.integers(0, 3))
    def open(self, depth: int) -> SequenceCache:
        depth = min(depth, self.plan.max_depth)
        cache = SequenceCache(self.geometry, self.plan, self.pool, self.tables, depth)
        owners = self._owners(depth)
        self.naive[cache] = Naive(depth, {layer: [] for layer in owners}, {layer: set() for layer in owners})
        return cache

    @rule(cache=caches, count=st.integers(1, 60))
    def append(self, cache: SequenceCache, count: int) -> None:
        """Reserves and writes the next tokens, as a committed chunk does."""
        naive = self.naive[cache]
        start = naive.length
        if start + count > CONTEXT or not self._reserve(cache, start + count):
            return
        for layer, tokens in naive.tokens.items():
            for position in range(start, start + count):
                self.written += 1
                tokens.append(self.written)
                self.cells[self._cell(cache, layer, position)] = self.written

    @rule(cache=caches, count=st.integers(0, 60))
    def reserve(self, cache: SequenceCache, count: int) -> None:
        """Reserves blocks that are not written, as a chunk does that is never committed."""
        self._reserve(cache, min(CONTEXT, self.naive[cache].length + count))

    @rule(cache=caches)
    def drop(self, cache: SequenceCache) -> None:
        naive = self.naive[cache]
        position = naive.length
        cache.drop_outside_windows(position)
        for layer, blocks in naive.blocks.items():
            window = self.geometry.layers[layer].window
            if window is not None:
                seen = position - window + 1
                naive.blocks[layer] = {block for block in blocks if (block + 1) * SIZE > seen}
                naive.dropped_before[layer] = max(0, seen)

    @rule(cache=consumes(caches))
    def release(self, cache: SequenceCache) -> None:
        cache.release()
        del self.naive[cache]

    @invariant()
    def every_sequence_reads_its_own_tokens(self) -> None:
        for cache, naive in self.naive.items():
            length = naive.length
            for layer in range(self.geometry.layer_count):
                source = self._source(naive.depth, layer)
                positions = range(min(length, naive.dropped_before.get(source, 0)), length)
                read = [self.cells[self._cell(cache, source, position)] for position in positions]
                assert read == naive.tokens[source][positions.start :]

    @invariant()
    def the_ledger_counts_what_is_held(self) -> None:
        held = {cache: sum(map(len, naive.blocks.values())) for cache, naive in self.naive.items()}
        assert {cache: cache.held_blocks for cache in self.naive} == held
        assert self.pool.free_count == self.pool.block_count - sum(held.values())
        assert self.tables.free_row_count == self.tables.row_count - len(held)

    @invariant()
    def everything_is_whole(self) -> None:
        for cache in self.naive:
            cache.check_integrity()
        self.pool.check_integrity([cache.blocks() for cache in self.naive])
        self.tables.check_integrity(sum(cache.held_blocks for cache in self.naive))

    def teardown(self) -> None:
        for cache in self.naive:
            cache.release()
        assert self.pool.free_count == self.pool.block_count
        assert self.tables.free_row_count == self.tables.row_count
        assert not any(self.tables.entries)

    def _reserve(self, cache: SequenceCache, tokens: int) -> bool:
        """Grows the cache and the model; whether it may is the model's to say."""
        naive = self.naive[cache]
        last = -(-tokens // SIZE)
        new = {layer: set(range(naive.reserved, last)) for layer in naive.blocks}
        fits = sum(map(len, new.values())) <= self.pool.block_count - sum(
            len(blocks) for other in self.naive.values() for blocks in other.blocks.values()
        )
        assert cache.grow(tokens) == fits
        if fits:
            for layer, blocks in new.items():
                naive.blocks[layer] |= blocks
            naive.reserved = max(last, naive.reserved)
        return fits

    def _owners(self, depth: int) -> set[int]:
        return set(range(self.geometry.layer_count)) - {entry.sharer for entry in self.plan.entries[:depth]}

    def _source(self, depth: int, layer: int) -> int:
        return {entry.sharer: entry.owner for entry in self.plan.entries[:depth]}.get(layer, layer)

    def _cell(self, cache: SequenceCache, layer: int, position: int) -> tuple[int, int]:
        return self.tables.entries[self.tables.start(cache.row, layer) + position // SIZE], position % SIZE


TestPoolBookkeeping = PoolBookkeeping.TestCase
