// The half of the prefill kernel that fetches: which tiles a block takes, and the warpgroup that
// gathers queries, keys and values into shared memory. See attention_prefill.cuh.
#pragma once

#include "cuda/attention_prefill.h"
#include "cuda/warpgroups.cuh"
#include "cuda/wgmma.cuh"

#ifdef __CUDACC__

namespace sglite::cuda {

// kGroups warpgroups of 64 rows; keys are taken kKeys at a time.
template <int kDim_, int kGroups_, int kKeys_, int kStages_, int kFlags_ = 1>
struct PrefillShape {
    static constexpr int kFlags = kFlags_;
    static constexpr int kDim = kDim_, kGroups = kGroups_, kKeys = kKeys_, kStages = kStages_;
    static constexpr int kRows = 64 * kGroups;
    static constexpr int kThreads = kWarpgroup * (kGroups + 1);
    static constexpr int kColumnTiles = (kDim + 63) / 64;  // of 128 bytes
    static constexpr int kQueryTile = kRows * 128, kKeyTile = kKeys * 128;
    static constexpr int kQueryBytes = kQueryTile * kColumnTiles;
    static constexpr int kKeyBytes = kKeyTile * kColumnTiles;
    static constexpr int kAlignment = 1024;
    static constexpr int kSharedBytes = kAlignment + kQueryBytes + 2 * kStages * kKeyBytes;
    // Together no more than the 64k registers of a multiprocessor.
    static constexpr int kProducerRegisters = kGroups == 2 ? 40 : 32;
    static constexpr int kConsumerRegisters = kGroups == 2 ? 232 : 160;
    static constexpr int kSpans = kKeys / kPrefillSpan;
    static_assert(kKeys % kPrefillSpan == 0 && kSpans <= kWarp && kDim % 32 == 0);
};

namespace prefill {

// A place in a ring of buffers, and the parity of the round.
template <int kStages>
struct Turn {
    int stage = 0, parity = 0;
    __device__ void advance() {
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// A tile for one KV head, and what its rows see.
struct Work {
    int request, first_token, tokens, kv_head;  // no tokens: there is no more work
    int first_position;
    int begin, end;  // positions that some row sees; no more than these are read
};

constexpr int kWorkStages = 2;

// In shared memory: what the warpgroups tell each other.
template <int kStages>
struct Signals {
    uint64_t query_full, query_empty;
    uint64_t key_full[kStages], key_empty[kStages], value_full[kStages], value_empty[kStages];
    uint64_t work_full[kWorkStages], work_empty[kWorkStages];
    Work work[kWorkStages];
};

// The work that the block has drawn, handed to all of its warps.
template <int kStages>
class WorkQueue {
  public:
    __device__ explicit WorkQueue(Signals<kStages>& signals) : signals_(signals) {}

    __device__ Work take() {
        barrier_wait(signals_.work_full[turn_.stage], turn_.parity);
        const Work work = signals_.work[turn_.stage];
        __syncwarp();  // the lanes need not have left the wait together
        barrier_arrive(signals_.work_empty[turn_.stage]);
        turn_.advance();
        return work;
    }

    // By one warp, before it takes the work itself.
    __device__ void give(const Work& work) {
        barrier_wait(signals_.work_empty[turn_.stage], turn_.parity ^ 1);
        if (threadIdx.x % kWarp == 0) {
            signals_.work[turn_.stage] = work;
            barrier_arrive(signals_.work_full[turn_.stage]);
        }
    }

  private:
    Signals<kStages>& signals_;
    Turn<kWorkStages> turn_;
};

// What the 128 threads of the gathering warpgroup do.
template <typename T, typename Shape>
class Gatherer {
    // Neighbouring threads copy 16 bytes each of one row.
    static constexpr int kChunks = Shape::kDim / 8;
    static constexpr int kRowThreads = kChunks <= 8 ? 8 : kChunks <= 16 ? 16 : 32;
    static constexpr int kRowsAtOnce = kWarpgroup / kRowThreads;
    using Signals = prefill::Signals<Shape::kStages>;

  public:
    __device__ Gatherer(const PrefillArgs& args, char* shared, Signals& signals)
        : args_(args),
          shared_(shared),
          signals_(signals),
          chunk_(threadIdx.x % kRowThreads),
          row_(threadIdx.x / kRowThreads),
          exists_(chunk_ < args.head_dim / 8),
          stride_(static_cast<uint32_t>(args.kv_heads * args.head_dim * sizeof(T))) {}

    // Blocks begin with the items of their own numbers, and draw the others as they get there, so
    // that all end at about the same time.
    __device__ void run() {
        WorkQueue<Shape::kStages> queue(signals_);
        const int items = *args_.tile_count * args_.kv_heads;
        const bool draws = threadIdx.x < kWarp;
        int item = static_cast<int>(blockIdx.x);
        while (true) {
            if (draws) queue.give(find_work(item, items));
            const Work work = queue.take();
            if (!work.tokens) return;
            // Each block draws once for every item that it has, and the last to draw cleans up.
            int ticket = 0;
            if (threadIdx.x == 0) ticket = atomicAdd(args_.tickets, 1);
            load(work);
            if (threadIdx.x == 0 && ticket == items - 1) *args_.tickets = 0;
            if (draws) item = static_cast<int>(gridDim.x) + shuffle(ticket, 0);
        }
    }

  private:
    // By a whole warp.
    __device__ Work find_work(int item, int items) const {
        if (item >= items) return Work{};
        const PrefillTile tile = args_.tiles[item / args_.kv_heads];
        Work work{.request = tile.request,
                  .first_token = tile.first_token,
                  .tokens = tile.tokens,
                  .kv_head = item % args_.kv_heads};
        int end = 0;
        for (int i = threadIdx.x % kWarp; i < tile.tokens; i += kWarp)
            end = max(end, args_.kv_end[tile.first_token + i]);
        work.end = __reduce_max_sync(0xFFFFFFFFu, end);
        work.first_position =
            args_.kv_lens[tile.request] - (args_.query_start[tile.request + 1] - tile.first_token);
        work.begin = args_.first_visible(work.first_position);
        return work;
    }

    __device__ void load(const Work& work) {
        if (work.begin >= work.end) return;
        const int first = work.begin / Shape::kKeys, last = (work.end - 1) / Shape::kKeys;
        // Found two blocks ahead, since reading the page table takes its time.
        int rows = find_rows(work, last), next_rows = find_rows(work, last - 1);
        load_queries(work);
        load_keys(work, last, rows);
        for (int block = last; block > first; --block) {
            const int later_rows = find_rows(work, block - 2);
            load_keys(work, block - 1, next_rows);
            load_values(work, block, rows);
            rows = next_rows;
            next_rows = later_rows;
        }
        load_values(work, first, rows);
    }

    // Lane i gets the row of the cache where the i-th span of the block begins.
    __device__ int find_rows(const Work& work, int block) const {
        const int lane = threadIdx.x % kWarp;
        const int position = block * Shape::kKeys + lane * kPrefillSpan;
        const bool read = lane < Shape::kSpans && position >= 0 && position < work.end &&
                          position + kPrefillSpan > work.begin;
        if (!read) return 0;
        const int page = position / args_.page_size;
        return args_.page_table[work.request * args_.table_width + page] * args_.page_size +
               (position - page * args_.page_size);
    }

    __device__ void load_queries(const Work& work) {
        barrier_wait(signals_.query_empty, query_turn_.parity ^ 1);
        const T* q = static_cast<const T*>(args_.q.data) + work.first_token * args_.q.token_stride +
                     work.kv_head * args_.group * args_.q.head_stride + chunk_ * 8;
#pragma unroll 4
        for (int i = 0; i < Shape::kRows / kRowsAtOnce; ++i) {
            const int row = row_ + i * kRowsAtOnce, token = args_.token_of(row);
            const bool exists = exists_ && token < work.tokens;
            const T* from = q + (exists ? token * args_.q.token_stride +
                                              (row - token * args_.group) * args_.q.head_stride
                                        : 0);
            if (chunk_ < kChunks) copy_async(shared_ + place(Shape::kQueryTile, row), from, exists);
        }
        barrier_arrive_after_copies(signals_.query_full);
        query_turn_.advance();
    }

    __device__ void load_keys(const Work& work, int block, int rows) {
        const int stage = key_turn_.stage;
        barrier_wait(signals_.key_empty[stage], key_turn_.parity ^ 1);
        load_block(args_.k_cache, args_.key_map, work, block, rows,
                   shared_ + Shape::kQueryBytes + stage * Shape::kKeyBytes,
                   signals_.key_full[stage]);
        key_turn_.advance();
    }

    __device__ void load_values(const Work& work, int block, int rows) {
        const int stage = value_turn_.stage;
        barrier_wait(signals_.value_empty[stage], value_turn_.parity ^ 1);
        load_block(args_.v_cache, args_.value_map, work, block, rows,
                   shared_ + Shape::kQueryBytes + (Shape::kStages + stage) * Shape::kKeyBytes,
                   signals_.value_full[stage]);
        value_turn_.advance();
    }

    // Whole blocks come by the copy engine, a span at a time. At the edges the threads copy row by
    // row, and positions that no row sees become zeros: whatever lies there, NaN included, must not
    // reach a product.
    __device__ void load_block(const void* cache, const TensorMap& map, const Work& work, int block,
                               int rows, char* to, uint64_t& full) {
        const int start = block * Shape::kKeys;
        if (work.begin > start || start + Shape::kKeys > work.end || !args_.has_maps) {
            copy_rows(cache, work, start, rows, to);
            return barrier_arrive_after_copies(full);
        }
        if (threadIdx.x == 0) {
            barrier_arrive_for_bytes(full, Shape::kKeyBytes);
        } else {
            barrier_arrive(full);
        }
        if (threadIdx.x >= Shape::kSpans) return;
#pragma unroll
        for (int i = 0; i < Shape::kColumnTiles; ++i) {
            copy_tile(to + i * Shape::kKeyTile + threadIdx.x * kPrefillSpan * 128, map, i * 64,
                      work.kv_head, rows, full);
        }
    }

    __device__ void copy_rows(const void* cache, const Work& work, int start, int rows, char* to) {
        const char* from = static_cast<const char*>(cache) + row_ * stride_ +
                           (work.kv_head * args_.head_dim + chunk_ * 8) * sizeof(T);
        const int begin = work.begin - start - row_, end = work.end - start - row_;
        to += place(Shape::kKeyTile, row_);
#pragma unroll 4
        for (int row = 0; row < Shape::kKeys; row += kRowsAtOnce) {
            const uint32_t cache_row = shuffle(rows, row / kPrefillSpan) + row % kPrefillSpan;
            if (chunk_ < kChunks) {
                copy_async(below(to, row), from + uint64_t{cache_row} * stride_,
                           exists_ && row >= begin && row < end);
            }
        }
    }

    // Where this thread's chunk of a row goes, in bytes from the start of a buffer.
    __device__ int place(int tile_bytes, int row) const {
        return chunk_ / 8 * tile_bytes + swizzled(row, chunk_ % 8);
    }
    // The same for a row that is so many below, a multiple of kRowsAtOnce.
    __device__ static char* below(char* place, int rows) {
        const uintptr_t straight = reinterpret_cast<uintptr_t>(place + rows * 128);
        return reinterpret_cast<char*>(straight ^ (rows & 7) << 4);
    }

    const PrefillArgs& args_;
    char* const shared_;
    Signals& signals_;
    const int chunk_, row_;
    const bool exists_;      // whether heads are so long
    const uint32_t stride_;  // of the cache's rows, in bytes
    Turn<1> query_turn_;
    Turn<Shape::kStages> key_turn_, value_turn_;
};

}  // namespace prefill

}  // namespace sglite::cuda

#endif
