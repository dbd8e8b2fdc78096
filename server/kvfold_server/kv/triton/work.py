"""The work of one step: tiles of queries, and items, each of which is one tile and one split of the slots it sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from kvfold_server.kv.triton.layer_slots import LayerSlots
    from kvfold_server.kv.triton.upload import IntArray


@dataclass(frozen=True, slots=True)
class WorkList:
    """What the kernels of one layer go through.

    - `items` [I, 4]: sequence, first token of the tile in the batch, tokens of the tile, first slot of the split.
    - `tiles` [T, 4]: first token, tokens, first item, items. The items of a tile stand side by side.
    """

    items: IntArray
    tiles: IntArray


def cut_tiles(query_starts: IntArray, members: IntArray, tokens: int) -> IntArray:
    """Cuts the tokens of some sequences into tiles [T, 3]: sequence, first token, tokens (at most `tokens`)."""
    starts, stops = query_starts[members], query_starts[members + 1]
    tile_counts = -(-(stops - starts) // tokens)
    owner = np.repeat(np.arange(len(members)), tile_counts)
    first = starts[owner] + _index_within(tile_counts) * tokens
    return np.stack((members[owner], first, np.minimum(tokens, stops[owner] - first)), axis=1)


def make_work(tiles: IntArray, slots: LayerSlots, split: int) -> WorkList:
    """Cuts what each tile sees into splits. Splits begin at multiples of `split`."""
    sequence, first_token, count = tiles.T
    last_slot = slots.own[first_token + count - 1]
    first_split = np.zeros_like(last_slot) if slots.first is None else slots.first[first_token] // split
    split_counts = last_slot // split - first_split + 1
    tile = np.repeat(np.arange(len(tiles)), split_counts)
    first_slot = (first_split[tile] + _index_within(split_counts)) * split
    first_item = np.cumsum(split_counts) - split_counts
    return WorkList(
        items=np.stack((sequence[tile], first_token[tile], count[tile], first_slot), axis=1),
        tiles=np.stack((first_token, count, first_item, split_counts), axis=1),
    )


def _index_within(counts: IntArray) -> IntArray:
    """0 .. count - 1 for each count, one after the other."""
    index: IntArray = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return index
