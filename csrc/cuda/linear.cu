// Linear layers for few rows; see linear_rows.cuh. For many rows there is torch.
#include "cuda/launchers.h"
#include "cuda/linear_rows.cuh"
#include "cuda/linear_wide.cuh"
#include "cuda/visit.cuh"

namespace sglite::cuda {

namespace {

constexpr const char* kOp = "linear";
constexpr int kMostTokens = 64;     // of one launch
constexpr int kMostNormTokens = 8;  // where x is normalised as well
// Warps that share k. The order of additions follows from it: it may depend on the weight's shape,
// but on nothing else. All the rest below may, and was chosen by measuring.
constexpr int kWarps = 8;
// So that a multiprocessor has room for two blocks.
constexpr size_t kMostShared = 110 * 1024;

// Blocks of linear_wide_kernel that a multiprocessor has room for: their stages fill shared memory.
constexpr int kWideBlocks = 2;

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

int weight_rows(const LinearRowsArgs& args) { return args.is_gated ? 2 * args.n : args.n; }

// kRoom: blocks that a multiprocessor has registers for; kBlocks: how many of them are used. What
// is left is for the next kernel's blocks, which load their weights while they wait.
template <typename T, int kGroups, int kOctets, int kDepth, bool kHoldX, int kRoom, int kBlocks>
void run(const LinearRowsArgs& args, Stream stream) {
    constexpr int kRows = 8 * kGroups;
    const int width = args.is_gated ? kRows / 2 : kRows;
    const int tiles = (args.n + width - 1) / width;
    // As many tiles for every block, as nearly as can be.
    const int most = kBlocks * multiprocessors(stream);
    const int each = (tiles + most - 1) / most;
    const bool is_normed = args.norm_weight != nullptr;
    launch<linear_rows_kernel<T, kGroups, kOctets, kDepth, kHoldX, kWarps, kRoom>>(
        {
            .op = kOp,
            .grid = dim3((tiles + each - 1) / each),
            .threads = kWarps * kWarp,
            .shared_bytes = linear_shared(args.m, args.k, kRows, kWarps, kHoldX, is_normed).bytes,
            .stream = stream,
            .overlaps = true,
            .resident = kBlocks,
        },
        args);
}

// At most 8 tokens. Keeping x in shared memory costs a barrier, which several tiles of a block or
// several blocks of a multiprocessor make up for.
template <typename T>
void run_octet(const LinearRowsArgs& args, Stream stream) {
    const bool is_normed = args.norm_weight != nullptr;
    const bool fits =
        linear_shared(args.m, args.k, 16, kWarps, true, is_normed).bytes <= kMostShared;
    if (is_normed && !fits) {
        throw std::invalid_argument("linear: norm_weight: too many columns of x");
    }
    if (!is_normed && (!fits || args.k >= 8192 || weight_rows(args) <= 1024)) {
        return run<T, 2, 1, 4, false, 1, 1>(args, stream);
    }
    const bool is_short = args.k <= 2 * kWarps * kLinearChunk;  // no more than two turns
    if (is_short) return run<T, 2, 1, 2, true, 3, 2>(args, stream);
    run<T, 2, 1, 4, true, 2, 2>(args, stream);
}

template <typename T, int kGroups, int kOctets, int kStages>
void run_wide(const LinearRowsArgs& args, Stream stream) {
    const int width = args.is_gated ? 4 * kGroups : 8 * kGroups;
    launch<linear_wide_kernel<T, kGroups, kOctets, kStages, kWarps>>(
        {
            .op = kOp,
            .grid = dim3((args.n + width - 1) / width),
            .threads = kWarps * kWarp,
            .shared_bytes = linear_wide_shared<kGroups, kOctets, kStages>(args.m, kWarps),
            .stream = stream,
            .overlaps = true,
            .resident = kWideBlocks,
        },
        args);
}

template <typename T>
void run_rows(const LinearRowsArgs& args, Stream stream) {
    if (args.m <= kMostNormTokens) return run_octet<T>(args, stream);
    if (args.norm_weight) {
        throw std::invalid_argument("linear: norm_weight: expected at most " +
                                    std::to_string(kMostNormTokens) + " rows of x");
    }
    const int rows = weight_rows(args);
    if (args.m <= 16) {
        if (rows >= 8192) return run<T, 4, 2, 2, false, 1, 1>(args, stream);
        if (rows <= 4096 && args.k <= 3072) return run_wide<T, 2, 2, 6>(args, stream);
        return run<T, 2, 2, 2, false, 2, 2>(args, stream);
    }
    if (args.m <= 32) {
        if (rows < 3072) return run_wide<T, 2, 4, 6>(args, stream);
        if (rows < 6144) return run_wide<T, 4, 4, 6>(args, stream);
        return run_wide<T, 8, 4, 4>(args, stream);
    }
    if (rows < 3072) return run_wide<T, 2, 8, 3>(args, stream);
    if (rows < 6144) return run_wide<T, 4, 8, 3>(args, stream);
    run_wide<T, 8, 8, 3>(args, stream);
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
