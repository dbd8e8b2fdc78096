// Any processor.
#include "simd_plain.h"
// The path's own vectors come first.
#include "path.h"

namespace kvfold {
const Kernels *plain_kernels(Number number) { return find_kernels(number); }
const LayerKernels *plain_layer_kernels(Number number) { return find_layer_kernels(number); }
}  // namespace kvfold
