"""The merge kernel: what the items of a tile found, weighed by the sums of their weights."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def merge_kernel(
    tiles: tl.tensor,
    split_values: tl.tensor,
    split_logsums: tl.tensor,
    out: tl.tensor,
    tokens: tl.constexpr,
    heads: tl.constexpr,
    value_dim: tl.constexpr,
    value_block: tl.constexpr,
    at_once: tl.constexpr,
) -> None:
    """One program for each token that a tile has room for, and each query head; `at_once` items are read at a time.

    `tiles`: see WorkList; the others as in attend_kernel.
    """
    tile = tl.program_id(0) // (tokens * heads)
    place = tl.program_id(0) % (tokens * heads)
    first_token = tl.load(tiles + 4 * tile)
    token_count = tl.load(tiles + 4 * tile + 1)
    first_item = tl.load(tiles + 4 * tile + 2)
    item_count = tl.load(tiles + 4 * tile + 3)
    if place // heads >= token_count:
        return

    value_at = tl.arange(0, value_block)
    highest = float("-inf")
    total = 0.0
    mixed = tl.zeros([value_block], tl.float32)
    for start in range(0, item_count, at_once):
        item = start + tl.arange(0, at_once)
        row = (first_item + item).to(tl.int64) * (tokens * heads) + place
        logsums = tl.load(split_logsums + row, mask=item < item_count, other=float("-inf"))
        values = tl.load(
            split_values + row[:, None] * value_dim + value_at[None, :],
            mask=(item[:, None] < item_count) & (value_at[None, :] < value_dim),
            other=0.0,
        )
        top = tl.maximum(highest, tl.max(logsums, 0))
        level = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp2(logsums - level)
        fade = tl.exp2(highest - level)
        total = total * fade + tl.sum(weights, 0)
        mixed = mixed * fade + tl.sum(weights[:, None] * values, 0)
        highest = top
    result = (mixed / total).to(out.dtype.element_ty)
    row = (first_token + place // heads).to(tl.int64) * heads + place % heads
    tl.store(out + row * value_dim + value_at, result, mask=value_at < value_dim)
