// How many threads a job may have while others want the processors as well.
#pragma once

#include <algorithm>
#include <chrono>

namespace sglite::cpu {

// A job ends when all threads that take part have done their pieces. On processors that other
// processes keep busy a thread may lose its own for many milliseconds, or get one only when nothing
// is left to do, and a step of a hundred small jobs then takes half a second. So a thread that has
// waited longer for the others than it would have taken for their work does without them for a
// while, and for longer each time that this happens again soon after. For one calling thread.
class Crowding {
  public:
    using Clock = std::chrono::steady_clock;

    // How many of `threads` the next job may have.
    int allowed(int threads) const {
        return alone_for_ != Clock::duration::zero() && Clock::now() < alone_until_ ? 1 : threads;
    }

    // A job of so many threads has ended.
    // began, done: when the calling thread began, and found nothing left to take.
    void ended(int threads, Clock::time_point began, Clock::time_point done) {
        const Clock::time_point now = Clock::now();
        const Clock::duration waited = now - done;
        if (waited < kWorthCounting || waited < (threads - 1) * (done - began)) return;
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

}  // namespace sglite::cpu
