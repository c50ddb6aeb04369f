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

// The rows of x, cut into blocks: of nearly equal height, or, where `low` is given, of the greatest
// one but for the last two, which share the rest: the last is `low` rows, or they are as equal as
// can be.
struct RowBlocks {
    int64_t rows, max, low, count;

    RowBlocks(int64_t m, int64_t max_height, int64_t low_height = 0)
        : rows(m), max(max_height), low(low_height), count((m + max_height - 1) / max_height) {}

    int64_t begin(int64_t block) const {
        if (!low) return rows * block / count;
        if (block == count) return rows;
        if (block == 0 || block + 1 < count) return block * max;
        const int64_t rest = rows - (count - 2) * max;
        return rows - (rest <= max + low ? low : rest / 2);
    }
    int64_t height(int64_t block) const { return begin(block + 1) - begin(block); }
};

// Panels in the order in which they are worked on: as they lie, or, where the layer is gated, gate
// and up in turn, so that each up finds its gate in the cache.
class PanelOrder {
  public:
    const int64_t count;

    PanelOrder(const LinearArgs& args, int64_t panels)
        : count(panels), half_(args.is_gated ? panels / 2 : 0) {}

    int64_t panel(int64_t turn) const { return half_ ? turn / 2 + turn % 2 * half_ : turn; }
    // How far apart those of two turns are that are taken at once.
    int64_t distance() const { return half_ ? half_ : 1; }

  private:
    int64_t half_;
};

// Units of work: chunks of neighbouring panels, in their order, for groups of neighbouring row
// blocks.
class LinearPlan {
  public:
    int threads;

    // row_bytes: of a row of x as it is laid out. at_once: panels that are best taken together.
    LinearPlan(const LinearArgs& args, int64_t panels, int64_t blocks, int64_t row_bytes,
               int64_t at_once)
        : panels_(panels), blocks_(blocks) {
        // So much arithmetic makes up for starting another thread.
        const int64_t grain = worthwhile(1 << 18);
        // Row blocks of a group are read once for each panel and should stay in the second cache,
        // which processors with AVX-512 have more of.
#if defined(__AVX512F__)
        constexpr int64_t kGroupBytes = 1 << 20;
#else
        constexpr int64_t kGroupBytes = 1 << 18;
#endif
        // Enough to make the work for rows outweigh the reading of a panel.
        constexpr int64_t kGroupBlocks = 8;
        threads =
            static_cast<int>(larger(1, smaller(num_threads(), args.m * args.n * args.k / grain)));
        // A gate and its up are one thread's.
        least_ = args.is_gated ? 2 : panels < 8 * threads ? 1 : at_once;
        // Several, since the next one is fetched ahead, but many chunks for each thread.
        most_ = larger(panels / (threads * 32) * 2, 8);
        groups_ = larger(1 + args.m * row_bytes / kGroupBytes, 8 * threads / panels);
        groups_ = smaller(groups_, (blocks + kGroupBlocks - 1) / kGroupBlocks);
    }

    // Calls run(block) for each block of rows.
    template <typename Run>
    void for_each_block(const Run& run) const {
        SharedCounter next;
        run_together(static_cast<int>(smaller(threads, blocks_)), [&](int) {
            for (int64_t block; (block = next.take()) < blocks_;) run(block);
        });
    }

    // Calls `run(turns, blocks)` for units until none is left. Chunks become smaller towards the
    // end, since threads are not equally fast. next: one for all threads.
    template <typename Run>
    void take_units(SharedCounter& next, const Run& run) const {
        const int64_t end = panels_ * groups_;
        const auto chunk = [&](int64_t begin) { return chunk_from(begin); };
        for (int64_t begin; (begin = next.take_some(end, chunk)) < end;) {
            const int64_t first = begin % panels_;
            run(Range{first, first + chunk_from(begin)},
                part_of(blocks_, begin / panels_, groups_));
        }
    }

  private:
    // Panels of the unit that starts at `begin`, in all groups' panels: half of this thread's share
    // of what is left, within limits and the group.
    int64_t chunk_from(int64_t begin) const {
        const int64_t share = (panels_ * groups_ - begin) / (2 * threads);
        const int64_t count = larger(least_, smaller(share / least_ * least_, most_));
        return smaller(count, panels_ - begin % panels_);
    }

    int64_t panels_, blocks_, least_, most_, groups_;
};

}  // namespace sglite::cpu::SGLITE_CPU_PATH
