// One float at a time: runs anywhere, takes any head dimension.
#pragma once

#include <cmath>

#include "numbers.h"

namespace kvfold {
namespace {

using Vec = float;

constexpr int LANES = 1;
constexpr int CHUNK_VECS = 1;          // vectors of a chunk, in which the values of a row are read
constexpr int PRODUCT_VECS = 4;        // columns, in vectors, of a block of a matrix product
constexpr int ACCUMULATED_CHUNKS = 4;  // chunks of values that a decode pass keeps in registers

struct Chunk {
    Vec v[CHUNK_VECS];
};

inline Vec set1(float x) { return x; }
inline Vec load(const float *p) { return *p; }
inline void store(float *p, Vec x) { *p = x; }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec sub(Vec a, Vec b) { return a - b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec div(Vec a, Vec b) { return a / b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec abs(Vec a) { return std::fabs(a); }
inline Vec with_sign_of(Vec magnitude, Vec sign) { return std::copysign(magnitude, sign); }
inline Vec select_less(Vec a, Vec b, Vec yes, Vec no) { return a < b ? yes : no; }
inline bool any_greater(Vec a, Vec b) { return a > b; }
inline Vec round(Vec a) { return std::nearbyint(a); }
inline float reduce_max(Vec a) { return a; }
inline float reduce_add(Vec a) { return a; }

// Rounded to whole numbers, which lie between 0 and 255.
inline void store_bytes(uint8_t *p, Vec x) { *p = x >= 0.0f && x <= 255.0f ? static_cast<uint8_t>(round(x)) : 0; }

// x * 2^n for a whole n of at most 0; below the smallest normal number the result is 0.
inline Vec scale_by_power(Vec x, Vec n) {
    if (n < -126.0f) return 0.0f;
    const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return x * power;
}

inline void transpose(Vec *) {}
template <int HALF>
inline Vec swap_lanes(Vec x) {
    return x;
}
inline Vec reduce_columns(const Vec *columns) { return columns[0]; }

inline float to_float(Bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline float to_float(Fp16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
    const uint32_t magnitude = x.bits & 0x7fff;
    if (magnitude < 0x0400) return std::copysign(static_cast<float>(magnitude) * 0x1p-24f, sign ? -1.0f : 1.0f);
    const uint32_t exponent = magnitude >= 0x7c00 ? 0xffu << 23 : ((magnitude >> 10) + 112) << 23;
    const uint32_t bits = sign | exponent | (magnitude & 0x03ff) << 13;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline Bf16 to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return {0x7fc0};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline Fp16 to_fp16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    const float magnitude = std::fabs(x);
    if (x != x) return {0x7e00};
    if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
    if (magnitude < 0x1p-14f) {  // subnormal: the processor rounds when it drops the bits below 2^-24
        return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24f)))};
    }
    const uint32_t rounded = (bits & 0x7fffffff) + 0x0fff + (bits >> 13 & 1);
    return {static_cast<uint16_t>(sign | (rounded - (112u << 23)) >> 13)};
}

inline Vec load(const Bf16 *p) { return to_float(*p); }
inline Vec load(const Fp16 *p) { return to_float(*p); }
inline void store(Bf16 *p, Vec x) { *p = to_bf16(x); }
inline void store(Fp16 *p, Vec x) { *p = to_fp16(x); }

template <class Number>
inline Chunk load_chunk(const Number *p) {
    return {{load(p)}};
}

template <class Number>
inline Chunk to_page_order(Tag<Number>, Chunk x) {
    return x;
}

template <class Number>
inline Chunk to_natural_order(Tag<Number>, Chunk x) {
    return x;
}

}  // namespace
}  // namespace kvfold
