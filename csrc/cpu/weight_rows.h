// Where the rows of a weight that was not packed lie.
#pragma once

#include "cpu/weight_panels.h"
#include "kernel_args.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

// The weight's rows behind a panel's columns; null beyond the last.
template <typename T>
static void find_rows(const LinearArgs& args, int64_t panel, const T* (&rows)[kPanelColumns]) {
    int64_t row = panel * kPanelColumns, column = 0;
    for (int64_t i = 0; i < args.num_segments; ++i) {
        const WeightSegment& segment = args.segments[i];
        for (; row < segment.rows && column < kPanelColumns; ++row, ++column) {
            rows[column] = static_cast<const T*>(segment.data) + row * segment.stride;
        }
        row -= segment.rows;
    }
    for (; column < kPanelColumns; ++column) rows[column] = nullptr;
}

}  // namespace sglite::cpu::SGLITE_CPU_PATH
