// The inner part of attention on matrix tiles (Intel AMX), for bfloat16: up to 16 query rows that
// all see every key of a block. Weights are rounded to bfloat16 before they meet the values; their
// sum is not. A row's arithmetic does not depend on how many rows there are.
#pragma once

#include <atomic>

#include "cpu/attention_tile.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

// The registers of one thread: 0 to 3 are sums, 4 holds rows, 5 to 7 columns.
class AttentionTiles {
  public:
    AttentionTiles() = default;
    AttentionTiles(const AttentionTiles&) = delete;
    // Registers in their first state need not be saved when the thread loses its processor.
    ~AttentionTiles() {
        if (rows_) _tile_release();
    }

    // `count` rows that all see the whole block.
    void attend(Block& block, Rows rows, int64_t count) {
        pack_value_pairs(block);
        for (int64_t taken; count > 0; count -= taken) {
            taken = count < kRows ? count : kRows;
            attend_tile(block, rows, static_cast<int>(taken));
            rows.skip(taken);
        }
    }

  private:
    static constexpr int kRows = 16;
    static constexpr int64_t kWords = 16;    // of a row of a tile
    static constexpr int64_t kColumns = 64;  // of four tiles
    static_assert(kAttentionBlock == kColumns);

    void set_rows(int rows) {
        if (rows == rows_) return;
        rows_ = rows;
        struct {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        static_assert(sizeof config == 64);
        for (int i = 0; i < 8; ++i) {
            config.rows[i] = static_cast<uint8_t>(i < 5 ? rows : kWords);
            config.row_bytes[i] = 4 * kWords;
        }
        std::atomic_signal_fence(std::memory_order_seq_cst);
        _tile_loadconfig(&config);
    }

    void attend_tile(Block& block, const Rows& rows, int count) {
        alignas(64) float scores[kRows * kAttentionBlock];
        alignas(64) float corrections[Vec::kSize];
        alignas(64) BFloat16 weights[kRows * kAttentionBlock];
        set_rows(count);
        score(block, rows, scores);
        weigh<kRows, true>(block, rows, 0, kAttentionBlock, scores, corrections, count);
        for (int i = 0; i < count * kAttentionBlock; i += 2 * Vec::kSize) {
            const Vec pairs = round_to_pairs(scores + i);
            std::memcpy(weights + i, &pairs.v, sizeof pairs.v);
        }
        add_values(block, rows, count, weights, corrections);
    }

    // Query times key, scores: [rows, kAttentionBlock].
    static void score(Block& block, const Rows& rows, float* scores) {
        constexpr int64_t kBytes = kAttentionBlock * 4;
        const float *queries = rows.queries, *keys = block.keys;
        // The instructions that load do not tell the compiler that they read memory.
        std::atomic_signal_fence(std::memory_order_seq_cst);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t word = 0; word < block.words; word += kWords) {
            block.next.advance<false>(2 * kWords);  // so that a few tiles fetch all
            _tile_loadd(4, queries, rows.query_stride * 4);
            _tile_loadd(5, keys, kBytes);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, keys + 16, kBytes);
            _tile_dpbf16ps(1, 4, 6);
            _tile_loadd(7, keys + 32, kBytes);
            _tile_dpbf16ps(2, 4, 7);
            _tile_loadd(5, keys + 48, kBytes);
            _tile_dpbf16ps(3, 4, 5);
            queries += kWords;
            keys += kWords * kAttentionBlock;
        }
        store_sums(scores);
    }

    static void store_sums(float* sums) {
        constexpr int64_t kBytes = kColumns * 4;
        _tile_stored(0, sums, kBytes);
        _tile_stored(1, sums + 16, kBytes);
        _tile_stored(2, sums + 32, kBytes);
        _tile_stored(3, sums + 48, kBytes);
    }

    // sum = sum * correction + weights times values.
    static void add_values(const Block& block, const Rows& rows, int count, const BFloat16* weights,
                           const float* corrections) {
        alignas(64) float sums[kRows * kColumns];
        for (int64_t channel = 0; channel < block.channels; channel += kColumns) {
            const int64_t left = block.channels - channel;
            const int64_t columns = left < kColumns ? left : kColumns;
            multiply(weights, block.value_pairs + channel, block.channels * 4, columns / 16, sums);
            for (int r = 0; r < count; ++r) {
                float* record = rows.records + r * rows.record_stride + channel;
                const Vec correction = splat(corrections[r]);
                for (int64_t i = 0; i < columns; i += Vec::kSize)
                    store(record + i,
                          fma(load(record + i), correction, load(sums + r * kColumns + i)));
            }
        }
    }

    // sums [rows, kColumns] of the first `tiles` times 16 columns: weights times pairs of values,
    // whose rows are `stride` bytes apart.
    static void multiply(const BFloat16* weights, const uint32_t* pairs, int64_t stride,
                         int64_t tiles, float* sums) {
        std::atomic_signal_fence(std::memory_order_seq_cst);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int half = 0; half < 2; ++half) {
            _tile_loadd(4, weights + half * 2 * kWords, kAttentionBlock * 2);
            _tile_loadd(5, pairs, stride);
            _tile_dpbf16ps(0, 4, 5);
            if (tiles > 1) {
                _tile_loadd(6, pairs + 16, stride);
                _tile_dpbf16ps(1, 4, 6);
            }
            if (tiles > 2) {
                _tile_loadd(7, pairs + 32, stride);
                _tile_dpbf16ps(2, 4, 7);
            }
            if (tiles > 3) {
                _tile_loadd(5, pairs + 48, stride);
                _tile_dpbf16ps(3, 4, 5);
            }
            pairs += kWords * stride / 4;
        }
        store_sums(sums);
    }

    int rows_ = 0;
};

}  // namespace sglite::cpu::SGLITE_CPU_PATH
