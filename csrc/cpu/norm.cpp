// LayerNorm (Ba et al., 2016), in float32 and rounded once, and RMSNorm (Zhang and Sennrich, 2019):
// out[i] = x[i] / sqrt(mean(x^2) + epsilon) * weight[i], with the residual addition in front of it
// when asked for. Rounds where Hugging Face does: the sum with the residual, and the normalised
// value before it meets the weight, both to the tensors' own type.
#include "cpu/kernels.h"
#include "cpu/norm_row.h"
#include "cpu/parallel.h"
#include "cpu/partial.h"
#include "cpu/simd.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

// residual += x, rounded; returns the sum of its squares then.
template <typename T>
static float add_and_sum_squares(T* residual, const T* x, int64_t width) {
    Vec squares = splat(0.0f);
    int64_t i = 0;
    for (; i + Vec::kSize <= width; i += Vec::kSize) {
        const Vec value = round_to<T>(load(x + i) + load(residual + i));
        store(residual + i, value);
        squares = fma(value, value, squares);
    }
    if (i < width) {
        const int rest = static_cast<int>(width - i);
        const Vec value = round_to<T>(load_partial(x + i, rest) + load_partial(residual + i, rest));
        store_partial(residual + i, value, rest);
        squares = fma(value, value, squares);
    }
    return reduce_sum(squares);
}

template <typename T>
static void norm_rows(const RmsNormArgs& args) {
    const int64_t grain = 1 + 65536 / (args.width + 1);
    parallel_for(args.rows, grain, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
            float squares;
            if (args.residual) {
                T* residual = static_cast<T*>(args.residual) + row * args.residual_stride;
                squares = add_and_sum_squares(residual, x, args.width);
                x = residual;
            } else {
                squares = sum_squares(x, args.width);
            }
            norm_row(static_cast<T*>(args.out) + row * args.out_stride, x,
                     static_cast<const T*>(args.weight), args.width,
                     norm_scale(squares, args.width, args.epsilon), args.weight_offset);
        }
    });
}

template <typename T>
static float mean_of(const T* x, int64_t width) {
    Vec total = splat(0.0f);
    for (int64_t i = 0; i < width; i += Vec::kSize) total = total + load_some(x + i, width - i);
    return reduce_sum(total) / static_cast<float>(width);
}

// Of the distances of a row's values from `mean`: their mean, which is what rounding took from
// `mean` (and what counts where that is large), and their variance.
struct Distances {
    float mean, variance;
};

template <typename T>
static Distances distances_from(const T* x, int64_t width, float mean) {
    Vec total = splat(0.0f), squares = splat(0.0f);
    for (int64_t i = 0; i < width; i += Vec::kSize) {
        // Places that hold nothing are no distance away.
        const Vec distance = load_some(x + i, width - i, mean) - splat(mean);
        total = total + distance;
        squares = fma(distance, distance, squares);
    }
    const float count = static_cast<float>(width), rest = reduce_sum(total) / count;
    return {rest, reduce_sum(squares) / count - rest * rest};
}

template <typename T>
static void layer_norm_row(T* out, const T* x, const T* weight, const T* bias, int64_t width,
                           float epsilon) {
    const float mean = mean_of(x, width);
    const Distances distances = distances_from(x, width, mean);
    const float scale = 1.0f / std::sqrt(distances.variance + epsilon);
    for (int64_t i = 0; i < width; i += Vec::kSize) {
        const auto take = [&](const T* from) { return load_some(from + i, width - i); };
        const Vec normed = (take(x) - splat(mean) - splat(distances.mean)) * splat(scale);
        const Vec shift = bias ? take(bias) : splat(0.0f);
        store_some(out + i, fma(normed, take(weight), shift), width - i);
    }
}

void layer_norm(const LayerNormArgs& args) {
    visit_float_type(args.dtype, [&](auto type) {
        using T = decltype(type);
        const int64_t grain = 1 + 32768 / (args.width + 1);
        parallel_for(args.rows, grain, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                layer_norm_row(static_cast<T*>(args.out) + row * args.out_stride,
                               static_cast<const T*>(args.x) + row * args.x_stride,
                               static_cast<const T*>(args.weight), static_cast<const T*>(args.bias),
                               args.width, args.epsilon);
            }
        });
    });
}

void rms_norm(const RmsNormArgs& args) {
    visit_float_type(args.dtype, [&](auto type) { norm_rows<decltype(type)>(args); });
}

}  // namespace sglite::cpu::SGLITE_CPU_PATH
