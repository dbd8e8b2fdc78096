// Prefill: several query tokens of a sequence against one KV head, flash attention in tiles of slots.
//
//     query rows (token, head of the group) | K packed [dim][SPAN] | V packed [SPAN][dim]
//     for each tile of SPAN slots: pack K and V once; for each block of rows: logits, softmax weights, sums
//
// Tiles begin at multiples of SPAN slots and a row's arithmetic does not look at other rows, so a token's result does
// not depend on how its prompt was cut into chunks.
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
    return round_to_lines(prefill_tokens(group) * static_cast<int64_t>(sizeof(SlotRange))) +
           round_to_lines(rows * cache.key_dim * 4) + round_to_lines(cache.key_dim * SPAN * 4) +
           round_to_lines(cache.value_dim * SPAN * 4) + round_to_lines(rows * cache.value_dim * 4) +
           round_to_lines(rows * static_cast<int64_t>(sizeof(Running)));
}

// What a prefill task keeps: what each query sees, its queries and one tile, packed, and for each query row the
// weighted sum of values and the running softmax.
template <class Product>
struct PrefillState {
    using Element = typename Product::Element;

    int64_t group;  // query heads of the KV head: row r is head r % group of query r / group
    int64_t rows;
    int64_t depth;  // elements of a packed query
    SlotRange *visible;
    Element *queries;
    Element *keys;
    Element *values;
    float *sums;
    Running *running;
};

template <class Product>
inline PrefillState<Product> lay_out(const Call &call, const Task &task, char *scratch) {
    using Element = typename Product::Element;
    const Cache &cache = *call.cache;
    PrefillState<Product> state;
    state.group = call.heads / cache.kv_heads;
    state.rows = task.query_count * state.group;
    state.depth = cache.key_dim / Product::DEPTH;
    const int64_t padded_rows = round_to_blocks(state.rows);
    state.visible = take<SlotRange>(scratch, task.query_count);
    state.queries = take<Element>(scratch, padded_rows * state.depth);
    state.keys = take<Element>(scratch, state.depth * SPAN);
    state.values = take<Element>(scratch, cache.value_dim * SPAN / Product::DEPTH);
    state.sums = take<float>(scratch, padded_rows * cache.value_dim);
    state.running = take<Running>(scratch, state.rows);
    for (int64_t query = 0; query < task.query_count; ++query) {
        state.visible[query] = visible_slots(call.sequences[task.sequence], task.first_query + query, call.window);
    }
    for (int64_t i = state.rows * state.depth; i < padded_rows * state.depth; ++i) state.queries[i] = Element();
    for (int64_t i = 0; i < padded_rows * cache.value_dim; ++i) state.sums[i] = 0.0f;
    for (int64_t row = 0; row < state.rows; ++row) state.running[row] = {NO_LOGIT, 0.0f};
    return state;
}

// Takes the packed tile from `slot` on into the state of the rows.
template <class Product>
void attend_span(const Call &call, int64_t slot, const PrefillState<Product> &state) {
    using Element = typename Product::Element;
    const Cache &cache = *call.cache;
    alignas(64) float logits[BLOCK_ROWS][SPAN];
    alignas(64) typename Product::Weight weights[BLOCK_ROWS][SPAN] = {};
    float corrections[BLOCK_ROWS] = {};
    for (int64_t row = 0; row < state.rows; row += BLOCK_ROWS) {
        const int count = static_cast<int>(state.rows - row < BLOCK_ROWS ? state.rows - row : BLOCK_ROWS);
        const SlotRange first = state.visible[row / state.group];
        const SlotRange last = state.visible[(row + count - 1) / state.group];
        if (last.stop <= slot || first.first >= slot + SPAN) continue;
        const bool whole = last.first <= slot && first.stop >= slot + SPAN;
        multiply<Product>(state.queries + row * state.depth, state.depth, state.keys, SPAN, state.depth, logits[0],
                          nullptr);
        products_to_logits(call, logits[0], count * SPAN);
        for (int r = 0; r < count; ++r) {
            if (!whole) mask_logits(logits[r], slot, SPAN, state.visible[(row + r) / state.group]);
            corrections[r] = update(state.running[row + r], logits[r]);
            for (int i = 0; i < SPAN; i += LANES) store(weights[r] + i, load(logits[r] + i));
        }
        multiply<Product>(reinterpret_cast<const Element *>(weights[0]), SPAN / Product::DEPTH, state.values,
                          static_cast<int>(cache.value_dim), SPAN / Product::DEPTH, state.sums + row * cache.value_dim,
                          corrections);
    }
}

template <class Model, class Product>
void prefill(const Call &call, const Task &task, char *scratch) {
    const Cache &cache = *call.cache;
    const Sequence &sequence = call.sequences[task.sequence];
    const int32_t *table = block_table(cache, sequence.row, call.sources[task.sequence]);
    const int64_t group = call.heads / cache.kv_heads;
    const int64_t first_token = sequence.first_token + task.first_query;
    const int64_t first_head = task.kv_head * group;
    const PrefillState<Product> state = lay_out<Product>(call, task, scratch);
    for (int64_t row = 0; row < state.rows; ++row) {
        const int64_t token = first_token + row / group;
        const int64_t offset = token * call.query_token + (first_head + row % group) * call.query_head;
        Product::pack_query(reinterpret_cast<const Model *>(call.query) + offset, cache.key_dim,
                            state.queries + row * state.depth);
    }
    for (int64_t slot = task.slots.first / SPAN * SPAN; slot < task.slots.stop; slot += SPAN) {
        const char *rows[SPAN];
        find_rows(cache, table, slot, task.slots.stop, rows);
        Product::pack_keys(rows, key_offset(cache, task.kv_head), cache.key_dim, state.keys);
        Product::pack_values(rows, value_offset(cache, task.kv_head), cache.value_dim, state.values);
        attend_span(call, slot, state);
    }
    for (int64_t row = 0; row < state.rows; ++row) {
        write_output<Model, typename Product::Order>(call, first_token + row / group, first_head + row % group,
                                                     state.sums + row * cache.value_dim, state.running[row]);
    }
}

}  // namespace
}  // namespace kvfold
