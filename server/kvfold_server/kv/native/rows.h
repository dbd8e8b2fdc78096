// The arithmetic of decode on rows as they lie in the arena: dot products with keys, sums of weighted values.
//
// Both are fp32 whatever the page stores; rows_bf16.h has what processors with bf16 products do instead.
#pragma once

#include "pages.h"
#include "tile.h"

namespace kvfold {
namespace {

// Dot products of queries with the keys of GROUP rows.
template <class Model, class Page>
struct RowProduct {
    using Query = float;

    // Elements of a prepared query.
    static int64_t query_size(int64_t dim) { return dim; }

    static void prepare(const Model *query, int64_t dim, Query *prepared) {
        for (int64_t d = 0; d < dim; d += CHUNK) write_natural(prepared + d, Page::arrange(read_natural(query + d)));
    }

    // products[h][i]: query h with the key at `offset` in rows[i].
    template <int HEADS>
    static void multiply(const Query *queries, int64_t dim, const char *const *rows, int64_t offset,
                         float *const (&products)[HEADS]) {
        for (int h = 0; h < HEADS; ++h) {
            for (int t = 0; t < GROUP; t += LANES) {
                Vec sums[LANES];
                for (int i = 0; i < LANES; ++i) sums[i] = set1(0.0f);
                for (int64_t d = 0; d < dim; d += CHUNK) {
                    const Chunk q = read_natural(queries + h * dim + d);
                    for (int i = 0; i < LANES; ++i) {
                        const Chunk k = Page::read(rows[t + i] + offset, d);
                        for (int v = 0; v < CHUNK_VECS; ++v) sums[i] = fma(q.v[v], k.v[v], sums[i]);
                    }
                }
                store(products[h] + t, reduce_columns(sums));
            }
        }
    }
};

// Sums of weighted values. `Order::restore` undoes the order in which they are kept.
template <class Model, class Page>
struct ValueSum {
    using Weight = float;
    using Order = Page;

    // Adds the values at `offset` in a tile's rows to CHUNKS chunks, from dimension `d` on, of the sums of HEADS query
    // heads.
    template <int HEADS, int CHUNKS>
    static void add(const Tile &tile, int64_t offset, int64_t d, const Weight (&weights)[HEADS][MAX_TILE],
                    Vec (&sums)[HEADS][CHUNKS][CHUNK_VECS]) {
        for (int t = 0; t < tile.count; ++t) {
            Chunk values[CHUNKS];
            for (int c = 0; c < CHUNKS; ++c) values[c] = Page::read(tile.rows[t] + offset, d + c * CHUNK);
            for (int h = 0; h < HEADS; ++h) {
                const Vec weight = set1(weights[h][t]);
                for (int c = 0; c < CHUNKS; ++c) {
                    for (int v = 0; v < CHUNK_VECS; ++v) sums[h][c][v] = fma(weight, values[c].v[v], sums[h][c][v]);
                }
            }
        }
    }
};

}  // namespace
}  // namespace kvfold
