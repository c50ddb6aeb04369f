#include "cuda/attention_prefill.cuh"

namespace sglite::cuda {

template void launch_prefill<64>(const PrefillArgs&, Stream);
template bool prefill_is_built<64>(int);

}  // namespace sglite::cuda
