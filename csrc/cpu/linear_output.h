// The end of a linear layer: from float32 sums to results in memory.
#pragma once

#include "cpu/math.h"
#include "cpu/partial.h"
#include "cpu/simd.h"
#include "cpu/weight_panels.h"
#include "kernel_args.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

// Where sums of a panel, whose rows lie `stride` apart, belong in the product.
struct OutputTile {
    int64_t first_row, rows, first_column, stride;
};

// kWhole: all columns of the panel are the product's.
template <typename T, typename Out, bool kResidual, bool kWhole>
static void store_rows(const LinearArgs& args, const float* sums, const OutputTile& tile) {
    const int64_t columns = kWhole ? kPanelColumns : args.n - tile.first_column;
    Vec bias[kPanelColumns / Vec::kSize];  // none is -0, which changes no number, nor a 0's sign
    for (int64_t column = 0; column < columns; column += Vec::kSize) {
        bias[column / Vec::kSize] =
            args.bias ? load_some(static_cast<const T*>(args.bias) + tile.first_column + column,
                                  columns - column)
                      : splat(-0.0f);
    }
    for (int64_t i = 0; i < tile.rows; ++i, sums += tile.stride) {
        const int64_t row = tile.first_row + i;
        Out* out = static_cast<Out*>(args.out) + row * args.out_stride + tile.first_column;
        const Out* residual =
            static_cast<const Out*>(args.residual) + row * args.residual_stride + tile.first_column;
#pragma GCC unroll 4
        for (int64_t column = 0; column < columns; column += Vec::kSize) {
            Vec sum = load(sums + column) + bias[column / Vec::kSize];
            if (kResidual)
                sum = round_to<Out>(sum) + load_some(residual + column, columns - column);
            store_some(out + column, sum, columns - column);
        }
    }
}

template <typename T, typename Out>
static void store_outputs_as(const LinearArgs& args, const float* sums, const OutputTile& tile) {
    const bool whole = tile.first_column + kPanelColumns <= args.n;
    if (args.residual) {
        (whole ? store_rows<T, Out, true, true> : store_rows<T, Out, true, false>)(args, sums,
                                                                                   tile);
    } else {
        (whole ? store_rows<T, Out, false, true> : store_rows<T, Out, false, false>)(args, sums,
                                                                                     tile);
    }
}

// A panel of the upper half meets its gate, which `out` holds in its place.
template <typename T, typename Function>
static void store_gated(const LinearArgs& args, const float* sums, const OutputTile& tile,
                        const Function& activation) {
    const int64_t out_column = tile.first_column - args.n / 2;
    for (int64_t i = 0; i < tile.rows; ++i, sums += tile.stride) {
        T* out = static_cast<T*>(args.out) + (tile.first_row + i) * args.out_stride + out_column;
        for (int64_t column = 0; column < kPanelColumns; column += Vec::kSize) {
            Vec sum = load(sums + column);
            if (args.bias) {
                sum = sum + load(static_cast<const T*>(args.bias) + tile.first_column + column);
            }
            store(out + column, activation(load(out + column)) * round_to<T>(sum));
        }
    }
}

// out = sums + bias, rounded, + residual, rounded again; columns beyond n are left out. Where the
// layer is gated, panels of gates come before those that they belong to.
template <typename T>
static void store_outputs(const LinearArgs& args, const float* sums, const OutputTile& tile) {
    if (args.is_gated && tile.first_column >= args.n / 2) {
        visit_activation(args.activation, [&](const auto& activation) {
            store_gated<T>(args, sums, tile, activation);
        });
    } else if (args.out_dtype == DType::kFloat32) {
        store_outputs_as<T, float>(args, sums, tile);
    } else {
        store_outputs_as<T, T>(args, sums, tile);
    }
}

}  // namespace sglite::cpu::SGLITE_CPU_PATH
