// The threads that work on a kernel together. They come from the OpenMP runtime that torch has
// loaded, so that the process has one set of them. A parallel region of it costs a microsecond, but
// ten and more where the process has more threads than processors (a team of the caller's and one
// of the engine's are enough), for then threads do not wait for the next region but sleep. Whoever
// has many small jobs to do one after the other therefore holds a team: one region around all of
// them, whose threads wait for jobs without sleeping.
#pragma once

#include <atomic>
#include <cstdint>

namespace sglite::cpu {

// Where the threads of a job wait for each other.
struct Rendezvous {
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<uint32_t> round{0};
};

// A thread's place among those of a job.
struct Member {
    int rank, size;
    Rendezvous* rendezvous;

    // Returns once all threads of the job have called it.
    void barrier() const;
};

using Job = void (*)(const void* context, const Member& member);

// Calls `job` in at most `threads` threads, this one being the first, and returns when all are
// done. The job must not throw, nor start another.
void run_job(int threads, Job job, const void* context);

// Calls `body`, and holds a team of at most `threads` threads meanwhile: they do what jobs this
// thread starts in it. What `body` throws is thrown on.
void hold_team(int threads, void (*body)(const void* context), const void* context);

// Whether this thread holds a team of several. Little work is then worth sharing.
bool holds_team();

}  // namespace sglite::cpu
