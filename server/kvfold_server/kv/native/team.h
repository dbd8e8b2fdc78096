// Running one function on all threads.
#pragma once

#include <cstdint>

namespace kvfold {

// GOMP_parallel(function, argument, threads, flags): runs the function on a team of threads, this one among them. It is
// the one that the process already has for its matrix products: their threads are still spinning when attention starts,
// so a team starts in about 2 microseconds, and no second set of threads competes for the cores.
using ParallelFunction = void (*)(void (*function)(void *), void *argument, unsigned threads, unsigned flags);

// Processor cycles, roughly. Less than this, about 10 microseconds, one thread does before another has woken up.
constexpr int64_t SHARED_COST = 40'000;

struct Team {
    ParallelFunction parallel;
    int32_t threads;
};

static inline void run(const Team &team, void (*function)(void *), void *argument) {
    if (team.parallel == nullptr || team.threads <= 1) {
        function(argument);
        return;
    }
    team.parallel(function, argument, static_cast<unsigned>(team.threads), 0);
}

}  // namespace kvfold
