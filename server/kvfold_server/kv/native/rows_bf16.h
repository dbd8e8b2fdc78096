// The arithmetic of decode on bf16 rows with bf16 products: the processor multiplies pairs and adds them in fp32.
#pragma once

#include "rows.h"

namespace kvfold {
namespace {

// A number that the compiler knows.
template <int64_t VALUE>
struct Fixed {
    constexpr operator int64_t() const { return VALUE; }
};

inline __m512bh as_bf16(__m512i x) { return reinterpret_cast<__m512bh>(x); }

// Vectors hold eight dimensions of four rows, so that a row's sum is spread over four lanes only, and all heads share
// the rearranging of the keys.
template <>
struct RowProduct<Bf16, NumberPage<Bf16>> {
    using Query = Bf16;

    static int64_t query_size(int64_t dim) { return 4 * dim; }

    // Each eight dimensions four times.
    static void prepare(const Bf16 *query, int64_t dim, Query *prepared) {
        for (int64_t d = 0; d < dim; d += 8) {
            const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i *>(query + d));
            _mm512_storeu_si512(prepared + 4 * d, _mm512_broadcast_i32x4(eight));
        }
    }

    // words[k]: dimensions 8 k .. 8 k + 7, from `byte` on, of rows i, i + 4, i + 8 and i + 12.
    [[gnu::always_inline]] static void load_quarters(const Piece &keys, int i, int64_t byte, __m512i (&words)[4]) {
        const __m512i a = _mm512_loadu_si512(keys.row(i) + byte);
        const __m512i b = _mm512_loadu_si512(keys.row(i + 4) + byte);
        const __m512i c = _mm512_loadu_si512(keys.row(i + 8) + byte);
        const __m512i d = _mm512_loadu_si512(keys.row(i + 12) + byte);
        const __m512i low_ab = _mm512_shuffle_i32x4(a, b, 0x44);
        const __m512i high_ab = _mm512_shuffle_i32x4(a, b, 0xee);
        const __m512i low_cd = _mm512_shuffle_i32x4(c, d, 0x44);
        const __m512i high_cd = _mm512_shuffle_i32x4(c, d, 0xee);
        words[0] = _mm512_shuffle_i32x4(low_ab, low_cd, 0x88);
        words[1] = _mm512_shuffle_i32x4(low_ab, low_cd, 0xdd);
        words[2] = _mm512_shuffle_i32x4(high_ab, high_cd, 0x88);
        words[3] = _mm512_shuffle_i32x4(high_ab, high_cd, 0xdd);
    }

    // The usual dimensions are known to the compiler, which then unrolls the loops.
    template <int HEADS>
    static void multiply(const Query *queries, int64_t dim, const Piece &keys, float (&products)[HEADS][GROUP]) {
        switch (dim) {
            case 64: return multiply_dim<HEADS>(queries, Fixed<64>(), keys, products);
            case 128: return multiply_dim<HEADS>(queries, Fixed<128>(), keys, products);
            default: multiply_dim<HEADS>(queries, dim, keys, products);
        }
    }

    template <int HEADS, class Dim>
    [[gnu::noinline]] static void multiply_dim(const Query *queries, Dim dim, const Piece &keys,
                                               float (&products)[HEADS][GROUP]) {
        Vec sums[4][HEADS];  // [i]: rows i, 4 + i, 8 + i and 12 + i, a quarter of the lanes each
#pragma GCC unroll 2
        for (int i = 0; i < 4; i += 2) {
            // Two at a time: their additions do not wait for each other.
            Vec even[HEADS];
            Vec odd[HEADS];
            for (int h = 0; h < HEADS; ++h) even[h] = odd[h] = set1(0.0f);
#pragma GCC unroll 4
            for (int64_t d = 0; d < dim; d += 32) {
                const int64_t byte = d * static_cast<int64_t>(sizeof(Bf16));
                __m512i even_words[4];
                __m512i odd_words[4];
                load_quarters(keys, i, byte, even_words);
                load_quarters(keys, i + 1, byte, odd_words);
                for (int row = i; row < GROUP; row += 4) {
                    keys.fetch(row, byte);
                    keys.fetch(row + 1, byte);
                }
#pragma GCC unroll 4
                for (int k = 0; k < 4; ++k) {
#pragma GCC unroll 4
                    for (int h = 0; h < HEADS; ++h) {
                        const __m512bh query = as_bf16(_mm512_loadu_si512(queries + 4 * (h * dim + d) + 32 * k));
                        even[h] = _mm512_dpbf16_ps(even[h], as_bf16(even_words[k]), query);
                        odd[h] = _mm512_dpbf16_ps(odd[h], as_bf16(odd_words[k]), query);
                    }
                }
            }
            for (int h = 0; h < HEADS; ++h) {
                sums[i][h] = even[h];
                sums[i + 1][h] = odd[h];
            }
        }
        for (int h = 0; h < HEADS; ++h) {
            const Vec first =
                add(_mm512_unpacklo_ps(sums[0][h], sums[1][h]), _mm512_unpackhi_ps(sums[0][h], sums[1][h]));
            const Vec second =
                add(_mm512_unpacklo_ps(sums[2][h], sums[3][h]), _mm512_unpackhi_ps(sums[2][h], sums[3][h]));
            const __m512d low = _mm512_unpacklo_pd(as_pairs(first), as_pairs(second));
            const __m512d high = _mm512_unpackhi_pd(as_pairs(first), as_pairs(second));
            store(products[h], add(as_vec(low), as_vec(high)));
        }
    }
};

// The order in which the words of two rows are interleaved: in each quarter of a chunk, four values in the first vector
// and the next four in the second.
struct InterleavedOrder {
    static Chunk restore(Chunk x) {
        const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
        return {{_mm512_permutex2var_ps(x.v[0], low, x.v[1]), _mm512_permutex2var_ps(x.v[0], high, x.v[1])}};
    }
};

// Two slots at a time, with weights rounded to bf16, as prefill and the reference backend have them.
template <>
struct ValueSum<Bf16, NumberPage<Bf16>> {
    using Weight = Bf16;
    using Order = InterleavedOrder;

    template <int HEADS, int CHUNKS>
    static void add(const Piece &values, int stop, int64_t d, const Weight (&weights)[HEADS][GROUP],
                    Vec (&sums)[HEADS][CHUNKS][CHUNK_VECS]) {
        for (int t = 0; t < stop; t += 2) {
            __m512bh words[CHUNKS][CHUNK_VECS];
            for (int c = 0; c < CHUNKS; ++c) {
                const int64_t byte = (d + c * CHUNK) * static_cast<int64_t>(sizeof(Bf16));
                values.fetch(t, byte);
                values.fetch(t + 1, byte);
                const __m512i a = _mm512_loadu_si512(values.row(t) + byte);
                const __m512i b = _mm512_loadu_si512(values.row(t + 1) + byte);
                words[c][0] = as_bf16(_mm512_unpacklo_epi16(a, b));
                words[c][1] = as_bf16(_mm512_unpackhi_epi16(a, b));
            }
            for (int h = 0; h < HEADS; ++h) {
                int32_t pair;
                std::memcpy(&pair, &weights[h][t], sizeof pair);
                const __m512bh weight = as_bf16(_mm512_set1_epi32(pair));
                for (int c = 0; c < CHUNKS; ++c) {
                    for (int v = 0; v < CHUNK_VECS; ++v) {
                        sums[h][c][v] = _mm512_dpbf16_ps(sums[h][c][v], weight, words[c][v]);
                    }
                }
            }
        }
    }
};

}  // namespace
}  // namespace kvfold
