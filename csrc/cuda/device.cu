#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/device.h"

namespace sglite::cuda {

__global__ void write_architecture(int* out) {
#ifdef __CUDA_ARCH__
    *out = __CUDA_ARCH__;
#endif
}

int device_count() {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

void running_architecture(const Tensor& out, void* stream) {
    Check("running_architecture", "out", out).dtype(DType::kInt32).shape({1});
    if (out.device != DeviceType::kCUDA) {
        Check("running_architecture", "out", out).fail("a tensor on a CUDA device");
    }
    write_architecture<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(out.ptr<int>());
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
        throw std::runtime_error(std::string("running_architecture: ") + cudaGetErrorString(error));
    }
}

}  // namespace sglite::cuda
