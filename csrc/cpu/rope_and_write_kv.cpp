// What becomes of a token's queries, keys and values before attention, while they are in the
// nearest cache: RMSNorm, rotation, and for keys and values the way to their slot.
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/norm_row.h"
#include "cpu/parallel.h"
#include "cpu/rope_row.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

template <typename T>
class TokenHeads {
  public:
    explicit TokenHeads(const RopeAndWriteKvArgs& args) : args_(args) {}

    void run(int64_t token) const {
        T* queries = static_cast<T*>(args_.qkv) + token * args_.token_stride;
        T* keys = queries + args_.q_heads * args_.head_dim;
        const int64_t width = args_.kv_heads * args_.head_dim;
        const float* cos_sin = args_.cos_sin + args_.positions[token] * args_.rotary_dim;
        norm_and_rotate(queries, args_.q_heads, args_.q_weight, cos_sin);
        norm_and_rotate(keys, args_.kv_heads, args_.k_weight, cos_sin);
        write(args_.k_cache, token, keys, width);
        write(args_.v_cache, token, keys + width, width);
    }

  private:
    // The scales of several heads first: each ends a long chain, and the next need not wait for it.
    void norm_and_rotate(T* heads, int64_t count, const void* weight, const float* cos_sin) const {
        constexpr int64_t kAtOnce = 16;
        const int64_t width = args_.head_dim;
        float scales[kAtOnce];
        for (; count > 0; count -= kAtOnce, heads += kAtOnce * width) {
            const int64_t taken = count < kAtOnce ? count : kAtOnce;
            for (int64_t i = 0; weight && i < taken; ++i) {
                const float squares = sum_squares(heads + i * width, width);
                scales[i] = norm_scale(squares, width, args_.epsilon);
            }
            for (int64_t i = 0; i < taken; ++i) {
                T* head = heads + i * width;
                if (weight) {
                    norm_row(head, head, static_cast<const T*>(weight), width, scales[i],
                             args_.weight_offset);
                }
                rotate_head(head, cos_sin, args_.rotary_dim / 2, args_.interleaved);
            }
        }
    }

    void write(void* cache, int64_t token, const T* heads, int64_t width) const {
        std::memcpy(static_cast<T*>(cache) + args_.slots[token] * width, heads,
                    static_cast<size_t>(width) * sizeof(T));
    }

    const RopeAndWriteKvArgs& args_;
};

void rope_and_write_kv(const RopeAndWriteKvArgs& args) {
    visit_float_type(args.dtype, [&](auto type) {
        const TokenHeads<decltype(type)> heads(args);
        const int64_t width = (args.q_heads + 2 * args.kv_heads) * args.head_dim;
        parallel_for(args.tokens, 1 + 32768 / (width + 1), [&](int64_t begin, int64_t end) {
            for (int64_t token = begin; token < end; ++token) heads.run(token);
        });
    });
}

}  // namespace sglite::cpu::SGLITE_CPU_PATH
