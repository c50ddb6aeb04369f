// Norm of queries and keys, rotation, and the writing of keys and values, in one kernel; the same
// bits as rms_norm, apply_rope and write_kv give one after the other.
#include "cuda/launchers.h"
#include "cuda/rope.cuh"

namespace sglite::cuda {

namespace {

constexpr int kMostThreads = 512;

// One block for each token; a group of lanes for each head, two chunks for each lane.
template <typename T, bool kInterleaved>
__global__ void __launch_bounds__(kMostThreads)
    rope_and_write_kv_kernel(RopeAndWriteKvArgs args, HeadLayout layout) {
    const int64_t token = blockIdx.x;
    const int queries = static_cast<int>(args.q_heads), keys = static_cast<int>(args.kv_heads);
    const int rotated = queries + keys, heads = rotated + keys;
    const int head_dim = static_cast<int>(args.head_dim);
    const int lane = threadIdx.x % layout.lanes, place = threadIdx.x / layout.lanes;
    const int at_once = blockDim.x / layout.lanes;
    const int first = layout.first(lane) * kChunk<T>, second = layout.second(lane) * kChunk<T>;
    const T* q_weight = static_cast<const T*>(args.q_weight);
    const T* k_weight = static_cast<const T*>(args.k_weight);
    const auto table_row = [&](int64_t position) {
        return args.cos_sin + max(int64_t{0}, min(position, args.table_rows - 1)) * args.rotary_dim;
    };

    // All that the kernel before this one hardly writes is fetched while that one still runs. It
    // might write the positions, though: the one read here counts only if it is still there after.
    const int64_t guess = load_relaxed(args.positions + token);
    Rotation<T, kInterleaved> rotation;
    rotation.load(table_row(guess), layout, lane);
    if (place == 0) {
        prefetch_line(args.slots + token);
        if (q_weight) {
            prefetch_line(q_weight + first);
            prefetch_line(q_weight + second);
            prefetch_line(k_weight + first);
            prefetch_line(k_weight + second);
        }
    }
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int64_t position = load_relaxed(args.positions + token);
    if (position != guess) rotation.load(table_row(position), layout, lane);
    const int64_t slot = args.slots[token];

    for (int base = 0; base < heads; base += at_once) {
        const int head = base + place;
        const bool active = place < at_once && head < heads;
        T* x = static_cast<T*>(args.qkv) + token * args.token_stride + head * head_dim;
        Chunk<T> a{}, b{};
        if (active) {
            a = load_vector<kChunk<T>>(x + first);
            b = load_vector<kChunk<T>>(x + second);
        }
        if (q_weight) {
            const float squares =
                group_sum(sum_of_squares<T>(a) + sum_of_squares<T>(b), layout.lanes);
            if (active && head < rotated) {
                const T* weight = head < queries ? q_weight : k_weight;
                const float scale = inverse_rms(squares, head_dim, args.epsilon);
                normalize<T>(a, scale, load_vector<kChunk<T>>(weight + first), args.weight_offset);
                normalize<T>(b, scale, load_vector<kChunk<T>>(weight + second), args.weight_offset);
            }
        }
        if (active) {
            if (head < rotated) rotation.apply(a, b, layout, lane);
            T* to = x;
            if (head >= rotated) {
                to = static_cast<T*>(args.v_cache) + (slot * keys + head - rotated) * head_dim;
            } else if (head >= queries) {
                to = static_cast<T*>(args.k_cache) + (slot * keys + head - queries) * head_dim;
            }
            store_vector(to + first, a);
            store_vector(to + second, b);
        }
    }
}

template <typename T>
bool run(const RopeAndWriteKvArgs& args, Stream stream) {
    const bool fits = HeadLayout::fits<T>(args.head_dim, args.rotary_dim, args.interleaved,
                                          args.q_weight, args.cos_sin) &&
                      aligned16<T>({args.token_stride}, {args.qkv, args.k_cache, args.v_cache,
                                                         args.q_weight, args.k_weight});
    if (!fits) return false;
    const auto layout = HeadLayout::of<T>(args.head_dim, args.rotary_dim, args.interleaved);
    const int64_t threads = (args.q_heads + 2 * args.kv_heads) * layout.lanes;
    const Launch settings{
        .op = "rope_and_write_kv",
        .grid = dim3(static_cast<unsigned>(args.tokens)),
        .threads =
            static_cast<int>(min(int64_t{kMostThreads}, (threads + kWarp - 1) / kWarp * kWarp)),
        .stream = stream,
        .overlaps = true,
    };
    if (args.interleaved) {
        launch<rope_and_write_kv_kernel<T, true>>(settings, args, layout);
    } else {
        launch<rope_and_write_kv_kernel<T, false>>(settings, args, layout);
    }
    return true;
}

}  // namespace

bool rope_and_write_kv(const RopeAndWriteKvArgs& args, Stream stream) {
    bool done = false;
    visit_float_type(args.dtype,
                     [&](auto element) { done = run<decltype(element)>(args, stream); });
    return done;
}

}  // namespace sglite::cuda
