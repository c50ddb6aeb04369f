// The end of a linear layer: from float32 sums to results in memory.
#pragma once

#include "cpu/simd.h"
#include "kernel_args.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

template <typename T>
static inline Vec load_some(const T* p, int64_t count) {
    return count >= Vec::kSize ? load(p) : load_partial(p, static_cast<int>(count));
}

template <typename T>
static inline void store_some(T* p, Vec value, int64_t count) {
    if (count >= Vec::kSize) {
        store(p, value);
    } else {
        store_partial(p, value, static_cast<int>(count));
    }
}

// Where a tile of sums, [rows][columns], belongs in the result.
struct OutputTile {
    int64_t first_row, rows, first_column, columns;
};

template <typename T, typename Out>
static void store_outputs_as(const LinearArgs& args, const float* sums, const OutputTile& tile) {
    const int64_t stop = tile.first_column + tile.columns;
    const int64_t end = stop < args.n ? stop : args.n;
    for (int64_t i = 0; i < tile.rows; ++i, sums += tile.columns) {
        const int64_t row = tile.first_row + i;
        Out* out = static_cast<Out*>(args.out) + row * args.out_stride;
        const Out* residual = static_cast<const Out*>(args.residual) + row * args.residual_stride;
        for (int64_t column = tile.first_column; column < end; column += Vec::kSize) {
            Vec sum = load(sums + column - tile.first_column);
            if (args.bias) {
                const T* bias = static_cast<const T*>(args.bias) + column;
                sum = sum + load_some(bias, end - column);
            }
            if (args.residual) {
                Out rounded[Vec::kSize];
                store(rounded, sum);
                sum = load(rounded) + load_some(residual + column, end - column);
            }
            store_some(out + column, sum, end - column);
        }
    }
}

// out = sums + bias, rounded, + residual, rounded again; columns beyond n are left out.
template <typename T>
static void store_outputs(const LinearArgs& args, const float* sums, const OutputTile& tile) {
    if (args.out_dtype == DType::kFloat32) {
        store_outputs_as<T, float>(args, sums, tile);
    } else {
        store_outputs_as<T, T>(args, sums, tile);
    }
}

}  // namespace sglite::cpu::SGLITE_CPU_PATH
