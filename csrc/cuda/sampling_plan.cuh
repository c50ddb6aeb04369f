// How rows of logits are split over blocks, decided on the host by shapes alone.
#pragma once

#include "cuda/sampling_row.cuh"

namespace sglite::cuda {

// What a device offers to a row.
struct RowLimits {
    bool clusters;
    int64_t shared_bytes;  // of a block at most
    int64_t processors;
};

inline RowLimits row_limits(const char* op, int device) {
#ifdef __CUDACC__
    const auto attribute = [&](cudaDeviceAttr name) {
        int value = 0;
        check(op, cudaDeviceGetAttribute(&value, name, device));
        return value;
    };
    return {attribute(cudaDevAttrComputeCapabilityMajor) >= 9,
            attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
            attribute(cudaDevAttrMultiProcessorCount)};
#else
    (void)op;
    (void)device;
    return {true, 227 * 1024, 8};
#endif
}

inline RowPlan plan_rows(const RowLimits& limits, int64_t rows, int64_t vocab) {
    const auto bits = [](int64_t count) {  // the power of 2 that is not below `count`
        int bits = 0;
        while ((int64_t{1} << bits) < count) ++bits;
        return bits;
    };
    const auto slice = [&](int64_t blocks) { return ((vocab + blocks - 1) / blocks + 3) / 4 * 4; };
    // Of one block, where there are blocks enough to fill the processors.
    constexpr int64_t kSlice = 20480;
    int64_t blocks = 1;
    if (limits.clusters) {
        while (blocks < kMostBlocks &&
               (slice(blocks) > kSlice ||
                (slice(blocks) > 4 * kRowThreads && rows * blocks * 2 <= limits.processors))) {
            blocks *= 2;
        }
    }
    RowPlan plan{};
    plan.cluster = static_cast<int>(blocks);
    plan.slice = static_cast<int>(slice(blocks));
    // No sum over a row leaves 63 bits, no sum over a slice 32.
    plan.fraction_bits = min(44, 62 - bits(vocab));
    plan.quantum_bits = min(14, 31 - bits(plan.slice));
    return plan;
}

inline int64_t row_bytes(const RowPlan& plan) {
    return static_cast<int64_t>(sizeof(RowShared)) +
           plan.slice * static_cast<int64_t>(sizeof(float));
}

inline int64_t spilled_bytes(const RowLimits& limits, const RowPlan& plan, int64_t rows) {
    if (row_bytes(plan) <= limits.shared_bytes) return 0;
    return rows * plan.cluster * plan.slice * static_cast<int64_t>(sizeof(float));
}

// Launches a kernel for `args.count` rows: the one that keeps them in shared memory if they fit.
template <auto kFitting, auto kSpilling, typename Args>
void launch_rows(const char* op, const Args& args, Stream stream) {
    const RowLimits limits = row_limits(op, stream.device);
    RowPlan plan = plan_rows(limits, args.count, args.vocab);
    plan.spilled = reinterpret_cast<float*>(args.workspace);
    const bool fits = row_bytes(plan) <= limits.shared_bytes;
    const Launch settings{
        .op = op,
        .grid = dim3(static_cast<unsigned>(args.count * plan.cluster)),
        .threads = kRowThreads,
        .shared_bytes = static_cast<size_t>(fits ? row_bytes(plan) : sizeof(RowShared)),
        .stream = stream,
        .overlaps = true,
        .cluster = plan.cluster,
    };
    if (fits) {
        launch<kFitting>(settings, args, plan);
    } else {
        launch<kSpilling>(settings, args, plan);
    }
}

}  // namespace sglite::cuda
