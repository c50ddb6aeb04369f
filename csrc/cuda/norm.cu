#include "cuda/norm.cuh"

#include "cuda/launchers.h"
#include "cuda/primitives.cuh"
#include "cuda/visit.cuh"

namespace sglite::cuda {

namespace {

// One block for each row. `kWidth` elements are loaded at once; the row, in float32, stays in
// shared memory between the two passes.
template <typename T, int kWidth>
__global__ void rms_norm_kernel(RmsNormArgs args) {
    float* row = dynamic_shared<float>();
    float* scratch = row + args.width;
    const int64_t at = blockIdx.x;
    const T* x = static_cast<const T*>(args.x) + at * args.x_stride;
    T* residual =
        args.residual ? static_cast<T*>(args.residual) + at * args.residual_stride : nullptr;
    const T* weight = static_cast<const T*>(args.weight);
    T* out = static_cast<T*>(args.out) + at * args.out_stride;
    const int64_t step = blockDim.x * kWidth;

    wait_for_previous_kernel();
    float squares = 0.0f;
    for (int64_t i = threadIdx.x * kWidth; i < args.width; i += step) {
        auto values = load_vector<kWidth>(x + i);
        if (residual) {
            const auto others = load_vector<kWidth>(residual + i);
            for (int j = 0; j < kWidth; ++j) {
                values[j] = from_float<T>(to_float(values[j]) + to_float(others[j]));
            }
            store_vector(residual + i, values);
        }
        for (int j = 0; j < kWidth; ++j) row[i + j] = to_float(values[j]);
        squares = add_squares(squares, values);
    }
    squares = warp_sum(squares);
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = squares;
    __syncthreads();
    const float scale = norm_scale(scratch, blockDim.x / kWarp, args.width, args.epsilon);
    let_next_kernel_start();
    for (int64_t i = threadIdx.x * kWidth; i < args.width; i += step) {
        const auto weights = load_vector<kWidth>(weight + i);
        Vector<T, kWidth> result;
        for (int j = 0; j < kWidth; ++j) {
            result[j] = apply_norm<T>(row[i + j], scale, weights[j], args.weight_offset);
        }
        store_vector(out + i, result);
    }
}

}  // namespace

void rms_norm(const RmsNormArgs& args, Stream stream) {
    visit_float_type(args.dtype, [&](auto element) {
        using T = decltype(element);
        constexpr int kWide = 16 / sizeof(T);
        const bool wide = args.width % kWide == 0 &&
                          aligned16<T>({args.x_stride, args.out_stride, args.residual_stride},
                                       {args.x, args.out, args.residual, args.weight});
        const int64_t vectors = wide ? args.width / kWide : args.width;
        const int threads = norm_threads(vectors);
        const Launch settings{
            .op = "rms_norm",
            .grid = dim3(static_cast<unsigned>(args.rows)),
            .threads = threads,
            .shared_bytes = (args.width + threads / kWarp) * sizeof(float),
            .stream = stream,
            .overlaps = true,
        };
        if (wide) {
            launch<rms_norm_kernel<T, kWide>>(settings, args);
        } else {
            launch<rms_norm_kernel<T, 1>>(settings, args);
        }
    });
}

}  // namespace sglite::cuda
