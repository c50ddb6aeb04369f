#include "cuda/attention_prefill.cuh"

namespace sglite::cuda {

template void launch_prefill<256>(const PrefillArgs&, Stream);
template bool prefill_is_built<256>(int);

}  // namespace sglite::cuda
