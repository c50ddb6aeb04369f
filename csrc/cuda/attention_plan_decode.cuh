// The units of requests with few rows: equal shares of all their keys for groups of blocks, and
// splits that neighbouring requests have in common once for all of them.
#pragma once

#include <climits>

#include "cuda/attention_plan.cuh"

namespace sglite::cuda {

// How many whole splits a request's pages have in common with those of the one before; both must
// have one token, which sees more than these.
__device__ inline int common_splits(const PlanView& view, int request) {
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

// Which neighbouring requests, as many as fit a unit, share which splits. `start` is the first of
// the run of requests around `request` that share anything.
__device__ inline SharedPrefix shared_prefix(const PlanView& view, int request, int start) {
    const SharedPrefix alone{.leader = request, .members = 1, .splits = 0, .place = 0};
    if (!view.shares) return alone;
    const int requests = static_cast<int>(view.shape.requests);
    const int most = kDecodeRows / view.group;
    const int leader = start + (request - start) / most * most;
    int end = leader + 1, common = INT_MAX;
    while (end < min(leader + most, requests) && view.common[end])
        common = min(common, view.common[end++]);
    if (end - leader < 2) return alone;
    // Each split that follows the shared ones becomes a part.
    for (int member = leader; member < end; ++member) {
        const int seen = view.kv_end[view.query_start[member]];
        if (split_of(seen - 1) + 1 - common >= view.most_parts) return alone;
    }
    return {.leader = leader, .members = end - leader, .splits = common, .place = 0};
}

// Keys begin, ..., end - 1 of some rows, which start at `place` among all that decode has.
struct Stretch {
    int begin, end, place;
    int first, last;  // splits
    int together;     // the split up to which the first unit goes at least
    bool starts;      // whether these are the rows' first splits

    __device__ Stretch(int begin, int end, int place, bool starts, int most_parts)
        : begin(begin),
          end(end),
          place(place),
          first(split_of(begin)),
          last(split_of(max(end, begin + 1) - 1)),
          together(starts ? max(first, last + 1 - most_parts) : first),
          starts(starts) {}

    __device__ int group_of(int split, float groups_per_key, int groups) const {
        const int from = max(begin, split_begin(split)), to = min(end, split_begin(split + 1));
        const float middle = static_cast<float>(place + (from - begin) + (to - from) / 2);
        return min(groups - 1, static_cast<int>(middle * groups_per_key));
    }

    // Calls `body` with each unit's group, first split and last split, in order.
    template <typename Body>
    __device__ void visit_units(float groups_per_key, int groups, const Body& body) const {
        int group = group_of(first, groups_per_key, groups), unit_first = first;
        for (int split = together + 1; split <= last; ++split) {
            const int next = group_of(split, groups_per_key, groups);
            if (next == group) continue;
            body(group, unit_first, split - 1);
            group = next;
            unit_first = split;
        }
        body(group, unit_first, last);
    }
    // Parts that a unit becomes.
    __device__ int parts_of(int unit_first, int unit_last) const {
        return starts && unit_first == first ? 1 : unit_last - unit_first + 1;
    }
};

// How decode's units are cut.
struct DecodeCut {
    const PlanView& view;
    float groups_per_key;

    template <typename Body>
    __device__ void visit_units(const Stretch& stretch, const Body& body) const {
        stretch.visit_units(groups_per_key, view.groups, body);
    }
};

// A request's part in decode's units.
struct DecodeRequest {
    const PlanView& view;
    int request;
    Queries queries;
    Visible visible;
    SharedPrefix prefix;

    __device__ DecodeRequest(const PlanView& view, int request, const SharedPrefix& prefix)
        : view(view),
          request(request),
          queries(view, request),
          visible(view, queries, queries.first_token, queries.first_token + queries.tokens),
          prefix(prefix) {}

    __device__ bool leads() const { return prefix.splits && request == prefix.leader; }
    // At least as many as a tile, which costs as much.
    __device__ int keys() const {
        if (queries.kind != Kind::kDecode) return 0;
        const int others = prefix.splits && !leads() ? split_begin(prefix.splits) : visible.begin;
        return max(visible.end - others, kAttentionTile);
    }
    __device__ Stretch shared() const {
        int rest = 0;
        for (int member = prefix.leader; member < prefix.leader + prefix.members; ++member) {
            const int seen = view.kv_end[view.query_start[member]];
            rest = max(rest, split_of(seen - 1) + 1 - prefix.splits);
        }
        return {0, split_begin(prefix.splits), view.prefixes[prefix.leader].place, true,
                view.most_parts - rest};
    }
    __device__ Stretch own() const {
        if (prefix.splits == 0)
            return {visible.begin, visible.end, prefix.place, true, view.most_parts};
        const int begin = split_begin(prefix.splits);
        return {begin, visible.end, prefix.place + (leads() ? begin : 0), false, view.most_parts};
    }
};

struct GroupRange {
    int first, count;  // units
};

struct UnitCount {
    int units = 0, shared_parts = 0, own_parts = 0;

    __device__ UnitCount(const DecodeCut& cut, const DecodeRequest& request) {
        if (request.queries.kind != Kind::kDecode) return;
        if (request.prefix.splits) {
            const Stretch shared = request.shared();
            cut.visit_units(shared, [&](int, int first, int last) {
                units += request.leads() ? 1 : 0;
                shared_parts += shared.parts_of(first, last);
            });
        }
        const Stretch own = request.own();
        cut.visit_units(own, [&](int, int first, int last) {
            ++units;
            own_parts += own.parts_of(first, last);
        });
    }
};

// Writes a request's units from place `index` on, and enters them in their groups.
__device__ inline void add_decode(const DecodeCut& cut, const DecodeRequest& request,
                                  const UnitCount& count, int index, GroupRange* groups) {
    if (count.units == 0) return;
    const PlanView& view = cut.view;
    const int rows = request.queries.tokens * view.group;
    AttentionUnit unit{
        .request = request.request,
        .first_row = request.queries.first_token * view.group,
        .rows = rows,
        .tile = request.request,
        .begin = 0,
        .end = 0,
        .part = 0,
        .parts = count.shared_parts + count.own_parts,
    };
    const auto add = [&](const Stretch& stretch) {
        cut.visit_units(stretch, [&](int group, int first, int last) {
            unit.begin = max(stretch.begin, split_begin(first));
            unit.end = min(stretch.end, split_begin(last + 1));
            view.decode_units[index] = unit;
            unit.part += stretch.parts_of(first, last);
            atomicAdd(&groups[group].count, 1);
            atomicMin(&groups[group].first, index);
            ++index;
        });
    };
    if (request.prefix.splits) view.parts[request.request] = unit.parts;
    if (request.leads()) {
        AttentionUnit alone = unit;
        unit.rows *= request.prefix.members;
        unit.parts = -request.prefix.members;
        add(request.shared());
        unit = alone;
    }
    unit.part = count.shared_parts;
    add(request.own());
}

}  // namespace sglite::cuda
