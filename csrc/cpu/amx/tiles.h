// Matrix tiles (Intel AMX) over bfloat16: blocks of at most 32 rows of x times panels of weights.
//
// One instruction multiplies 16 rows of x by 16 columns over 32 neighbouring k: it sums the
// products of even and of odd k apart, in float32 and in order, adds the two sums, and adds that to
// what the tile held. A row's bits do not depend on how many rows a tile has, so this is used for
// one row as well as for many. (Numbers below 2^-126 count as zero.) Source: Intel 64 and IA-32
// Architectures Software Developer's Manual, TDPBF16PS.
#pragma once

#include <immintrin.h>

#include <atomic>
#include <cstdint>
#include <cstring>

#include "cpu/path.h"
#include "cpu/weight_panels.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

constexpr int kTileRows = 16;
constexpr int kBlockRows = 2 * kTileRows;
// What one tile covers of k, in values and in steps of a panel.
constexpr int kTileDepth = 32;
constexpr int kTileSteps = kTileDepth / kStepDepth<BFloat16>;
constexpr int kTileWords = kTileSteps * kPanelColumns;  // of a panel

static inline int64_t tiles_of(int64_t k) { return (k + kTileDepth - 1) / kTileDepth; }

// The registers of one thread: 0 to 3 are sums (by halves of the rows, then of the columns), 4 and
// 5 the two halves of a block of x, 6 and 7 the two halves of a panel.
class Tiles {
  public:
    Tiles() = default;
    Tiles(const Tiles&) = delete;
    // Registers in their first state need not be saved when the thread loses its processor.
    ~Tiles() { _tile_release(); }

    // Gets the registers ready for blocks of `rows` rows.
    void set_rows(int64_t rows) {
        if (rows == rows_) return;
        rows_ = rows;
        const auto first = static_cast<uint8_t>(rows < kTileRows ? rows : kTileRows);
        const auto second = static_cast<uint8_t>(rows - first);
        const uint8_t height[8] = {first, first,  second,     second,
                                   first, second, kTileSteps, kTileSteps};
        struct {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        static_assert(sizeof config == 64);
        for (int i = 0; i < 8; ++i) {
            config.rows[i] = height[i];
            config.row_bytes[i] = height[i] ? 64 : 0;
        }
        std::atomic_signal_fence(std::memory_order_seq_cst);
        _tile_loadconfig(&config);
    }

    // sums[r][c] = sum over k of x[r][k] * weight[c][k], added to what sums holds where `resume`.
    // x: [count][rows][kTileDepth], the block that the registers are ready for. panel: [count]
    // [kTileSteps][kPanelColumns] words. sums: [rows][kPanelColumns]. fetched: [count][kTileWords]
    // words to have in the cache next, or null.
    void multiply(const BFloat16* x, const uint32_t* panel, int64_t count, float* sums, bool resume,
                  const uint32_t* fetched) const {
        if (rows_ > kTileRows) {
            run<true>(x, panel, count, sums, resume, fetched);
        } else {
            run<false>(x, panel, count, sums, resume, fetched);
        }
    }

  private:
    template <bool kBoth>
    void run(const BFloat16* x, const uint32_t* panel, int64_t count, float* sums, bool resume,
             const uint32_t* fetched) const {
        constexpr int64_t kRowBytes = kPanelColumns * 4;  // of a panel and of sums
        constexpr int64_t kHalf = kPanelColumns / 2, kLower = kTileRows * kPanelColumns;
        // The instructions that load do not tell the compiler that they read memory.
        std::atomic_signal_fence(std::memory_order_seq_cst);
        if (resume) {
            _tile_loadd(0, sums, kRowBytes);
            _tile_loadd(1, sums + kHalf, kRowBytes);
            if (kBoth) _tile_loadd(2, sums + kLower, kRowBytes);
            if (kBoth) _tile_loadd(3, sums + kLower + kHalf, kRowBytes);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            if (kBoth) _tile_zero(2);
            if (kBoth) _tile_zero(3);
        }
        for (int64_t i = 0; i < count; ++i, x += rows_ * kTileDepth, panel += kTileWords) {
            _tile_loadd(6, panel, kRowBytes);
            _tile_loadd(4, x, kTileDepth * 2);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, panel + kHalf, kRowBytes);
            _tile_dpbf16ps(1, 4, 7);
            if (kBoth) {
                _tile_loadd(5, x + kTileRows * kTileDepth, kTileDepth * 2);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            if (fetched) fetch(fetched + i * kTileWords);
        }
        _tile_stored(0, sums, kRowBytes);
        _tile_stored(1, sums + kHalf, kRowBytes);
        if (kBoth) _tile_stored(2, sums + kLower, kRowBytes);
        if (kBoth) _tile_stored(3, sums + kLower + kHalf, kRowBytes);
    }

    static void fetch(const uint32_t* words) {
#pragma GCC unroll 32
        for (int line = 0; line < kTileWords; line += 16) __builtin_prefetch(words + line);
    }

    int64_t rows_ = 0;
};

}  // namespace sglite::cpu::SGLITE_CPU_PATH
