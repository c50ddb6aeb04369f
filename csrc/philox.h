// The random numbers of sampling, on both devices.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace sglite {

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): the first 53
// bits of the block with this counter and key. Static, since the CPU's kernels are compiled for
// several instruction sets.
SGLITE_HOST_DEVICE static inline uint64_t random_bits(uint64_t seed, uint64_t position,
                                                      uint32_t sample_index) {
    uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(position >> 32);
    uint32_t c2 = sample_index, c3 = 0;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t first = 0xD2511F53u * uint64_t{c0}, second = 0xCD9E8D57u * uint64_t{c2};
        c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(second);
        c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(first);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return uint64_t{c0} << 21 | c1 >> 11;
}

}  // namespace sglite
