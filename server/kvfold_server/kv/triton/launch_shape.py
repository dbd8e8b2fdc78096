"""How large the programs of the attention kernel are, from the model's heads and head dimensions."""

from __future__ import annotations

from dataclasses import dataclass

MIN_BLOCK = 16
"""Tensor cores multiply nothing smaller; smaller groups and head dimensions are padded."""

OPERAND_BYTES = 32 << 10
"""Of K and V in a tile, and of queries in a program. Two tiles are in flight while a third is computed: with the
queries, that stays under the 99 KiB of shared memory that a program gets on consumer GPUs, and in the registers."""

DECODE_SPLIT = 256
"""Slots of one program when a sequence decodes: few, so that one long sequence fills a GPU; with 8 KV heads, 4096
tokens are 128 programs. What these write and the merge reads is 3 % of the KV that they read, if groups have 4 heads.
"""

PREFILL_SPLIT = 4096
"""Many: tiles of queries fill the GPU, and a split writes as many fp32 rows as the tile has queries."""


@dataclass(frozen=True, slots=True)
class LaunchShape:
    """The sizes of one program.

    - `rows`: queries times their heads in a group, padded to a power of two. `tokens`: the queries among them.
    - `tile`: slots that are read at a time. `split`: slots that one program reads at most, a multiple of `tile`.
    - `warps`, `stages`: of 32 threads; tiles in flight.
    """

    rows: int
    tokens: int
    tile: int
    split: int
    warps: int
    stages: int = 3  # the block table one tile ahead of K and V, and these one ahead of the products


def padded(count: int) -> int:
    """The power of two, from MIN_BLOCK up, that holds `count`."""
    return max(MIN_BLOCK, 1 << (count - 1).bit_length())


def decode_shape(group: int, key_dim: int, value_dim: int, value_bytes: int) -> LaunchShape:
    """For sequences with one query: bound by memory, so bytes in flight count. A large group is as good as a chunk."""
    rows = padded(group)
    is_large = rows > 2 * MIN_BLOCK
    tile = _fitting(padded(key_dim) + padded(value_dim), value_bytes, at_most=64 if is_large else 128)
    return LaunchShape(rows=rows, tokens=1, tile=tile, split=DECODE_SPLIT, warps=8 if is_large else 4)


def prefill_shape(group: int, key_dim: int, value_dim: int, value_bytes: int) -> LaunchShape:
    """For chunks of prompts; bound by tensor cores, so that each tile of K and V meets as many queries as fit."""
    rows = _fitting(max(padded(key_dim), padded(value_dim)), value_bytes, at_most=128)
    rows = max(rows, padded(group))
    tile = _fitting(padded(key_dim) + padded(value_dim), value_bytes, at_most=64)
    return LaunchShape(rows=rows, tokens=rows // group, tile=tile, split=PREFILL_SPLIT, warps=8)


def _fitting(width: int, value_bytes: int, at_most: int) -> int:
    """How many rows of `width` values fit. fp32 counts double: the products split each number into two of tf32."""
    counted_bytes = value_bytes if value_bytes == 2 else 2 * value_bytes
    fitting = OPERAND_BYTES // (width * counted_bytes)
    return max(MIN_BLOCK, min(at_most, 1 << fitting.bit_length() - 1))
