// Rotary position embedding (Su et al., 2021), in place.
#include "cuda/rope.cuh"

#include "cuda/launchers.h"

namespace sglite::cuda {

namespace {

constexpr int kMostThreads = 512;

// One block for each token; a group of lanes for each head.
template <typename T, bool kInterleaved>
__global__ void __launch_bounds__(kMostThreads)
    rope_kernel(const __grid_constant__ RopeArgs args, HeadLayout layout) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int64_t token = blockIdx.x;
    const int lane = threadIdx.x % layout.lanes, place = threadIdx.x / layout.lanes;
    const int at_once = blockDim.x / layout.lanes;
    if (place >= at_once) return;
    Rotation<T, kInterleaved> rotation;
    rotation.load(args.cos_sin + args.positions[token] * args.rotary_dim, layout, lane);
    const int queries = static_cast<int>(args.heads[0].count);
    const int heads = queries + static_cast<int>(args.heads[1].count);
    for (int head = place; head < heads; head += at_once) {
        const bool is_query = head < queries;
        const RopeArgs::Heads& side = args.heads[is_query ? 0 : 1];
        T* x = static_cast<T*>(side.data) + token * side.token_stride +
               (is_query ? head : head - queries) * side.head_stride;
        T* first = x + layout.first(lane) * kChunk<T>;
        T* second = x + layout.second(lane) * kChunk<T>;
        auto a = load_vector<kChunk<T>>(first), b = load_vector<kChunk<T>>(second);
        rotation.apply(a, b, layout, lane);
        store_vector(first, a);
        store_vector(second, b);
    }
}

// Any size and alignment. One block for each token; its threads take the pairs of all heads.
template <typename T>
__global__ void unaligned_rope_kernel(const __grid_constant__ RopeArgs args) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int64_t token = blockIdx.x;
    const int half = static_cast<int>(args.rotary_dim / 2);
    const float* cosines = args.cos_sin + args.positions[token] * args.rotary_dim;
    const int query_pairs = static_cast<int>(args.heads[0].count) * half;
    const int pairs = query_pairs + static_cast<int>(args.heads[1].count) * half;
    for (int pair = threadIdx.x; pair < pairs; pair += blockDim.x) {
        const bool is_query = pair < query_pairs;
        const RopeArgs::Heads& side = args.heads[is_query ? 0 : 1];
        const int index = is_query ? pair : pair - query_pairs;
        const int head = index / half, i = index % half;
        T* x = static_cast<T*>(side.data) + token * side.token_stride + head * side.head_stride;
        rotate(x[args.interleaved ? 2 * i : i], x[args.interleaved ? 2 * i + 1 : i + half],
               cosines[i], cosines[half + i]);
    }
}

template <typename T>
void run(const RopeArgs& args, Stream stream) {
    Launch settings{
        .op = "apply_rope",
        .grid = dim3(static_cast<unsigned>(args.tokens)),
        .threads = 256,
        .stream = stream,
        .overlaps = true,
    };
    const RopeArgs::Heads &q = args.heads[0], &k = args.heads[1];
    const bool fits = HeadLayout::fits<T>(args.head_dim, args.rotary_dim, args.interleaved, false,
                                          args.cos_sin) &&
                      aligned16<T>({q.token_stride, q.head_stride, k.token_stride, k.head_stride},
                                   {q.data, k.data});
    if (!fits) return launch<unaligned_rope_kernel<T>>(settings, args);
    const auto layout = HeadLayout::of<T>(args.head_dim, args.rotary_dim, args.interleaved);
    const int64_t threads = (q.count + k.count) * layout.lanes;
    settings.threads =
        static_cast<int>(min(int64_t{kMostThreads}, (threads + kWarp - 1) / kWarp * kWarp));
    if (args.interleaved) {
        launch<rope_kernel<T, true>>(settings, args, layout);
    } else {
        launch<rope_kernel<T, false>>(settings, args, layout);
    }
}

}  // namespace

void apply_rope(const RopeArgs& args, Stream stream) {
    visit_float_type(args.dtype, [&](auto element) { run<decltype(element)>(args, stream); });
}

}  // namespace sglite::cuda
