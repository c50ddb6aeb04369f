// Gated activations: out = activation(gate) * up, computed in float32 and rounded once.
#include "cuda/activation.cuh"
#include "cuda/launchers.h"
#include "cuda/primitives.cuh"
#include "cuda/visit.cuh"

namespace sglite::cuda {

namespace {

constexpr int kThreads = 256;

// grid: (blocks of kThreads vectors, rows).
template <typename T, Activation kActivation, int kWidth>
__global__ void gated_activation_kernel(GatedActivationArgs args) {
    wait_for_previous_kernel();
    const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kWidth;
    if (i >= args.width) return;
    const T* gate = static_cast<const T*>(args.x) + blockIdx.y * args.x_stride + i;
    const auto gates = load_vector<kWidth>(gate);
    const auto ups = load_vector<kWidth>(gate + args.width);
    Vector<T, kWidth> result;
    for (int j = 0; j < kWidth; ++j) {
        result[j] = from_float<T>(activate<kActivation>(to_float(gates[j])) * to_float(ups[j]));
    }
    store_vector(static_cast<T*>(args.out) + blockIdx.y * args.out_stride + i, result);
}

template <typename T, Activation kActivation>
void run(const GatedActivationArgs& args, Stream stream) {
    constexpr int kWide = 16 / sizeof(T);
    const bool wide = args.width % kWide == 0 &&
                      aligned16<T>({args.x_stride, args.out_stride}, {args.x, args.out});
    const int64_t per_block = kThreads * (wide ? kWide : 1);
    // Rows lie along y, of which there may be 65535.
    constexpr int64_t kMostRows = 65535;
    for (int64_t row = 0; row < args.rows; row += kMostRows) {
        GatedActivationArgs part = args;
        part.rows = min(kMostRows, args.rows - row);
        part.x = static_cast<const T*>(args.x) + row * args.x_stride;
        part.out = static_cast<T*>(args.out) + row * args.out_stride;
        const Launch settings{
            .op = "gated_activation",
            .grid = dim3(static_cast<unsigned>((args.width + per_block - 1) / per_block),
                         static_cast<unsigned>(part.rows)),
            .threads = kThreads,
            .stream = stream,
            .overlaps = true,
        };
        if (wide) {
            launch<gated_activation_kernel<T, kActivation, kWide>>(settings, part);
        } else {
            launch<gated_activation_kernel<T, kActivation, 1>>(settings, part);
        }
    }
}

}  // namespace

void gated_activation(const GatedActivationArgs& args, Stream stream) {
    visit_float_type(args.dtype, [&](auto element) {
        using T = decltype(element);
        switch (args.activation) {
            case Activation::kSilu:
                return run<T, Activation::kSilu>(args, stream);
            case Activation::kGelu:
                return run<T, Activation::kGelu>(args, stream);
            case Activation::kGeluTanh:
                return run<T, Activation::kGeluTanh>(args, stream);
        }
    });
}

}  // namespace sglite::cuda
