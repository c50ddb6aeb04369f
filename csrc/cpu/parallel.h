// Splitting work over the calling thread's share of processors. Compiled into the path's own
// namespace; the OpenMP runtime is the one that torch has loaded.
#pragma once

#include <omp.h>

#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/path.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

// Calls body(begin, end) on contiguous pieces of [0, count), one for each thread; in the calling
// thread alone when there are fewer than two pieces of `grain` items, since starting a team costs
// several microseconds.
template <typename Body>
static inline void parallel_for(int64_t count, int64_t grain, const Body& body) {
    const int64_t pieces = count / (grain > 0 ? grain : 1);
    const int threads = static_cast<int>(pieces < num_threads() ? pieces : num_threads());
    if (threads <= 1) {
        if (count > 0) body(int64_t{0}, count);
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        const int64_t team = omp_get_num_threads(), rank = omp_get_thread_num();
        const int64_t begin = count * rank / team, end = count * (rank + 1) / team;
        if (begin < end) body(begin, end);
    }
}

}  // namespace sglite::cpu::SGLITE_CPU_PATH
