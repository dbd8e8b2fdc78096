// The paths of this library, and which of them this machine can run.
#pragma once

#include "kernels.h"
#include "layer_kernels.h"

namespace kvfold {

bool path_available(Path path);

// Whether the path takes rows of so many values, such as a key and a value: its chunks divide both.
bool path_fits(Path path, int64_t first_width, int64_t second_width);

// The kernels of an available path; null if it has none for the number.
const Kernels *find_path_kernels(Path path, Number number);

// The fastest available path that takes them.
Path best_path(int64_t first_width, int64_t second_width);

// The functions of an available path between a layer's products.
const LayerKernels *find_layer_kernels(Path path, Number number);

}  // namespace kvfold
