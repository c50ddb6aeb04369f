// Paged attention for requests with few query rows: each block streams the keys of its units
// through shared memory, reading into the next unit while it ends the one before. Its four warps
// share a tile of 16 rows: each scores a quarter of the keys, then sums a quarter of the channels.
#include "cuda/attention_launch.cuh"
#include "cuda/attention_tile.cuh"

namespace sglite::cuda {

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kRows = kDecodeRows;
constexpr int kWarpKeys = kTile / kWarps;

template <typename T, int kD>
struct DecodeShared {
    static constexpr int kWeightRow = kTile + 8;  // padded: eight rows lie in different banks
    static constexpr int kStage = 2 * SharedRows<kD>::kElements;
    static constexpr int kQueries = kRows * kD;

    T* ring;         // [stages]: keys and values of a tile
    T* queries;      // [stages][kRows]
    T* weights;      // [kRows][kWeightRow]
    float* largest;  // [kWarps][kRows]

    __device__ DecodeShared(int stages) {
        ring = dynamic_shared<T>();
        queries = ring + stages * kStage;
        weights = queries + stages * kQueries;
        largest = reinterpret_cast<float*>(weights + kRows * kWeightRow);
    }
    static size_t bytes(int stages) {
        return (stages * (kStage + kQueries) + kRows * kWeightRow) * sizeof(T) +
               kWarps * kRows * sizeof(float);
    }
};

// A block's units, one after the other.
template <typename T>
struct UnitCursor {
    const AttentionView<T>& view;
    AttentionUnit unit;
    int work = static_cast<int>(blockIdx.x), index = 0, stop = 0;

    __device__ explicit UnitCursor(const AttentionView<T>& view) : view(view) { find(); }
    __device__ bool is_done() const { return work >= view.works; }
    __device__ int head() const { return work % view.kv_heads; }
    __device__ void advance() {
        if (++index < stop) {
            unit = load_unit(view.units + index);
        } else {
            work += static_cast<int>(gridDim.x);
            find();
        }
    }

  private:
    // The first unit of the next group that has any.
    __device__ void find() {
        for (; work < view.works; work += static_cast<int>(gridDim.x)) {
            const UnitGroup* group = view.groups + work / view.kv_heads;
            unit = load_unit(&group->unit);  // side by side with the next
            const int2 range = load_range(group);
            index = range.x;
            stop = range.x + range.y;
            if (index < stop) return;
        }
    }
};

// Their tiles. A unit without keys has one tile of zeros.
template <typename T, int kD>
struct UnitStream {
    const AttentionView<T>& view;
    const DecodeShared<T, kD>& shared;
    TileLoader<T, kD, kThreads> loader;
    UnitCursor<T> cursor;
    int next_tile = 0, next_queries = 0;
    bool is_first = true;  // tile of its unit

    __device__ UnitStream(const AttentionView<T>& view, const DecodeShared<T, kD>& shared)
        : view(view), shared(shared), cursor(view) {
        enter();
    }

    __device__ void enter() {
        if (cursor.is_done()) return;
        loader.position = cursor.unit.begin / kTile * kTile;
        loader.begin = cursor.unit.begin;
        loader.end = cursor.unit.end;
        loader.head = cursor.head();
        loader.look_up(view, cursor.unit.request);
        is_first = true;
    }

    // Whether the next tile's keys were in the cache before this step.
    __device__ bool is_old() const {
        return !cursor.is_done() && loader.position + kTile + kDecodeRows <= cursor.unit.end;
    }

    __device__ void copy_keys() {
        T* keys = shared.ring + next_tile * DecodeShared<T, kD>::kStage;
        loader.copy(view, keys, keys + SharedRows<kD>::kElements);
    }

    // Starts the copies of the next tile, of whose keys this may have been done. Always ends a
    // group, which may be empty.
    __device__ void copy_tile(bool has_keys = false) {
        if (!cursor.is_done()) {
            if (!has_keys) copy_keys();
            if (is_first) {
                copy_queries<T, kD, kRows>(
                    view, cursor.unit.first_row, cursor.unit.rows, loader.head,
                    shared.queries + next_queries * DecodeShared<T, kD>::kQueries);
                next_queries = next_queries + 1 == view.stages ? 0 : next_queries + 1;
                is_first = false;
            }
            next_tile = next_tile + 1 == view.stages ? 0 : next_tile + 1;
            loader.position += kTile;
            if (loader.position < cursor.unit.end) {
                loader.look_up(view, cursor.unit.request);
            } else {
                cursor.advance();
                enter();
            }
        }
        commit_copies();
    }
};

template <typename T, int kD>
__global__ void __launch_bounds__(kThreads)
    decode_kernel(const __grid_constant__ AttentionView<T> view) {
    constexpr int kSteps = kD / 16;
    constexpr int kChunks = kD / 8 / kWarps;  // of a warp's channels
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int row = lane / 4, column = lane % 4 * 2;
    const DecodeShared<T, kD> shared(view.stages);

    // The kernel before this one may write queries and the keys of this step's tokens. The plan and
    // older keys are there already.
    UnitStream<T, kD> stream(view, shared);
    UnitCursor<T> cursor = stream.cursor;  // of what is at work
    const bool early = view.stages > 1 && stream.is_old();
    if (early) stream.copy_keys();
    wait_for_previous_kernel();
    let_next_kernel_start();
    if (view.stages > 1) stream.copy_tile(early);
    for (int stage = 2; stage < view.stages; ++stage) stream.copy_tile();

    int stage = 0, queries_at = 0;
    for (; !cursor.is_done(); cursor.advance()) {
        const AttentionUnit& unit = cursor.unit;
        const int head = cursor.head();
        const RowPair<T> rows(view, unit, 0);
        uint32_t q[kSteps][4];
        float total[kChunks][4] = {}, total_sum[2] = {}, total_largest[2] = {-INFINITY, -INFINITY};
        float o[kChunks][4] = {}, sum[4] = {}, largest[2] = {-INFINITY, -INFINITY};

        const int first = unit.begin / kTile * kTile;
        int position = first, part = unit.part;
        do {
            if (view.stages == 1) {
                __syncthreads();  // the tile before has been read
                stream.copy_tile();
            }
            wait_for_stage(view.stages);
            __syncthreads();
            const T* keys = shared.ring + stage * DecodeShared<T, kD>::kStage;
            const T* values = keys + SharedRows<kD>::kElements;
            stage = stage + 1 == view.stages ? 0 : stage + 1;
            if (position == first) {
                const T* queries = shared.queries + queries_at * DecodeShared<T, kD>::kQueries;
                queries_at = queries_at + 1 == view.stages ? 0 : queries_at + 1;
#pragma unroll
                for (int step = 0; step < kSteps; ++step) load_left<kD>(q[step], queries, 0, step);
            }
            if (view.stages > 1) stream.copy_tile();

            float scores[2][4] = {};
#pragma unroll
            for (int step = 0; step < kSteps; ++step)
                add_scores<kD>(scores[0], scores[1], q[step], keys, warp * kWarpKeys, step);

            float most[2] = {-INFINITY, -INFINITY};
#pragma unroll
            for (int n = 0; n < 2; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int key = position + warp * kWarpKeys + n * 8 + column + i % 2;
                    float& score = scores[n][i];
                    score = rows.sees(i / 2, key) ? exponent(view, score) : -INFINITY;
                    most[i / 2] = fmaxf(most[i / 2], score);
                }
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                most[i] = fmaxf(most[i], shuffle_xor(most[i], 1));
                most[i] = fmaxf(most[i], shuffle_xor(most[i], 2));
                if (lane % 4 == 0) shared.largest[warp * kRows + row + 8 * i] = most[i];
            }
            __syncthreads();
            float scale[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float after = largest[i];
#pragma unroll
                for (int other = 0; other < kWarps; ++other)
                    after = fmaxf(after, shared.largest[other * kRows + row + 8 * i]);
                scale[i] = exp2_fast(subtract(largest[i], finite(after)));
                largest[i] = after;
            }
#pragma unroll
            for (int n = 0; n < 2; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float at = finite(largest[i]);
                    T* to = shared.weights + (row + 8 * i) * DecodeShared<T, kD>::kWeightRow +
                            warp * kWarpKeys + n * 8 + column;
                    *reinterpret_cast<uint32_t*>(to) =
                        pack_pair<T>(exp2_fast(subtract(scores[n][2 * i], at)),
                                     exp2_fast(subtract(scores[n][2 * i + 1], at)));
                }
            }
            __syncthreads();
            uint32_t weights[4][4];
#pragma unroll
            for (int step = 0; step < 4; ++step) {
                const int matrix = lane / 8;
                load_matrices(weights[step],
                              shared.weights +
                                  (lane % 8 + (matrix & 1) * 8) * DecodeShared<T, kD>::kWeightRow +
                                  (2 * step + (matrix >> 1)) * 8);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[i] = multiply(sum[i], scale[i / 2]);
            add_weights<T>(sum, weights);
#pragma unroll
            for (int n = 0; n < kChunks; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) o[n][i] = multiply(o[n][i], scale[i / 2]);
                add_values<kD>(o[n], weights, values, warp * kChunks + n);
            }

            position += kTile;
            if (position < unit.end && split_begin(split_of(position)) != position) continue;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const MergeFactors merge(total_largest[i], largest[i]);
                total_largest[i] = merge.largest;
                total_sum[i] = merge(total_sum[i], sum[2 * i]);
#pragma unroll
                for (int n = 0; n < kChunks; ++n) {
#pragma unroll
                    for (int j = 2 * i; j < 2 * i + 2; ++j) {
                        total[n][j] = merge(total[n][j], o[n][j]);
                        o[n][j] = 0.0f;
                    }
                }
                sum[2 * i] = sum[2 * i + 1] = 0.0f;
                largest[i] = -INFINITY;
            }
            // The first splits of a row are one part together.
            if (position < unit.end && unit.part == 0) continue;
            const int channel = warp * kChunks * 8 + column;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (unit.parts == 1) {
                    const float factor = inverse(total_sum[i]);
#pragma unroll
                    for (int n = 0; n < kChunks; ++n) {
                        rows.write(view, i, head, channel + n * 8,
                                   multiply(total[n][2 * i], factor),
                                   multiply(total[n][2 * i + 1], factor));
                    }
                } else if (row + 8 * i < unit.rows) {
                    float* record = record_of<kD>(view, unit.first_row + row + 8 * i, head, part);
#pragma unroll
                    for (int n = 0; n < kChunks; ++n) {
                        *reinterpret_cast<float2*>(record + channel + n * 8) =
                            float2{total[n][2 * i], total[n][2 * i + 1]};
                    }
                    if (threadIdx.x % 4 == 0 && warp == 0)
                        *reinterpret_cast<float2*>(record + kD) =
                            float2{total_largest[i], total_sum[i]};
                }
                total_sum[i] = 0.0f;
                total_largest[i] = -INFINITY;
            }
#pragma unroll
            for (int n = 0; n < kChunks; ++n) {
#pragma unroll
                for (float& value : total[n]) value = 0.0f;
            }
            ++part;
        } while (position < unit.end);
        if (unit.parts != 1) finish_records<T, kD>(view, unit, head, part - unit.part);
    }
    wait_copies<0>();
}

template <typename T, int kD>
Residency decode_residency(int device) {
    return residency<decode_kernel<T, kD>>(device, kThreads, kDecodeStages,
                                           DecodeShared<T, kD>::bytes);
}

int groups_of(const AttentionShape& shape, int device, const Residency& residency) {
    const int64_t blocks = machine_of(device).multiprocessors * residency.blocks;
    return static_cast<int>(std::clamp<int64_t>(blocks / shape.kv_heads, 1, kMostGroups));
}

}  // namespace

int decode_groups(const AttentionShape& shape, int device) {
    int groups = 0;
    visit_head_dim(shape.head_dim, [&](auto dim) {
        // The plan does not know the element type, and both take the same room.
        groups = groups_of(shape, device, decode_residency<BFloat16, dim()>(device));
    });
    return groups;
}

void attention_decode(const AttentionArgs& args, Stream stream) {
    visit_attention(args, [&](auto element, auto dim) {
        using T = decltype(element);
        constexpr int kD = decltype(dim)::value;
        const int groups =
            groups_of(args.shape, stream.device, decode_residency<BFloat16, kD>(stream.device));
        AttentionView<T> view = attention_view<T>(args, false);
        view.works = groups * view.kv_heads;
        launch_attention<T, decode_kernel<T, kD>>(view, stream, kThreads,
                                                  decode_residency<T, kD>(stream.device));
    });
}

}  // namespace sglite::cuda
