// Copies keys and values of new tokens to their slots of the paged cache.
#include "cuda/launchers.h"
#include "cuda/primitives.cuh"

namespace sglite::cuda {

namespace {

// One block for each token and side (keys, values); `Unit` is what one thread copies at once.
template <typename Unit>
__global__ void write_kv_kernel(WriteKvArgs args) {
    wait_for_previous_kernel();
    const int64_t token = blockIdx.x;
    const WriteKvArgs::Side& side = args.sides[blockIdx.y];
    const int per_head = static_cast<int>(args.head_bytes / sizeof(Unit));
    const int units = per_head * static_cast<int>(args.heads);
    const char* from = side.from + token * side.token_stride;
    auto* to =
        reinterpret_cast<Unit*>(side.cache + args.slots[token] * args.heads * args.head_bytes);
    for (int i = threadIdx.x; i < units; i += blockDim.x) {
        const auto* head = reinterpret_cast<const Unit*>(from + i / per_head * side.head_stride);
        to[i] = head[i % per_head];
    }
    let_next_kernel_start();
}

bool fits(const WriteKvArgs& args, uintptr_t bytes) {
    uintptr_t places = args.head_bytes;
    for (const WriteKvArgs::Side& side : args.sides) {
        places |= reinterpret_cast<uintptr_t>(side.from) | reinterpret_cast<uintptr_t>(side.cache) |
                  side.token_stride | side.head_stride;
    }
    return places % bytes == 0;
}

}  // namespace

void write_kv(const WriteKvArgs& args, Stream stream) {
    const Launch settings{
        .op = "write_kv",
        .grid = dim3(static_cast<unsigned>(args.tokens), 2),
        .threads = 128,
        .stream = stream,
        .overlaps = true,
    };
    if (fits(args, sizeof(uint4))) {
        launch<write_kv_kernel<uint4>>(settings, args);
    } else {
        launch<write_kv_kernel<uint16_t>>(settings, args);
    }
}

}  // namespace sglite::cuda
