// How the work of a linear layer is cut up and shared out among threads.
#pragma once

#include "cpu/parallel.h"
#include "kernel_args.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

// x that is laid out anew in no more bytes than this needs no workspace of the caller's.
constexpr int64_t kLinearStackBytes = 16 << 10;

struct Range {
    int64_t begin, end;
};

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Part `index` of `count` nearly equal ones of 0 to `size`.
static inline Range part_of(int64_t size, int64_t index, int64_t count) {
    return {size * index / count, size * (index + 1) / count};
}

// What of 0 to `size` falls to a thread of a job.
static inline Range share_of(int64_t size, const Member& member) {
    return part_of(size, member.rank, member.size);
}

// The rows of x, cut into blocks of nearly equal height.
struct RowBlocks {
    int64_t rows, count;

    RowBlocks(int64_t m, int64_t max_height) : rows(m), count((m + max_height - 1) / max_height) {}
    int64_t begin(int64_t block) const { return rows * block / count; }
    int64_t height(int64_t block) const { return begin(block + 1) - begin(block); }
};

// Units of work: chunks of neighbouring panels for groups of neighbouring row blocks.
class LinearPlan {
  public:
    int threads;

    // row_bytes: of a row of x as it is laid out. least_panels: of a chunk, where there are many.
    LinearPlan(const LinearArgs& args, int64_t panels, int64_t blocks, int64_t row_bytes,
               int64_t least_panels)
        : panels_(panels), blocks_(blocks) {
        // So much arithmetic makes up for starting another thread.
        const int64_t grain = holds_team() ? 1 << 15 : 1 << 18;
        // Row blocks of a group are read once for each panel and should stay in the cache.
        constexpr int64_t kGroupBytes = 1 << 20;
        // Enough to make the work for rows outweigh the reading of a panel.
        constexpr int64_t kGroupBlocks = 8;
        threads =
            static_cast<int>(larger(1, smaller(num_threads(), args.m * args.n * args.k / grain)));
        // Many chunks for each thread, since threads are not equally fast.
        const int64_t least = panels < 8 * threads ? 1 : least_panels;
        chunk_panels_ = larger(panels / (threads * 32) * 2, least);
        chunks_ = (panels + chunk_panels_ - 1) / chunk_panels_;
        groups_ = larger(1 + args.m * row_bytes / kGroupBytes, 4 * threads / chunks_);
        groups_ = smaller(groups_, (blocks + kGroupBlocks - 1) / kGroupBlocks);
    }

    // Calls `run(panels, blocks)` for units until none is left. next: one for all threads.
    template <typename Run>
    void take_units(SharedCounter& next, const Run& run) const {
        for (int64_t unit; (unit = next.take()) < chunks_ * groups_;) {
            const int64_t first = unit % chunks_ * chunk_panels_;
            run(Range{first, smaller(first + chunk_panels_, panels_)},
                part_of(blocks_, unit / chunks_, groups_));
        }
    }

  private:
    int64_t panels_, blocks_, chunk_panels_, chunks_, groups_;
};

}  // namespace sglite::cpu::SGLITE_CPU_PATH
