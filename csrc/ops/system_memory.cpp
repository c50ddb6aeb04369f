// What the system is told about the memory behind tensors. One that declines is only slower.
#include <algorithm>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "ops.h"

namespace sglite::ops {

#if defined(__linux__)
namespace {

// The whole pages of a tensor on the CPU.
struct Pages {
    uintptr_t begin, end;

    explicit Pages(const Tensor& tensor) {
        const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
        const auto data = reinterpret_cast<uintptr_t>(tensor.data);
        const auto bytes = static_cast<uintptr_t>(tensor.numel() * dtype_size(tensor.dtype));
        begin = (data + page - 1) / page * page;
        end = std::max(begin, (data + bytes) / page * page);
    }
};

}  // namespace
#endif

void advise_huge_pages([[maybe_unused]] const Tensor& storage) {
#if defined(__linux__)
    constexpr uintptr_t kWorthwhile = 512 << 10;
    if (storage.device != DeviceType::kCPU) return;
    const Pages pages(storage);
    if (pages.end < pages.begin + kWorthwhile) return;
    madvise(reinterpret_cast<void*>(pages.begin), pages.end - pages.begin, MADV_HUGEPAGE);
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

}  // namespace sglite::ops
