// Cuts the attention of a batch into units of work, on the device: a captured graph is right for
// whatever lengths its batch has later.
#include "cuda/attention_plan_decode.cuh"

namespace sglite::cuda {

namespace {

constexpr int kPlanThreads = 512;
// An extend's units should be small beside a block's share of them, of which so many make one.
constexpr int kUnitsPerBlock = 8;
constexpr int kBlocksPerMultiprocessor = 2;
// Prefills do not split keys: they are for batches that give this share of a machine's processors
// a block.
constexpr float kPrefillShare = 0.5f;

// How positions begin, ..., end - 1 become units of an extend: the first one may have any number of
// splits, the others have one.
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

// What an operation makes of the threads' values: of those before this thread, with its own, of
// all.
struct Scan {
    int before, with, all;

    template <typename Operation>
    __device__ Scan(int value, int identity, const Operation& combine, int* scratch)
        : before(identity), with(value), all(identity) {
        const int lane = static_cast<int>(threadIdx.x) % kWarp;
        const int warp = static_cast<int>(threadIdx.x) / kWarp;
        for (int step = 1; step < kWarp; step *= 2) {
            const int other = shuffle(with, max(lane - step, 0));
            if (lane >= step) with = combine(other, with);
        }
        const int left = shuffle(with, max(lane - 1, 0));
        __syncthreads();  // scratch has been read
        if (lane == kWarp - 1) scratch[warp] = with;
        __syncthreads();
        for (int i = 0; i < kPlanThreads / kWarp; ++i) {
            if (i == warp) before = all;
            all = combine(all, scratch[i]);
        }
        with = combine(before, with);
        if (lane) before = combine(before, left);
    }
};

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
    __shared__ int sums[kPlanThreads / kWarp];
    __shared__ GroupRange groups[kMostGroups];
    // The next kernel may read the plan before it waits: it must not start before the end of this.
    wait_for_previous_kernel();
    if (threadIdx.x < 3) counts[threadIdx.x] = 0;
    for (int i = threadIdx.x; i < view.counter_count; i += kPlanThreads) view.counters[i] = 0;
    for (int i = threadIdx.x; i < view.groups; i += kPlanThreads) groups[i] = {INT_MAX, 0};

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

    const auto add = [](int a, int b) { return a + b; };
    const auto most = [](int a, int b) { return max(a, b); };
    float extend_keys = 0.0f;
    int all_keys = 0, start = 0;
    for (int first = 0; first < requests; first += kPlanThreads) {
        const int request = first + static_cast<int>(threadIdx.x);
        const bool is_one = request < requests;
        const Scan starts(is_one && view.common[request] == 0 ? request : 0, start, most, sums);
        start = starts.all;
        SharedPrefix prefix{};
        int keys = 0;
        if (is_one) {
            prefix = shared_prefix(view, request, starts.with);
            keys = DecodeRequest(view, request, prefix).keys();
            const Queries queries(view, request, prefills);
            if (queries.kind == Kind::kExtend) {
                int seen = view.kv_lens[request];
                if (view.shape.window)
                    seen = min(seen, static_cast<int>(view.shape.window) + queries.tokens);
                const int tiles = (queries.tokens * view.group + kExtendRows - 1) / kExtendRows;
                extend_keys += static_cast<float>(tiles) * static_cast<float>(seen);
            }
        }
        const Scan places(keys, 0, add, sums);
        prefix.place = all_keys + places.before;
        all_keys += places.all;
        if (is_one) view.prefixes[request] = prefix;
    }
    const float heads = static_cast<float>(view.shape.kv_heads);
    const float extend_grain = block_sum(extend_keys, scratch) * heads / view.slots;

    const float groups_per_key =
        static_cast<float>(view.groups) / static_cast<float>(max(all_keys, 1));
    const DecodeCut cut{view, groups_per_key};
    for (int first = 0, index = 0; first < requests; first += kPlanThreads) {
        // Threads beyond the last request do as it does, and write nothing.
        const int request = min(first + static_cast<int>(threadIdx.x), requests - 1);
        const bool is_one = first + static_cast<int>(threadIdx.x) < requests;
        const DecodeRequest decode(view, request, view.prefixes[request]);
        const UnitCount count(cut, decode);
        const Scan places(is_one ? count.units : 0, 0, add, sums);
        if (is_one) add_decode(cut, decode, count, index + places.before, groups);
        index += places.all;
        if (threadIdx.x == 0) counts[0] = index;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < view.groups; i += kPlanThreads) {
        const GroupRange range = groups[i];
        UnitGroup group{.unit = {}, .first = range.first, .count = range.count, .unused = {}};
        if (range.count) group.unit = view.decode_units[range.first];
        view.unit_groups[i] = group;
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
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *view.counts = {counts[0], counts[1], counts[2], 0, all_keys};
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
        .unit_groups = reinterpret_cast<UnitGroup*>(workspace + layout.unit_groups),
        .extend_units = reinterpret_cast<AttentionUnit*>(workspace + layout.extend_units),
        .prefill_tiles = reinterpret_cast<PrefillTile*>(workspace + layout.prefill_tiles),
        .common = reinterpret_cast<int32_t*>(workspace + layout.common),
        .prefixes = reinterpret_cast<SharedPrefix*>(workspace + layout.prefixes),
        .parts = reinterpret_cast<int32_t*>(workspace + layout.parts),
        .counters = reinterpret_cast<int32_t*>(workspace + layout.counters),
        .counter_count = static_cast<int>(layout.counter_count),
        .most_parts = static_cast<int>(layout.most_parts),
        .group = static_cast<int>(args.shape.group()),
        .shares = args.shape.requests > 1 && args.shape.window == 0 && layout.most_parts > 1 &&
                  args.shape.group() <= kDecodeRows / 2,
        .groups = decode_groups(args.shape, stream.device),
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
