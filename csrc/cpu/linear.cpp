// The linear layer: out = x W^T + bias, rounded, + residual, rounded again; or, where it is gated,
// activation(gate) * up of the rounded halves. One kernel for every number of rows and for packed
// and plain weights, all adding over k in the same order.
#include "cpu/kernels.h"
#include "cpu/linear_output.h"
#include "cpu/linear_plan.h"
#include "cpu/linear_tile.h"
#include "cpu/weight_rows.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

// Plain weights are turned into panels a piece at a time, on the stack: this many steps of one
// panel, used for this many rows of x before the next piece takes its place.
constexpr int64_t kPieceSteps = 256;
constexpr int64_t kPieceRows = 192;

// So many blocks of rows at most share the fetching of the next steps.
constexpr int64_t kFetchingBlocks = 8;

// A single row of the right type can be read where it lies.
template <typename T>
static bool reads_x_in_place(int64_t m, int64_t k) {
    return m == 1 && sizeof(T) * kStepDepth<T> == sizeof(RowElement<T>) * RowLayout<T>::kPerStep &&
           k % kStepDepth<T> == 0;
}

template <typename T>
class Linear {
  public:
    Linear(const LinearArgs& args, void* laid_out)
        : args_(args),
          blocks_(args.m, kMaxRows, kKeptRows),
          steps_(steps_of<T>(args.k)),
          panels_(args, panels_of(args.n)),
          in_place_(reads_x_in_place<T>(args.m, args.k)),
          x_(static_cast<const RowElement<T>*>(in_place_ ? args.x : laid_out)) {}

    void run() {
        const LinearPlan plan(args_, panels_.count, blocks_.count,
                              steps_ * RowLayout<T>::kPerStep * sizeof(RowElement<T>),
                              args_.m <= kMaxPairRows ? 2 : 1);
        if (!in_place_) plan.for_each_block([&](int64_t block) { lay_out(block); });
        SharedCounter next;
        run_together(plan.threads, [&](int) {
            plan.take_units(next, [&](Range turns, Range blocks) {
                if (args_.packed) {
                    multiply_packed(turns, blocks);
                } else {
                    multiply_plain(turns, blocks);
                }
            });
        });
    }

  private:
    const RowElement<T>* x_of(int64_t block) const {
        return x_ + blocks_.begin(block) * steps_ * RowLayout<T>::kPerStep;
    }

    void lay_out(int64_t block) const {
        lay_out_rows(const_cast<RowElement<T>*>(x_of(block)),
                     static_cast<const T*>(args_.x) + blocks_.begin(block) * args_.x_stride,
                     args_.x_stride, blocks_.height(block), args_.k);
    }

    int64_t panel_words() const { return steps_ * kPanelColumns; }
    const uint32_t* packed_panel(int64_t turn) const {
        return static_cast<const uint32_t*>(args_.packed) + panels_.panel(turn) * panel_words();
    }

    void multiply_packed(Range turns, Range blocks) const {
        if (args_.m >= kMinPassRows) return multiply_in_passes(turns, blocks);
        static_assert(kMinPassRows <= kMaxRows + 1, "one block of rows");
        constexpr int kPairRows = 2 * kMaxPairRows;
        alignas(64) float tile[(kMaxRows > kPairRows ? kMaxRows : kPairRows) * kPanelColumns];
        const int64_t at_once = args_.m <= kMaxPairRows ? 2 : 1;
        int64_t taken;
        for (int64_t turn = turns.begin; turn < turns.end; turn += taken) {
            taken = smaller(at_once, turns.end - turn);
            const uint32_t* weights = packed_panel(turn);
            const auto kernel = taken == 2 ? multiply_for<T, 2, kMaxPairRows>(args_.m)
                                           : multiply_for<T, 1, kMaxRows>(args_.m);
            kernel(x_of(0), weights, panels_.distance() * panel_words(), steps_, tile, false,
                   prefetch(weights));
            finish(tile, 0, turn, taken);
        }
    }

    // The same for several blocks of rows, some steps of a panel at a time. While the first blocks
    // are at work on them, the next ones are fetched: behind the last, those of the next panel.
    void multiply_in_passes(Range turns, Range blocks) const {
        constexpr int64_t kBlocksAtOnce = kPieceRows / kMaxRows;
        alignas(64) float tiles[kPieceRows * kPanelColumns];
        const int64_t pass_steps =
            blocks.end - blocks.begin < kLongPassBlocks ? kPassSteps : kLongPassSteps;
        const int64_t passes = (steps_ + pass_steps - 1) / pass_steps;
        for (int64_t turn = turns.begin; turn < turns.end; ++turn) {
            const uint32_t* weights = packed_panel(turn);
            const uint32_t* next = packed_panel(smaller(turn + 1, panels_.count - 1));
            for (int64_t first = blocks.begin; first < blocks.end; first += kBlocksAtOnce) {
                const int64_t end = smaller(first + kBlocksAtOnce, blocks.end);
                for (int64_t pass = 0; pass < passes; ++pass) {
                    const auto [step, stop] = part_of(steps_, pass, passes);
                    const int64_t count = stop - step;
                    const uint32_t* piece = weights + step * kPanelColumns;
                    const uint32_t* behind =
                        pass + 1 < passes ? piece + count * kPanelColumns : next;
                    for (int64_t block = first; block < end; ++block) {
                        const int64_t height = blocks_.height(block);
                        multiply_for<T, 1, kMaxRows>(height)(
                            x_of(block) + step * RowLayout<T>::kPerStep * height, piece, 0, count,
                            tile_of(tiles, block, first), step > 0,
                            prefetch_share(behind, count, block - blocks.begin,
                                           blocks.end - blocks.begin, height));
                        if (stop == steps_) finish(tile_of(tiles, block, first), block, turn, 1);
                    }
                }
            }
        }
    }

    // What a block of rows fetches while it is at work on `count` steps: its share of as many from
    // `piece` on. A few blocks share, so that memory is busy all the time.
    static Prefetch prefetch_share(const uint32_t* piece, int64_t count, int64_t order,
                                   int64_t blocks, int64_t height) {
        const int64_t sharing = smaller(blocks, kFetchingBlocks);
        if (order >= sharing) return {};
        constexpr int64_t kStepBytes = kPanelColumns * sizeof(uint32_t);
        const int64_t passes = kPanelColumns / Vec::kSize / vectors_at_once(height, 1);
        return {reinterpret_cast<const char*>(piece) + count * kStepBytes * order / sharing,
                kStepBytes / (passes * sharing)};
    }

    // What a single block of rows fetches while it is at work on a panel: what comes later in it.
    Prefetch prefetch(const uint32_t* panel) const {
        constexpr int64_t kDistance = 8192;
        const char* address = reinterpret_cast<const char*>(panel);
        if (args_.m < kMinPrefetchRows) {
            return kNearDistance ? Prefetch{address + kNearDistance, 128} : Prefetch{};
        }
        return {address + kDistance / (args_.m <= kMaxPairRows ? 2 : 1), 128};
    }

    void multiply_plain(Range turns, Range blocks) const {
        constexpr int64_t kBlocksAtOnce = kPieceRows / kMaxRows;
        alignas(64) uint32_t piece[kPieceSteps * kPanelColumns];
        alignas(64) float tiles[kPieceRows * kPanelColumns];
        const int64_t next_panel = kPanelColumns * args_.segments[0].stride;
        for (int64_t turn = turns.begin; turn < turns.end; ++turn) {
            const T* rows[kPanelColumns];
            find_rows(args_, panels_.panel(turn), rows);
            for (int64_t first = blocks.begin; first < blocks.end; first += kBlocksAtOnce) {
                const int64_t end = smaller(first + kBlocksAtOnce, blocks.end);
                for (int64_t step = 0; step < steps_; step += kPieceSteps) {
                    const int64_t stop = smaller(step + kPieceSteps, steps_);
                    fill_panel(piece, rows, step, stop, args_.k, next_panel);
                    for (int64_t block = first; block < end; ++block) {
                        const int64_t height = blocks_.height(block);
                        multiply_for<T, 1, kMaxRows>(height)(
                            x_of(block) + step * RowLayout<T>::kPerStep * height, piece, 0,
                            stop - step, tile_of(tiles, block, first), step > 0, {});
                    }
                }
                for (int64_t block = first; block < end; ++block) {
                    finish(tile_of(tiles, block, first), block, turn, 1);
                }
            }
        }
    }

    static float* tile_of(float* tiles, int64_t block, int64_t first) {
        return tiles + (block - first) * kMaxRows * kPanelColumns;
    }

    // From sums to results. tile: [height of the block][32 * panels].
    void finish(const float* tile, int64_t block, int64_t turn, int64_t panels) const {
        for (int64_t i = 0; i < panels; ++i) {
            store_outputs<T>(args_, tile + i * kPanelColumns,
                             {blocks_.begin(block), blocks_.height(block),
                              panels_.panel(turn + i) * kPanelColumns, panels * kPanelColumns});
        }
    }

    const LinearArgs& args_;
    const RowBlocks blocks_;
    const int64_t steps_;
    const PanelOrder panels_;
    const bool in_place_;
    const RowElement<T>* x_;
};

template <typename T>
static int64_t layout_bytes(int64_t m, int64_t k) {
    if (reads_x_in_place<T>(m, k)) return 0;
    return m * steps_of<T>(k) * RowLayout<T>::kPerStep * sizeof(RowElement<T>);
}

int64_t linear_workspace(int64_t m, int64_t k, DType dtype) {
    int64_t bytes = 0;
    visit_float_type(dtype, [&](auto type) { bytes = layout_bytes<decltype(type)>(m, k); });
    return bytes <= kLinearStackBytes ? 0 : bytes;
}

void linear(const LinearArgs& args) {
    if (args.m == 0 || args.n == 0) return;
    alignas(64) unsigned char small[kLinearStackBytes];
    void* laid_out = args.workspace ? args.workspace : small;
    visit_float_type(args.dtype, [&](auto type) { Linear<decltype(type)>(args, laid_out).run(); });
}

}  // namespace sglite::cpu::SGLITE_CPU_PATH
