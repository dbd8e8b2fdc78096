from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvfold_scheduler.page_pool import PADDING_BLOCK, PagePool, PoolCorruptionError

if TYPE_CHECKING:
    from collections.abc import Callable


def taken(pool: PagePool, count: int) -> list[int]:
    blocks = pool.allocate(count)
    assert blocks is not None
    return blocks.tolist()


def test_blocks_are_distinct_and_never_the_padding_block() -> None:
    pool = PagePool(10)
    assert sorted(taken(pool, 4) + taken(pool, 6)) == list(range(1, 11))
    assert (pool.free_count, pool.held_count) == (0, 10)


def test_too_few_free_blocks_change_nothing() -> None:
    pool = PagePool(4)
    held = taken(pool, 3)
    assert pool.allocate(2) is None
    assert pool.free_count == 1
    pool.check_integrity([held])


def test_a_released_block_is_free_again_and_comes_back_first() -> None:
    pool = PagePool(10)
    held = taken(pool, 3)
    assert pool.release([held[1]]) == [held[1]]
    assert taken(pool, 1) == [held[1]]


def test_a_block_is_free_when_its_last_reader_releases_it() -> None:
    pool = PagePool(2)
    held = taken(pool, 1)
    pool.retain(held)
    assert pool.readers(held[0]) == 2
    assert pool.release(held) == []
    pool.check_integrity([held])
    assert pool.release(held) == held
    assert pool.free_count == 2


def test_a_block_cannot_be_released_twice() -> None:
    pool = PagePool(2)
    held = taken(pool, 1)
    pool.release(held)
    with pytest.raises(PoolCorruptionError, match="more often"):
        pool.release(held)


def test_the_padding_block_cannot_be_released() -> None:
    with pytest.raises(PoolCorruptionError):
        PagePool(2).release([PADDING_BLOCK])


def test_a_free_block_cannot_get_a_reader() -> None:
    with pytest.raises(PoolCorruptionError, match="free"):
        PagePool(2).retain([1])


def leak(pool: PagePool, held: list[int]) -> list[list[int]]:
    return [held[1:]]


def share_without_retaining(pool: PagePool, held: list[int]) -> list[list[int]]:
    return [held, held[:1]]


def keep_after_release(pool: PagePool, held: list[int]) -> list[list[int]]:
    pool.release(held[:1])
    return [held]


def name_a_block_that_does_not_exist(pool: PagePool, held: list[int]) -> list[list[int]]:
    return [[*held, pool.block_count + 1]]


def name_the_padding_block(pool: PagePool, held: list[int]) -> list[list[int]]:
    return [[*held, PADDING_BLOCK]]


@pytest.mark.parametrize(
    "damage",
    [leak, share_without_retaining, keep_after_release, name_a_block_that_does_not_exist, name_the_padding_block],
)
def test_the_integrity_check_sees(damage: Callable[[PagePool, list[int]], list[list[int]]]) -> None:
    pool = PagePool(6)
    held = taken(pool, 3)
    pool.check_integrity([held])
    with pytest.raises(PoolCorruptionError):
        pool.check_integrity(damage(pool, held))


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        PagePool(0)
    with pytest.raises(ValueError, match="negative"):
        PagePool(1).allocate(-1)
