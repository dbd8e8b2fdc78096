// x86-64 with AVX-512 F, BW, DQ and VL.
#include "simd_avx512.h"
// The path's own vectors come first.
#include "path.h"

namespace kvfold {
const Kernels *avx512_kernels(Number number) { return find_kernels(number); }
const LayerKernels *avx512_layer_kernels(Number number) { return find_layer_kernels(number); }
}  // namespace kvfold
