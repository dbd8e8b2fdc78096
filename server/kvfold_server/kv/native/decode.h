// Decode: one query token over a run of slots, reading each row of the arena once.
//
//     for each tile of slots, for each KV head:  logits of its query heads | softmax weights | weighted values
//                                                while the same rows of the next tile are being fetched
//
// Memory bounds it: the work on a tile hides the fetching of the next one.
#pragma once

#include "finish.h"
#include "rows.h"
#ifdef __AVX512BF16__
#include "rows_bf16.h"
#endif

namespace kvfold {
namespace {

constexpr int HEADS_AT_ONCE = 4;  // query heads of a KV head that share the reading of a row

// What a decode task keeps for its query heads: prepared queries, weighted sums of values, and running softmaxes.
template <class Query>
struct DecodeState {
    Query *queries;
    float *sums;
    Running *running;
};

template <class Model, class Page>
int64_t decode_scratch_bytes(const Cache &cache, int64_t heads) {
    using Product = RowProduct<Model, Page>;
    const auto element = static_cast<int64_t>(sizeof(typename Product::Query));
    return round_to_lines(heads * Product::query_size(cache.key_dim) * element) +
           round_to_lines(heads * cache.value_dim * 4) + round_to_lines(heads * static_cast<int64_t>(sizeof(Running)));
}

// Takes values in rows [0, stop) into CHUNKS chunks, from dimension `d` on, of the sums of HEADS query heads, `dim`
// floats each.
template <class Sum, int CHUNKS, int HEADS>
inline void add_values(const Piece &values, int stop, int64_t d, int64_t dim,
                       const typename Sum::Weight (&weights)[HEADS][GROUP], const float *corrections, float *sums) {
    Vec total[HEADS][CHUNKS][CHUNK_VECS];
    for (int h = 0; h < HEADS; ++h) {
        const Vec correction = set1(corrections[h]);
        for (int c = 0; c < CHUNKS; ++c) {
            for (int v = 0; v < CHUNK_VECS; ++v) {
                total[h][c][v] = mul(correction, load(sums + h * dim + d + c * CHUNK + v * LANES));
            }
        }
    }
    Sum::template add<HEADS, CHUNKS>(values, stop, d, weights, total);
    for (int h = 0; h < HEADS; ++h) {
        for (int c = 0; c < CHUNKS; ++c) {
            for (int v = 0; v < CHUNK_VECS; ++v) store(sums + h * dim + d + c * CHUNK + v * LANES, total[h][c][v]);
        }
    }
}

// Takes a tile into the state of HEADS query heads of one KV head; `head` is the first of them.
template <class Model, class Page, int HEADS, class State>
[[gnu::noinline]] void attend_heads(const Call &call, const Tile &tile, const Piece &keys, const Piece &values,
                                    int64_t head, const State &state) {
    using Product = RowProduct<Model, Page>;
    using Sum = ValueSum<Model, Page>;
    const Cache &cache = *call.cache;
    alignas(64) float logits[HEADS][GROUP];
    alignas(64) typename Sum::Weight weights[HEADS][GROUP];
    float corrections[HEADS];

    Product::template multiply<HEADS>(state.queries + head * Product::query_size(cache.key_dim), cache.key_dim, keys,
                                      logits);
    for (int h = 0; h < HEADS; ++h) {
        products_to_logits(call, logits[h], GROUP);
        if (!tile.is_whole()) mask_logits(logits[h], 0, GROUP, tile.seen);
        corrections[h] = update(state.running[head + h], logits[h]);
        for (int t = 0; t < GROUP; t += LANES) store(weights[h] + t, load(logits[h] + t));
    }
    const int stop = static_cast<int>(tile.seen.stop);
    const int64_t dim = cache.value_dim;
    float *sums = state.sums + head * dim;
    int64_t d = 0;
    for (; d + ACCUMULATED_CHUNKS * CHUNK <= dim; d += ACCUMULATED_CHUNKS * CHUNK) {
        add_values<Sum, ACCUMULATED_CHUNKS>(values, stop, d, dim, weights, corrections, sums);
    }
    for (; d + CHUNK <= dim; d += CHUNK) {
        add_values<Sum, 1>(values, stop, d, dim, weights, corrections, sums);
    }
}

// The same for `count` query heads, at most HEADS_AT_ONCE.
template <class Model, class Page, class State>
inline void attend_heads(const Call &call, const Tile &tile, const Piece &keys, const Piece &values, int64_t head,
                         int64_t count, const State &state) {
    switch (count) {
        case 1: return attend_heads<Model, Page, 1>(call, tile, keys, values, head, state);
        case 2: return attend_heads<Model, Page, 2>(call, tile, keys, values, head, state);
        case 3: return attend_heads<Model, Page, 3>(call, tile, keys, values, head, state);
        default: return attend_heads<Model, Page, HEADS_AT_ONCE>(call, tile, keys, values, head, state);
    }
}

// The same for all query heads of a KV head, in turns. Two turns share the fetching of the next tile, so that it is
// even; a piece that a turn has nothing to fetch from is the one that it reads.
template <class Model, class Page, class State>
inline void attend_group(const Call &call, const Tile &tile, const Tile &next, int64_t kv_head, const int64_t *offsets,
                         const State &state) {
    const Cache &cache = *call.cache;
    const int64_t group = call.heads / cache.kv_heads;
    const bool last_head = kv_head + 1 == cache.kv_heads;
    const char *key = tile.rows + key_offset(cache, kv_head);
    const char *value = tile.rows + value_offset(cache, kv_head);
    const char *next_key = next.rows + key_offset(cache, kv_head);
    const char *next_value = next.rows + value_offset(cache, kv_head);
    const char *before = kv_head > 0 ? next.rows + value_offset(cache, kv_head - 1) : key;
    const char *after = last_head ? next.rows : tile.rows + key_offset(cache, kv_head + 1);
    for (int64_t done = 0; done < group; done += HEADS_AT_ONCE) {
        const bool first = done == 0;
        const bool last = done + HEADS_AT_ONCE >= group;
        const bool even = first;
        const bool odd = done == HEADS_AT_ONCE || (first && last);
        const Piece keys = {
            key, {even ? next_key : key, odd ? next_key : key}, first ? before : key, first ? value : key, offsets};
        const Piece values = {value,
                              {even ? next_value : value, odd ? next_value : value},
                              last ? next_key : value,
                              last ? after : value,
                              offsets};
        const int64_t count = last ? group - done : HEADS_AT_ONCE;
        attend_heads<Model, Page>(call, tile, keys, values, kv_head * group + done, count, state);
    }
}

// The first tile of the task that this thread is likely to take next, or `otherwise` if there is none: only to be
// fetched.
inline Tile upcoming_tile(const Call &call, const Tile &otherwise) {
    const int64_t index = call.next_task->load(std::memory_order_relaxed);
    if (index >= call.task_count || !call.tasks[index].decodes) return otherwise;
    const Task &task = call.tasks[index];
    const int64_t row = call.sequences[task.sequence].row;
    return find_tile(*call.cache, block_table(*call.cache, row, call.sources[task.sequence]), task.slots,
                     task.slots.first / GROUP * GROUP);
}

// Takes all slots of a task into the state of its query heads.
template <class Model, class Page, class State>
void attend_slots(const Call &call, const Task &task, const State &state) {
    const Cache &cache = *call.cache;
    const Sequence &sequence = call.sequences[task.sequence];
    const int32_t *table = block_table(cache, sequence.row, call.sources[task.sequence]);
    const auto tile_at = [&](int64_t slot) { return find_tile(cache, table, task.slots, slot); };
    int64_t slot = task.slots.first / GROUP * GROUP;
    Tile tile = tile_at(slot);
    RowOffsets offsets(cache, tile.seen);
    for (; slot < task.slots.stop; slot += GROUP) {
        const Tile next = slot + GROUP < task.slots.stop ? tile_at(slot + GROUP) : upcoming_tile(call, tile);
        if (slot + LOOK_UP_SLOTS < task.slots.stop) look_up_pages(cache, tile_at(slot + LOOK_UP_SLOTS));
        for (int64_t kv_head = 0; kv_head < cache.kv_heads; ++kv_head) {
            attend_group<Model, Page>(call, tile, next, kv_head, offsets.of, state);
        }
        if (!tile.is_whole() || !next.is_whole()) offsets = RowOffsets(cache, next.seen);
        tile = next;
    }
}

template <class Model, class Page>
void decode(const Call &call, const Task &task, char *scratch) {
    using Product = RowProduct<Model, Page>;
    using Order = typename ValueSum<Model, Page>::Order;
    const Cache &cache = *call.cache;
    const int64_t token = call.sequences[task.sequence].first_token;
    const int64_t heads = call.heads;
    const int64_t query_size = Product::query_size(cache.key_dim);
    DecodeState<typename Product::Query> state;
    state.queries = take<typename Product::Query>(scratch, heads * query_size);
    state.sums = take<float>(scratch, heads * cache.value_dim);
    state.running = take<Running>(scratch, heads);

    const Model *query = reinterpret_cast<const Model *>(call.query) + token * call.query_token;
    for (int64_t h = 0; h < heads; ++h) {
        Product::prepare(query + h * call.query_head, cache.key_dim, state.queries + h * query_size);
        state.running[h] = {NO_LOGIT, 0.0f};
    }
    for (int64_t i = 0; i < heads * cache.value_dim; ++i) state.sums[i] = 0.0f;

    attend_slots<Model, Page>(call, task, state);

    for (int64_t h = 0; h < heads; ++h) {
        const float *sums = state.sums + h * cache.value_dim;
        if (task.partial == NO_PARTIAL) {
            write_output<Model, Order>(call, token, h, sums, state.running[h]);
        } else {
            write_partial(call, task.partial, h, sums, state.running[h]);
        }
    }
}

}  // namespace
}  // namespace kvfold
