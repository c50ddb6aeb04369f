// Paged attention for requests with many query rows (prefill, extend): each warp has 16 rows of its
// own and all keys of a tile. The arithmetic of a row is that of attention_decode.cu.
#include <climits>

#include "cuda/attention_launch.cuh"
#include "cuda/attention_tile.cuh"

namespace sglite::cuda {

namespace {

constexpr int kRows = kExtendRows;
constexpr int kThreads = kRows / 16 * kWarp;

template <typename T, int kD>
struct ExtendShared {
    static constexpr int kStage = 2 * SharedRows<kD>::kElements;
    static constexpr int kChunks = kD / 8;

    T* ring;        // [stages]: keys and values of a tile
    T* queries;     // [kRows]
    float4* total;  // [kChunks][kThreads]: of the splits so far, where each thread alone reads it

    __device__ ExtendShared(int stages) {
        ring = dynamic_shared<T>();
        queries = ring + stages * kStage;
        total = reinterpret_cast<float4*>(queries + kRows * kD);
    }
    static size_t bytes(int stages) {
        return (stages * kStage + kRows * kD) * sizeof(T) + kChunks * kThreads * sizeof(float4);
    }
};

template <typename T, int kD>
__global__ void __launch_bounds__(kThreads)
    extend_kernel(const __grid_constant__ AttentionView<T> view) {
    constexpr int kSteps = kD / 16, kChunks = kD / 8;
    using Shared = ExtendShared<T, kD>;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int row = lane / 4, column = lane % 4 * 2;
    const Shared shared(view.stages);
    TileLoader<T, kD, kThreads> loader;

    wait_for_previous_kernel();
    let_next_kernel_start();
    const int works = load_extend_units(view) * view.kv_heads;
    for (int work = static_cast<int>(blockIdx.x); work < works;
         work += static_cast<int>(gridDim.x)) {
        const AttentionUnit unit = view.units[work / view.kv_heads];
        const int head = work % view.kv_heads;
        __syncthreads();  // the unit before has been read
        copy_queries<T, kD, kRows>(view, unit.first_row, unit.rows, head, shared.queries);
        loader.position = unit.begin / kTile * kTile;
        loader.begin = unit.begin;
        loader.end = unit.end;
        loader.head = head;
        loader.look_up(view, unit.request);
        int next_tile = 0;
        const auto copy_tile = [&] {
            if (loader.position < unit.end) {
                T* keys = shared.ring + next_tile * Shared::kStage;
                next_tile = next_tile + 1 == view.stages ? 0 : next_tile + 1;
                loader.copy(view, keys, keys + SharedRows<kD>::kElements);
                loader.position += kTile;
                loader.look_up(view, unit.request);
            }
            commit_copies();
        };
        for (int stage = 1; stage < view.stages; ++stage) copy_tile();

        const RowPair<T> rows(view, unit, warp * 16);
        // What all rows of the warp see, and what any sees.
        int all_from = 0, all_to = INT_MAX, any_from = INT_MAX, any_to = 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (row + 8 * i >= rows.rows) continue;
            all_from = max(all_from, rows.low[i]);
            all_to = min(all_to, rows.high[i]);
            any_from = min(any_from, rows.low[i]);
            any_to = max(any_to, rows.high[i]);
        }
        for (int mask = 4; mask < kWarp; mask *= 2) {
            all_from = max(all_from, shuffle_xor(all_from, mask));
            all_to = min(all_to, shuffle_xor(all_to, mask));
            any_from = min(any_from, shuffle_xor(any_from, mask));
            any_to = max(any_to, shuffle_xor(any_to, mask));
        }
        float total_sum[2] = {}, total_largest[2] = {-INFINITY, -INFINITY};
        float o[kChunks][4] = {}, sum[4] = {}, largest[2] = {-INFINITY, -INFINITY};
        bool has_total = false;
        int stage = 0;
        for (int position = unit.begin / kTile * kTile; position < unit.end; position += kTile) {
            if (view.stages == 1) {
                __syncthreads();  // the tile before has been read
                copy_tile();
            }
            wait_for_stage(view.stages);
            __syncthreads();
            if (view.stages > 1) copy_tile();
            const T* keys = shared.ring + stage * Shared::kStage;
            const T* values = keys + SharedRows<kD>::kElements;
            stage = stage + 1 == view.stages ? 0 : stage + 1;

            if (position < any_to && position + kTile > any_from) {
                float scores[8][4] = {};
#pragma unroll
                for (int step = 0; step < kSteps; ++step) {
                    uint32_t q[4];
                    load_left<kD>(q, shared.queries, warp * 16, step);
#pragma unroll
                    for (int n = 0; n < 8; n += 2)
                        add_scores<kD>(scores[n], scores[n + 1], q, keys, n * 8, step);
                }
                const bool all = position >= all_from && position + kTile <= all_to;
                float most[2] = {largest[0], largest[1]};
#pragma unroll
                for (int n = 0; n < 8; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        float& score = scores[n][i];
                        score = exponent(view, score);
                        if (!all && !rows.sees(i / 2, position + n * 8 + column + i % 2))
                            score = -INFINITY;
                        most[i / 2] = fmaxf(most[i / 2], score);
                    }
                }
                float scale[2], at[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    most[i] = fmaxf(most[i], shuffle_xor(most[i], 1));
                    most[i] = fmaxf(most[i], shuffle_xor(most[i], 2));
                    at[i] = finite(most[i]);
                    scale[i] = exp2_fast(subtract(largest[i], at[i]));
                    largest[i] = most[i];
                }
                uint32_t weights[4][4];
#pragma unroll
                for (int step = 0; step < 4; ++step) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float* pair = scores[2 * step + i / 2] + i % 2 * 2;
                        weights[step][i] = pack_pair<T>(exp2_fast(subtract(pair[0], at[i % 2])),
                                                        exp2_fast(subtract(pair[1], at[i % 2])));
                    }
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[i] = multiply(sum[i], scale[i / 2]);
                add_weights<T>(sum, weights);
#pragma unroll
                for (int n = 0; n < kChunks; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) o[n][i] = multiply(o[n][i], scale[i / 2]);
                    add_values<kD>(o[n], weights, values, n);
                }
            }

            const int after = position + kTile;
            const bool is_end = after >= unit.end;
            if (!is_end && split_begin(split_of(after)) != after) continue;
            // The last part stays where it is, and takes the total in.
            const MergeFactors merge[2] = {{total_largest[0], largest[0]},
                                           {total_largest[1], largest[1]}};
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                total_largest[i] = merge[i].largest;
                total_sum[i] = merge[i](total_sum[i], sum[2 * i]);
                sum[2 * i] = sum[2 * i + 1] = 0.0f;
                largest[i] = -INFINITY;
            }
#pragma unroll
            for (int n = 0; n < kChunks; ++n) {
                float4& place = shared.total[n * kThreads + threadIdx.x];
                const float4 before = has_total ? place : float4{};
                o[n][0] = merge[0](before.x, o[n][0]);
                o[n][1] = merge[0](before.y, o[n][1]);
                o[n][2] = merge[1](before.z, o[n][2]);
                o[n][3] = merge[1](before.w, o[n][3]);
                if (is_end) continue;
                place = float4{o[n][0], o[n][1], o[n][2], o[n][3]};
                o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0.0f;
            }
            has_total = true;
        }

#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (unit.parts == 1) {
                const float factor = inverse(total_sum[i]);
#pragma unroll
                for (int n = 0; n < kChunks; ++n) {
                    rows.write(view, i, head, n * 8 + column, multiply(o[n][2 * i], factor),
                               multiply(o[n][2 * i + 1], factor));
                }
            } else if (row + 8 * i < rows.rows) {
                float* record = record_of<kD>(view, rows.first_row + row + 8 * i, head, unit.part);
#pragma unroll
                for (int n = 0; n < kChunks; ++n) {
                    *reinterpret_cast<float2*>(record + n * 8 + column) =
                        float2{o[n][2 * i], o[n][2 * i + 1]};
                }
                if (column == 0)
                    *reinterpret_cast<float2*>(record + kD) =
                        float2{total_largest[i], total_sum[i]};
            }
        }
        if (unit.parts != 1) finish_records<T, kD>(view, unit, head, 1);
    }
    wait_copies<0>();
}

}  // namespace

void attention_extend(const AttentionArgs& args, Stream stream) {
    visit_attention(args, [&](auto element, auto dim) {
        using T = decltype(element);
        constexpr int kD = decltype(dim)::value;
        AttentionView<T> view = attention_view<T>(args, true);
        launch_attention<T, extend_kernel<T, kD>>(
            view, stream, kThreads,
            residency<extend_kernel<T, kD>>(stream.device, kThreads, kExtendStages,
                                            ExtendShared<T, kD>::bytes));
    });
}

}  // namespace sglite::cuda
