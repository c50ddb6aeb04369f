// How the prefill kernel is launched, and whether there is one. Included where a head size is
// instantiated.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>

#include "cuda/attention_prefill.cuh"

#ifdef __CUDACC__

namespace sglite::cuda {

// Keys taken at once: what registers and shared memory allow, as measured on an H100.
template <int kDim>
using PrefillShapeOf = PrefillShape<kDim, prefill_rows(kDim) / 64,
                                    kDim == 64    ? 128
                                    : kDim == 256 ? 80
                                                  : 176,
                                    2>;

template <int kDim>
void launch_prefill(const PrefillArgs& args, Stream stream) {
    using Shape = PrefillShapeOf<kDim>;
    const int items = args.max_tiles * args.kv_heads;
    const Launch settings{
        .op = "paged_attention",
        .grid = dim3(static_cast<unsigned>(std::min(items, args.multiprocessors))),
        .threads = Shape::kThreads,
        .shared_bytes = Shape::kSharedBytes,
        .stream = stream,
        .overlaps = true,
    };
    const auto run = [&]<typename T>(T) {
        if (args.scaled) {
            launch<prefill_kernel<T, Shape, true>>(settings, args);
        } else {
            launch<prefill_kernel<T, Shape, false>>(settings, args);
        }
    };
    args.dtype == DType::kBFloat16 ? run(BFloat16{}) : run(Half{});
}

// The kernel's body uses static shared memory; what stands in for it in code for other targets does
// not. So its size tells whether this GPU would run the body: without launching anything.
template <int kDim>
bool prefill_is_built(int device) {
    static std::array<std::atomic<int>, 64> answers{};  // 0: not asked yet, 1: no, 2: yes
    std::atomic<int>& answer = answers[device % answers.size()];
    if (!answer) {
        const DeviceGuard guard("paged_attention", device);
        cudaFuncAttributes attributes{};
        const bool loads =
            cudaFuncGetAttributes(
                &attributes, prefill_kernel<BFloat16, PrefillShapeOf<kDim>, false>) == cudaSuccess;
        if (!loads) cudaGetLastError();  // no code at all for this GPU: not an error
        answer = loads && attributes.sharedSizeBytes > 0 ? 2 : 1;
    }
    return answer == 2;
}

}  // namespace sglite::cuda

#else

namespace sglite::cuda {

// The emulator has no warpgroups.
template <int kDim>
void launch_prefill(const PrefillArgs&, Stream) {
    throw std::logic_error("paged_attention: no prefill kernel in an emulated build");
}
template <int kDim>
bool prefill_is_built(int) {
    return false;
}

}  // namespace sglite::cuda

#endif
