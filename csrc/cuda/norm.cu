// RMSNorm (Zhang and Sennrich, 2019). How a row is worked on follows from its width alone, never
// from the number of rows.
#include "cuda/norm.cuh"

#include "cuda/launchers.h"
#include "cuda/visit.cuh"

namespace sglite::cuda {

namespace {

constexpr int kNarrowThreads = 128;  // of a block for several narrow rows

template <typename T>
struct Row {
    const T* x;
    T* residual;
    T* out;

    __device__ Row(const RmsNormArgs& args, int64_t at)
        : x(static_cast<const T*>(args.x) + at * args.x_stride),
          residual(args.residual ? static_cast<T*>(args.residual) + at * args.residual_stride
                                 : nullptr),
          out(static_cast<T*>(args.out) + at * args.out_stride) {}

    // What is normalised: x, or its sum with the residual, which takes the residual's place.
    template <bool kAligned>
    __device__ Chunk<T> take(int64_t start, int64_t width) const {
        Chunk<T> chunk = load_chunk<kAligned>(x, start, width);
        if (residual) {
            const Chunk<T> other = load_chunk<kAligned>(residual, start, width);
            for (int j = 0; j < kChunk<T>; ++j) {
                chunk[j] = from_float<T>(to_float(chunk[j]) + to_float(other[j]));
            }
            store_chunk<kAligned>(residual, start, width, chunk);
        }
        return chunk;
    }
};

// A group of lanes for each row, one or two chunks for each lane.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kNarrowThreads)
    narrow_rms_norm_kernel(RmsNormArgs args, int lanes) {
    const int64_t at =
        static_cast<int64_t>(blockIdx.x) * (kNarrowThreads / lanes) + threadIdx.x / lanes;
    const int64_t first = threadIdx.x % lanes * kChunk<T>, second = first + lanes * kChunk<T>;
    const bool has_first = at < args.rows && first < args.width;
    const bool has_second = at < args.rows && second < args.width;
    const T* weight = static_cast<const T*>(args.weight);
    Chunk<T> a{}, b{}, weight_a{}, weight_b{};
    if (has_first) weight_a = load_chunk<kAligned>(weight, first, args.width);
    if (has_second) weight_b = load_chunk<kAligned>(weight, second, args.width);

    wait_for_previous_kernel();
    let_next_kernel_start();
    const Row<T> row(args, at);
    if (has_first) a = row.template take<kAligned>(first, args.width);
    if (has_second) b = row.template take<kAligned>(second, args.width);
    const float squares = group_sum(sum_of_squares<T>(a) + sum_of_squares<T>(b), lanes);
    const float scale = inverse_rms(squares, args.width, args.epsilon);
    if (has_first) {
        normalize<T>(a, scale, weight_a, args.weight_offset);
        store_chunk<kAligned>(row.out, first, args.width, a);
    }
    if (has_second) {
        normalize<T>(b, scale, weight_b, args.weight_offset);
        store_chunk<kAligned>(row.out, second, args.width, b);
    }
}

// The sum over the block's threads, the same in all.
__device__ float block_sum(float value) {
    __shared__ float sums[kMostNormThreads / kWarp];
    value = warp_sum(value);
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = value;
    __syncthreads();
    float sum = 0.0f;
    for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) sum += sums[warp];
    return sum;
}

// A block for each row. A thread keeps its first chunk in registers; further ones, of rows of more
// than kMostNormThreads chunks, are read again.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kMostNormThreads) rms_norm_kernel(RmsNormArgs args) {
    const int64_t width = args.width, step = static_cast<int64_t>(blockDim.x) * kChunk<T>;
    const int64_t start = threadIdx.x * kChunk<T>;
    const Row<T> row(args, blockIdx.x);
    const T* weight = static_cast<const T*>(args.weight);
    Chunk<T> first{}, first_weight{};
    if (start < width) first_weight = load_chunk<kAligned>(weight, start, width);

    wait_for_previous_kernel();
    let_next_kernel_start();
    if (start < width) first = row.template take<kAligned>(start, width);
    float squares = sum_of_squares<T>(first);
    for (int64_t i = start + step; i < width; i += step) {
        squares += sum_of_squares<T>(row.template take<kAligned>(i, width));
    }
    const float scale = inverse_rms(block_sum(squares), width, args.epsilon);
    if (start < width) {
        normalize<T>(first, scale, first_weight, args.weight_offset);
        store_chunk<kAligned>(row.out, start, width, first);
    }
    for (int64_t i = start + step; i < width; i += step) {
        Chunk<T> chunk = load_chunk<kAligned>(row.residual ? row.residual : row.x, i, width);
        normalize<T>(chunk, scale, load_chunk<kAligned>(weight, i, width), args.weight_offset);
        store_chunk<kAligned>(row.out, i, width, chunk);
    }
}

template <typename T, bool kAligned>
void run(const RmsNormArgs& args, Stream stream) {
    const int64_t chunks = (args.width + kChunk<T> - 1) / kChunk<T>;
    if (chunks > 2 * kWarp) {
        return launch<rms_norm_kernel<T, kAligned>>(
            {
                .op = "rms_norm",
                .grid = dim3(static_cast<unsigned>(args.rows)),
                .threads = norm_threads(chunks),
                .stream = stream,
                .overlaps = true,
            },
            args);
    }
    int lanes = 1;
    while (lanes < kWarp && lanes < chunks) lanes *= 2;
    const int rows = kNarrowThreads / lanes;
    launch<narrow_rms_norm_kernel<T, kAligned>>(
        {
            .op = "rms_norm",
            .grid = dim3(static_cast<unsigned>((args.rows + rows - 1) / rows)),
            .threads = kNarrowThreads,
            .stream = stream,
            .overlaps = true,
        },
        args, lanes);
}

}  // namespace

void rms_norm(const RmsNormArgs& args, Stream stream) {
    visit_float_type(args.dtype, [&](auto element) {
        using T = decltype(element);
        if (args.width % kChunk<T> == 0 &&
            aligned16<T>({args.x_stride, args.out_stride, args.residual_stride},
                         {args.x, args.out, args.residual, args.weight})) {
            run<T, true>(args, stream);
        } else {
            run<T, false>(args, stream);
        }
    });
}

}  // namespace sglite::cuda
