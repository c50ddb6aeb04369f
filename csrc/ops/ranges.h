// Indices that the CPU checks before it follows them. (On a GPU that would cost a wait.)
#pragma once

#include <cstdint>

namespace sglite::ops {

// Throws std::out_of_range, as "op: names[3] is 9, but owner has 8 names", unless all are from 0
// to limit - 1.
void check_range(const char* op, const char* names, const int64_t* values, int64_t count,
                 int64_t limit, const char* owner);

}  // namespace sglite::ops
