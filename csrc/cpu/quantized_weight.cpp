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

// Rounds to the type that scales are stored in, and back.
static float store_scale(void* scales, DType dtype, int64_t index, float scale) {
    switch (dtype) {
        case DType::kBFloat16: {
            const BFloat16 rounded = to_bfloat16(scale);
            static_cast<BFloat16*>(scales)[index] = rounded;
            return to_float(rounded);
        }
        case DType::kFloat16: {
            const Float16 rounded = static_cast<Float16>(scale);
            static_cast<Float16*>(scales)[index] = rounded;
            return to_float(rounded);
        }
        default:
            static_cast<float*>(scales)[index] = scale;
            return scale;
    }
}

// The scale of one group: the largest element becomes 127 or, in 4 bits, -8 whatever its sign.
template <typename T>
static float scale_of(const T* x, int64_t count, int bits) {
    Vec low = splat(0.0f), high = splat(0.0f);
    for (int64_t i = 0; i < count; i += Vec::kSize) {
        const Vec values = count - i >= Vec::kSize
                               ? load(x + i)
                               : load_partial(x + i, static_cast<int>(count - i));
        low = min(low, values);
        high = max(high, values);
    }
    const float largest = reduce_max(high), smallest = -reduce_max(splat(0.0f) - low);
    if (bits == 8) return (largest > -smallest ? largest : -smallest) / 127.0f;
    return (largest >= -smallest ? largest : smallest) / -8.0f;
}

template <typename T>
static void quantize_row(const QuantizeRowsArgs& args, const T* x, int64_t row) {
    constexpr int kMost = kQuantizedDepth * 4;  // groups are multiples of the depth
    const float lowest = args.bits == 8 ? -127.0f : -8.0f, highest = args.bits == 8 ? 127.0f : 7.0f;
    const int64_t panel = row / kPanelColumns, column = row % kPanelColumns;
    uint8_t* codes = static_cast<uint8_t*>(args.packed) + panel * panel_bytes_of(args.k, args.bits);
    const int64_t k_bytes =
        (args.bits == 8 ? Int8Codes::kStepBytes : Int4Codes::kStepBytes) / kQuantizedDepth;
    for (int64_t group = 0; group < args.groups; ++group) {
        const int64_t begin = group * args.group_size;
        const int64_t end = group + 1 < args.groups ? begin + args.group_size : args.k;
        const int64_t index = (panel * args.groups + group) * kPanelColumns + column;
        const float scale = store_scale(args.scales, args.scale_dtype, index,
                                        scale_of(x + begin, end - begin, args.bits));
        const Vec inverse = splat(scale == 0.0f ? 0.0f : 1.0f / scale);
        for (int64_t i = begin; i < end; i += kMost) {
            float rounded[kMost];
            const int64_t count = end - i < kMost ? end - i : kMost;
            for (int64_t j = 0; j < count; j += Vec::kSize) {
                const Vec values = count - j >= Vec::kSize
                                       ? load(x + i + j)
                                       : load_partial(x + i + j, static_cast<int>(count - j));
                store(rounded + j,
                      min(max(round_to_int(values * inverse), splat(lowest)), splat(highest)));
            }
            write_column(codes + i * k_bytes, column, count, args.bits,
                         [&](int64_t j) { return static_cast<int8_t>(rounded[j]); });
        }
    }
}

void quantize_rows(const QuantizeRowsArgs& args) {
    visit_float_type(args.dtype, [&](auto type) {
        using T = decltype(type);
        parallel_for(args.count, 1 + 65536 / args.k, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                quantize_row(args, static_cast<const T*>(args.rows) + i * args.row_stride,
                             args.start + i);
            }
        });
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
