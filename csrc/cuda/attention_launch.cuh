// How the two attention kernels are launched: a persistent grid over the plan's units.
#pragma once

#include <array>
#include <atomic>
#include <bit>
#include <type_traits>

#include "cuda/attention_tile.cuh"
#include "cuda/launchers.h"
#include "cuda/visit.cuh"

namespace sglite::cuda {

// Tiles in shared memory at once, if they fit.
constexpr int kDecodeStages = 2, kExtendStages = 2;

// Calls `body` with a padded head size that kernels exist for.
template <typename Body>
void visit_head_dim(int64_t head_dim, const Body& body) {
    switch (padded_head_dim(head_dim)) {
        case 64:
            return body(std::integral_constant<int, 64>{});
        case 96:
            return body(std::integral_constant<int, 96>{});
        case 128:
            return body(std::integral_constant<int, 128>{});
        default:
            return body(std::integral_constant<int, 256>{});
    }
}

// Calls `body` with the element type, too.
template <typename Body>
void visit_attention(const AttentionArgs& args, const Body& body) {
    visit_head_dim(args.shape.head_dim, [&](auto dim) {
        if (args.dtype == DType::kBFloat16) {
            body(BFloat16{}, dim);
        } else {
            body(Half{}, dim);
        }
    });
}

// Into how many groups a plan puts decode's units. In attention_decode.cu.
int decode_groups(const AttentionShape& shape, int device);

template <typename T>
AttentionView<T> attention_view(const AttentionArgs& args, bool extends) {
    constexpr float kLog2E = 1.4426950408889634f;
    const AttentionShape& shape = args.shape;
    const AttentionLayout layout(shape);
    char* workspace = static_cast<char*>(args.workspace);
    const auto* counts = reinterpret_cast<AttentionCounts*>(workspace);
    const auto scale = static_cast<float>(args.scale), cap = static_cast<float>(args.soft_cap);
    return {
        .out = static_cast<T*>(args.out.data),
        .q = static_cast<const T*>(args.q.data),
        .k_cache = static_cast<const T*>(args.k_cache),
        .v_cache = static_cast<const T*>(args.v_cache),
        .page_table = args.page_table,
        .query_start = args.query_start,
        .kv_lens = args.kv_lens,
        .kv_end = args.kv_end,
        .units = reinterpret_cast<AttentionUnit*>(
            workspace + (extends ? layout.extend_units : layout.decode_units)),
        .groups = reinterpret_cast<UnitGroup*>(workspace + layout.unit_groups),
        .counts = counts,
        .parts = reinterpret_cast<int32_t*>(workspace + layout.parts),
        .counters = reinterpret_cast<int32_t*>(workspace + layout.counters),
        .records = reinterpret_cast<float*>(workspace + layout.records),
        .out_token_stride = args.out.token_stride,
        .out_head_stride = args.out.head_stride,
        .q_token_stride = args.q.token_stride,
        .q_head_stride = args.q.head_stride,
        .slot_stride = shape.kv_heads * shape.head_dim,
        .record_rows = shape.tokens * shape.q_heads,
        .works = 0,
        .table_width = static_cast<int>(shape.table_width),
        .page_shift = std::countr_zero(static_cast<uint64_t>(shape.page_size)),
        .kv_heads = static_cast<int>(shape.kv_heads),
        .group = static_cast<int>(shape.group()),
        .head_dim = static_cast<int>(shape.head_dim),
        .window = static_cast<int>(shape.window),
        .stages = 0,
        .score_factor = cap == 0.0f ? scale * kLog2E : scale / cap,
        .cap_factor = cap * kLog2E,
    };
}

struct Machine {
    int multiprocessors;
    size_t block_shared_bytes;  // at most, for one block
};
// In attention.cu; asked once for each device.
Machine machine_of(int device);
// How many blocks of a kernel run at once on one multiprocessor; at least 1.
int blocks_per_multiprocessor(const void* kernel, int device, int threads, size_t shared_bytes);

// How a kernel stays on a machine.
struct Residency {
    int stages;  // tiles in shared memory at once
    size_t shared_bytes;
    int blocks;  // on one multiprocessor
};

// `shared_bytes(stages)` is what a block needs with so many tiles in shared memory; there are fewer
// than `stages` where they do not fit.
template <auto kKernel>
Residency residency(int device, int threads, int stages, size_t (*shared_bytes)(int)) {
    // By device: the number of blocks, which takes long to ask for; 0: not asked yet.
    static std::array<std::atomic<int>, 64> known{};
    const size_t most_bytes = machine_of(device).block_shared_bytes;
    while (stages > 1 && shared_bytes(stages) > most_bytes) --stages;
    const size_t bytes = shared_bytes(stages);
    std::atomic<int>& blocks = known[static_cast<size_t>(device) % known.size()];
    if (blocks == 0) {
        blocks = blocks_per_multiprocessor(reinterpret_cast<const void*>(kKernel), device, threads,
                                           bytes);
    }
    return {stages, bytes, blocks};
}

// The grid fills the machine whatever the plan holds.
template <typename T, auto kKernel>
void launch_attention(AttentionView<T>& view, Stream stream, int threads,
                      const Residency& residency) {
    view.stages = residency.stages;
    const int multiprocessors = machine_of(stream.device).multiprocessors;
    launch<kKernel>(
        {
            .op = "paged_attention",
            .grid = dim3(static_cast<unsigned>(multiprocessors * residency.blocks)),
            .threads = threads,
            .shared_bytes = residency.shared_bytes,
            .stream = stream,
            .overlaps = true,
            .resident = residency.blocks,
        },
        view);
}

}  // namespace sglite::cuda
