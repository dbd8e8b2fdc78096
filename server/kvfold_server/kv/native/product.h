// Small matrix products for prefill: how operands are packed and multiplied.
//
// The left operand is row-major. The right one is packed so that a row of it is contiguous: `DEPTH` values of the inner
// dimension lie side by side in an element, as the processor's multiply-add takes them.
#pragma once

#include "finish.h"

namespace kvfold {
namespace {

constexpr int SPAN = 64;        // slots of a prefill tile
constexpr int BLOCK_ROWS = 6;   // query rows of a block of a product: fills the registers without spilling

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

#ifdef __AVX512BF16__
struct NaturalOrder {
    static Chunk restore(Chunk x) { return x; }
};

// Products of bf16 pairs, summed in fp32. The softmax weights are rounded to bf16, their sum is not.
struct Bf16Product {
    using Element = uint32_t;
    using Weight = Bf16;
    using Order = NaturalOrder;
    static constexpr int DEPTH = 2;

    static Vec multiply_add(Element left, const Element *right, Vec sum) {
        const __m512i pair = _mm512_set1_epi32(static_cast<int>(left));
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(pair),
                                reinterpret_cast<__m512bh>(_mm512_loadu_si512(right)));
    }

    static void pack_query(const Bf16 *query, int64_t dim, Element *packed) {
        std::memcpy(packed, query, static_cast<size_t>(dim) * sizeof(Bf16));
    }

    // [dim / 2][SPAN] pairs of neighbouring dimensions.
    static void pack_keys(const char *const *rows, int64_t offset, int64_t dim, Element *packed) {
        for (int t = 0; t < SPAN; t += LANES) {
            for (int64_t pair = 0; pair < dim / 2; pair += LANES) {
                Vec columns[LANES];
                for (int i = 0; i < LANES; ++i) {
                    const char *row = rows[t + i];
                    columns[i] = row == nullptr ? set1(0.0f) : _mm512_loadu_ps(row + offset + pair * 4);
                }
                transpose(columns);
                for (int i = 0; i < LANES; ++i) _mm512_storeu_ps(packed + (pair + i) * SPAN + t, columns[i]);
            }
        }
    }

    // [SPAN / 2][dim] pairs of neighbouring slots.
    static void pack_values(const char *const *rows, int64_t offset, int64_t dim, Element *packed) {
        alignas(64) static const uint16_t LOW[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
        const __m512i low = _mm512_load_si512(LOW);
        const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
        for (int t = 0; t < SPAN; t += 2) {
            for (int64_t d = 0; d < dim; d += 32) {
                const __m512i zero = _mm512_setzero_si512();
                const __m512i a = rows[t] == nullptr ? zero : _mm512_loadu_si512(rows[t] + offset + d * 2);
                const __m512i b = rows[t + 1] == nullptr ? zero : _mm512_loadu_si512(rows[t + 1] + offset + d * 2);
                Element *pairs = packed + t / 2 * dim + d;
                _mm512_storeu_si512(pairs, _mm512_permutex2var_epi16(a, low, b));
                _mm512_storeu_si512(pairs + 16, _mm512_permutex2var_epi16(a, high, b));
            }
        }
    }
};
#endif

// Columns of a product: result[BLOCK_ROWS][VECS * LANES] = factors * result + left * right; without factors, = left * right.
// Strides are in elements of each array; `depth` is the number of elements of the inner dimension.
template <class Product, int VECS>
inline void multiply_columns(const typename Product::Element *left, int64_t left_stride,
                           const typename Product::Element *right, int64_t right_stride, int64_t depth, float *result,
                           int64_t result_stride, const float *factors) {
    Vec sums[BLOCK_ROWS][VECS];
    for (int r = 0; r < BLOCK_ROWS; ++r) {
        for (int v = 0; v < VECS; ++v) {
            sums[r][v] = factors == nullptr ? set1(0.0f)
                                            : mul(set1(factors[r]), load(result + r * result_stride + v * LANES));
        }
    }
    for (int64_t k = 0; k < depth; ++k) {
        for (int r = 0; r < BLOCK_ROWS; ++r) {
            for (int v = 0; v < VECS; ++v) {
                sums[r][v] = Product::multiply_add(left[r * left_stride + k], right + k * right_stride + v * LANES, sums[r][v]);
            }
        }
    }
    for (int r = 0; r < BLOCK_ROWS; ++r) {
        for (int v = 0; v < VECS; ++v) store(result + r * result_stride + v * LANES, sums[r][v]);
    }
}

// The same over all `columns`, a multiple of CHUNK.
template <class Product>
inline void multiply(const typename Product::Element *left, int64_t left_stride,
                          const typename Product::Element *right, int64_t columns, int64_t depth, float *result,
                          const float *factors) {
    int64_t column = 0;
    for (; column + PRODUCT_VECS * LANES <= columns; column += PRODUCT_VECS * LANES) {
        multiply_columns<Product, PRODUCT_VECS>(left, left_stride, right + column, columns, depth, result + column,
                                                columns, factors);
    }
    for (; column + CHUNK <= columns; column += CHUNK) {
        multiply_columns<Product, CHUNK_VECS>(left, left_stride, right + column, columns, depth, result + column, columns,
                                              factors);
    }
}

}  // namespace
}  // namespace kvfold
