// Rotary position embedding of heads, in place.
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/rope_row.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

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
                    rotate_head(x, cosines, half, args.interleaved);
                }
            }
        }
    });
}

void apply_rope(const RopeArgs& args) {
    visit_float_type(args.dtype, [&](auto type) { rotate_tokens<decltype(type)>(args); });
}

}  // namespace sglite::cpu::SGLITE_CPU_PATH
