// From one decode step to the next: a few integers for each row.
#include "cuda/launchers.h"
#include "cuda/primitives.cuh"

namespace sglite::cuda {

namespace {

constexpr int kThreads = 128;

__device__ int64_t fed(int64_t token) { return token < 0 ? 0 : token; }

template <typename Source>
__global__ void gather_tokens_kernel(GatherTokensArgs args) {
    wait_for_previous_kernel();
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (i < args.count) {
        const int64_t source = static_cast<const Source*>(args.sources)[i];
        if (source >= 0) args.input_ids[i] = fed(args.previous[source]);
    }
    let_next_kernel_start();
}

__global__ void advance_kernel(AdvanceArgs args) {
    wait_for_previous_kernel();
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (row < args.rows && args.kv_lens[row] > 0) {
        args.input_ids[row] = fed(args.token_ids[row]);
        const int64_t position = ++args.positions[row];
        ++args.kv_lens[row];
        ++args.kv_end[row];
        ++args.integers[row * kSampleIntegers + kPosition];
        // A request may run a step further than it lasts; its table may end there.
        const int64_t column = min(position / args.page_size, args.max_pages - 1);
        const int64_t page = args.page_table[row * args.page_table_stride + column];
        args.slots[row] = page * args.page_size + position % args.page_size;
    }
    let_next_kernel_start();
}

Launch one_thread_each(const char* op, int64_t count, Stream stream) {
    return {
        .op = op,
        .grid = dim3(static_cast<unsigned>((count + kThreads - 1) / kThreads)),
        .threads = kThreads,
        .stream = stream,
        .overlaps = true,
    };
}

}  // namespace

void gather_tokens(const GatherTokensArgs& args, Stream stream) {
    const Launch settings = one_thread_each("gather_tokens", args.count, stream);
    if (args.wide) {
        launch<gather_tokens_kernel<int64_t>>(settings, args);
    } else {
        launch<gather_tokens_kernel<int32_t>>(settings, args);
    }
}

void advance(const AdvanceArgs& args, Stream stream) {
    launch<advance_kernel>(one_thread_each("advance", args.rows, stream), args);
}

}  // namespace sglite::cuda
