#include "cuda/attention_prefill.cuh"

namespace sglite::cuda {

template void launch_prefill<96>(const PrefillArgs&, Stream);
template bool prefill_is_built<96>(int);

}  // namespace sglite::cuda
