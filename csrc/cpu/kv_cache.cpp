// Copies each token's key and value to its slot of the paged cache, and slots to other slots.
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

void copy_kv_slots(const CopyKvSlotsArgs& args) {
    for (int64_t number = 0; number < args.num_parts; ++number) {
        const CopyKvSlotsArgs::Part part = args.parts[number];
        const auto slot = [&](int64_t index) { return part.data + index * part.row_bytes; };
        const auto staged = [&](int64_t i) { return args.workspace + i * part.row_bytes; };
        const int64_t grain = 1 + 262144 / (part.row_bytes + 1);
        // All are read before the first is written, since they may overlap.
        parallel_for(args.count, grain, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i)
                std::memcpy(staged(i), slot(args.sources[i]), part.row_bytes);
        });
        parallel_for(args.count, grain, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i)
                std::memcpy(slot(args.destinations[i]), staged(i), part.row_bytes);
        });
    }
}

}  // namespace sglite::cpu::SGLITE_CPU_PATH
