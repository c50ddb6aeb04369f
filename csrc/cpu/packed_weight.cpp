// Packing rows of a weight into panels (weight_panels.h) and reading them back, bit for bit.
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/weight_panels.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

template <typename T>
static const T* row_of(const PackRowsArgs& args, int64_t row) {
    return static_cast<const T*>(args.rows) + (row - args.start) * args.row_stride;
}

// Some columns of a panel; the others keep what they hold.
template <typename T>
static void pack_columns(uint32_t* panel, const PackRowsArgs& args, int64_t first, int64_t begin,
                         int64_t end) {
    const int64_t steps = steps_of<T>(args.k);
    for (int64_t step = 0; step < steps; ++step) {
        for (int64_t row = begin; row < end; ++row) {
            panel[step * kPanelColumns + row - first] = word_at(row_of<T>(args, row), step, args.k);
        }
    }
}

template <typename T>
static void unpack_columns(const uint32_t* panel, const PackRowsArgs& args, int64_t first,
                           int64_t begin, int64_t end) {
    const int64_t steps = steps_of<T>(args.k), whole_steps = args.k / kStepDepth<T>;
    for (int64_t row = begin; row < end; ++row) {
        T* out = const_cast<T*>(row_of<T>(args, row));
        for (int64_t step = 0; step < steps; ++step) {
            std::memcpy(out + step * kStepDepth<T>, &panel[step * kPanelColumns + row - first],
                        step < whole_steps ? sizeof(uint32_t) : sizeof(T));
        }
    }
}

template <typename T>
static void unpack_panel(const uint32_t* panel, const PackRowsArgs& args, int64_t first) {
    const int64_t steps = steps_of<T>(args.k), whole_steps = args.k / kStepDepth<T>;
    int64_t step = 0;
    for (; step + kSquare <= whole_steps; step += kSquare) {
        for (int column = 0; column < kPanelColumns; column += kSquare) {
            Vec words[kSquare];
            for (int i = 0; i < kSquare; ++i) {
                words[i] = load_words(panel + (step + i) * kPanelColumns + column);
            }
            transpose(words);
            for (int i = 0; i < kSquare; ++i) {
                T* out = const_cast<T*>(row_of<T>(args, first + column + i));
                store_words(out + step * kStepDepth<T>, words[i]);
            }
        }
    }
    for (; step < steps; ++step) {
        for (int column = 0; column < kPanelColumns; ++column) {
            T* out = const_cast<T*>(row_of<T>(args, first + column));
            std::memcpy(out + step * kStepDepth<T>, &panel[step * kPanelColumns + column],
                        step < whole_steps ? sizeof(uint32_t) : sizeof(T));
        }
    }
}

// Calls whole(panel, first row) or some(panel, first row, begin, end) for every panel that the
// rows [start, start + count) touch.
template <typename T, typename Whole, typename Some>
static void visit_panels(const PackRowsArgs& args, const Whole& whole, const Some& some) {
    const int64_t panel_words = steps_of<T>(args.k) * kPanelColumns;
    const int64_t stop = args.start + args.count;
    const int64_t first_panel = args.start / kPanelColumns;
    const int64_t grain = 1 + 65536 / (panel_words + 1);
    parallel_for(panels_of(stop) - first_panel, grain, [&](int64_t from, int64_t to) {
        for (int64_t index = first_panel + from; index < first_panel + to; ++index) {
            uint32_t* panel = static_cast<uint32_t*>(args.packed) + index * panel_words;
            const int64_t first = index * kPanelColumns;
            const int64_t begin = args.start > first ? args.start : first;
            const int64_t end = stop < first + kPanelColumns ? stop : first + kPanelColumns;
            if (end - begin == kPanelColumns) {
                whole(panel, first);
            } else {
                some(panel, first, begin, end);
            }
        }
    });
}

void pack_rows(const PackRowsArgs& args) {
    visit_float_type(args.dtype, [&](auto type) {
        using T = decltype(type);
        visit_panels<T>(
            args,
            [&](uint32_t* panel, int64_t first) {
                const T* rows[kPanelColumns];
                for (int i = 0; i < kPanelColumns; ++i) rows[i] = row_of<T>(args, first + i);
                fill_panel(panel, rows, 0, steps_of<T>(args.k), args.k,
                           kPanelColumns * args.row_stride);
            },
            [&](uint32_t* panel, int64_t first, int64_t begin, int64_t end) {
                pack_columns<T>(panel, args, first, begin, end);
            });
    });
}

void unpack_rows(const PackRowsArgs& args) {
    visit_float_type(args.dtype, [&](auto type) {
        using T = decltype(type);
        visit_panels<T>(
            args,
            [&](const uint32_t* panel, int64_t first) { unpack_panel<T>(panel, args, first); },
            [&](const uint32_t* panel, int64_t first, int64_t begin, int64_t end) {
                unpack_columns<T>(panel, args, first, begin, end);
            });
    });
}

}  // namespace sglite::cpu::SGLITE_CPU_PATH
