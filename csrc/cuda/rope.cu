// Rotary position embedding (Su et al., 2021), in place. Products and sums are rounded one by one,
// as torch rounds them.
#include "cuda/launchers.h"
#include "cuda/primitives.cuh"
#include "cuda/visit.cuh"

namespace sglite::cuda {

namespace {

// One block for each token; its threads take the pairs of all heads.
template <typename T>
__global__ void rope_kernel(RopeArgs args) {
    wait_for_previous_kernel();
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
        T& first = x[args.interleaved ? 2 * i : i];
        T& second = x[args.interleaved ? 2 * i + 1 : i + half];
        const float a = to_float(first), b = to_float(second);
        const float cosine = cosines[i], sine = cosines[half + i];
        first = from_float<T>(subtract(multiply(a, cosine), multiply(b, sine)));
        second = from_float<T>(add(multiply(b, cosine), multiply(a, sine)));
    }
    let_next_kernel_start();
}

}  // namespace

void apply_rope(const RopeArgs& args, Stream stream) {
    visit_float_type(args.dtype, [&](auto element) {
        launch<rope_kernel<decltype(element)>>(
            {
                .op = "apply_rope",
                .grid = dim3(static_cast<unsigned>(args.tokens)),
                .threads = 256,
                .stream = stream,
                .overlaps = true,
            },
            args);
    });
}

}  // namespace sglite::cuda
