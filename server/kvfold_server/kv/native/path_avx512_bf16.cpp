// x86-64 with AVX-512 and its bf16 products. On other numbers it is the AVX-512 path.
#include "simd_avx512.h"
// The path's own vectors come first.
#include "path.h"

namespace kvfold {
const Kernels *avx512_bf16_kernels(Number number) { return find_kernels(number); }
const LayerKernels *avx512_bf16_layer_kernels(Number number) { return find_layer_kernels(number); }
}  // namespace kvfold
