// Linear layers for few rows; see linear_rows.cuh. For many rows there is torch.
#include "cuda/launchers.h"
#include "cuda/linear_rows.cuh"
#include "cuda/linear_wide.cuh"
#include "cuda/visit.cuh"

namespace sglite::cuda {

namespace {

constexpr const char* kOp = "linear";
constexpr int kMostTokens = 64;  // of one launch
constexpr int kMostWarps = 8;

// How many warps share k. The order of additions follows from it, so that it may depend on the
// weight's shape, and on nothing else.
int warps_for(int64_t n, int64_t k) {
    (void)n;
    (void)k;
    return kMostWarps;
}

// Eights of weight rows of a block: enough blocks for every multiprocessor, and not many more.
int groups_for(int64_t n, int tokens, bool is_gated) {
    if (n <= 2048 && !is_gated) return 1;
    return tokens <= 8 || n <= 4096 ? 2 : 4;
}

template <typename T, int kGroups, int kOctets, int kDepth, bool kNorm>
void run(const LinearRowsArgs& args, int warps, Stream stream) {
    constexpr int kRows = 8 * kGroups;
    const int width = args.is_gated ? kRows / 2 : kRows;
    launch<linear_rows_kernel<T, kGroups, kOctets, kDepth, kNorm, kMostWarps>>(
        {
            .op = kOp,
            .grid = dim3((args.n + width - 1) / width),
            .threads = warps * kWarp,
            .shared_bytes = linear_shared(args.m, args.k, kRows, warps, kNorm).bytes,
            .stream = stream,
            .overlaps = true,
        },
        args);
}

template <typename T, int kOctets, bool kNorm>
void run_groups(const LinearRowsArgs& args, int groups, int warps, Stream stream) {
    switch (groups) {
        case 1:
            return run<T, 1, kOctets, 4, kNorm>(args, warps, stream);
        case 2:
            return run<T, 2, kOctets, kOctets == 1 ? 4 : 2, kNorm>(args, warps, stream);
        default:
            return run<T, 4, kOctets, 2, kNorm>(args, warps, stream);
    }
}

template <typename T, int kGroups, int kOctets, int kStages>
void run_wide(const LinearRowsArgs& args, int warps, Stream stream) {
    const int width = args.is_gated ? 4 * kGroups : 8 * kGroups;
    launch<linear_wide_kernel<T, kGroups, kOctets, kStages, kMostWarps>>(
        {
            .op = kOp,
            .grid = dim3((args.n + width - 1) / width),
            .threads = warps * kWarp,
            .shared_bytes = linear_wide_shared<kGroups, kOctets, kStages>(args.m, warps),
            .stream = stream,
            .overlaps = true,
        },
        args);
}

template <typename T>
void run_rows(const LinearRowsArgs& args, Stream stream) {
    const int64_t weight_rows = args.is_gated ? 2 * args.n : args.n;
    const int groups = groups_for(weight_rows, args.m, args.is_gated);
    const int warps = warps_for(weight_rows, args.k);
    if (args.norm_weight) {
        if (args.m <= 8) return run_groups<T, 1, true>(args, groups, warps, stream);
        if (args.m <= 16) return run_groups<T, 2, true>(args, groups, warps, stream);
        throw std::invalid_argument("linear: norm_weight: expected at most 16 rows of x");
    }
    if (args.m <= 8) return run_groups<T, 1, false>(args, groups, warps, stream);
    if (args.m <= 16) return run_groups<T, 2, false>(args, groups, warps, stream);
    if (args.m <= 32) {
        return weight_rows <= 4096 ? run_wide<T, 4, 4, 4>(args, warps, stream)
                                   : run_wide<T, 8, 4, 4>(args, warps, stream);
    }
    if (weight_rows <= 4096) return run_wide<T, 4, 8, 4>(args, warps, stream);
    run_wide<T, 8, 8, 3>(args, warps, stream);
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
