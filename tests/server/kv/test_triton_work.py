"""How the work of a step is cut for the programs of the triton backend."""

from __future__ import annotations

import numpy as np
import pytest

from kvfold_server.kv.triton.launch_shape import decode_shape, prefill_shape
from kvfold_server.kv.triton.layer_slots import LayerSlots
from kvfold_server.kv.triton.work import cut_tiles, make_work

LENGTHS = np.array([5, 300, 33, 1000, 64])
QUERIES = np.array([5, 1, 33, 70, 1])
STARTS = np.concatenate(([0], np.cumsum(QUERIES)))


@pytest.mark.parametrize("window", [None, 1, 40, 5000])
@pytest.mark.parametrize("split", [32, 256, 4096])
def test_every_slot_that_a_tile_sees_is_in_exactly_one_item(window: int | None, split: int) -> None:
    own = np.concatenate([np.arange(n - q, n) for n, q in zip(LENGTHS, QUERIES, strict=True)])
    first = None if window is None else np.maximum(0, own - window + 1)
    tiles = cut_tiles(STARTS, np.array([0, 2, 3, 4]), tokens=16)
    work = make_work(tiles, LayerSlots(own, first), split)
    assert sum(tile_items for *_, tile_items in work.tiles) == len(work.items)
    for (sequence, first_token, tokens), (_, _, first_item, item_count) in zip(tiles, work.tiles, strict=True):
        items = work.items[first_item : first_item + item_count]
        assert (items[:, :3] == (sequence, first_token, tokens)).all()
        assert (items[:, 3] % split == 0).all()
        covered = [slot for start in items[:, 3] for slot in range(start, start + split)]
        assert len(set(covered)) == len(covered)
        last = own[first_token + tokens - 1]
        seen_first = 0 if first is None else first[first_token]
        assert covered[0] <= seen_first < covered[0] + split
        assert covered[-1] - split < last <= covered[-1]


def test_tiles_hold_every_token_of_their_sequences_once() -> None:
    tiles = cut_tiles(STARTS, np.array([0, 2, 3]), tokens=16)
    tokens = [(sequence, token) for sequence, first, count in tiles for token in range(first, first + count)]
    assert tokens == [(sequence, token) for sequence in (0, 2, 3) for token in range(*STARTS[sequence : sequence + 2])]
    assert tiles[:, 2].max() <= 16


@pytest.mark.parametrize("value_bytes", [2, 4])
@pytest.mark.parametrize(
    "dims", [(16, 16), (20, 12), (64, 64), (80, 80), (128, 128), (192, 128), (256, 256), (512, 512)]
)
@pytest.mark.parametrize("group", [1, 3, 4, 8, 16, 71])
def test_programs_are_of_sizes_that_triton_takes(group: int, dims: tuple[int, int], value_bytes: int) -> None:
    for shape in (decode_shape(group, *dims, value_bytes), prefill_shape(group, *dims, value_bytes)):
        assert shape.tokens >= 1
        assert shape.tokens * group <= shape.rows
        assert shape.split % shape.tile == 0
        for size in (shape.rows, shape.tile):
            assert size >= 16
            assert size & (size - 1) == 0
