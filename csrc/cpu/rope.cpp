// Rotary position embedding (Su et al., 2021), in place: every pair of channels (a, b) becomes
// (a cos - b sin, b cos + a sin). Arithmetic is float32, with products and sums rounded one by one,
// as torch does it; the result is rounded once to the tensors' own type.
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

static void rotate(Vec& a, Vec& b, Vec cosine, Vec sine) {
    const Vec first = a;
    a = a * cosine - b * sine;
    b = b * cosine + first * sine;
}

// Pairs (i, i + half).
template <typename T>
static void rotate_halves(T* x, const float* cosines, const float* sines, int64_t half) {
    int64_t i = 0;
    for (; i + Vec::kSize <= half; i += Vec::kSize) {
        Vec a = load(x + i), b = load(x + half + i);
        rotate(a, b, load(cosines + i), load(sines + i));
        store(x + i, a);
        store(x + half + i, b);
    }
    if (i < half) {
        const int rest = static_cast<int>(half - i);
        Vec a = load_partial(x + i, rest), b = load_partial(x + half + i, rest);
        rotate(a, b, load_partial(cosines + i, rest), load_partial(sines + i, rest));
        store_partial(x + i, a, rest);
        store_partial(x + half + i, b, rest);
    }
}

// Pairs (2i, 2i + 1).
template <typename T>
static void rotate_pairs(T* x, const float* cosines, const float* sines, int64_t half) {
    float first[Vec::kSize], second[Vec::kSize];
    for (int64_t i = 0; i < half; i += Vec::kSize) {
        const int count = static_cast<int>(half - i < Vec::kSize ? half - i : Vec::kSize);
        for (int lane = 0; lane < Vec::kSize; ++lane) {
            const bool inside = lane < count;
            first[lane] = inside ? to_float(x[2 * (i + lane)]) : 0.0f;
            second[lane] = inside ? to_float(x[2 * (i + lane) + 1]) : 0.0f;
        }
        Vec a = load(first), b = load(second);
        rotate(a, b, load_partial(cosines + i, count), load_partial(sines + i, count));
        store(first, a);
        store(second, b);
        for (int lane = 0; lane < count; ++lane) {
            x[2 * (i + lane)] = from_float<T>(first[lane]);
            x[2 * (i + lane) + 1] = from_float<T>(second[lane]);
        }
    }
}

template <typename T>
static void rotate_tokens(const RopeArgs& args) {
    const int64_t half = args.rotary_dim / 2;
    const int64_t heads = args.heads[0].count + args.heads[1].count;
    const int64_t grain = 1 + 65536 / (heads * args.rotary_dim + 1);
    parallel_for(args.tokens, grain, [&](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; ++token) {
            const float* cosines = args.cos_sin + args.positions[token] * args.rotary_dim;
            for (const RopeArgs::Heads& side : args.heads) {
                T* x = static_cast<T*>(side.data) + token * side.token_stride;
                for (int64_t head = 0; head < side.count; ++head, x += side.head_stride) {
                    if (args.interleaved) {
                        rotate_pairs(x, cosines, cosines + half, half);
                    } else {
                        rotate_halves(x, cosines, cosines + half, half);
                    }
                }
            }
        }
    });
}

void apply_rope(const RopeArgs& args) {
    visit_float_type(args.dtype, [&](auto type) { rotate_tokens<decltype(type)>(args); });
}

}  // namespace sglite::cpu::SGLITE_CPU_PATH
