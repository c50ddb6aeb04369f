// The half of the prefill kernel that fetches: which tiles a block takes, and the warpgroup that
// gathers queries, keys and values into shared memory. See attention_prefill.cuh.
#pragma once

#include "cuda/attention_prefill.h"
#include "cuda/warpgroups.cuh"
#include "cuda/wgmma.cuh"

#ifdef __CUDACC__

namespace sglite::cuda {

// kGroups warpgroups of 64 rows; keys are taken kKeys at a time.
template <int kDim_, int kGroups_, int kKeys_, int kFlags_ = 0, int kStages_ = 2>
struct PrefillShape {
    static constexpr int kDim = kDim_, kGroups = kGroups_, kKeys = kKeys_;
    static constexpr int kFlags =
        kFlags_;  // 1: no proxy fence, 2: weigh after PV, 4: skip shrink, 8: no turns
    static constexpr int kRows = 64 * kGroups;
    static constexpr int kThreads = kWarpgroup * (kGroups + 1);
    static constexpr int kCopiers = kFlags & 16 ? kWarpgroup / 2 : kWarpgroup;
    static constexpr int kStages = kStages_;
    static constexpr int kColumnTiles = (kDim + 63) / 64;  // of 128 bytes
    static constexpr int kQueryTile = kRows * 128, kKeyTile = kKeys * 128;
    static constexpr int kQueryBytes = kQueryTile * kColumnTiles;
    static constexpr int kKeyBytes = kKeyTile * kColumnTiles;
    static constexpr int kAlignment = 1024;
    static constexpr int kSharedBytes = kAlignment + kQueryBytes + 2 * kStages * kKeyBytes;
    // Together no more than the 64k registers of a multiprocessor.
    static constexpr int kProducerRegisters = kGroups == 2 ? 40 : 32;
    static constexpr int kConsumerRegisters = kGroups == 2 ? 232 : 160;
    // Neighbouring keys that surely lie in one page.
    static constexpr int kSpan = kPrefillSpan;
    static constexpr int kSpans = kKeys / kSpan;
    static_assert(kKeys % kSpan == 0 && kSpans <= kWarp && kDim % 32 == 0);
};

namespace prefill {

template <int kStages>
struct Barriers {
    uint64_t query_full, query_empty;
    uint64_t key_full[kStages], key_empty[kStages], value_full[kStages], value_empty[kStages];
};

// A place in the ring of buffers, and the parity of the round.
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

// A tile and what its rows see.
struct Work {
    int first_token, tokens, kv_head;
    int first_position;
    const int32_t* pages;
    int begin, end;  // positions that some row sees; no more than these are read
};

// Every warp computes it on its own; all lanes get it. False when there is no item of that number.
__device__ inline bool find_work(const PrefillArgs& args, int item, Work& work) {
    if (item >= *args.tile_count * args.kv_heads) return false;
    const PrefillTile tile = args.tiles[item / args.kv_heads];
    work.kv_head = item % args.kv_heads;
    work.first_token = tile.first_token;
    work.tokens = tile.tokens;
    work.first_position =
        args.kv_lens[tile.request] - (args.query_start[tile.request + 1] - tile.first_token);
    work.pages = args.page_table + tile.request * args.table_width;
    int end = 0;
    for (int i = threadIdx.x % kWarp; i < tile.tokens; i += kWarp)
        end = max(end, args.kv_end[tile.first_token + i]);
    work.end = __reduce_max_sync(0xFFFFFFFFu, end);
    work.begin = args.first_visible(work.first_position);
    return true;
}

// The item that a block takes in its n-th turn, of a list that begins with the most work. Every
// other round goes the other way, so that no block gets the most of every round.
__device__ inline int nth_item(int n) {
    const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
    return n * blocks + (n % 2 ? blocks - 1 - block : block);
}

// What the 128 threads of the gathering warpgroup do. Neighbouring threads copy 16 bytes each of
// one row.
template <typename T, typename Shape>
class Gatherer {
    static constexpr int kChunks = Shape::kDim / 8;  // of 16 bytes in a row, padded with zeros
    static constexpr int kRowThreads = kChunks <= 8 ? 8 : kChunks <= 16 ? 16 : 32;
    static constexpr int kThreads = Shape::kCopiers;
    static constexpr int kRowsAtOnce = kThreads / kRowThreads;
    using Barriers = prefill::Barriers<Shape::kStages>;

  public:
    __device__ Gatherer(const PrefillArgs& args, char* shared, Barriers& barriers)
        : args_(args),
          shared_(shared),
          barriers_(barriers),
          half_(threadIdx.x / kThreads),
          chunk_(threadIdx.x % kThreads % kRowThreads),
          row_(threadIdx.x % kThreads / kRowThreads),
          exists_(chunk_ < args.head_dim / 8),
          stride_(static_cast<uint32_t>(args.kv_heads * args.head_dim * sizeof(T))) {}

    __device__ void run() {
        Work work;
        for (int n = 0; find_work(args_, nth_item(n), work); ++n) {
            if (work.begin >= work.end) continue;
            const int first = work.begin / Shape::kKeys;
            const int last = (work.end - 1) / Shape::kKeys;
            // Found two blocks ahead, since reading the page table takes its time.
            int rows = find_rows(work, last), next_rows = find_rows(work, last - 1);
            if constexpr (Shape::kFlags & 16) {
                if (half_ == 0) load_queries(work);
                for (int block = last; block >= first; --block) {
                    const int later_rows = find_rows(work, block - 2);
                    half_ == 0 ? load_keys(work, block, rows) : load_values(work, block, rows);
                    rows = next_rows;
                    next_rows = later_rows;
                }
            } else {
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
        }
    }

  private:
    // Lane i gets the row of the cache where the i-th span of the block begins.
    __device__ int find_rows(const Work& work, int block) const {
        const int lane = threadIdx.x % kWarp;
        const int position = block * Shape::kKeys + lane * Shape::kSpan;
        const bool read = lane < Shape::kSpans && position >= 0 && position < work.end &&
                          position + Shape::kSpan > work.begin;
        if (!read) return 0;
        const int page = position / args_.page_size;
        return work.pages[page] * args_.page_size + (position - page * args_.page_size);
    }

    __device__ void load_queries(const Work& work) {
        barrier_wait(barriers_.query_empty, query_turn_.parity ^ 1);
        const int group = args_.q_heads / args_.kv_heads;
        const T* q = static_cast<const T*>(args_.q.data) + work.first_token * args_.q.token_stride +
                     work.kv_head * group * args_.q.head_stride + chunk_ * 8;
#pragma unroll 4
        for (int i = 0; i < Shape::kRows / kRowsAtOnce; ++i) {
            const int row = row_ + i * kRowsAtOnce, token = row / group;
            const bool exists = exists_ && token < work.tokens;
            const T* from = q + (exists ? token * args_.q.token_stride +
                                              (row - token * group) * args_.q.head_stride
                                        : 0);
            if (chunk_ < kChunks) copy_async(shared_ + place(Shape::kQueryTile, row), from, exists);
        }
        barrier_arrive_after_copies(barriers_.query_full);
        query_turn_.advance();
    }

    __device__ void load_keys(const Work& work, int block, int rows) {
        barrier_wait(barriers_.key_empty[key_turn_.stage], key_turn_.parity ^ 1);
        load(args_.k_cache, args_.key_map, work, block, rows,
             shared_ + Shape::kQueryBytes + key_turn_.stage * Shape::kKeyBytes,
             barriers_.key_full[key_turn_.stage]);
        key_turn_.advance();
    }

    __device__ void load_values(const Work& work, int block, int rows) {
        barrier_wait(barriers_.value_empty[value_turn_.stage], value_turn_.parity ^ 1);
        load(args_.v_cache, args_.value_map, work, block, rows,
             shared_ + Shape::kQueryBytes + (Shape::kStages + value_turn_.stage) * Shape::kKeyBytes,
             barriers_.value_full[value_turn_.stage]);
        value_turn_.advance();
    }

    // Positions that no row sees become zeros: whatever lies there, NaN included, must not reach a
    // product.
    __device__ void load(const void* cache, const TensorMap& map, const Work& work, int block,
                         int rows, char* to, uint64_t& full) {
        const int start = block * Shape::kKeys;
        const bool whole = work.begin <= start && start + Shape::kKeys <= work.end;
        if ((Shape::kFlags & 32) && whole && args_.has_maps) {
            const int thread = threadIdx.x % kThreads;
            if (thread == 0) {
                barrier_arrive_for_bytes(full, Shape::kKeyBytes);
            } else {
                barrier_arrive(full);
            }
            if (thread < Shape::kSpans) {
#pragma unroll
                for (int i = 0; i < Shape::kColumnTiles; ++i) {
                    copy_tile(to + i * Shape::kKeyTile + thread * Shape::kSpan * 128, map, i * 64,
                              work.kv_head, rows, full);
                }
            }
            return;
        }
        if (whole && args_.head_dim == Shape::kDim) {
            copy<false>(cache, work, start, rows, to);
        } else {
            copy<true>(cache, work, start, rows, to);
        }
        barrier_arrive_after_copies(full);
    }

    template <bool kPartly>
    __device__ void copy(const void* cache, const Work& work, int start, int rows, char* to) {
        const char* from = static_cast<const char*>(cache) + row_ * stride_ +
                           (work.kv_head * args_.head_dim + chunk_ * 8) * sizeof(T);
        const int begin = work.begin - start - row_, end = work.end - start - row_;
        to += place(Shape::kKeyTile, row_);
#pragma unroll
        for (int i = 0; i < Shape::kKeys / kRowsAtOnce; ++i) {
            const int row = i * kRowsAtOnce;
            const uint32_t cache_row =
                __shfl_sync(0xFFFFFFFFu, rows, row / Shape::kSpan) + row % Shape::kSpan;
            if (chunk_ < kChunks) {
                copy_async(below(to, row), from + uint64_t{cache_row} * stride_,
                           !kPartly || (exists_ && row >= begin && row < end));
            }
        }
    }

    // Where this thread's chunk of a row goes, in bytes from the start of a buffer.
    __device__ int place(int tile_bytes, int row) const {
        return chunk_ / 8 * tile_bytes + swizzled(row, chunk_ % 8);
    }
    // The same for a row that is so many below, a multiple of kRowsAtOnce.
    __device__ static char* below(char* place, int rows) {
        return reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(place + rows * 128) ^ (rows & 7)
                                                                                             << 4);
    }

    const PrefillArgs& args_;
    char* const shared_;
    Barriers& barriers_;
    const int half_, chunk_, row_;
    const bool exists_;      // whether the head is so long
    const uint32_t stride_;  // of the cache's rows, in bytes
    Turn<1> query_turn_;
    Turn<Shape::kStages> key_turn_, value_turn_;
};

}  // namespace prefill

}  // namespace sglite::cuda

#endif
