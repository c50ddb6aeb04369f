// What the library asks of a GPU before it uses one.
#pragma once

#include "cuda/kernels.h"
#include "tensor.h"

namespace sglite::cuda {

// The GPUs that this process can use; 0 without a driver.
int device_count();

// Writes into out (int32[1], on a GPU) the architecture, such as 900, whose code the GPU really
// runs: the one compiled for it, or an older one through PTX. Runs on `stream`.
void running_architecture(const Tensor& out, Stream stream);

}  // namespace sglite::cuda
