// Paged attention for what the tensor cores do not take: float32, any head size, any page size and
// alignment, sinks. One warp for each row, one key after the other. Slow.
#include "cuda/attention.h"
#include "cuda/launchers.h"
#include "cuda/primitives.cuh"
#include "cuda/visit.cuh"

namespace sglite::cuda {

namespace {

template <typename T>
__global__ void plain_attention_kernel(const __grid_constant__ AttentionArgs args) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int lane = threadIdx.x;
    const int token = static_cast<int>(blockIdx.x), query_head = static_cast<int>(blockIdx.y);
    const AttentionShape& shape = args.shape;
    const int64_t head = query_head / shape.group(), width = shape.head_dim;
    float* sums = dynamic_shared<float>();  // [head_dim], each lane's own channels

    // The request whose token this is: the last one that starts at or before it.
    int request = 0, behind = static_cast<int>(shape.requests);
    while (behind - request > 1) {
        const int middle = (request + behind) / 2;
        if (args.query_start[middle] <= token) {
            request = middle;
        } else {
            behind = middle;
        }
    }
    const int stop = args.query_start[request + 1];
    if (token >= stop) return;  // of no request
    const int position = args.kv_lens[request] - stop + token;
    const int end = args.kv_end[token];
    const int begin = shape.window ? max(0, position - static_cast<int>(shape.window) + 1) : 0;
    const T* q = static_cast<const T*>(args.q.data) + token * args.q.token_stride +
                 query_head * args.q.head_stride;
    const int32_t* table = args.page_table + request * shape.table_width;

    for (int64_t i = lane; i < width; i += kWarp) sums[i] = 0.0f;
    float largest = -INFINITY, sum = 0.0f;
    for (int key = begin; key < end; ++key) {
        const int64_t slot = table[key / shape.page_size] * shape.page_size + key % shape.page_size;
        const int64_t from = (slot * shape.kv_heads + head) * width;
        const T* k = static_cast<const T*>(args.k_cache) + from;
        const T* v = static_cast<const T*>(args.v_cache) + from;
        float dot = 0.0f;
        for (int64_t i = lane; i < width; i += kWarp) dot += to_float(q[i]) * to_float(k[i]);
        float score = warp_sum(dot) * static_cast<float>(args.scale);
        if (args.soft_cap != 0.0) {
            const auto cap = static_cast<float>(args.soft_cap);
            score = tanhf(score / cap) * cap;
        }
        const float after = fmaxf(largest, score);
        const float scale = expf(largest - after), weight = expf(score - after);
        largest = after;
        sum = sum * scale + weight;
        for (int64_t i = lane; i < width; i += kWarp)
            sums[i] = sums[i] * scale + weight * to_float(v[i]);
    }
    if (args.sinks && sum != 0.0f) sum += expf(args.sinks[query_head] - largest);
    T* out = static_cast<T*>(args.out.data) + token * args.out.token_stride +
             query_head * args.out.head_stride;
    for (int64_t i = lane; i < width; i += kWarp)
        out[i] = from_float<T>(sum == 0.0f ? 0.0f : sums[i] / sum);
}

}  // namespace

void attention_plain(const AttentionArgs& args, Stream stream) {
    visit_float_type(args.dtype, [&](auto element) {
        launch<plain_attention_kernel<decltype(element)>>(
            {
                .op = "paged_attention",
                .grid = dim3(static_cast<unsigned>(args.shape.tokens),
                             static_cast<unsigned>(args.shape.q_heads)),
                .threads = kWarp,
                .shared_bytes = static_cast<size_t>(args.shape.head_dim) * sizeof(float),
                .stream = stream,
                .overlaps = true,
            },
            args);
    });
}

}  // namespace sglite::cuda
