// The functions of layer_kernels.h, for any vector width. A path includes its simd_*.h first.
#pragma once

#include "int8_rows.h"
#include "softmax.h"

namespace kvfold {
namespace {

// x as the model's number would hold it.
template <class Model>
inline Vec rounded(Vec x) {
    Model numbers[LANES];
    store(numbers, x);
    return load(numbers);
}

template <>
inline Vec rounded<float>(Vec x) {
    return x;
}

template <class Model>
inline void add_row(const Model *in, const Model *addend, Model *sum, int64_t width) {
    for (int64_t i = 0; i < width; i += LANES) store(sum + i, add(load(in + i), load(addend + i)));
}

template <class Model>
void rms_norm_rows(const void *argument, int64_t first_row, int64_t stop_row) {
    const NormCall &call = *static_cast<const NormCall *>(argument);
    const auto *weight = reinterpret_cast<const Model *>(call.weight);
    const Vec offset = set1(call.weight_offset);
    for (int64_t row = first_row; row < stop_row; ++row) {
        const auto *in = reinterpret_cast<const Model *>(call.in) + row * call.width;
        auto *out = reinterpret_cast<Model *>(call.out) + row * call.width;
        if (call.addend != nullptr) {
            auto *sum = reinterpret_cast<Model *>(call.sum) + row * call.width;
            add_row(in, reinterpret_cast<const Model *>(call.addend) + row * call.width, sum, call.width);
            in = sum;
        }
        Vec squares = set1(0.0f);
        for (int64_t i = 0; i < call.width; i += LANES) {
            const Vec x = load(in + i);
            squares = fma(x, x, squares);
        }
        const float mean = reduce_add(squares) / static_cast<float>(call.width);
        const Vec factor = set1(1.0f / std::sqrt(mean + call.epsilon));
        for (int64_t i = 0; i < call.width; i += LANES) {
            Vec x = mul(load(in + i), factor);
            if (call.round_first) x = rounded<Model>(x);
            store(out + i, mul(x, add(load(weight + i), offset)));
        }
    }
}

// e^x for x <= 0, by 2^y: what y loses in rounding comes back as a factor, since activations, unlike softmax weights,
// are compared to the last bit with what a model's own code computes.
inline Vec exp_of_nonpositive(Vec x) {
    const Vec y = mul(x, set1(LOG2_E));
    const Vec lost = fma(x, set1(LOG2_E), sub(set1(0.0f), y));
    return mul(exp2_of_nonpositive(y), fma(lost, set1(0.69314718056f), set1(1.0f)));
}

// 1 / (1 + e^-x), by the exponential of whichever of x and -x is not above 0.
inline Vec sigmoid(Vec x) {
    const Vec e = exp_of_nonpositive(sub(set1(0.0f), abs(x)));
    const Vec one = set1(1.0f);
    return div(select_less(x, set1(0.0f), e, one), add(one, e));
}

// 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
inline Vec gelu_tanh(Vec x) {
    const Vec cube = mul(mul(x, x), x);
    const Vec inner = mul(set1(0.79788456080286536f), fma(set1(0.044715f), cube, x));
    return mul(mul(set1(0.5f), x), add(set1(1.0f), tanh(inner)));
}

template <class Model>
void gate_rows(const void *argument, int64_t first_row, int64_t stop_row) {
    const GateCall &call = *static_cast<const GateCall *>(argument);
    for (int64_t row = first_row; row < stop_row; ++row) {
        const auto *gate = reinterpret_cast<const Model *>(call.gate_up) + row * 2 * call.width;
        const auto *up = gate + call.width;
        auto *out = reinterpret_cast<Model *>(call.out) + row * call.width;
        for (int64_t i = 0; i < call.width; i += LANES) {
            const Vec x = load(gate + i);
            const Vec activated = call.activation == SILU ? mul(x, sigmoid(x)) : gelu_tanh(x);
            store(out + i, mul(rounded<Model>(activated), load(up + i)));
        }
    }
}

// Rotates the pairs (i, i + dim / 2) of one head.
template <class Model>
inline void rotate_head(Model *head, const Model *cosine, const Model *sine, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i += LANES) {
        const Vec low = load(head + i);
        const Vec high = load(head + half + i);
        const Vec low_sine = rounded<Model>(mul(sub(set1(0.0f), high), load(sine + i)));
        const Vec high_sine = rounded<Model>(mul(low, load(sine + half + i)));
        store(head + i, add(rounded<Model>(mul(low, load(cosine + i))), low_sine));
        store(head + half + i, add(rounded<Model>(mul(high, load(cosine + half + i))), high_sine));
    }
}

template <class Model>
void rotate_rows(const void *argument, int64_t first_row, int64_t stop_row) {
    const RotateCall &call = *static_cast<const RotateCall *>(argument);
    for (int64_t row = first_row; row < stop_row; ++row) {
        const auto *cosine = reinterpret_cast<const Model *>(call.cosine) + row * call.dim;
        const auto *sine = reinterpret_cast<const Model *>(call.sine) + row * call.dim;
        for (const RotatedHeads &part : call.parts) {
            auto *token = reinterpret_cast<Model *>(part.data) + row * part.token;
            for (int64_t head = 0; head < part.heads; ++head) {
                rotate_head(token + head * part.head, cosine, sine, call.dim);
            }
        }
    }
}

template <class Model>
const LayerKernels *layer_kernels_of() {
    static const LayerKernels kernels = {rms_norm_rows<Model>, gate_rows<Model>, rotate_rows<Model>,
                                         quantize_rows<Model>, restore_rows<Model>};
    return &kernels;
}

inline const LayerKernels *find_layer_kernels(Number number) {
    switch (number) {
        case FLOAT32: return layer_kernels_of<float>();
        case BFLOAT16: return layer_kernels_of<Bf16>();
        case FLOAT16: return layer_kernels_of<Fp16>();
    }
    return nullptr;
}

}  // namespace
}  // namespace kvfold
