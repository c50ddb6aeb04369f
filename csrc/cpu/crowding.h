// How many threads a parallel region may have while others want the processors as well.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>

namespace sglite::cpu {

// A region ends when all of its threads have been there. On processors that other processes keep
// busy a thread that sleeps begins milliseconds after it was called, when nothing is left to do for
// it: a step of a hundred small regions then takes half a second. So a thread whose region has
// waited in vain does without others for a while, and for longer each time that this happens again
// soon after. For one calling thread.
class Crowding {
  public:
    using Clock = std::chrono::steady_clock;

    // How many of `threads` the next region may have.
    int allowed(int threads) const {
        return alone_for_ != Clock::duration::zero() && Clock::now() < alone_until_ ? 1 : threads;
    }

    // A region has waited for threads that found nothing left.
    void waited_in_vain(Clock::duration waited) {
        if (waited < kWorthCounting) return;
        const Clock::time_point now = Clock::now();
        const bool again = now < alone_until_ + alone_for_;
        alone_for_ = again ? std::min(2 * alone_for_, kLongest) : kShortest;
        alone_until_ = now + alone_for_;
    }

  private:
    // A sleeping thread takes up to 0.1 ms on an idle machine, and a time slice is a few ms.
    static constexpr Clock::duration kWorthCounting = std::chrono::microseconds(300);
    static constexpr Clock::duration kShortest = std::chrono::milliseconds(10);
    static constexpr Clock::duration kLongest = std::chrono::milliseconds(160);

    Clock::duration alone_for_{};
    Clock::time_point alone_until_{};
};

// One region: who has come, and how long the calling thread waited at its end.
class Attendance {
  public:
    explicit Attendance(Crowding& crowding) : crowding_(crowding) {}

    // To be called by each thread but the first, when it begins.
    void come() { come_.fetch_add(1, std::memory_order_relaxed); }

    // To be called by the first when nothing is left to take. expected: how many others.
    void finish(int expected) {
        misses_some_ = come_.load(std::memory_order_relaxed) < expected;
        if (misses_some_) finished_ = Crowding::Clock::now();
    }

    // To be called behind the region.
    void leave() {
        if (misses_some_) crowding_.waited_in_vain(Crowding::Clock::now() - finished_);
    }

  private:
    Crowding& crowding_;
    std::atomic<int> come_{0};
    bool misses_some_ = false;
    Crowding::Clock::time_point finished_;
};

}  // namespace sglite::cpu
