// Splitting work over the calling thread's share of processors. Compiled into the path's own
// namespace.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/path.h"
#include "cpu/team.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

// What is handed out piece by piece to the threads of a job, to each that asks.
class SharedCounter {
  public:
    int64_t take() { return __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED); }

    // Takes size(begin) items from `begin` on, which it gives; none if that is `end`.
    template <typename Size>
    int64_t take_some(int64_t end, const Size& size) {
        int64_t begin = __atomic_load_n(&next_, __ATOMIC_RELAXED);
        while (begin < end &&
               !__atomic_compare_exchange_n(&next_, &begin, begin + size(begin), true,
                                            __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
        }
        return begin;
    }

  private:
    int64_t next_ = 0;
};

// Calls body(rank) in at most `threads` threads; see Job.
template <typename Body>
static inline void run_together(int threads, const Body& body) {
    const Job job = [](const void* context, int rank) {
        (*static_cast<const Body*>(context))(rank);
    };
    run_job(threads, job, &body);
}

// How much work makes up for another thread, given how much does where starting one costs several
// microseconds: in a held team, where it costs less, an eighth of that.
static inline int64_t worthwhile(int64_t grain) { return holds_team() ? (grain + 7) / 8 : grain; }

// Calls body(begin, end) on contiguous pieces of [0, count), several for each thread; in the
// calling thread alone when there are fewer than two pieces that are worth another, as `grain`
// items are outside of held teams.
template <typename Body>
static inline void parallel_for(int64_t count, int64_t grain, const Body& body) {
    constexpr int64_t kPiecesForEach = 4;
    const int64_t least = worthwhile(grain);
    const int64_t grains = count / (least > 0 ? least : 1);
    const int threads = static_cast<int>(grains < num_threads() ? grains : num_threads());
    if (threads <= 1) {
        if (count > 0) body(int64_t{0}, count);
        return;
    }
    const int64_t pieces = count < threads * kPiecesForEach ? count : threads * kPiecesForEach;
    SharedCounter next;
    run_together(threads, [&](int) {
        for (int64_t piece; (piece = next.take()) < pieces;) {
            body(count * piece / pieces, count * (piece + 1) / pieces);
        }
    });
}

}  // namespace sglite::cpu::SGLITE_CPU_PATH
