// The arithmetic of decode on rows as they lie in the arena: dot products with keys, sums of weighted values.
//
// Both are fp32 whatever the page stores; rows_bf16.h has what processors with bf16 products do instead.
#pragma once

#include "pages.h"
#include "tile.h"

namespace kvfold {
namespace {

// Fetches ahead for the lines that begin in the chunk at `index` of row `i`. Where vectors are single numbers,
// arithmetic takes longer than memory.
template <class Page>
[[gnu::always_inline]] inline void fetch_chunk(const Piece &piece, int i, int64_t index) {
    const int64_t byte = Page::byte(index);
    if (LANES == 1 || (Page::byte(CHUNK) < CACHE_LINE && byte % CACHE_LINE != 0)) return;
    for (int64_t line = 0; line < Page::byte(CHUNK); line += CACHE_LINE) piece.fetch(i, byte + line);
}

// Dot products of queries with the keys of GROUP rows.
template <class Model, class Page>
struct RowProduct {
    using Query = float;

    // Elements of a prepared query.
    static int64_t query_size(int64_t dim) { return dim; }

    static void prepare(const Model *query, int64_t dim, Query *prepared) {
        for (int64_t d = 0; d < dim; d += CHUNK) write_natural(prepared + d, Page::arrange(read_natural(query + d)));
    }

    // products[h][i]: query h with the key in row i.
    template <int HEADS>
    static void multiply(const Query *queries, int64_t dim, const Piece &keys, float (&products)[HEADS][GROUP]) {
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; ++h) {
            for (int t = 0; t < GROUP; t += LANES) {
                Vec sums[LANES];
                for (int i = 0; i < LANES; ++i) sums[i] = set1(0.0f);
                for (int64_t d = 0; d < dim; d += CHUNK) {
                    const Chunk q = read_natural(queries + h * dim + d);
                    for (int i = 0; i < LANES; ++i) {
                        if (i % HEADS == h) fetch_chunk<Page>(keys, t + i, d);  // shared by the heads, to be even
                        const Chunk k = Page::read(keys.row(t + i), d);
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

    // Adds the values in rows [0, stop) to CHUNKS chunks, from dimension `d` on, of the sums of HEADS query heads.
    template <int HEADS, int CHUNKS>
    static void add(const Piece &values, int stop, int64_t d, const Weight (&weights)[HEADS][GROUP],
                    Vec (&sums)[HEADS][CHUNKS][CHUNK_VECS]) {
        for (int t = 0; t < stop; ++t) {
            Chunk row[CHUNKS];
            for (int c = 0; c < CHUNKS; ++c) {
                const int64_t index = d + c * CHUNK;
                fetch_chunk<Page>(values, t, index);
                row[c] = Page::read(values.row(t), index);
            }
            for (int h = 0; h < HEADS; ++h) {
                const Vec weight = set1(weights[h][t]);
                for (int c = 0; c < CHUNKS; ++c) {
                    for (int v = 0; v < CHUNK_VECS; ++v) sums[h][c][v] = fma(weight, row[c].v[v], sums[h][c][v]);
                }
            }
        }
    }
};

}  // namespace
}  // namespace kvfold
