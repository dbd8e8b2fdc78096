"""The attention kernel: a tile of queries against a run of slots, which are found through a block table.

One program takes one item of work at one KV head:

    rows      token 0, query heads 0 .. group - 1 of the KV head | token 1, ... |    (decode: one token, then padding)
    columns   slots [first_slot, first_slot + split), as far as the queries see them, `tile` at a time

The query heads of a KV head stand in one matrix, so that K and V are read once for all of them and the products run on
tensor cores. Splits and tiles begin at multiples of their sizes: what a query gets does not depend on what else is in
the batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

IS_INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether Triton's interpreter runs the kernels of this process: that is settled when they are imported."""


# These differ from layer to layer and from step to step; specialised on them, the kernel would be compiled again in the
# midst of service.
@triton.jit(do_not_specialize=("base_offset", "is_split"))
def attend_kernel(
    query: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    rows: tl.tensor,
    table: tl.tensor,
    bases: tl.tensor,
    base_offset: tl.tensor,
    slots: tl.tensor,
    first_slots: tl.tensor,
    items: tl.tensor,
    sinks: tl.tensor,
    out: tl.tensor,
    split_values: tl.tensor,
    split_logsums: tl.tensor,
    is_split: tl.tensor,
    logit_scale: tl.tensor,
    cap_scale: tl.tensor,
    is_softcapped: tl.constexpr,
    kv_heads: tl.constexpr,
    group: tl.constexpr,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    key_block: tl.constexpr,
    value_block: tl.constexpr,
    tokens_per_block: tl.constexpr,
    row_count: tl.constexpr,
    tokens: tl.constexpr,
    tile: tl.constexpr,
    split: tl.constexpr,
    widens: tl.constexpr,
) -> None:
    """Attends for the items of a WorkList; one program for each item and KV head.

    - `query` [N, heads, key_dim] with the given strides, the last one 1. `out` [N, heads, value_dim].
    - `rows`: see Arena. `table`, `bases`, `slots` and `first_slots` (None: no window): see DeviceStep.
    - `items`: see WorkList. If `is_split` is 1, `split_values` [I, tokens, heads, value_dim] and `split_logsums`
      [I, tokens, heads], fp32, take what each item finds, the sum of its weights as a logarithm to base 2. Else the
      result goes to `out`.
    - Logits are q . k * logit_scale, to base 2; softcapped, cap_scale * tanh(ln 2 / 2 * that).
    - `sinks` [heads] to base e, or None.
    - `widens`: multiply in fp32, for Triton's interpreter, which takes the bits of bf16 numbers for integers.
    """
    item = tl.program_id(0) // kv_heads
    kv_head = tl.program_id(0) % kv_heads
    sequence = tl.load(items + 4 * item)
    first_token = tl.load(items + 4 * item + 1)
    token_count = tl.load(items + 4 * item + 2)
    first_slot = tl.load(items + 4 * item + 3)
    base = tl.load(bases + base_offset + sequence)

    row = tl.arange(0, row_count)
    token = first_token + row // group
    head = kv_head * group + row % group
    is_query = row < token_count * group
    own_slot = tl.load(slots + token, mask=is_query, other=0)
    low = 0
    if first_slots is not None:
        first_seen = tl.load(first_slots + token, mask=is_query, other=0)
        low = tl.load(first_slots + first_token)
    high = tl.minimum(first_slot + split, tl.load(slots + first_token + token_count - 1) + 1)

    key_at = tl.arange(0, key_block)
    value_at = tl.arange(0, value_block)
    q = tl.load(
        query + token[:, None].to(tl.int64) * token_stride + head[:, None] * head_stride + key_at[None, :],
        mask=is_query[:, None] & (key_at[None, :] < key_dim),
        other=0.0,
    )
    if widens:
        q = q.to(tl.float32)
    highest = tl.full([row_count], float("-inf"), tl.float32)
    total = tl.zeros([row_count], tl.float32)
    mixed = tl.zeros([row_count, value_block], tl.float32)
    if sinks is not None:  # noqa: SIM102 - decided when the kernel is compiled
        # The sink takes part once: in the item where the tile's slots begin.
        if first_slot <= low:
            highest = tl.load(sinks + head, mask=is_query, other=0.0).to(tl.float32) * 1.4426950408889634
            total = tl.full([row_count], 1.0, tl.float32)

    begin = tl.maximum(first_slot, low)
    for start in range(begin // tile * tile, high, tile):
        slot = start + tl.arange(0, tile)
        is_held = (slot >= begin) & (slot < high)
        block = tl.load(table + base + slot // tokens_per_block, mask=is_held, other=0)
        row_at = block.to(tl.int64) * tokens_per_block + slot % tokens_per_block
        kv = rows + row_at[:, None] * (kv_heads * (key_dim + value_dim))
        k = tl.load(
            kv + kv_head * key_dim + key_at[None, :],
            mask=is_held[:, None] & (key_at[None, :] < key_dim),
            other=0.0,
        )
        v = tl.load(
            kv + kv_heads * key_dim + kv_head * value_dim + value_at[None, :],
            mask=is_held[:, None] & (value_at[None, :] < value_dim),
            other=0.0,
        )
        if widens:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        logits = tl.dot(q, tl.trans(k), input_precision="tf32x3") * logit_scale
        if is_softcapped:
            logits = cap_scale - 2.0 * cap_scale / (1.0 + tl.exp2(logits))  # cap_scale * tanh, in one exponential
        # For a query's row, what it sees is held: tiles lie within the split, and `high` and `low` bound its slots.
        is_seen = slot[None, :] <= own_slot[:, None]
        if first_slots is not None:
            is_seen &= slot[None, :] >= first_seen[:, None]
        logits = tl.where(is_seen, logits, float("-inf"))

        top = tl.maximum(highest, tl.max(logits, 1))
        level = tl.where(top == float("-inf"), 0.0, top)  # rows that have seen nothing yet
        weights = tl.exp2(logits - level[:, None])
        fade = tl.exp2(highest - level)
        total = total * fade + tl.sum(weights, 1)
        mixed = mixed * fade[:, None] + tl.dot(
            weights.to(rows.dtype.element_ty).to(v.dtype), v, input_precision="tf32x3"
        )
        highest = top

    heads = kv_heads * group
    total = tl.where(total == 0.0, 1.0, total)  # padding, and rows to which this split shows nothing
    mixed = mixed / total[:, None]
    is_result = is_query[:, None] & (value_at[None, :] < value_dim)
    if is_split == 1:
        place = (item.to(tl.int64) * tokens + row // group) * heads + head
        tl.store(split_values + place[:, None] * value_dim + value_at[None, :], mixed, mask=is_result)
        tl.store(split_logsums + place, highest + tl.log2(total), mask=is_query)
    else:
        place = token.to(tl.int64) * heads + head
        tl.store(out + place[:, None] * value_dim + value_at[None, :], mixed.to(out.dtype.element_ty), mask=is_result)
