// What a path computes between a layer's matrix products, row by row. Each reads and writes memory once, where separate
// operations would do so for every step of the arithmetic.
//
// They round where transformers' own code rounds (to the model's numbers, after each operation that it writes down), so
// that what follows sees the same values.
#pragma once

#include "interface.h"

namespace kvfold {

using RowsKernel = void (*)(const void *call, int64_t first_row, int64_t stop_row);

// A path's functions for one number of the model.
struct LayerKernels {
    RowsKernel rms_norm;  // of NormCall
    RowsKernel gate;      // of GateCall
    RowsKernel rotate;    // of RotateCall; a row is a token
    RowsKernel quantize;  // of QuantizeCall
    RowsKernel restore;   // of RestoreCall
};

// One line for each path that the build could compile.
const LayerKernels *plain_layer_kernels(Number number);
const LayerKernels *avx2_layer_kernels(Number number);
const LayerKernels *avx512_layer_kernels(Number number);
const LayerKernels *avx512_bf16_layer_kernels(Number number);

}  // namespace kvfold
