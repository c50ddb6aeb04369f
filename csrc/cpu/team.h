// The threads that work on a kernel together. They come from the OpenMP runtime that torch has
// loaded, so that the process has one set of them. A parallel region of it costs a microsecond, but
// ten and more where the process has more threads than processors (a team of the caller's and one
// of the engine's are enough), for then threads do not wait for the next region but sleep. Whoever
// has many small jobs to do one after the other therefore holds a team: one region around all of
// them, whose threads wait for jobs without sleeping.
#pragma once

namespace sglite::cpu {

// Takes pieces of a piece of work, whichever nobody has taken yet, until there are none. `rank`
// tells the threads at work apart.
using Job = void (*)(const void* context, int rank);

// Calls `job` in at most `threads` threads, this one with rank 0, and returns when all that were
// called are done. Within a held team nobody waits for a thread that has not begun: another process
// may have its processor, and this one may take all pieces. After long waits it is this thread
// alone for a while (cpu/crowding.h). The job must not throw, nor start another.
void run_job(int threads, Job job, const void* context);

// Calls `body`, and holds a team of at most `threads` threads meanwhile, if there are to be others
// now (cpu/crowding.h): they do what jobs this thread starts in it. What `body` throws is thrown
// on.
void hold_team(int threads, void (*body)(const void* context), const void* context);

// Whether this thread holds a team of several. Little work is then worth sharing.
bool holds_team();

// Ends the threads that wait for this one's next job. A copy of the process that `fork` makes has
// none of them, and would wait for them forever at its first job.
void pause_teams();

}  // namespace sglite::cpu
