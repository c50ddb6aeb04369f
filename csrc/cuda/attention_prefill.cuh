// Attention of many query rows over the paged cache, on Hopper's warpgroup matrix unit.
//
// A block takes tiles: some neighbouring tokens of a request, with all the query heads of one KV
// head as rows. One warpgroup gathers keys and values from their pages into a ring of buffers in
// shared memory; the others hold 64 rows each, multiply, and keep an online softmax in registers.
// They take turns: while one multiplies, the other computes its exponentials, and the scores of the
// next keys are under way while those of the last are weighed (FlashAttention-3, Shah et al.,
// 2024).
//
// Keys are taken in blocks that start at absolute positions, the last block first, and a block that
// a row sees nothing of leaves the row's state as it is: a row's bits do not depend on the tile.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>

#include "cuda/attention_prefill_gather.cuh"

#ifdef __CUDACC__

namespace sglite::cuda {

namespace prefill {

// What the 128 threads do that hold 64 rows. A thread holds two of them, `row` and `row + 8`, and
// of each a quarter of the columns.
template <typename T, typename Shape, bool kScaled>
class Attender {
    static constexpr int kKeys = Shape::kKeys, kDim = Shape::kDim;
    using Signals = prefill::Signals<Shape::kStages>;

  public:
    __device__ Attender(const PrefillArgs& args, char* shared, Signals& signals, int group)
        : args_(args), signals_(signals), group_(group) {
        const uint32_t start = shared_address(shared);
        queries_ = wgmma_operand(start + group * 64 * 128);
        keys_ = wgmma_operand(start + Shape::kQueryBytes);
        values_ = wgmma_operand(start + Shape::kQueryBytes + Shape::kStages * Shape::kKeyBytes,
                                Shape::kKeyTile);
        const int warp = threadIdx.x / kWarp % 4, lane = threadIdx.x % kWarp;
        row_ = group * 64 + warp * 16 + lane / 4;
    }

    __device__ void run() {
        WorkQueue<Shape::kStages> queue(signals_);
        if (!(Shape::kFlags & 4) && group_ == Shape::kGroups - 1) give_turn();
        while (true) {
            const Work work = queue.take();
            if (!work.tokens) return;
            find_visible(work);
            clear();
            if (work.begin < work.end) attend(work);
            write(work);
        }
    }

  private:
    __device__ void attend(const Work& work) {
        const int first = work.begin / kKeys;
        int block = (work.end - 1) / kKeys;
        float scores[kKeys / 2];
        uint32_t weights[kKeys / 16][4];

        barrier_wait(signals_.query_full, query_turn_.parity);
        barrier_wait(signals_.key_full[key_turn_.stage], key_turn_.parity);
        show_to_matrix_unit();
        wgmma_begin();
        multiply_keys(scores);
        wgmma_wait<0>();
        pin(scores);
        release(signals_.key_empty[key_turn_.stage]);
        key_turn_.advance();
        weigh(scores, block);
        pack(weights, scores);

        for (--block; block >= first; --block) {
            barrier_wait(signals_.key_full[key_turn_.stage], key_turn_.parity);
            if constexpr (!(Shape::kFlags & 4)) take_turn();
            show_to_matrix_unit();
            pin(scores);
            pin(out_);
            wgmma_begin();
            multiply_keys(scores);
            barrier_wait(signals_.value_full[value_turn_.stage], value_turn_.parity);
            show_to_matrix_unit();
            wgmma_begin();
            multiply_values(weights);
            if constexpr (!(Shape::kFlags & 4)) give_turn();
            wgmma_wait<1>();
            pin(scores);
            release(signals_.key_empty[key_turn_.stage]);
            key_turn_.advance();
            weigh(scores, block);
            if constexpr (Shape::kFlags == 0 || Shape::kFlags == 4) hold(fminf(sum_[0], sum_[1]));
            wgmma_wait<0>();
            pin(out_);
            release(signals_.value_empty[value_turn_.stage]);
            value_turn_.advance();
            shrink();
            pack(weights, scores);
        }

        release(signals_.query_empty);
        query_turn_.advance();
        barrier_wait(signals_.value_full[value_turn_.stage], value_turn_.parity);
        show_to_matrix_unit();
        pin(out_);
        wgmma_begin();
        multiply_values(weights);
        wgmma_wait<0>();
        pin(out_);
        release(signals_.value_empty[value_turn_.stage]);
        value_turn_.advance();
    }

    // A branch that is never taken, behind the weights: without it the assembler would move the
    // wait that follows above them, and nothing would be computed while the matrix unit is at work.
    __device__ static void hold(float sum) {
        asm volatile(
            "{ .reg .pred p;\n"
            "setp.lt.f32 p, %0, 0f00000000;\n"
            "@p bra.uni stop;\n"
            "bra.uni go;\n"
            "stop: trap;\n"
            "go: }" ::"f"(sum)
            : "memory");
    }

    __device__ void multiply_keys(float (&scores)[kKeys / 2]) {
        const uint64_t keys = keys_ + key_turn_.stage * (Shape::kKeyBytes >> 4);
#pragma unroll
        for (int i = 0; i < kDim / 16; ++i) {
            const int tile = i / 4, within = i % 4 * 32;
            Wgmma<T, kKeys>::shared(scores, queries_ + ((tile * Shape::kQueryTile + within) >> 4),
                                    keys + ((tile * Shape::kKeyTile + within) >> 4), i > 0);
        }
        wgmma_commit();
    }

    __device__ void multiply_values(const uint32_t (&weights)[kKeys / 16][4]) {
        const uint64_t values = values_ + value_turn_.stage * (Shape::kKeyBytes >> 4);
#pragma unroll
        for (int i = 0; i < kKeys / 16; ++i)
            Wgmma<T, kDim>::registers(out_, weights[i], values + i * (16 * 128 >> 4));
        wgmma_commit();
    }

    // Warpgroups multiply one after the other, in a ring.
    __device__ void take_turn() { named_wait(1 + group_, 2 * kWarpgroup); }
    __device__ void give_turn() { named_arrive(1 + (group_ + 1) % Shape::kGroups, 2 * kWarpgroup); }

    // One arrival of each warp.
    __device__ void release(uint64_t& barrier) {
        __syncwarp();
        if (threadIdx.x % kWarp == 0) barrier_arrive(barrier);
    }

    // The visible positions of the two rows, and those of all rows of the warp. A row that does not
    // exist counts as one that sees everything: its scores are zeros, and nobody reads its result.
    __device__ void find_visible(const Work& work) {
        for (int i = 0; i < 2; ++i) {
            const int token = args_.token_of(row_ + 8 * i);
            const bool exists = token < work.tokens;
            begin_[i] = exists ? args_.first_visible(work.first_position + token) : 0;
            end_[i] = exists ? args_.kv_end[work.first_token + token] : INT_MAX;
        }
        all_begin_ = __reduce_max_sync(0xFFFFFFFFu, max(begin_[0], begin_[1]));
        all_end_ = __reduce_min_sync(0xFFFFFFFFu, min(end_[0], end_[1]));
    }

    __device__ void clear() {
#pragma unroll
        for (float& value : out_) value = 0.0f;
        largest_[0] = largest_[1] = -INFINITY;
        sum_[0] = sum_[1] = 0.0f;
    }

    // Turns the scores of a block into weights relative to the largest score so far.
    __device__ void weigh(float (&scores)[kKeys / 2], int block) {
        if constexpr (kScaled) {
#pragma unroll
            for (float& score : scores) {
                score *= args_.score_scale;
                if (args_.capped) score = tanh_exact(score);
            }
        }
        const int start = block * kKeys;
        if (start < all_begin_ || start + kKeys > all_end_) hide(scores, start);
        float offset[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float even = scores[2 * i], odd = scores[2 * i + 1];
#pragma unroll
            for (int j = 1; j < kKeys / 8; ++j) {
                even = fmaxf(even, scores[4 * j + 2 * i]);
                odd = fmaxf(odd, scores[4 * j + 2 * i + 1]);
            }
            float top = fmaxf(even, odd);
            top = fmaxf(top, shuffle_xor(top, 1));
            top = fmaxf(top, shuffle_xor(top, 2));
            top = fmaxf(top, largest_[i]);
            // Nothing seen so far: any finite offset will do.
            offset[i] = top == -INFINITY ? 0.0f : top * args_.exponent_scale;
            factor_[i] = exp2_fast(largest_[i] * args_.exponent_scale - offset[i]);
            largest_[i] = top;
        }
        if constexpr (Shape::kFlags & 2) {
            hold(factor_[0] + factor_[1]);
            wgmma_wait<0>();
            pin(out_);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float even = 0.0f, odd = 0.0f;
#pragma unroll
            for (int j = 0; j < kKeys / 8; ++j) {
                float& left = scores[4 * j + 2 * i];
                float& right = scores[4 * j + 2 * i + 1];
                left = exp2_fast(fmaf(left, args_.exponent_scale, -offset[i]));
                right = exp2_fast(fmaf(right, args_.exponent_scale, -offset[i]));
                even += left;
                odd += right;
            }
            sum_[i] = sum_[i] * factor_[i] + (even + odd);
        }
    }

    __device__ void hide(float (&scores)[kKeys / 2], int start) {
        const int column = start + threadIdx.x % 4 * 2;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int begin = begin_[i] - column, end = end_[i] - column;
#pragma unroll
            for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    if (8 * j + k < begin || 8 * j + k >= end)
                        scores[4 * j + 2 * i + k] = -INFINITY;
                }
            }
        }
    }

    __device__ static float tanh_exact(float x) {
        const float power = exp2_fast(fabsf(x) * -2.8853900817779268f);  // e^(-2 |x|)
        return copysignf(__fdividef(1.0f - power, 1.0f + power), x);
    }

    // Makes what was summed so far relative to the new largest scores.
    __device__ void shrink() {
#pragma unroll
        for (int j = 0; j < kDim / 8; ++j) {
#pragma unroll
            for (int k = 0; k < 4; ++k) out_[4 * j + k] *= factor_[k / 2];
        }
    }

    __device__ static void pack(uint32_t (&weights)[kKeys / 16][4],
                                const float (&scores)[kKeys / 2]) {
#pragma unroll
        for (int i = 0; i < kKeys / 16; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j)
                weights[i][j] = pack_pair<T>(scores[8 * i + 2 * j], scores[8 * i + 2 * j + 1]);
        }
    }

    // Divides by the sum of weights; a row that sees nothing gets zeros. The four lanes of a row
    // exchange pairs, so that each stores eight neighbours at once.
    __device__ void write(const Work& work) {
        const int lane = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float sum = sum_[i];
            sum += shuffle_xor(sum, 1);
            sum += shuffle_xor(sum, 2);
            const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
            const int row = row_ + 8 * i, token = args_.token_of(row);
            T* to = static_cast<T*>(args_.out.data) +
                    (work.first_token + token) * args_.out.token_stride +
                    ((work.kv_head - token) * args_.group + row) * args_.out.head_stride + lane * 8;
#pragma unroll
            for (int j = 0; j < kDim / 8; j += 4) {
                uint32_t pairs[4];
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const float* d = &out_[4 * (j + k) + 2 * i];
                    pairs[k] = pack_pair<T>(d[0] * inverse, d[1] * inverse);
                }
                transpose(pairs, lane);
                if (token < work.tokens && 8 * (j + lane) < args_.head_dim) {
                    *reinterpret_cast<uint4*>(to + 8 * j) =
                        uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
                }
            }
        }
    }

    // The 4 x 4 matrix whose columns four lanes hold.
    __device__ static void transpose(uint32_t (&x)[4], int lane) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const uint32_t other = shuffle_xor(lane & 1 ? x[i] : x[i + 1], 1);
            (lane & 1 ? x[i] : x[i + 1]) = other;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t other = shuffle_xor(lane & 2 ? x[i] : x[i + 2], 2);
            (lane & 2 ? x[i] : x[i + 2]) = other;
        }
    }

    const PrefillArgs& args_;
    Signals& signals_;
    const int group_;
    int row_;
    uint64_t queries_, keys_, values_;
    Turn<1> query_turn_;
    Turn<Shape::kStages> key_turn_, value_turn_;
    int begin_[2], end_[2], all_begin_, all_end_;
    float out_[kDim / 2];
    float largest_[2], sum_[2], factor_[2];
};

}  // namespace prefill

template <typename T, typename Shape, bool kScaled>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    prefill_kernel(const __grid_constant__ PrefillArgs args) {
#ifdef SGLITE_HAS_WGMMA
    __shared__ prefill::Signals<Shape::kStages> signals;
    char* const unaligned = dynamic_shared<char>();
    char* const shared = unaligned + (-shared_address(unaligned) & (Shape::kAlignment - 1));
    if (threadIdx.x == 0) {
        constexpr int kConsumers = 4 * Shape::kGroups;  // warps
        barrier_init(signals.query_full, kWarpgroup);
        barrier_init(signals.query_empty, kConsumers);
        for (int i = 0; i < Shape::kStages; ++i) {
            barrier_init(signals.key_full[i], kWarpgroup);
            barrier_init(signals.value_full[i], kWarpgroup);
            barrier_init(signals.key_empty[i], kConsumers);
            barrier_init(signals.value_empty[i], kConsumers);
        }
        for (int i = 0; i < prefill::kWorkStages; ++i) {
            barrier_init(signals.work_full[i], 1);
            barrier_init(signals.work_empty[i], Shape::kThreads);
        }
        show_barriers();
    }
    __syncthreads();
    wait_for_previous_kernel();
    const int warpgroup = __shfl_sync(0xFFFFFFFFu, threadIdx.x / kWarpgroup, 0);
    if (warpgroup == 0) {
        lower_registers<Shape::kProducerRegisters>();
        prefill::Gatherer<T, Shape>(args, shared, signals).run();
    } else {
        raise_registers<Shape::kConsumerRegisters>();
        prefill::Attender<T, Shape, kScaled>(args, shared, signals, warpgroup - 1).run();
    }
    let_next_kernel_start();
#else
    __trap();
#endif
}

template <int kDim>
using PrefillShapeOf = PrefillShape<kDim, prefill_rows(kDim) / 64,
                                    kDim == 256  ? 80
                                    : kDim == 64 ? 128
                                                 : 176,
                                    2>;

template <int kDim>
void launch_prefill(const PrefillArgs& args, Stream stream) {
    using Shape = PrefillShapeOf<kDim>;
    const int items = args.max_tiles * args.kv_heads;
    const Launch settings{
        .op = "paged_attention",
        .grid = dim3(static_cast<unsigned>(std::min(items, args.multiprocessors))),
        .threads = Shape::kThreads,
        .shared_bytes = Shape::kSharedBytes,
        .stream = stream,
        .overlaps = true,
    };
    const auto run = [&]<typename T>(T) {
        if (args.scaled) {
            launch<prefill_kernel<T, Shape, true>>(settings, args);
        } else {
            launch<prefill_kernel<T, Shape, false>>(settings, args);
        }
    };
    args.dtype == DType::kBFloat16 ? run(BFloat16{}) : run(Half{});
}

// The kernel's body uses static shared memory; what stands in for it in code for other targets does
// not. So its size tells whether this GPU would run the body: without launching anything.
template <int kDim>
bool prefill_is_built(int device) {
    static std::array<std::atomic<int>, 64> answers{};  // 0: not asked yet, 1: no, 2: yes
    std::atomic<int>& answer = answers[device % answers.size()];
    if (!answer) {
        const DeviceGuard guard("paged_attention", device);
        cudaFuncAttributes attributes{};
        const bool loads =
            cudaFuncGetAttributes(
                &attributes, prefill_kernel<BFloat16, PrefillShapeOf<kDim>, false>) == cudaSuccess;
        if (!loads) cudaGetLastError();  // no code at all for this GPU: not an error
        answer = loads && attributes.sharedSizeBytes > 0 ? 2 : 1;
    }
    return answer == 2;
}

}  // namespace sglite::cuda

#else

namespace sglite::cuda {

// The emulator has no warpgroups.
template <int kDim>
void launch_prefill(const PrefillArgs&, Stream) {
    throw std::logic_error("paged_attention: no prefill kernel in an emulated build");
}
template <int kDim>
bool prefill_is_built(int) {
    return false;
}

}  // namespace sglite::cuda

#endif
