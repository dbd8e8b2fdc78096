// The paths of this library, and which of them this machine can run.
#pragma once

#include "kernels.h"

namespace kvfold {

bool path_available(Path path);

// Whether the path takes head dimensions like these: its chunks divide them.
bool path_fits(Path path, int64_t key_dim, int64_t value_dim);

// The kernels of an available path; null if it has none for the number.
const Kernels *find_path_kernels(Path path, Number number);

}  // namespace kvfold
