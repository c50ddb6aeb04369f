// Marks functions that the host and the device both call.
#pragma once

#ifdef __CUDACC__
#define SGLITE_HOST_DEVICE __host__ __device__
#else
#define SGLITE_HOST_DEVICE
#endif
