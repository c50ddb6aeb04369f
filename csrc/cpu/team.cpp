#include "cpu/team.h"

#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

#include "cpu/crowding.h"

namespace sglite::cpu {

namespace {

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// What is waited for takes microseconds, unless another process has the processor: then it should
// get this one.
template <typename Condition>
void wait_until(const Condition& condition) {
    constexpr int kSpins = 1 << 12;
    for (int spins = 0; !condition(); ++spins) {
        if (spins < kSpins) {
            pause();
        } else {
            sched_yield();
        }
    }
}

thread_local Crowding crowding;

// A job is open to threads from its start until the first one finds nothing left to take.
class HeldTeam {
  public:
    void open(int size) { size_ = size; }

    void start(int threads, Job job, const void* context) {
        const Crowding::Clock::time_point began = Crowding::Clock::now();
        threads_ = threads;
        job_ = job;
        context_ = context;
        begin_round(kOpen);
        job(context, 0);
        if (!(state_.fetch_and(~kOpen, std::memory_order_acq_rel) & kAtWork)) return;
        const Crowding::Clock::time_point done = Crowding::Clock::now();
        wait_until([&] { return !(state_.load(std::memory_order_acquire) & kAtWork); });
        crowding.ended(std::min(threads, size_), began, done);
    }

    void end() { begin_round(kEnded); }

    // What all threads but the first do, until the end.
    void serve(int rank) {
        for (uint64_t round = 0;;) {
            wait_until([&] { return state_.load(std::memory_order_acquire) / kRound != round; });
            uint64_t state = state_.load(std::memory_order_acquire);
            round = state / kRound;
            if (state & kEnded) return;
            while ((state & kOpen) && state / kRound == round) {
                if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) {
                    continue;
                }
                if (rank < threads_) job_(context_, rank);
                state_.fetch_sub(1, std::memory_order_release);
                break;
            }
        }
    }

  private:
    // Of the state: how many threads beside the first are at work, flags, and the round's number.
    static constexpr uint64_t kAtWork = 0xffff, kOpen = 1 << 16, kEnded = 1 << 17;
    static constexpr uint64_t kRound = 1 << 18;

    void begin_round(uint64_t flag) {
        const uint64_t round = state_.load(std::memory_order_relaxed) / kRound + 1;
        state_.store(round * kRound + flag, std::memory_order_release);
    }

    int size_ = 1, threads_ = 0;
    Job job_ = nullptr;
    const void* context_ = nullptr;
    alignas(64) std::atomic<uint64_t> state_{0};
};

thread_local HeldTeam* held_team = nullptr;

// Calls `first` in this thread, and meanwhile other(rank) in up to `threads` - 1 others.
template <typename First, typename Other>
void run_region(int threads, const First& first, const Other& other) {
    const Crowding::Clock::time_point began = Crowding::Clock::now();
    Crowding::Clock::time_point done;
#pragma omp parallel num_threads(threads)
    if (const int rank = omp_get_thread_num()) {
        other(rank);
    } else {
        first(omp_get_num_threads());
        done = Crowding::Clock::now();
        threads = omp_get_num_threads();  // there may be fewer
    }
    crowding.ended(threads, began, done);
}

}  // namespace

void run_job(int threads, Job job, const void* context) {
    if (threads > 1) threads = crowding.allowed(threads);
    if (threads <= 1) return job(context, 0);
    if (held_team) return held_team->start(threads, job, context);
    run_region(threads, [&](int) { job(context, 0); }, [&](int rank) { job(context, rank); });
}

void hold_team(int threads, void (*body)(const void* context), const void* context) {
    threads = held_team ? 1 : crowding.allowed(threads);
    if (threads <= 1) return body(context);
    HeldTeam team;
    std::exception_ptr error;
    const auto lead = [&](int size) {
        team.open(size);
        held_team = size > 1 ? &team : nullptr;
        try {
            body(context);
        } catch (...) {
            error = std::current_exception();
        }
        held_team = nullptr;
        team.end();
    };
    run_region(threads, lead, [&](int rank) { team.serve(rank); });
    if (error) std::rethrow_exception(error);
}

bool holds_team() { return held_team; }

void pause_teams() { omp_pause_resource_all(omp_pause_hard); }

}  // namespace sglite::cpu
