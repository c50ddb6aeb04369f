// Copies each token's key and value to its slot of the paged cache.
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

void write_kv(const WriteKvArgs& args) {
    const int64_t row_bytes = args.heads * args.head_bytes;
    parallel_for(args.tokens, 1 + 262144 / (row_bytes + 1), [&](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; ++token) {
            for (const WriteKvArgs::Side& side : args.sides) {
                const char* from = side.from + token * side.token_stride;
                char* to = side.cache + args.slots[token] * row_bytes;
                for (int64_t head = 0; head < args.heads; ++head)
                    std::memcpy(to + head * args.head_bytes, from + head * side.head_stride,
                                args.head_bytes);
            }
        }
    });
}

}  // namespace sglite::cpu::SGLITE_CPU_PATH
