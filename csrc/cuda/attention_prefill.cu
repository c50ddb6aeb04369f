// Which prefill kernel takes a batch, and whether this GPU has it.
#include "cuda/attention_prefill.h"

#include "cuda/attention_launch.cuh"

namespace sglite::cuda {

namespace {

PrefillArgs prefill_args(const AttentionArgs& args, Stream stream) {
    constexpr double kLog2E = 1.44269504088896340736;
    const AttentionShape& shape = args.shape;
    const AttentionLayout layout(shape);
    char* workspace = static_cast<char*>(args.workspace);
    auto* counts = reinterpret_cast<AttentionCounts*>(workspace);
    const auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
    PrefillArgs prefill{
        .key_map = {},
        .value_map = {},
        .has_maps = false,
        .out = {args.out.data, args.out.token_stride, args.out.head_stride},
        .q = {args.q.data, args.q.token_stride, args.q.head_stride},
        .k_cache = args.k_cache,
        .v_cache = args.v_cache,
        .page_table = args.page_table,
        .query_start = args.query_start,
        .kv_lens = args.kv_lens,
        .kv_end = args.kv_end,
        .tiles = reinterpret_cast<const PrefillTile*>(workspace + layout.prefill_tiles),
        .tile_count = &counts->prefill_tiles,
        .tickets = &counts->prefill_tickets,
        .table_width = shape.table_width,
        .max_tiles = narrow(layout.most_prefill_tiles),
        .page_size = narrow(shape.page_size),
        .group = narrow(shape.group()),
        .kv_heads = narrow(shape.kv_heads),
        .head_dim = narrow(shape.head_dim),
        .multiprocessors = machine_of(stream.device).multiprocessors,
        .group_inverse = narrow(65536 / shape.group() + 1),
        .window = narrow(std::min<int64_t>(shape.window, INT32_MAX)),
        .score_scale = 1.0f,
        .exponent_scale = static_cast<float>(args.scale * kLog2E),
        .scaled = false,
        .capped = false,
        .dtype = args.dtype,
    };
    if (args.soft_cap) {
        prefill.score_scale = static_cast<float>(args.scale / args.soft_cap);
        prefill.exponent_scale = static_cast<float>(args.soft_cap * kLog2E);
        prefill.scaled = prefill.capped = true;
    } else if (args.scale <= 0) {
        // The largest score must also be the largest exponent.
        prefill.score_scale = static_cast<float>(args.scale);
        prefill.exponent_scale = static_cast<float>(kLog2E);
        prefill.scaled = true;
    }
#ifdef __CUDACC__
    const auto describe = [&](TensorMap& map, const void* cache) {
        return make_tensor_map(map, cache, args.dtype, shape.kv_heads, shape.head_dim,
                               kPrefillSpan);
    };
    prefill.has_maps =
        describe(prefill.key_map, args.k_cache) && describe(prefill.value_map, args.v_cache);
#endif
    return prefill;
}

}  // namespace

bool takes_prefills(const AttentionShape& shape, int device) {
    return shape.has_extends() && padded_head_dim(shape.head_dim) && shape.head_dim % 8 == 0 &&
           shape.prefill_tile() && shape.page_size % kPrefillSpan == 0 &&
           prefill_is_built<128>(device);
}

void attention_prefill(const AttentionArgs& args, Stream stream) {
    const PrefillArgs prefill = prefill_args(args, stream);
    switch (padded_head_dim(args.shape.head_dim)) {
        case 64:
            return launch_prefill<64>(prefill, stream);
        case 96:
            return launch_prefill<96>(prefill, stream);
        case 128:
            return launch_prefill<128>(prefill, stream);
        case 256:
            return launch_prefill<256>(prefill, stream);
    }
}

}  // namespace sglite::cuda
