// Prefill: several query tokens of a sequence against one KV head, flash attention in tiles of slots.
//
//     query rows (token, head of the group) | K packed [dim][SPAN] | V packed [SPAN][dim]
//     for each tile of SPAN slots: pack K and V once; for each block of rows: logits, softmax weights, sums
//
// Tiles begin at multiples of SPAN slots and a row's arithmetic does not look at other rows, so a token's result does not
// depend on how its prompt was cut into chunks.
#pragma once

#include "product.h"
#ifdef __AVX512BF16__
#include "product_bf16.h"
#endif
#include "scratch.h"

namespace kvfold {
namespace {

// The rows of SPAN slots from `slot` on; null from `stop` on.
inline void find_rows(const Cache &cache, const int32_t *table, int64_t slot, int64_t stop, const char **rows) {
    for (int i = 0; i < SPAN; ++i) rows[i] = slot + i < stop ? slot_row(cache, table, slot + i) : nullptr;
}

// Products run on whole blocks of rows; those behind the last query are zero, and their results go nowhere.
inline int64_t round_to_blocks(int64_t rows) { return (rows + BLOCK_ROWS - 1) / BLOCK_ROWS * BLOCK_ROWS; }

// Scratch of a prefill task, enough for every product.
inline int64_t prefill_scratch_bytes(const Cache &cache, int64_t heads) {
    const int64_t group = heads / cache.kv_heads;
    const int64_t rows = round_to_blocks(prefill_tokens(group) * group);
    return round_to_lines(rows * cache.key_dim * 4) + round_to_lines(cache.key_dim * SPAN * 4) +
           round_to_lines(cache.value_dim * SPAN * 4) + round_to_lines(rows * cache.value_dim * 4) +
           round_to_lines(rows * static_cast<int64_t>(sizeof(Running)));
}

template <class Model, class Product>
void prefill(const Call &call, const Task &task, char *scratch) {
    using Element = typename Product::Element;
    const Cache &cache = *call.cache;
    const Sequence &sequence = call.sequences[task.sequence];
    const int32_t *table = block_table(cache, sequence.row, call.sources[task.sequence]);
    const int64_t group = call.heads / cache.kv_heads;
    const int64_t rows = task.query_count * group;
    const int64_t depth = cache.key_dim / Product::DEPTH;
    const int64_t first_token = sequence.first_token + task.first_query;
    const int64_t first_head = task.first_head * group;
    const int64_t padded_rows = round_to_blocks(rows);
    Element *queries = take<Element>(scratch, padded_rows * depth);
    Element *keys = take<Element>(scratch, depth * SPAN);
    Element *values = take<Element>(scratch, cache.value_dim * SPAN / Product::DEPTH);
    float *sums = take<float>(scratch, padded_rows * cache.value_dim);
    Running *running = take<Running>(scratch, rows);

    for (int64_t row = 0; row < rows; ++row) {
        const Model *query = reinterpret_cast<const Model *>(call.query) + (first_token + row / group) * call.query_token +
                             (first_head + row % group) * call.query_head;
        Product::pack_query(query, cache.key_dim, queries + row * depth);
        running[row] = {NO_LOGIT, 0.0f};
    }
    for (int64_t i = rows * depth; i < padded_rows * depth; ++i) queries[i] = Element();
    for (int64_t i = 0; i < padded_rows * cache.value_dim; ++i) sums[i] = 0.0f;
    alignas(64) float logits[BLOCK_ROWS][SPAN];
    alignas(64) typename Product::Weight weights[BLOCK_ROWS][SPAN] = {};
    float corrections[BLOCK_ROWS] = {};

    for (int64_t slot = task.slots.first / SPAN * SPAN; slot < task.slots.stop; slot += SPAN) {
        const char *slot_rows[SPAN];
        find_rows(cache, table, slot, task.slots.stop, slot_rows);
        Product::pack_keys(slot_rows, key_offset(cache, task.first_head), cache.key_dim, keys);
        Product::pack_values(slot_rows, value_offset(cache, task.first_head), cache.value_dim, values);
        for (int64_t row = 0; row < rows; row += BLOCK_ROWS) {
            const int count = static_cast<int>(rows - row < BLOCK_ROWS ? rows - row : BLOCK_ROWS);
            const SlotRange first = visible_slots(sequence, task.first_query + row / group, call.window);
            const SlotRange last = visible_slots(sequence, task.first_query + (row + count - 1) / group, call.window);
            if (last.stop <= slot || first.first >= slot + SPAN) continue;
            const bool whole = last.first <= slot && first.stop >= slot + SPAN;
            multiply<Product>(queries + row * depth, depth, keys, SPAN, depth, logits[0], nullptr);
            products_to_logits(call, logits[0], count * SPAN);
            for (int r = 0; r < count; ++r) {
                if (!whole) {
                    const SlotRange visible = visible_slots(sequence, task.first_query + (row + r) / group, call.window);
                    mask_logits(logits[r], slot, SPAN, visible);
                }
                corrections[r] = update(running[row + r], logits[r], SPAN);
                for (int i = 0; i < SPAN; i += LANES) store(weights[r] + i, load(logits[r] + i));
            }
            multiply<Product>(reinterpret_cast<const Element *>(weights[0]), SPAN / Product::DEPTH, values,
                              cache.value_dim, SPAN / Product::DEPTH, sums + row * cache.value_dim, corrections);
        }
    }

    for (int64_t row = 0; row < rows; ++row) {
        write_output<Model, typename Product::Order>(call, first_token + row / group, first_head + row % group,
                                                     sums + row * cache.value_dim, running[row]);
    }
}

}  // namespace
}  // namespace kvfold
