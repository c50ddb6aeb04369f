#include "cuda/device.h"

#include "cuda/primitives.cuh"

namespace sglite::cuda {

namespace {

__global__ void write_architecture(int* out) {
#ifdef __CUDA_ARCH__
    *out = __CUDA_ARCH__;
#else
    *out = 0;
#endif
}

}  // namespace

int device_count() {
#ifdef __CUDACC__
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
#else
    return 0;
#endif
}

void running_architecture(const Tensor& out, Stream stream) {
    const Check check("running_architecture", "out", out);
    check.dtype(DType::kInt32).shape({1});
    if (out.device != DeviceType::kCUDA) check.fail("a tensor on a CUDA device");
    launch<write_architecture>(
        {.op = "running_architecture", .grid = dim3(1), .threads = kWarp, .stream = stream},
        out.ptr<int>());
}

}  // namespace sglite::cuda
