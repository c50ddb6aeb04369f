// out[i] = table[ids[i]].
#include "cuda/launchers.h"
#include "cuda/primitives.cuh"
#include "cuda/visit.cuh"

namespace sglite::cuda {

namespace {

// One block for each id.
template <typename Unit>
__global__ void embedding_kernel(const Unit* table, const int64_t* ids, Unit* out, int64_t width,
                                 int64_t table_stride, int64_t out_stride) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const Unit* from = table + ids[blockIdx.x] * table_stride;
    Unit* to = out + blockIdx.x * out_stride;
    for (int64_t i = threadIdx.x; i < width; i += blockDim.x) to[i] = from[i];
}

template <typename Unit>
void run(const EmbeddingArgs& args, int64_t elements, Stream stream) {
    const int64_t units = args.width / elements;
    launch<embedding_kernel<Unit>>(
        {
            .op = "embedding",
            .grid = dim3(static_cast<unsigned>(args.count)),
            .threads = static_cast<int>(min(int64_t{256}, (units + kWarp - 1) / kWarp * kWarp)),
            .stream = stream,
            .overlaps = true,
        },
        static_cast<const Unit*>(args.table), args.ids, static_cast<Unit*>(args.out), units,
        args.table_stride / elements, args.out_stride / elements);
}

}  // namespace

void embedding(const EmbeddingArgs& args, Stream stream) {
    visit_float_type(args.dtype, [&](auto element) {
        using T = decltype(element);
        constexpr int64_t kWide = 16 / sizeof(T);
        if (args.width % kWide == 0 &&
            aligned16<T>({args.table_stride, args.out_stride}, {args.table, args.out})) {
            run<uint4>(args, kWide, stream);
        } else {
            run<T>(args, 1, stream);
        }
    });
}

}  // namespace sglite::cuda
