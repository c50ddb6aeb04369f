// Cuts the attention of a batch into units of work, on the device: a captured graph is right for
// whatever lengths its batch has later.
#include <climits>

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
    const int32_t* page_table;
    AttentionCounts* counts;
    AttentionUnit* decode_units;
    AttentionUnit* extend_units;
    PrefillTile* prefill_tiles;
    int32_t* common;  // [requests]: whole splits whose pages a request shares with the one before
    int32_t* parts;
    int32_t* counters;
    int counter_count, most_parts, group;
    bool shares;           // whether shared splits are looked for
    float slots;           // units of all heads that the machine should have at least
    float least_prefills;  // tiles of a batch whose prefills have a kernel of their own
};

enum class Kind { kNothing, kDecode, kExtend, kPrefill };

// A request's queries.
struct Queries {
    int first_token, tokens, first_position;
    Kind kind;

    __device__ Queries(const PlanView& view, int request, bool prefills = false) {
        first_token = view.query_start[request];
        const int end = view.query_start[request + 1];
        tokens = end - first_token;
        first_position = view.kv_lens[request] - tokens;
        const int rows = tokens * view.group;
        kind = rows <= 0                               ? Kind::kNothing
               : rows <= kDecodeRows                   ? Kind::kDecode
               : prefills && rows >= kLeastPrefillRows ? Kind::kPrefill
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

// How positions begin, ..., end - 1 become units: the first one may have any number of splits, the
// others have one.
struct Cut {
    int split, parts = 1;  // the last split of the first unit

    __device__ Cut(int begin, int end, float grain, int most_parts) : split(split_of(begin)) {
        if (begin >= end || static_cast<float>(end - begin) <= 2 * grain) return;
        const int last = split_of(end - 1);
        split = max(split, last + 1 - most_parts);
        while (split < last && static_cast<float>(split_begin(split + 2) - begin) <= grain) ++split;
        parts = last - split + 1;
    }
};

// Units for one tile of rows, starting with the rows' first split.
__device__ void add_units(AttentionUnit* units, AttentionUnit unit, const Cut& cut, int end) {
    int split = cut.split;
    for (int i = 0; i < cut.parts; ++i, ++split) {
        unit.end = i + 1 == cut.parts ? end : split_begin(split + 1);
        units[i] = unit;
        unit.begin = unit.end;
        ++unit.part;
    }
}

// How many whole splits a request's pages have in common with those of the one before; both must
// have one token, which sees more than these.
__device__ int common_splits(const PlanView& view, int request) {
    if (!view.shares || request == 0) return 0;
    const Queries before(view, request - 1), queries(view, request);
    if (before.tokens != 1 || queries.tokens != 1) return 0;
    const int64_t width = view.shape.table_width;
    const int32_t* table = view.page_table + request * width;
    const int seen = min(view.kv_end[before.first_token], view.kv_end[queries.first_token]);
    const int page_size = static_cast<int>(view.shape.page_size);
    const int pages = min(seen / page_size, static_cast<int>(width));
    constexpr int kAtOnce = 8;
    int same = 0;
    for (bool differs = false; !differs && same < pages;) {
        int equal = 0;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int page = min(same + i, pages - 1);
            equal |= (table[page] == table[page - width]) << i;
        }
        const int run = __ffs(~equal) - 1;
        differs = run < kAtOnce;
        same += run;
    }
    const int positions = min(min(same, pages) * page_size, seen - 1);
    return positions > 0 ? split_of(positions) : 0;
}

// Neighbouring requests, as many as fit a unit, and the first splits, which they share.
struct Sharing {
    int leader, members = 1, splits = 0;

    __device__ Sharing(const PlanView& view, int request) : leader(request) {
        if (!view.shares) return;
        const int requests = static_cast<int>(view.shape.requests);
        int start = request;  // of the run of requests that share anything
        while (start > 0 && view.common[start]) --start;
        const int most = kDecodeRows / view.group;
        leader = start + (request - start) / most * most;
        int end = leader + 1;
        int common = INT_MAX;
        while (end < min(leader + most, requests) && view.common[end])
            common = min(common, view.common[end++]);
        if (end - leader < 2) return;
        // All that follows the shared splits must be units of one split each.
        for (int member = leader; member < end; ++member) {
            const int seen = view.kv_end[view.query_start[member]];
            if (split_of(seen - 1) + 1 - common >= view.most_parts) return;
        }
        members = end - leader;
        splits = common;
    }

    // Units that the shared splits become, given that each member has room for `left` more.
    __device__ Cut cut(const PlanView& view, float grain) const {
        int rest = 0;
        for (int member = leader; member < leader + members; ++member) {
            const int seen = view.kv_end[view.query_start[member]];
            rest = max(rest, split_of(seen - 1) + 1 - splits);
        }
        return Cut(0, split_begin(splits), grain, view.most_parts - rest);
    }
};

__device__ void add_decode(const PlanView& view, int request, int* count, float grain) {
    const Queries queries(view, request);
    if (queries.kind != Kind::kDecode) return;
    const Visible visible(view, queries, queries.first_token, queries.first_token + queries.tokens);
    AttentionUnit unit{
        .request = request,
        .first_row = queries.first_token * view.group,
        .rows = queries.tokens * view.group,
        .tile = request,
        .begin = visible.begin,
        .end = visible.end,
        .part = 0,
        .parts = 1,
    };
    const Sharing sharing(view, request);
    if (sharing.splits == 0) {
        const Cut cut(visible.begin, visible.end, grain, view.most_parts);
        unit.parts = cut.parts;
        add_units(view.decode_units + atomicAdd(count, cut.parts), unit, cut, visible.end);
        return;
    }
    const Cut cut = sharing.cut(view, grain);
    if (request == sharing.leader) {
        AttentionUnit shared = unit;
        shared.rows *= sharing.members;
        shared.parts = -sharing.members;
        add_units(view.decode_units + atomicAdd(count, cut.parts), shared, cut,
                  split_begin(sharing.splits));
    }
    const int own = split_of(visible.end - 1) + 1 - sharing.splits;
    unit.part = cut.parts;
    unit.parts = view.parts[request] = cut.parts + own;
    unit.begin = split_begin(sharing.splits);
    Cut singles(0, 0, 0.0f, 1);
    singles.split = sharing.splits;
    singles.parts = own;
    add_units(view.decode_units + atomicAdd(count, own), unit, singles, visible.end);
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
            view.prefill_tiles[atomicAdd(&counts[2], 1)] = {request, queries.first_token + first,
                                                            min(most, queries.tokens - first)};
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
                           .tile = first_tile + tile,
                           .begin = 0,
                           .end = 0,
                           .part = 0,
                           .parts = 1};
        const Visible visible(view, queries, unit.first_row / view.group,
                              (unit.first_row + unit.rows - 1) / view.group + 1);
        const Cut cut(visible.begin, visible.end, grain, view.most_parts);
        unit.begin = visible.begin;
        unit.parts = cut.parts;
        add_units(view.extend_units + atomicAdd(&counts[1], cut.parts), unit, cut, visible.end);
    }
}

__global__ void __launch_bounds__(kPlanThreads) plan_kernel(const __grid_constant__ PlanView view) {
    __shared__ int counts[3];
    __shared__ float scratch[kPlanThreads / kWarp];
    // The next kernel may read the plan before it waits: it must not start before the end of this.
    wait_for_previous_kernel();
    if (threadIdx.x < 3) counts[threadIdx.x] = 0;
    for (int i = threadIdx.x; i < view.counter_count; i += kPlanThreads) view.counters[i] = 0;

    const int requests = static_cast<int>(view.shape.requests);
    for (int request = threadIdx.x; request < requests; request += kPlanThreads)
        view.common[request] = common_splits(view, request);
    __syncthreads();
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
        int seen = view.kv_lens[request];
        if (view.shape.window)
            seen = min(seen, static_cast<int>(view.shape.window) + queries.tokens);
        if (queries.kind == Kind::kDecode) {
            const Sharing sharing(view, request);
            if (request != sharing.leader) seen -= split_begin(sharing.splits);
            decode_keys += static_cast<float>(seen);
        }
        if (queries.kind == Kind::kExtend) {
            const int tiles = (queries.tokens * view.group + kExtendRows - 1) / kExtendRows;
            extend_keys += static_cast<float>(tiles) * static_cast<float>(seen);
        }
    }
    const float heads = static_cast<float>(view.shape.kv_heads);
    const float decode_grain = block_sum(decode_keys, scratch) * heads / view.slots;
    const float extend_grain = block_sum(extend_keys, scratch) * heads / view.slots;

    for (int request = threadIdx.x; request < requests; request += kPlanThreads)
        add_decode(view, request, &counts[0], decode_grain);
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
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *view.counts = {counts[0], counts[1], counts[2], 0};
    __threadfence();
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
        .page_table = args.page_table,
        .counts = reinterpret_cast<AttentionCounts*>(workspace),
        .decode_units = reinterpret_cast<AttentionUnit*>(workspace + layout.decode_units),
        .extend_units = reinterpret_cast<AttentionUnit*>(workspace + layout.extend_units),
        .prefill_tiles = reinterpret_cast<PrefillTile*>(workspace + layout.prefill_tiles),
        .common = reinterpret_cast<int32_t*>(workspace + layout.common),
        .parts = reinterpret_cast<int32_t*>(workspace + layout.parts),
        .counters = reinterpret_cast<int32_t*>(workspace + layout.counters),
        .counter_count = static_cast<int>(layout.counter_count),
        .most_parts = static_cast<int>(layout.most_parts),
        .group = static_cast<int>(args.shape.group()),
        .shares = args.shape.requests > 1 && args.shape.window == 0 && layout.most_parts > 1 &&
                  args.shape.group() <= kDecodeRows / 2,
        .slots = static_cast<float>(multiprocessors * kBlocksPerMultiprocessor * kUnitsPerBlock),
        .least_prefills = kPrefillShare * static_cast<float>(multiprocessors) /
                          static_cast<float>(args.shape.kv_heads),
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
