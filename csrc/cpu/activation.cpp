// Gated activations: out = activation(gate) * up, where a row of x holds the gate and then the up
// half. Computed in float32 and rounded once.
#include "cpu/kernels.h"
#include "cpu/math.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

template <typename T, typename Function>
static void gate_rows(const GatedActivationArgs& args, const Function& function) {
    const int64_t width = args.width;
    parallel_for(args.rows, 1 + 16384 / (width + 1), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const T* gate = static_cast<const T*>(args.x) + row * args.x_stride;
            const T* up = gate + width;
            T* out = static_cast<T*>(args.out) + row * args.out_stride;
            int64_t i = 0;
            for (; i + Vec::kSize <= width; i += Vec::kSize)
                store(out + i, function(load(gate + i)) * load(up + i));
            if (i < width) {
                const int rest = static_cast<int>(width - i);
                store_partial(out + i,
                              function(load_partial(gate + i, rest)) * load_partial(up + i, rest),
                              rest);
            }
        }
    });
}

void gated_activation(const GatedActivationArgs& args) {
    visit_float_type(args.dtype, [&](auto type) {
        visit_activation(args.activation,
                         [&](const auto& function) { gate_rows<decltype(type)>(args, function); });
    });
}

}  // namespace sglite::cpu::SGLITE_CPU_PATH
