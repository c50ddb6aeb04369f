// Codes of a quantised weight into panels (quantized_panels.h), and rows of the weight out of them:
// (code - zero point) * scale in float32, rounded to the type asked for.
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/quantized_panels.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

static int64_t panel_bytes_of(int64_t k, int bits) {
    return quantized_steps_of(k) * (bits == 8 ? Int8Codes::kStepBytes : Int4Codes::kStepBytes);
}

// The codes of one row, `at(k)`, into column `column` of a panel.
template <typename At>
static void write_column(uint8_t* panel, int64_t column, int64_t k, int bits, const At& at) {
    if (bits == 8) {
        int8_t* to = reinterpret_cast<int8_t*>(panel) + column;
        for (int64_t i = 0; i < k; ++i) to[i * kPanelColumns] = at(i);
        for (int64_t i = k; i < quantized_steps_of(k) * kQuantizedDepth; ++i) {
            to[i * kPanelColumns] = 0;
        }
        return;
    }
    for (int64_t step = 0; step < quantized_steps_of(k); ++step) {
        uint32_t word = 0;
        for (int part = 0; part < kQuantizedDepth; ++part) {
            const int64_t i = step * kQuantizedDepth + part;
            const uint32_t nibble = i < k ? (at(i) + 8) & 15 : 8;
            word |= nibble << 4 * nibble_position(part);
        }
        std::memcpy(panel + step * Int4Codes::kStepBytes + column * sizeof word, &word,
                    sizeof word);
    }
}

void pack_codes(const PackCodesArgs& args) {
    const int64_t panel_bytes = panel_bytes_of(args.k, args.bits);
    parallel_for(args.count, 1 + 65536 / args.k, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = args.start + i;
            const int8_t* codes = args.codes + i * args.row_stride;
            write_column(static_cast<uint8_t*>(args.packed) + row / kPanelColumns * panel_bytes,
                         row % kPanelColumns, args.k, args.bits,
                         [&](int64_t k) { return codes[k * args.k_stride]; });
        }
    });
}

static float scale_at(const QuantizedRowsArgs& args, int64_t index) {
    switch (args.scale_dtype) {
        case DType::kBFloat16:
            return to_float(static_cast<const BFloat16*>(args.scales)[index]);
        case DType::kFloat16:
            return to_float(static_cast<const Float16*>(args.scales)[index]);
        default:
            return static_cast<const float*>(args.scales)[index];
    }
}

template <typename Codes, typename T>
static void read_row(T* out, const QuantizedRowsArgs& args, int64_t row) {
    const int64_t panel = row / kPanelColumns;
    const int column = static_cast<int>(row % kPanelColumns);
    const uint8_t* codes =
        static_cast<const uint8_t*>(args.codes) + panel * panel_bytes_of(args.k, args.bits);
    for (int64_t group = 0; group < args.groups; ++group) {
        const int64_t index = (panel * args.groups + group) * kPanelColumns + column;
        const float scale = scale_at(args, index);
        const float zero = args.zeros ? static_cast<float>(args.zeros[index]) : 0.0f;
        const int64_t stop = group + 1 < args.groups ? (group + 1) * args.group_size : args.k;
        for (int64_t k = group * args.group_size; k < stop; ++k) {
            const uint8_t* step = codes + k / kQuantizedDepth * Codes::kStepBytes;
            const float code = Codes::code(step, static_cast<int>(k % kQuantizedDepth), column);
            out[k] = from_float<T>((code - zero) * scale);
        }
    }
}

void read_quantized_rows(const QuantizedRowsArgs& args) {
    visit_float_type(args.dtype, [&](auto type) {
        using T = decltype(type);
        parallel_for(args.count, 1 + 16384 / args.k, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                T* out = static_cast<T*>(args.out) + i * args.out_stride;
                const int64_t row = args.ids ? args.ids[i] : args.start + i;
                if (args.bits == 8) {
                    read_row<Int8Codes>(out, args, row);
                } else {
                    read_row<Int4Codes>(out, args, row);
                }
            }
        });
    });
}

}  // namespace sglite::cpu::SGLITE_CPU_PATH
