// Eight floats at a time, with FMA and F16C.
#pragma once

#include <immintrin.h>

#include "numbers.h"

namespace kvfold {
namespace {

using Vec = __m256;

constexpr int LANES = 8;
constexpr int CHUNK_VECS = 2;
constexpr int PRODUCT_VECS = 2;
constexpr int ACCUMULATED_CHUNKS = 1;

struct Chunk {
    Vec v[CHUNK_VECS];
};

inline Vec set1(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float *p) { return _mm256_loadu_ps(p); }
inline void store(float *p, Vec x) { _mm256_storeu_ps(p, x); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec abs(Vec a) { return _mm256_andnot_ps(set1(-0.0f), a); }
inline Vec with_sign_of(Vec magnitude, Vec sign) { return _mm256_or_ps(magnitude, _mm256_and_ps(set1(-0.0f), sign)); }
inline Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
inline bool any_greater(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0; }
inline Vec round(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline float reduce_max(Vec a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

inline float reduce_add(Vec a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

// Rounded to whole numbers, which lie between 0 and 255.
inline void store_bytes(uint8_t *p, Vec x) {
    const __m256i whole = _mm256_cvtps_epi32(x);
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i *>(p), _mm_packus_epi16(words, words));
}

// Exchanges lanes i and i + HALF of each 2 HALF neighbours.
template <int HALF>
inline Vec swap_lanes(Vec x) {
    if constexpr (HALF == 1) return _mm256_permute_ps(x, 0xb1);
    if constexpr (HALF == 2) return _mm256_permute_ps(x, 0x4e);
    if constexpr (HALF == 4) return _mm256_permute2f128_ps(x, x, 1);
}

// x * 2^n for a whole n of at most 0; below the smallest normal number the result is 0.
inline Vec scale_by_power(Vec x, Vec n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    const Vec power = _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
    return _mm256_and_ps(_mm256_mul_ps(x, power), _mm256_cmp_ps(n, set1(-126.0f), _CMP_GE_OQ));
}

// Transposes the 8 x 8 values of `x`.
inline void transpose(Vec *x) {
    Vec pairs[8];
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    Vec quads[8];
    for (int i = 0; i < 8; i += 4) {
        quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
        quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
        quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
        quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        x[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
        x[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
    }
}

// Lane i of the result is the sum of the lanes of columns[i].
inline Vec reduce_columns(const Vec *columns) {
    const Vec low = _mm256_hadd_ps(_mm256_hadd_ps(columns[0], columns[1]), _mm256_hadd_ps(columns[2], columns[3]));
    const Vec high = _mm256_hadd_ps(_mm256_hadd_ps(columns[4], columns[5]), _mm256_hadd_ps(columns[6], columns[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

inline Vec load(const Bf16 *p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

inline Vec load(const Fp16 *p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))); }

inline void store(Bf16 *p, Vec x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm256_castsi256_si128(packed));
}

inline void store(Fp16 *p, Vec x) {
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

template <class Number>
inline Chunk load_chunk(const Number *p) {
    return {{load(p), load(p + LANES)}};
}

// Widening bf16 in place is cheapest as the even values and the odd ones: that is the page order of a bf16 chunk.
inline Chunk load_chunk(const Bf16 *p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    return {{_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)),
             _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xffff0000))))}};
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
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    const Vec low = _mm256_permutevar8x32_ps(x.v[0], order);
    const Vec high = _mm256_permutevar8x32_ps(x.v[1], order);
    return {{_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)}};
}

inline Chunk to_natural_order(Tag<Bf16>, Chunk x) {
    const Vec low = _mm256_unpacklo_ps(x.v[0], x.v[1]);
    const Vec high = _mm256_unpackhi_ps(x.v[0], x.v[1]);
    return {{_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)}};
}

}  // namespace
}  // namespace kvfold
