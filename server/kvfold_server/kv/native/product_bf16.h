// Prefill's products in bf16: pairs of the inner dimension, multiplied and added by the processor in fp32.
#pragma once

#include "product.h"

namespace kvfold {
namespace {

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

}  // namespace
}  // namespace kvfold
