// Decode: one query token over a run of slots, reading each row of the arena once.
//
//     for each tile of slots:  logits of all its heads | softmax weights | weighted values
//                              while the rows of the next tile are being fetched
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

// Takes a tile's values into CHUNKS chunks, from dimension `d` on, of the sums of HEADS query heads, `dim` floats each.
template <class Sum, int CHUNKS, int HEADS>
inline void add_values(const Tile &tile, int64_t offset, int64_t d, int64_t dim,
                       const typename Sum::Weight (&weights)[HEADS][MAX_TILE], const float *corrections, float *sums) {
    Vec total[HEADS][CHUNKS][CHUNK_VECS];
    for (int h = 0; h < HEADS; ++h) {
        const Vec correction = set1(corrections[h]);
        for (int c = 0; c < CHUNKS; ++c) {
            for (int v = 0; v < CHUNK_VECS; ++v) {
                total[h][c][v] = mul(correction, load(sums + h * dim + d + c * CHUNK + v * LANES));
            }
        }
    }
    Sum::add(tile, offset, d, weights, total);
    for (int h = 0; h < HEADS; ++h) {
        for (int c = 0; c < CHUNKS; ++c) {
            for (int v = 0; v < CHUNK_VECS; ++v) store(sums + h * dim + d + c * CHUNK + v * LANES, total[h][c][v]);
        }
    }
}

// Takes a tile into the state of HEADS query heads of one KV head; `head` is the first of them. `lines` of the next
// tile are asked for after each group of slots.
template <class Model, class Page, int HEADS, class State>
inline void attend_tile(const Call &call, const Tile &tile, int64_t kv_head, int64_t head, const State &state,
                        Fetcher &fetcher, int64_t lines) {
    using Product = RowProduct<Model, Page>;
    using Sum = ValueSum<Model, Page>;
    const Cache &cache = *call.cache;
    const int slots = round_to_groups(tile.count);
    alignas(64) float logits[HEADS][MAX_TILE];
    alignas(64) typename Sum::Weight weights[HEADS][MAX_TILE];
    float corrections[HEADS];

    for (int t = 0; t < slots; t += GROUP) {
        float *products[HEADS];
        for (int h = 0; h < HEADS; ++h) products[h] = logits[h] + t;
        Product::template multiply<HEADS>(state.queries + head * Product::query_size(cache.key_dim), cache.key_dim,
                                          tile.rows + t, key_offset(cache, kv_head), products);
        fetcher.fetch(lines);
    }
    for (int h = 0; h < HEADS; ++h) {
        products_to_logits(call, logits[h], slots);
        mask_logits(logits[h], 0, slots, {0, tile.count});
        corrections[h] = update(state.running[head + h], logits[h], slots);
        for (int t = 0; t < slots; t += LANES) store(weights[h] + t, load(logits[h] + t));
    }
    const int64_t dim = cache.value_dim;
    const int64_t offset = value_offset(cache, kv_head);
    float *sums = state.sums + head * dim;
    int64_t d = 0;
    for (; d + ACCUMULATED_CHUNKS * CHUNK <= dim; d += ACCUMULATED_CHUNKS * CHUNK) {
        add_values<Sum, ACCUMULATED_CHUNKS>(tile, offset, d, dim, weights, corrections, sums);
    }
    for (; d + CHUNK <= dim; d += CHUNK) add_values<Sum, 1>(tile, offset, d, dim, weights, corrections, sums);
}

// Takes all slots of a task into the state of its `heads` query heads.
template <class Model, class Page, class State>
void attend_slots(const Call &call, const Task &task, int64_t heads, const State &state) {
    const Cache &cache = *call.cache;
    const Sequence &sequence = call.sequences[task.sequence];
    const int32_t *table = block_table(cache, sequence.row, call.sources[task.sequence]);
    const int64_t group = call.heads / cache.kv_heads;
    const int64_t turns = (task.stop_head - task.first_head) * ((group + HEADS_AT_ONCE - 1) / HEADS_AT_ONCE);
    const int size = tile_slots(cache);
    Tile tiles[2];
    int current = 0;
    find_tile(cache, table, task.slots.first, task.slots.stop, size, tiles[0]);
    Fetcher first(cache, tiles[0], task.first_head, task.stop_head);
    first.fetch(first.lines());
    while (tiles[current].count > 0) {
        const Tile &tile = tiles[current];
        Tile &next = tiles[1 - current];
        find_tile(cache, table, tile.slot + tile.count, task.slots.stop, size, next);
        Fetcher fetcher(cache, next, task.first_head, task.stop_head);
        const int64_t lines = fetcher.lines() / (turns * round_to_groups(tile.count) / GROUP) + 1;
        for (int64_t head = 0; head < heads;) {
            const int64_t kv_head = task.first_head + head / group;
            const int64_t left = group - head % group;
            switch (left) {
                case 1: attend_tile<Model, Page, 1>(call, tile, kv_head, head, state, fetcher, lines); break;
                case 2: attend_tile<Model, Page, 2>(call, tile, kv_head, head, state, fetcher, lines); break;
                case 3: attend_tile<Model, Page, 3>(call, tile, kv_head, head, state, fetcher, lines); break;
                default: attend_tile<Model, Page, HEADS_AT_ONCE>(call, tile, kv_head, head, state, fetcher, lines);
            }
            head += left < HEADS_AT_ONCE ? left : HEADS_AT_ONCE;
        }
        current = 1 - current;
    }
}

template <class Model, class Page>
void decode(const Call &call, const Task &task, char *scratch) {
    using Product = RowProduct<Model, Page>;
    using Order = typename ValueSum<Model, Page>::Order;
    const Cache &cache = *call.cache;
    const int64_t token = call.sequences[task.sequence].first_token;
    const int64_t group = call.heads / cache.kv_heads;
    const int64_t first_head = task.first_head * group;
    const int64_t heads = task.stop_head * group - first_head;
    const int64_t query_size = Product::query_size(cache.key_dim);
    DecodeState<typename Product::Query> state;
    state.queries = take<typename Product::Query>(scratch, heads * query_size);
    state.sums = take<float>(scratch, heads * cache.value_dim);
    state.running = take<Running>(scratch, heads);

    const Model *query = reinterpret_cast<const Model *>(call.query) + token * call.query_token;
    for (int64_t h = 0; h < heads; ++h) {
        Product::prepare(query + (first_head + h) * call.query_head, cache.key_dim, state.queries + h * query_size);
        state.running[h] = {NO_LOGIT, 0.0f};
    }
    for (int64_t i = 0; i < heads * cache.value_dim; ++i) state.sums[i] = 0.0f;

    attend_slots<Model, Page>(call, task, heads, state);

    for (int64_t h = 0; h < heads; ++h) {
        const float *sums = state.sums + h * cache.value_dim;
        if (task.partial == NO_PARTIAL) {
            write_output<Model, Order>(call, token, first_head + h, sums, state.running[h]);
        } else {
            write_partial(call, task.partial, first_head + h, sums, state.running[h]);
        }
    }
}

}  // namespace
}  // namespace kvfold
