// Decode: one query token over a run of slots, reading each row of the arena once.
//
//     for each tile of slots:  logits of all its heads | softmax weights | weighted values
//                              while the rows of the next tile are being fetched
//
// Memory bounds it: the work on a tile hides the fetching of the next one. Weights and sums are fp32.
#pragma once

#include "finish.h"
#include "scratch.h"

namespace kvfold {
namespace {

constexpr int GROUP = 16;           // slots whose dot products are made together
constexpr int MAX_TILE = 64;        // slots of a tile, a multiple of GROUP
constexpr int64_t TILE_BYTES = 64 << 10;  // rows of a tile at most, unless one GROUP has more: two tiles fit any second-level cache
constexpr int HEADS_AT_ONCE = 4;    // query heads that share the reading of a value

// Cache lines of the next tile that are asked for after a group of dot products, and before each value: more at once than the
// processor can have under way would make it wait.
constexpr int LINES_PER_PRODUCT = 8;
constexpr int LINES_PER_VALUE = 2;

// Slots of a tile: a multiple of GROUP that depends on the row's size alone.
inline int tile_slots(const Cache &cache) {
    int slots = MAX_TILE;
    while (slots > GROUP && slots * cache.row_bytes > TILE_BYTES) slots /= 2;
    return slots;
}

// The rows of slots [slot, slot + count); entries up to the next multiple of GROUP repeat the last row.
struct Tile {
    const char *rows[MAX_TILE];
    int64_t slot;
    int count;
};

inline void find_tile(const Cache &cache, const int32_t *table, int64_t slot, int64_t stop, int size, Tile &tile) {
    const int64_t left = stop - slot;
    tile.slot = slot;
    tile.count = static_cast<int>(left < size ? left : size);
    int64_t in_block = slot % cache.tokens_per_block;
    const char *row = tile.count > 0 ? slot_row(cache, table, slot) : nullptr;
    for (int i = 0; i < tile.count; ++i) {
        tile.rows[i] = row;
        row += cache.row_bytes;
        if (++in_block == cache.tokens_per_block && i + 1 < tile.count) {
            in_block = 0;
            row = slot_row(cache, table, slot + i + 1);
        }
    }
    for (int i = tile.count; i % GROUP != 0; ++i) tile.rows[i] = tile.rows[tile.count - 1];
}

// Fetches the rows of a tile into the cache, a few lines at a time between pieces of other work.
class Fetcher {
  public:
    Fetcher(const Tile &tile, int64_t offset, int64_t bytes) : tile_(tile), offset_(offset), bytes_(bytes) {}

    void fetch(int lines) {
        while (lines-- > 0 && row_ < tile_.count) {
            __builtin_prefetch(tile_.rows[row_] + offset_ + byte_, 0, 3);
            byte_ += CACHE_LINE;
            if (byte_ >= bytes_) {
                byte_ = 0;
                ++row_;
            }
        }
    }

  private:
    const Tile &tile_;
    int64_t offset_;
    int64_t bytes_;
    int64_t byte_ = 0;
    int row_ = 0;
};

// Dot products of a query with the keys of GROUP rows, in fp32 whatever the page stores.
template <class Model, class Page>
struct RowProduct {
    using Query = float;

    static void prepare(const Model *query, int64_t dim, Query *prepared) {
        for (int64_t d = 0; d < dim; d += CHUNK) write_natural(prepared + d, Page::arrange(read_natural(query + d)));
    }

    static void multiply(const Query *query, int64_t dim, const char *const *rows, int64_t offset, float *products) {
        for (int t = 0; t < GROUP; t += LANES) {
            Vec sums[LANES];
            for (int i = 0; i < LANES; ++i) sums[i] = set1(0.0f);
            for (int64_t d = 0; d < dim; d += CHUNK) {
                const Chunk q = read_natural(query + d);
                for (int i = 0; i < LANES; ++i) {
                    const Chunk k = Page::read(rows[t + i] + offset, d);
                    for (int v = 0; v < CHUNK_VECS; ++v) sums[i] = fma(q.v[v], k.v[v], sums[i]);
                }
            }
            store(products + t, reduce_columns(sums));
        }
    }
};

#ifdef __AVX512BF16__
// bf16 by bf16: the processor multiplies pairs and adds them in fp32.
template <>
struct RowProduct<Bf16, NumberPage<Bf16>> {
    using Query = Bf16;

    static void prepare(const Bf16 *query, int64_t dim, Query *prepared) {
        std::memcpy(prepared, query, static_cast<size_t>(dim) * sizeof(Bf16));
    }

    static void multiply(const Query *query, int64_t dim, const char *const *rows, int64_t offset, float *products) {
        Vec sums[GROUP];
        for (int i = 0; i < GROUP; ++i) sums[i] = set1(0.0f);
        for (int64_t d = 0; d < dim; d += 32) {
            const __m512bh q = reinterpret_cast<__m512bh>(_mm512_loadu_si512(query + d));
            for (int i = 0; i < GROUP; ++i) {
                const char *k = rows[i] + offset + d * static_cast<int64_t>(sizeof(Bf16));
                sums[i] = _mm512_dpbf16_ps(sums[i], q, reinterpret_cast<__m512bh>(_mm512_loadu_si512(k)));
            }
        }
        store(products, reduce_columns(sums));
    }
};
#endif

// Adds the weighted values of a tile to CHUNKS chunks, from `d` on, of the sums of HEADS query heads, `dim` floats each.
template <class Page, int HEADS, int CHUNKS>
inline void accumulate(const Tile &tile, int64_t offset, int64_t d, int64_t dim, const float (*weights)[MAX_TILE],
                       const float *corrections, float *sums, Fetcher &fetcher, int lines) {
    Vec total[HEADS][CHUNKS][CHUNK_VECS];
    for (int h = 0; h < HEADS; ++h) {
        const Vec correction = set1(corrections[h]);
        for (int c = 0; c < CHUNKS; ++c) {
            for (int v = 0; v < CHUNK_VECS; ++v) {
                total[h][c][v] = mul(correction, load(sums + h * dim + d + c * CHUNK + v * LANES));
            }
        }
    }
    for (int t = 0; t < tile.count; ++t) {
        fetcher.fetch(lines);
        Chunk values[CHUNKS];
        for (int c = 0; c < CHUNKS; ++c) values[c] = Page::read(tile.rows[t] + offset, d + c * CHUNK);
        for (int h = 0; h < HEADS; ++h) {
            const Vec weight = set1(weights[h][t]);
            for (int c = 0; c < CHUNKS; ++c) {
                for (int v = 0; v < CHUNK_VECS; ++v) total[h][c][v] = fma(weight, values[c].v[v], total[h][c][v]);
            }
        }
    }
    for (int h = 0; h < HEADS; ++h) {
        for (int c = 0; c < CHUNKS; ++c) {
            for (int v = 0; v < CHUNK_VECS; ++v) store(sums + h * dim + d + c * CHUNK + v * LANES, total[h][c][v]);
        }
    }
}

template <class Page, int HEADS>
inline void accumulate_heads(const Tile &tile, int64_t offset, int64_t dim, const float (*weights)[MAX_TILE],
                             const float *corrections, float *sums, Fetcher &fetcher, int lines) {
    int64_t d = 0;
    for (; d + ACCUMULATED_CHUNKS * CHUNK <= dim; d += ACCUMULATED_CHUNKS * CHUNK) {
        accumulate<Page, HEADS, ACCUMULATED_CHUNKS>(tile, offset, d, dim, weights, corrections, sums, fetcher, lines);
    }
    for (; d < dim; d += CHUNK) {
        accumulate<Page, HEADS, 1>(tile, offset, d, dim, weights, corrections, sums, fetcher, lines);
    }
}

// What a decode task keeps for its query heads: prepared queries, weighted sums of values, and running softmaxes.
template <class Query>
struct DecodeState {
    Query *queries;
    float *sums;
    Running *running;
};

inline int64_t decode_scratch_bytes(const Cache &cache, int64_t heads) {
    return round_to_lines(heads * cache.key_dim * 4) + round_to_lines(heads * cache.value_dim * 4) +
           round_to_lines(heads * static_cast<int64_t>(sizeof(Running)));
}

// Takes a tile into the state of `count` query heads, at most HEADS_AT_ONCE, of one KV head; `head` is the first of them.
template <class Model, class Page, class State>
inline void attend_tile(const Call &call, const Tile &tile, int64_t kv_head, int64_t head, int count, const State &state,
                        Fetcher &fetcher) {
    const Cache &cache = *call.cache;
    const int64_t keys = key_offset(cache, kv_head);
    const int64_t values = value_offset(cache, kv_head);
    const int padded = (tile.count + GROUP - 1) / GROUP * GROUP;
    alignas(64) float weights[HEADS_AT_ONCE][MAX_TILE];
    float corrections[HEADS_AT_ONCE];
    for (int t = 0; t < padded; t += GROUP) {
        for (int h = 0; h < count; ++h) {
            RowProduct<Model, Page>::multiply(state.queries + (head + h) * cache.key_dim, cache.key_dim, tile.rows + t, keys,
                                              weights[h] + t);
            fetcher.fetch(LINES_PER_PRODUCT);
        }
    }
    for (int h = 0; h < count; ++h) {
        products_to_logits(call, weights[h], padded);
        mask_logits(weights[h], 0, padded, {0, tile.count});
        corrections[h] = update(state.running[head + h], weights[h], padded);
    }
    float *sums = state.sums + head * cache.value_dim;
    const int64_t dim = cache.value_dim;
    switch (count) {
        case 1: return accumulate_heads<Page, 1>(tile, values, dim, weights, corrections, sums, fetcher, LINES_PER_VALUE);
        case 2: return accumulate_heads<Page, 2>(tile, values, dim, weights, corrections, sums, fetcher, LINES_PER_VALUE);
        case 3: return accumulate_heads<Page, 3>(tile, values, dim, weights, corrections, sums, fetcher, LINES_PER_VALUE);
        default: return accumulate_heads<Page, HEADS_AT_ONCE>(tile, values, dim, weights, corrections, sums, fetcher, LINES_PER_VALUE);
    }
}

template <class Model, class Page>
void decode(const Call &call, const Task &task, char *scratch) {
    using Product = RowProduct<Model, Page>;
    const Cache &cache = *call.cache;
    const Sequence &sequence = call.sequences[task.sequence];
    const int32_t *table = block_table(cache, sequence.row, call.sources[task.sequence]);
    const int64_t group = call.heads / cache.kv_heads;
    const int64_t first_head = task.first_head * group;
    const int64_t heads = task.stop_head * group - first_head;
    DecodeState<typename Product::Query> state;
    state.queries = take<typename Product::Query>(scratch, heads * cache.key_dim);
    state.sums = take<float>(scratch, heads * cache.value_dim);
    state.running = take<Running>(scratch, heads);

    const Model *query = reinterpret_cast<const Model *>(call.query) + sequence.first_token * call.query_token;
    for (int64_t h = 0; h < heads; ++h) {
        Product::prepare(query + (first_head + h) * call.query_head, cache.key_dim, state.queries + h * cache.key_dim);
        state.running[h] = {NO_LOGIT, 0.0f};
    }
    for (int64_t i = 0; i < heads * cache.value_dim; ++i) state.sums[i] = 0.0f;

    const int size = tile_slots(cache);
    Tile tiles[2];
    int current = 0;
    find_tile(cache, table, task.slots.first, task.slots.stop, size, tiles[0]);
    while (tiles[current].count > 0) {
        const Tile &tile = tiles[current];
        Tile &next = tiles[1 - current];
        find_tile(cache, table, tile.slot + tile.count, task.slots.stop, size, next);
        Fetcher fetcher(next, 0, cache.row_bytes);
        for (int64_t head = 0; head < heads;) {
            const int64_t left = group - head % group;
            const int count = static_cast<int>(left < HEADS_AT_ONCE ? left : HEADS_AT_ONCE);
            attend_tile<Model, Page>(call, tile, task.first_head + head / group, head, count, state, fetcher);
            head += count;
        }
        current = 1 - current;
    }

    for (int64_t h = 0; h < heads; ++h) {
        const float *sums = state.sums + h * cache.value_dim;
        if (task.partial == NO_PARTIAL) {
            write_output<Model, Page>(call, sequence.first_token, first_head + h, sums, state.running[h]);
        } else {
            write_partial(call, task.partial, first_head + h, sums, state.running[h]);
        }
    }
}

}  // namespace
}  // namespace kvfold
