// Ops of many small jobs, which hold a team of threads around them.
#pragma once

#include "cpu/kernels.h"
#include "cpu/team.h"

namespace sglite::ops {

// Threads worth holding for parts of so many floating-point operations each.
inline int held_threads(double cost_of_a_part) {
    constexpr double kLeastCost = 1e6;
    return cost_of_a_part < kLeastCost ? 1 : cpu::num_threads();
}

// Calls `body` while a team of so many threads is held.
template <typename Body>
void hold_team(int threads, const Body& body) {
    cpu::hold_team(
        threads, [](const void* context) { (*static_cast<const Body*>(context))(); }, &body);
}

}  // namespace sglite::ops
