// What the system is asked to do about the pages behind a tensor. One that declines is only slower.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "ops.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace sglite::ops {

#if defined(__linux__)

namespace {

uintptr_t page_size() { return static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)); }

// Whole pages, as addresses.
struct Pages {
    uintptr_t begin, end;

    explicit Pages(const Tensor& memory) {
        const uintptr_t start = reinterpret_cast<uintptr_t>(memory.data), page = page_size();
        begin = (start + page - 1) / page * page;
        end = (start + memory.numel() * dtype_size(memory.dtype)) / page * page;
    }
};

}  // namespace

void advise_huge_pages(const Tensor& storage) {
    constexpr uintptr_t kWorthwhile = 512 << 10;
    const Pages pages(storage);
    if (storage.device != DeviceType::kCPU || pages.end < pages.begin + kWorthwhile) return;
    madvise(reinterpret_cast<void*>(pages.begin), pages.end - pages.begin, MADV_HUGEPAGE);
}

void map_cached_pages([[maybe_unused]] const Tensor& file) {
#if defined(MADV_POPULATE_READ)
    constexpr uintptr_t kPiece = 32 << 20;
    const Pages pages(file);
    std::vector<unsigned char> is_cached;
    for (uintptr_t begin = pages.begin; begin < pages.end; begin += kPiece) {
        const uintptr_t size = std::min(kPiece, pages.end - begin);
        void* piece = reinterpret_cast<void*>(begin);
        is_cached.resize(size / page_size());
        if (mincore(piece, size, is_cached.data()) != 0) return;
        const auto is_missing = [](unsigned char flags) { return !(flags & 1); };
        if (std::none_of(is_cached.begin(), is_cached.end(), is_missing)) {
            madvise(piece, size, MADV_POPULATE_READ);
        }
    }
#endif
}

#else

void advise_huge_pages(const Tensor&) {}
void map_cached_pages(const Tensor&) {}

#endif

}  // namespace sglite::ops
