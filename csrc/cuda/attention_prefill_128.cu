#include "cuda/attention_prefill.cuh"

namespace sglite::cuda {

template void launch_prefill<128>(const PrefillArgs&, Stream);
template bool prefill_is_built<128>(int);

}  // namespace sglite::cuda
