// How the two attention kernels are launched: a persistent grid over the plan's units.
#pragma once

#include <bit>
#include <type_traits>

#include "cuda/attention_tile.cuh"
#include "cuda/launchers.h"
#include "cuda/visit.cuh"

namespace sglite::cuda {

// Calls `body` with an element type and a padded head size that kernels exist for.
template <typename Body>
void visit_attention(const AttentionArgs& args, const Body& body) {
    const auto visit_dim = [&](auto element) {
        switch (padded_head_dim(args.shape.head_dim)) {
            case 64:
                return body(element, std::integral_constant<int, 64>{});
            case 96:
                return body(element, std::integral_constant<int, 96>{});
            case 128:
                return body(element, std::integral_constant<int, 128>{});
            default:
                return body(element, std::integral_constant<int, 256>{});
        }
    };
    if (args.dtype == DType::kBFloat16) {
        visit_dim(BFloat16{});
    } else {
        visit_dim(Half{});
    }
}

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
        .unit_places = static_cast<int>(extends ? layout.extend_places : layout.decode_places),
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

// Tiles in shared memory at once, if they fit.
constexpr int kDecodeStages = 2, kExtendStages = 2;

// `shared_bytes(stages)` is what a block needs. The grid fills the machine whatever the plan holds.
template <typename T, auto kKernel>
void launch_attention(const AttentionArgs& args, Stream stream, int threads, bool extends,
                      int stages, size_t (*shared_bytes)(int)) {
    AttentionView<T> view = attention_view<T>(args, extends);
    const Machine machine = machine_of(stream.device);
    while (stages > 1 && shared_bytes(stages) > machine.block_shared_bytes) --stages;
    view.stages = stages;
    const size_t bytes = shared_bytes(stages);
    const int blocks = blocks_per_multiprocessor(reinterpret_cast<const void*>(kKernel),
                                                 stream.device, threads, bytes);
    launch<kKernel>(
        {
            .op = "paged_attention",
            .grid = dim3(static_cast<unsigned>(machine.multiprocessors * blocks)),
            .threads = threads,
            .shared_bytes = bytes,
            .stream = stream,
            .overlaps = true,
        },
        view);
}

}  // namespace sglite::cuda
