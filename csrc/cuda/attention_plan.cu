// Cuts the attention of a batch into units of work, on the device: a captured graph is right for
// whatever lengths its batch has later.
#include "cuda/attention_launch.cuh"

namespace sglite::cuda {

namespace {

constexpr int kPlanThreads = 512;
// Units should be small beside a block's share of the work, of which so many make one.
constexpr int kUnitsPerBlock = 8;
constexpr int kBlocksPerMultiprocessor = 2;
// Prefills do not split keys: they are for batches that give this share of a machine's processors
// a block.
constexpr float kPrefillShare = 0.5f;

struct PlanView {
    AttentionShape shape;
    const int32_t* query_start;
    const int32_t* kv_lens;
    const int32_t* kv_end;
    AttentionCounts* counts;
    AttentionUnit* decode_units;
    AttentionUnit* extend_units;
    PrefillTile* prefill_tiles;
    int32_t* counters;
    int counter_count, most_parts, group;
    float slots;  // units of all heads that the machine should have at least
    float least_prefills;  // tiles of a batch whose prefills have a kernel of their own
};

enum class Kind { kNothing, kDecode, kExtend, kPrefill };

// A request's queries.
struct Queries {
    int first_token, tokens, first_position;
    Kind kind;

    __device__ Queries(const PlanView& view, int request, bool prefills) {
        first_token = view.query_start[request];
        const int end = view.query_start[request + 1];
        tokens = end - first_token;
        first_position = view.kv_lens[request] - tokens;
        const int rows = tokens * view.group;
        kind = rows <= 0             ? Kind::kNothing
               : rows <= kDecodeRows ? Kind::kDecode
               : prefills && rows >= kLeastPrefillRows
                   ? Kind::kPrefill
                   : Kind::kExtend;
    }
};

// Positions that the tokens first, ..., last - 1 (numbered over the batch) of a request see.
struct Visible {
    int begin = 0, end = 0;

    __device__ Visible(const PlanView& view, const Queries& queries, int first, int last) {
        for (int token = first; token < last; ++token) end = max(end, view.kv_end[token]);
        end = min(end, static_cast<int>(view.shape.table_width * view.shape.page_size));
        if (view.shape.window) {
            const int position = queries.first_position + first - queries.first_token;
            begin = max(0, position - static_cast<int>(view.shape.window) + 1);
        }
        if (begin >= end) begin = end = 0;
    }
};

// Cuts one tile of rows. The first unit may have any number of splits, the others have one.
__device__ void add_units(const PlanView& view, AttentionUnit* units, int* count,
                          AttentionUnit unit, float grain) {
    const int begin = unit.begin, end = unit.end;
    int split = split_of(begin), parts = 1;
    if (begin < end && end - begin > 2 * grain) {
        const int last = split_of(end - 1);
        split = max(split, last + 1 - view.most_parts);
        while (split < last && split_begin(split + 2) - begin <= grain) ++split;
        parts = last - split + 1;
    }
    const int at = atomicAdd(count, parts);
    unit.parts = parts;
    for (int part = 0; part < parts; ++part, ++split) {
        unit.part = part;
        unit.begin = part ? split_begin(split) : begin;
        unit.end = part + 1 == parts ? end : split_begin(split + 1);
        units[at + part] = unit;
    }
}

__device__ float block_sum(float value, float* scratch) {
    value = warp_sum(value);
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
    __syncthreads();
    float sum = 0.0f;
    for (int warp = 0; warp < kPlanThreads / kWarp; ++warp) sum += scratch[warp];
    __syncthreads();
    return sum;
}

// The tokens of a request that is no decode, as tiles of rows or of tokens.
__device__ void add_tiles(const PlanView& view, int request, const Queries& queries, int* counts,
                          float grain) {
    if (queries.kind == Kind::kPrefill) {
        const int most = static_cast<int>(view.shape.prefill_tile());
        const int tiles = (queries.tokens + most - 1) / most;
        for (int tile = threadIdx.x; tile < tiles; tile += kPlanThreads) {
            // Late tokens first: they see the most, and what starts last should be small.
            const int first = (tiles - 1 - tile) * most;
            view.prefill_tiles[atomicAdd(&counts[2], 1)] = {
                request, queries.first_token + first, min(most, queries.tokens - first)};
        }
        return;
    }
    const int first_row = queries.first_token * view.group;
    const int rows = queries.tokens * view.group;
    const int tiles = (rows + kExtendRows - 1) / kExtendRows;
    const int first_tile =
        static_cast<int>(view.shape.requests) + first_row / kExtendRows + request;
    for (int i = threadIdx.x; i < tiles; i += kPlanThreads) {
        const int tile = tiles - 1 - i;
        AttentionUnit unit{.request = request,
                           .first_row = first_row + tile * kExtendRows,
                           .rows = min(kExtendRows, rows - tile * kExtendRows),
                           .tile = first_tile + tile};
        const Visible visible(view, queries, unit.first_row / view.group,
                              (unit.first_row + unit.rows - 1) / view.group + 1);
        unit.begin = visible.begin;
        unit.end = visible.end;
        add_units(view, view.extend_units, &counts[1], unit, grain);
    }
}

__global__ void __launch_bounds__(kPlanThreads) plan_kernel(const __grid_constant__ PlanView view) {
    __shared__ int counts[3];
    __shared__ float scratch[kPlanThreads / kWarp];
    wait_for_previous_kernel();
    let_next_kernel_start();
    if (threadIdx.x < 3) counts[threadIdx.x] = 0;
    for (int i = threadIdx.x; i < view.counter_count; i += kPlanThreads) view.counters[i] = 0;

    const int requests = static_cast<int>(view.shape.requests);
    bool prefills = view.shape.prefills;
    if (prefills) {
        const int tile = static_cast<int>(view.shape.prefill_tile());
        float tiles = 0.0f;
        for (int request = threadIdx.x; request < requests; request += kPlanThreads) {
            const Queries queries(view, request, true);
            if (queries.kind == Kind::kPrefill)
                tiles += static_cast<float>((queries.tokens + tile - 1) / tile);
        }
        prefills = block_sum(tiles, scratch) >= view.least_prefills;
    }
    float decode_keys = 0.0f, extend_keys = 0.0f;
    for (int request = threadIdx.x; request < requests; request += kPlanThreads) {
        const Queries queries(view, request, prefills);
        const int seen = view.shape.window ? min(static_cast<int>(view.shape.window) + queries.tokens,
                                                 view.kv_lens[request])
                                           : view.kv_lens[request];
        if (queries.kind == Kind::kDecode) decode_keys += static_cast<float>(seen);
        if (queries.kind == Kind::kExtend) {
            const int tiles = (queries.tokens * view.group + kExtendRows - 1) / kExtendRows;
            extend_keys += static_cast<float>(tiles) * static_cast<float>(seen);
        }
    }
    const float heads = static_cast<float>(view.shape.kv_heads);
    const float decode_grain = block_sum(decode_keys, scratch) * heads / view.slots;
    const float extend_grain = block_sum(extend_keys, scratch) * heads / view.slots;

    for (int request = threadIdx.x; request < requests; request += kPlanThreads) {
        const Queries queries(view, request, prefills);
        if (queries.kind != Kind::kDecode) continue;
        const Visible visible(view, queries, queries.first_token,
                              queries.first_token + queries.tokens);
        add_units(view, view.decode_units, &counts[0],
                  AttentionUnit{.request = request,
                                .first_row = queries.first_token * view.group,
                                .rows = queries.tokens * view.group,
                                .tile = request,
                                .begin = visible.begin,
                                .end = visible.end},
                  decode_grain);
    }
    if (view.shape.has_extends()) {
        for (int first = 0; first < requests; first += kWarp) {
            const int mine = first + static_cast<int>(threadIdx.x % kWarp);
            bool large = false;
            if (mine < requests) {
                const Queries queries(view, mine, prefills);
                large = queries.kind == Kind::kExtend || queries.kind == Kind::kPrefill;
            }
            for (unsigned left = __ballot_sync(0xFFFFFFFFu, large); left; left &= left - 1) {
                const int request = first + __ffs(static_cast<int>(left)) - 1;
                add_tiles(view, request, Queries(view, request, prefills), counts, extend_grain);
            }
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) *view.counts = {counts[0], counts[1], counts[2], 0};
}

}  // namespace

void plan_attention(const AttentionPlanArgs& args, Stream stream) {
    const AttentionLayout layout(args.shape);
    char* workspace = static_cast<char*>(args.workspace);
    const int multiprocessors = machine_of(stream.device).multiprocessors;
    const PlanView view{
        .shape = args.shape,
        .query_start = args.query_start,
        .kv_lens = args.kv_lens,
        .kv_end = args.kv_end,
        .counts = reinterpret_cast<AttentionCounts*>(workspace),
        .decode_units = reinterpret_cast<AttentionUnit*>(workspace + layout.decode_units),
        .extend_units = reinterpret_cast<AttentionUnit*>(workspace + layout.extend_units),
        .prefill_tiles = reinterpret_cast<PrefillTile*>(workspace + layout.prefill_tiles),
        .counters = reinterpret_cast<int32_t*>(workspace + layout.counters),
        .counter_count = static_cast<int>(layout.counter_count),
        .most_parts = static_cast<int>(layout.most_parts),
        .group = static_cast<int>(args.shape.group()),
        .slots = static_cast<float>(multiprocessors * kBlocksPerMultiprocessor * kUnitsPerBlock),
        .least_prefills =
            kPrefillShare * static_cast<float>(multiprocessors) / static_cast<float>(args.shape.kv_heads),
    };
    launch<plan_kernel>(
        {
            .op = "plan_attention",
            .grid = dim3(1),
            .threads = kPlanThreads,
            .stream = stream,
            .overlaps = true,
        },
        view);
}

}  // namespace sglite::cuda
