// Choosing a path for a layer's functions, and sharing their rows among the threads.
#include <algorithm>
#include <atomic>

#include "layer_kernels.h"
#include "paths.h"
#include "team.h"

using namespace kvfold;

namespace {

// Pieces that a thread's share is cut into, so that one that starts late does less.
constexpr int64_t PIECES_PER_THREAD = 4;

struct Work {
    RowsKernel kernel;
    const void *call;
    int64_t rows;
    int64_t piece;
    std::atomic<int64_t> next_row;
};

void take_rows(void *argument) {
    Work &work = *static_cast<Work *>(argument);
    for (;;) {
        const int64_t first = work.next_row.fetch_add(work.piece, std::memory_order_relaxed);
        if (first >= work.rows) return;
        work.kernel(work.call, first, std::min(first + work.piece, work.rows));
    }
}

// Every row is computed alone and in one order, so the number of threads changes no result.
void run_rows(const Workers &workers, RowsKernel kernel, const void *call, int64_t rows, int64_t cycles_per_row) {
    if (rows * cycles_per_row < SHARED_COST || workers.threads <= 1) {
        kernel(call, 0, rows);
        return;
    }
    const int64_t pieces = PIECES_PER_THREAD * workers.threads;
    Work work{kernel, call, rows, std::max<int64_t>(1, (rows + pieces - 1) / pieces), {0}};
    run({reinterpret_cast<ParallelFunction>(workers.parallel), workers.threads}, take_rows, &work);
}

const LayerKernels *kernels_for(int32_t number, int64_t width) {
    if (number < FLOAT32 || number > FLOAT16) return nullptr;
    return find_layer_kernels(best_path(width, width), Number(number));
}

}  // namespace

int32_t kvfold_rms_norm(const Workers *workers, int32_t number, const NormCall *call, int64_t rows) {
    const LayerKernels *kernels = kernels_for(number, call->width);
    if (kernels == nullptr) return NO_SUCH_NUMBER;
    run_rows(*workers, kernels->rms_norm, call, rows, call->width / 4);
    return OK;
}

int32_t kvfold_gate(const Workers *workers, int32_t number, const GateCall *call, int64_t rows) {
    const LayerKernels *kernels = kernels_for(number, call->width);
    if (kernels == nullptr) return NO_SUCH_NUMBER;
    run_rows(*workers, kernels->gate, call, rows, call->width * 3);
    return OK;
}

int32_t kvfold_rotate(const Workers *workers, int32_t number, const RotateCall *call, int64_t rows) {
    const LayerKernels *kernels = kernels_for(number, call->dim / 2);
    if (kernels == nullptr) return NO_SUCH_NUMBER;
    const int64_t heads = call->parts[0].heads + call->parts[1].heads;
    run_rows(*workers, kernels->rotate, call, rows, heads * call->dim / 2);
    return OK;
}

int32_t kvfold_quantize(const Workers *workers, int32_t number, const QuantizeCall *call, int64_t rows) {
    const LayerKernels *kernels = kernels_for(number, call->block);
    if (kernels == nullptr) return NO_SUCH_NUMBER;
    run_rows(*workers, kernels->quantize, call, rows, call->width * 3 / 2);
    return OK;
}

int32_t kvfold_restore(const Workers *workers, int32_t number, const RestoreCall *call, int64_t rows) {
    const LayerKernels *kernels = kernels_for(number, call->width);
    if (kernels == nullptr) return NO_SUCH_NUMBER;
    run_rows(*workers, kernels->restore, call, rows, call->width / 2);
    return OK;
}
