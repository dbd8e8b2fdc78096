// What stands before and after a product of int8 numbers, for any vector width. A path includes its simd_*.h first.
#pragma once

#include "layer_kernels.h"

namespace kvfold {
namespace {

constexpr float LEAST_PEAK = 1e-30f;  // of a row; a row of zeros is divided by it

// The sums and differences of lanes i and i + HALF of each 2 HALF neighbours.
template <int HALF>
inline Vec combine_lanes(Vec x) {
    float signs[LANES];
    for (int i = 0; i < LANES; ++i) signs[i] = (i & HALF) != 0 ? -1.0f : 1.0f;
    return fma(x, load(signs), swap_lanes<HALF>(x));
}

// out = in times the Hadamard matrix, which is orthogonal up to its size: what is large in one value is spread over all,
// so that a row's step, which follows from its largest value, is small (as in QuaRot, arXiv:2404.00456).
template <class Model>
inline void spread(const Model *in, int64_t block, float *out) {
    for (int64_t i = 0; i < block; i += LANES) {
        Vec x = load(in + i);
        if constexpr (LANES > 1) x = combine_lanes<1>(x);
        if constexpr (LANES > 2) x = combine_lanes<2>(x);
        if constexpr (LANES > 4) x = combine_lanes<4>(x);
        if constexpr (LANES > 8) x = combine_lanes<8>(x);
        store(out + i, x);
    }
    for (int64_t half = LANES; half < block; half *= 2) {
        for (int64_t i = 0; i < block; i += 2 * half) {
            for (int64_t j = i; j < i + half; j += LANES) {
                const Vec low = load(out + j);
                const Vec high = load(out + j + half);
                store(out + j, add(low, high));
                store(out + j + half, sub(low, high));
            }
        }
    }
}

// Spreads each block twice, to find the row's peak and to round: cheaper than keeping the row.
template <class Model>
void quantize_rows(const void *argument, int64_t first_row, int64_t stop_row) {
    const QuantizeCall &call = *static_cast<const QuantizeCall *>(argument);
    const Vec zero_point = set1(static_cast<float>(ZERO_POINT));
    float block[LARGEST_BLOCK];
    for (int64_t row = first_row; row < stop_row; ++row) {
        const auto *in = reinterpret_cast<const Model *>(call.in) + row * call.width;
        uint8_t *out = call.out + row * call.width;
        Vec peaks = set1(LEAST_PEAK);
        Vec zeros = set1(0.0f);  // unless a value is not finite: a maximum may pass that over
        for (int64_t start = 0; start < call.width; start += call.block) {
            spread(in + start, call.block, block);
            for (int64_t i = 0; i < call.block; i += LANES) {
                const Vec x = load(block + i);
                peaks = max(peaks, abs(x));
                zeros = fma(x, set1(0.0f), zeros);
            }
        }
        const float peak = reduce_max(peaks) + reduce_add(zeros);
        call.steps[row] = peak / MOST_STEPS;
        const Vec factor = set1(MOST_STEPS / peak);
        for (int64_t start = 0; start < call.width; start += call.block) {
            spread(in + start, call.block, block);
            for (int64_t i = 0; i < call.block; i += LANES) {
                store_bytes(out + start + i, fma(load(block + i), factor, zero_point));
            }
        }
    }
}

template <class Model>
void restore_rows(const void *argument, int64_t first_row, int64_t stop_row) {
    const RestoreCall &call = *static_cast<const RestoreCall *>(argument);
    const auto *bias = reinterpret_cast<const Model *>(call.bias);
    for (int64_t row = first_row; row < stop_row; ++row) {
        const float *in = call.in + row * call.width;
        auto *out = reinterpret_cast<Model *>(call.out) + row * call.width;
        const Vec step = set1(call.steps[row]);
        for (int64_t i = 0; i < call.width; i += LANES) {
            const Vec addend = bias == nullptr ? set1(0.0f) : load(bias + i);
            store(out + i, fma(load(in + i), step, addend));
        }
    }
}

}  // namespace
}  // namespace kvfold
