// Copies keys and values of new tokens to their slots of the paged cache, and slots to other slots.
#include "cuda/launchers.h"
#include "cuda/primitives.cuh"

namespace sglite::cuda {

namespace {

// One block for each token and side (keys, values); `Unit` is what one thread copies at once.
template <typename Unit>
__global__ void write_kv_kernel(const __grid_constant__ WriteKvArgs args) {
    wait_for_previous_kernel();
    let_next_kernel_start();
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
}

bool fits(const WriteKvArgs& args, uintptr_t bytes) {
    uintptr_t places = args.head_bytes;
    for (const WriteKvArgs::Side& side : args.sides) {
        places |= reinterpret_cast<uintptr_t>(side.from) | reinterpret_cast<uintptr_t>(side.cache) |
                  side.token_stride | side.head_stride;
    }
    return places % bytes == 0;
}

constexpr int kCopyThreads = 256;
constexpr int64_t kCopyShared = 48 * 1024;  // bytes that a block stages

// The tensors of one launch: a kernel's arguments may take 4 KB.
struct Parts {
    CopyKvSlotsArgs::Part all[128];
};
constexpr int64_t kMostParts = sizeof(Parts) / sizeof(CopyKvSlotsArgs::Part);

// One block for some columns of one tensor, `columns` units wide, in all slots: it reads them all
// before it writes the first, since sources and destinations may overlap.
template <typename Unit>
__global__ void __launch_bounds__(kCopyThreads)
    copy_kv_slots_kernel(const __grid_constant__ Parts parts, const int64_t* sources,
                         const int64_t* destinations, int count, int columns) {
    Unit* staged = dynamic_shared<Unit>();
    const CopyKvSlotsArgs::Part& part = parts.all[blockIdx.y];
    auto* data = reinterpret_cast<Unit*>(part.data);
    const int64_t row = part.row_bytes / sizeof(Unit);
    const int64_t first = static_cast<int64_t>(blockIdx.x) * columns;
    wait_for_previous_kernel();
    let_next_kernel_start();
    const auto each = [&](auto&& copy) {
        for (int i = threadIdx.x; i < count * columns; i += kCopyThreads) {
            const int64_t column = first + i % columns;
            if (column < row) copy(i, i / columns, column);
        }
    };
    each([&](int i, int slot, int64_t column) { staged[i] = data[sources[slot] * row + column]; });
    __syncthreads();
    each([&](int i, int slot, int64_t column) {
        data[destinations[slot] * row + column] = staged[i];
    });
}

template <typename Unit>
void run_copy(const CopyKvSlotsArgs& args, Stream stream) {
    // 256 bytes side by side are as good as more, and more blocks are better.
    const int64_t units = min(int64_t{256}, kCopyShared / args.count) / sizeof(Unit);
    for (int64_t start = 0; start < args.num_parts; start += kMostParts) {
        const int64_t count = min(kMostParts, args.num_parts - start);
        Parts parts{};
        int64_t largest = 0;
        for (int64_t i = 0; i < count; ++i) {
            parts.all[i] = args.parts[start + i];
            largest = max(largest, parts.all[i].row_bytes);
        }
        const int64_t row = largest / sizeof(Unit);
        launch<copy_kv_slots_kernel<Unit>>(
            {
                .op = "copy_kv_slots",
                .grid = dim3(static_cast<unsigned>((row + units - 1) / units),
                             static_cast<unsigned>(count)),
                .threads = kCopyThreads,
                .shared_bytes = args.count * units * sizeof(Unit),
                .stream = stream,
                .overlaps = true,
            },
            parts, args.sources, args.destinations, static_cast<int>(args.count),
            static_cast<int>(units));
    }
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

void copy_kv_slots(const CopyKvSlotsArgs& args, Stream stream) {
    constexpr int64_t kMost = kCopyShared / sizeof(uint16_t);
    if (args.count > kMost) {
        throw std::invalid_argument("copy_kv_slots: expected at most " + std::to_string(kMost) +
                                    " slots at once on a GPU, got " + std::to_string(args.count));
    }
    if (args.count == 0) return;
    bool aligned = args.count * static_cast<int64_t>(sizeof(uint4)) <= kCopyShared;
    for (int64_t i = 0; i < args.num_parts; ++i) {
        const CopyKvSlotsArgs::Part& part = args.parts[i];
        aligned &= (reinterpret_cast<uintptr_t>(part.data) | part.row_bytes) % sizeof(uint4) == 0;
    }
    aligned ? run_copy<uint4>(args, stream) : run_copy<uint16_t>(args, stream);
}

}  // namespace sglite::cuda
