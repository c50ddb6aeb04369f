// Rows of an embedding table by id, from a plain table or from packed panels (a tied output head).
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/weight_panels.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

// The elements of one row stand a panel's line apart.
template <typename T>
static void gather_packed(T* out, const EmbeddingArgs& args, int64_t id) {
    const int64_t steps = steps_of<T>(args.width), whole_steps = args.width / kStepDepth<T>;
    const uint32_t* words = static_cast<const uint32_t*>(args.table) +
                            id / kPanelColumns * steps * kPanelColumns + id % kPanelColumns;
    for (int64_t step = 0; step < whole_steps; ++step) {
        std::memcpy(out + step * kStepDepth<T>, words + step * kPanelColumns, sizeof(uint32_t));
    }
    if (whole_steps < steps) {
        std::memcpy(out + args.width - 1, words + whole_steps * kPanelColumns, sizeof(T));
    }
}

void embedding(const EmbeddingArgs& args) {
    visit_float_type(args.dtype, [&](auto type) {
        using T = decltype(type);
        const int64_t grain = 1 + 16384 / (args.width + 1);
        parallel_for(args.count, grain, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                T* out = static_cast<T*>(args.out) + i * args.out_stride;
                if (args.packed) {
                    gather_packed(out, args, args.ids[i]);
                } else {
                    const T* row =
                        static_cast<const T*>(args.table) + args.ids[i] * args.table_stride;
                    std::memcpy(out, row, args.width * sizeof(T));
                }
            }
        });
    });
}

}  // namespace sglite::cpu::SGLITE_CPU_PATH
