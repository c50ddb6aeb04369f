#include "ops/system_memory.h"

#include <algorithm>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace sglite::ops {

#if defined(__linux__)
namespace {

// The whole pages of some memory, or of a tensor on the CPU; one elsewhere has none.
struct Pages {
    uintptr_t begin, end;

    Pages(const void* data, int64_t bytes) {
        const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
        const auto from = reinterpret_cast<uintptr_t>(data);
        begin = (from + page - 1) / page * page;
        end = std::max(begin, (from + static_cast<uintptr_t>(bytes)) / page * page);
    }
    explicit Pages(const Tensor& tensor)
        : Pages(tensor.data,
                tensor.device == DeviceType::kCPU ? tensor.numel() * dtype_size(tensor.dtype) : 0) {
    }

    void advise(int advice) const {
        if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, advice);
    }
};

}  // namespace
#endif

void advise_huge_pages([[maybe_unused]] const Tensor& storage) {
#if defined(__linux__)
    constexpr uintptr_t kWorthwhile = 512 << 10;
    const Pages pages(storage);
    if (pages.end >= pages.begin + kWorthwhile) pages.advise(MADV_HUGEPAGE);
#endif
}

void map_pages([[maybe_unused]] const Tensor& contents) {
#if defined(__linux__)
    // The system maps so much around what is read. Asked for all at once (MADV_POPULATE_READ) it
    // is as fast, but holds the lock that every thread that needs new memory waits for.
    constexpr uintptr_t kAround = 64 << 10;
    const Pages pages(contents);
    for (uintptr_t at = pages.begin; at < pages.end; at += kAround) {
        static_cast<void>(*reinterpret_cast<const volatile char*>(at));
    }
#endif
}

void give_back_pages([[maybe_unused]] const void* contents, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
    Pages(contents, bytes).advise(MADV_DONTNEED);
#endif
}

}  // namespace sglite::ops
