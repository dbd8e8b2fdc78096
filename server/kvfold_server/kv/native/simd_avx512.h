// Sixteen floats at a time; bf16 products too where the path has them.
#pragma once

#include <immintrin.h>

#include "numbers.h"

namespace kvfold {
namespace {

using Vec = __m512;

constexpr int LANES = 16;
constexpr int CHUNK_VECS = 2;
constexpr int PRODUCT_VECS = 4;
constexpr int ACCUMULATED_CHUNKS = 2;

struct Chunk {
    Vec v[CHUNK_VECS];
};

inline Vec set1(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float *p) { return _mm512_loadu_ps(p); }
inline void store(float *p, Vec x) { _mm512_storeu_ps(p, x); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec abs(Vec a) { return _mm512_abs_ps(a); }
inline Vec with_sign_of(Vec magnitude, Vec sign) { return _mm512_or_ps(magnitude, _mm512_and_ps(set1(-0.0f), sign)); }
inline Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
inline bool any_greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
inline Vec round(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a); }
inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a); }

// Rounded to whole numbers, which lie between 0 and 255.
inline void store_bytes(uint8_t *p, Vec x) {
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}

// Exchanges lanes i and i + HALF of each 2 HALF neighbours.
template <int HALF>
inline Vec swap_lanes(Vec x) {
    if constexpr (HALF == 1) return _mm512_permute_ps(x, 0xb1);
    if constexpr (HALF == 2) return _mm512_permute_ps(x, 0x4e);
    if constexpr (HALF == 4) return _mm512_shuffle_f32x4(x, x, 0xb1);
    if constexpr (HALF == 8) return _mm512_shuffle_f32x4(x, x, 0x4e);
}

// x * 2^n for a whole n of at most 0; below the smallest normal number the result is 0.
inline Vec scale_by_power(Vec x, Vec n) {
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(n, set1(-126.0f), _CMP_GE_OQ), x, n);
}

inline Vec as_vec(__m512d x) { return _mm512_castpd_ps(x); }
inline __m512d as_pairs(Vec x) { return _mm512_castps_pd(x); }

// Transposes the 16 x 16 values of `x`.
inline void transpose(Vec *x) {
    Vec y[16];
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        x[i] = as_vec(_mm512_unpacklo_pd(as_pairs(y[i]), as_pairs(y[i + 2])));
        x[i + 1] = as_vec(_mm512_unpackhi_pd(as_pairs(y[i]), as_pairs(y[i + 2])));
        x[i + 2] = as_vec(_mm512_unpacklo_pd(as_pairs(y[i + 1]), as_pairs(y[i + 3])));
        x[i + 3] = as_vec(_mm512_unpackhi_pd(as_pairs(y[i + 1]), as_pairs(y[i + 3])));
    }
    // Now x[4 a + b] holds, in its quarter q, column 4 q + b of rows 4 a .. 4 a + 3: transpose the quarters.
    for (int b = 0; b < 4; ++b) {
        const Vec low01 = _mm512_shuffle_f32x4(x[b], x[4 + b], 0x44);
        const Vec high01 = _mm512_shuffle_f32x4(x[b], x[4 + b], 0xee);
        const Vec low23 = _mm512_shuffle_f32x4(x[8 + b], x[12 + b], 0x44);
        const Vec high23 = _mm512_shuffle_f32x4(x[8 + b], x[12 + b], 0xee);
        y[b] = _mm512_shuffle_f32x4(low01, low23, 0x88);
        y[4 + b] = _mm512_shuffle_f32x4(low01, low23, 0xdd);
        y[8 + b] = _mm512_shuffle_f32x4(high01, high23, 0x88);
        y[12 + b] = _mm512_shuffle_f32x4(high01, high23, 0xdd);
    }
    for (int i = 0; i < 16; ++i) x[i] = y[i];
}

// Lane i of the result is the sum of the lanes of columns[i].
inline Vec reduce_columns(const Vec *columns) {
    Vec pairs[8];
    for (int i = 0; i < 8; ++i) {
        const Vec a = columns[2 * i];
        const Vec b = columns[2 * i + 1];
        pairs[i] = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    Vec quads[4];
    for (int i = 0; i < 4; ++i) {
        const __m512d a = as_pairs(pairs[2 * i]);
        const __m512d b = as_pairs(pairs[2 * i + 1]);
        quads[i] = add(as_vec(_mm512_unpacklo_pd(a, b)), as_vec(_mm512_unpackhi_pd(a, b)));
    }
    Vec halves[2];
    for (int i = 0; i < 2; ++i) {
        const Vec a = quads[2 * i];
        const Vec b = quads[2 * i + 1];
        halves[i] = add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    return add(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88), _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
}

inline Vec load(const Bf16 *p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline Vec load(const Fp16 *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))); }

inline void store(Bf16 *p, Vec x) {
#ifdef __AVX512BF16__
    const __m256i packed = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
#else
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i high = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
    const __m256i packed = _mm512_cvtepi32_epi16(high);
#endif
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), packed);
}

inline void store(Fp16 *p, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

template <class Number>
inline Chunk load_chunk(const Number *p) {
    return {{load(p), load(p + LANES)}};
}

// Widening bf16 in place is cheapest as the even values and the odd ones: that is the page order of a bf16 chunk.
inline Chunk load_chunk(const Bf16 *p) {
    const __m512i bits = _mm512_loadu_si512(p);
    return {{_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)),
             _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000))))}};
}

template <class Number>
inline Chunk to_page_order(Tag<Number>, Chunk x) {
    return x;
}

template <class Number>
inline Chunk to_natural_order(Tag<Number>, Chunk x) {
    return x;
}

inline Chunk to_page_order(Tag<Bf16>, Chunk x) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return {{_mm512_permutex2var_ps(x.v[0], even, x.v[1]), _mm512_permutex2var_ps(x.v[0], odd, x.v[1])}};
}

inline Chunk to_natural_order(Tag<Bf16>, Chunk x) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    return {{_mm512_permutex2var_ps(x.v[0], low, x.v[1]), _mm512_permutex2var_ps(x.v[0], high, x.v[1])}};
}

}  // namespace
}  // namespace kvfold
