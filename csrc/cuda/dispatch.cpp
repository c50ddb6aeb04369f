#include <stdexcept>
#include <string>

#include "cuda/kernels.h"

namespace sglite::cuda {

static const Kernels* installed = nullptr;
static StreamSource current_stream = nullptr;

void install(const Kernels* kernels, StreamSource stream_source) {
    installed = kernels;
    current_stream = stream_source;
}

const Kernels& kernels(const char* op) {
    if (!installed) {
        throw std::invalid_argument(
            std::string(op) +
            ": the tensors are on a GPU, but sglite was built without CUDA; install it again with "
            "SGLITE_CUDA=1");
    }
    return *installed;
}

Stream stream_of(const Tensor& tensor) {
    return {current_stream(tensor.device_index), tensor.device_index};
}

}  // namespace sglite::cuda
