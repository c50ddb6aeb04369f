#include "ops/attention.h"

#include <algorithm>
#include <cmath>

#include "cpu/kernels.h"

namespace sglite::ops {

using cpu::AttentionMerge;
using cpu::AttentionUnit;
using cpu::kAttentionSplit;
using cpu::kAttentionUnitRows;

static constexpr const char* kOp = "paged_attention";

// Reading and packing a key costs about as much as meeting this many rows.
static constexpr int64_t kRowsPerKey = 8;
// Less work than this many operations is not worth another thread.
static double least_parallel_cost(bool team_held) { return team_held ? 1e5 : 2e6; }
// Fewer rows would not make up for packing the keys that they meet.
static constexpr int64_t kLeastUnitRows = 24;
// Units for each thread, so that threads end at about the same time.
static constexpr int kUnitsPerThread = 4;

[[noreturn]] static void refuse(const std::string& what) {
    throw std::invalid_argument(std::string(kOp) + ": " + what);
}

static std::string at(const char* name, int64_t index, int64_t value) {
    return std::string(name) + "[" + std::to_string(index) + "] is " + std::to_string(value);
}

static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

struct PagedAttention::QueryBlock {
    int64_t request, first_token, tokens;
    int64_t begin, end;         // positions that some token sees
    int64_t rows;               // per KV head
    int64_t members = 1;        // requests whose tokens these are, all of whose splits they share
    int64_t shared_splits = 0;  // that were in the block of several members before
    int64_t member = 0;         // which of those members this is
    int64_t shared_rows = 0;    // per KV head, of that block

    int64_t first_split() const { return begin / kAttentionSplit; }
    int64_t splits() const {
        return end > begin ? (end + kAttentionSplit - 1) / kAttentionSplit - first_split() : 0;
    }
    // Of one KV head.
    double cost(int64_t head_dim) const {
        const int64_t keys = end > begin ? end - begin : 0;
        return 4.0 * static_cast<double>(keys * (rows + kRowsPerKey) * head_dim);
    }
};

AttentionSizes check_attention(const AttentionInputs& in) {
    Check(kOp, "q", in.q).ndim(3).dtype_in(kFloatTypes).dense_rows();
    const int64_t tokens = in.q.size(0), q_heads = in.q.size(1), head_dim = in.q.size(2);
    Check(kOp, "out", in.out)
        .dtype(in.q.dtype)
        .shape({tokens, q_heads, head_dim})
        .dense_rows()
        .same_device(in.q);
    Check(kOp, "k_cache", in.k_cache)
        .dtype(in.q.dtype)
        .shape({-1, -1, -1, head_dim})
        .dense()
        .same_device(in.q);
    const int64_t pages = in.k_cache.size(0), page_size = in.k_cache.size(1);
    const int64_t kv_heads = in.k_cache.size(2);
    Check(kOp, "v_cache", in.v_cache)
        .dtype(in.q.dtype)
        .shape({pages, page_size, kv_heads, head_dim})
        .dense()
        .same_device(in.q);
    if (kv_heads == 0 || q_heads == 0 || q_heads % kv_heads || head_dim == 0 || page_size == 0) {
        refuse(
            "expected a multiple of the KV heads in q, and at least one KV head, channel and "
            "slot per page; got q " +
            in.q.describe() + " and k_cache " + in.k_cache.describe());
    }
    const Check table(kOp, "page_table", in.page_table);
    table.dtype(DType::kInt32).ndim(2).dense().same_device(in.q);
    const int64_t requests = in.page_table.size(0);
    const auto check_indices = [&](const char* name, const Tensor& tensor, int64_t size) {
        Check(kOp, name, tensor).dtype(DType::kInt32).shape({size}).dense().same_device(in.q);
    };
    check_indices("query_start", in.query_start, requests + 1);
    check_indices("kv_lens", in.kv_lens, requests);
    check_indices("kv_end", in.kv_end, tokens);
    if (in.window && *in.window < 1)
        refuse("window: expected at least 1, got " + std::to_string(*in.window));
    if (in.soft_cap && !(*in.soft_cap > 0))
        refuse("soft_cap: expected more than 0, got " + std::to_string(*in.soft_cap));
    if (in.sinks)
        Check(kOp, "sinks", *in.sinks)
            .dtype(DType::kFloat32)
            .shape({q_heads})
            .dense()
            .same_device(in.q);
    if (!std::isfinite(in.scale))
        refuse("scale: expected a finite number, got " + std::to_string(in.scale));
    return {
        .requests = requests,
        .tokens = tokens,
        .table_width = in.page_table.size(1),
        .page_size = page_size,
        .q_heads = q_heads,
        .kv_heads = kv_heads,
        .head_dim = head_dim,
        .window = in.window,
        .max_query_tokens = tokens,
        .batch_invariant = false,
    };
}

PagedAttention::PagedAttention(const Inputs& in, bool team_held) {
    const AttentionSizes sizes = check_attention(in);
    args_ = {
        .out = {in.out.data, in.out.stride(0), in.out.stride(1)},
        .q = {in.q.data, in.q.stride(0), in.q.stride(1)},
        .k_cache = in.k_cache.data,
        .v_cache = in.v_cache.data,
        .page_table = in.page_table.ptr<const int32_t>(),
        .query_start = in.query_start.ptr<const int32_t>(),
        .kv_lens = in.kv_lens.ptr<const int32_t>(),
        .kv_end = in.kv_end.ptr<const int32_t>(),
        .requests = sizes.requests,
        .tokens = sizes.tokens,
        .table_width = sizes.table_width,
        .pages = in.k_cache.size(0),
        .page_size = sizes.page_size,
        .q_heads = sizes.q_heads,
        .kv_heads = sizes.kv_heads,
        .head_dim = sizes.head_dim,
        .window = in.window.value_or(0),
        .scale = in.scale,
        .soft_cap = in.soft_cap.value_or(0),
        .sinks = in.sinks ? in.sinks->ptr<const float>() : nullptr,
        .dtype = in.q.dtype,
    };
    cpu::require_cpu(kOp, in.q);
    check_requests();

    for_each_query_block([&](const QueryBlock& block) {
        cost_ += block.cost(args_.head_dim) * static_cast<double>(args_.kv_heads);
    });
    args_.threads = cost_ < least_parallel_cost(team_held) ? 1 : cpu::num_threads();
    unit_cost_ = cost_;
    if (args_.threads > 1) {
        const int64_t wanted = args_.threads * kUnitsPerThread;
        unit_cost_ = cost_ / static_cast<double>(wanted);
        unit_rows_ =
            std::clamp(args_.tokens * args_.q_heads / wanted, kLeastUnitRows, kAttentionUnitRows);
    }
    int64_t most_rows = 0;
    record_count_ = cut(
        [&](const AttentionUnit& unit) {
            ++args_.unit_count;
            most_rows = std::max(most_rows, unit.tokens * args_.group() * unit.heads);
        },
        [&](const AttentionMerge&) { ++args_.merge_count; });
    args_.threads = static_cast<int>(std::min<int64_t>(args_.threads, args_.unit_count));
    args_.scratch_size = cpu::attention_scratch(args_.head_dim, most_rows);
    workspace_size_ = aligned(args_.unit_count * sizeof(AttentionUnit)) +
                      aligned(args_.merge_count * sizeof(AttentionMerge)) +
                      (record_count_ * cpu::attention_record(args_.head_dim) +
                       args_.threads * args_.scratch_size) *
                          static_cast<int64_t>(sizeof(float));
}

// Everything that the kernel will index with.
void PagedAttention::check_requests() const {
    const int32_t* starts = args_.query_start;
    for (int64_t b = 0; b <= args_.requests; ++b) {
        const int64_t least = b ? starts[b - 1] : 0;
        const int64_t most = b ? args_.tokens : 0;
        if (starts[b] < least || starts[b] > most ||
            (b == args_.requests && starts[b] != args_.tokens)) {
            refuse(at("query_start", b, starts[b]) + ", but it must rise from 0 to the " +
                   std::to_string(args_.tokens) + " rows of q");
        }
    }
    for (int64_t b = 0; b < args_.requests; ++b) {
        const int64_t length = args_.kv_lens[b], room = args_.table_width * args_.page_size;
        const int64_t count = starts[b + 1] - starts[b];
        // Length 0 marks padding: its tokens see nothing.
        if ((length != 0 && length < count) || length > room) {
            refuse(at("kv_lens", b, length) + ", but request " + std::to_string(b) + " has " +
                   std::to_string(count) + " tokens here and room for " + std::to_string(room) +
                   " in its row of page_table");
        }
        if (count == 0) continue;
        int64_t end = 0;
        for (int64_t token = starts[b]; token < starts[b + 1]; ++token) {
            if (args_.kv_end[token] < 0 || args_.kv_end[token] > length) {
                refuse(at("kv_end", token, args_.kv_end[token]) + ", but request " +
                       std::to_string(b) + " has " + std::to_string(length) + " positions");
            }
            if (args_.kv_end[token] > end) end = args_.kv_end[token];
        }
        // Pages before the window may have been given away.
        const int64_t begin = args_.first_visible(length - count);
        const int32_t* table = args_.page_table + b * args_.table_width;
        for (int64_t i = begin / args_.page_size; i * args_.page_size < end; ++i) {
            if (table[i] < 0 || table[i] >= args_.pages) {
                refuse(at(("page_table[" + std::to_string(b) + "]").c_str(), i, table[i]) +
                       ", but the cache has " + std::to_string(args_.pages) + " pages");
            }
        }
    }
}

// Request b and those behind it, as far as each has one token, and its pages begin with the same
// whole splits as those of the one before it.
PagedAttention::Sharing PagedAttention::find_sharing(int64_t b) const {
    Sharing sharing;
    if (args_.window) return sharing;
    const auto decodes = [&](int64_t request) {
        return args_.query_start[request + 1] - args_.query_start[request] == 1;
    };
    // Whole splits that a request's token sees, with more behind them.
    const auto seen_splits = [&](int64_t request) {
        return (args_.kv_end[args_.query_start[request]] - 1) / kAttentionSplit;
    };
    if (!decodes(b)) return sharing;
    const int64_t most = std::max<int64_t>(kAttentionUnitRows / args_.group(), 1);
    int64_t splits = seen_splits(b);
    for (int64_t next = b + 1; next < args_.requests && sharing.members < most; ++next) {
        if (!decodes(next)) break;
        splits = std::min<int64_t>(splits, seen_splits(next));
        const int32_t* table = args_.page_table + next * args_.table_width;
        const int64_t pages = (splits * kAttentionSplit + args_.page_size - 1) / args_.page_size;
        const int64_t same =
            std::mismatch(table, table + pages, table - args_.table_width).first - table;
        const int64_t common = std::min<int64_t>(splits, same * args_.page_size / kAttentionSplit);
        // A request that shares less begins a group of its own.
        if (common <= 0 || (sharing.members > 1 && common < sharing.splits)) break;
        splits = sharing.splits = common;
        ++sharing.members;
    }
    return sharing;
}

// Late tokens first: under a causal mask they cost most, and work that starts last should be small.
template <typename Body>
void PagedAttention::for_each_query_block(const Body& body) const {
    const int64_t group = args_.group();
    const int64_t most = group < unit_rows_ ? unit_rows_ / group : 1;
    for (int64_t b = 0; b < args_.requests; ++b) {
        const int64_t start = args_.query_start[b], stop = args_.query_start[b + 1];
        if (const Sharing sharing = find_sharing(b); sharing.members > 1) {
            const int64_t end = sharing.splits * kAttentionSplit, rows = sharing.members * group;
            body(QueryBlock{.request = b,
                            .first_token = start,
                            .tokens = sharing.members,
                            .begin = 0,
                            .end = end,
                            .rows = rows,
                            .members = sharing.members});
            for (int64_t member = 0; member < sharing.members; ++member) {
                body(QueryBlock{.request = b + member,
                                .first_token = start + member,
                                .tokens = 1,
                                .begin = end,
                                .end = args_.kv_end[start + member],
                                .rows = group,
                                .shared_splits = sharing.splits,
                                .member = member,
                                .shared_rows = rows});
            }
            b += sharing.members - 1;
            continue;
        }
        for (int64_t last = stop; last > start;) {
            const int64_t first = last - start > most ? last - most : start;
            QueryBlock block{.request = b,
                             .first_token = first,
                             .tokens = last - first,
                             .begin = args_.first_visible(args_.kv_lens[b] - (stop - first)),
                             .end = 0,
                             .rows = (last - first) * group};
            for (int64_t token = first; token < last; ++token)
                if (args_.kv_end[token] > block.end) block.end = args_.kv_end[token];
            body(block);
            last = first;
        }
    }
}

// A unit takes as many heads and splits as fit its number of rows and its share of the work:
// reading neighbouring heads together is kind to memory, and splits that stay together need no
// merging.
template <typename OnUnit, typename OnMerge>
int64_t PagedAttention::cut(const OnUnit& on_unit, const OnMerge& on_merge) const {
    int64_t records = 0, shared = 0;
    for_each_query_block([&](const QueryBlock& block) {
        const int64_t splits = block.splits();
        int64_t heads = std::clamp<int64_t>(kAttentionUnitRows / block.rows, 1, args_.kv_heads);
        int64_t splits_taken = std::max<int64_t>(splits, 1);
        const double pieces = block.cost(args_.head_dim) * static_cast<double>(heads) / unit_cost_;
        if (pieces > 1) {
            splits_taken = std::max<int64_t>(static_cast<int64_t>(splits_taken / pieces), 1);
            // Where a single split is too much, fewer heads.
            const double too_much = pieces * static_cast<double>(splits_taken) / splits;
            if (too_much > 1) heads = std::max<int64_t>(static_cast<int64_t>(heads / too_much), 1);
        }
        const bool merged = splits_taken < splits || block.members > 1 || block.shared_splits;
        if (block.members > 1) shared = records;
        int64_t split = 0;
        do {
            for (int64_t head = 0; head < args_.kv_heads; head += heads) {
                on_unit(AttentionUnit{
                    .partials =
                        merged ? records + (split * args_.kv_heads + head) * block.rows : -1,
                    .request = static_cast<int32_t>(block.request),
                    .first_token = static_cast<int32_t>(block.first_token),
                    .tokens = static_cast<int32_t>(block.tokens),
                    .first_head = static_cast<int32_t>(head),
                    .heads = static_cast<int32_t>(std::min(heads, args_.kv_heads - head)),
                    .first_split = static_cast<int32_t>(block.first_split() + split),
                    .splits = static_cast<int32_t>(std::min(splits_taken, splits - split)),
                });
            }
            split += splits_taken;
        } while (split < splits);  // rows that see nothing are written by a unit without splits
        if (merged && block.members == 1) {
            on_merge(AttentionMerge{
                .partials = records,
                .first_token = static_cast<int32_t>(block.first_token),
                .tokens = static_cast<int32_t>(block.tokens),
                .splits = static_cast<int32_t>(splits),
                .shared = shared,
                .shared_splits = static_cast<int32_t>(block.shared_splits),
                .shared_rows = static_cast<int32_t>(block.shared_rows),
                .shared_row = static_cast<int32_t>(block.member * block.rows),
            });
        }
        if (merged) records += splits * block.rows * args_.kv_heads;
    });
    return records;
}

void PagedAttention::run(const Tensor& workspace) {
    const Check check(kOp, "workspace", workspace);
    check.dtype(DType::kUInt8).ndim(1).dense();
    if (workspace.size(0) < workspace_size_ || reinterpret_cast<uintptr_t>(workspace.data) % 64)
        check.fail(std::to_string(workspace_size_) + " bytes, aligned to 64");
    char* next = workspace.ptr<char>();
    auto* units = reinterpret_cast<AttentionUnit*>(next);
    next += aligned(args_.unit_count * sizeof(AttentionUnit));
    auto* merges = reinterpret_cast<AttentionMerge*>(next);
    next += aligned(args_.merge_count * sizeof(AttentionMerge));
    args_.units = units;
    args_.merges = merges;
    args_.records = reinterpret_cast<float*>(next);
    args_.scratch = args_.records + record_count_ * cpu::attention_record(args_.head_dim);
    cut([&](const AttentionUnit& unit) { *units++ = unit; },
        [&](const AttentionMerge& merge) { *merges++ = merge; });
    if (args_.unit_count) cpu::kernels().paged_attention(args_);
}

}  // namespace sglite::ops
