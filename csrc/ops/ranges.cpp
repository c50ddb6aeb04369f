#include "ops/ranges.h"

#include <stdexcept>
#include <string>

namespace sglite::ops {

void check_range(const char* op, const char* names, const int64_t* values, int64_t count,
                 int64_t limit, const char* owner) {
    for (int64_t i = 0; i < count; ++i) {
        if (values[i] < 0 || values[i] >= limit) {
            throw std::out_of_range(std::string(op) + ": " + names + "[" + std::to_string(i) +
                                    "] is " + std::to_string(values[i]) + ", but " + owner +
                                    " has " + std::to_string(limit) + " " + names);
        }
    }
}

}  // namespace sglite::ops
