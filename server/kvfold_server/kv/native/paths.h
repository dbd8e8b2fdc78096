// The paths of this library, and which of them this machine can run.
#pragma once

#include "kernels.h"
#include "layer_kernels.h"

namespace kvfold {

bool path_available(Path path);

// Whether the path takes head dimensions like these: its chunks divide them.
bool path_fits(Path path, int64_t key_dim, int64_t value_dim);

// The kernels of an available path; null if it has none for the number.
const Kernels *find_path_kernels(Path path, Number number);

// The fastest available path whose chunks divide a row of so many values.
Path best_path(int64_t values);

// The functions of an available path between a layer's products.
const LayerKernels *find_layer_kernels(Path path, Number number);

}  // namespace kvfold
