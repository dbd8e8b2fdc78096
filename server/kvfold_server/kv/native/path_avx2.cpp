// x86-64 with AVX2, FMA and F16C.
#include "simd_avx2.h"
// The path's own vectors come first.
#include "path.h"

namespace kvfold {
const Kernels *avx2_kernels(Number number) { return find_kernels(number); }
const LayerKernels *avx2_layer_kernels(Number number) { return find_layer_kernels(number); }
}  // namespace kvfold
