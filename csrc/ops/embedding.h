// The check that every look-up of rows by id makes.
#pragma once

#include <cstdint>

namespace sglite::ops {

// Throws std::out_of_range for an id outside of a table with `n` rows.
void check_ids(const int64_t* ids, int64_t count, int64_t n);

}  // namespace sglite::ops
