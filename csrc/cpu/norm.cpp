// RMSNorm (Zhang and Sennrich, 2019): out[i] = x[i] / sqrt(mean(x^2) + epsilon) * weight[i], with
// the residual addition in front of it when asked for. Rounds where Hugging Face does: the sum with
// the residual, and the normalised value before it meets the weight, both to the tensors' own type.
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

// Rounds a vector to T and back, as storing it would.
template <typename T>
static Vec round_through(Vec a) {
    T stored[Vec::kSize];
    store(stored, a);
    return load(stored);
}

// x += residual, written to both; returns nothing. Only for rows that carry a residual.
template <typename T>
static void add_row(T* residual, const T* x, int64_t width) {
    int64_t i = 0;
    for (; i + Vec::kSize <= width; i += Vec::kSize)
        store(residual + i, load(x + i) + load(residual + i));
    for (; i < width; ++i) residual[i] = from_float<T>(to_float(x[i]) + to_float(residual[i]));
}

template <typename T>
static float inverse_rms(const T* x, int64_t width, float epsilon) {
    Vec squares = splat(0.0f);
    int64_t i = 0;
    for (; i + Vec::kSize <= width; i += Vec::kSize) {
        const Vec value = load(x + i);
        squares = fma(value, value, squares);
    }
    if (i < width) {
        const Vec value = load_partial(x + i, static_cast<int>(width - i));
        squares = fma(value, value, squares);
    }
    return 1.0f / std::sqrt(reduce_sum(squares) / static_cast<float>(width) + epsilon);
}

template <typename T>
static void norm_row(T* out, const T* x, const T* weight, int64_t width, float scale,
                     float weight_offset) {
    int64_t i = 0;
    for (; i + Vec::kSize <= width; i += Vec::kSize) {
        const Vec normed = round_through<T>(load(x + i) * splat(scale));
        store(out + i, normed * (load(weight + i) + splat(weight_offset)));
    }
    for (; i < width; ++i) {
        const float normed = to_float(from_float<T>(to_float(x[i]) * scale));
        out[i] = from_float<T>(normed * (to_float(weight[i]) + weight_offset));
    }
}

template <typename T>
static void norm_rows(const RmsNormArgs& args) {
    const int64_t grain = 1 + 65536 / (args.width + 1);
    parallel_for(args.rows, grain, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
            if (args.residual) {
                T* residual = static_cast<T*>(args.residual) + row * args.residual_stride;
                add_row(residual, x, args.width);
                x = residual;
            }
            norm_row(static_cast<T*>(args.out) + row * args.out_stride, x,
                     static_cast<const T*>(args.weight), args.width,
                     inverse_rms(x, args.width, args.epsilon), args.weight_offset);
        }
    });
}

void rms_norm(const RmsNormArgs& args) {
    visit_float_type(args.dtype, [&](auto type) { norm_rows<decltype(type)>(args); });
}

}  // namespace sglite::cpu::SGLITE_CPU_PATH
