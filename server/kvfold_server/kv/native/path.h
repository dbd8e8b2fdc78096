// The table of a path's functions. A path_*.cpp includes one simd_*.h and this, and is compiled for its instruction
// set.
#pragma once

#include "decode.h"
#include "layer_rows.h"
#include "prefill.h"

namespace kvfold {
namespace {

template <class Model, class Page>
int64_t scratch_bytes(const Cache &cache, int64_t heads) {
    const int64_t decoding = decode_scratch_bytes<Model, Page>(cache, heads);
    const int64_t prefilling = prefill_scratch_bytes(cache, heads);
    return decoding > prefilling ? decoding : prefilling;
}

template <class Model, class Page, class Product = Fp32Product<Model, Page>>
const Kernels *kernels_of() {
    static const Kernels kernels = {decode<Model, Page>, prefill<Model, Product>,
                                    merge<Model, typename ValueSum<Model, Page>::Order>, scratch_bytes<Model, Page>};
    return &kernels;
}

inline const Kernels *find_kernels(Number number) {
    switch (number) {
        case FLOAT32: return kernels_of<float, NumberPage<float>>();
#ifdef __AVX512BF16__
        case BFLOAT16: return kernels_of<Bf16, NumberPage<Bf16>, Bf16Product>();
#else
        case BFLOAT16: return kernels_of<Bf16, NumberPage<Bf16>>();
#endif
        case FLOAT16: return kernels_of<Fp16, NumberPage<Fp16>>();
    }
    return nullptr;
}

}  // namespace
}  // namespace kvfold
