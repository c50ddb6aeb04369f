// The linear layer of bfloat16 on processors with matrix tiles; that of other types is AVX-512's.
#include "cpu/amx/tiles.h"
#include "cpu/kernels.h"
#include "cpu/linear_output.h"
#include "cpu/linear_plan.h"
#include "cpu/weight_rows.h"

namespace sglite::cpu::avx512 {

int64_t linear_workspace(int64_t m, int64_t k, DType dtype);
void linear(const LinearArgs& args);

}  // namespace sglite::cpu::avx512

namespace sglite::cpu::amx {

namespace {

// Plain weights are turned into panels a piece at a time, on the stack: this many tiles of one
// panel, used for this many blocks of rows before the next piece takes its place.
constexpr int64_t kPieceTiles = 16, kPieceBlocks = 8;

// How far ahead of their use weights are fetched, in words.
constexpr int64_t kFetchDistance = 4 * kTileWords;

class TileLinear {
  public:
    TileLinear(const LinearArgs& args, void* laid_out)
        : args_(args),
          blocks_((args.m + kBlockRows - 1) / kBlockRows),
          tiles_(tiles_of(args.k)),
          panels_(args, panels_of(args.n)),
          x_(static_cast<BFloat16*>(laid_out)) {}

    void run() {
        const LinearPlan plan(args_, panels_.count, blocks_, tiles_ * kTileDepth * 2, 1);
        plan.for_each_block([&](int64_t block) { lay_out(block); });
        SharedCounter next;
        run_together(plan.threads, [&](int) {
            Tiles tiles;
            plan.take_units(next, [&](Range turns, Range blocks) {
                for (int64_t turn = turns.begin; turn < turns.end; ++turn) {
                    const int64_t panel = panels_.panel(turn);
                    if (args_.packed) {
                        multiply_packed(tiles, panel, blocks);
                    } else {
                        multiply_plain(tiles, panel, blocks);
                    }
                }
            });
        });
    }

  private:
    // [tiles][height of the block][kTileDepth].
    BFloat16* x_of(int64_t block) const { return x_ + block * kBlockRows * tiles_ * kTileDepth; }
    int64_t height(int64_t block) const {
        return smaller(kBlockRows, args_.m - block * kBlockRows);
    }

    void lay_out(int64_t block) const {
        const int64_t rows = height(block), whole = args_.k / kTileDepth;
        const int64_t rest = args_.k % kTileDepth;
        for (int64_t row = 0; row < rows; ++row) {
            const BFloat16* source =
                static_cast<const BFloat16*>(args_.x) + (block * kBlockRows + row) * args_.x_stride;
            BFloat16* target = x_of(block) + row * kTileDepth;
            for (int64_t i = 0; i < whole; ++i, target += rows * kTileDepth) {
                std::memcpy(target, source + i * kTileDepth, kTileDepth * 2);
            }
            if (!rest) continue;
            std::memset(target, 0, kTileDepth * 2);
            std::memcpy(target, source + whole * kTileDepth, rest * 2);
        }
    }

    void multiply_packed(Tiles& tiles, int64_t panel, Range blocks) const {
        const int64_t steps = steps_of<BFloat16>(args_.k);
        const uint32_t* weights =
            static_cast<const uint32_t*>(args_.packed) + panel * steps * kPanelColumns;
        // A panel ends where its steps do, so what the last tile lacks is added.
        const int64_t whole = steps / kTileSteps, rest = steps % kTileSteps;
        alignas(64) uint32_t last[kTileWords];
        if (rest) {
            const int64_t words = rest * kPanelColumns;
            std::memcpy(last, weights + whole * kTileWords, words * 4);
            std::memset(last + words, 0, (kTileWords - words) * 4);
        }
        alignas(64) float sums[kBlockRows * kPanelColumns];
        for (int64_t block = blocks.begin; block < blocks.end; ++block) {
            const int64_t rows = height(block);
            const bool is_first = block == blocks.begin;
            tiles.set_rows(rows);
            tiles.multiply(x_of(block), weights, whole, sums, false,
                           is_first ? weights + kFetchDistance : nullptr);
            if (rest) {
                tiles.multiply(x_of(block) + whole * rows * kTileDepth, last, 1, sums, true,
                               nullptr);
            }
            finish(sums, block, panel);
        }
    }

    void multiply_plain(Tiles& tiles, int64_t panel, Range blocks) const {
        constexpr int64_t kSums = kBlockRows * kPanelColumns;
        constexpr int64_t kPieceSteps = kPieceTiles * kTileSteps;
        alignas(64) uint32_t piece[kPieceTiles * kTileWords];
        alignas(64) float sums[kPieceBlocks * kSums];
        const int64_t steps = steps_of<BFloat16>(args_.k);
        const BFloat16* rows[kPanelColumns];
        find_rows(args_, panel, rows);
        for (int64_t first = blocks.begin; first < blocks.end; first += kPieceBlocks) {
            const int64_t end = smaller(first + kPieceBlocks, blocks.end);
            for (int64_t tile = 0; tile < tiles_; tile += kPieceTiles) {
                const int64_t begin = tile * kTileSteps;
                const int64_t stop = smaller(begin + kPieceSteps, steps);
                const int64_t count = smaller(kPieceTiles, tiles_ - tile);
                fill_panel(piece, rows, begin, stop, args_.k,
                           kPanelColumns * args_.segments[0].stride);
                std::memset(piece + (stop - begin) * kPanelColumns, 0,
                            (count * kTileSteps - (stop - begin)) * kPanelColumns * 4);
                for (int64_t block = first; block < end; ++block) {
                    const int64_t height_of_block = height(block);
                    tiles.set_rows(height_of_block);
                    tiles.multiply(x_of(block) + tile * height_of_block * kTileDepth, piece, count,
                                   sums + (block - first) * kSums, tile > 0, nullptr);
                }
            }
            for (int64_t block = first; block < end; ++block) {
                finish(sums + (block - first) * kSums, block, panel);
            }
        }
    }

    void finish(const float* sums, int64_t block, int64_t panel) const {
        store_outputs<BFloat16>(
            args_, sums, {block * kBlockRows, height(block), panel * kPanelColumns, kPanelColumns});
    }

    const LinearArgs& args_;
    const int64_t blocks_, tiles_;
    const PanelOrder panels_;
    BFloat16* x_;
};

int64_t layout_bytes(int64_t m, int64_t k) { return m * tiles_of(k) * kTileDepth * 2; }

}  // namespace

int64_t linear_workspace(int64_t m, int64_t k, DType dtype) {
    if (dtype != DType::kBFloat16) return avx512::linear_workspace(m, k, dtype);
    const int64_t bytes = layout_bytes(m, k);
    return bytes <= kLinearStackBytes ? 0 : bytes;
}

void linear(const LinearArgs& args) {
    if (args.dtype != DType::kBFloat16) return avx512::linear(args);
    if (args.m == 0 || args.n == 0) return;
    alignas(64) unsigned char small[kLinearStackBytes];
    TileLinear(args, args.workspace ? args.workspace : small).run();
}

}  // namespace sglite::cpu::amx
