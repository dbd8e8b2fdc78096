// Small matrix products for prefill: how operands are packed and multiplied.
//
// The left operand is row-major. The right one is packed so that a row of it is contiguous: `DEPTH` values of the inner
// dimension lie side by side in an element, as the processor's multiply-add takes them.
#pragma once

#include "finish.h"

namespace kvfold {
namespace {

constexpr int SPAN = 64;       // slots of a prefill tile
constexpr int BLOCK_ROWS = 6;  // query rows of a block of a product: fills the registers without spilling

// Products in fp32, for every model number and page format.
template <class Model, class Page>
struct Fp32Product {
    using Element = float;
    using Weight = float;
    using Order = Page;
    static constexpr int DEPTH = 1;

    static Vec multiply_add(Element left, const Element *right, Vec sum) { return fma(set1(left), load(right), sum); }

    static void pack_query(const Model *query, int64_t dim, Element *packed) {
        for (int64_t d = 0; d < dim; d += CHUNK) write_natural(packed + d, Page::arrange(read_natural(query + d)));
    }

    // Keys of SPAN slots as [dim][SPAN]. `rows` is null for slots that hold nothing.
    static void pack_keys(const char *const *rows, int64_t offset, int64_t dim, Element *packed) {
        for (int t = 0; t < SPAN; t += LANES) {
            for (int64_t d = 0; d < dim; d += CHUNK) {
                Vec columns[CHUNK_VECS][LANES];
                for (int i = 0; i < LANES; ++i) {
                    Chunk chunk = {};
                    if (rows[t + i] != nullptr) chunk = Page::read(rows[t + i] + offset, d);
                    for (int v = 0; v < CHUNK_VECS; ++v) columns[v][i] = chunk.v[v];
                }
                for (int v = 0; v < CHUNK_VECS; ++v) {
                    transpose(columns[v]);
                    for (int i = 0; i < LANES; ++i) store(packed + (d + v * LANES + i) * SPAN + t, columns[v][i]);
                }
            }
        }
    }

    // Values of SPAN slots as [SPAN][dim].
    static void pack_values(const char *const *rows, int64_t offset, int64_t dim, Element *packed) {
        for (int t = 0; t < SPAN; ++t) {
            for (int64_t d = 0; d < dim; d += CHUNK) {
                Chunk chunk = {};
                if (rows[t] != nullptr) chunk = Page::read(rows[t] + offset, d);
                write_natural(packed + t * dim + d, chunk);
            }
        }
    }
};

// Columns of a product: result[BLOCK_ROWS][VECS * LANES] = factors * result + left * right; without factors, = left *
// right. Strides are in elements of each array; `depth` is the number of elements of the inner dimension.
template <class Product, int VECS>
inline void multiply_columns(const typename Product::Element *left, int64_t left_stride,
                             const typename Product::Element *right, int64_t right_stride, int64_t depth, float *result,
                             int64_t result_stride, const float *factors) {
    Vec sums[BLOCK_ROWS][VECS];
    for (int r = 0; r < BLOCK_ROWS; ++r) {
        for (int v = 0; v < VECS; ++v) {
            sums[r][v] =
                factors == nullptr ? set1(0.0f) : mul(set1(factors[r]), load(result + r * result_stride + v * LANES));
        }
    }
    for (int64_t k = 0; k < depth; ++k) {
        for (int r = 0; r < BLOCK_ROWS; ++r) {
            for (int v = 0; v < VECS; ++v) {
                const typename Product::Element *column = right + k * right_stride + v * LANES;
                sums[r][v] = Product::multiply_add(left[r * left_stride + k], column, sums[r][v]);
            }
        }
    }
    for (int r = 0; r < BLOCK_ROWS; ++r) {
        for (int v = 0; v < VECS; ++v) store(result + r * result_stride + v * LANES, sums[r][v]);
    }
}

// The same over all `columns`, a multiple of CHUNK.
template <class Product>
inline void multiply(const typename Product::Element *left, int64_t left_stride, const typename Product::Element *right,
                     int columns, int64_t depth, float *result, const float *factors) {
    int column = 0;
    for (; column + PRODUCT_VECS * LANES <= columns; column += PRODUCT_VECS * LANES) {
        multiply_columns<Product, PRODUCT_VECS>(left, left_stride, right + column, columns, depth, result + column,
                                                columns, factors);
    }
    for (; column + CHUNK <= columns; column += CHUNK) {
        multiply_columns<Product, CHUNK_VECS>(left, left_stride, right + column, columns, depth, result + column,
                                              columns, factors);
    }
}

}  // namespace
}  // namespace kvfold
