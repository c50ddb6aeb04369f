#include "cpu/team.h"

#include <omp.h>
#include <sched.h>

#include <exception>

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
    constexpr int kSpins = 4096;
    for (int spins = 0; !condition(); ++spins) {
        if (spins < kSpins) {
            pause();
        } else {
            sched_yield();
        }
    }
}

class HeldTeam {
  public:
    void open(int size) { size_ = size; }
    int size() const { return size_; }

    void start(int threads, Job job, const void* context) {
        threads_ = threads < size_ ? threads : size_;
        job_ = job;
        context_ = context;
        busy_.store(size_ - 1, std::memory_order_relaxed);
        round_.fetch_add(1, std::memory_order_release);
        job(context, {0, threads_, &rendezvous_});
        wait_until([&] { return busy_.load(std::memory_order_acquire) == 0; });
    }

    void end() {
        job_ = nullptr;
        round_.fetch_add(1, std::memory_order_release);
    }

    // What all threads but the first do, until the end.
    void serve(int rank) {
        for (uint32_t seen = 0;; ++seen) {
            wait_until([&] { return round_.load(std::memory_order_acquire) != seen; });
            if (!job_) return;
            if (rank < threads_) job_(context_, {rank, threads_, &rendezvous_});
            busy_.fetch_sub(1, std::memory_order_release);
        }
    }

  private:
    int size_ = 1, threads_ = 0;
    Job job_ = nullptr;
    const void* context_ = nullptr;
    Rendezvous rendezvous_;
    alignas(64) std::atomic<uint32_t> round_{0};
    alignas(64) std::atomic<int> busy_{0};
};

thread_local HeldTeam* held_team = nullptr;

}  // namespace

void Member::barrier() const {
    const uint32_t round = rendezvous->round.load(std::memory_order_relaxed);
    if (rendezvous->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
        rendezvous->arrived.store(0, std::memory_order_relaxed);
        rendezvous->round.store(round + 1, std::memory_order_release);
    } else {
        wait_until([&] { return rendezvous->round.load(std::memory_order_acquire) != round; });
    }
}

void run_job(int threads, Job job, const void* context) {
    Rendezvous rendezvous;
    if (threads <= 1) return job(context, {0, 1, &rendezvous});
    if (held_team) return held_team->start(threads, job, context);
#pragma omp parallel num_threads(threads)
    job(context, {omp_get_thread_num(), omp_get_num_threads(), &rendezvous});
}

void hold_team(int threads, void (*body)(const void* context), const void* context) {
    if (threads <= 1 || held_team) return body(context);
    HeldTeam team;
    std::exception_ptr error;
#pragma omp parallel num_threads(threads)
    if (omp_get_thread_num() == 0) {
        team.open(omp_get_num_threads());
        held_team = team.size() > 1 ? &team : nullptr;
        try {
            body(context);
        } catch (...) {
            error = std::current_exception();
        }
        held_team = nullptr;
        team.end();
    } else {
        team.serve(omp_get_thread_num());
    }
    if (error) std::rethrow_exception(error);
}

bool holds_team() { return held_team; }

}  // namespace sglite::cpu
