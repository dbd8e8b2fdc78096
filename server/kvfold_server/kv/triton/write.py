"""The write kernel: new token rows into their slots."""

from __future__ import annotations

import triton
import triton.language as tl


# What differs from layer to layer and from step to step is not specialised on: the kernel would be compiled again.
@triton.jit(do_not_specialize=("base_offset", "token_count"))
def write_kernel(
    key: tl.tensor,
    key_token_stride: tl.tensor,
    key_head_stride: tl.tensor,
    key_stride: tl.tensor,
    value: tl.tensor,
    value_token_stride: tl.tensor,
    value_head_stride: tl.tensor,
    value_stride: tl.tensor,
    rows: tl.tensor,
    table: tl.tensor,
    bases: tl.tensor,
    base_offset: tl.tensor,
    slots: tl.tensor,
    token_sequences: tl.tensor,
    token_count: tl.tensor,
    kv_heads: tl.constexpr,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    key_block: tl.constexpr,
    value_block: tl.constexpr,
    tokens_per_block: tl.constexpr,
    tokens: tl.constexpr,
) -> None:
    """One program for `tokens` of the first `token_count` tokens.

    `key` [N, kv_heads, key_dim] and `value` [N, kv_heads, value_dim] with the given strides; `key_block` and
    `value_block` are powers of two that hold a token's heads. The others: see Arena and DeviceStep.
    """
    token = tl.program_id(0) * tokens + tl.arange(0, tokens)
    is_token = token < token_count
    slot = tl.load(slots + token, mask=is_token, other=0)
    sequence = tl.load(token_sequences + token, mask=is_token, other=0)
    base = tl.load(bases + base_offset + sequence)
    block = tl.load(table + base + slot // tokens_per_block)
    row_at = block.to(tl.int64) * tokens_per_block + slot % tokens_per_block
    row = rows + row_at[:, None] * (kv_heads * (key_dim + value_dim))

    at = tl.arange(0, key_block)[None, :]
    is_key = is_token[:, None] & (at < kv_heads * key_dim)
    source = key + token[:, None].to(tl.int64) * key_token_stride
    source += at // key_dim * key_head_stride + at % key_dim * key_stride
    tl.store(row + at, tl.load(source, mask=is_key), mask=is_key)

    at = tl.arange(0, value_block)[None, :]
    is_value = is_token[:, None] & (at < kv_heads * value_dim)
    source = value + token[:, None].to(tl.int64) * value_token_stride
    source += at // value_dim * value_head_stride + at % value_dim * value_stride
    tl.store(row + kv_heads * key_dim + at, tl.load(source, mask=is_value), mask=is_value)
