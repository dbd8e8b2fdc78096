from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold_scheduler.block_tables import BlockTables
from kvfold_scheduler.geometry import CacheGeometry, LayerKind
from kvfold_scheduler.layer_groups import blocks_at_most, layer_groups
from kvfold_scheduler.page_pool import PADDING_BLOCK, PagePool, PoolCorruptionError
from kvfold_scheduler.sequence_cache import SequenceCache
from kvfold_scheduler.sharing import SharingPlan

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 16
"""Tokens of a block."""


@dataclass
class Memory:
    """A pool and tables for two sequences of at most 160 tokens."""

    geometry: CacheGeometry
    plan: SharingPlan
    pool: PagePool
    tables: BlockTables

    def cache(self, depth: int = 0) -> SequenceCache:
        return SequenceCache(self.geometry, self.plan, self.pool, self.tables, depth)

    def entries(self, cache: SequenceCache, layer: int) -> list[bool]:
        """Which entries of a table name a block."""
        return [block != PADDING_BLOCK for block in self.tables.named(cache.row, layer, 0, 4)]


def memory_of(geometry: CacheGeometry, plan: SharingPlan, blocks: int) -> Memory:
    return Memory(geometry, plan, PagePool(blocks), BlockTables(2, geometry.layer_count, 10))


@pytest.fixture
def full(geometry_of: Callable[..., CacheGeometry], plan_of: Callable[..., SharingPlan]) -> Memory:
    """Four full layers of which two can be shared, 20 blocks."""
    return memory_of(geometry_of(None, None, None, None), plan_of(4, (3, 0), (2, 0)), 20)


@pytest.fixture
def mixed(geometry_of: Callable[..., CacheGeometry], plan_of: Callable[..., SharingPlan]) -> Memory:
    """A full layer, one with a window of 20 and one with a window of 33, 40 blocks."""
    return memory_of(geometry_of(None, 20, 33), plan_of(3), 40)


@pytest.mark.parametrize(("depth", "owners"), [(0, [0, 1, 2, 3]), (1, [0, 1, 2]), (2, [0, 1])])
def test_only_owner_layers_hold_blocks(full: Memory, depth: int, owners: list[int]) -> None:
    cache = full.cache(depth)
    assert cache.grow(SIZE + 1)
    for layer in range(4):
        assert full.entries(cache, layer) == [layer in owners] * 2 + [False] * 2
    assert cache.held_blocks == full.pool.held_count == 2 * len(owners)
    assert cache.held_bytes == 2 * len(owners) * 4096


def test_growth_within_the_last_block_takes_nothing(full: Memory) -> None:
    cache = full.cache()
    assert cache.grow(1)
    assert cache.token_capacity == SIZE
    assert cache.blocks_to_grow(SIZE) == 0
    assert cache.grow(SIZE)
    assert full.pool.held_count == 4
    assert cache.blocks_to_grow(SIZE + 1) == 4


def test_growth_that_the_pool_cannot_serve_changes_nothing(full: Memory) -> None:
    first, second = full.cache(), full.cache()
    assert first.grow(3 * SIZE)
    assert second.grow(SIZE)
    assert not second.grow(3 * SIZE)
    assert (second.token_capacity, second.held_blocks, full.pool.free_count) == (SIZE, 4, 4)
    assert second.grow(2 * SIZE)


def test_growth_beyond_the_tables_is_refused(full: Memory) -> None:
    with pytest.raises(ValueError, match="11 blocks"):
        full.cache(2).grow(10 * SIZE + 1)


def test_a_block_is_dropped_when_the_next_token_does_not_see_its_last_one(mixed: Memory) -> None:
    cache = mixed.cache()
    assert cache.grow(4 * SIZE)
    cache.drop_outside_windows(34)  # sees 15 to 34 in the window of 20
    assert mixed.entries(cache, 1) == [True] * 4
    cache.drop_outside_windows(35)  # sees 16 to 35
    assert mixed.entries(cache, 1) == [False, True, True, True]
    assert mixed.entries(cache, 2) == [True] * 4
    cache.drop_outside_windows(64)  # sees 45 to 64, and 32 to 64 in the window of 33
    assert mixed.entries(cache, 1) == mixed.entries(cache, 2) == [False, False, True, True]
    assert mixed.entries(cache, 0) == [True] * 4
    assert cache.held_blocks == mixed.pool.held_count == 8


def test_the_peak_stays_when_blocks_are_dropped(mixed: Memory) -> None:
    cache = mixed.cache()
    assert cache.grow(4 * SIZE)
    cache.drop_outside_windows(64)
    assert (cache.held_bytes, cache.held_peak_bytes) == (8 * 4096, 12 * 4096)


def test_release_gives_back_every_block_and_the_row(mixed: Memory) -> None:
    cache = mixed.cache()
    assert cache.grow(4 * SIZE)
    cache.drop_outside_windows(40)
    cache.release()
    assert (mixed.pool.held_count, mixed.tables.free_row_count) == (0, 2)
    assert not any(mixed.tables.entries)
    mixed.tables.check_integrity(held=0)


def test_a_second_release_is_an_error_and_harms_nobody(full: Memory) -> None:
    cache = full.cache()
    assert cache.grow(1)
    cache.release()
    successor = full.cache()
    assert successor.row == cache.row
    assert successor.grow(1)
    with pytest.raises(PoolCorruptionError, match="twice"):
        cache.release()
    successor.check_integrity()
    full.pool.check_integrity([successor.blocks()])
    full.tables.check_integrity(held=4)


def test_the_integrity_check_sees_a_missing_block(full: Memory) -> None:
    cache = full.cache()
    assert cache.grow(2 * SIZE)
    cache.check_integrity()
    full.tables.clear(cache.row, 1, 1, 2)
    with pytest.raises(PoolCorruptionError, match="no block"):
        cache.check_integrity()


windows = st.lists(st.none() | st.integers(1, 80), min_size=1, max_size=4)


@given(windows=windows, chunks=st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_what_is_held_never_exceeds_the_bound(windows: list[int | None], chunks: list[int]) -> None:
    kinds = tuple(LayerKind(window, "default", 1, 64, 64) for window in windows)
    geometry, plan = CacheGeometry(kinds, 2), SharingPlan(len(kinds))
    tables = BlockTables(1, len(kinds), geometry.blocks_for(sum(chunks)))
    cache = SequenceCache(geometry, plan, PagePool(10_000), tables, 0)
    tokens = 0
    for chunk in chunks:
        tokens += chunk
        assert cache.grow(tokens)
        bound = blocks_at_most(geometry, layer_groups(geometry, plan, 0), tokens, max(chunks))
        assert cache.held_peak_bytes <= bound * geometry.block_bytes
        cache.drop_outside_windows(tokens)


@given(windows=windows)
def test_the_bound_is_reached_by_decoding_past_every_alignment(windows: list[int | None]) -> None:
    kinds = tuple(LayerKind(window, "default", 1, 64, 64) for window in windows)
    geometry, plan = CacheGeometry(kinds, 2), SharingPlan(len(kinds))
    cache = SequenceCache(geometry, plan, PagePool(10_000), BlockTables(1, len(kinds), 20), 0)
    most = 80 + 2 * SIZE
    for tokens in range(1, most + 1):
        assert cache.grow(tokens)
        cache.drop_outside_windows(tokens)
    bound = blocks_at_most(geometry, layer_groups(geometry, plan, 0), most, 1)
    # The layers reach their peaks at different tokens, so only a single kind of layer reaches the sum.
    peaks = cache.held_peak_bytes // geometry.block_bytes
    assert peaks == bound if len(set(windows)) == 1 else peaks <= bound
