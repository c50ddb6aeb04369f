// Linear layers for few rows; see linear_rows.cuh. For many rows there is torch.
#include "cuda/launchers.h"
#include "cuda/linear_rows.cuh"
#include "cuda/linear_wide.cuh"
#include "cuda/visit.cuh"

namespace sglite::cuda {

namespace {

constexpr const char* kOp = "linear";
constexpr int kMostTokens = 64;  // of one launch
// Warps that share k. The order of additions follows from it: it may depend on the weight's shape,
// but on nothing else.
constexpr int kWarps = 8;
// Blocks of which a multiprocessor has room for two, so that the next kernel's can wait beside
// those of this one.
constexpr size_t kMostShared = 110 * 1024;
// Weights that each block asks for before the previous kernel has ended.
constexpr int64_t kPrefetchBytes = 128 * 1024;

int multiprocessors(Stream stream) {
#ifdef __CUDACC__
    int count = 0;
    check(kOp, cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, stream.device));
    return count;
#else
    (void)stream;
    return 3;
#endif
}

template <typename T, int kGroups, int kOctets, int kDepth, bool kHoldX>
void run(LinearRowsArgs args, Stream stream) {
    constexpr int kRows = 8 * kGroups;
    const int width = args.is_gated ? kRows / 2 : kRows;
    const int tiles = (args.n + width - 1) / width;
    // As many tiles for every block, as nearly as can be.
    const int most = multiprocessors(stream);
    const int each = (tiles + most - 1) / most;
    args.prefetched_tiles =
        static_cast<int>(min(int64_t{each}, kPrefetchBytes / (args.k * int64_t{2 * kRows})));
    const bool is_normed = args.norm_weight != nullptr;
    launch<linear_rows_kernel<T, kGroups, kOctets, kDepth, kHoldX, kWarps, 2>>(
        {
            .op = kOp,
            .grid = dim3((tiles + each - 1) / each),
            .threads = kWarps * kWarp,
            .shared_bytes = linear_shared(args.m, args.k, kRows, kWarps, kHoldX, is_normed).bytes,
            .stream = stream,
            .overlaps = true,
        },
        args);
}

// Small tiles spread evenly over the multiprocessors; large ones read x less often.
template <typename T, int kOctets, int kDepth>
void run_tiles(const LinearRowsArgs& args, Stream stream) {
    const bool is_normed = args.norm_weight != nullptr;
    const bool holds_x =
        linear_shared(args.m, args.k, 16, kWarps, true, is_normed).bytes <= kMostShared;
    if (is_normed && !holds_x) {
        throw std::invalid_argument("linear: norm_weight: too many rows of x");
    }
    if (holds_x) {
        if (args.n <= 3072 && !args.is_gated) return run<T, 1, kOctets, 4, true>(args, stream);
        return run<T, 2, kOctets, kDepth, true>(args, stream);
    }
    run<T, 2, kOctets, 2, false>(args, stream);
}

template <typename T, int kGroups, int kOctets, int kStages>
void run_wide(LinearRowsArgs args, Stream stream) {
    const int width = args.is_gated ? 4 * kGroups : 8 * kGroups;
    launch<linear_wide_kernel<T, kGroups, kOctets, kStages, kWarps>>(
        {
            .op = kOp,
            .grid = dim3((args.n + width - 1) / width),
            .threads = kWarps * kWarp,
            .shared_bytes = linear_wide_shared<kGroups, kOctets, kStages>(args.m, kWarps),
            .stream = stream,
            .overlaps = true,
        },
        args);
}

template <typename T>
void run_rows(const LinearRowsArgs& args, Stream stream) {
    if (args.m <= 8) return run_tiles<T, 1, 4>(args, stream);
    if (args.m <= 16) return run_tiles<T, 2, 4>(args, stream);
    if (args.norm_weight) throw std::invalid_argument("linear: norm_weight: too many rows of x");
    const bool is_narrow = (args.is_gated ? 2 * args.n : args.n) <= 4096;
    if (args.m <= 32) {
        return is_narrow ? run_wide<T, 4, 4, 4>(args, stream) : run_wide<T, 8, 4, 4>(args, stream);
    }
    is_narrow ? run_wide<T, 4, 8, 4>(args, stream) : run_wide<T, 8, 8, 3>(args, stream);
}

template <typename T>
void run_segments(const LinearArgs& args, const LinearFusion& fusion, Stream stream) {
    const int64_t out_size = args.out_dtype == DType::kFloat32 ? sizeof(float) : sizeof(T);
    for (int64_t token = 0; token < args.m; token += kMostTokens) {
        int64_t column = 0;
        for (int64_t i = 0; i < args.num_segments; ++i) {
            const WeightSegment& segment = args.segments[i];
            LinearRowsArgs rows{};
            rows.out = static_cast<char*>(args.out) + (token * args.out_stride + column) * out_size;
            rows.x = static_cast<const T*>(args.x) + token * args.x_stride;
            rows.weight = segment.data;
            rows.bias = args.bias ? static_cast<const T*>(args.bias) + column : nullptr;
            rows.residual = args.residual ? static_cast<const char*>(args.residual) +
                                                (token * args.residual_stride + column) * out_size
                                          : nullptr;
            rows.norm_weight = fusion.norm_weight;
            rows.epsilon = fusion.epsilon;
            rows.weight_offset = fusion.weight_offset;
            rows.m = static_cast<int>(min(int64_t{kMostTokens}, args.m - token));
            rows.n = static_cast<int>(fusion.is_gated ? args.n : segment.rows);
            rows.k = static_cast<int>(args.k);
            rows.out_stride = args.out_stride;
            rows.x_stride = args.x_stride;
            rows.weight_stride = segment.stride;
            rows.residual_stride = args.residual_stride;
            rows.is_gated = fusion.is_gated;
            rows.activation = fusion.activation;
            rows.to_float32 = args.out_dtype == DType::kFloat32;
            if (rows.n) run_rows<T>(rows, stream);
            column += segment.rows;
        }
    }
}

}  // namespace

bool linear_takes(const LinearArgs& args) {
    if (args.dtype == DType::kFloat32 || args.k % kLinearLane || args.k == 0) return false;
    bool aligned = aligned16<Half>({args.x_stride}, {args.x});
    for (int64_t i = 0; i < args.num_segments; ++i) {
        aligned = aligned && aligned16<Half>({args.segments[i].stride}, {args.segments[i].data});
    }
    return aligned;
}

void linear(const LinearArgs& args, const LinearFusion& fusion, Stream stream) {
    if (!linear_takes(args) || reinterpret_cast<uintptr_t>(fusion.norm_weight) % 16) {
        throw std::invalid_argument(
            "linear: the kernel takes bfloat16 and float16 whose rows start at multiples of 16 "
            "bytes");
    }
    if (args.dtype == DType::kBFloat16) {
        run_segments<BFloat16>(args, fusion, stream);
    } else {
        run_segments<Half>(args, fusion, stream);
    }
}

}  // namespace sglite::cuda
