from __future__ import annotations

from array import array
from pathlib import Path

import pytest

from kvfold_scheduler.block_tables import BlockTables
from kvfold_scheduler.page_pool import PADDING_BLOCK, PoolCorruptionError


def test_a_table_is_a_run_of_entries_by_row_and_layer() -> None:
    tables = BlockTables(row_count=3, layer_count=2, blocks_per_layer=4)
    rows = [tables.open_row() for _ in range(3)]
    for row in rows:
        for layer in range(2):
            tables.fill(row, layer, 1, array("i", [10 * row + layer + 1, 7]))
    assert tables.entries[:].tolist() == [
        entry for row in range(3) for layer in range(2) for entry in (0, 10 * row + layer + 1, 7, 0)
    ]


def test_clearing_empties_the_entries_and_returns_what_they_named() -> None:
    tables = BlockTables(1, 2, 4)
    row = tables.open_row()
    tables.fill(row, 0, 0, array("i", [1, 2, 3]))
    tables.fill(row, 1, 0, array("i", [4, 5, 6]))
    assert tables.clear(row, 0, 1, 3) == [2, 3]
    assert tables.named(row, 0, 0, 4) == [1, PADDING_BLOCK, PADDING_BLOCK, PADDING_BLOCK]
    assert tables.named(row, 1, 0, 3) == [4, 5, 6]


def test_a_row_has_one_occupant() -> None:
    tables = BlockTables(3, 1, 1)
    rows = {tables.open_row() for _ in range(3)}
    assert rows == {0, 1, 2}
    assert tables.free_row_count == 0
    with pytest.raises(IndexError):
        tables.open_row()


def test_a_row_given_back_can_be_taken_again_but_not_given_back_twice() -> None:
    tables = BlockTables(2, 1, 1)
    row = tables.open_row()
    tables.close_row(row)
    assert tables.free_row_count == 2
    with pytest.raises(PoolCorruptionError, match="twice"):
        tables.close_row(row)


def test_the_integrity_check_sees_a_stale_entry_and_a_missing_one() -> None:
    tables = BlockTables(2, 2, 2)
    row = tables.open_row()
    tables.fill(row, 1, 0, array("i", [3, 4]))
    tables.check_integrity(held=2)
    for wrong in (1, 3):
        with pytest.raises(PoolCorruptionError, match="name 2"):
            tables.check_integrity(held=wrong)


def test_tables_for_long_contexts_take_memory_only_where_they_are_written() -> None:
    resident = Path("/proc/self/statm")
    before = int(resident.read_text().split()[1])
    tables = BlockTables(row_count=256, layer_count=80, blocks_per_layer=8192)  # 640 MiB for contexts of 131,072 tokens
    row = tables.open_row()
    for layer in range(80):
        tables.fill(row, layer, 0, array("i", [1]))
    assert sum(tables.entries[::1024]) == 80, "reads an entry of every page of the mapping"
    pages = int(resident.read_text().split()[1]) - before
    assert pages < 2000  # 80 are written; the allocator of the interpreter takes some, too
