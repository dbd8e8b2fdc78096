// The arithmetic of decode on bf16 rows with bf16 products: the processor multiplies pairs and adds them in fp32.
#pragma once

#include "rows.h"

namespace kvfold {
namespace {

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

    // keys[k]: dimensions 8 k .. 8 k + 7, from `byte` on, of rows[0], rows[4], rows[8] and rows[12].
    static void load_quarters(const char *const *rows, int64_t byte, __m512i (&keys)[4]) {
        const __m512i a = _mm512_loadu_si512(rows[0] + byte);
        const __m512i b = _mm512_loadu_si512(rows[4] + byte);
        const __m512i c = _mm512_loadu_si512(rows[8] + byte);
        const __m512i d = _mm512_loadu_si512(rows[12] + byte);
        const __m512i low_ab = _mm512_shuffle_i32x4(a, b, 0x44);
        const __m512i high_ab = _mm512_shuffle_i32x4(a, b, 0xee);
        const __m512i low_cd = _mm512_shuffle_i32x4(c, d, 0x44);
        const __m512i high_cd = _mm512_shuffle_i32x4(c, d, 0xee);
        keys[0] = _mm512_shuffle_i32x4(low_ab, low_cd, 0x88);
        keys[1] = _mm512_shuffle_i32x4(low_ab, low_cd, 0xdd);
        keys[2] = _mm512_shuffle_i32x4(high_ab, high_cd, 0x88);
        keys[3] = _mm512_shuffle_i32x4(high_ab, high_cd, 0xdd);
    }

    template <int HEADS>
    static void multiply(const Query *queries, int64_t dim, const char *const *rows, int64_t offset,
                         float *const (&products)[HEADS]) {
        Vec sums[4][HEADS];  // [i]: rows i, 4 + i, 8 + i and 12 + i, a quarter of the lanes each
        for (int i = 0; i < 4; i += 2) {
            // Two at a time: their additions do not wait for each other.
            Vec even[HEADS];
            Vec odd[HEADS];
            for (int h = 0; h < HEADS; ++h) even[h] = odd[h] = set1(0.0f);
            for (int64_t d = 0; d < dim; d += 32) {
                const int64_t byte = offset + d * static_cast<int64_t>(sizeof(Bf16));
                __m512i even_keys[4];
                __m512i odd_keys[4];
                load_quarters(rows + i, byte, even_keys);
                load_quarters(rows + i + 1, byte, odd_keys);
#pragma GCC unroll 4
                for (int k = 0; k < 4; ++k) {
#pragma GCC unroll 4
                    for (int h = 0; h < HEADS; ++h) {
                        const __m512bh query = as_bf16(_mm512_loadu_si512(queries + 4 * (h * dim + d) + 32 * k));
                        even[h] = _mm512_dpbf16_ps(even[h], as_bf16(even_keys[k]), query);
                        odd[h] = _mm512_dpbf16_ps(odd[h], as_bf16(odd_keys[k]), query);
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
    static void add(const Tile &tile, int64_t offset, int64_t d, const Weight (&weights)[HEADS][MAX_TILE],
                    Vec (&sums)[HEADS][CHUNKS][CHUNK_VECS]) {
        const int64_t byte = offset + d * static_cast<int64_t>(sizeof(Bf16));
        for (int t = 0; t < tile.count; t += 2) {
            __m512bh values[CHUNKS][CHUNK_VECS];
            for (int c = 0; c < CHUNKS; ++c) {
                const __m512i a = _mm512_loadu_si512(tile.rows[t] + byte + c * 64);
                const __m512i b = _mm512_loadu_si512(tile.rows[t + 1] + byte + c * 64);
                values[c][0] = as_bf16(_mm512_unpacklo_epi16(a, b));
                values[c][1] = as_bf16(_mm512_unpackhi_epi16(a, b));
            }
            for (int h = 0; h < HEADS; ++h) {
                int32_t pair;
                std::memcpy(&pair, &weights[h][t], sizeof pair);
                const __m512bh weight = as_bf16(_mm512_set1_epi32(pair));
                for (int c = 0; c < CHUNKS; ++c) {
                    for (int v = 0; v < CHUNK_VECS; ++v) {
                        sums[h][c][v] = _mm512_dpbf16_ps(sums[h][c][v], weight, values[c][v]);
                    }
                }
            }
        }
    }
};

}  // namespace
}  // namespace kvfold
