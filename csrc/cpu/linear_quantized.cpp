// The linear layer over quantised weights; see linear_quantized_tile.h for the arithmetic. A few
// rows of x are multiplied with codes as they come from memory. For more rows the codes of a part
// of a panel are first written out as numbers, once for all of them.
#include "cpu/kernels.h"
#include "cpu/linear_output.h"
#include "cpu/linear_plan.h"
#include "cpu/linear_quantized_tile.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

// A piece is at most so many steps of a panel, and is used for so many rows of x.
constexpr int64_t kCodePieceSteps = kLargestGroup / kQuantizedDepth;
constexpr int64_t kCodePieceRows = 192;

// Up to so many blocks of rows convert codes anew each, which is cheaper than writing them out.
constexpr int64_t kFewBlocks = 3;

// How products of a type of x are added up, and how codes are written out for it. Those of bfloat16
// go through dot products of pairs where the processor has them.
template <typename T>
struct Products {
    static constexpr bool kUsesPairs = false;
    using Piece = FloatPiece;
    template <typename Source, int kRows, int kPanels>
    using Sums = FloatSums<Source, kRows, kPanels>;
};
#if defined(__AVX512BF16__)
template <>
struct Products<BFloat16> {
    static constexpr bool kUsesPairs = true;
    using Piece = PairPiece;
    template <typename Source, int kRows, int kPanels>
    using Sums = PairSums<Source, kRows, kPanels>;
};
#endif
template <typename T>
constexpr bool kUsesPairs = Products<T>::kUsesPairs;

// Bytes of one row of x as it is laid out, without its sums.
template <typename T>
static int64_t row_bytes(int64_t k) {
    return quantized_steps_of(k) * kQuantizedDepth * (kUsesPairs<T> ? 2 : 4);
}

template <typename T>
static int64_t code_layout_bytes(int64_t m, int64_t k, int64_t groups) {
    return m * (row_bytes<T>(k) + groups * static_cast<int64_t>(sizeof(float)));
}

template <typename T, typename Codes>
class QuantizedLinear {
  public:
    QuantizedLinear(const QuantizedLinearArgs& args, void* laid_out)
        : args_(args.linear),
          weight_(args),
          blocks_(args.linear.m, kMaxCodeRows),
          steps_(quantized_steps_of(args.linear.k)),
          group_steps_(args.groups == 1 ? steps_ : args.group_size / kQuantizedDepth),
          panels_(args.linear, panels_of(args.linear.n)),
          x_(static_cast<unsigned char*>(laid_out)),
          sums_(reinterpret_cast<float*>(x_ + args.linear.m * row_bytes<T>(args.linear.k))) {}

    void run() {
        // No panel alone where two are taken at once.
        const LinearPlan plan(args_, panels_.count, blocks_.count, row_bytes<T>(args_.k), 2);
        plan.for_each_block([&](int64_t block) { lay_out(block); });
        SharedCounter next;
        run_together(plan.threads, [&](int) {
            plan.take_units(next, [&](Range turns, Range blocks) {
                if (blocks_.count <= kFewBlocks) {
                    multiply_few(turns);
                } else {
                    multiply_many(turns, blocks);
                }
            });
        });
    }

  private:
    unsigned char* x_of(int64_t block) const {
        return x_ + blocks_.begin(block) * row_bytes<T>(args_.k);
    }
    // [groups][height of the block].
    float* sums_of(int64_t block) const { return sums_ + blocks_.begin(block) * weight_.groups; }

    void lay_out(int64_t block) const {
        const int64_t rows = blocks_.height(block);
        for (int64_t row = 0; row < rows; ++row) {
            const T* x =
                static_cast<const T*>(args_.x) + (blocks_.begin(block) + row) * args_.x_stride;
            if constexpr (kUsesPairs<T>) {
                lay_out_pairs(reinterpret_cast<uint32_t*>(x_of(block)) + row, x, rows);
            } else {
                lay_out_floats(reinterpret_cast<float*>(x_of(block)) + row, x, rows);
            }
            if (weight_.zeros || Codes::kOffset != 0.0f) add_up(sums_of(block) + row, x, rows);
        }
    }

    void lay_out_floats(float* block, const T* x, int64_t rows) const {
        static_assert(Vec::kSize % kQuantizedDepth == 0);
        float factors[Vec::kSize];
        for (int i = 0; i < Vec::kSize; ++i) factors[i] = Codes::row_factor(i % kQuantizedDepth);
        const Vec factor = load(factors);
        const int64_t padded = steps_ * kQuantizedDepth;
        for (int64_t i = 0; i < padded; i += Vec::kSize) {
            const Vec values = (i < args_.k ? load_some(x + i, args_.k - i) : splat(0.0f)) * factor;
            if (rows == 1 && i + Vec::kSize <= padded) {
                store(block + i, values);
                continue;
            }
            float lanes[Vec::kSize];
            store(lanes, values);
            for (int64_t lane = 0; lane < Vec::kSize && i + lane < padded; ++lane) {
                block[(i + lane) * rows] = lanes[lane];
            }
        }
    }

    void lay_out_pairs(uint32_t* block, const T* x, int64_t rows) const {
        for (int64_t pair = 0; pair < steps_ * kQuantizedDepth / 2; ++pair) {
            block[pair * rows] = 2 * pair < args_.k ? word_at(x, pair, args_.k) : 0;
        }
    }

    // The sums of x over each group, in vectors whose lanes are added at the end.
    void add_up(float* sums, const T* x, int64_t rows) const {
        const int64_t depth = group_steps_ * kQuantizedDepth;
        for (int64_t group = 0; group < weight_.groups; ++group) {
            const int64_t end = smaller((group + 1) * depth, args_.k);
            Vec sum = splat(0.0f);
            for (int64_t i = group * depth; i < end; i += Vec::kSize) {
                sum = sum + load_some(x + i, end - i);
            }
            sums[group * rows] = reduce_sum(sum);
        }
    }

    GroupScales scales_from(int64_t turn, int64_t group) const {
        const int64_t first = (panels_.panel(turn) * weight_.groups + group) * kPanelColumns;
        const int64_t bytes = weight_.scale_dtype == DType::kFloat32 ? 4 : 2;
        return {static_cast<const char*>(weight_.scales) + first * bytes,
                weight_.zeros ? weight_.zeros + first : nullptr, weight_.scale_dtype,
                Codes::kOffset, panels_.distance() * weight_.groups * kPanelColumns};
    }

    int64_t panel_bytes() const { return steps_ * Codes::kStepBytes; }
    const uint8_t* codes_of(int64_t turn) const {
        return static_cast<const uint8_t*>(weight_.codes) + panels_.panel(turn) * panel_bytes();
    }

    template <typename Source, int kPanels, int kRows>
    static MultiplyCodes* kernel_for(int64_t rows) {
        return multiply_codes_for<Products<T>::template Sums, Source, kPanels, kRows>(rows);
    }

    // Sums of one group over the whole of k are scaled at the end, others within the inner loop.
    bool scales_at_end() const { return weight_.groups == 1; }

    void multiply_few(Range turns) const {
        alignas(64) float tile[kMaxCodeRows * 2 * kPanelColumns];
        const int64_t at_once = args_.m <= kMaxTwoPanelRows ? 2 : 1;
        int64_t taken;
        for (int64_t turn = turns.begin; turn < turns.end; turn += taken) {
            taken = smaller(at_once, turns.end - turn);
            CodeArgs call{
                nullptr, nullptr,      codes_of(turn),       panels_.distance() * panel_bytes(),
                steps_,  group_steps_, scales_from(turn, 0), tile,
                false};
            if (scales_at_end()) call.scales.scales = nullptr;
            for (int64_t block = 0; block < blocks_.count; ++block) {
                const int64_t rows = blocks_.height(block);
                const auto kernel = taken == 2 ? kernel_for<Codes, 2, kMaxTwoPanelRows>(rows)
                                               : kernel_for<Codes, 1, kMaxCodeRows>(rows);
                call.x = x_of(block);
                call.x_sums = sums_of(block);
                kernel(call);
                finish(tile, block, turn, taken);
            }
        }
    }

    using Piece = typename Products<T>::Piece;

    void multiply_many(Range turns, Range blocks) const {
        constexpr int64_t kBlocksAtOnce = kCodePieceRows / kMaxCodeRows;
        alignas(64) uint8_t piece[kCodePieceSteps * Piece::kStepBytes];
        alignas(64) float tiles[kCodePieceRows * kPanelColumns];
        // Whole groups, unless a group is the whole of k.
        const int64_t piece_steps =
            scales_at_end() ? kPreferredPieceSteps
                            : larger(1, kPreferredPieceSteps / group_steps_) * group_steps_;
        for (int64_t turn = turns.begin; turn < turns.end; ++turn) {
            for (int64_t first = blocks.begin; first < blocks.end; first += kBlocksAtOnce) {
                const int64_t end = smaller(first + kBlocksAtOnce, blocks.end);
                for (int64_t step = 0; step < steps_; step += piece_steps) {
                    const int64_t count = smaller(piece_steps, steps_ - step);
                    fill(piece, codes_of(turn) + step * Codes::kStepBytes, count);
                    const int64_t group = scales_at_end() ? 0 : step / group_steps_;
                    CodeArgs call{nullptr,
                                  nullptr,
                                  piece,
                                  0,
                                  count,
                                  scales_at_end() ? count : group_steps_,
                                  scales_from(turn, group),
                                  nullptr,
                                  step > 0};
                    if (scales_at_end()) call.scales.scales = nullptr;
                    for (int64_t block = first; block < end; ++block) {
                        const int64_t rows = blocks_.height(block);
                        call.x = x_of(block) + step * kStepRowBytes * rows;
                        call.x_sums = sums_of(block) + group * rows;
                        call.tile = tile_of(tiles, block - first);
                        kernel_for<Piece, 1, kMaxCodeRows>(rows)(call);
                    }
                }
                for (int64_t block = first; block < end; ++block) {
                    finish(tile_of(tiles, block - first), block, turn, 1);
                }
            }
        }
    }

    // Half of the first cache for a piece: the rest is for x.
    static constexpr int64_t kPreferredPieceSteps = (16 << 10) / Piece::kStepBytes;
    static constexpr int64_t kStepRowBytes = kQuantizedDepth * (kUsesPairs<T> ? 2 : 4);

    static float* tile_of(float* tiles, int64_t block) {
        return tiles + block * kMaxCodeRows * kPanelColumns;
    }

    static void fill(uint8_t* piece, const uint8_t* codes, int64_t steps) {
        for (int64_t step = 0; step < steps; ++step) {
            const uint8_t* from = codes + step * Codes::kStepBytes;
            uint8_t* to = piece + step * Piece::kStepBytes;
            for (int column = 0; column < kPanelColumns; column += Vec::kSize) {
#if defined(__AVX512BF16__)
                if constexpr (kUsesPairs<T>) {
                    unrolled<kQuantizedDepth / 2>([&]<int kPart>() {
                        _mm512_storeu_si512(
                            reinterpret_cast<uint32_t*>(to) + kPart * kPanelColumns + column,
                            Codes::template pair<kPart>(from, column));
                    });
                    continue;
                }
#endif
                unrolled<kQuantizedDepth>([&]<int kPart>() {
                    store(reinterpret_cast<float*>(to) + kPart * kPanelColumns + column,
                          Codes::template value<kPart>(from, column));
                });
            }
        }
    }

    // From sums to results. tile: [height of the block][32 * panels].
    void finish(float* tile, int64_t block, int64_t turn, int64_t panels) const {
        for (int64_t i = 0; i < panels; ++i) {
            finish_panel(tile + i * kPanelColumns, block, turn + i, panels * kPanelColumns);
        }
    }

    void finish_panel(float* sums, int64_t block, int64_t turn, int64_t stride) const {
        const OutputTile place{blocks_.begin(block), blocks_.height(block),
                               panels_.panel(turn) * kPanelColumns, stride};
        if (scales_at_end()) {
            const GroupScales scales = scales_from(turn, 0);
            const bool shifted = scales.shifted();
            for (int64_t row = 0; row < place.rows; ++row) {
                const Vec x_sum = splat(shifted ? sums_of(block)[row] : 0.0f);
                for (int64_t column = 0; column < kPanelColumns; column += Vec::kSize) {
                    float* sum = sums + row * stride + column;
                    Vec value = load(sum);
                    if (shifted) value = fma(scales.shift(column), x_sum, value);
                    store(sum, value * scales.scale(column));
                }
            }
        }
        store_outputs<T>(args_, sums, place);
    }

    const LinearArgs& args_;
    const QuantizedLinearArgs& weight_;
    const RowBlocks blocks_;
    const int64_t steps_, group_steps_;
    const PanelOrder panels_;
    unsigned char* x_;
    float* sums_;
};

int64_t linear_quantized_workspace(int64_t m, int64_t k, int64_t groups, DType dtype) {
    int64_t bytes = 0;
    visit_float_type(dtype,
                     [&](auto type) { bytes = code_layout_bytes<decltype(type)>(m, k, groups); });
    return bytes <= kLinearStackBytes ? 0 : bytes;
}

void linear_quantized(const QuantizedLinearArgs& args) {
    if (args.linear.m == 0 || args.linear.n == 0) return;
    alignas(64) unsigned char small[kLinearStackBytes];
    void* laid_out = args.linear.workspace ? args.linear.workspace : small;
    visit_float_type(args.linear.dtype, [&](auto type) {
        using T = decltype(type);
        if (args.bits == 8) {
            QuantizedLinear<T, Int8Codes>(args, laid_out).run();
        } else {
            QuantizedLinear<T, Int4Codes>(args, laid_out).run();
        }
    });
}

}  // namespace sglite::cpu::SGLITE_CPU_PATH
