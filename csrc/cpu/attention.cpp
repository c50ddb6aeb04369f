// Paged attention: softmax(q k^T * scale) v over each row's visible positions, online (Milakov and
// Gimelshein, 2018; Dao et al., 2022), split over keys and merged in order (FlashDecoding, 2023).
// Scores are kept as exponents of 2.
#include "cpu/attention.h"

#include <cmath>
#include <optional>

#include "cpu/attention_tile.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#if defined(__AMX_BF16__)
#include "cpu/amx/attention_tiles.h"
#endif

namespace sglite::cpu::SGLITE_CPU_PATH {

constexpr double kLog2E = 1.44269504088896340736;

// total = total (+) part, where both are records whose weights are relative to their own maxima.
static void merge_record(float* total, const float* part, int64_t channels) {
    const float before = total[channels], other = part[channels];
    if (before == -INFINITY) {  // nothing yet
        std::memcpy(total, part, (channels + 2) * sizeof(float));
        return;
    }
    const float after = other > before ? other : before;
    float factors[Vec::kSize] = {before - after, other - after};
    store(factors, exp2_nonpositive(load(factors)));
    const Vec keep = splat(factors[0]), add = splat(factors[1]);
    for (int64_t i = 0; i < channels; i += Vec::kSize)
        store(total + i, fma(load(part + i), add, load(total + i) * keep));
    total[channels] = after;
    total[channels + 1] = total[channels + 1] * factors[0] + part[channels + 1] * factors[1];
}

static void clear_record(float* record, int64_t channels) {
    for (int64_t i = 0; i < channels; i += Vec::kSize) store(record + i, splat(0.0f));
    record[channels] = -INFINITY;
    record[channels + 1] = 0.0f;
}

// Divides by the sum of weights, to which a sink adds its own; a row that sees nothing gets zeros.
template <typename T>
static void write_output(T* out, const float* record, int64_t channels, int64_t head_dim,
                         const float* sink) {
    float sum = record[channels + 1];
    if (sink && sum != 0.0f)
        sum += std::exp2(*sink * static_cast<float>(kLog2E) - record[channels]);
    const Vec inverse = splat(sum == 0.0f ? 0.0f : 1.0f / sum);
    int64_t i = 0;
    for (; i + Vec::kSize <= head_dim; i += Vec::kSize) store(out + i, load(record + i) * inverse);
    if (i < head_dim)
        store_partial(out + i, load(record + i) * inverse, static_cast<int>(head_dim - i));
}

// Rows of one unit are ordered by KV head, token, query head of the group.
template <typename T>
class UnitRunner {
  public:
    UnitRunner(const AttentionArgs& args, const AttentionUnit& unit, float* scratch)
        : args_(args),
          unit_(unit),
          group_(args.group()),
          head_rows_(unit.tokens * group_),
          channels_(attention_channels(args.head_dim)),
          record_(attention_record(args.head_dim)),
          k_cache_(static_cast<const char*>(args.k_cache)),
          v_cache_(static_cast<const char*>(args.v_cache)),
          table_(args.page_table + unit.request * args.table_width),
          first_position_(args.kv_lens[unit.request] - args.query_start[unit.request + 1] +
                          unit.first_token) {
        const int64_t rows = head_rows_ * unit.heads;
        queries_ = scratch;
        totals_ = queries_ + rows * channels_;
        parts_ = totals_ + rows * record_;
        weight_sums_ = parts_ + rows * record_;
        maxima_ = weight_sums_ + rows * 16;
        block_.keys = maxima_ + attention_maxima(rows);
        block_.values = block_.keys + kAttentionBlock * channels_;
        block_.value_pairs =
            reinterpret_cast<uint32_t*>(block_.values + kAttentionBlock * channels_);
        block_.head_dim = args.head_dim;
        block_.words = words_of<T>(args.head_dim);
        block_.channels = channels_;
        block_.scale =
            static_cast<float>(args.soft_cap ? args.scale / args.soft_cap : args.scale * kLog2E);
        block_.cap = static_cast<float>(args.soft_cap * kLog2E);
        some_begin_ = first_visible(0);
        all_begin_ = first_visible(unit.tokens - 1);
        some_end_ = all_end_ = end_visible(0);
        for (int64_t token = 1; token < unit.tokens; ++token) {
            const int64_t end = end_visible(token);
            if (end > some_end_) some_end_ = end;
            if (end < all_end_) all_end_ = end;
        }
        const int64_t first = unit.first_split * kAttentionSplit;
        const int64_t last = first + unit.splits * kAttentionSplit;
        begin_ = some_begin_ > first ? some_begin_ : first;
        end_ = some_end_ < last ? some_end_ : last;
    }

    // Begins to fetch the first block of keys and values, while another unit is at work.
    void begin_fetching() {
        first_ = begin_ / kAttentionBlock * kAttentionBlock;
        prefetch(first_, offsets_[0]);
        is_fetching_ = true;
    }

    // Block after block, all heads of one before the next, so that memory is read in its order.
    // following: the unit that this thread runs next, or null.
    void run(UnitRunner* following) {
        if (!is_fetching_) begin_fetching();
        pack_queries();
        const bool whole = unit_.partials < 0;
        if (whole) clear(totals_);
        clear_parts();
        block_.next.finish();
        for (int turn = 0; first_ < end_; turn ^= 1) {
            const int64_t next = first_ + kAttentionBlock;
            if (next < end_) {
                prefetch(next, offsets_[turn ^ 1]);
            } else if (following) {
                following->begin_fetching();
                block_.next = following->block_.next;
            }
            block_.offsets = offsets_[turn];
            for (int64_t head = 0; head < unit_.heads; ++head)
                attend_block(head, first_, begin_ > first_ ? static_cast<int>(begin_ - first_) : 0,
                             end_ < next ? static_cast<int>(end_ - first_) : kAttentionBlock);
            if (next % kAttentionSplit == 0 || next >= end_) {
                finish_parts();
                whole ? merge_parts() : keep_parts(first_ / kAttentionSplit);
                clear_parts();
            }
            first_ = next;
        }
        if (following && following->is_fetching_) following->block_.next = block_.next;
        if (whole) write_rows();
    }

  private:
    void pack_queries() {
        const T* q = static_cast<const T*>(args_.q.data);
        float* to = queries_;
        for (int64_t head = unit_.first_head; head < unit_.first_head + unit_.heads; ++head) {
            for (int64_t token = 0; token < unit_.tokens; ++token) {
                const T* from = q + (unit_.first_token + token) * args_.q.token_stride +
                                head * group_ * args_.q.head_stride;
                for (int64_t i = 0; i < group_; ++i, to += channels_)
                    pack_query(to, from + i * args_.q.head_stride, args_.head_dim);
            }
        }
    }

    int64_t first_visible(int64_t token) const {
        return args_.first_visible(first_position_ + token);
    }
    int64_t end_visible(int64_t token) const { return args_.kv_end[unit_.first_token + token]; }

    int64_t rows() const { return head_rows_ * unit_.heads; }

    void clear(float* records) {
        for (int64_t row = 0; row < rows(); ++row) clear_record(records + row * record_, channels_);
    }

    void clear_parts() {
        clear(parts_);
        for (int64_t row = 0; row < rows(); ++row) store(weight_sums_ + row * 16, splat(0.0f));
        for (int64_t row = 0; row < rows(); row += Vec::kSize)
            store(maxima_ + row, splat(-INFINITY));
    }

    void finish_parts() {
        for (int64_t row = 0; row < rows(); ++row) {
            parts_[row * record_ + channels_] = maxima_[row];
            parts_[row * record_ + channels_ + 1] = reduce_sum(load(weight_sums_ + row * 16));
        }
    }

    void merge_parts() {
        for (int64_t row = 0; row < rows(); ++row) {
            const float* part = parts_ + row * record_;
            if (part[channels_ + 1] != 0.0f) merge_record(totals_ + row * record_, part, channels_);
        }
    }

    void keep_parts(int64_t split) {
        const int64_t record =
            unit_.partials + (split - unit_.first_split) * args_.kv_heads * head_rows_;
        std::memcpy(args_.records + record * record_, parts_, rows() * record_ * sizeof(float));
    }

    // Where the keys of a block lie, those outside the unit's range standing for one inside it.
    void find_keys(int64_t first, int64_t* offsets) const {
        const int64_t row_bytes = args_.kv_heads * args_.head_dim * sizeof(T);
        const int64_t from = begin_ > first ? begin_ - first : 0;
        const int64_t to = end_ - first < kAttentionBlock ? end_ - first : kAttentionBlock;
        int64_t page = (first + from) / args_.page_size, slot = (first + from) % args_.page_size;
        for (int64_t key = from; key < to; ++key) {
            offsets[key] = (table_[page] * args_.page_size + slot) * row_bytes;
            if (++slot == args_.page_size) {
                slot = 0;
                ++page;
            }
        }
        for (int64_t key = 0; key < from; ++key) offsets[key] = offsets[from];
        for (int64_t key = to; key < kAttentionBlock; ++key) offsets[key] = offsets[from];
    }

    // Bytes from the start of a cache's slot to a head of the unit.
    int64_t head_offset(int64_t head) const {
        return (unit_.first_head + head) * args_.head_dim * static_cast<int64_t>(sizeof(T));
    }

    // Finds the keys of a block, if it is one of the unit's, and has them fetched by and by.
    void prefetch(int64_t first, int64_t* offsets) {
        if (first >= end_) return;
        find_keys(first, offsets);
        const int64_t left = end_ - first;
        const int64_t rows = left < kAttentionBlock ? left : kAttentionBlock;
        const int64_t bytes = head_offset(unit_.heads) - head_offset(0);
        block_.next.start(k_cache_ + head_offset(0), v_cache_ + head_offset(0), offsets, rows,
                          bytes);
    }

    // Keys first + [begin, end) are those that some token of the unit may see.
    void attend_block(int64_t head, int64_t first, int begin, int end) {
        block_.key_rows = k_cache_ + head_offset(head);
        block_.value_rows = v_cache_ + head_offset(head);
#if defined(__AVX2__) && !defined(__AVX512F__)
        if constexpr (std::is_same_v<T, BFloat16>) {
            if (head_rows_ <= kTileRows && args_.head_dim % (2 * Vec::kSize) == 0) {
                return attend_tokens<PairedBlock>(head * head_rows_, first);
            }
        }
#endif
        block_.has_pairs = false;
        if (head_rows_ <= kTileRows && args_.head_dim % Vec::kSize == 0) {
            pack_keys<T, true>(block_, begin, end);
            attend_tokens<CachedBlock<T>>(head * head_rows_, first);
        } else {
            pack_keys<T, false>(block_, begin, end);
            if (!kPairs<T> || !all_see_whole(first)) copy_values<T>(block_, begin, end);
            attend_tokens<CopiedBlock>(head * head_rows_, first);
        }
    }

    // Whether every token of the unit sees the whole block of keys from `first` on.
    bool all_see_whole(int64_t first) const {
        return all_begin_ <= first && first + kAttentionBlock <= all_end_;
    }

    // Neighbouring tokens that see the same keys of the block are taken together. Keys that a token
    // does not see are not touched for it, so that what they hold cannot matter.
    template <typename Reading>
    void attend_tokens(int64_t first_row, int64_t first) {
        if (all_see_whole(first)) return attend<Reading>(first_row, head_rows_, 0, kAttentionBlock);
        int64_t token = 0;
        while (token < unit_.tokens) {
            int begin, end, next_begin, next_end;
            visible_in_block(token, first, begin, end);
            int64_t next = token + 1;
            for (; next < unit_.tokens; ++next) {
                visible_in_block(next, first, next_begin, next_end);
                if (next_begin != begin || next_end != end) break;
            }
            if (begin < end)
                attend<Reading>(first_row + token * group_, (next - token) * group_, begin, end);
            token = next;
        }
    }

    template <typename Reading>
    void attend(int64_t row, int64_t count, int begin, int end) {
        const Rows rows{queries_ + row * channels_,
                        parts_ + row * record_,
                        weight_sums_ + row * 16,
                        maxima_ + row,
                        channels_,
                        record_};
        // Which keys a row sees decides, never what else is in the unit.
        if constexpr (kPairs<T>) {
            if (begin == 0 && end == kAttentionBlock) return attend_whole<Reading>(rows, count);
        }
        attend_rows<T, Reading>(block_, rows, count, begin, end);
    }

    // Rows that see every key of the block, in words of two keys.
    template <typename Reading>
    void attend_whole([[maybe_unused]] const Rows& rows, [[maybe_unused]] int64_t count) {
#if defined(__AMX_BF16__)
        tiles_.attend(block_, rows, count);
#elif defined(__AVX512BF16__)
        if constexpr (std::is_same_v<Reading, CopiedBlock>) {
            pack_value_pairs(block_);
            attend_rows<T, CopiedPairs>(block_, rows, count, 0, kAttentionBlock);
        } else {
            attend_rows<T, CachedPairs>(block_, rows, count, 0, kAttentionBlock);
        }
#endif
    }

    void visible_in_block(int64_t token, int64_t first, int& begin, int& end) const {
        const int64_t from = first_visible(token) - first, to = end_visible(token) - first;
        begin = static_cast<int>(from < 0 ? 0 : from > kAttentionBlock ? kAttentionBlock : from);
        end = static_cast<int>(to < 0 ? 0 : to > kAttentionBlock ? kAttentionBlock : to);
    }

    void write_rows() {
        T* out = static_cast<T*>(args_.out.data);
        const float* record = totals_;
        for (int64_t head = unit_.first_head; head < unit_.first_head + unit_.heads; ++head) {
            for (int64_t token = 0; token < unit_.tokens; ++token) {
                T* to = out + (unit_.first_token + token) * args_.out.token_stride +
                        head * group_ * args_.out.head_stride;
                for (int64_t i = 0; i < group_; ++i, record += record_)
                    write_output(to + i * args_.out.head_stride, record, channels_, args_.head_dim,
                                 args_.sink(head * group_ + i));
            }
        }
    }

    const AttentionArgs& args_;
    const AttentionUnit& unit_;
    const int64_t group_, head_rows_, channels_, record_;
    const char *const k_cache_, *const v_cache_;
    const int32_t* table_;
    const int64_t first_position_;
    // The positions that some token, and that every token, of the unit sees.
    int64_t some_begin_, some_end_, all_begin_, all_end_;
    int64_t begin_, end_;  // the unit's keys: what some token sees of its splits
    int64_t first_ = 0;    // of the block at work
    bool is_fetching_ = false;
    int64_t offsets_[2][kAttentionBlock];  // of the keys of this block and the next
    float *queries_, *totals_, *parts_, *weight_sums_, *maxima_;
    Block block_;
#if defined(__AMX_BF16__)
    AttentionTiles tiles_;
#endif
};

// Merges the records of one KV head and writes its rows; `total` has room for one record.
template <typename T>
static void merge_splits(const AttentionArgs& args, const AttentionMerge& merge, int64_t head,
                         float* total) {
    const int64_t channels = attention_channels(args.head_dim);
    const int64_t record = attention_record(args.head_dim), group = args.group();
    const int64_t rows = merge.tokens * group;
    const auto add = [&](int64_t index) {
        const float* part = args.records + index * record;
        if (part[channels + 1] != 0.0f) merge_record(total, part, channels);
    };
    for (int64_t row = 0; row < rows; ++row) {
        clear_record(total, channels);
        for (int64_t split = 0; split < merge.shared_splits; ++split)
            add(merge.shared + (split * args.kv_heads + head) * merge.shared_rows +
                merge.shared_row + row);
        for (int64_t split = 0; split < merge.splits; ++split)
            add(merge.partials + (split * args.kv_heads + head) * rows + row);
        const int64_t query_head = head * group + row % group;
        T* out = static_cast<T*>(args.out.data) +
                 (merge.first_token + row / group) * args.out.token_stride +
                 query_head * args.out.head_stride;
        write_output(out, total, channels, args.head_dim, args.sink(query_head));
    }
}

template <typename T>
static void attend(const AttentionArgs& args) {
    const int64_t merge_items = args.merge_count * args.kv_heads;
    SharedCounter next_unit, next_merge;
    const auto scratch = [&](int rank) { return args.scratch + rank * args.scratch_size; };
    run_together(args.threads, [&](int rank) {
        // The one at work, and the one after it.
        std::optional<UnitRunner<T>> units[2];
        const auto take = [&](std::optional<UnitRunner<T>>& runner) {
            runner.reset();
            const int64_t unit = next_unit.take();
            if (unit < args.unit_count) runner.emplace(args, args.units[unit], scratch(rank));
        };
        take(units[0]);
        for (int turn = 0; units[turn]; turn ^= 1) {
            take(units[turn ^ 1]);
            units[turn]->run(units[turn ^ 1] ? &*units[turn ^ 1] : nullptr);
        }
    });
    run_together(merge_items > 1 ? args.threads : 1, [&](int rank) {
        for (int64_t item; (item = next_merge.take()) < merge_items;)
            merge_splits<T>(args, args.merges[item / args.kv_heads], item % args.kv_heads,
                            scratch(rank));
    });
}

void paged_attention(const AttentionArgs& args) {
    visit_float_type(args.dtype, [&](auto type) { attend<decltype(type)>(args); });
}

}  // namespace sglite::cpu::SGLITE_CPU_PATH
