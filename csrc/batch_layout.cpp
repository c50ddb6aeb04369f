#include "batch_layout.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace sglite {

static void check(const ScheduledTokens& request, const BatchLayout& out) {
    const int64_t known = static_cast<int64_t>(request.token_ids.size());
    const int64_t pages = static_cast<int64_t>(request.pages.size());
    if (request.start < 0 || request.start > request.stop || request.stop > known ||
        request.stop > pages * out.page_size || pages > out.table_width) {
        throw std::invalid_argument("lay_out: positions " + std::to_string(request.start) + " to " +
                                    std::to_string(request.stop) + " of a request that holds " +
                                    std::to_string(known) + " token ids and " +
                                    std::to_string(pages) + " pages of " +
                                    std::to_string(out.page_size));
    }
}

void lay_out(std::span<const ScheduledTokens> requests, const BatchLayout& out) {
    for (const ScheduledTokens& request : requests) check(request, out);
    int64_t token = 0;
    int64_t row = 0;
    out.query_start[0] = 0;
    for (const ScheduledTokens& request : requests) {
        for (int64_t position = request.start; position < request.stop; ++position, ++token) {
            out.input_ids[token] = request.token_ids[position];
            out.positions[token] = position;
            out.slots[token] =
                request.pages[position / out.page_size] * out.page_size + position % out.page_size;
            out.kv_end[token] = static_cast<int32_t>(position + 1);
        }
        int32_t* pages = out.page_table + row * out.table_width;
        std::fill(std::copy(request.pages.begin(), request.pages.end(), pages),
                  pages + out.table_width, 0);
        out.kv_lens[row] = static_cast<int32_t>(request.stop);
        out.query_start[++row] = static_cast<int32_t>(token);
    }
}

}  // namespace sglite
